"""What the Triton kernels must move and multiply: bytes and operations of every launch, by formula.

    bytes = weights of the experts and groups that are hit, once + every activation it reads, once + what it writes
    flops = 2 per multiplication with a weight and a token it is meant for; not what tiles are padded with

Each launch is counted on its own, as if nothing of what one wrote were still in a cache for the next, and everything
that programs of one launch share were read once: a base that prefill multiplies with every expert, and that is larger
than L2, is read more often. Partial sums of the programs of one launch, at most a few megabytes, are written and read
within it and stay in L2: they are left out, as are offsets, group numbers and lists of a few kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import Problem, base_splits, decodes, tile_of

FLOAT32 = 4  # bytes
CHUNK = 128  # pairs of a program of triton_kernels.routing, which cannot be imported without triton


@dataclass(frozen=True)
class Cost:
    """Of one launch: bytes through DRAM, and floating-point operations."""

    launch: str
    nbytes: float
    flops: float


@dataclass(frozen=True)
class Routing:
    """Which experts a call meets; numbers of a real call, or expected ones.

    hit: (E,) float64, 1 for an expert that is met, or the probability;  pairs: (E,) float64, the slots routed to it
    group_hit, group_tokens: (G,) float64, the same of base groups; tokens count once, however many experts they meet
    based: (E,) bool, experts that have a base
    """

    hit: Tensor
    pairs: Tensor
    group_hit: Tensor
    group_tokens: Tensor
    based: Tensor

    @classmethod
    def of(cls, top_k_index: Tensor, weights: FactoredExperts) -> Routing:
        """top_k_index: (T, top_k) int; ids outside [0, E) are skipped slots."""
        E, G, group = weights.num_experts, *_groups(weights)
        index = top_k_index.cpu().long()
        index = torch.where((index >= 0) & (index < E), index, E)
        pairs = torch.bincount(index.flatten(), minlength=E + 1)[:E].double()
        # One column per group, and one at the end for skipped slots and experts without a base.
        meets = torch.zeros(len(index), G + 1, dtype=torch.bool)
        meets.scatter_(1, torch.cat([group, torch.tensor([G])])[index], True)
        group_tokens = meets[:, :G].sum(0).double()
        return cls((pairs > 0).double(), pairs, (group_tokens > 0).double(), group_tokens, group < G)

    @classmethod
    def uniform(cls, tokens: int, top_k: int, weights: FactoredExperts) -> Routing:
        """Expected numbers where every token draws top_k distinct experts uniformly."""
        E, G, group = weights.num_experts, *_groups(weights)
        one = torch.ones(E, dtype=torch.float64)
        hit, pairs = one * (1 - (1 - top_k / E) ** tokens), one * tokens * top_k / E
        members = torch.bincount(group, minlength=G + 1)[:G].tolist()
        missed = torch.tensor([comb(E - m, top_k) / comb(E, top_k) for m in members], dtype=torch.float64)
        return cls(hit, pairs, 1 - missed**tokens, tokens * (1 - missed), group < G)


def _groups(weights: FactoredExperts) -> tuple[int, Tensor]:
    """G and (E,) int64, the group of each expert; G for those without a base."""
    if weights.base_gate_up is None or weights.group is None:
        return 0, torch.zeros(weights.num_experts, dtype=torch.int64)  # group < G nowhere
    G, group = weights.base_gate_up.shape[0], weights.group.cpu().long()
    return G, torch.where(group < 0, G, group)


def layer_costs(weights: FactoredExperts, routing: Routing, problem: Problem, target: str) -> list[Cost]:
    """Every launch of one call, in order; products of the vendor's library are called ``mm``.

    weights: may be on the meta device, but for ``group``, ``rank_offsets`` and ``row_offsets``
    problem: of ``triton_kernels.experts.problem_of``; activations are counted with its ``itemsize``
    """
    parts = {matrix: _Part.of(weights, matrix, routing) for matrix in ("gate_up", "down")}
    return (_decode if decodes(problem, target) else _prefill)(
        parts["gate_up"], parts["down"], routing, problem, target
    )


@dataclass(frozen=True)
class _Part:
    """One matrix (N, K) of the experts that are hit: bytes of its tensors, and ranks.

    ranks: summed over experts hit;  rank_pairs: summed over pairs
    has_shared_base: one base, multiplied once per token in prefill;  has_own_base: multiplied per pair
    """

    N: int
    K: int
    has_shared_base: bool
    has_own_base: bool
    has_low_rank: bool
    base_size: int
    base: float
    u: float
    v: float
    sparse: float
    bias: float
    ranks: float
    rank_pairs: float

    @classmethod
    def of(cls, weights: FactoredExperts, matrix: str, routing: Routing) -> _Part:
        N, K = weights.rows_columns(matrix)
        base, u, offsets, bias = (
            getattr(weights, f"{name}_{matrix}") for name in ("base", "u", "rank_offsets", "bias")
        )
        ranks = torch.zeros(weights.num_experts) if offsets is None else offsets.cpu().diff().double()
        size, base_size = (0 if t is None else t.element_size() for t in (u, base))
        shares = base is not None and base.shape[0] == 1 and getattr(weights, f"mask_{matrix}") is None
        hit = float((ranks * routing.hit).sum())
        return cls(
            N,
            K,
            has_shared_base=shares,
            has_own_base=base is not None and not shares,
            has_low_rank=u is not None and u.shape[0] > 0,
            base_size=base_size,
            base=float(routing.group_hit.sum()) * N * K * base_size,
            u=hit * N * size,
            v=hit * K * size,
            sparse=float((expert_sparse_bytes(weights, matrix) * routing.hit).sum()),
            bias=0.0 if bias is None else float(routing.hit.sum()) * N * bias.element_size(),
            ranks=hit,
            rank_pairs=float((ranks * routing.pairs).sum()),
        )


def expert_sparse_bytes(weights: FactoredExperts, matrix: str) -> Tensor:
    """(E,) float64: bytes of each expert's sparse residual, masks and row offsets included."""
    mask, values, row_offsets = (getattr(weights, f"{name}_{matrix}") for name in ("mask", "values", "row_offsets"))
    if mask is None:
        return torch.zeros(weights.num_experts, dtype=torch.float64)
    E, N, words = mask.shape
    masks = torch.full((E,), N * words * mask.element_size(), dtype=torch.float64)
    if row_offsets is None:
        return masks + N * words * values.shape[-1] * values.element_size()
    return masks + row_offsets[::N].cpu().diff() * values.element_size() + N * row_offsets.element_size()


