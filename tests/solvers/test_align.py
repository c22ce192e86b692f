"""Alignment: the barycenter against POT's and against planted orders, and that order never matters to an expert."""

import itertools
import re
import subprocess
import sys

import pytest
import torch

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.solvers import align, assignment
from resmoe_kernels.python_ops.solvers.align import INITS, barycenter, design_matrix, mean_cosine, split_design

ot = pytest.importorskip("ot", reason="needs pot: pip install 'resmoe_kernels[compress]'")


def make_experts(count=4, hidden=6, inter=8, gated=True, bias=False, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = 2 * inter if gated else inter
    biases = (randn(count, rows), randn(count, hidden)) if bias else (None, None)
    return DenseExperts(randn(count, rows, hidden), randn(count, hidden, inter), *biases, gated=gated)


def planted(noise, gated=True, bias=False, count=4, inter=16, hidden=6):
    """Permuted copies of one expert plus noise, and the orders that put the neurons back."""
    one = make_experts(1, hidden, inter, gated, bias)
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(inter, generator=generator) for _ in range(count)])
    designs = []
    for order in orders:
        design = design_matrix(one, 0)[order]
        designs.append(design + noise * torch.randn(design.shape, generator=generator))
    return from_designs(designs, one), orders


def from_designs(designs, like):
    gate_up, down, bias = zip(*[split_design(d, like) for d in designs], strict=True)
    biases = (None, None)
    if like.bias_gate_up is not None:
        biases = torch.stack(bias), like.bias_down.expand(len(designs), -1)
    return DenseExperts(torch.stack(gate_up), torch.stack(down), *biases, gated=like.gated)


def expert_function(gate_up, down, bias_gate_up, bias_down, gated, x):
    """One expert in float64, written out."""
    z = x @ gate_up.double().T
    if bias_gate_up is not None:
        z = z + bias_gate_up.double()
    inter = down.shape[1]
    h = z[:, :inter] / (1 + torch.exp(-z[:, :inter]))
    if gated:
        h = h * z[:, inter:]
    y = h @ down.double().T
    return y if bias_down is None else y + bias_down.double()


FORMS = list(itertools.product([True, False], [True, False]))  # gated, bias


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_design_matrix_rows_are_neurons(gated, bias):
    experts = make_experts(gated=gated, bias=bias)
    design, inter = design_matrix(experts, 2), experts.intermediate_size
    rows = [5, inter + 5] if gated else [5]
    expected = [*experts.gate_up[2, rows], experts.down[2, :, 5]]
    if bias:
        expected.append(experts.bias_gate_up[2, rows])
    assert torch.equal(design[5], torch.cat(expected))


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_split_design_inverts_design_matrix(gated, bias):
    experts = make_experts(gated=gated, bias=bias, dtype=torch.bfloat16)
    design = design_matrix(experts, 1)
    assert design.dtype == torch.float32
    gate_up, down, bias_gate_up = split_design(design, experts)
    assert torch.equal(gate_up, experts.gate_up[1].float())
    assert torch.equal(down, experts.down[1].float())
    assert (bias_gate_up is None) == (not bias)
    if bias:
        assert torch.equal(bias_gate_up, experts.bias_gate_up[1].float())


def test_design_matrix_of_parameters_that_require_gradients():
    experts = make_experts()
    experts.gate_up.requires_grad_(), experts.down.requires_grad_()
    assert torch.equal(design_matrix(experts, 1).detach(), design_matrix(make_experts(), 1))


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_permuting_neurons_leaves_the_function_unchanged(gated, bias):
    experts = make_experts(gated=gated, bias=bias)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    gate_up, down, bias_gate_up = split_design(design_matrix(experts, 1)[order], experts)
    bias_down = experts.bias_down[1] if bias else None
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    before = experts.bias_gate_up[1] if bias else None
    expected = expert_function(experts.gate_up[1], experts.down[1], before, bias_down, gated, x)
    got = expert_function(gate_up, down, bias_gate_up, bias_down, gated, x)
    assert not torch.equal(gate_up, experts.gate_up[1])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_planted_permutations_are_recovered(gated, bias):
    experts, orders = planted(0.01, gated, bias)
    result = barycenter(experts)
    assert result.converged
    # Up to one common order, which is expert 0's: the start takes it as it is.
    undo = orders.argsort(1)
    assert torch.equal(result.permutations, undo[:, orders[0]])


