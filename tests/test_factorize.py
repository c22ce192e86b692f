"""Low-rank residuals: the truncated SVD against numpy's, the budget, and what each factorisation stores."""

import math

import pytest
import torch

from resmoe_kernels.factored import FACTORIZATIONS, MATRICES, FactoredExperts
from resmoe_kernels.python_ops.factorize import buy_blocks, low_rank


def make_residuals(count=3, hidden=48, inter=64, gated=True, seed=0):
    """Spectra fall, steeper from expert to expert, so that the budget has something to choose."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, e):
        inner = min(rows, columns)
        fall = torch.exp(-0.03 * (e + 1) * torch.arange(inner))
        left, right = (
            torch.randn(rows, inner, generator=generator),
            torch.randn(inner, columns, generator=generator),
        )
        return left * fall @ right

    rows = 2 * inter if gated else inter
    return [(matrix(rows, hidden, e), matrix(hidden, inter, e)) for e in range(count)]


def factor(residuals, retain, factorization="stacked", gated=True, dtype=torch.float32):
    tensors = low_rank(
        residuals.__getitem__,
        len(residuals),
        retain=retain,
        factorization=factorization,
        gated=gated,
        dtype=dtype,
    )
    hidden, inter = residuals[0][1].shape
    factored = FactoredExperts(
        num_experts=len(residuals),
        hidden_size=hidden,
        intermediate_size=inter,
        gated=gated,
        factorization=factorization,
        **tensors,
    )
    factored.check_values()
    return factored


def squared_error(factored, residuals):
    dense = factored.materialize(torch.float64)
    return sum(
        float((d[e].double() - r.double()).square().sum())
        for e, pair in enumerate(residuals)
        for d, r in zip((dense.gate_up, dense.down), pair, strict=True)
    )


def tail(matrix, rank):
    """What the best approximation of a rank leaves of a matrix, squared."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


def parameters(factored):
    return sum(t.numel() for name, t in factored.tensors().items() if not name.startswith("rank_offsets"))


# ---- the budget


def test_blocks_are_bought_by_energy_per_parameter():
    rows = [torch.tensor([8.0, 2.0]), torch.tensor([12.0, 1.0])]
    assert buy_blocks(rows, [1, 2], 1) == [1, 0]  # 8 a piece against 6
    assert buy_blocks(rows, [1, 2], 3) == [1, 1]
    assert buy_blocks(rows, [1, 2], 4) == [2, 1]
    assert buy_blocks(rows, [1, 2], 2) == [2, 0]  # the dearer one does not fit, the next that fits is taken
    assert buy_blocks(rows, [1, 2], math.inf) == [2, 2]
    assert buy_blocks(rows, [5, 5], 4) == [0, 0]


def test_blocks_of_zeros_are_never_bought():
    assert buy_blocks([torch.tensor([1.0, 0.0, 0.0])], [1], math.inf) == [1]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("retain", [0.1, 0.25, 0.5, 0.9])
def test_the_budget_is_kept_and_used(retain, factorization, gated):
    residuals = make_residuals(gated=gated)
    factored = factor(residuals, retain, factorization, gated)
    whole = sum(r.numel() for pair in residuals for r in pair)
    hidden, inter = residuals[0][1].shape
    sides = {"stacked": 2 * inter + hidden, "separate": 2 * (inter + hidden), "joint": inter + 3 * hidden}
    dearest = 16 * sides[factorization]
    assert parameters(factored) <= retain * whole
    offered_all = all(r >= 2 * 0.9 * 48 for m in MATRICES for r in factored.ranks(m))
    assert parameters(factored) > retain * whole - dearest or offered_all
    step = 32 if factorization == "separate" and gated else 16
    assert all(r % step == 0 for r in factored.ranks("gate_up"))
    assert all(r % 16 == 0 for r in factored.ranks("down"))


def test_experts_with_more_energy_get_more_rank():
    large, small = make_residuals(1)[0], tuple(0.1 * r for r in make_residuals(1, seed=1)[0])
    factored = factor([large, small], 0.25)
    assert factored.ranks("gate_up")[0] > factored.ranks("gate_up")[1]
    assert factored.ranks("down")[0] > factored.ranks("down")[1]


def test_no_expert_is_offered_more_than_twice_the_even_rank():
    loud, *others = make_residuals(8, hidden=96, inter=96)
    factored = factor([tuple(100 * r for r in loud), *others], 0.25)
    even = 0.25 * 192 * 96 / (192 + 96)  # 16 for gate_up
    assert factored.ranks("gate_up")[0] == 2 * even
    assert factored.ranks("down")[0] == 32  # twice 12, rounded up to a block


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_the_greedy_choice_beats_an_even_split(factorization):
    residuals = make_residuals(4, hidden=96, inter=96)
    factored = factor(residuals, 0.5, factorization)
    even_parameters, even_error = 0, 0.0
    for gate_up, down in residuals:
        gate, up = gate_up.chunk(2)
        pieces = {
            "stacked": [gate_up, down],
            "separate": [gate, up, down],
            "joint": [torch.cat([gate, up, down.T], 1)],
        }[factorization]
        for piece in pieces:
            rank = int(0.5 * piece.numel() / sum(piece.shape)) // 16 * 16
            even_parameters += rank * sum(piece.shape)
            even_error += tail(piece, rank)
    assert parameters(factored) <= 0.5 * sum(r.numel() for pair in residuals for r in pair)
    assert even_parameters <= 0.5 * sum(r.numel() for pair in residuals for r in pair)
    assert squared_error(factored, residuals) < even_error


def test_a_budget_below_one_block_leaves_rank_zero_everywhere():
    factored = factor(make_residuals(2), 0.01)
    assert factored.ranks("gate_up") == factored.ranks("down") == [0, 0]
    assert factored.u_gate_up.shape == (0, 128) and factored.v_down.shape == (0, 64)


# ---- what is stored


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize(("hidden", "inter"), [(48, 64), (20, 24), (40, 12), (1, 1)])
def test_retain_one_is_exact_at_any_size(factorization, gated, hidden, inter):
    residuals = make_residuals(2, hidden, inter, gated)
    factored = factor(residuals, 1.0, factorization, gated)
    whole = sum(float(r.square().sum()) for pair in residuals for r in pair)
    assert squared_error(factored, residuals) < 1e-12 * whole


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_the_error_is_what_the_ranks_leave_of_the_spectra(factorization, gated):
    residuals = make_residuals(gated=gated)
    factored = factor(residuals, 0.25, factorization, gated)
    expected = 0.0
    for e, (gate_up, down) in enumerate(residuals):
        halves = gate_up.chunk(2 if gated else 1)
        rank = factored.ranks("gate_up")[e]
        if factorization == "joint":
            expected += tail(torch.cat([*halves, down.T], 1), rank)
            continue
        pieces = halves if factorization == "separate" else (gate_up,)
        expected += sum(tail(piece, rank // len(pieces)) for piece in pieces)
        expected += tail(down, factored.ranks("down")[e])
    assert squared_error(factored, residuals) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_factors_come_in_the_requested_dtype_contiguous(factorization):
    tensors = factor(make_residuals(), 0.25, factorization, dtype=torch.bfloat16).tensors()
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.int32 if "offsets" in name else torch.bfloat16), name
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_residuals_are_asked_for_once_and_in_order():
    residuals, asked = make_residuals(), []

    def residual(e):
        asked.append(e)
        return residuals[e]

    low_rank(residual, 3, retain=0.25)
    assert asked == [0, 1, 2]
