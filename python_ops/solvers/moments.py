"""Second moments of what a matrix is multiplied with, made fit to solve with: shrunk, and told to be usable.

H_e = E[x x^T] over the tokens of expert e,    ||(W - W') x||^2 in the mean = tr((W - W') H_e (W - W')^T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.products import one_thread, product

HITS = 256.0  # tokens' worth of the layer's moment that every expert is given


def shrunk_moments(sums: Tensor, mass: Tensor, tokens: Tensor, *, ridge: float, hits: float = HITS) -> Tensor:
    """What experts' fits are made under: moments per unit of mass, drawn towards the layer's and the identity.

        P   = sum_e S_e / sum_e m_e                            the layer's
        H_e = (n_e S_e / m_e + hits P) / (n_e + hits)          the fewer tokens an expert saw, the more of the layer's
        H_e + ridge mean(diag H_e) I                           so that text of another kind is not paid for

    sums: (E, K, K) float, S_e = sum over its tokens of c x x^T;  mass: (E,) float, m_e, their sum of c
    tokens: (E,), n_e;  ridge: above 0, or the moments may be singular;  hits: above 0 where an expert has no token
    Returns (E, K, K) in the sums' dtype, symmetric.

    Raises ValueError if sums are not finite, their diagonals negative, all zero, or a setting is out of range.
    """
    if not (0 <= ridge < torch.inf and 0 <= hits < torch.inf):
        raise ValueError(f"ridge and hits: must be at least 0 and finite, got {ridge} and {hits}")
    if not bool(torch.isfinite(sums).all()):
        expert = int((~torch.isfinite(sums)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"moments: must be finite, those of expert {expert} are not; check the calibration text")
    total = float(mass.sum())
    diagonal = sums.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()) or total <= 0 or not bool((diagonal > 0).any()):
        raise ValueError("moments: need a token and a diagonal without negatives, not all zero; calibrate on more text")
    moments = drawn_to_layer(sums, mass, tokens, hits)
    moments = (moments + moments.transpose(1, 2)) / 2
    moments.diagonal(dim1=1, dim2=2).add_(ridge * moments.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    return moments


def drawn_to_layer(sums: Tensor, mass: Tensor, tokens: Tensor, hits: float = HITS) -> Tensor:
    """(n_e S_e / m_e + hits P) / (n_e + hits) of any sums (E, ...) over experts' tokens, see shrunk_moments."""
    n = tokens.to(sums)
    if bool((n + hits == 0).any()):
        raise ValueError(f"hits: must be above 0 where experts saw no token, got {hits}")
    of_expert = (-1, *[1] * (sums.dim() - 1))
    own = (n / mass.to(sums).clamp_min(torch.finfo(sums.dtype).tiny)).view(of_expert) * sums
    pooled = sums.sum(0) / mass.to(sums).sum()
    return (own + hits * pooled) / (n + hits).view(of_expert)


def lower_roots(moments: Tensor) -> Tensor:
    """L (..., K, K) float64, lower triangular, H = L L^T.

    Where H is singular, the least of 1e-8, 1e-7, ... times its mean diagonal is added that makes it definite.
    Raises ValueError where none up to 1e-2 does: then it is no second moment.
    """
    wide = moments.double()
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = 0.0
    for exponent in (None, *range(-8, -1)):
        damping = 0.0 if exponent is None else 10.0**exponent
        damped = wide + torch.diag_embed((damping * mean).unsqueeze(-1).expand(wide.shape[:-1]))
        with one_thread():
            root, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return root
    raise ValueError(
        "moments: not positive semi-definite, even with 1e-2 of their mean on the diagonal; calibrate again"
    )


def moment_error(difference: Tensor, moments: Tensor, rows: Tensor | None = None) -> Tensor:
    """tr(D (W - W') H (W - W')^T D), (E,) float64. difference: (E, N, K);  moments: (E, K, K);  rows: D (E, N)"""
    image = torch.stack([product(d, m.to(d)) for d, m in zip(difference, moments, strict=True)])
    per_row = (image * difference).sum(-1, dtype=torch.float64)
    return (per_row if rows is None else per_row * rows.double() * rows.double()).sum(-1)