@pytest.mark.parametrize("init", INITS)
def test_center_is_the_mean_and_the_objective_its_spread(init):
    experts = make_experts(5)
    result = barycenter(experts, init=init)
    designs = torch.stack([design_matrix(experts, e)[p] for e, p in enumerate(result.permutations)]).double()
    torch.testing.assert_close(result.center.double(), designs.mean(0), rtol=0, atol=1e-6)
    spread = (designs - designs.mean(0)).square().sum((1, 2)).mean()
    assert result.objective == pytest.approx(float(spread), rel=1e-6)
    assert result.permutations.dtype == torch.int64
    assert torch.equal(result.permutations.sort(1).values, torch.arange(8).repeat(5, 1))


@pytest.mark.parametrize("init", INITS)
def test_the_objective_never_rises(init):
    experts = make_experts(6, 2, 48, seed=6)
    sweeps = barycenter(experts, init=init, tolerance=0).iterations
    assert sweeps >= 4  # else this shows nothing
    cut = [barycenter(experts, init=init, max_iter=n, tolerance=0) for n in range(1, sweeps + 1)]
    objectives = [c.objective for c in cut]
    assert all(later <= earlier for earlier, later in itertools.pairwise(objectives))
    assert objectives[-1] < objectives[0]
    assert [(c.iterations, c.converged) for c in cut] == [(n, n == sweeps) for n in range(1, sweeps + 1)]


@pytest.mark.parametrize("init", INITS)
def test_no_order_of_one_expert_is_better(init):
    for seed in range(4):
        experts = make_experts(4, 2, 5, seed=seed)
        result = barycenter(experts, init=init, tolerance=0)
        aligned = torch.stack([design_matrix(experts, e)[p] for e, p in enumerate(result.permutations)]).double()
        found = float(aligned.sum(0).square().sum())
        for e, order in itertools.product(range(4), itertools.permutations(range(5))):
            others = aligned.sum(0) - aligned[e]
            assert float((others + aligned[e][list(order)]).square().sum()) <= found * (1 + 1e-6)


def test_a_sweep_that_gains_too_little_is_the_last():
    experts = make_experts(6, 2, 48, seed=6)
    objectives = [barycenter(experts, init="mean", max_iter=n, tolerance=0).objective for n in range(1, 6)]
    gains = [(earlier - later) / earlier for earlier, later in itertools.pairwise(objectives)]
    assert gains[0] > 1.5 * gains[1] > 0
    for tolerance, sweeps in ((gains[0] * 0.9, 3), (gains[0] * 1.1, 2)):
        result = barycenter(experts, init="mean", tolerance=tolerance)
        assert (result.iterations, result.converged) == (sweeps, True)
        assert result.objective == objectives[sweeps - 1]


def test_planted_orders_that_the_papers_alternation_misses():
    experts, orders = planted(2.2, count=8, inter=48, hidden=64)  # cosine 0.17
    ours, paper = (barycenter(experts, solver=solver, tolerance=0) for solver in ("assignment", "pot"))
    ours_at, paper_at = (orders.gather(1, found.permutations) for found in (ours, paper))  # the planted neuron's number
    assert bool((ours_at == ours_at[0]).all())
    assert float((paper_at == paper_at.mode(0).values).float().mean()) < 0.8
    assert ours.objective < 0.95 * paper.objective


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("gated", [True, False])
def test_at_least_as_good_as_pot(init, gated):
    for seed in range(7, 10):
        experts = make_experts(5, 8, 24, gated, bias=gated, seed=seed)
        ours = barycenter(experts, init=init)
        pot = barycenter(experts, init=init, solver="pot")
        assert ours.objective < pot.objective
        assert ours.converged and pot.converged


