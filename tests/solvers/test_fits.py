"""Fits under second moments: against brute force, normal equations and closed forms in float64."""

from __future__ import annotations

import pytest
import torch

from resmoe_kernels.payload import Payload, decode, encode, nearest_codes, search_scales
from resmoe_kernels.python_ops.solvers.feedback import (
    BLOCK,
    Coded,
    decoded,
    feedback_codes,
    feedback_factors,
    unbiased,
)
from resmoe_kernels.python_ops.solvers.fits import Matrix, fit_full, fit_low_rank
from resmoe_kernels.python_ops.solvers.moment_base import base_under
from resmoe_kernels.python_ops.solvers.moment_low_rank import low_rank_under, refitted_u
from resmoe_kernels.python_ops.solvers.moments import lower_roots, moment_error, shrunk_moments


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(experts: int, size: int, tokens: int = 200, seed: int = 1) -> torch.Tensor:
    """Of inputs that lie near a space of a quarter of their dimensions."""
    few = -(-size // 4)
    inputs = rand(experts, tokens, few, seed=seed) @ rand(few, size, seed=seed + 1)
    inputs += 0.3 * rand(experts, tokens, size, seed=seed + 2)
    return inputs.transpose(1, 2) @ inputs / tokens


def lost(difference: torch.Tensor, moment: torch.Tensor) -> float:
    return float(moment_error(difference.double(), moment.double()).sum())


# ---- moments


def test_moments_shrink_towards_the_layers_and_the_identity():
    sums = moments(3, 8) * torch.tensor([10.0, 2.0, 0.0]).view(3, 1, 1)
    mass, tokens = torch.tensor([5.0, 1.0, 0.0]), torch.tensor([20, 4, 0])
    got = shrunk_moments(sums, mass, tokens, ridge=0.5, hits=16)
    pooled = sums.sum(0) / 6
    for e in range(3):
        own = sums[e] / mass[e] if mass[e] else torch.zeros(8, 8)
        expected = (tokens[e] * own + 16 * pooled) / (tokens[e] + 16)
        expected = expected + 0.5 * expected.diagonal().mean() * torch.eye(8)
        torch.testing.assert_close(got[e], expected)
    torch.testing.assert_close(got, got.transpose(1, 2), rtol=0, atol=0)


def test_moments_that_are_none_are_refused():
    good, mass, tokens = moments(2, 4), torch.ones(2), torch.full((2,), 9)
    with pytest.raises(ValueError, match="moments: must be finite, those of expert 1 are not"):
        shrunk_moments(torch.stack([good[0], good[1] * torch.nan]), mass, tokens, ridge=0.1)
    for bad in (torch.zeros_like(good), -good):
        with pytest.raises(ValueError, match="moments: need a token and a diagonal without negatives"):
            shrunk_moments(bad, mass, tokens, ridge=0.1)
    with pytest.raises(ValueError, match="moments: need a token"):
        shrunk_moments(good, torch.zeros(2), tokens, ridge=0.1)
    with pytest.raises(ValueError, match="ridge and hits: must be at least 0 and finite, got -1"):
        shrunk_moments(good, mass, tokens, ridge=-1)
    with pytest.raises(ValueError, match="hits: must be above 0 where experts saw no token"):
        shrunk_moments(good, mass, torch.tensor([9, 0]), ridge=0.1, hits=0)


def test_roots_of_singular_moments():
    singular = moments(1, 8, tokens=3)[0]
    root = lower_roots(singular)
    assert torch.equal(root, root.tril())
    assert float((root @ root.T - singular).abs().max()) < 1e-5 * float(singular.diagonal().max())
    with pytest.raises(ValueError, match="moments: not positive semi-definite"):
        lower_roots(-singular)


# ---- error feedback


def obq(values: torch.Tensor, moment: torch.Tensor, scales: torch.Tensor, payload: Payload) -> torch.Tensor:
    """Column by column, with the inverse of what is left of H taken anew each time: codes (N, K)."""
    w, codes = values.double().clone(), []
    for k in range(w.shape[1]):
        inverse = torch.linalg.inv(moment.double()[k:, k:])
        code = nearest_codes(w[:, k], scales, payload)
        codes.append(code)
        wrong = w[:, k] - (code.double() - payload.offset) * scales.double()
        w[:, k:] -= wrong.unsqueeze(1) * inverse[0] / inverse[0, 0]
    return torch.stack(codes, 1)


def test_feedback_is_what_inverses_taken_anew_give():
    payload = Payload(3, 32)
    values, moment = rand(6, 32), moments(1, 32)
    got = feedback_codes(values.unsqueeze(0), feedback_factors(moment), payload)
    scales = search_scales(values, payload)[:, 0]
    assert torch.equal(got.scales[0, :, 0], scales)
    assert (got.codes[0] != obq(values, moment[0], scales, payload)).sum() <= 2  # ties of float32 and float64


@pytest.mark.parametrize("group", [32, 128])
def test_feedback_with_a_diagonal_is_rounding(group):
    payload = Payload(2, group)
    values = rand(2, 5, 160)
    diagonal = torch.diag_embed(torch.rand(2, 160, generator=torch.Generator().manual_seed(3)) + 0.1)
    got = feedback_codes(values, feedback_factors(diagonal), payload)
    expected = decode(*encode(values, payload), payload, 160)
    torch.testing.assert_close(decoded(got, payload), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_than_rounding(bits):
    payload, columns = Payload(bits, 64), BLOCK + 37
    values, moment = rand(3, 16, columns), moments(3, columns, tokens=400)
    got = decoded(feedback_codes(values, feedback_factors(moment), payload), payload)
    rounded = decode(*encode(values, payload), payload, columns)
    assert lost(values - got, moment) < 0.6 * lost(values - rounded, moment)
    # Experts at once are experts one by one, and one moment may serve all.
    alone = feedback_codes(values[1:2], feedback_factors(moment[1:2]), payload)
    torch.testing.assert_close(decoded(alone, payload)[0], got[1])
    shared = feedback_codes(values[:2], feedback_factors(moment[1:2]), payload)
    torch.testing.assert_close(decoded(shared, payload)[1], got[1])


def test_unbiased_rows_have_no_error_along_themselves():
    payload = Payload(2, 128)
    values, moment = rand(2, 7, 128), moments(2, 128)
    coded = feedback_codes(values, feedback_factors(moment), payload)
    before, after = (decoded(c, payload) for c in (coded, unbiased(coded, payload, values, moment)))
    assert torch.equal(coded.codes, unbiased(coded, payload, values, moment).codes)

    def along(got):
        return ((values @ moment) * (values - got)).sum(-1) / ((values @ moment) * values).sum(-1)

    assert float(along(after).abs().max()) < 2**-8  # one scale a row: what bfloat16 rounds
    assert float(along(before).abs().mean()) > 4 * float(along(after).abs().mean())
    zeros = Coded(coded.codes, torch.zeros_like(coded.scales))
    assert torch.equal(unbiased(zeros, payload, values, moment).scales, zeros.scales)


# ---- low rank and base


def test_low_rank_under_a_moment_leaves_the_tail_of_what_it_decomposes():
    matrix, moment, rows = rand(24, 20), moments(1, 20)[0], rand(24, seed=5).abs() + 0.1
    root = lower_roots(moment)
    u, v, sigma = low_rank_under(matrix, root, 16, rows)
    weighted = rows.double().unsqueeze(1) * matrix.double() @ root
    whole = torch.linalg.svdvals(weighted)
    left = float(moment_error((matrix - u.T @ v).unsqueeze(0), moment.unsqueeze(0), rows.unsqueeze(0)))
    assert left == pytest.approx(float(whole[16:].square().sum()), rel=1e-4)
    torch.testing.assert_close(sigma, whole[:16])
    plain = low_rank_under(matrix, torch.eye(20, dtype=torch.float64), 16)
    left = float((matrix - plain[0].T @ plain[1]).double().square().sum())
    assert left == pytest.approx(float(torch.linalg.svdvals(matrix.double())[16:].square().sum()), rel=1e-4)


def test_refitted_u_satisfies_the_normal_equations():
    matrix, moment, v = rand(12, 40), moments(1, 40)[0], rand(16, 40, seed=7)
    v[3] = 0
    u = refitted_u(matrix, moment, v)
    left = (matrix.double() - u.double().T @ v.double()) @ moment.double() @ v.double().T
    assert float(left.abs().max()) < 1e-4 * float((matrix.double() @ moment.double() @ v.double().T).abs().max())
    assert torch.equal(u[3], torch.zeros(12))
    twice = torch.cat([v, v[:1]])
    assert bool(torch.isfinite(refitted_u(matrix, moment, twice)).all())


def test_base_satisfies_the_normal_equations():
    targets, moment, mass = rand(4, 6, 16), moments(4, 16), torch.tensor([3.0, 0.0, 1.0, 2.0])
    base = base_under(targets, moment, mass)
    left = sum(c * (t - base) @ m for c, t, m in zip(mass, targets, moment, strict=True))
    whole = sum(c * t @ m for c, t, m in zip(mass, targets, moment, strict=True))
    assert float(left.abs().max()) < 1e-4 * float(whole.abs().max())
    mean = base_under(targets, moment[:1].expand(4, -1, -1), mass)
    torch.testing.assert_close(mean, (mass.view(4, 1, 1) * targets).sum(0) / 6)
    with pytest.raises(ValueError, match="moments: their weighted sum is singular"):
        base_under(targets, torch.zeros(4, 16, 16), mass)


# ---- all together


def related(experts: int = 4, rows: int = 48, columns: int = 64) -> Matrix:
    """Experts that share most of what they do."""
    weights = rand(1, rows, columns) + 0.5 * rand(experts, rows, columns, seed=11)
    mass = torch.tensor([4.0, 1.0, 0.5, 2.0])[:experts]
    return Matrix(weights, moments(experts, columns), mass, rand(experts, rows, seed=13).abs() + 0.2)


def stands_for(fitted, matrix: Matrix) -> torch.Tensor:
    """W' from what is stored alone."""
    count, rows, columns = matrix.weights.shape

    def numbers(stored, length):
        if stored.payload is None:
            return stored.tensor.float()
        return decode(stored.tensor, stored.scales, stored.payload, length)

    total = torch.zeros(count, rows, columns)
    if fitted.base is not None:
        total += numbers(fitted.base, columns)
    if fitted.values is not None:
        total += numbers(fitted.values, columns)
    if fitted.u is not None:
        u, v = numbers(fitted.u, rows), numbers(fitted.v, columns)
        at = 0
        for e, rank in enumerate(fitted.ranks):
            total[e] += u[at : at + rank].T @ v[at : at + rank]
            at += rank
    return total


@pytest.mark.parametrize("base", [None, Payload(4, 64), torch.bfloat16])
@pytest.mark.parametrize("factors", [Payload(4, 32), torch.bfloat16])
def test_low_rank_stores_what_it_says(base, factors):
    matrix = related()
    fitted = fit_low_rank(matrix, [16, 0, 32, 16], base=base, factors=factors, rounds=1)
    torch.testing.assert_close(stands_for(fitted, matrix), fitted.weights, rtol=1e-4, atol=1e-4)
    nothing = matrix.error(torch.zeros_like(matrix.weights))
    assert matrix.error(fitted.weights) < 0.9 * nothing


def test_in_turn_beats_the_base_first_and_data_beats_none():
    matrix = related()
    how = {"base": torch.float32, "factors": torch.float32}
    first, in_turn = (matrix.error(fit_low_rank(matrix, [16] * 4, rounds=r, **how).weights) for r in (0, 4))
    assert in_turn < first
    blind = Matrix(matrix.weights, torch.eye(64).expand(4, -1, -1), torch.ones(4))
    assert in_turn < 0.8 * matrix.error(fit_low_rank(blind, [16] * 4, rounds=4, **how).weights)
    exact = fit_low_rank(matrix, [48] * 4, rounds=0, **how)
    torch.testing.assert_close(exact.weights, matrix.weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", [None, Payload(3, 64)])
def test_full_residual_stores_what_it_says(base):
    matrix = related()
    fitted = fit_full(matrix, Payload(2, 32), base=base)
    torch.testing.assert_close(stands_for(fitted, matrix), fitted.weights, rtol=1e-5, atol=1e-5)
    rounded = decode(*encode(matrix.weights, Payload(2, 32)), Payload(2, 32), 64)
    assert matrix.error(fitted.weights) < 0.6 * matrix.error(rounded)