def _decode(up: _Part, down: _Part, routing: Routing, problem: Problem, target: str) -> list[Cost]:
    T, G, s = problem.tokens, problem.groups, problem.itemsize
    H, I, N = problem.hidden_size, problem.intermediate_size, up.N
    at_h = tile_of("decode_h", problem, target)
    x = y = T * H * s
    index, weights = T * problem.top_k * 8, T * problem.top_k * s
    pairs, group_pairs = float(routing.pairs.sum()), float(routing.group_tokens.sum())
    a, c, wh = group_pairs * N * FLOAT32, up.rank_pairs * s, pairs * I * s
    weighted_sum = G * T * I * s
    c_down = down.ranks * T * s  # zeros for tokens of other experts, so that decode_down needs no routing
    parts = ((base_splits(at_h, G) if G else 0) + (at_h.splits if down.sparse else 0)) * T * H * FLOAT32
    return [
        Cost(
            "decode_x",
            index + x + up.base + up.v + a + c,
            2 * group_pairs * N * H * bool(G) + 2 * up.rank_pairs * H,
        ),
        Cost(
            "decode_gate_up",
            index + weights + a + c + up.u + up.sparse + x * bool(up.sparse) + up.bias + wh + weighted_sum,
            2 * up.rank_pairs * N + 2 * pairs * N * H * bool(up.sparse),
        ),
        Cost(
            "decode_h",
            index + weighted_sum + down.base + wh * bool(down.v or down.sparse) + down.v + down.sparse + c_down + parts,
            2 * group_pairs * H * I + 2 * down.rank_pairs * I + 2 * pairs * H * I * bool(down.sparse),
        ),
        Cost(
            "decode_down",
            (index + weights) * bool(down.bias) + down.u + c_down + down.bias + parts + y,
            2 * down.rank_pairs * H,
        ),
    ]


def _prefill(up: _Part, down: _Part, routing: Routing, problem: Problem, target: str) -> list[Cost]:
    T, s = problem.tokens, problem.itemsize
    H, I = problem.hidden_size, problem.intermediate_size
    x = y = T * H * s
    P = T * problem.top_k
    pairs, based_pairs = float(routing.pairs.sum()), float((routing.pairs * routing.based).sum())
    sorted_pairs, index, wh = pairs * 4, P * 8, pairs * I * s
    counts = -(-P // CHUNK) * problem.num_experts * 4
    costs = [
        Cost("route_count", index + counts, 0),
        Cost("route_scan", 2 * counts, 0),
        Cost("route_place", index + counts + sorted_pairs, 0),
    ]

    def product(part: _Part, source: float) -> float:
        """The vendor's GEMM with the one base of all experts, and the bytes of its float32 result."""
        out = T * part.N * FLOAT32
        costs.append(Cost("mm", part.N * part.K * part.base_size + source + out, 2 * T * part.N * part.K))
        return out

    def shrink(part: _Part, source: float) -> float:
        c = part.rank_pairs * s
        if part.has_low_rank:
            costs.append(Cost("prefill_shrink", sorted_pairs + source + part.v + c, 2 * part.rank_pairs * part.K))
        return c

    def grouped(part: _Part, c: float) -> tuple[float, float]:
        """Bytes of weights and of c, and operations, of what is multiplied for each pair."""
        merged = pairs if part.sparse else based_pairs if part.has_own_base else 0.0
        nbytes = (part.base if part.has_own_base else 0.0) + part.sparse + part.u + c + part.bias
        return nbytes, 2 * merged * part.N * part.K + 2 * part.rank_pairs * part.N

    a = product(up, x) if up.has_shared_base else 0.0
    c = shrink(up, x)
    nbytes, flops = grouped(up, c)
    nbytes += x if up.has_own_base or up.sparse else 0.0
    costs.append(Cost("prefill_gate_up", sorted_pairs + P * s + a + nbytes + wh, flops))

    y0 = 0.0
    if down.has_shared_base:
        weighted_sum = T * I * s
        costs.append(Cost("prefill_sum", index + based_pairs * I * s + weighted_sum, based_pairs * I))
        y0 = product(down, weighted_sum)
    y_pairs = 0.0
    if down.has_own_base or down.sparse or down.has_low_rank or down.bias:
        nbytes, flops = grouped(down, shrink(down, wh))
        nbytes += wh if down.has_own_base or down.sparse else 0.0
        y_pairs = pairs * H * s
        costs.append(Cost("prefill_down", sorted_pairs + P * s * bool(down.bias) + nbytes + y_pairs, flops))
    if y0 or y_pairs:
        costs.append(Cost("prefill_sum", index * bool(y_pairs) + y_pairs + y0 + y, pairs * H * bool(y_pairs)))
    return costs
