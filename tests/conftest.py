"""Fixtures: every backend on its device, seeded randomness, sample layers, the data beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import resmoe_kernels
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.sparse import pack_bitmap, pack_block

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

# TRITON_INTERPRET=1: this process runs the Triton kernels on the CPU, and nothing else; see make interpret.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["test_triton_interpreter.py"]
if INTERPRETED:
    import interpreter

    interpreter.repair()
    torch.use_deterministic_algorithms(True)  # only so that torch.empty comes filled with NaN or the largest integer


def _runs_in_this_process(item: pytest.Item) -> bool:
    marked = item.get_closest_marker("interpreter") is not None
    if not INTERPRETED:
        return not marked
    uses_kernels = not {"backend", "on_triton"}.isdisjoint(item.fixturenames)
    return marked or (uses_kernels and not item.get_closest_marker("gpu"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if _runs_in_this_process(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
    items[:] = here
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """shared(name): a path of the data folder beside the checkout; skips where there is none, fails in CI."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            (pytest.fail if os.environ.get("CI") else pytest.skip)(
                f"needs {name} in a folder shared/ beside the checkout"
            )
        return path

    return find


class Backend(NamedTuple):
    name: str
    device: str
    prefill: bool = False  # few tokens, too, take the kernels for many


def _triton() -> Iterator:
    device, marks = ("cpu", ()) if INTERPRETED else ("cuda", pytest.mark.gpu)
    where = "interpreted" if INTERPRETED else "on-cuda"
    yield pytest.param(Backend("triton", device), id=f"triton-decode-{where}", marks=marks)
    yield pytest.param(Backend("triton", device, prefill=True), id=f"triton-prefill-{where}", marks=marks)


def _backends() -> Iterator:
    """The default and every backend, where they run: later kernels get the same cases."""
    for name in () if INTERPRETED else ("auto", "reference", "cpu"):
        if name in ("auto", *resmoe_kernels.backends()):
            yield pytest.param(Backend(name, "cpu"), id=f"{name}-on-cpu")
        if name != "cpu":
            yield pytest.param(Backend(name, "cuda"), id=f"{name}-on-cuda", marks=pytest.mark.gpu)
    yield from _triton()


@contextmanager
def _running(backend: Backend) -> Iterator[Backend]:
    with pytest.MonkeyPatch.context() as patch, resmoe_kernels.backend(backend.name):
        if backend.prefill:
            patch.setattr("resmoe_kernels.experts_triton.decodes", lambda problem, target: False)
        yield backend


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with _running(request.param) as running:
        yield running


@pytest.fixture(params=_triton())
def on_triton(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The Triton kernels alone: those for few tokens, and those for many."""
    with _running(request.param) as running:
        yield running


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For modules of tiny tensors, where threads only wait for each other: 7 s, not 56, on 2 busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251206)


MakeLayer = Callable[..., FactoredExperts]


@pytest.fixture
def make_layer(generator: torch.Generator) -> MakeLayer:
    """make_layer(...): a random layer; its residuals are as large as the base, so that none is lost unseen.

    ranks: rank of each expert, for both matrices (down reversed, so that a mix-up of the two shows)
    sparse: n for the block layout, "bitmap", or "empty" for a bitmap that keeps nothing
    only: "gate_up" or "down" leaves the other matrix without residual
    """

    def make(
        *,
        num_experts: int = 6,
        hidden_size: int = 45,  # 45 and 37: odd, two words a row, and no multiple of a tile
        intermediate_size: int = 37,
        gated: bool = True,
        factorization: str = "stacked",
        group: list[int] | None = None,
        ranks: list[int] | None = None,
        sparse: int | str | None = None,
        bias: bool = False,
        only: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FactoredExperts:
        sizes = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
        }
        E, H, inner = num_experts, hidden_size, intermediate_size
        shapes = {"gate_up": ((2 if gated else 1) * inner, H), "down": (H, inner)}
        matrices = {m: s for m, s in shapes.items() if only in (None, m)}

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        t: dict[str, Tensor] = {}
        if group is not None:
            t["group"] = torch.tensor(group, dtype=torch.int32)
            for m, (N, K) in shapes.items():
                t[f"base_{m}"] = normal(max(group) + 1, N, K, scale=K**-0.5)
        if ranks is not None:
            own = {"gate_up": ranks, "down": ranks[::-1]}
            if factorization == "joint":
                total = sum(ranks)
                t["rank_offsets_gate_up"] = torch.tensor([0, *ranks], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                t["u_gate_up"] = normal(total, inner, scale=inner**-0.5)
                t["v_gate_up"] = normal(total, (2 if gated else 1) * H, scale=2.0)
                t["u_down"] = normal(total, H, scale=2.0)
            else:
                for m, (N, K) in matrices.items():
                    left = inner if m == "gate_up" and factorization == "separate" else N
                    t[f"rank_offsets_{m}"] = torch.tensor([0, *own[m]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                    t[f"u_{m}"] = normal(sum(own[m]), left, scale=0.5)
                    t[f"v_{m}"] = normal(sum(own[m]), K, scale=K**-0.5)
        for m, (N, K) in matrices.items() if sparse is not None else ():
            dense = normal(E, N, K, scale=2 * K**-0.5)
            if isinstance(sparse, int):
                t[f"mask_{m}"], t[f"values_{m}"] = pack_block(dense, sparse)
            else:
                keep = torch.rand((E * N, K), generator=generator) < (0.0 if sparse == "empty" else 0.25)
                if sparse == "bitmap":
                    keep[:, min(31, K - 1)] = True  # the sign bit of every word
                    keep[0], keep[1] = False, True  # a row of none, a row of all
                mask, t[f"values_{m}"], offsets = pack_bitmap(dense.view(E * N, K), keep)
                t[f"mask_{m}"] = mask.view(E, N, -1)
                # One of each dtype that row offsets may have.
                t[f"row_offsets_{m}"] = offsets.to(torch.int32) if m == "gate_up" else offsets
        if bias:
            t["bias_gate_up"] = normal(E, shapes["gate_up"][0], scale=0.5)
            t["bias_down"] = normal(E, H, scale=0.5)
        return FactoredExperts.from_tensors(t, **sizes, gated=gated, factorization=factorization)

    return make
