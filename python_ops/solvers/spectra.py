"""Spectra: how much of a matrix's energy its leading singular values hold, and how much chance would give them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from resmoe_kernels.products import one_thread
from resmoe_kernels.python_ops.solvers.svd import gram

SHARES = 33  # points of a curve: 0, 1/32, ..., 1 of the rank
QUARTER = 8  # where a curve is at a quarter of the rank


def spectrum(matrix: Tensor) -> Tensor:
    """The squared singular values of a matrix (N, K) float: (min(N, K),) float64, descending, on the CPU."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    with one_thread():
        return torch.linalg.eigvalsh(gram(tall, torch.float64)).flip(0).clamp_min(0).cpu()


def energy_kept(energy: Tensor) -> Tensor:
    """The part of a matrix's energy that the best approximation of every rank keeps.

        kept_i = sum_{k <= r_i} sigma_k^2 / ||W||_F^2,    r_i = floor(i min(N, K) / 32)

    energy: (min(N, K),) float64, as ``spectrum`` returns it
    Returns (33,) float64, rising to 1; all 1 for a matrix of zeros, which has nothing to lose.
    """
    total = energy.sum()
    if total == 0:
        return torch.ones(SHARES, dtype=torch.float64)
    upto = torch.nn.functional.pad(energy.cumsum(0) / total, (1, 0))
    return upto[torch.arange(SHARES) * len(energy) // (SHARES - 1)]


@cache
def random_energy_kept(rows: int, columns: int) -> Tensor:
    """The same of a matrix without structure: independent normal entries, the same ones at every call.

    A curve is relative to its own matrix's energy, so the control has any Frobenius norm one likes.
    """
    return energy_kept(spectrum(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))))
