"""The sparse residual: packing dense rows into mask and values, and expanding them again.

A row of K columns is ceil(K/32) words; bit j of word w (read as unsigned) says that column 32 w + j is stored. Values
follow in ascending column order: ``n`` per word in the block layout, one ragged stream in the bitmap layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def _bit_weights(device: torch.device) -> Tensor:
    weights = torch.ones(BLOCK, dtype=torch.int32, device=device) << torch.arange(
        BLOCK, dtype=torch.int32, device=device
    )
    return weights  # the last is -2^31: bit 31 of the unsigned word


def pack_mask(keep: Tensor) -> Tensor:
    """keep: (..., K) bool -> (..., ceil(K/32)) int32 words."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    return (padded * _bit_weights(keep.device)).sum(-1, dtype=torch.int32)


def unpack_mask(mask: Tensor, width: int) -> Tensor:
    """mask: (..., W) int32 -> (..., width) bool."""
    shifts = torch.arange(BLOCK, dtype=torch.int32, device=mask.device)
    return ((mask.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :width]


def popcount(mask: Tensor) -> Tensor:
    """Bits set in every word: (..., W) int32 -> (..., W) int64."""
    return unpack_mask(mask.unsqueeze(-1), BLOCK).sum(-1)


def pack_block(dense: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest magnitudes of every 32 along a row.

    dense: (..., K) float -> mask (..., W) int32, values (..., W, n) float in ascending column order. A last word
    narrower than n keeps all its columns and pads its values with zeros. Ties go to the lower column.
    """
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    # Stable, so that the padding, zeros at the end, ranks below every real column.
    columns = padded.abs().sort(dim=-1, descending=True, stable=True).indices[..., :n].sort(dim=-1).values
    keep = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, columns, True)
    return pack_mask(keep.flatten(-2)[..., : dense.shape[-1]]), padded.gather(-1, columns)


def pack_bitmap(dense: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries that ``keep`` names.

    dense: (rows, K) float, keep: (rows, K) bool -> mask (rows, W) int32, values (nnz,) float,
    row_offsets (rows + 1,) int64.
    """
    row_offsets = torch.zeros(keep.shape[0] + 1, dtype=torch.int64, device=keep.device)
    torch.cumsum(keep.sum(-1), 0, out=row_offsets[1:])
    return pack_mask(keep), dense[keep], row_offsets


def expand_sparse_reference(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> Tensor:
    """Writes the stored values of every row to their columns; zero elsewhere.

    mask: (N, W) int32, W = ceil(width/32)
    values: block layout (N, W, n) float; bitmap layout (nnz,) float, where
    row_offsets: (N + 1,) int32 or int64 says that row i owns values[row_offsets[i]:row_offsets[i + 1]]; None for block
    Returns (N, width) in the dtype of values.
    """
    kept = unpack_mask(mask.unsqueeze(-1), BLOCK)  # (N, W, 32)
    if row_offsets is None:
        position = (kept.cumsum(-1) - 1).clamp(0, values.shape[-1] - 1)
        dense = torch.where(kept, values.gather(-1, position), values.new_zeros(()))
    else:
        own = values[int(row_offsets[0]) : int(row_offsets[-1])]
        dense = values.new_zeros(kept.shape).masked_scatter(kept, own)
    return dense.flatten(-2)[:, :width]
