"""The leading eigenvectors of a large Gram matrix, by filtered subspace iteration, with a proof of what they miss."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resmoe_kernels.products import one_thread, product, symmetric

SWEEPS = 4
DEGREE = 8  # of a filter at most
GAIN = 1e7  # of a filter at most: float32 columns forget what is farther below their largest part
FLOOR = 1e-5  # of the energy, for float32
ROUNDING = 4e-6  # of the largest diagonal entry, for a Cholesky factorisation in float32; 16 of its roundings are 1e-6


class Subspace(NamedTuple):
    """basis: (n, rank) float32, orthonormal to 1e-5;  bound: see ``leading_subspace``, as a part of tr G."""

    basis: Tensor
    bound: float


def leading_subspace(gram: Tensor, rank: int, excess: float) -> Subspace | None:
    """A basis Q that holds nearly all the energy that any of its rank can, or None where that could not be shown.

        sum_{i <= rank} lambda_i(G) - tr Q^T G Q  <=  bound  =  excess (tr G - tr Q^T G Q) + 1e-5 tr G

    gram: (n, n) float32, positive semidefinite, not zero: G;  rank: from 1 to n / 2;  excess: above 0

    Iteration: a block of 7/6 rank columns, at first signed sums of unit vectors, is multiplied by a Chebyshev
    polynomial of G that stays within [-1, 1] up to the eigenvalue estimated to end twice the oversampling and grows
    from there; Rayleigh-Ritz in the block gives pairs (theta_i, q_i), descending, with residuals
    b_i = G q_i - theta_i q_i. Where the bound cannot be shown of the first rank of them, a sweep more.

    Bound: take k >= rank pairs and tau > mu, where mu is no less than any eigenvalue of G on the complement of
    q_1 ... q_k. P, which is diag(max(theta - tau, 0)) + B^T (tau - G_complement)^-1 B on the pairs and zero on the
    complement, is then no less than G - tau (its Schur complement) and no less than 0, so that (Ky Fan)

        sum_{i <= rank} lambda_i  <=  rank tau + tr P
                                  <=  rank tau + sum_{i <= k} max(theta_i - tau, 0) + sum_{i <= k} |b_i|^2 / (tau - mu)

    theta and |b_i| say which k, tau and largest mu keep this within the bound; that mu is no less than those
    eigenvalues is shown by a Cholesky factorisation of mu - G + 2 Q_k diag(theta) Q_k^T, which exists only if so.
    Nothing is assumed of the spectrum or of chance, only that float32 costs less than the 1e-5 and ROUNDING set aside.

    Source: Zhou, Saad, Tiago and Chelikowsky 2006 for filter and iteration; the bound is ours.
    """
    size = len(gram)
    gram = gram * (size / float(gram.diagonal().sum(dtype=torch.float64)))
    width = -(-(rank + max(16, rank // 6)) // 16) * 16  # whole vectors, and some more to converge with
    with one_thread():  # two busy threads on one free core wait for each other in each of its hundred small steps
        top, cut = _ends(gram, min(size, 2 * width - rank))
    head, block, deflated = gram.new_zeros(size, 0), None, gram
    for _ in range(SWEEPS):
        block = _filtered(deflated, block, width, top, cut)
        ritz, theta, residual = _rayleigh_ritz(gram, torch.cat([head, block], 1))
        bound = excess * (size - float(theta[:rank].sum())) + FLOOR * size
        if _shown(gram, rank, ritz, theta, residual, bound):
            return Subspace(ritz[:, :rank].contiguous(), bound / size)
        cut = max(float(theta[(rank + width) // 2]), 1e-6 * float(theta[0]))
        # The far larger pairs have converged, and without them the next filter can grow faster where it has to.
        far = int((theta > 5 * cut).sum()) // 16 * 16
        head, block = ritz[:, :far], ritz[:, far:]
        deflated = gram - product(head * theta[:far].float(), head.T)
        top = float(theta[far])
    return None


def _ends(gram: Tensor, place: int) -> tuple[float, float]:
    """Estimates of the largest eigenvalue and of the one at a place: Lanczos quadrature, 10 steps from 4 vectors."""
    vector = torch.randn(4, len(gram), generator=torch.Generator().manual_seed(1)).to(gram)
    vectors = [vector / vector.norm(dim=1, keepdim=True)]
    diagonal, beside = [], []
    for _ in range(10):
        image = vectors[-1] @ gram  # a third of the time of gram @ columns
        diagonal.append((image * vectors[-1]).sum(1))
        for v in vectors:
            image = image - v * (v * image).sum(1, keepdim=True)
        beside.append(image.norm(dim=1))
        vectors.append(image / beside[-1].clamp_min(1e-30).unsqueeze(1))
    off = torch.stack(beside[:-1], 1)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors_ = torch.linalg.eigh(tridiagonal.double().cpu())
    shares = vectors_[:, 0].square().flip(1)  # of the eigenvalues near each value
    middles = (shares.cumsum(1) - shares / 2) * len(gram)
    cuts = [np.interp(place, m.numpy(), v.numpy()) for m, v in zip(middles, values.flip(1), strict=True)]
    top = float(values.max())
    return top, max(0.95 * float(np.mean(cuts)), 1e-6 * top)  # flat spectra are overestimated by 2 or 3 percent


def _filtered(gram: Tensor, block: Tensor | None, width: int, top: float, cut: float) -> Tensor:
    """T(2 G / cut - 1) block, T a product of Chebyshev polynomials whose degrees sum to about 6 or one of up to 8.

    Between two of them the block is orthonormalised. block: None for signed sums of unit vectors, ``width`` of them.
    """
    degree = int(math.acosh(GAIN) / math.acosh(max(2 * top / cut - 1, 1.001)))
    degree = max(1, min(DEGREE, degree))
    rounds = min(3, max(1, round(6 / degree)))
    operator = gram * (2 / cut)
    operator.diagonal().sub_(1)
    if degree % 2 == 0:  # T_2m = T_m of T_2, which as a matrix costs less than the applications that it saves
        operator = symmetric(operator, operator).mul_(2)
        operator.diagonal().sub_(1)
        degree //= 2
    for i in range(rounds):
        before, now = _start(operator, width) if block is None else (block, product(operator, block))
        for _ in range(degree - 1):
            before, now = now, product(operator, now).mul_(2).sub_(before)
        block = now / now.norm(dim=0).clamp_min(torch.finfo(now.dtype).tiny)
        if i < rounds - 1:
            block = _orthonormal(block)
    assert block is not None
    return block


def _start(operator: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Signed sums of disjoint unit vectors (n, width), and the operator times them, which are sums of its columns."""
    size, device = len(operator), operator.device
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(size, generator=generator).to(device)
    sign = (1 - 2.0 * torch.randint(0, 2, (size,), generator=generator)).to(device)
    block, image = operator.new_zeros(size, width), operator.new_zeros(width, size)
    for i in range(0, size, width):
        rows, signs = order[i : i + width], sign[i : i + width]
        block[rows, torch.arange(len(rows), device=device)] = signs
        image[: len(rows)] += operator[rows] * signs.unsqueeze(1)
    return block, image.T.contiguous()


