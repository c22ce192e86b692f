"""Sparse residuals: the largest magnitudes of every expert's two matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resmoe_kernels.factored import BLOCK_KEPT, MATRICES
from resmoe_kernels.python_ops.factorize import Residual
from resmoe_kernels.sparse import BLOCK, pack_bitmap, pack_block


def bitmap(
    residual: Residual, num_experts: int, *, retain: float, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Unstructured magnitude pruning, one threshold per expert over both of its matrices.

        S_e = Delta_e where |Delta_e| is among the floor(retain * count) largest of [gate | up | down^T]

    and 0 elsewhere. Exactly that many are kept: among equals gate_up goes before down, and lower rows and
    columns first.

    residual: e -> gate_up (N, H), down (H, I) float;  dtype: of the values
    Returns mask, values and row_offsets of gate_up and down in the bitmap layout of FactoredExperts.
    Source: ResMoE, arXiv 2503.06881.
    """
    masks: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    values: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    counts: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    for e in range(num_experts):
        dense = dict(zip(MATRICES, residual(e), strict=True))
        magnitude = torch.cat([d.flatten() for d in dense.values()]).abs()
        largest = keep_largest(magnitude, math.floor(retain * len(magnitude)))
        for matrix, d in dense.items():
            keep, largest = largest.tensor_split([d.numel()])
            mask, kept, row_offsets = pack_bitmap(d, keep.view_as(d))
            masks[matrix].append(mask)
            values[matrix].append(kept.to(dtype))
            counts[matrix].append(row_offsets.diff())
    tensors = {}
    for matrix in MATRICES:
        tensors[f"mask_{matrix}"] = torch.stack(masks[matrix])
        tensors[f"values_{matrix}"] = torch.cat(values[matrix])
        tensors[f"row_offsets_{matrix}"] = offsets(torch.cat(counts[matrix]))
    return tensors


def block(residual: Residual, num_experts: int, *, kept: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The ``kept`` largest magnitudes of every 32 along a row, ties to the lower column.

    residual: e -> gate_up (N, H), down (H, I) float;  kept: 4, 8, 12 or 16;  dtype: of the values
    Returns mask and values of gate_up and down in the block layout of FactoredExperts.
    """
    masks: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    values: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    for e in range(num_experts):
        for matrix, dense in zip(MATRICES, residual(e), strict=True):
            # By rows, because packing sorts: a Mixtral matrix at once would take 3 GB of indices.
            packed = [pack_block(rows, kept) for rows in dense.split(1024)]
            masks[matrix].append(torch.cat([mask for mask, _ in packed]))
            values[matrix].append(torch.cat([largest.to(dtype) for _, largest in packed]))
    tensors = {}
    for matrix in MATRICES:
        tensors[f"mask_{matrix}"] = torch.stack(masks[matrix])
        tensors[f"values_{matrix}"] = torch.stack(values[matrix])
    return tensors


def block_kept(retain: float) -> int:
    """How many of 32 the block layout keeps: the largest of 4, 8, 12, 16 not above 32 retain; 4 below that.

    Raises ValueError above one half, which the layout cannot hold.
    """
    if retain > BLOCK_KEPT[-1] / BLOCK:
        raise ValueError(
            f"retain: the block layout keeps at most {BLOCK_KEPT[-1]} of {BLOCK}, that is 0.5, got {retain}; "
            "use sparse_layout='bitmap'"
        )
    return max((n for n in BLOCK_KEPT if n <= BLOCK * retain), default=BLOCK_KEPT[0])


def keep_largest(magnitude: Tensor, count: int) -> Tensor:
    """(n,) float -> (n,) bool with exactly ``count`` true: the largest, lower indices first among equals."""
    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    # An in-place partition: 4 s for the 176 M weights of a Mixtral expert, where torch.kthvalue takes 15 s.
    ordered, cut = magnitude.cpu().numpy().copy(), len(magnitude) - count
    ordered.partition(cut)
    threshold = float(ordered[cut])
    keep = magnitude > threshold
    ties = (magnitude == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return keep


def offsets(counts: Tensor) -> Tensor:
    """(n,) int64 -> (n + 1,) running totals from 0: int32, or int64 where the last does not fit."""
    totals = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return totals if int(totals[-1]) > torch.iinfo(torch.int32).max else totals.to(torch.int32)
