"""Many tokens: pairs sorted by expert, the shared base by the vendor's GEMM, the rest by grouped kernels.

A program of a grouped kernel takes up to BLOCK_M pairs of one expert (the M operand) and rows of that expert's weights
(the N operand). Grids are upper bounds from shapes: a program finds its expert in the offsets that the sort left on the
device, and ends at once where there is none. Nothing is added by atomics.

What a pair leaves is stored token-major, at t * top_k + slot, so that the sum over a token's experts reads rows that
lie together. Only c = V x is stored in sorted order, in rows of min(N, K) ranks: the largest rank is known on the
device only, no more than min(N, K) are of use, and such a row is not longer than the pair's row of the output, which
is stored too. What is behind an expert's rank is not touched. Ranks beyond min(N, K) are legal all the same:
``wide_ranks`` computes them where they are needed, slowly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import Problem, Tile, tile_of
from resmoe_kernels.triton_kernels.launch import cdiv, launch, next_power_of_2
from resmoe_kernels.triton_kernels.routing import expert_of, find_tile, sort_pairs
from resmoe_kernels.triton_kernels.tiles import first_value, pointwise, sparse_tile


def prefill(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: FactoredExperts,
    activation: str,
    problem: Problem,
    target: str,
    operand: torch.dtype,
) -> Tensor:
    """``experts`` for any T; every tensor contiguous, T and top_k at least 1.

    operand: dtype in which tiles are multiplied and intermediate activations are stored; sums are float32

    With one base, and no sparse residual in a matrix, base products are the vendor's GEMM, once per token; float32
    operands then obey torch.backends.cuda.matmul.allow_tf32, which is the user's. Else each pair's tile is multiplied
    by B_g(e) + S_e, which is put together on chip.
    """
    w = weights
    T, top_k = top_k_index.shape
    E, H, I = w.num_experts, w.hidden_size, w.intermediate_size
    expert_offsets, sorted_pairs = sort_pairs(top_k_index, E)
    common = {
        "OPERAND": getattr(tl, str(operand).removeprefix("torch.")),
        "BLOCK_E": next_power_of_2(E),
    }

    def tiles(tile: Tile) -> int:
        """Most tiles that pairs can make: those of every expert hit may leave a last one that is not full."""
        P = T * top_k
        return (P + min(E, P) * (tile.tokens - 1)) // tile.tokens

    def shrink(source: Tensor, slots: int, part: Part, mean_rank: int) -> Tensor | None:
        """c (P, width) of a matrix, in sorted order; source: (T top_k / slots, K)."""
        if part.v is None:
            return None
        tile = tile_of("prefill_shrink", problem, target)
        c = source.new_empty((T * top_k, part.width), dtype=operand)
        blocks = cdiv(mean_rank, tile.rows)
        launch(
            prefill_shrink,
            (tiles(tile) * blocks,),
            *(source, part.v, part.rank_offsets, sorted_pairs, expert_offsets, c),
            *(E, part.columns, part.width, blocks),
            **common,
            SLOTS=slots,
            BLOCK_M=tile.tokens,
            ROWS=tile.rows,
            DEPTH=tile.depth,
            tile=tile,
        )
        return c

    def sum_slots(
        N: int, pairs: Tensor | None, group: Tensor | None, start: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """start + the sum over each token's slots, (T, N); group: only of experts that have a base."""
        total = x.new_empty((T, N), dtype=dtype)
        tile = tile_of("prefill_sum", problem, target)
        launch(
            prefill_sum,
            (cdiv(T, tile.tokens), cdiv(N, tile.rows)),
            *(pairs, top_k_index, group, start, total, T, E, N),
            SLOTS=top_k,
            BLOCK_T=tile.tokens,
            ROWS=tile.rows,
            tile=tile,
        )
        return total

    gate_up = Part.of(w, "gate_up")
    a = _gemm(x, gate_up.shared_base, operand)
    c = shrink(x, top_k, gate_up, problem.rank_gate_up)
    wh = x.new_empty((T * top_k, I), dtype=operand)
    tile = tile_of("prefill_gate_up", problem, target)
    blocks = cdiv(I, tile.rows)
    launch(
        prefill_gate_up,
        (tiles(tile) * blocks,),
        *(x, top_k_weights, sorted_pairs, expert_offsets, w.group, a, gate_up.own_base),
        *(c, gate_up.u, gate_up.wide_v, gate_up.rank_offsets),
        *(gate_up.mask, gate_up.values, gate_up.row_offsets, w.bias_gate_up, wh),
        *(E, I, H, gate_up.width, blocks),
        **common,
        ACTIVATION=activation,
        GATED=w.gated,
        KEPT=gate_up.kept,
        SLOTS=top_k,
        BLOCK_M=tile.tokens,
        ROWS=tile.rows,
        DEPTH=tile.depth,
        tile=tile,
    )

    del a, c  # the largest buffers: what follows can have their memory

    down = Part.of(w, "down")
    y = None
    if down.shared_base is not None:
        y = _gemm(sum_slots(I, wh, w.group, None, operand), down.shared_base, operand)
    y_pairs = None
    if down.is_per_pair or w.bias_down is not None:
        c = shrink(wh, 1, down, problem.rank_down)
        y_pairs = x.new_empty((T * top_k, H))
        tile = tile_of("prefill_down", problem, target)
        blocks = cdiv(H, tile.rows)
        launch(
            prefill_down,
            (tiles(tile) * blocks,),
            *(wh, top_k_weights, sorted_pairs, expert_offsets, w.group, down.own_base),
            *(c, down.u, down.wide_v, down.rank_offsets),
            *(down.mask, down.values, down.row_offsets, w.bias_down, y_pairs),
            *(E, H, I, down.width, blocks),
            **common,
            KEPT=down.kept,
            BLOCK_M=tile.tokens,
            ROWS=tile.rows,
            DEPTH=tile.depth,
            tile=tile,
        )
    if y is None and y_pairs is None:
        return torch.zeros_like(x)
    return sum_slots(H, y_pairs, None, y, x.dtype)


