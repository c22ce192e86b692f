"""Codes of the sparse residual. A scale serves the stored values of one row in ``group`` columns, in both layouts.

block: the W n values of a row, one after the other (with 3 bits padded with 0 to 32);  bitmap: one stream of all values
of the layer, padded with 0 to 32. See payload.py for how codes become bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.payload import (
    CHUNK,
    Encoded,
    Payload,
    check_padding,
    nearest_codes,
    pack_bits,
    search_scales,
    spread,
    unpack_bits,
)
from resmoe_kernels.sparse import BLOCK, expand_sparse_reference, unpack_mask


def encode_sparse(
    mask: Tensor,
    values: Tensor,
    row_offsets: Tensor | None,
    columns: int,
    payload: Payload,
    weights: Tensor | None = None,
) -> Encoded:
    """Rounds the values of a layer as ``payload.encode`` does, one expert at a time; columns without a value do not
    count.

    mask: (E, N, W) int32;  values: block (E, N, W, n) or bitmap (nnz,) float, with row_offsets (E N + 1,)
    weights: (E, K) or what broadcasts to it, >= 0: how much an error in a column counts
    Returns codes (E, N, bytes) or (bytes,) uint8, and scales (E, N, ceil(K / group)) bfloat16.
    """
    num_experts, rows, _ = mask.shape
    codes, scales = [], []
    for e in range(num_experts):
        own = values[e] if row_offsets is None else values
        offsets = None if row_offsets is None else row_offsets[e * rows : (e + 1) * rows + 1]
        dense, keep = expand_sparse_reference(mask[e], own, offsets, columns), unpack_mask(mask[e], columns)
        counts = keep.to(torch.float32)
        if weights is not None:
            counts *= weights.expand(num_experts, columns)[e]
        scale = search_scales(dense, payload, counts)
        nearest = nearest_codes(dense, spread(scale, payload, columns), payload)
        codes.append(nearest[keep] if row_offsets is not None else _block_codes(nearest, keep, values.shape[-1]))
        scales.append(scale)
    if row_offsets is not None:
        return Encoded(pack_stream(torch.cat(codes), payload), torch.stack(scales))
    return Encoded(pack_block_codes(torch.stack(codes), payload), torch.stack(scales))


def _block_codes(codes: Tensor, keep: Tensor, kept: int) -> Tensor:
    """(N, K) codes, those that ``keep`` (N, K) names -> (N, W, n), 0 behind those of a narrower last word."""
    pad = (0, -codes.shape[-1] % BLOCK)
    words = torch.nn.functional.pad(keep, pad).unflatten(-1, (-1, BLOCK))
    columns = (~words).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :kept]
    stored = torch.nn.functional.pad(codes, pad).unflatten(-1, (-1, BLOCK)).gather(-1, columns)
    return stored * words.gather(-1, columns)


def pack_block_codes(codes: Tensor, payload: Payload) -> Tensor:
    """(..., W, n) uint8, one code a byte -> (..., bytes) uint8"""
    rows = codes.flatten(-2)
    padding = -rows.shape[-1] % CHUNK if payload.bits == 3 else 0
    return pack_bits(torch.nn.functional.pad(rows, (0, padding)), payload.bits)


def pack_stream(codes: Tensor, payload: Payload) -> Tensor:
    """The stream of a bitmap: (nnz,) uint8, one code a byte -> (bytes,) uint8"""
    return pack_bits(torch.nn.functional.pad(codes, (0, -len(codes) % CHUNK)), payload.bits)


def unpack_block_codes(codes: Tensor, payload: Payload, words: int, kept: int) -> Tensor:
    """(..., bytes) uint8 -> (..., W, n) uint8"""
    return unpack_bits(codes, payload.bits)[..., : words * kept].unflatten(-1, (words, kept))


def decode_block(
    codes: Tensor, scales: Tensor, payload: Payload, mask: Tensor, kept: int, dtype: torch.dtype
) -> Tensor:
    """The values (N, W, n) of codes (N, bytes) and scales (N, ceil(K / group)), under a mask (N, W)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    steps = unpack_block_codes(codes, payload, mask.shape[-1], kept).to(compute) - payload.offset
    of_word = scales.to(compute).repeat_interleave(payload.group // BLOCK, -1)[..., : mask.shape[-1]]
    return (steps * of_word.unsqueeze(-1)).to(dtype)


def decode_bitmap(
    codes: Tensor, scales: Tensor, payload: Payload, mask: Tensor, row_offsets: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """The values of some rows of a bitmap: those from row_offsets[0] to row_offsets[-1] of the whole stream.

    codes: (bytes,), of the layer;  scales: (N, ceil(K / group)), mask: (N, W), row_offsets: (N + 1,), of the rows
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    first, last = int(row_offsets[0]), int(row_offsets[-1])
    chunk_bytes = CHUNK * payload.bits // 8
    begin, end = first // CHUNK, -(-last // CHUNK)
    stream = unpack_bits(codes[begin * chunk_bytes : end * chunk_bytes], payload.bits)
    steps = stream[first - begin * CHUNK : last - begin * CHUNK].to(compute) - payload.offset
    of_value = spread(scales.to(compute), payload, columns)[unpack_mask(mask, columns)]
    return (steps * of_value).to(dtype)


def check_block_codes(name: str, codes: Tensor, payload: Payload, words: int, kept: int, columns: int) -> None:
    """Raises ValueError naming the tensor and the first place if a code that stands for no value is not 0.

    codes: (E, N, bytes)
    """
    last = columns - BLOCK * (words - 1)
    bad = unpack_block_codes(codes, payload, words, kept)[..., -1, last:] != 0
    if bool(bad.any()):
        e, row, _ = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: behind the {last} codes of a word all must be 0, "
            f"got another at expert {e}, row {row}, word {words - 1}"
        )
    if payload.bits == 3:
        check_padding(name, codes, payload, words * kept)
