"""What a data sheet and the machine code allow the persistent CUDA kernels: arithmetic on counts, no measurement.

    seconds = launches + hand-offs + the sum over phases of max(memory, issue, shared, tensor)

    memory    bytes of the weights that are needed, over DRAM's bandwidth; what phases leave for each other stays in L2
    issue     instructions of all passes (cubin.csv) that the busiest scheduler of the busiest multiprocessor issues
    shared    clocks that those passes take of that multiprocessor's shared memory
    tensor    products of those passes, at half of the data sheet's rate: they are mma.sync

Phases are taken one after another, though the weights of the next arrive while a block waits (the rings of an H100 hold
21 MB). Left out: the routing, what a task does beside its passes, latencies, bank conflicts, instructions that take
more than a clock, and what blocks that have nothing to do in a phase could do of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

from torch import Tensor

from benchmarks.gpu.cubin_report import SCHEDULERS, WARPS
from benchmarks.gpu.occupancy import UNITS
from benchmarks.tables import read_rows
from resmoe_kernels import FactoredExperts
from resmoe_kernels.costs import Routing, expert_sparse_bytes

CUBINS = Path(__file__).resolve().parents[1] / "results" / "cubin.csv"
MMA_FLOP = 2 * 16 * 8 * 16
MMA_SHARE = 0.5  # of the data sheet's rate, which wgmma alone reaches
LAUNCHES = 2  # the flags are cleared by one of their own
NAMES = {"lowrank": ("V, B", "U", "V', B'", "U'"), "block": ("gate_up", "down")}


@dataclass(frozen=True)
class Pass:
    """Of one warp over one chunk of weights: instructions, clocks of shared memory, products of tensor cores."""

    issue: int
    shared: int
    products: int


@cache
def passes(target: str) -> dict[tuple[str, str, str], Pass]:
    """By kernel, most tokens and loop, as ``cubin_report.py`` counted them in bfloat16."""
    return {
        (row["kernel"], row["tokens"], row["loop"]): Pass(
            int(row["pass_instructions"]),
            int(row["pass_shared"]),
            0 if row["kernel"] == "walk" else int(row["pass_products"]),
        )
        for row in _rows(target)
    }


@cache
def _rows(target: str) -> list[dict[str, str]]:
    return [row for row in read_rows(CUBINS) if (row["target"], row["element"]) == (target, "bfloat16")]


@dataclass(frozen=True)
class Phase:
    """nbytes: of weights;  tasks: dealt round the multiprocessors
    warps: the passes of one task, by the warp that takes them"""

    name: str
    nbytes: float
    tasks: int
    warps: list[list[Pass]]

    def bounds(self, units: int, gb_per_s: float, peak_gflop_per_s: float, ghz: float) -> dict[str, float]:
        """Seconds that each resource takes."""
        rounds = ceil(self.tasks / units)
        taken = [p for warp in self.warps for p in warp]
        schedulers = [sum(p.issue for warp in self.warps[s::SCHEDULERS] for p in warp) for s in range(SCHEDULERS)]
        flops = rounds * units * sum(p.products for p in taken) * MMA_FLOP
        return {
            "memory": self.nbytes / gb_per_s / 1e9,
            "issue": rounds * max(schedulers) / ghz / 1e9,
            "shared": rounds * sum(p.shared for p in taken) / ghz / 1e9,
            "tensor": flops / (MMA_SHARE * peak_gflop_per_s) / 1e9,
        }


def phases(weights: FactoredExperts, index: Tensor, target: str) -> list[Phase]:
    """Of one call, as csrc/cuda deals it to blocks and warps.

    weights: one base, ranks or a block-sparse residual; may be on the meta device, but for groups and offsets
    index: (T, top_k)
    """
    routing, counted = Routing.of(index, weights), passes(target)
    hit = routing.hit.nonzero().flatten().tolist()
    tokens = [int(routing.pairs[e]) for e in hit]
    if weights.mask_gate_up is None:
        return list(_low_rank(weights, hit, "8" if len(index) <= 8 else "16", counted))
    sparse = _walk if _is_walked(weights, index, target) else _scatter
    return list(sparse(weights, hit, tokens, len(index), counted))


def _dealt(passes: Iterable[Pass]) -> list[list[Pass]]:
    """Round the warps, one after another."""
    all_of_them = list(passes)
    return [all_of_them[warp::WARPS] for warp in range(WARPS)]


def _by_expert(chunks: list[int], one: Pass) -> list[list[Pass]]:
    """Experts round the warps; where there are fewer, several warps share one."""
    ways = next(ways for ways in (8, 4, 2, 1) if len(chunks) * ways <= WARPS or ways == 1)
    warps: list[list[Pass]] = [[] for _ in range(WARPS)]
    for i, count in enumerate(chunks):
        for chunk in range(count):
            warps[(i * ways + chunk % ways) % WARPS].append(one)
    return warps


def _low_rank(weights: FactoredExperts, hit: list[int], most: str, counted: dict) -> Iterator[Phase]:
    strip, ranks = (counted["low_rank_decode", most, loop] for loop in ("strip", "ranks"))
    for first, matrix in ((0, "gate_up"), (2, "down")):
        N, K = weights.rows_columns(matrix)
        own = [weights.ranks(matrix)[e] for e in hit]
        names, chunks = NAMES["lowrank"][first : first + 2], [ceil(r / 32) for r in own]
        tasks = N // 16 + sum(ceil(r / 16) for r in own)
        yield Phase(names[0], 2 * K * (N + sum(own)), tasks, _dealt([strip] * ceil(K / 64)))
        if matrix == "gate_up":
            yield Phase(names[1], 2 * N * sum(own), weights.intermediate_size // 16, _by_expert(chunks, ranks))
        else:
            yield Phase(names[1], 2 * N * sum(own), N // 32, _dealt([ranks] * sum(chunks)))


def _sparse_bytes(weights: FactoredExperts, matrix: str, hit: list[int]) -> float:
    N, K = weights.rows_columns(matrix)
    return 2 * N * K + float(expert_sparse_bytes(weights, matrix)[hit].sum())


def _is_walked(weights: FactoredExperts, index: Tensor, target: str) -> bool:
    """As ``walks`` in csrc/cuda/block_sparse_decode.cuh: activations stand in shared memory, transposed and plain,
    beside the ring and what both kernels need."""
    T, pairs, unit = len(index), index.numel(), UNITS[target]
    H, I = weights.hidden_size, weights.intermediate_size

    def transposed(columns: int) -> int:
        return 64 * ceil(columns / 1024) * 32

    beside = next(int(row["dynamic_shared"]) for row in _rows(target) if row["kernel"] == "scatter")
    activations = max(T * (transposed(H) + 2 * H), pairs * transposed(I) + T * 2 * I)
    return T <= 2 and beside + activations <= unit.shared - unit.reserved


def _walk(weights: FactoredExperts, hit: list[int], tokens: list[int], T: int, counted: dict) -> Iterator[Phase]:
    words = ("one token", "two tokens")
    base, *experts = (
        counted["walk", "2", loop] for loop in (f"base, {words[T - 1]}", *(f"expert, {w}" for w in words))
    )
    for name, matrix in zip(NAMES["block"], ("gate_up", "down"), strict=True):
        N, K = weights.rows_columns(matrix)
        halves = 2 if matrix == "gate_up" and weights.gated else 1
        units = [[base] * ceil(K / 512)] * (4 * halves)  # rows of the base, then 4 rows of an expert
        units += [[experts[t - 1]] * ceil(4 * K / 32 / 64) for t in tokens for _ in range(halves)]
        warps = [[p for unit in units[warp::WARPS] for p in unit] for warp in range(WARPS)]
        yield Phase(name, _sparse_bytes(weights, matrix, hit), N // halves // 4, warps)


def _scatter(weights: FactoredExperts, hit: list[int], tokens: list[int], T: int, counted: dict) -> Iterator[Phase]:
    base, expert = (counted["scatter", "8" if T <= 8 else "16", loop] for loop in ("base", "expert"))
    for name, matrix in zip(NAMES["block"], ("gate_up", "down"), strict=True):
        N, K = weights.rows_columns(matrix)
        chunks = [ceil(K / 32 / 4)] * len(hit)
        own = _by_expert(chunks, expert) if matrix == "gate_up" else _dealt([expert] * sum(chunks))
        warps = [a + b for a, b in zip(_dealt([base] * (K // 32)), own, strict=True)]
        yield Phase(name, _sparse_bytes(weights, matrix, hit), N // 16, warps)