class Part(NamedTuple):
    """One matrix, as the kernels take it; None for what it has not.

    shared_base: (N, K), multiplied once per token;  own_base: (G, N, K), multiplied per pair
    wide_v: v, where an expert's rank can exceed width
    width: ranks that a row of c holds;  kept: n of the block layout, 0 for a bitmap
    """

    columns: int
    shared_base: Tensor | None
    own_base: Tensor | None
    u: Tensor | None
    v: Tensor | None
    wide_v: Tensor | None
    rank_offsets: Tensor | None
    width: int
    mask: Tensor | None
    values: Tensor | None
    row_offsets: Tensor | None
    kept: int

    @property
    def is_per_pair(self) -> bool:
        return any(t is not None for t in (self.own_base, self.u, self.mask))

    @classmethod
    def of(cls, weights: FactoredExperts, matrix: str) -> Part:
        base, u, v, rank_offsets, mask, values, row_offsets = (
            getattr(weights, f"{name}_{matrix}")
            for name in ("base", "u", "v", "rank_offsets", "mask", "values", "row_offsets")
        )
        if u is not None and u.shape[0] == 0:
            u = v = None
        rows, columns = weights.rows_columns(matrix)
        ranks = 0 if u is None else u.shape[0]
        # c is stored and loaded in whole 16s: at the rank itself its loads could not be 16 bytes wide.
        width = cdiv(min(rows, columns, ranks), 16) * 16
        shares = base is not None and base.shape[0] == 1 and mask is None
        return cls(
            columns=columns,
            shared_base=base[0] if shares else None,
            own_base=None if shares else base,
            u=u,
            v=v,
            wide_v=v if ranks > width else None,
            rank_offsets=rank_offsets,
            width=width,
            mask=mask,
            values=values,
            row_offsets=row_offsets,
            kept=values.shape[-1] if values is not None and values.dim() == 4 else 0,
        )


def _gemm(x: Tensor, base: Tensor | None, operand: torch.dtype) -> Tensor | None:
    """x base^T in float32, for operands of any dtype."""
    if base is None:
        return None
    x, base = x.to(operand), base.to(operand)
    if x.is_cuda and operand != torch.float32:
        return torch.mm(x, base.T, out_dtype=torch.float32)
    return x.float() @ base.float().T


# ---- pieces


