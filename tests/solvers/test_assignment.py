"""Assignment against all permutations, scipy's solver and its own dual."""

import itertools
import logging

import numpy as np
import pytest
import torch

import resmoe_kernels.python_ops.solvers.assignment as module
from resmoe_kernels.ops import assignment, has_cpu_kernel
from resmoe_kernels.python_ops.solvers.assignment import assign, inner_products, solve

scipy_optimize = pytest.importorskip("scipy.optimize", reason="needs scipy: pip install 'resmoe_kernels[compress]'")
needs_extension = pytest.mark.skipif(not has_cpu_kernel("assignment"), reason="the extension is not built")


@pytest.fixture
def by_scipy(monkeypatch):
    monkeypatch.setattr(module, "_is_built", lambda: False)


def products(n, depth, seed=0, spread=0.0):
    """Inner products of n + n normal vectors, of uneven norms where spread is not 0."""
    r = np.random.default_rng(seed)
    a, b = (r.standard_normal((n, depth)) * np.exp(spread * r.standard_normal((n, 1))) for _ in range(2))
    return a @ b.T


def planted(n, seed=0):
    """A permutation that stands out, in noise."""
    r = np.random.default_rng(seed)
    return 5 * np.eye(n)[r.permutation(n)] + r.standard_normal((n, n))