def test_pot_finds_nothing_better_from_our_minimum():
    experts = make_experts(5, 8, 24, seed=7)
    ours = barycenter(experts, tolerance=0)
    designs, uniform = (
        [design_matrix(experts, e).double().numpy() for e in range(5)],
        [torch.full((24,), 1 / 24).numpy()],
    )
    atoms = ot.lp.free_support_barycenter(designs, uniform * 5, ours.center.double().numpy())
    torch.testing.assert_close(torch.from_numpy(atoms), ours.center.double(), rtol=0, atol=1e-6)


def test_pot_stops_at_max_iter():
    result = barycenter(make_experts(6, 2, 48, seed=6), solver="pot", max_iter=1)
    assert (result.iterations, result.converged) == (1, False)


def test_init_mean_starts_in_the_experts_own_order():
    own = from_designs([design_matrix(planted(0.1)[0], 0)] * 3, make_experts(1, 6, 16))
    said = {init: [] for init in INITS}
    for init in INITS:
        barycenter(own, init=init, progress=said[init].append)
    # Two assignments to start with; then all but the last expert, which the start has placed, keep their order.
    assert [len(said[init]) for init in INITS] == [4, 3]
    experts = make_experts(4, 8, 24, seed=8)
    progressive, mean = (barycenter(experts, init=init, max_iter=1) for init in INITS)
    assert not torch.equal(progressive.permutations, mean.permutations)


def test_a_sweep_that_raises_the_objective_is_undone(monkeypatch):
    experts = planted(0.1)[0]
    best = barycenter(experts)
    aligned = from_designs([design_matrix(experts, e)[p] for e, p in enumerate(best.permutations)], experts)
    shifts = itertools.count()
    monkeypatch.setattr(align, "assign", lambda target, design, current, half: current.roll(next(shifts)))
    result = barycenter(aligned, init="mean")
    assert (result.iterations, result.converged) == (1, True)
    assert torch.equal(result.permutations, torch.arange(16).repeat(4, 1))
    assert result.objective == pytest.approx(best.objective, rel=1e-6)


def test_the_same_every_time():
    experts = make_experts(6, 2, 48, seed=6)
    once, again = barycenter(experts), barycenter(experts)
    assert torch.equal(once.permutations, again.permutations) and torch.equal(once.center, again.center)
    assert once.objective == again.objective


@pytest.mark.parametrize("solver", ["assignment", "pot"])
def test_one_expert_is_its_own_barycenter(solver):
    experts = make_experts(1)
    result = barycenter(experts, solver=solver)
    assert result.converged and result.objective == 0
    assert torch.equal(result.center, design_matrix(experts, 0))


@pytest.mark.parametrize("solver", ["assignment", "pot"])
def test_one_neuron(solver):
    experts = make_experts(3, inter=1)
    result = barycenter(experts, solver=solver)
    assert result.permutations.tolist() == [[0], [0], [0]] and result.converged


@pytest.mark.parametrize("init", INITS)
def test_equal_experts_end_at_once(init):
    one = make_experts(1)
    experts = DenseExperts(one.gate_up.expand(3, -1, -1), one.down.expand(3, -1, -1))
    result = barycenter(experts, init=init, tolerance=0)
    assert (result.iterations, result.converged) == (1, True)
    assert result.objective < 1e-12
    assert torch.equal(result.permutations, torch.arange(8).repeat(3, 1))


@pytest.mark.parametrize("init", INITS)
def test_zeros_keep_their_order(init):
    experts = make_experts(3)
    experts.gate_up.zero_(), experts.down.zero_()
    result = barycenter(experts, init=init, tolerance=0)
    assert (result.iterations, result.converged, result.objective) == (1, True, 0)
    assert torch.equal(result.permutations, torch.arange(8).repeat(3, 1))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["dead", "twins"])
