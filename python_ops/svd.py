"""The singular value decomposition, cut off at a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of a rank, balanced: matrix ~ u^T v, u = sqrt(sigma) U^T, v = sqrt(sigma) V^T.

    matrix: (N, K) float
    Returns u (rank, N), v (rank, K), sigma (rank,) float64, descending; rows beyond min(N, K) are zero.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, u, sigma = truncated_svd(matrix.T, rank)
        return u, v, sigma
    # Eigenvectors of the smaller Gram matrix, in float64 because squaring halves the digits: in float32,
    # triplets below 3e-4 of the largest drown. (7168, 4096) took 13 s on 2 cores with eigh on both, torch.linalg.svd
    # in float32 19 s; the squared errors of rank 1312 agree to 2e-7. Now it takes 32 s of processor time.
    matrix = matrix.double()
    gram = matrix.T @ matrix
    with one_thread():
        basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    image = matrix @ basis
    sigma = image.norm(dim=0)
    root = sigma.sqrt()
    u = image / root.clamp_min(torch.finfo(root.dtype).tiny)  # a zero sigma has a zero image
    missing = rank - basis.shape[1]
    u, v = (torch.nn.functional.pad(t.T, (0, 0, 0, missing)) for t in (u, basis * root))
    return u, v, torch.nn.functional.pad(sigma, (0, missing))


@contextmanager
def one_thread() -> Iterator[None]:
    """For LAPACK, whose last bits change with the number of threads: a layer's bytes must not depend on how many layers
    are compressed at a time. With 1, 2, 3 and 5 threads eigh, svd and qr differed, matrix products and sums did not.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