def with_twins(n):
    """Rows that are zero, and columns that are equal."""
    score = products(n, 8)
    score[: n // 3] = 0
    score[:, n // 2 :] = score[:, :1]
    return score


# 64 columns are listed, 1,024 sampled: below, at and above.
SCORES = {
    **{f"noise {n}": products(n, 64) for n in (2, 3, 17, 63, 64, 65, 66, 130, 1030)},
    "planted": planted(300),
    "two columns deep": products(300, 2),
    "uneven norms": products(300, 64, spread=2.0),
    "twins": with_twins(200),
    "equal": np.ones((100, 100)),
    "zeros": np.zeros((70, 70)),
    "few values": np.random.default_rng(1).integers(0, 3, (150, 150)).astype(float),
    "product of ranks": np.outer(np.arange(120), np.arange(120)).astype(float),
    "the other way round": -np.outer(np.arange(120), np.arange(120)).astype(float),
    "huge": 1e30 * products(100, 8),
    "tiny": 1e-30 * products(100, 8),
    "far from zero": 1e4 + products(100, 8),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_solve_is_as_good_as_scipy_and_its_dual_proves_it(score):
    score = torch.from_numpy(score).float()
    n, size = len(score), float(score.abs().double().sum()) / len(score)
    found = solve(score)
    assert found.permutation.sort().values.equal(torch.arange(n))
    rows, best = scipy_optimize.linear_sum_assignment(score.double().numpy(), maximize=True)
    expected = float(score.double()[rows, best].sum())
    assert found.value == pytest.approx(expected, rel=0, abs=1e-9 * size)
    assert float(score.double()[torch.arange(n), found.permutation].sum()) == pytest.approx(found.value, rel=1e-12)
    if found.prices is not None:
        bound = float((score.double() - found.prices).max(1).values.sum() + found.prices.sum())
        assert bound - expected == pytest.approx(0, abs=1e-6 * size)
        assert found.gap == pytest.approx(0, abs=1e-6 * size)


@needs_extension
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_the_gap_of_an_inexact_assignment_is_true(score):
    score = torch.from_numpy(score).float()
    size = float(score.abs().double().sum()) / len(score)
    found, best = solve(score, exact=False), solve(score)
    assert found.permutation.sort().values.equal(torch.arange(len(score)))
    assert found.value <= best.value + 1e-9 * size
    assert best.value <= found.value + found.gap + 1e-6 * size
    assert found.gap <= 2e-2 * size


@needs_extension
def test_any_start_gives_the_same_value_and_any_threads_the_same_permutation():
    score = torch.from_numpy(products(500, 16)).float()
    found = solve(score)
    for prices in (found.prices, torch.randn(500, dtype=torch.float64), torch.full((500,), -1e3, dtype=torch.float64)):
        assert solve(score, prices=prices).value == pytest.approx(found.value, rel=1e-12)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = solve(score)
            assert again.permutation.equal(found.permutation) and again.prices.equal(found.prices)
    finally:
        torch.set_num_threads(threads)


def test_a_transposed_score_is_taken_as_it_is_meant():
    score = torch.from_numpy(products(80, 8)).float()
    assert solve(score.T).permutation.equal(solve(score.T.contiguous()).permutation)
    assert solve(score.T).permutation[solve(score).permutation].equal(torch.arange(80))


def test_one_and_none():
    assert solve(torch.ones(1, 1)).permutation.tolist() == [0]
    assert solve(torch.ones(0, 0)).permutation.tolist() == []


def test_scipy_solves_where_the_extension_is_not_built(by_scipy):
    score = torch.from_numpy(products(90, 8)).float()
    found = solve(score)
    assert (found.gap, found.prices) == (0, None)
    rows, best = scipy_optimize.linear_sum_assignment(score.numpy(), maximize=True)
    assert found.permutation.tolist() == best.tolist()
    assert found.value == pytest.approx(float(score.double()[rows, best].sum()), rel=1e-12)


def test_it_says_that_scipy_solves(monkeypatch, caplog):
    monkeypatch.setattr(module.ops, "has_cpu_kernel", lambda op: False)
    module._is_built.cache_clear()
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        solve(torch.eye(3))
        solve(torch.eye(3))
    module._is_built.cache_clear()
    assert [r.message for r in caplog.records] == [
        "assignments are solved by scipy, several times slower: the extension is not built"
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_must_be_finite(bad):
    score = torch.zeros(70, 70)
    score[60, 69] = bad
    with pytest.raises(ValueError, match=r"^score: must be below 2\^120 and not a nan; check the matrices"):
        solve(score)


def test_scores_must_be_finite_for_scipy_too(by_scipy):
    test_scores_must_be_finite(float("nan"))


@pytest.mark.parametrize("score", [torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 3, dtype=torch.float64)])
def test_scores_must_be_square_and_float32(score):
    with pytest.raises(ValueError, match=r"^score: must be \(n, n\) float32, got \("):
        solve(score)


@needs_extension
def test_the_op_refuses_what_it_cannot_read():
    op, square = assignment, torch.zeros(3, 3)
    prices = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^score: must be \(n, n\) contiguous float32, got \(3, 2\) Float"):
        op(square[:, :2].contiguous(), prices, True)
    with pytest.raises(ValueError, match=r"^prices: must be \(3,\) contiguous float64, got \(3,\) Float"):
        op(square, prices.float(), True)
    with pytest.raises(ValueError, match=r"^prices: must be finite$"):
        op(square, prices / 0, True)


def test_assign_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(5)
    target, source = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    cost = {p: float((target - source[list(p)]).square().sum()) for p in itertools.permutations(range(6))}
    assert tuple(assign(target, source).tolist()) == min(cost, key=cost.__getitem__)


def test_assign_keeps_the_current_order_among_equals():
    twins = torch.ones(4, 3)  # every permutation is as good
    current = torch.tensor([2, 0, 3, 1])
    assert torch.equal(assign(twins, twins, current), current)
    apart = torch.eye(4)
    assert torch.equal(assign(apart, apart, current), torch.arange(4))


def test_inner_products_in_half_precision_are_near_and_cost_next_to_nothing():
    generator = torch.Generator().manual_seed(6)
    target, source = (torch.randn(300, 96, generator=generator) for _ in range(2))
    exact = target.double() @ source.double().T
    score = inner_products(target, source, half=True)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), exact, rtol=2**-8, atol=float(exact.std()) * 2**-6)
    rows = torch.arange(300)
    best, found = (float(exact[rows, solve(s).permutation].sum()) for s in (exact.float(), score))
    assert best * (1 - 1e-3) < found <= best
    assert torch.equal(inner_products(target, source, half=False), target @ source.T)


def test_half_precision_is_left_to_cpus_that_have_it(monkeypatch):
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: False)
    target, source = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(inner_products(target, source, half=True), target @ source.T)


def test_inner_products_are_filled_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 3)
    target, source = torch.randn(8, 4), torch.randn(8, 4)
    whole = (target.bfloat16() @ source.bfloat16().T).float()
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: True)
    torch.testing.assert_close(inner_products(target, source, half=True), whole, rtol=2**-7, atol=0)
