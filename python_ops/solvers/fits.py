"""One matrix of all experts of a layer fitted under their moments: base, low rank and full residual, as stored.

    the error:  sum_e c_e tr(D_e (W_e - W'_e) H_e (W_e - W'_e)^T D_e)

c_e is how much an expert's tokens count, D_e = diag(rows) how much a row's outputs count in the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from resmoe_kernels.payload import Payload, decode, encode, pack_codes
from resmoe_kernels.products import product
from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK, block_energies, bought_ranks
from resmoe_kernels.python_ops.solvers.feedback import (
    Coded,
    decoded,
    feedback_codes,
    feedback_factors,
    unbiased,
)
from resmoe_kernels.python_ops.solvers.moment_base import base_under
from resmoe_kernels.python_ops.solvers.moment_low_rank import low_rank_under, refitted_u
from resmoe_kernels.python_ops.solvers.moments import lower_roots, moment_error
from resmoe_kernels.python_ops.solvers.spectra import spectrum

ROUNDS = 4  # of base and residual in turn; 8 took KL another 4 to 9 % down, for twice the time


class Stored(NamedTuple):
    """A tensor as it will be stored: floats, or codes with scales under a payload, see payload.py."""

    tensor: Tensor
    scales: Tensor | None = None
    payload: Payload | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """What a fit is of.

    weights: (E, N, K) float;  moments: H (E, K, K) float, shrunk, see shrunk_moments;  mass: c (E,) float, at least 0
    rows: D (E, N) float above 0, or None for ones
    """

    weights: Tensor
    moments: Tensor
    mass: Tensor
    rows: Tensor | None = None

    def error(self, fitted: Tensor) -> float:
        """The error above, of W' (E, N, K)."""
        return float((moment_error(self.weights.float() - fitted, self.moments, self.rows) * self.mass).sum())

    def pooled(self) -> Tensor:
        """The moment (1, K, K) of all tokens."""
        share = (self.mass / self.mass.sum()).to(self.moments).view(-1, 1, 1)
        return (share * self.moments).sum(0, keepdim=True)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fit. base: of (N, K);  u, v: of (R, N) and (R, K), all experts one after the other, with their ranks
    values: of (E, N, K);  weights: (E, N, K) float32, what all of it stands for"""

    weights: Tensor
    base: Stored | None = None
    u: Stored | None = None
    v: Stored | None = None
    ranks: Sequence[int] = ()
    values: Stored | None = None


def fit_low_rank(
    matrix: Matrix,
    ranks: Sequence[int],
    *,
    base: Payload | torch.dtype | None,
    factors: Payload | torch.dtype,
    rounds: int = ROUNDS,
) -> Fitted:
    """W_e ~ B + U_e V_e: base and residual in turn, then B as it is stored, V as it is stored for that, U for both.

        U_e V_e = SVD of D_e (W_e - B) L_e at its rank;    B = (sum c_e (W_e - U_e V_e) H_e) (sum c_e H_e)^-1

    ranks: of each expert;  base: how it is stored, None for none;  factors: how v is, and u with a scale for each rank
    Codes of B and V are found with error feedback, U's by rounding: feedback along the ranks gained nothing.
    """
    count, rows, columns = matrix.weights.shape
    weights = matrix.weights.float()
    roots = lower_roots(matrix.moments)
    center = weights.new_zeros(rows, columns)
    stored_base = None

    def factorised(e: int) -> tuple[Tensor, Tensor]:
        rows_of = None if matrix.rows is None else matrix.rows[e]
        return low_rank_under(weights[e] - center, roots[e], ranks[e], rows_of)[:2]

    if base is not None:
        center = base_under(weights, matrix.moments, matrix.mass)
        for _ in range(rounds):
            pairs = (factorised(e) for e in range(count))
            targets = torch.stack([w - product(u.T, v) for w, (u, v) in zip(weights, pairs, strict=True)])
            center = base_under(targets, matrix.moments, matrix.mass)
        center, stored_base = stored_under(center, matrix.pooled(), base)
    us, vs, made = [], [], []
    for e in range(count):
        v, kept_v = stored_under(factorised(e)[1], matrix.moments[e : e + 1], factors)
        u = refitted_u(weights[e] - center, matrix.moments[e], v)
        u, kept_u = _rounded(u, Payload(factors.bits, 0) if isinstance(factors, Payload) else factors)
        us.append(kept_u)
        vs.append(kept_v)
        made.append(center + product(u.T, v))
    return Fitted(torch.stack(made), stored_base, _joined(us), _joined(vs), tuple(ranks))


def fit_full(
    matrix: Matrix, values: Payload, *, base: Payload | torch.dtype | None, refits: int = 1, unbias: bool = True
) -> Fitted:
    """W_e ~ B + R_e with codes R_e found by error feedback, their rows made unbiased.

    base: how it is stored, None for none: then R_e is the expert;  refits: of the base to what the codes hold
    unbias: the error above is less without, KL with
    """
    weights = matrix.weights.float()
    factors = feedback_factors(matrix.moments)
    center, stored_base = torch.zeros_like(weights[0]), None
    residual = torch.zeros_like(weights)
    for round_ in range(1 if base is None else refits + 1):
        if base is not None:
            # The mean first: what is best under the moments for no residual pulls it to where few tokens are.
            wanted = base_under(weights - residual, matrix.moments, matrix.mass) if round_ else weights.mean(0)
            center, stored_base = stored_under(wanted, matrix.pooled(), base)
        target = weights - center
        coded = feedback_codes(target, factors, values)
        if unbias:
            coded = unbiased(coded, values, target, matrix.moments)
        residual = decoded(coded, values)
    return Fitted(center + residual, stored_base, values=_packed(coded, values))


def stored_under(matrix: Tensor, moment: Tensor, how: Payload | torch.dtype) -> tuple[Tensor, Stored]:
    """A matrix (N, K) as numbers that are stored, chosen under a moment (1, K, K) by error feedback: their float32
    values, and themselves."""
    if not isinstance(how, Payload):
        return _rounded(matrix, how)
    coded = feedback_codes(matrix.unsqueeze(0), feedback_factors(moment), how)
    kept = _packed(coded, how)
    return decoded(coded, how)[0], kept._replace(tensor=kept.tensor[0], scales=kept.scales[0])  # type: ignore[index]


def _rounded(matrix: Tensor, how: Payload | torch.dtype) -> tuple[Tensor, Stored]:
    if not isinstance(how, Payload):
        kept = matrix.to(how)
        return kept.float(), Stored(kept)
    codes, scales = encode(matrix, how)
    return decode(codes, scales, how, matrix.shape[-1]), Stored(codes, scales, how)


def _packed(coded: Coded, payload: Payload) -> Stored:
    return Stored(pack_codes(coded.codes, payload), coded.scales, payload)


def _joined(parts: Sequence[Stored]) -> Stored:
    scales = None if parts[0].scales is None else torch.cat([p.scales for p in parts])  # type: ignore[misc]
    return Stored(torch.cat([p.tensor for p in parts]), scales, parts[0].payload)


def ranks_under(problems: Sequence[Matrix], base: Sequence[Tensor], retain: float) -> list[list[int]]:
    """Ranks of every expert's matrices that take ``retain`` of the parameters of all, bought as in low_rank, by what 16
    more lower the error beside a base. base: (N, K) of each problem"""
    energies, prices, parameters = {}, {}, 0
    for i, (problem, center) in enumerate(zip(problems, base, strict=True)):
        count, rows, columns = problem.weights.shape
        energies[str(i)] = list(rank_gains(problem, center))
        prices[str(i)] = RANK_BLOCK * (rows + columns)
        parameters += count * rows * columns
    return list(bought_ranks(energies, prices, parameters, retain).values())


def rank_gains(problem: Matrix, center: Tensor) -> Tensor:
    """By how much 16 ranks more lower each expert's error, W_e ~ center + low rank: (E, ceil(min(N, K) / 16)) float64.

    center: (N, K). Their sum is the error at rank 0.
    """
    roots, energies = lower_roots(problem.moments), []
    for e, share in enumerate(problem.mass.tolist()):
        seen = product(problem.weights[e].double() - center.double(), roots[e])
        if problem.rows is not None:
            seen *= problem.rows[e].double().unsqueeze(1)
        energies.append(share * block_energies(spectrum(seen)))
    return torch.stack(energies)
