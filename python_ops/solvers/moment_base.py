"""The shared base that is best under experts' second moments, given what their residuals hold."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.products import one_thread, product


def base_under(targets: Tensor, moments: Tensor, weights: Tensor) -> Tensor:
    """B with the least sum_e c_e tr((T_e - B) H_e (T_e - B)^T),  T_e = W_e - R_e.

        B = (sum_e c_e T_e H_e) (sum_e c_e H_e)^-1

    targets: (E, N, K) float;  moments: (E, K, K);  weights: c (E,), at least 0
    Returns (N, K) float32. The mean of the targets, weighted by c, where all moments are the same.
    """
    c = (weights.double() / weights.double().sum()).view(-1, 1, 1)
    normal = torch.zeros_like(moments[0], dtype=torch.float64)
    right = torch.zeros_like(targets[0], dtype=torch.float64)
    for target, moment, share in zip(targets, moments, c, strict=True):
        weighted = share * moment.double()
        normal += weighted
        right += product(target.double(), weighted)
    with one_thread():
        root, failed = torch.linalg.cholesky_ex(normal)
    if bool(failed):
        raise ValueError("moments: their weighted sum is singular; shrink them towards the identity, ridge above 0")
    with one_thread():
        return torch.cholesky_solve(right.T, root).T.float()
