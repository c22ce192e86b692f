"""Which kernels take a call, and tile sizes of Triton's: measured on a GPU where there is such a table, else reasoned.

No kernel, no torch and no GPU is needed here: a choice is a function of numbers. ``tuned/<device>.json`` is written by
``benchmarks/gpu/tune.py``; no such file is shipped before it was measured.

A target is an architecture (``sm_90``), whose numbers are those of GPUS, or a device of one (``sm_90 NVIDIA H200``),
whose numbers its driver gave (``meet``): devices of one architecture differ by half in bandwidth.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import ceil, log2
from pathlib import Path

DECODE_KERNELS = ("decode_x", "decode_gate_up", "decode_h", "decode_down")
PREFILL_KERNELS = ("prefill_shrink", "prefill_gate_up", "prefill_down", "prefill_sum")
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
TUNED = Path(__file__).with_name("tuned")


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel takes at a time.

    tokens: columns of its products: tokens where few are decoded, token-expert pairs in prefill
    rows: rows of a weight matrix
    depth: of a sum, per step of its loop
    splits: programs that share the experts, or the sum, of one tile
    """

    tokens: int
    rows: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Problem:
    """One call, as far as tile sizes depend on it.

    rank_gate_up, rank_down: mean rank of an expert, rounded up; 0 where there is no low rank
    sparse: whether there is a sparse residual
    itemsize: bytes of an operand of the products, 2 or 4
    """

    tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    groups: int
    rank_gate_up: int
    rank_down: int
    sparse: bool
    itemsize: int


@dataclass(frozen=True)
class Gpu:
    """The numbers of a target that tiles are chosen by.

    units: streaming multiprocessors or compute units
    shared: bytes of shared memory (LDS) that one program may have
    gb_per_s: of DRAM, by the data sheet or from the memory's clock and width
    stages: most steps of a loop whose loads are worth having in flight. AMD's pipeliner holds them in registers
    """

    units: int
    shared: int
    gb_per_s: int
    stages: int

    @property
    def in_flight(self) -> float:
        """Bytes that every unit must have asked for to keep DRAM busy: bandwidth times about 1 microsecond of latency
        under load (Little's law). 25 KB on an H100."""
        return self.gb_per_s * 1e3 / self.units


GPUS = {  # A100, RTX 4090, H100 SXM, B200, MI300X
    "sm_80": Gpu(108, 163 << 10, 2039, 5),
    "sm_89": Gpu(128, 99 << 10, 1008, 5),
    "sm_90": Gpu(132, 227 << 10, 3350, 6),
    "sm_100": Gpu(148, 227 << 10, 8000, 6),
    "gfx942": Gpu(304, 64 << 10, 5300, 2),
}
STEP = 8192  # bytes of weights per step of a decode loop: each thread of four warps copies four times 16 bytes
EXPANDED = 16  # numbers of a sparse residual per thread and step: with 32, and their addresses, registers spill
PER_UNIT = 2  # programs wanted on a unit: one starts, or adds up, while another's loads are on their way
# Splits are limited so that partial sums, written and read, are at most an eighth of the weights read. They are some
# hundreds of kilobytes a split, so that they stay in L2 and cost DRAM nothing; with a 32nd, decode at 64 tokens left
# half of an H100 without a program.
PARTIALS = 8
BASE_SPLITS = 8  # parts of the sum over groups of the base of down, each a float32 sum of every token in memory


# ---- which kernels


@dataclass(frozen=True)
class Row:
    """Calls of up to so many tokens go to the persistent ``cuda`` kernel unasked, and all others to ``triton``."""

    tokens: int
    reason: str


