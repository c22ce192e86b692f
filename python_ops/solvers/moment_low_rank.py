"""Low rank under a second moment: the truncated SVD of what a matrix makes of its inputs, not of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.products import one_thread, product
from resmoe_kernels.python_ops.solvers.svd import truncated_svd


def low_rank_under(
    matrix: Tensor, root: Tensor, rank: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U, V of a rank with the least ||D (W - U V) L||_F,  H = L L^T.

        D W L ~ U' V'  by SVD, balanced;    U = D^-1 U',  V = V' L^-1

    so that (D U)^T D U and V H V^T are both diagonal, with the same diagonal.

    matrix: (N, K) float;  root: L (K, K) float64, lower;  rows: D (N,) float, above 0, what a row's error counts
    Returns u (rank, N), v (rank, K) float32 with U = u^T, and sigma (rank,) float64, what is kept of D W L.
    """
    weighted = matrix.double() if rows is None else matrix.double() * rows.double().unsqueeze(1)
    u, v, sigma = truncated_svd(product(weighted, root), rank)
    with one_thread():
        v = torch.linalg.solve_triangular(root, v.double(), upper=False, left=False)
    u = u.double() if rows is None else u.double() / rows.double()
    return u.float(), v.float(), sigma


def refitted_u(matrix: Tensor, moment: Tensor, v: Tensor) -> Tensor:
    """The best U (rank, N) for a V as it is stored: U^T = W H V^T (V H V^T)^-1, whatever the rows count.

    matrix: (N, K);  moment: (K, K);  v: (rank, K). Rows of zeros in v get zeros.
    """
    image = product(moment.double(), v.double().T)
    gram = product(v.double(), image)
    scale = gram.diagonal().clamp_min(0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    normal = gram / safe.unsqueeze(0) / safe.unsqueeze(1)
    normal.diagonal().add_(1e-10)  # rows of zeros, and rows that 2 bits have made equal
    normal.diagonal()[scale == 0] = 1.0
    right = (product(matrix.double(), image) / safe).T
    with one_thread():
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(normal))
    return (solved / safe.unsqueeze(1)).float()