@triton.jit
def add_product(
    acc, x_rows, x_ok, w_rows, w_ok, K, OPERAND: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr = None
):
    """acc (BLOCK_M, ROWS) += x w^T over K columns. x_rows (BLOCK_M,), w_rows (ROWS,): pointers to where rows begin."""
    for first in tl.range(0, K, DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(x_rows[:, None] + k[None, :], mask=x_ok[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_rows[:, None] + k[None, :], mask=w_ok[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x.to(OPERAND), tl.trans(w.to(OPERAND)), acc, input_precision="ieee")
    return acc


@triton.jit
def weight_tile(
    base_ptr, base_row, base_ok, mask_ptr, values_ptr, row, row_ok, first, k, K,
    OPERAND: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Columns k to k + DEPTH of rows of B_g(e) + S_e, either of which may be None. base_row, base_ok: (ROWS,) over all
    groups; for the rest, and what comes back, see ``sparse_tile``."""
    if base_ptr is not None:
        column = k + tl.arange(0, DEPTH)
        ok = base_ok[:, None] & (column < K)[None, :]
        tile = tl.load(base_ptr + base_row[:, None] * K + column[None, :], mask=ok, other=0.0).to(OPERAND)
    if mask_ptr is not None:
        residual, first = sparse_tile(mask_ptr, values_ptr, row, row_ok, first, k, K, KEPT, ROWS, DEPTH)
        if base_ptr is not None:
            tile += residual.to(OPERAND)
        else:
            tile = residual.to(OPERAND)
    return tile, first


@triton.jit
def add_ranks(acc, c, u_ptr, r, r_ok, n, n_ok, N, OPERAND: tl.constexpr):
    """acc (BLOCK_M, ROWS) += c u over ranks r; n: the columns of u that are wanted."""
    u = u_ptr + r.to(tl.int64)[:, None] * N + n[None, :]
    u = tl.load(u, mask=r_ok[:, None] & n_ok[None, :], other=0.0).to(OPERAND)
    return tl.dot(c, u, acc, input_precision="ieee")


@triton.jit
def wide_ranks(x_rows, x_ok, v_ptr, r, r_ok, K, OPERAND: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_M, 16) of c = V x, of ranks r that ``prefill_shrink`` has no room for.

    Small steps, one at a time: as deep and pipelined as the other loops it took registers from them (prefill_down on
    sm_90: 167, and 126 so; 127 without it), and next to never runs.
    """
    c = tl.zeros((BLOCK_M, 16), tl.float32)
    return add_product(c, x_rows, x_ok, v_ptr + r.to(tl.int64) * K, r_ok, K, OPERAND, 16, 1).to(OPERAND)


# ---- kernels


@triton.jit
def prefill_shrink(
    x_ptr, v_ptr, rank_offsets_ptr, sorted_pairs_ptr, expert_offsets_ptr, c_ptr,
    E, K, width, blocks,
    OPERAND: tl.constexpr, BLOCK_E: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """c[i, r] = V_e[r] x[pair // SLOTS] for the i-th pair in sorted order and ranks r below width; zeros behind them up
    to a multiple of 16. The grid has blocks for the mean rank; an expert's further ones are taken in turns."""
    expert, first, end, block = find_tile(expert_offsets_ptr, E, blocks, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    i = first + tl.arange(0, BLOCK_M)
    i_ok = i < end
    pair = tl.load(sorted_pairs_ptr + i, mask=i_ok, other=0)
    x_rows = x_ptr + (pair // SLOTS).to(tl.int64) * K
    first_rank = tl.load(rank_offsets_ptr + expert)
    rank = tl.minimum(tl.load(rank_offsets_ptr + expert + 1) - first_rank, width)
    for start in range(block * ROWS, rank, blocks * ROWS):
        r = start + tl.arange(0, ROWS)
        v_rows = v_ptr + (first_rank + r).to(tl.int64) * K
        acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
        acc = add_product(acc, x_rows, i_ok, v_rows, r < rank, K, OPERAND, DEPTH)
        at = c_ptr + i.to(tl.int64)[:, None] * width + r[None, :]
        tl.store(at, acc.to(OPERAND), mask=i_ok[:, None] & (r < tl.cdiv(rank, 16) * 16)[None, :])


@triton.jit
def prefill_gate_up(
    x_ptr, weights_ptr, sorted_pairs_ptr, expert_offsets_ptr, group_ptr, a_ptr, base_ptr,
    c_ptr, u_ptr, v_ptr, rank_offsets_ptr,
    mask_ptr, values_ptr, row_offsets_ptr, bias_ptr, wh_ptr,
    E, I, H, width, blocks,
    OPERAND: tl.constexpr, BLOCK_E: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEPT: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z = a + (B_g(e) + S_e) x + U_e c + bias for rows n of gate and up,  wh[pair] = w f(z_gate) z_up."""
    expert, first, end, block = find_tile(expert_offsets_ptr, E, blocks, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    N = 2 * I if GATED else I
    i = first + tl.arange(0, BLOCK_M)
    i_ok = i < end
    pair = tl.load(sorted_pairs_ptr + i, mask=i_ok, other=0)
    token = (pair // SLOTS).to(tl.int64)
    n = block * ROWS + tl.arange(0, ROWS)
    n_ok = n < I
    ok = i_ok[:, None] & n_ok[None, :]
    group = tl.full((), -1, tl.int32)
    if group_ptr is not None:
        group = tl.load(group_ptr + expert)

    gate = tl.zeros((BLOCK_M, ROWS), tl.float32)
    up = tl.zeros((BLOCK_M, ROWS), tl.float32)
    if a_ptr is not None:
        a = a_ptr + token[:, None] * N + n[None, :]
        gate = tl.load(a, mask=ok & (group >= 0), other=0.0)
        if GATED:
            up = tl.load(a + I, mask=ok & (group >= 0), other=0.0)
    if base_ptr is not None or mask_ptr is not None:
        K = H
        if mask_ptr is None:
            K = tl.where(group >= 0, H, 0)
        base_row = group.to(tl.int64) * N + n
        base_ok = n_ok & (group >= 0)
        row = expert.to(tl.int64) * N + n
        gate_first = first_value(row_offsets_ptr, row, n_ok)
        up_first = gate_first
        if GATED:
            up_first = first_value(row_offsets_ptr, row + I, n_ok)
        for k in range(0, K, DEPTH):
            column = k + tl.arange(0, DEPTH)
            x = x_ptr + token[:, None] * H + column[None, :]
            x = tl.load(x, mask=i_ok[:, None] & (column < H)[None, :], other=0.0).to(OPERAND)
            tile, gate_first = weight_tile(
                base_ptr, base_row, base_ok, mask_ptr, values_ptr, row, n_ok, gate_first, k, H,
                OPERAND, KEPT, ROWS, DEPTH,
            )  # fmt: skip
            gate = tl.dot(x, tl.trans(tile), gate, input_precision="ieee")
            if GATED:
                tile, up_first = weight_tile(
                    base_ptr, base_row + I, base_ok, mask_ptr, values_ptr, row + I, n_ok, up_first, k, H,
                    OPERAND, KEPT, ROWS, DEPTH,
                )  # fmt: skip
                up = tl.dot(x, tl.trans(tile), up, input_precision="ieee")
    if u_ptr is not None:
        first_rank = tl.load(rank_offsets_ptr + expert)
        rank = tl.load(rank_offsets_ptr + expert + 1) - first_rank
        stored = tl.cdiv(tl.minimum(rank, width), 16) * 16
        for start in range(0, stored, DEPTH):
            r = start + tl.arange(0, DEPTH)
            c = c_ptr + i.to(tl.int64)[:, None] * width + r[None, :]
            c = tl.load(c, mask=i_ok[:, None] & (r < stored)[None, :], other=0.0)
            gate = add_ranks(gate, c, u_ptr, first_rank + r, r < rank, n, n_ok, N, OPERAND)
            if GATED:
                up = add_ranks(up, c, u_ptr, first_rank + r, r < rank, I + n, n_ok, N, OPERAND)
        if v_ptr is not None:
            for start in range(width, rank, 16):
                r = start + tl.arange(0, 16)
                c = wide_ranks(x_ptr + token * H, i_ok, v_ptr, first_rank + r, r < rank, H, OPERAND, BLOCK_M)
                gate = add_ranks(gate, c, u_ptr, first_rank + r, r < rank, n, n_ok, N, OPERAND)
                if GATED:
                    up = add_ranks(up, c, u_ptr, first_rank + r, r < rank, I + n, n_ok, N, OPERAND)
    if bias_ptr is not None:
        bias = bias_ptr + expert.to(tl.int64) * N + n
        gate += tl.load(bias, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + I, mask=n_ok, other=0.0).to(tl.float32)[None, :]

    h = pointwise(gate, ACTIVATION)
    if GATED:
        h *= up
    h *= tl.load(weights_ptr + pair, mask=i_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(wh_ptr + pair.to(tl.int64)[:, None] * I + n[None, :], h.to(OPERAND), mask=ok)


@triton.jit
def prefill_down(
    wh_ptr, weights_ptr, sorted_pairs_ptr, expert_offsets_ptr, group_ptr, base_ptr,
    c_ptr, u_ptr, v_ptr, rank_offsets_ptr,
    mask_ptr, values_ptr, row_offsets_ptr, bias_ptr, y_ptr,
    E, H, I, width, blocks,
    OPERAND: tl.constexpr, BLOCK_E: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[pair] = (B'_g(e) + S'_e) wh + U'_e c + w bias, in the dtype of x."""
    expert, first, end, block = find_tile(expert_offsets_ptr, E, blocks, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    i = first + tl.arange(0, BLOCK_M)
    i_ok = i < end
    pair = tl.load(sorted_pairs_ptr + i, mask=i_ok, other=0)
    wh_rows = wh_ptr + pair.to(tl.int64) * I
    n = block * ROWS + tl.arange(0, ROWS)
    n_ok = n < H
    ok = i_ok[:, None] & n_ok[None, :]

    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    if base_ptr is not None or mask_ptr is not None:
        group = tl.full((), -1, tl.int32)
        if group_ptr is not None:
            group = tl.load(group_ptr + expert)
        K = I
        if mask_ptr is None:
            K = tl.where(group >= 0, I, 0)
        row = expert.to(tl.int64) * H + n
        value = first_value(row_offsets_ptr, row, n_ok)
        for k in range(0, K, DEPTH):
            column = k + tl.arange(0, DEPTH)
            wh = tl.load(wh_rows[:, None] + column[None, :], mask=i_ok[:, None] & (column < I)[None, :], other=0.0)
            tile, value = weight_tile(
                base_ptr, group.to(tl.int64) * H + n, n_ok & (group >= 0), mask_ptr, values_ptr, row, n_ok, value, k, I,
                OPERAND, KEPT, ROWS, DEPTH,
            )  # fmt: skip
            acc = tl.dot(wh, tl.trans(tile), acc, input_precision="ieee")
    if u_ptr is not None:
        first_rank = tl.load(rank_offsets_ptr + expert)
        rank = tl.load(rank_offsets_ptr + expert + 1) - first_rank
        stored = tl.cdiv(tl.minimum(rank, width), 16) * 16
        for start in range(0, stored, DEPTH):
            r = start + tl.arange(0, DEPTH)
            c = c_ptr + i.to(tl.int64)[:, None] * width + r[None, :]
            c = tl.load(c, mask=i_ok[:, None] & (r < stored)[None, :], other=0.0)
            acc = add_ranks(acc, c, u_ptr, first_rank + r, r < rank, n, n_ok, H, OPERAND)
        if v_ptr is not None:
            for start in range(width, rank, 16):
                r = start + tl.arange(0, 16)
                c = wide_ranks(wh_rows, i_ok, v_ptr, first_rank + r, r < rank, I, OPERAND, BLOCK_M)
                acc = add_ranks(acc, c, u_ptr, first_rank + r, r < rank, n, n_ok, H, OPERAND)
    if bias_ptr is not None:
        weight = tl.load(weights_ptr + pair, mask=i_ok, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * H + n, mask=n_ok, other=0.0).to(tl.float32)
        acc += weight[:, None] * bias[None, :]
    tl.store(y_ptr + pair.to(tl.int64)[:, None] * H + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def prefill_sum(
    pairs_ptr, index_ptr, group_ptr, start_ptr, total_ptr,
    T, E, N,
    SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """total[t] = start[t] + the sum of pairs[t, slot] over slots that are not skipped; group: and have a base."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t_ok = t < T
    ok = t_ok[:, None] & (n < N)[None, :]
    at = t.to(tl.int64)[:, None] * N + n[None, :]
    total = tl.zeros((BLOCK_T, ROWS), tl.float32)
    if start_ptr is not None:
        total = tl.load(start_ptr + at, mask=ok, other=0.0)
    if pairs_ptr is not None:
        for slot in tl.static_range(SLOTS):
            pair = t * SLOTS + slot
            expert = expert_of(index_ptr, pair, t_ok, E)
            taken = expert < E
            if group_ptr is not None:
                taken = tl.load(group_ptr + expert, mask=taken, other=-1) >= 0
            of_pair = pairs_ptr + pair.to(tl.int64)[:, None] * N + n[None, :]
            total += tl.load(of_pair, mask=taken[:, None] & ok, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=ok)