# What the persistent kernels can gain is launches: two, one of which clears their flags, where Triton needs four: in
# benchmarks/gpu/projection.py 2 to 3 of the 15 to 70 microseconds of fine-grained experts. But their blocks wait for
# each other through flags in memory, so a fault hangs a GPU instead of failing. A row is raised when its kernel has
# passed `pytest -m gpu` on its target and was faster there (bench_experts.py, --backend cuda beside triton). Reasons
# say what is projected for an H100 at the shapes of Mixtral, DeepSeek-V2-Lite, Qwen3 and OLMoE; that is no measurement.
UNTRIED = "no GPU has run it, and a fault would hang one"
CUDA_UP_TO = {
    # target, form
    ("sm_80", "low-rank"): Row(0, UNTRIED),
    ("sm_80", "block-sparse"): Row(0, UNTRIED),
    ("sm_89", "low-rank"): Row(0, UNTRIED),
    ("sm_89", "block-sparse"): Row(0, UNTRIED),
    ("sm_90", "low-rank"): Row(0, f"{UNTRIED}; projected ahead of triton up to 16 tokens"),
    ("sm_90", "block-sparse"): Row(0, f"{UNTRIED}; projected ahead of triton up to 2 tokens"),
    ("sm_100", "low-rank"): Row(0, UNTRIED),
    ("sm_100", "block-sparse"): Row(0, UNTRIED),
}


def cuda_up_to(target: str, sparse: bool) -> Row:
    """The row of a layer whose form the CUDA kernels serve, on a GPU that they run on; no tokens where none is listed.

    target: ``sm_90``;  sparse: whether it has a sparse residual
    """
    return CUDA_UP_TO.get((target, "block-sparse" if sparse else "low-rank"), Row(0, UNTRIED))


def decodes(problem: Problem, target: str) -> bool:
    """Whether the decode kernels take a call; they keep all of its tokens in one tile."""
    return problem.tokens <= 64


# ---- which tiles


@lru_cache(4096)
def tile_of(kernel: str, problem: Problem, target: str) -> Tile:
    """The tile sizes of one kernel for one call on one target.

    kernel: of DECODE_KERNELS or PREFILL_KERNELS
    target: of TARGETS, another ``sm_..`` or ``gfx..``, a device of one, or ``interpreter``
    """
    problem = replace(problem, tokens=_power(problem.tokens))  # or every number of tokens would compile kernels anew
    if target == "interpreter":
        return _interpreter_tile(kernel, problem)
    tile = _tuned_tile(kernel, problem, target)
    if tile is None:
        tile = (_decode_tile if kernel in DECODE_KERNELS else _prefill_tile)(kernel, problem, gpu_of(target))
    return tile


_met: dict[str, Gpu] = {}


def meet(target: str, units: int, shared: int, gb_per_s: int) -> None:
    """From now on a device has these numbers, asked of its driver; 0 where the driver does not know one."""
    usual = gpu_of(arch_of(target))
    _met[target] = Gpu(units or usual.units, shared or usual.shared, gb_per_s or usual.gb_per_s, usual.stages)


def arch_of(target: str) -> str:
    """``sm_90`` of ``sm_90 NVIDIA H200`` and of ``sm_90``"""
    return target.partition(" ")[0]


def gpu_of(target: str) -> Gpu:
    """Numbers of a device that was met, else of its architecture; one that is not listed gets those of the listed
    one with the least shared memory of its make."""
    if target in _met:
        return _met[target]
    arch = arch_of(target)
    return GPUS.get(arch, GPUS["sm_89" if arch.startswith("sm_") else "gfx942"])


def table_of(target: str) -> Path:
    """Where the tiles measured on a target are kept: ``tuned/NVIDIA_H200.json``, ``tuned/sm_90.json``."""
    return TUNED / (re.sub("[^A-Za-z0-9_]+", "_", target.partition(" ")[2] or target) + ".json")


def base_splits(tile: Tile, groups: int) -> int:
    """Programs that share the groups of one tile of ``decode_h``'s base."""
    return max(1, min(groups, tile.splits, BASE_SPLITS))


