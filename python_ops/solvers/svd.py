"""The singular value decomposition, cut off at a rank: exact, or for large matrices as good as shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from resmoe_kernels.products import one_thread, product, symmetric
from resmoe_kernels.python_ops.solvers.subspace import leading_subspace

# Where filtered_svd is asked first: below this side exact takes 0.1 s, above this share of it exact is as fast.
SMALLEST_SIDE = 512
LARGEST_SHARE = 0.45
EXCESS = 5e-3
ROWS = 4096  # of the matrix in float64 or scaled at a time: (28672, 4096) whole would be 0.9 GB


class FilteredSVD(NamedTuple):
    """u, v, sigma: as ``truncated_svd`` returns them, u and v in float32;  bound: see ``filtered_svd``."""

    u: Tensor
    v: Tensor
    sigma: Tensor
    bound: float


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """An approximation of a rank, balanced: matrix ~ u^T v, u = sqrt(sigma) U^T, v = sqrt(sigma) V^T.

        ||W - u^T v||^2  <=  1.006 min over rank of ||W - W'||^2  +  2e-5 ||W||^2

    which holds for certain, up to rounding; on residuals of trained weights it was at most 1.001 times the least. It is
    the least where the shorter side is below 512 or the rank above 0.45 of it: ``exact_svd``, else ``filtered_svd``.

    matrix: (N, K) float
    Returns u (rank, N), v (rank, K) float32 or float64, sigma (rank,) float64, descending; rows beyond min(N, K) are
    zero. The bits do not depend on the number of threads.
    Raises ValueError if an entry is not finite.
    """
    side = min(matrix.shape)
    if side >= SMALLEST_SIDE and rank <= LARGEST_SHARE * side:
        filtered = filtered_svd(matrix, rank)
        if filtered is not None:
            return filtered[:3]
    return exact_svd(matrix, rank)


def exact_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation, u and v in float64. Otherwise as ``truncated_svd``.

    The eigenvectors of the smaller Gram matrix, in float64 because squaring halves the digits: in float32, triplets
    below 3e-4 of the largest drown.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, u, sigma = exact_svd(matrix.T, rank)
        return u, v, sigma
    scale = _scale(matrix)
    if rank == 0 or scale == 0:
        return _zeros(matrix, rank, torch.float64)
    with one_thread():
        basis = torch.linalg.eigh(gram(matrix, torch.float64, scale)).eigenvectors.flip(1)[:, :rank]
    u, v, sigma = _factors(matrix, basis, scale)
    missing = rank - len(sigma)
    if missing:
        u, v = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (u, v))
        sigma = torch.nn.functional.pad(sigma, (0, missing))
    return u, v, sigma


def filtered_svd(matrix: Tensor, rank: int, excess: float = EXCESS) -> FilteredSVD | None:
    """An approximation whose squared error is shown to be near the least, or None where that could not be shown.

        ||W - u^T v||^2 - min over rank of ||W - W'||^2  <=  bound ||W||^2
        bound ||W||^2 = excess ||W - u^T v||^2 + 1e-5 ||W||^2

    without an exact decomposition: see ``leading_subspace``. Of what is below 3e-4 of the largest singular value it
    knows no more than that its energy is within the bound.

    matrix: (N, K) float;  rank: at most half of the shorter side;  excess: above 0
    Raises ValueError if an entry is not finite.

    Takes 0.6 GB beside the matrix for (28672, 4096) at rank 1792, u and v included; no float64 copy of it is made.
    """
    if matrix.shape[0] < matrix.shape[1]:
        swapped = filtered_svd(matrix.T, rank, excess)
        return swapped and FilteredSVD(swapped.v, swapped.u, swapped.sigma, swapped.bound)
    scale = _scale(matrix)
    if rank == 0 or scale == 0:
        return FilteredSVD(*_zeros(matrix, rank, torch.float32), bound=0.0)
    subspace = leading_subspace(gram(matrix, torch.float32, scale), rank, excess)
    return subspace and FilteredSVD(*_factors(matrix, subspace.basis, scale), bound=subspace.bound)


def gram(matrix: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale^2 matrix^T matrix (K, K) of a matrix (N, K), by blocks of its rows."""
    blocks = _blocks(matrix, dtype, scale)
    rows = next(blocks)
    total = symmetric(rows, rows)
    for rows in blocks:
        total += symmetric(rows, rows)
    return total


def _factors(matrix: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and sigma of W Q Q^T, Q = basis (K, r)."""
    image = basis.new_empty(basis.shape[1], len(matrix))
    energy = basis.new_zeros(len(image), dtype=torch.float64)
    for rows, out in zip(_blocks(matrix, basis.dtype, scale), image.split(ROWS, dim=1), strict=True):
        product(basis.T, rows.T, out=out)
        energy += out.square().sum(1, dtype=torch.float64)
    # A Gram matrix does not order what is near its rounding.
    sigma, order = energy.sqrt().sort(descending=True, stable=True)
    root, unscaled = sigma.sqrt().unsqueeze(1), scale**-0.5
    u = image[order].mul_((unscaled / root.clamp_min(1e-30)).to(basis.dtype))  # a zero sigma has a zero image
    return u, basis.T[order] * (root * unscaled).to(basis.dtype), sigma / scale


def _blocks(matrix: Tensor, dtype: torch.dtype, scale: float) -> Iterator[Tensor]:
    for rows in matrix.split(ROWS):
        yield rows.to(dtype) if scale == 1 else (rows * scale).to(dtype)


def _scale(matrix: Tensor) -> float:
    """A power of 4 that takes the largest magnitude near 1, so that squares are in range; 0 for zeros."""
    low, high = (float(end) for end in matrix.aminmax())
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise ValueError(f"matrix: all entries must be finite to be decomposed, got {largest}; check the weights")
    # Squares of float32 are in range between: no copy for ordinary weights.
    if 1e-6 < largest < 1e6 or largest == 0:
        return float(largest != 0)
    return 4.0 ** max(-60, min(60, -math.frexp(largest)[1] // 2))


def _zeros(matrix: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    u, v = (matrix.new_zeros(rank, n, dtype=dtype) for n in matrix.shape)
    return u, v, matrix.new_zeros(rank, dtype=torch.float64)