def test_neurons_that_are_alike_do_not_alternate_for_ever(init, kind):
    experts = make_experts(4, 6, 16)
    for tensor in (experts.gate_up[:, :16], experts.gate_up[:, 16:], experts.down.mT):
        tensor[:, 8:] = 0 if kind == "dead" else tensor[:, :8].clone()
    result = barycenter(experts, init=init, tolerance=0)
    assert result.converged and result.iterations < 20
    assert torch.equal(result.permutations.sort(1).values, torch.arange(16).repeat(4, 1))


def test_bfloat16_experts_give_a_float32_center():
    result = barycenter(make_experts(dtype=torch.bfloat16))
    assert result.center.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_mean_cosine_is_that_over_all_pairs(bias):
    experts = make_experts(5, bias=bias)
    aligned = barycenter(experts).permutations
    for orders in (None, aligned):
        designs = [design_matrix(experts, e).double() for e in range(5)]
        flat = [(d if orders is None else d[orders[e]]).flatten() for e, d in enumerate(designs)]
        pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(flat, 2)]
        assert mean_cosine(experts, orders) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_cosine(experts, aligned) > mean_cosine(experts) + 0.1


def test_mean_cosine_of_degenerate_layers():
    assert mean_cosine(make_experts(1)) == 1.0
    experts = make_experts(2)
    twins = DenseExperts(experts.gate_up[[0, 0, 0]].clone(), experts.down[[0, 0, 0]].clone())
    assert mean_cosine(twins) == pytest.approx(1, abs=1e-6)
    twins.gate_up[2], twins.down[2] = 0, 0
    assert mean_cosine(twins) == pytest.approx(1 / 3, abs=1e-6)  # one parallel pair of three


def test_progress_is_told_every_assignment():
    said: list[str] = []
    barycenter(make_experts(3), max_iter=1, progress=said.append)
    assert said[:3] == ["align: start, expert 2 of 3", "align: start, expert 3 of 3", "align: sweep 1, expert 1 of 3"]
    said.clear()
    barycenter(make_experts(3), solver="pot", progress=said.append)
    assert len(said) == 1 and said[0].startswith("align: POT, ")


def test_unknown_arguments_are_refused_with_what_is_known():
    experts = make_experts()
    with pytest.raises(ValueError, match=r"^init: must be one of progressive, mean, got 'last'$"):
        barycenter(experts, init="last")
    with pytest.raises(ValueError, match=r"^solver: must be one of assignment, pot, got 'emd'$"):
        barycenter(experts, solver="emd")
    with pytest.raises(ValueError, match=r"^max_iter: must be at least 1, got 0$"):
        barycenter(experts, max_iter=0)
    for tolerance in (-0.1, 1, float("nan")):
        with pytest.raises(
            ValueError, match=rf"^tolerance: must be in \[0, 1\), got {tolerance}; 0 stops only in a min"
        ):
            barycenter(experts, tolerance=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    experts = make_experts()
    experts.down[2, 1, 3] = value
    with pytest.raises(
        ValueError, match=r"^experts: must be finite, expert 2 has an inf or a nan; check the checkpoint$"
    ):
        barycenter(experts)


MISSING = [("pot", "ot", "POT"), ("assignment", "scipy.optimize", "scipy")]


@pytest.mark.parametrize(("solver", "module", "package"), MISSING)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, solver, module, package):
    def not_installed(name):
        assert name == module
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(assignment, "_is_built", lambda: False)
    monkeypatch.setattr("importlib.import_module", not_installed)
    rule = f'{package}: alignment needs it, it is not installed; run: pip install "resmoe_kernels[compress]"'
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        barycenter(make_experts(), solver=solver)


def test_importing_this_module_imports_neither_package():
    code = "import sys, resmoe_kernels.python_ops.solvers.align; assert not {'ot', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
