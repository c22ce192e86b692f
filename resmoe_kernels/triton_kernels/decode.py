"""Few tokens: four kernels, each of which reads its weights once for all tokens.

Weight rows are the M operand of every product, all tokens of the call its N operand. Tokens that an expert does not
serve are masked when they are loaded and stored, so that they cost no traffic. There is no sort and no host sync: the
grids depend on shapes only, and programs whose expert was not hit end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import Problem, base_splits, tile_of
from resmoe_kernels.triton_kernels.launch import cdiv, has_dependent_launch, launch, next_power_of_2
from resmoe_kernels.triton_kernels.tiles import first_value, pointwise, sparse_tile


def decode(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: FactoredExperts,
    activation: str,
    problem: Problem,
    target: str,
    operand: torch.dtype,
) -> Tensor:
    """``experts`` for T up to what ``heuristics.decodes`` allows; every tensor contiguous, T and top_k at least 1.

    operand: dtype in which tiles are multiplied and intermediate activations are stored; sums are float32
    """
    w = weights
    T, top_k = top_k_index.shape
    E, H, I = w.num_experts, w.hidden_size, w.intermediate_size
    N = w.rows_columns("gate_up")[0]
    G = 0 if w.base_gate_up is None else w.base_gate_up.shape[0]
    # A matrix whose ranks sum to zero has no low rank: its kernels are compiled without one, as c is not there either.
    (u, v, R), (u_down, v_down, R_down) = (_low_rank(w, matrix) for matrix in ("gate_up", "down"))
    at_x, at_gate_up, at_h, at_down = (
        tile_of(name, problem, target) for name in ("decode_x", "decode_gate_up", "decode_h", "decode_down")
    )
    sums = at_gate_up.splits if G else 1
    down_sums = at_down.splits if R_down else 1
    base_parts = base_splits(at_h, G) if G else 0
    parts = base_parts + (0 if w.mask_down is None else at_h.splits)
    tiles, down_tiles = cdiv(I, at_gate_up.rows), cdiv(H, at_down.rows)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return x.new_empty(shape, dtype=dtype) if 0 not in shape else None

    a = buffer(G, T, N)
    places, down_places = (cdiv(ranks + ALIGN * E, ALIGN) * ALIGN if ranks else 0 for ranks in (R, R_down))
    c, c_down = buffer(T, places, dtype=operand), buffer(T, down_places, dtype=operand)
    wh = buffer(T, top_k, I, dtype=operand)
    weighted_sum = buffer(G, T, I, dtype=operand)
    y_parts = buffer(parts, T, H)
    partial = buffer(sums if sums > 1 else 0, G, T, I)
    down_partial = buffer(down_sums if down_sums > 1 else 0, T, H)
    hit_experts = x.new_empty(1 + E, dtype=torch.int32)
    rank_blocks = x.new_empty(1 + 3 * (R_down // at_down.depth + E), dtype=torch.int32)
    sum_counters = cdiv(G * tiles, 4) * 4  # 16 bytes: the counters behind them stay aligned
    counters = x.new_empty(sum_counters + down_tiles, dtype=torch.int32)
    y = torch.empty_like(x)

    common = {
        "OPERAND": getattr(tl, str(operand).removeprefix("torch.")),
        "BLOCK_T": at_x.tokens,
        "BLOCK_SLOTS": next_power_of_2(top_k),
    }
    overlaps = has_dependent_launch(target)

    per_expert = cdiv(problem.rank_gate_up, at_x.rows)
    base_tiles = cdiv(N, at_x.rows)
    launch(
        decode_x,
        (1 + G * base_tiles + min(E, T * top_k) * per_expert,),
        *(x, top_k_index, w.group, w.base_gate_up, v, w.rank_offsets_gate_up, w.rank_offsets_down),
        *(a, c, hit_experts, rank_blocks, counters),
        *(T, top_k, E, H, N, G * base_tiles, base_tiles, per_expert, places, counters.numel()),
        **common,
        BLOCK_E=next_power_of_2(E),
        ROWS=at_x.rows,
        DEPTH=at_x.depth,
        RANK_BLOCK=at_down.depth,
        BY_PAIR=T * top_k < E,
        OVERLAPS=overlaps,
        tile=at_x,
    )
    launch(
        decode_gate_up,
        (tiles, max(G, 1), at_gate_up.splits),
        *(x, top_k_index, top_k_weights, w.group, a, w.bias_gate_up, u, w.rank_offsets_gate_up, c),
        *(w.mask_gate_up, w.values_gate_up, w.row_offsets_gate_up, hit_experts),
        *(wh, partial, counters, weighted_sum),
        *(T, top_k, E, H, I, places),
        **common,
        ACTIVATION=activation,
        GATED=w.gated,
        KEPT=_kept(w, "gate_up"),
        ROWS=at_gate_up.rows,
        DEPTH=at_gate_up.depth,
        SPLITS=at_gate_up.splits,
        OVERLAPS=overlaps,
        tile=at_gate_up,
        overlaps=overlaps,
    )
    per_expert = cdiv(problem.rank_down, at_h.rows)
    h_tiles = cdiv(H, at_h.rows)
    base_programs = h_tiles * base_parts
    rank_programs = min(E, T * top_k) * per_expert
    launch(
        decode_h,
        (base_programs + rank_programs + (0 if w.mask_down is None else h_tiles * at_h.splits),),
        *(top_k_index, w.group, w.base_down, weighted_sum, v_down, w.rank_offsets_down, wh),
        *(w.mask_down, w.values_down, w.row_offsets_down, hit_experts),
        *(c_down, y_parts),
        *(T, top_k, E, G, H, I, base_programs, rank_programs, per_expert, h_tiles, down_places),
        **common,
        KEPT=_kept(w, "down"),
        BASE_PARTS=base_parts,
        ROWS=at_h.rows,
        DEPTH=at_h.depth,
        SPLITS=at_h.splits,
        OVERLAPS=overlaps,
        tile=at_h,
        overlaps=overlaps,
    )
    launch(
        decode_down,
        (down_tiles, down_sums),
        *(top_k_index, top_k_weights, u_down, rank_blocks, c_down, w.bias_down, hit_experts, y_parts),
        *(down_partial, counters[sum_counters:], y),
        *(T, top_k, E, H, down_places),
        **common,
        PARTS=parts,
        ROWS=at_down.rows,
        DEPTH=at_down.depth,
        SPLITS=down_sums,
        OVERLAPS=overlaps,
        tile=at_down,
        overlaps=overlaps,
    )
    return y


ALIGN = 16  # elements: ranks of every expert start at a multiple of it in c, so that its loads are wide


def _low_rank(weights: FactoredExperts, matrix: str) -> tuple[Tensor | None, Tensor | None, int]:
    """u, v and the sum of the ranks; None, None, 0 where there are no ranks."""
    u, v = getattr(weights, f"u_{matrix}"), getattr(weights, f"v_{matrix}")
    return (None, None, 0) if u is None or u.shape[0] == 0 else (u, v, u.shape[0])


def _kept(weights: FactoredExperts, matrix: str) -> int:
    """n of the block layout, 0 for a bitmap and for no sparse residual."""
    values = getattr(weights, f"values_{matrix}")
    return values.shape[-1] if values is not None and values.dim() == 4 else 0


# ---- pieces


@triton.jit
def slot_experts(index_ptr, T, TOP_K, E, BLOCK_T: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """Expert of every (token, slot), (BLOCK_T, BLOCK_SLOTS) int32; -1 for skipped and absent slots."""
    t = tl.arange(0, BLOCK_T)[:, None]
    slot = tl.arange(0, BLOCK_SLOTS)[None, :]
    expert = tl.load(index_ptr + t * TOP_K + slot, mask=(t < T) & (slot < TOP_K), other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit
def any_slot(chosen):
    """(BLOCK_T, BLOCK_SLOTS) bool -> (BLOCK_T,) bool."""
    return tl.max(chosen.to(tl.int32), 1) > 0


@triton.jit
def first_slot(chosen, BLOCK_SLOTS: tl.constexpr):
    """The first chosen slot of every token, where its expert's h is kept if it was chosen twice: (BLOCK_T,) int32."""
    return tl.min(tl.where(chosen, tl.arange(0, BLOCK_SLOTS)[None, :], BLOCK_SLOTS), 1)


