"""Sparse residuals: the largest magnitudes of every expert's two matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from resmoe_kernels.factored import BLOCK_KEPT, MATRICES
from resmoe_kernels.python_ops.solvers.budgets import Curves
from resmoe_kernels.python_ops.solvers.factorize import Residual
from resmoe_kernels.sparse import BLOCK, pack_bitmap, pack_block, unpack_mask

_BITMAP_STEPS = 64  # of a curve of energy against count

# e -> what a unit of weight counts for in every column of expert e: gate_up (H,), down (I,). See column_scales.
Scale = Callable[[int], tuple[Tensor, Tensor]]


def bitmap(
    residual: Residual,
    num_experts: int,
    *,
    retain: float | Sequence[float],
    rows: bool = False,
    scale: Scale | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Magnitude pruning, one threshold per expert over both of its matrices.

        S_e = Delta_e where |Delta_e| scale_e is among the floor(retain * count) largest of [gate | up | down^T]

    and 0 elsewhere. Exactly that many are kept: among equals gate_up goes before down, and lower rows and
    columns first.

    residual: e -> gate_up (N, H), down (H, I) float;  dtype: of the values
    retain: in [0, 1], one number or one for each expert
    rows: rows are kept whole, those of the largest mean of |Delta_e| scale_e, while they fit
    scale: None for magnitude alone
    Returns mask, values and row_offsets of gate_up and down in the bitmap layout of FactoredExperts.
    Source: ResMoE, arXiv 2503.06881; rows: MC-SMoE, arXiv 2310.01334; scale: Wanda, arXiv 2306.11695.
    """

    def pruned(e: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        dense = residual(e)
        importance = _importance(dense, scale, e)
        share = retain if isinstance(retain, int | float) else retain[e]
        budget = math.floor(share * sum(d.numel() for d in dense))
        return dense, keep_rows(importance, budget) if rows else keep_entries(importance, budget)

    return stack_bitmaps(map(pruned, range(num_experts)), dtype)


def bitmap_at(
    residual: Residual, counts: Mapping[str, Sequence[int]], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The same at given counts: of each matrix of each expert its so many largest magnitudes, ties to the first."""

    def pruned(e: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        dense = residual(e)
        of_expert = zip(MATRICES, dense, strict=True)
        return dense, [keep_largest(d.abs().flatten(), counts[m][e]).view_as(d) for m, d in of_expert]

    return stack_bitmaps(map(pruned, range(len(counts[MATRICES[0]]))), dtype)


def stack_bitmaps(
    experts: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The bitmap layout, as ``bitmap`` returns it, of given entries.

    experts: of each, its gate_up (N, H) and down (H, I) float, and which of their entries to keep, bool
    """
    masks: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    values: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    counts: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    for dense, keep in experts:
        for matrix, d, k in zip(MATRICES, dense, keep, strict=True):
            mask, kept, row_offsets = pack_bitmap(d, k)
            masks[matrix].append(mask)
            values[matrix].append(kept.to(dtype))
            counts[matrix].append(row_offsets.diff())
    tensors = {}
    for matrix in MATRICES:
        tensors[f"mask_{matrix}"] = torch.stack(masks[matrix])
        tensors[f"values_{matrix}"] = torch.cat(values[matrix])
        tensors[f"row_offsets_{matrix}"] = offsets(torch.cat(counts[matrix]))
    return tensors


def block(
    residual: Residual,
    num_experts: int,
    *,
    kept: int | Mapping[str, int],
    scale: Scale | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The ``kept`` largest |Delta_e| scale_e of every 32 along a row, ties to the lower column.

    residual: e -> gate_up (N, H), down (H, I) float;  kept: 4, 8, 12 or 16, one number or by matrix
    dtype: of the values
    scale: None for magnitude alone
    Returns mask and values of gate_up and down in the block layout of FactoredExperts.
    """
    masks: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    values: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    kept = dict.fromkeys(MATRICES, kept) if isinstance(kept, int) else kept
    for e in range(num_experts):
        dense = residual(e)
        for matrix, d, importance in zip(MATRICES, dense, _importance(dense, scale, e), strict=True):
            # By rows, because packing sorts: a Mixtral matrix at once would take 3 GB of indices.
            slices = zip(d.split(1024), importance.split(1024), strict=True)
            packed = [_pack_block(rows, weighed, kept[matrix]) for rows, weighed in slices]
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


def bitmap_curves(residual: Residual, num_experts: int, *, retain: float, width: int) -> Curves:
    """What a 64th of a matrix more gains, its largest entries first.

    residual, retain: see bitmap, whose counts are the budget;  width: bytes of a value
    """
    gains: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    for e in range(num_experts):
        dense = residual(e)
        for matrix, d in zip(MATRICES, dense, strict=True):
            gains[matrix].append(_magnitude_energies(d))
    sizes = {m: d.numel() for m, d in zip(MATRICES, dense, strict=True)}
    return Curves(
        {m: torch.stack(rows) for m, rows in gains.items()},
        {m: _bitmap_step(size) for m, size in sizes.items()},
        sizes,
        num_experts * math.floor(retain * sum(sizes.values())),
        width,
        divisible=True,
    )


def block_curves(residual: Residual, num_experts: int, *, retain: float, width: int) -> Curves:
    """What 4 of every 32 more gain beyond the first 4, which all have.

    retain: mean of what is kept, within [4/32, 16/32];  width: bytes of a value
    """
    gains: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    for e in range(num_experts):
        dense = residual(e)
        for matrix, d in zip(MATRICES, dense, strict=True):
            gains[matrix].append(_block_energies(d))
    prices = {m: BLOCK_KEPT[0] * d.shape[0] * -(-d.shape[1] // BLOCK) for m, d in zip(MATRICES, dense, strict=True)}
    steps = BLOCK * retain / BLOCK_KEPT[0] - 1
    return Curves(
        {m: torch.stack(rows) for m, rows in gains.items()},
        prices,
        {m: price * (len(BLOCK_KEPT) - 1) for m, price in prices.items()},
        math.floor(steps * num_experts * sum(prices.values()) + 1e-6),
        width,
        together=True,
    )


def _magnitude_energies(matrix: Tensor) -> Tensor:
    """The energy of the largest 64th of a matrix's entries, of the next, ...: (64,) float64."""
    ordered = matrix.abs().flatten().cpu().numpy().copy()
    ordered.sort()  # in place: 117 M entries of a Mixtral gate_up
    ordered, step = ordered[::-1], _bitmap_step(matrix.numel())
    parts = (ordered[i * step : (i + 1) * step].astype("float64") for i in range(_BITMAP_STEPS))
    return torch.tensor([float((part * part).sum()) for part in parts], dtype=torch.float64)


def _bitmap_step(entries: int) -> int:
    return -(-entries // _BITMAP_STEPS)


def _block_energies(matrix: Tensor) -> Tensor:
    """The energy of the 5th to 8th largest of every 32 along a row, of the 9th to 12th, of the 13th to 16th."""
    sums = torch.zeros(BLOCK_KEPT[-1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(1024):
        padded = torch.nn.functional.pad(rows.square(), (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        sums += padded.topk(BLOCK_KEPT[-1], dim=-1).values.double().sum((0, 1))
    return sums.view(len(BLOCK_KEPT), -1).sum(1)[1:].cpu()


def column_scale(moment: Tensor) -> Tensor:
    """The root of an input's second moment, scaled to a mean square of 1, so that both matrices stay comparable.

        scale_k = |x_k| / sqrt(mean over k of |x_k|^2),    |x_k| over the calibration tokens

    moment: (K,) sum of x^2 over tokens, or (K, K), sum of x x^T
    Returns (K,) float32; ones where no token was seen.
    """
    squares = (moment.diagonal() if moment.dim() == 2 else moment).double().clamp_min(0)
    if not bool(squares.any()):
        return torch.ones_like(squares, dtype=torch.float32)
    return (squares / squares.mean()).sqrt().float()


def keep_entries(importance: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Of matrices (N, K) float, the ``budget`` largest entries of all: bool of the same shapes. Ties to the first."""
    kept = keep_largest(torch.cat([i.flatten() for i in importance]), budget)
    parts = kept.split([i.numel() for i in importance])
    return [part.view_as(i) for part, i in zip(parts, importance, strict=True)]


def keep_rows(importance: Sequence[Tensor], budget: int) -> list[Tensor]:
    """The same in whole rows, those of the largest mean, until the next would exceed ``budget`` entries."""
    means = torch.cat([i.mean(1) for i in importance])
    lengths = torch.tensor([i.shape[1] for i in importance for _ in range(len(i))], device=means.device)
    order = means.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(means, dtype=torch.bool)
    kept[order] = lengths[order].cumsum(0) <= budget
    parts = kept.split([len(i) for i in importance])
    return [part.unsqueeze(1).expand_as(i) for part, i in zip(parts, importance, strict=True)]


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


def _importance(dense: Sequence[Tensor], scale: Scale | None, e: int) -> list[Tensor]:
    scales = (None, None) if scale is None else scale(e)
    return [d.abs() if s is None else d.abs() * s for d, s in zip(dense, scales, strict=True)]


def _pack_block(dense: Tensor, importance: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """``pack_block`` of dense (N, K), but the largest of ``importance`` (N, K), not negative, are kept."""
    mask, _ = pack_block(importance, kept)
    keep = unpack_mask(mask.unsqueeze(-1), BLOCK)
    # Kept columns first, in order; behind them, in a last word narrower than ``kept``, padding.
    columns = keep.int().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return mask, padded.gather(-1, columns)
