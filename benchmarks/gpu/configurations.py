"""Every configuration that the op's Triton kernels are started in, and how Triton specialises it, without a GPU.

A configuration is a kernel with its constants, tile sizes and specialised argument types. Calls of
``triton_kernels.experts`` on tensors without memory are written down (``recorded``) for four real model shapes, every
form and T = 1 ... 4096, and put through Triton's own ``warmup`` for GPUs that are not there.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.shapes import SHAPES, Shape, rank_offsets
from resmoe_kernels import FactoredExperts
from resmoe_kernels.triton_kernels import experts as experts_triton
from resmoe_kernels.triton_kernels.launch import Launch, recorded

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MODELS = ("mixtral", "dsv2lite", "qwen3", "olmoe")
TOKENS = (1, 8, 64, 512, 4096)
RETAIN = 0.25
BLOCK = 8  # of 32
KEY = ("target", "kernel", "warps", "stages", "constants", "arguments")


# ---- what is launched


@dataclass(frozen=True)
class Case:
    """One call of the op: parts, of "lowrank", "block", "bitmap", "bias"; groups 0 for no base."""

    shape: Shape
    parts: tuple[str, ...]
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    groups: int = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.name} {'+'.join(self.parts)} {dtype} G={self.groups} T={self.tokens}"


def cases() -> list[Case]:
    """Every form at every shape, and the rarer ways to call the op at one shape."""
    usual = [
        Case(SHAPES[model], (form,), tokens)
        for model in MODELS
        for form in ("lowrank", "block", "bitmap")
        for tokens in TOKENS
    ]
    olmoe = SHAPES["olmoe"]
    rare = [
        case
        for tokens in (8, 512)
        for case in (
            Case(olmoe, ("lowrank", "block", "bias"), tokens, groups=4),
            Case(olmoe, ("lowrank",), tokens, torch.float16),
            Case(olmoe, ("lowrank",), tokens, torch.float32),
            Case(SHAPES["switch32"], ("lowrank",), tokens),
        )
    ]
    return usual + rare


def layer(case: Case) -> FactoredExperts:
    """Weights of a case as meta tensors: shapes and dtypes, no memory."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    E, tensors = case.shape.num_experts, {}
    for matrix in ("gate_up", "down"):
        N, K = case.shape.sides(matrix)
        if case.groups:
            tensors[f"base_{matrix}"] = empty(case.groups, N, K)
        if "lowrank" in case.parts:
            R = int(rank_offsets(E, N, K, RETAIN)[-1])
            tensors[f"u_{matrix}"], tensors[f"v_{matrix}"] = empty(R, N), empty(R, K)
            tensors[f"rank_offsets_{matrix}"] = empty(E + 1, dtype=torch.int32)
        if "block" in case.parts or "bitmap" in case.parts:
            tensors[f"mask_{matrix}"] = empty(E, N, K // 32, dtype=torch.int32)
        if "block" in case.parts:
            tensors[f"values_{matrix}"] = empty(E, N, K // 32, BLOCK)
        if "bitmap" in case.parts:
            tensors[f"values_{matrix}"] = empty(int(RETAIN * E * N * K))
            tensors[f"row_offsets_{matrix}"] = empty(E * N + 1, dtype=torch.int32)
        if "bias" in case.parts:
            tensors[f"bias_{matrix}"] = empty(E, N)
    return FactoredExperts(
        num_experts=E,
        hidden_size=case.shape.hidden_size,
        intermediate_size=case.shape.intermediate_size,
        gated=case.shape.gated,
        group=empty(E, dtype=torch.int32) if case.groups else None,
        **tensors,
    )


def launches(case: Case, target: str) -> list[Launch]:
    """The kernels that one call starts."""
    T, top_k = case.tokens, case.shape.top_k
    x = torch.empty(T, case.shape.hidden_size, dtype=case.dtype, device="meta")
    index = torch.empty(T, top_k, dtype=torch.int64, device="meta")
    weights = torch.empty(T, top_k, dtype=case.dtype, device="meta")
    with recorded(target) as found:
        experts_triton.experts(x, index, weights, layer(case), case.shape.activation)
    return found


# ---- how Triton specialises and compiles it


class NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: str) -> None:
        cuda = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if cuda else GPUTarget("hip", target, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> NoGpu:
        return self  # what Triton keeps compiled kernels by: nothing is found that was compiled for another

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextmanager
def pretending(target: str) -> Iterator[None]:
    """Kernels are compiled for this target, whatever GPU there is."""
    before = driver._active
    driver.set_active(NoGpu(target))
    try:
        yield
    finally:
        driver._active = before


def warmup(launch: Launch) -> object:
    """Compiles a launch as ``triton_kernels.launch.launch`` would; None where a hook prevents it."""
    options = {"launch_pdl": True} if launch.overlaps else {}
    return launch.kernel.warmup(
        *launch.arguments,
        **launch.constants,
        **options,
        grid=launch.grid,
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
    )


@dataclass
class Configuration:
    """Launches that run the same code. key: target, kernel ... as text, see KEY; launched_by: the cases"""

    key: tuple[str, ...]
    source: str
    launch: Launch
    launched_by: list[str]

    @property
    def target(self) -> str:
        return self.key[0]


def configurations(
    target: str, of: Iterable, launches_of: Callable[[Any, str], list[Launch]] | None = None
) -> list[Configuration]:
    """Of every kernel that the cases start, without compiling; sorted. launches_of(case, target): what one starts"""
    launches_of = launches_of or launches
    found: dict[tuple[str, ...], Configuration] = {}
    specialised: list[dict] = []

    def note(*, compile: dict, **_: object) -> bool:
        specialised.append(compile)
        return True  # already taken care of: nothing is compiled

    with pretending(target), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        for case in of:
            for launch in launches_of(case, target):
                warmup(launch)
                constants, arguments = _described(launch, specialised.pop(), target)
                tile = launch.tile
                key = (target, launch.name, str(tile.warps), str(tile.stages), constants, arguments)
                if key not in found:
                    found[key] = Configuration(key, source_hash(launch.kernel), launch, [])
                if str(case) not in found[key].launched_by:
                    found[key].launched_by.append(str(case))
    return [found[key] for key in sorted(found)]


def _described(launch: Launch, compile: dict, target: str) -> tuple[str, str]:
    """Constants as name=value; arguments as their types in order, - for None, a number where it is compiled in.
    Addresses are multiples of 16 unless they end in !16, numbers are where they end in %16; on AMD buffers are below
    2 GiB unless they end in >2G."""
    values, attributes = compile["constants"], compile["configs"][0]
    amd = target.startswith("gfx")
    constants, arguments = [], []
    for i, (name, kind) in enumerate(compile["signature"].items()):
        if i in launch.kernel.constexprs:
            constants.append(f"{name}={values[(i,)]}")
        elif kind == "constexpr":
            arguments.append("-" if values[(i,)] is None else str(values[(i,)]))
        else:
            has = {attribute for attribute, _ in attributes.get((i,), [])}
            if kind.startswith("*"):
                kind += "" if "tt.divisibility" in has else "!16"
                kind += ">2G" if amd and "tt.pointer_range" not in has else ""
            else:
                kind += "%16" if "tt.divisibility" in has else ""
            arguments.append(kind)
    return " ".join(constants), " ".join(arguments)


def source_hash(kernel: JITFunction) -> str:
    """Changes with the code of a kernel and of the jitted functions it calls, not with their comments or places."""
    sources: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        if function.__name__ in sources:
            return
        tree = ast.parse(function.src)
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]  # the docstring
        sources[function.__name__] = ast.unparse(tree)
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            called = function.fn.__globals__.get(name)
            if isinstance(called, JITFunction):
                visit(called)

    visit(kernel)
    return hashlib.sha256("\n".join(sources.values()).encode()).hexdigest()[:12]
