"""Pieces of Triton kernels: the activation, and a tile of a sparse matrix expanded on chip."""

import triton
import triton.language as tl


@triton.jit
def pointwise(z, ACTIVATION: tl.constexpr):
    """An activation of resmoe_kernels.activations.POINTWISE on float32."""
    if ACTIVATION == "silu":
        y = z / (1 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
        y = z / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "relu":
        y = tl.maximum(z, 0.0)
    elif ACTIVATION == "relu2":
        y = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = z
    return y


@triton.jit
def popcount(bits):
    """Bits set in each uint32 -> int32. LLVM turns this sequence into one instruction on NVIDIA and AMD."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def first_value(row_offsets_ptr, row, row_ok):
    """Where the values of rows start in a bitmap's stream; zeros for the block layout, where words have fixed places.

    row: (ROWS,) int64 over all experts -> (ROWS,) int64
    """
    first = tl.zeros_like(row)
    if row_offsets_ptr is not None:
        first = tl.load(row_offsets_ptr + row, mask=row_ok, other=0).to(tl.int64)
    return first


@triton.jit
def sparse_tile(
    mask_ptr, values_ptr, row, row_ok, first, k, K, KEPT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """Columns k to k + DEPTH of rows of a sparse matrix, zeros where nothing is stored.

    row, row_ok: (ROWS,) int64 over all experts, bool;  k, DEPTH: multiples of 32
    KEPT: n of the block layout, 0 for a bitmap;  first: (ROWS,) int64, of a bitmap where column k's values start
    Returns the tile (ROWS, DEPTH) in the dtype of values, and ``first`` for column k + DEPTH.
    """
    WORDS: tl.constexpr = DEPTH // 32
    words = tl.cdiv(K, 32)
    word = k // 32 + tl.arange(0, WORDS)
    place = row[:, None] * words + word[None, :]
    bits = tl.load(mask_ptr + place, mask=row_ok[:, None] & (word < words)[None, :], other=0)
    bits = bits.to(tl.uint32, bitcast=True)
    if KEPT == 0:
        count = popcount(bits)
        start = first[:, None] + (tl.cumsum(count, 1) - count)
        first += tl.sum(count, 1)
    else:
        start = place * KEPT
    column = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    one = tl.full((1, 1, 32), 1, tl.uint32)
    below = bits[:, :, None] & ((one << column) - 1)
    stored = ((bits[:, :, None] >> column) & 1) != 0
    values = tl.load(values_ptr + (start[:, :, None] + popcount(below)), mask=stored, other=0.0)
    return tl.reshape(values, (ROWS, DEPTH)), first
