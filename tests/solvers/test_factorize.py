"""Low-rank residuals: the truncated SVD against numpy's, the budget, and what each factorisation stores."""

import pytest
import torch

import resmoe_kernels.python_ops.solvers.factorize as factorize
from resmoe_kernels.factored import FACTORIZATIONS, MATRICES, FactoredExperts
from resmoe_kernels.python_ops.solvers.factorize import low_rank, low_rank_at, low_rank_curves


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


def test_residuals_are_asked_for_in_order_and_again_only_where_all_on_offer_was_bought():
    residuals, asked = make_residuals(hidden=192, inter=256), []
    residuals[1] = tuple(0.001 * m for m in residuals[1])
    residuals[2] = tuple(100 * m for m in residuals[2])

    def residual(e):
        asked.append(e)
        return residuals[e]

    low_rank(residual, 3, retain=0.25)
    assert asked[:3] == [0, 1, 2]
    assert 2 in asked[3:] and 1 not in asked[3:]
    assert asked[3:] == sorted(set(asked[3:]))


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("retain", [0.1, 0.25, 0.5, 0.9, 1])
def test_offering_ranks_in_two_steps_changes_nothing(monkeypatch, factorization, retain):
    residuals = make_residuals(hidden=96, inter=128)
    residuals[2] = tuple(10 * m for m in residuals[2])
    found = low_rank(residuals.__getitem__, 3, retain=retain, factorization=factorization)
    monkeypatch.setattr(factorize, "OFFERS", (2,))
    expected = low_rank(residuals.__getitem__, 3, retain=retain, factorization=factorization)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


# ---- at given ranks, and what ranks would save


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_at_the_ranks_it_chooses_low_rank_is_the_same(factorization, gated):
    residuals = make_residuals(gated=gated)
    chosen = factor(residuals, 0.4, factorization, gated)
    pieces = {"gate_up": 2 if factorization == "separate" and gated else 1, "down": 1}
    ranks = {m: [r // pieces[m] for r in chosen.ranks(m)] for m in MATRICES}
    if factorization == "joint":
        del ranks["down"]
    made = low_rank_at(residuals.__getitem__, ranks, factorization=factorization, gated=gated)
    expected = {n: t for n, t in chosen.tensors().items() if n in made}
    assert made.keys() == expected.keys() and all(torch.equal(made[n], t) for n, t in expected.items())


def test_ranks_may_be_zero_or_beyond_full():
    residuals = make_residuals(2)
    made = low_rank_at(residuals.__getitem__, {"gate_up": [0, 64], "down": [16, 0]})
    assert made["rank_offsets_gate_up"].tolist() == [0, 0, 64] and made["rank_offsets_down"].tolist() == [0, 16, 16]
    torch.testing.assert_close(made["u_gate_up"].T @ made["v_gate_up"], residuals[1][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("retain", [0.1, 0.4, 1.0])
def test_curves_have_the_budget_of_low_rank_and_its_energies(retain, factorization, gated):
    residuals = make_residuals(gated=gated)
    curves = low_rank_curves(residuals.__getitem__, 3, retain=retain, factorization=factorization, gated=gated, width=2)
    factored = factor(residuals, retain, factorization, gated)
    assert curves.budget == parameters(factored)
    whole = sum(float(r.double().square().sum()) for pair in residuals for r in pair)
    assert sum(float(g.sum()) for g in curves.gains.values()) == pytest.approx(whole, rel=1e-9)
    for matrix, gains in curves.gains.items():
        blocks = 4 if factorization == "joint" else 3  # I is 64, H 48
        assert gains.shape == (3, blocks) and bool((gains.diff(dim=1) <= 0).all())
        assert curves.sizes[matrix] == blocks * curves.prices[matrix]
        if factorization == "stacked":
            which = MATRICES.index(matrix)
            for e, pair in enumerate(residuals):
                squares = torch.linalg.svdvals(pair[which].double()).square()
                torch.testing.assert_close(gains[e], squares.view(3, 16).sum(1), rtol=1e-6, atol=1e-6)


def test_the_budget_is_what_low_rank_spends_where_it_offers_too_little():
    """Of experts all but one of which are zero it offers the one no more than twice an even share."""
    (loud,) = make_residuals(1, hidden=96, inter=96)
    residuals = [loud, *[tuple(torch.zeros_like(r) for r in loud)] * 7]
    how = {"retain": 0.25, "factorization": "stacked", "gated": True}
    curves = low_rank_curves(residuals.__getitem__, 8, width=2, **how)
    assert curves.budget == parameters(factor(residuals, 0.25)) == 32 * (192 + 96 + 96 + 96)
    assert curves.gains["gate_up"].shape == (8, 6)


def test_a_residual_of_low_rank_has_nothing_more_to_save():
    thin = torch.randn(96, 8) @ torch.randn(8, 48), torch.zeros(48, 48)
    curves = low_rank_curves(lambda e: thin, 1, retain=1, factorization="stacked", gated=True, width=2)
    assert curves.gains["gate_up"][0, 0] > 0 and not curves.gains["gate_up"][0, 1:].any()
    assert not curves.gains["down"].any()
