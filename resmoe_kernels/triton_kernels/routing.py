"""Token-expert pairs sorted by expert on the device: a counting sort, stable and without atomics.

A pair is a slot of a token: pair = t * top_k + slot. Slots with an id outside [0, E) are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_kernels.heuristics import Tile
from resmoe_kernels.triton_kernels.launch import cdiv, launch, next_power_of_2

CHUNK = 128  # pairs of a program; a pair's place among them takes CHUNK^2 comparisons
COUNTS = 4096  # counts that the scan takes at a time: 16 of a thread of 8 warps


def sort_pairs(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """top_k_index: (T, top_k) int32 or int64, contiguous, not empty

    Returns expert_offsets (E + 1,) int32 and sorted_pairs (T * top_k,) int32: expert e has the pairs
    sorted_pairs[expert_offsets[e]:expert_offsets[e + 1]], in rising order. What is behind expert_offsets[E] is not
    initialised.
    """
    P, E = top_k_index.numel(), num_experts
    chunks, bins = cdiv(P, CHUNK), next_power_of_2(E + 1)
    counts = top_k_index.new_empty((chunks, E), dtype=torch.int32)
    starts = torch.empty_like(counts)
    expert_offsets = top_k_index.new_empty((E + 1,), dtype=torch.int32)
    sorted_pairs = top_k_index.new_empty((P,), dtype=torch.int32)
    tile, scan_tile = Tile(CHUNK, 1, 1, stages=1), Tile(max(1, COUNTS // bins), bins, 1, warps=8, stages=1)
    launch(route_count, (chunks,), top_k_index, counts, P, E, CHUNK=CHUNK, BINS=bins, tile=tile)
    launch(
        route_scan,
        (1,),
        *(counts, starts, expert_offsets, chunks, E),
        CHUNKS=scan_tile.tokens,
        BINS=bins,
        tile=scan_tile,
    )
    launch(route_place, (chunks,), top_k_index, starts, sorted_pairs, P, E, CHUNK=CHUNK, tile=tile)
    return expert_offsets, sorted_pairs


@triton.jit
def expert_of(index_ptr, pair, pair_ok, E):
    """Expert of each pair, E for a slot to skip: int32. Compared in the width of the ids: 2^32 must not wrap to 0."""
    expert = tl.load(index_ptr + pair, mask=pair_ok, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit
def route_count(index_ptr, counts_ptr, P, E, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """counts[chunk, e] = pairs of expert e in a chunk."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)  # the bin at E has the skipped slots
    counts = tl.histogram(expert_of(index_ptr, pair, pair < P, E), BINS)
    tl.store(counts_ptr + chunk.to(tl.int64) * E + bins, counts, mask=bins < E)


@triton.jit
def route_scan(counts_ptr, starts_ptr, expert_offsets_ptr, chunks, E, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """expert_offsets, and starts[chunk, e] = where the pairs of expert e in a chunk go. One program, two passes."""
    bins = tl.arange(0, BINS)
    row = tl.arange(0, CHUNKS)
    at = row[:, None] * E + bins[None, :]
    total = tl.zeros((BINS,), tl.int32)
    counts = counts_ptr + at
    for first in range(0, chunks, CHUNKS):
        ok = (first + row < chunks)[:, None] & (bins < E)[None, :]
        total += tl.sum(tl.load(counts, mask=ok, other=0), 0)
        counts += CHUNKS * E
    start = tl.cumsum(total, 0) - total
    tl.store(expert_offsets_ptr + bins, start, mask=bins <= E)
    counts = counts_ptr + at
    starts = starts_ptr + at
    for first in range(0, chunks, CHUNKS):
        ok = (first + row < chunks)[:, None] & (bins < E)[None, :]
        count = tl.load(counts, mask=ok, other=0)
        tl.store(starts, start[None, :] + tl.cumsum(count, 0) - count, mask=ok)
        start += tl.sum(count, 0)
        counts += CHUNKS * E
        starts += CHUNKS * E


@triton.jit
def route_place(index_ptr, starts_ptr, sorted_pairs_ptr, P, E, CHUNK: tl.constexpr):
    """Puts each pair behind those of its expert that come before it."""
    chunk = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + i
    expert = expert_of(index_ptr, pair, pair < P, E)
    before = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
    start = tl.load(starts_ptr + chunk.to(tl.int64) * E + expert, mask=expert < E, other=0)
    tl.store(sorted_pairs_ptr + start + tl.sum(before.to(tl.int32), 1), pair, mask=expert < E)


@triton.jit
def find_tile(
    expert_offsets_ptr, E, blocks, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, TILES_TOGETHER: tl.constexpr = 8
):
    """What this program takes: expert, first and end of its pairs (equal if there is nothing to do), block of rows.

    Programs that run together take few tiles of pairs and few blocks of rows, so that both are found in L2: neighbours
    go through TILES_TOGETHER tiles for each block.
    """
    program = tl.program_id(0)
    tiles = tl.num_programs(0) // blocks
    first_tile = program // (TILES_TOGETHER * blocks) * TILES_TOGETHER
    together = tl.minimum(tiles - first_tile, TILES_TOGETHER)
    within = program % (TILES_TOGETHER * blocks)
    tile = first_tile + within % together

    e = tl.arange(0, BLOCK_E)
    start = tl.load(expert_offsets_ptr + e, mask=e < E, other=0)
    end = tl.load(expert_offsets_ptr + e + 1, mask=e < E, other=0)
    count = tl.cdiv(end - start, BLOCK_M)
    last = tl.cumsum(count, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = e == expert  # nowhere, behind the last tile
    first = tl.sum(tl.where(own, start + (tile - last + count) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(own, end, 0), 0), within // together