def _rayleigh_ritz(gram: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the span of block (n, m): Ritz vectors (n, m) float32, values (m,) and squared residuals (m,) float64."""
    basis = _orthonormal(block)
    image = product(gram, basis)
    # The basis of columns that are parallel up to GAIN is orthonormal to 1e-2 only.
    white = _whitening(symmetric(basis, basis).double())
    within = product(product(white.T, symmetric(basis, image).double()), white).float()
    with one_thread():
        theta, vectors = torch.linalg.eigh(within)
    theta, turn = theta.flip(0), product(white.float(), vectors.flip(1))
    ritz = product(basis, turn)
    residual = product(image, turn).sub_(ritz * theta)
    return ritz, theta.double(), residual.square().sum(0, dtype=torch.float64)


def _orthonormal(block: Tensor) -> Tensor:
    wide = block.double()
    return product(block, _whitening(symmetric(wide, wide)).float())


def _whitening(gram: Tensor) -> Tensor:
    """C with C^T gram C = 1, from Cholesky."""
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # columns more parallel than GAIN
            factor = torch.linalg.cholesky(gram + 1e-12 * len(gram) * identity)
        return torch.linalg.solve_triangular(factor, identity, upper=False).T


def _shown(gram: Tensor, rank: int, ritz: Tensor, theta: Tensor, residual: Tensor, bound: float) -> bool:
    """Whether the inequality of ``leading_subspace`` can be shown with this bound."""
    captured, highest = theta[:rank].sum(), 1.25 * float(theta[rank - 1]) + bound / rank
    best, chosen = 1.0, None
    theta, residual = theta.cpu(), residual.cpu()
    for k in torch.linspace(rank, (rank + len(theta)) // 2, 5).int().tolist():
        tau = torch.linspace(float(theta[k]), highest, 128, dtype=torch.float64)
        spare = bound - (rank * tau + (theta[:k, None] - tau).clamp_min(0).sum(0) - captured)
        mu = float(torch.where(spare > 0, tau - residual[:k].sum() / spare, -math.inf).max())
        # Of the complement, the next Ritz value is known, and one as far above it as its residual likely.
        least = max(float(theta[k] + residual[k].sqrt()), 1e-30)
        if mu / least > best:
            best, chosen = mu / least, (k, mu)
    if chosen is None:
        return False
    k, mu = chosen
    raised = (ritz[:, :k] * (2 * theta[:k].clamp_min(0)).sqrt().to(ritz)).T.contiguous()
    shifted = symmetric(raised, raised).sub_(gram)
    shifted.diagonal().add_(mu)
    shifted.diagonal().sub_(ROUNDING * shifted.diagonal().max())
    with one_thread():
        return not torch.linalg.cholesky_ex(shifted).info