@triton.jit
def add_product(acc, w_ptr, row, row_ok, K, x_ptr, x_start, takes, OPERAND: tl.constexpr, DEPTH: tl.constexpr):
    """acc (ROWS, BLOCK_T) += W[row] x^T over K columns.

    row: (ROWS,) int64 rows of w;  x_start: (BLOCK_T,) where each token's K values begin;  takes: (BLOCK_T,) bool
    """
    k = tl.arange(0, DEPTH)
    w = w_ptr + row[:, None] * K + k[None, :]
    x = x_ptr + x_start[None, :] + k[:, None]
    for first in range(0, K, DEPTH):
        k_ok = k < K - first
        weight = tl.load(w, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        token = tl.load(x, mask=takes[None, :] & k_ok[:, None], other=0.0)
        acc = tl.dot(weight.to(OPERAND), token.to(OPERAND), acc, input_precision="ieee")
        w += DEPTH
        x += DEPTH
    return acc


@triton.jit
def add_sparse_product(
    acc, mask_ptr, values_ptr, row_offsets_ptr, row, row_ok, K, x_ptr, x_start, takes,
    KEPT: tl.constexpr, OPERAND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """acc (ROWS, BLOCK_T) += S[row] x^T over K columns; arguments as in ``add_product`` and ``sparse_tile``."""
    k = tl.arange(0, DEPTH)
    first = first_value(row_offsets_ptr, row, row_ok)
    for start in range(0, K, DEPTH):
        weight, first = sparse_tile(mask_ptr, values_ptr, row, row_ok, first, start, K, KEPT, ROWS, DEPTH)
        k_ok = (start + k)[:, None] < K
        token = tl.load(x_ptr + x_start[None, :] + (start + k)[:, None], mask=takes[None, :] & k_ok, other=0.0)
        acc = tl.dot(weight.to(OPERAND), token.to(OPERAND), acc, input_precision="ieee")
    return acc


@triton.jit
def arrives_last(counter_ptr, SPLITS: tl.constexpr):
    """Whether all other programs of this tile have stored their part, which are then visible to this one.

    The order of arrival decides who adds the parts, not in which order they are added.
    """
    tl.debug_barrier()  # the stores of every warp come before the one thread that counts
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1


@triton.jit
def place_of(start, e):
    """Where the ranks of expert e, which start at ``start``, are kept in a row of c, padded to ``padded(ranks)``: no
    later expert's begin before they end, as floor(a + b) >= floor(a) + floor(b)."""
    return (start // 16 + e) * 16


@triton.jit
def padded(ranks):
    """The next multiple of 16: rows of c hold zeros up to there, as a mask that ends anywhere costs wide loads."""
    return (ranks + 15) // 16 * 16


@triton.jit
def list_hits(
    expert, down_offsets_ptr, hit_ptr, blocks_ptr, E,
    BLOCK_T: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_E: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """hit_ptr = [count, experts hit ...],  blocks_ptr = [count, (first, end, place) of blocks of their ranks ...]."""
    flat = tl.reshape(expert, (BLOCK_T * BLOCK_SLOTS,))
    hit = tl.histogram(flat, BLOCK_E, mask=flat >= 0) > 0
    e = tl.arange(0, BLOCK_E)
    counted = tl.cumsum(hit.to(tl.int32), 0)
    tl.store(hit_ptr + counted, e, mask=hit)
    tl.store(hit_ptr, tl.max(counted, 0))
    if down_offsets_ptr is not None:
        start = tl.load(down_offsets_ptr + e, mask=e < E, other=0)
        end = tl.load(down_offsets_ptr + e + 1, mask=e < E, other=0)
        blocks = tl.where(hit, tl.cdiv(end - start, RANK_BLOCK), 0)
        ahead = tl.cumsum(blocks, 0) - blocks
        tl.store(blocks_ptr, tl.sum(blocks, 0))
        for b in range(0, tl.max(blocks, 0)):
            at = blocks_ptr + 1 + 3 * (ahead + b)
            tl.store(at, start + b * RANK_BLOCK, mask=b < blocks)
            tl.store(at + 1, tl.minimum(start + (b + 1) * RANK_BLOCK, end), mask=b < blocks)
            tl.store(at + 2, place_of(start, e) + b * RANK_BLOCK, mask=b < blocks)


@triton.jit
def clear(counters_ptr, count):
    i = tl.arange(0, 1024)
    for first in range(0, count, 1024):
        tl.store(counters_ptr + first + i, tl.zeros_like(i), mask=first + i < count)


@triton.jit
def store_rank_products(
    v_ptr, rank_offsets_ptr, e, block, step, K, x_ptr, x_start, takes, c_ptr, places, stored,
    OPERAND: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """c[t, r] = V[r] x[t] for blocks ``block``, ``block + step`` ... of the ranks r of expert e, tokens ``stored``."""
    t = tl.arange(0, BLOCK_T)
    start = tl.load(rank_offsets_ptr + e)
    ranks = tl.load(rank_offsets_ptr + e + 1) - start
    for first in range(block * ROWS, ranks, step * ROWS):
        r = first + tl.arange(0, ROWS)
        acc = tl.zeros((ROWS, BLOCK_T), tl.float32)
        row = start.to(tl.int64) + r
        acc = add_product(acc, v_ptr, row, r < ranks, K, x_ptr, x_start, takes, OPERAND, DEPTH)
        at = c_ptr + t[None, :] * places + (place_of(start, e) + r)[:, None]
        tl.store(at, acc.to(OPERAND), mask=(r < padded(ranks))[:, None] & stored[None, :])


# ---- kernels


@triton.jit
def decode_x(
    x_ptr, index_ptr, group_ptr, base_ptr, v_ptr, rank_offsets_ptr, down_offsets_ptr,
    a_ptr, c_ptr, hit_ptr, blocks_ptr, counters_ptr,
    T, TOP_K, E, H, N, base_programs, base_tiles, per_expert, places, num_counters,
    OPERAND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, RANK_BLOCK: tl.constexpr, BY_PAIR: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """a[g, t] = B_gate_up[g] x[t] (float32),  c[t, r] = V[r] x[t] for the tokens of r's expert;  and what the next
    kernels walk, see ``list_hits``."""
    if OVERLAPS:
        gdc_launch_dependents()
    program = tl.program_id(0) - 1
    expert = slot_experts(index_ptr, T, TOP_K, E, BLOCK_T, BLOCK_SLOTS)
    t = tl.arange(0, BLOCK_T)
    if program < 0:
        list_hits(expert, down_offsets_ptr, hit_ptr, blocks_ptr, E, BLOCK_T, BLOCK_SLOTS, BLOCK_E, RANK_BLOCK)
        clear(counters_ptr, num_counters)
    elif program < base_programs:
        if base_ptr is not None:
            g = (program // base_tiles).to(tl.int64)
            takes = any_slot(tl.load(group_ptr + expert, mask=expert >= 0, other=-1) == g)
            if tl.max(takes.to(tl.int32), 0) > 0:
                n = program % base_tiles * ROWS + tl.arange(0, ROWS)
                acc = tl.zeros((ROWS, BLOCK_T), tl.float32)
                acc = add_product(acc, base_ptr, g * N + n, n < N, H, x_ptr, t * H, takes, OPERAND, DEPTH)
                tl.store(a_ptr + (g * T + t)[None, :] * N + n[:, None], acc, mask=takes[None, :] & (n < N)[:, None])
    else:
        if v_ptr is not None:
            # A program looks at one expert; where there are fewer pairs than experts, at that of one pair.
            e = (program - base_programs) // per_expert
            served = any_slot(expert == e)
            mine = tl.max(served.to(tl.int32), 0) > 0
            if BY_PAIR:
                slot = t[:, None] * TOP_K + tl.arange(0, BLOCK_SLOTS)[None, :]
                pair = e
                e = tl.max(tl.max(tl.where(slot == pair, expert, -1), 1), 0)
                chosen = (expert == e) & (e >= 0)
                served = any_slot(chosen)
                # Of the pairs of one expert, the first does the work.
                mine = tl.min(tl.min(tl.where(chosen, slot, T * TOP_K), 1), 0) == pair
            if mine:
                store_rank_products(
                    v_ptr, rank_offsets_ptr, e, (program - base_programs) % per_expert, per_expert, H,
                    x_ptr, t * H, served, c_ptr, places, served, OPERAND, BLOCK_T, ROWS, DEPTH,
                )  # fmt: skip


@triton.jit
def decode_gate_up(
    x_ptr, index_ptr, weights_ptr, group_ptr, a_ptr, bias_ptr, u_ptr, rank_offsets_ptr, c_ptr,
    mask_ptr, values_ptr, row_offsets_ptr, hit_ptr,
    wh_ptr, partial_ptr, counters_ptr, sum_ptr,
    T, TOP_K, E, H, I, places,
    OPERAND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_SLOTS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """For the rows n of one tile of I and the experts e of one group: z = a + U_e c + S_e x + bias,
    wh[t, slot] = w f(z_gate) z_up, and sum[g, t] = the sum of wh over those experts."""
    tile, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    N = 2 * I if GATED else I
    t = tl.arange(0, BLOCK_T)
    n = tile * ROWS + tl.arange(0, ROWS)
    n_ok = n < I
    r = tl.arange(0, DEPTH)
    expert = slot_experts(index_ptr, T, TOP_K, E, BLOCK_T, BLOCK_SLOTS)
    slot = tl.arange(0, BLOCK_SLOTS)
    weight = tl.load(weights_ptr + t[:, None] * TOP_K + slot[None, :], mask=expert >= 0, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, BLOCK_T), tl.float32)
    for i in range(split, tl.load(hit_ptr), SPLITS):
        e = tl.load(hit_ptr + 1 + i)
        own = -1
        if group_ptr is not None:
            own = tl.load(group_ptr + e)
        if (own == g) | ((own < 0) & (g == 0)):
            chosen = expert == e
            takes = any_slot(chosen)
            gate = tl.zeros((ROWS, BLOCK_T), tl.float32)
            up = tl.zeros((ROWS, BLOCK_T), tl.float32)
            if a_ptr is not None:
                a = a_ptr + (g.to(tl.int64) * T + t)[None, :] * N + n[:, None]
                shared = n_ok[:, None] & takes[None, :] & (own >= 0)
                gate = tl.load(a, mask=shared, other=0.0)
                if GATED:
                    up = tl.load(a + I, mask=shared, other=0.0)
            if bias_ptr is not None:
                gate += tl.load(bias_ptr + e * N + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
                if GATED:
                    up += tl.load(bias_ptr + e * N + I + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
            if u_ptr is not None:
                start = tl.load(rank_offsets_ptr + e)
                ranks = tl.load(rank_offsets_ptr + e + 1) - start
                for first in range(0, ranks, DEPTH):
                    c = c_ptr + t[None, :] * places + (place_of(start, e) + first + r)[:, None]
                    c = tl.load(c, mask=(first + r < padded(ranks))[:, None] & takes[None, :], other=0.0)
                    u = u_ptr + (start.to(tl.int64) + first + r)[None, :] * N + n[:, None]
                    u_ok = (first + r < ranks)[None, :] & n_ok[:, None]
                    left = tl.load(u, mask=u_ok, other=0.0)
                    gate = tl.dot(left.to(OPERAND), c, gate, input_precision="ieee")
                    if GATED:
                        left = tl.load(u + I, mask=u_ok, other=0.0)
                        up = tl.dot(left.to(OPERAND), c, up, input_precision="ieee")
            if mask_ptr is not None:
                row = e.to(tl.int64) * N + n
                gate = add_sparse_product(
                    gate, mask_ptr, values_ptr, row_offsets_ptr, row, n_ok, H, x_ptr, t * H, takes,
                    KEPT, OPERAND, ROWS, DEPTH,
                )  # fmt: skip
                if GATED:
                    up = add_sparse_product(
                        up, mask_ptr, values_ptr, row_offsets_ptr, row + I, n_ok, H, x_ptr, t * H, takes,
                        KEPT, OPERAND, ROWS, DEPTH,
                    )  # fmt: skip
            h = pointwise(gate, ACTIVATION)
            if GATED:
                h *= up
            h = tl.where(takes[None, :], h * tl.sum(tl.where(chosen, weight, 0.0), 1)[None, :], 0.0)
            at = wh_ptr + (t * TOP_K + first_slot(chosen, BLOCK_SLOTS))[None, :] * I + n[:, None]
            tl.store(at, h.to(OPERAND), mask=n_ok[:, None] & takes[None, :])
            if own >= 0:
                total += h
    if sum_ptr is not None:
        ok = n_ok[:, None] & (t < T)[None, :]
        at = (g.to(tl.int64) * T + t)[None, :] * I + n[:, None]
        if SPLITS == 1:
            tl.store(sum_ptr + at, total.to(OPERAND), mask=ok)
        else:
            size = tl.num_programs(1).to(tl.int64) * T * I
            tl.store(partial_ptr + split * size + at, total, mask=ok)
            if arrives_last(counters_ptr + g * tl.num_programs(0) + tile, SPLITS):
                total = tl.zeros((ROWS, BLOCK_T), tl.float32)
                for s in range(0, SPLITS):
                    total += tl.load(partial_ptr + s * size + at, mask=ok, other=0.0, cache_modifier=".cg")
                tl.store(sum_ptr + at, total.to(OPERAND), mask=ok)


@triton.jit
def decode_h(
    index_ptr, group_ptr, base_ptr, sum_ptr, v_ptr, rank_offsets_ptr, wh_ptr,
    mask_ptr, values_ptr, row_offsets_ptr, hit_ptr,
    c_ptr, parts_ptr,
    T, TOP_K, E, G, H, I, base_programs, rank_programs, per_expert, tiles, places,
    OPERAND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_SLOTS: tl.constexpr, KEPT: tl.constexpr,
    BASE_PARTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BASE_PARTS parts, each sum_g B_down[g] sum[g] over every BASE_PARTS-th group; then SPLITS, sum_e S'_e wh_e;
    c[t, r] = V'[r] wh, zero for tokens of other experts."""
    program = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    expert = slot_experts(index_ptr, T, TOP_K, E, BLOCK_T, BLOCK_SLOTS)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    if program < base_programs:
        if base_ptr is not None:
            n = program % tiles * ROWS + tl.arange(0, ROWS)
            part = program // tiles
            acc = tl.zeros((ROWS, BLOCK_T), tl.float32)
            group = tl.load(group_ptr + expert, mask=expert >= 0, other=-1)
            for i in range(part, G, BASE_PARTS):
                g = tl.full((), i, tl.int64)
                takes = any_slot(group == g)
                if tl.max(takes.to(tl.int32), 0) > 0:
                    start = (g * T + t) * I
                    acc = add_product(acc, base_ptr, g * H + n, n < H, I, sum_ptr, start, takes, OPERAND, DEPTH)
            at = parts_ptr + (part * T + t)[None, :] * H + n[:, None]
            tl.store(at, acc, mask=(n < H)[:, None] & (t < T)[None, :])
    elif program < base_programs + rank_programs:
        if v_ptr is not None:
            hit = (program - base_programs) // per_expert
            if hit < tl.load(hit_ptr):
                e = tl.load(hit_ptr + 1 + hit)
                wh_start = (t * TOP_K + first_slot(expert == e, BLOCK_SLOTS)) * I
                store_rank_products(
                    v_ptr, rank_offsets_ptr, e, (program - base_programs) % per_expert, per_expert, I,
                    wh_ptr, wh_start, any_slot(expert == e), c_ptr, places, t < T, OPERAND, BLOCK_T, ROWS, DEPTH,
                )  # fmt: skip
    else:
        if mask_ptr is not None:
            tile = (program - base_programs - rank_programs) % tiles
            split = (program - base_programs - rank_programs) // tiles
            rows = tile * ROWS + tl.arange(0, ROWS)
            total = tl.zeros((ROWS, BLOCK_T), tl.float32)
            for j in range(split, tl.load(hit_ptr), SPLITS):
                owner = tl.load(hit_ptr + 1 + j)
                begin = (t * TOP_K + first_slot(expert == owner, BLOCK_SLOTS)) * I
                total = add_sparse_product(
                    total, mask_ptr, values_ptr, row_offsets_ptr, owner.to(tl.int64) * H + rows, rows < H, I,
                    wh_ptr, begin, any_slot(expert == owner), KEPT, OPERAND, ROWS, DEPTH,
                )  # fmt: skip
            at = parts_ptr + ((BASE_PARTS + split) * T + t)[None, :] * H + rows[:, None]
            tl.store(at, total, mask=(rows < H)[:, None] & (t < T)[None, :])


@triton.jit
def decode_down(
    index_ptr, weights_ptr, u_ptr, blocks_ptr, c_ptr, bias_ptr, hit_ptr, parts_ptr,
    partial_ptr, counters_ptr, y_ptr,
    T, TOP_K, E, H, places,
    OPERAND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_SLOTS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """y = the sum of parts + sum_e (U'_e c_e + w_e bias_down[e]), in the dtype of x."""
    tile, split = tl.program_id(0), tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, DEPTH)
    n = tile * ROWS + tl.arange(0, ROWS)
    at = t[None, :] * H + n[:, None]
    ok = (n < H)[:, None] & (t < T)[None, :]
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros((ROWS, BLOCK_T), tl.float32)
    if u_ptr is not None:
        # One flat loop over the ranks of all experts hit: loads of the next block do not wait for an expert to end.
        for i in range(split, tl.load(blocks_ptr), SPLITS):
            start = tl.load(blocks_ptr + 1 + 3 * i)
            ranks = tl.load(blocks_ptr + 2 + 3 * i) - start
            place = tl.multiple_of(tl.load(blocks_ptr + 3 + 3 * i), 16)
            u = u_ptr + (start.to(tl.int64) + r)[None, :] * H + n[:, None]
            u = tl.load(u, mask=(r < ranks)[None, :] & (n < H)[:, None], other=0.0)
            c = c_ptr + t[None, :] * places + (place + r)[:, None]
            c = tl.load(c, mask=(r < padded(ranks))[:, None] & (t < T)[None, :], other=0.0)
            acc = tl.dot(u.to(OPERAND), c, acc, input_precision="ieee")
    if bias_ptr is not None:
        if split == 0:
            expert = slot_experts(index_ptr, T, TOP_K, E, BLOCK_T, BLOCK_SLOTS)
            slot = t[:, None] * TOP_K + tl.arange(0, BLOCK_SLOTS)[None, :]
            weight = tl.load(weights_ptr + slot, mask=expert >= 0, other=0.0).to(tl.float32)
            for i in range(0, tl.load(hit_ptr)):
                e = tl.load(hit_ptr + 1 + i)
                bias = tl.load(bias_ptr + e * H + n, mask=n < H, other=0.0).to(tl.float32)
                acc += bias[:, None] * tl.sum(tl.where(expert == e, weight, 0.0), 1)[None, :]
    last = True
    if SPLITS > 1:
        tl.store(partial_ptr + split * T * H + at, acc, mask=ok)
        last = arrives_last(counters_ptr + tile, SPLITS)
        if last:
            acc = tl.zeros((ROWS, BLOCK_T), tl.float32)
            for s in range(0, SPLITS):
                acc += tl.load(partial_ptr + s * T * H + at, mask=ok, other=0.0, cache_modifier=".cg")
    if last:
        for p in tl.static_range(PARTS):
            acc += tl.load(parts_ptr + p * T * H + at, mask=ok, other=0.0)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=ok)