def experts_hit(problem: Problem) -> float:
    """Distinct experts that uniform routing of all tokens is expected to meet: E (1 - (1 - top_k / E)^T)."""
    E = problem.num_experts
    return E * (1 - (1 - min(problem.top_k, E) / E) ** problem.tokens)


def shared_bytes(kernel: str, problem: Problem, tile: Tile) -> int:
    """Bytes of shared memory that the loads of a tile's loop take, every stage of it."""
    rows = tile.rows * _halves(kernel, problem)
    return tile.stages * (rows + tile.tokens) * tile.depth * problem.itemsize


# ---- measured


@lru_cache(16)
def read_table(path: Path) -> list[tuple[str, Problem, Tile]]:
    """(kernel, problem, tile) of a table that ``write_table`` wrote; empty where there is none."""
    if not path.is_file():
        return []
    entries = json.loads(path.read_text())["tiles"]
    return [(e["kernel"], Problem(**e["problem"]), Tile(**e["tile"])) for e in entries]


def _tuned_tile(kernel: str, problem: Problem, target: str) -> Tile | None:
    """The measured tile of the nearest tokens and ranks (by ratio), where everything else was the same."""
    tiles = [
        (distance, tile)
        for name, measured, tile in read_table(table_of(target))
        if name == kernel and (distance := _distance(measured, problem)) is not None
    ]
    if not tiles:
        return None
    tile = min(tiles, key=lambda pair: pair[0])[1]
    if kernel in DECODE_KERNELS:
        tile = replace(tile, tokens=_decode_tokens(problem))
    return tile if shared_bytes(kernel, problem, tile) <= gpu_of(target).shared else None


def _distance(measured: Problem, problem: Problem) -> float | None:
    near = ("tokens", "rank_gate_up", "rank_down")
    pairs = [(getattr(measured, name), getattr(problem, name)) for name in near]
    if replace(measured, **{name: getattr(problem, name) for name in near}) != problem:
        return None
    if any((a == 0) != (b == 0) for a, b in pairs):
        return None
    return sum(abs(log2(a / b)) for a, b in pairs if a)


def write_table(path: Path, tiles: list[tuple[str, Problem, Tile]], **about: str) -> None:
    """Writes a table that ``tile_of`` reads, whole or not at all. about: what it was measured on."""
    entries = [{"kernel": k, "problem": asdict(p), "tile": asdict(t)} for k, p, t in tiles]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps({**about, "tiles": entries}, indent=1) + "\n")
    new.replace(path)
    forget()


def forget() -> None:
    """Tables are read, and tiles chosen, again at the next call."""
    read_table.cache_clear()
    tile_of.cache_clear()


# ---- defaults


def _cdiv(a: float, b: float) -> int:
    return max(1, ceil(a / b))


def _power(n: float) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, ceil(n) - 1).bit_length()


def _halves(kernel: str, problem: Problem) -> int:
    """Gate and up rows are taken together, so that the activation needs no other program."""
    return 2 if kernel.endswith("gate_up") and problem.gated else 1


def _decode_tokens(problem: Problem) -> int:
    return max(16, _power(problem.tokens))  # 16: the least that a tensor-core product of Triton takes


def _interpreter_tile(kernel: str, problem: Problem) -> Tile:
    """Small, so that every loop of the tests' layers (H = 45, I = 37, ranks to 33) has more than one step and a
    remainder, and partial sums are added. The interpreter's time is per program and per operation, of any size."""
    if kernel == "prefill_sum":
        return Tile(tokens=16, rows=32, depth=16)
    over_ranks_only = kernel == "decode_down" or (kernel.endswith(("gate_up", "down")) and not problem.sparse)
    depth = 16 if over_ranks_only and (kernel in DECODE_KERNELS or problem.groups <= 1) else 32
    if kernel in DECODE_KERNELS:
        return Tile(_decode_tokens(problem), rows=32, depth=depth, splits=2)
    return Tile(tokens=16, rows=32, depth=depth)


def _decode_tile(kernel: str, problem: Problem, gpu: Gpu) -> Tile:
    """Decode is reading weights: all that counts is that every unit has enough of them on the way from DRAM, always.

    A layer of fine-grained experts at one token is 30 MB, about 10 microseconds: there is no second wave to even things
    out, so tiles shrink, and splits grow, until there are PER_UNIT programs for every unit.
    """
    tokens, halves, size = _decode_tokens(problem), _halves(kernel, problem), problem.itemsize
    sparse = problem.sparse and kernel in ("decode_gate_up", "decode_h")
    rank = problem.rank_gate_up if kernel in ("decode_x", "decode_gate_up") else problem.rank_down
    if kernel in ("decode_x", "decode_h"):
        # Weights lie along the sum. A program of the base reads all tokens from L2: with as many rows as tokens that is
        # no more than the weights it reads. Above 64 rows nothing is gained: decode reads weights once at any size.
        # Sparse tiles of few tokens take 32 rows: 32 x 64 issue 10 instructions a number where 64 x 32 issue 14.
        most = 32 if sparse and tokens <= 16 else 64
        sizes = [rows for rows in (64, 32, 16) if tokens <= rows <= most]
        least_depth, K = 32, problem.hidden_size if kernel == "decode_x" else problem.intermediate_size
    else:
        # U lies (R, N): a step reads `depth` pieces of `rows` numbers. 64 bytes are what DRAM gives at once, 128 a line
        # of L2.
        least, most = 16 if sparse and not rank else 64 // size, min(64 // halves if sparse else 64, 128 // size)
        sizes = [rows for rows in (64, 32, 16) if least <= rows <= most]
        least_depth, K = (32, problem.hidden_size) if sparse else (16, rank)
    for rows in sizes:  # the largest that fills the GPU, else the smallest
        splits, programs = _decode_grid(kernel, problem, rows, gpu)
        if programs >= PER_UNIT * gpu.units:
            break
    step = EXPANDED * 4 * 32 * size if sparse else STEP
    depth = max(least_depth, min(step // (rows * halves * size), _power(K)))
    if sparse and kernel == "decode_h":
        depth = min(depth, 64)  # 16 x 128 spill on sm_100
    # A gated tile keeps gate, up and the sum over experts: at 64 x 64 that is 96 registers of every thread of 4 warps.
    accumulators = 3 if halves == 2 else 1
    warps = 8 if accumulators * rows * tokens > 8192 else 4

    # Stages: until the programs of a unit together have asked for what DRAM needs. What a sparse tile gathers goes to
    # registers, and more stages would only hold more of its tokens.
    weights, both = (rows * halves * depth * size, (rows * halves + tokens) * depth * size)
    stages = 2 if sparse else 3
    while stages < gpu.stages and not sparse and K:
        on_unit = max(1, min(programs / gpu.units, gpu.shared // (stages * both)))
        if (stages - 1) * weights * on_unit >= gpu.in_flight:
            break
        stages += 1
    return _fitted(kernel, problem, Tile(tokens, rows, depth, splits, warps, min(stages, gpu.stages)), gpu)


def _decode_grid(kernel: str, problem: Problem, rows: int, gpu: Gpu) -> tuple[int, float]:
    """Splits for tiles of so many rows, and the programs that have work then.

    Splits end where units are full, where there is nothing left to share, and where partial sums would cost traffic.
    """
    H, I, hit = problem.hidden_size, problem.intermediate_size, experts_hit(problem)
    halves, groups = 2 if problem.gated else 1, min(problem.groups, hit)
    can_be_hit = min(problem.num_experts, problem.tokens * problem.top_k)
    sparse = 0.625 if problem.sparse else 0.0  # bytes of a number, in a matrix of bfloat16 with 8 of 32 stored
    if kernel == "decode_x":
        return 1, groups * _cdiv(halves * I, rows) + hit * ceil(problem.rank_gate_up / rows)
    # tiles to be split, what their programs share, and the bytes that are read for one row of a tile
    if kernel == "decode_gate_up":
        of = max(1.0, groups)  # every group has a tile, and shares its own experts
        tiles, shared = _cdiv(I, rows) * of, can_be_hit / max(1, problem.groups)
        row = hit / of * halves * (problem.rank_gate_up * problem.itemsize + H * sparse)
        others = 0.0
    elif kernel == "decode_h":
        # The base of one group is one program a tile; of several, programs share the groups.
        tiles, bases = float(_cdiv(H, rows)), min(groups, BASE_SPLITS)
        shared = max(float(can_be_hit) if problem.sparse else 0.0, bases if problem.groups > 1 else 0.0)
        row = hit * I * sparse + (groups * I * problem.itemsize if problem.groups > 1 else 0.0)
        others = hit * ceil(problem.rank_down / rows) + (tiles if problem.groups == 1 else 0.0)
        others -= 0.0 if problem.sparse or problem.groups > 1 else tiles
    else:
        tiles, shared = float(_cdiv(H, rows)), can_be_hit * problem.rank_down / 64  # blocks of ranks, not experts
        row, others = hit * problem.rank_down * problem.itemsize, 0.0
    worth = row / (PARTIALS * 2 * 4 * problem.tokens)  # partial sums of a row: T float32, written and read
    # Rounded down: a program more than there are places is a second wave.
    splits = max(1, min(int(shared), int(worth), int((PER_UNIT * gpu.units - others) / tiles)))
    return splits, tiles * splits + others


def _prefill_tile(kernel: str, problem: Problem, gpu: Gpu) -> Tile:
    """Prefill multiplies pairs grouped by expert: tiles as large as an expert's pairs, and then as the GPU still has
    work for every unit."""
    E, H, I = problem.num_experts, problem.hidden_size, problem.intermediate_size
    if kernel == "prefill_sum":
        # Memory only: 16 numbers a thread, and enough programs at any number of tokens.
        return Tile(tokens=16, rows=128, depth=16)
    halves, size, pairs = _halves(kernel, problem), problem.itemsize, problem.tokens * problem.top_k
    tokens = max(16, min(_power(pairs / E), 128))
    merged = kernel != "prefill_shrink" and (problem.sparse or problem.groups > 1)  # B + S, summed over K
    if kernel == "prefill_shrink":
        N, K = max(problem.rank_gate_up, problem.rank_down), H
        most = min(128, _power(N))
    else:
        N, rank = (I, problem.rank_gate_up) if kernel == "prefill_gate_up" else (H, problem.rank_down)
        K, most = max(rank, (I if kernel == "prefill_down" else H) if merged else 1), 128 // halves
    # 128-byte rows: what a tensor core's shared-memory layout is made of. float32 has no tensor cores here (ieee): its
    # products are unrolled, and 32 keeps that within the instruction cache.
    depth = 64 if size == 2 else 32
    warps = 8 if tokens * most * halves >= 128 * 128 or (merged and problem.sparse and tokens >= 64) else 4
    if merged and problem.sparse:
        depth = 32  # and not fewer rows: x is read again for every tile of rows
        most = min(most, EXPANDED * warps * 32 // (depth * halves))
    if size == 4:
        most = min(most, 32 // halves)
    tiles = experts_hit(problem) + pairs / tokens
    rows = max(16, most)
    while rows > 32 // halves and tiles * _cdiv(N, rows) < gpu.units:
        rows //= 2
    least = 32 if merged else 16
    depth = max(least, min(depth, _power(K)))
    return _fitted(kernel, problem, Tile(tokens, rows, depth, 1, warps, min(4, gpu.stages)), gpu)


def _fitted(kernel: str, problem: Problem, tile: Tile, gpu: Gpu) -> Tile:
    """The tile with as many stages, then as much depth, as shared memory holds."""
    while shared_bytes(kernel, problem, tile) > gpu.shared:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        else:
            tile = replace(tile, depth=tile.depth // 2)
    return tile
