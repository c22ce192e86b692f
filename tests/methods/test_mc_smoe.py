"""MC-SMoE: nothing lost where nothing is merged, groups where usage says, experts merged neuron by neuron."""

import dataclasses
import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import resmoe_kernels as rk
from resmoe_kernels.factored import MATRICES, DenseExperts
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics
from resmoe_kernels.python_ops.methods.mc_smoe import check_settings, mc_smoe, plan
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.solvers.merge import dominant_experts, grouping, similarities
from resmoe_kernels.python_ops.solvers.prune import bitmap, block, column_scale, keep_entries, keep_rows
from resmoe_kernels.sparse import expand_sparse_reference, unpack_mask
from tests.families import build, logits

FORMS = list(itertools.product([True, False], [True, False]))  # gated, bias
STAGES = {
    "merge": {"stage": "merge"},
    "compress": {"stage": "compress"},
    "compress-bitmap": {"stage": "compress", "sparse_layout": "bitmap"},
    "compress-rows": {"stage": "compress", "sparse_layout": "rows"},
    "hybrid": {"stage": "hybrid"},
    "hybrid-bitmap": {"stage": "hybrid", "sparse_layout": "bitmap"},
}


def make_experts(count=6, hidden=40, inter=48, ancestors=2, gated=True, bias=False, seed=0, noise=0.3, shuffle=True):
    """Expert e has learnt something of its own on top of ancestor e % ancestors, in a neuron order of its own."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    halves = 2 if gated else 1
    stems = [(randn(halves, inter, hidden), randn(hidden, inter)) for _ in range(ancestors)]
    gate_up, down = [], []
    for e in range(count):
        order = torch.randperm(inter, generator=generator) if shuffle else torch.arange(inter)
        gate_up.append((stems[e % ancestors][0] + noise * randn(halves, inter, hidden))[:, order].flatten(0, 1))
        down.append((stems[e % ancestors][1] + noise * randn(hidden, inter))[:, order])
    biases = [randn(count, halves * inter), randn(count, hidden)] if bias else []
    return DenseExperts(torch.stack(gate_up), torch.stack(down), *biases, gated=gated)


def hidden_of(experts, e, x):
    """An expert's hidden activations in float64, written out: (T, I)."""
    z = x.double() @ experts.gate_up[e].double().T
    if experts.bias_gate_up is not None:
        z = z + experts.bias_gate_up[e].double()
    h = z[:, : experts.intermediate_size]
    h = h / (1 + torch.exp(-h))
    return h * z[:, experts.intermediate_size :] if experts.gated else h


def output_of(experts, e, x):
    y = hidden_of(experts, e, x) @ experts.down[e].double().T
    return y if experts.bias_down is None else y + experts.bias_down[e].double()


def make_statistics(experts, ancestors=2, tokens=200, top_k=2, seed=1, never=()):
    """Of a router to which experts of one ancestor are alike, and which likes some better than others."""
    generator = torch.Generator().manual_seed(seed)
    count, hidden = experts.num_experts, experts.hidden_size
    x = torch.randn(tokens, hidden, generator=generator) * torch.linspace(0.2, 2, hidden)
    stems = torch.randn(ancestors, hidden, generator=generator)
    rows = torch.stack([stems[e % ancestors] for e in range(count)]) + 0.4 * torch.randn(
        count, hidden, generator=generator
    )
    logits = x @ rows.T / hidden**0.5 - 0.2 * torch.randperm(count, generator=generator)
    for e in never:
        logits[:, e] = -30.0
    probability = logits.softmax(-1)
    weight, index = probability.topk(top_k)
    of = [(index == e).any(1) for e in range(count)]
    down = torch.stack([hidden_of(experts, e, x[of[e]]).square().sum(0) for e in range(count)]).float()
    output = torch.stack([output_of(experts, e, x[of[e]]).sum(0) for e in range(count)]).float()
    return LayerStatistics(
        count=torch.tensor([int(o.sum()) for o in of]),
        weight=torch.tensor([float(weight[index == e].double().sum()) for e in range(count)], dtype=torch.float64),
        probability=probability.double().sum(0),
        logit_gram=logits.double().T @ logits.double(),
        moment_gate_up=x.square().sum(0),
        moment_down=down,
        output=output,
        weighted_norm=torch.ones(count, dtype=torch.float64),
        sample_x=x,
        sample_logits=logits,
        sample_index=index,
        sample_weight=weight,
        tokens=tokens,
    )


def reordered(experts, statistics, order):
    """The same layer with its experts in another order."""
    moved = {f: getattr(experts, f) for f in ("gate_up", "down", "bias_gate_up", "bias_down")}
    moved = {f: None if t is None else t[order] for f, t in moved.items()}
    back = order.argsort()
    changed = {f: getattr(statistics, f)[order] for f in ("count", "weight", "probability", "moment_down", "output")}
    changed["logit_gram"] = statistics.logit_gram[order][:, order]
    changed["sample_index"] = back[statistics.sample_index]
    return DenseExperts(**moved, gated=experts.gated), dataclasses.replace(statistics, **changed)


def layer_of(result):
    layer = FactoredExpertsLayer(result.weights, "silu")
    if result.change is not None:
        layer.change_routing(result.change)
    return layer


def functions(result, count, x):
    """What every slot of the router now computes: (E, T, H)."""
    layer, one = layer_of(result), torch.ones(len(x), 1)
    return torch.stack([layer(x, torch.full((len(x), 1), e), one) for e in range(count)])


def some_x(experts, tokens=7):
    return torch.randn(tokens, experts.hidden_size, generator=torch.Generator().manual_seed(5))


def error_of(experts, result):
    x = some_x(experts, 64)
    expected = torch.stack([output_of(experts, e, x) for e in range(experts.num_experts)])
    got = functions(result, experts.num_experts, x).double()
    return float((got - expected).norm() / expected.norm())


# ---- nothing lost


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_as_many_groups_as_experts_is_the_dense_layer(gated, bias):
    experts = make_experts(gated=gated, bias=bias)
    result = mc_smoe(experts, stage="merge", groups=6, statistics=make_statistics(experts))
    assert result.change is None and result.report.relative_error == result.report.merge_error == 0
    dense = result.weights.materialize()
    assert torch.equal(dense.gate_up, experts.gate_up) and torch.equal(dense.down, experts.down)
    if bias:
        assert torch.equal(dense.bias_gate_up, experts.bias_gate_up) and torch.equal(dense.bias_down, experts.bias_down)


@pytest.mark.parametrize(("gated", "bias"), FORMS)
@pytest.mark.parametrize("how", [{"retain": 1.0, "density": 0}, {"retain": 0, "density": 1.0}], ids=["rank", "sparse"])
def test_a_hybrid_that_keeps_every_residual_is_the_dense_layer(how, gated, bias):
    experts = make_experts(gated=gated, bias=bias)
    statistics = make_statistics(experts)
    for groups in (1, 2, 5):
        result = mc_smoe(experts, stage="hybrid", groups=groups, sparse_layout="bitmap", statistics=statistics, **how)
        result.weights.check_values()
        assert result.change is None
        assert error_of(experts, result) < 1e-5


@pytest.mark.parametrize("hidden,inter", [(33, 17), (8, 40), (1, 3)])
@pytest.mark.parametrize("kind", STAGES)
def test_odd_sizes_make_layers_that_run(kind, hidden, inter):
    experts = make_experts(5, hidden, inter, bias=True)
    result = mc_smoe(experts, groups=2, density=0.5, statistics=make_statistics(experts), **STAGES[kind])
    result.weights.check_values()
    assert functions(result, 5, some_x(experts)).isfinite().all()


def test_one_expert_alone():
    experts = make_experts(1, ancestors=1)
    result = mc_smoe(experts, stage="merge", statistics=make_statistics(experts, ancestors=1, top_k=1))
    assert torch.equal(result.weights.base_gate_up, experts.gate_up)


# ---- merging


def test_merged_experts_are_the_weighted_mean_of_their_members():
    experts = make_experts(bias=True, shuffle=False)
    statistics = make_statistics(experts)
    result = mc_smoe(experts, stage="merge", groups=2, align=False, statistics=statistics)
    assert result.change.fold and sorted(set(result.change.expert_of_slot)) == [0, 1]
    for g in range(2):
        members = [e for e, own in enumerate(result.change.expert_of_slot) if own == g]
        share = statistics.count[members].double() / statistics.count[members].sum()
        for name, now in (("gate_up", "base_gate_up"), ("down", "base_down"), *[(f"bias_{m}",) * 2 for m in MATRICES]):
            expected = sum(s * getattr(experts, name)[e].double() for s, e in zip(share, members, strict=True))
            torch.testing.assert_close(getattr(result.weights, now)[g].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_experts_that_differ_in_the_order_of_neurons_only_merge_without_loss(gated, bias):
    experts = make_experts(gated=gated, noise=0, ancestors=1)
    if bias:  # of the ancestor, moved with its neurons
        first = experts.gate_up[0]
        rows = [(first == g.unsqueeze(1)).all(2).int().argmax(1) for g in experts.gate_up]
        own = torch.linspace(-1, 1, len(first))
        bias_gate_up = torch.stack([own[r] for r in rows])
        bias_down = torch.ones(6, experts.hidden_size)
        experts = DenseExperts(experts.gate_up, experts.down, bias_gate_up, bias_down, gated)
    statistics = make_statistics(experts)
    result = mc_smoe(experts, stage="merge", groups=1, statistics=statistics)
    assert result.report.relative_error < 1e-6 and error_of(experts, result) < 1e-5
    assert error_of(experts, mc_smoe(experts, stage="merge", groups=1, align=False, statistics=statistics)) > 0.3


def test_alignment_lowers_the_error_of_shuffled_experts():
    experts = make_experts()
    statistics = make_statistics(experts)
    on, off = (mc_smoe(experts, stage="merge", groups=2, align=a, statistics=statistics) for a in (True, False))
    assert on.report.relative_error < 0.5 * off.report.relative_error
    assert error_of(experts, on) < 0.7 * error_of(experts, off)


@pytest.mark.parametrize("similarity", ["router-logits", "weights", "outputs"])
def test_experts_of_one_ancestor_find_each_other(similarity):
    experts = make_experts()
    found = grouping(experts, make_statistics(experts), [2, 3], similarity=similarity)
    assert found.group == [0, 1, 0, 1, 0, 1]


def test_similarities_are_cosines():
    experts = make_experts(shuffle=False)
    statistics = make_statistics(experts)
    logits, output = statistics.sample_logits.double(), statistics.output.double()
    flat = torch.cat([experts.gate_up.flatten(1), experts.down.flatten(1)], 1).double()
    for name, columns in (("router-logits", logits.T), ("outputs", output), ("weights", flat)):
        expected = torch.cosine_similarity(columns.unsqueeze(1), columns[[1, 4]].unsqueeze(0), dim=2)
        got = similarities(experts, statistics, [1, 4], name, align=False)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ---- dominant experts


def usage(*counts, probability=None):
    count = torch.tensor(counts)
    probability = torch.tensor(probability, dtype=torch.float64) if probability else torch.ones(len(counts))
    return SimpleNamespace(count=count, probability=probability)


def test_the_budget_goes_over_all_layers_to_the_most_used_beside_their_best():
    layers = [usage(100, 90, 80, 1), usage(10, 1, 1, 1), usage(5, 2, 4, 3)]
    assert dominant_experts(layers, 3) == [[0], [0], [0]]
    assert dominant_experts(layers, 6) == [[0, 1, 2], [0], [0, 2]]
    assert dominant_experts(layers, 8) == [[0, 1, 2], [0], [0, 1, 2, 3]]
    assert dominant_experts(layers, 12) == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("total", range(2, 9))
def test_ties_meet_the_budget_exactly_and_leave_every_layer_one(total):
    found = dominant_experts([usage(7, 7, 7, 7), usage(3, 3, 3, 3)], total)
    assert sum(map(len, found)) == total and all(found)


def test_ties_of_usage_are_told_apart_by_probability():
    assert dominant_experts([usage(4, 4, 4, probability=[1.0, 3.0, 2.0])], 2) == [[1, 2]]


def test_a_layer_that_met_no_token_still_has_a_group():
    assert dominant_experts([usage(0, 0), usage(5, 4)], 3) == [[0], [0, 1]]


def test_plan_shares_the_budget_or_gives_every_layer_as_much():
    counts = {"a": (100, 90, 80, 70), "b": (100, 1, 1, 1)}
    layers = {path: SimpleNamespace(num_experts=4, **vars(usage(*c))) for path, c in counts.items()}
    model = SimpleNamespace(experts=[SimpleNamespace(path=p) for p in ("b", "unchosen", "a")])
    statistics = SimpleNamespace(layers=layers)
    given = {"statistics": statistics, "progress": False}
    assert plan(model, [0, 2], groups=2, **given) == [{"dominants": [0]}, {"dominants": [0, 1, 2]}]
    assert plan(model, [0, 2], groups=2, budget="uniform", **given) == [{"dominants": [0, 1]}] * 2
    assert plan(model, [2], **given) == [{"dominants": [0]}]  # a quarter of 4
    assert json.loads(json.dumps(plan(model, [0], groups=3, **given)))
    with pytest.raises(ValueError, match=r"^groups: must be at most the 4 experts of a layer, got 5$"):
        plan(model, [0, 2], groups=5, **given)
    with pytest.raises(ValueError, match=r"^mc-smoe: needs calibration statistics, got none; give calibration text$"):
        plan(model, [0, 2], groups=2, statistics=None, progress=False)


def test_a_plan_decides_over_groups():
    experts = make_experts()
    result = mc_smoe(
        experts, stage="merge", groups=1, plan={"dominants": [1, 2, 5]}, statistics=make_statistics(experts)
    )
    assert result.report.groups == 3 and [result.change.expert_of_slot[e] for e in (1, 2, 5)] == [0, 1, 2]


# ---- folding


@pytest.mark.parametrize("kind", ["merge", "compress"])
def test_folding_changes_nothing_and_is_reported(kind):
    experts = make_experts(bias=True)
    statistics = make_statistics(experts, top_k=3)
    result = mc_smoe(experts, groups=2, statistics=statistics, **STAGES[kind])
    layer, unfolded = layer_of(result), layer_of(result)
    unfolded.change_routing(dataclasses.replace(result.change, fold=False))
    x, index, weight = statistics.sample_x, statistics.sample_index, statistics.sample_weight
    torch.testing.assert_close(layer(x, index, weight), unfolded(x, index, weight), rtol=1e-4, atol=1e-5)
    # Counted here, slot by slot.
    chosen = [[result.change.expert_of_slot[e] for e in row] for row in index.tolist()]
    saved = sum(len(row) - len(set(row)) for row in chosen) / index.numel()
    assert saved > 0.2 and result.report.pairs_folded == pytest.approx(saved)
    used, _ = layer.route(x, index, weight)
    assert int((used >= 0).sum()) == round((1 - saved) * index.numel())


# ---- errors


def test_the_error_falls_as_groups_grow():
    experts = make_experts(noise=1.0)
    statistics = make_statistics(experts)
    results = [mc_smoe(experts, stage="merge", groups=g, statistics=statistics) for g in (1, 2, 4, 6)]
    errors = [r.report.relative_error for r in results]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert [r.report.bytes_now for r in results] == sorted(r.report.bytes_now for r in results)


@pytest.mark.parametrize("stage", ["compress", "hybrid"])
@pytest.mark.parametrize("layout", ["rows", "bitmap", "block"])
def test_the_error_falls_as_ranks_and_density_grow(stage, layout):
    experts = make_experts(4, hidden=96, inter=96, noise=0.8)
    given = {"stage": stage, "groups": 2, "sparse_layout": layout, "statistics": make_statistics(experts)}
    by_rank = [mc_smoe(experts, retain=r, **given).report.relative_error for r in (0.15, 0.3, 0.5)]
    by_density = [mc_smoe(experts, density=d, **given).report.relative_error for d in (0.125, 0.25, 0.5)]
    for errors in (by_rank, by_density):
        assert all(later < earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", STAGES)
def test_the_report_agrees_with_the_stored_layer(kind):
    experts = make_experts(shuffle=False, bias=True)
    statistics = make_statistics(experts)
    factored, report, change, _ = mc_smoe(experts, groups=2, align=False, statistics=statistics, **STAGES[kind])
    dense, lost, whole = factored.materialize(torch.float64), {}, {}
    stands_for = range(6) if change is None else change.expert_of_slot
    for matrix in MATRICES:
        weight = getattr(experts, matrix).double()
        lost[matrix] = float((getattr(dense, matrix)[list(stands_for)] - weight).square().sum())
        whole[matrix] = float(weight.square().sum())
        assert getattr(report, f"relative_error_{matrix}") == pytest.approx((lost[matrix] / whole[matrix]) ** 0.5, 1e-4)
    assert report.relative_error == pytest.approx((sum(lost.values()) / sum(whole.values())) ** 0.5, rel=1e-4)
    assert report.bytes_now == factored.nbytes() and report.bytes_dense == experts.nbytes()
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)
    merged = mc_smoe(experts, groups=2, align=False, stage="merge", statistics=statistics).report
    assert report.merge_error == pytest.approx(merged.relative_error, rel=1e-4)


@pytest.mark.parametrize("kind", STAGES)
def test_the_order_of_experts_does_not_matter(kind):
    experts = make_experts(bias=True)
    statistics = make_statistics(experts)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved, moved_statistics = reordered(experts, statistics, order)
    x = some_x(experts)
    one = functions(mc_smoe(experts, groups=3, statistics=statistics, **STAGES[kind]), 6, x)
    other = functions(mc_smoe(moved, groups=3, statistics=moved_statistics, **STAGES[kind]), 6, x)
    torch.testing.assert_close(other, one[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", STAGES)
def test_the_same_call_gives_the_same_bits(kind):
    experts = make_experts()
    one, two = (mc_smoe(experts, groups=2, statistics=make_statistics(experts), **STAGES[kind]) for _ in range(2))
    assert all(torch.equal(t, two.weights.tensors()[name]) for name, t in one.weights.tensors().items())
    assert one.report == two.report and one.change == two.change


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_experts_is_kept(kind, dtype):
    experts = make_experts(bias=True)
    half = DenseExperts(*(t.to(dtype) for t in vars(experts).values() if torch.is_tensor(t)), gated=True)
    factored = mc_smoe(half, groups=2, statistics=make_statistics(experts), **STAGES[kind]).weights
    assert {t.dtype for t in factored.tensors().values() if t.is_floating_point()} == {dtype}


# ---- the sparse part


QUARTER = {"stage": "compress", "retain": 0, "density": 0.25, "sparse_layout": "bitmap"}


def assert_largest_are_kept(factored, e, matrices, moments):
    """Of expert e, a quarter of the entries, those largest by magnitude times the root of the input's moment."""
    importance = []
    for weight, moment in zip(matrices, moments, strict=True):
        norm = moment.double().sqrt()
        importance.append(weight.abs() * norm / norm.square().mean().sqrt())
    flat = torch.cat([i.flatten() for i in importance])
    masks = [
        unpack_mask(getattr(factored, f"mask_{m}")[e], i.shape[1]) for m, i in zip(MATRICES, importance, strict=True)
    ]
    kept = torch.cat([mask.flatten() for mask in masks])
    assert torch.equal(kept.nonzero().flatten(), flat.argsort(descending=True)[: len(flat) // 4].sort().values)


def test_what_is_kept_is_largest_by_entry_times_input():
    experts = make_experts(3, ancestors=1)
    statistics = make_statistics(experts, ancestors=1)
    factored = mc_smoe(experts, groups=3, statistics=statistics, **QUARTER).weights
    for e in range(3):
        moments = statistics.moment_gate_up, statistics.moment_down[e]
        assert_largest_are_kept(factored, e, (experts.gate_up[e], experts.down[e]), moments)


def test_inputs_of_a_group_are_counted_in_its_order_of_neurons():
    experts = make_experts(3, ancestors=1, noise=0)
    statistics = make_statistics(experts, ancestors=1)
    first = statistics.count.argmax()
    down = torch.zeros(48)
    for e in range(3):  # neurons are known by their rows, which no two share
        same = (experts.gate_up[first, :48].unsqueeze(1) == experts.gate_up[e, :48]).all(2)
        down += statistics.moment_down[e][same.int().argmax(1)]
    factored = mc_smoe(experts, groups=1, statistics=statistics, **QUARTER).weights
    moments = statistics.moment_gate_up, down
    assert_largest_are_kept(factored, 0, (experts.gate_up[first], experts.down[first]), moments)


def test_the_block_layout_counts_inputs_too():
    experts = make_experts(2, ancestors=1)
    statistics = make_statistics(experts, ancestors=1)
    factored = mc_smoe(experts, groups=2, statistics=statistics, **{**QUARTER, "sparse_layout": "block"}).weights
    for matrix, moment in (("gate_up", statistics.moment_gate_up), ("down", statistics.moment_down[1])):
        importance = (getattr(experts, matrix)[1] * moment.sqrt()).abs()[:, :32]
        expected = torch.zeros_like(importance).scatter(1, importance.topk(8).indices, 1)
        assert torch.equal(unpack_mask(getattr(factored, f"mask_{matrix}")[1], 32), expected.bool())


def test_entries_that_are_kept_are_exact_beside_the_low_rank():
    experts = make_experts(3, 96, 96, ancestors=1)
    given = {"stage": "compress", "groups": 3, "sparse_layout": "bitmap"}
    factored = mc_smoe(experts, statistics=make_statistics(experts, ancestors=1), **given).weights
    for matrix in MATRICES:
        assert any(factored.ranks(matrix))
        kept = unpack_mask(getattr(factored, f"mask_{matrix}"), 96)
        now, before = getattr(factored.materialize(), matrix), getattr(experts, matrix)
        torch.testing.assert_close(now[kept], before[kept], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(now[~kept], before[~kept], atol=0.01)


def test_full_moments_count_by_their_diagonal():
    experts = make_experts(3, ancestors=1)
    statistics = make_statistics(experts, ancestors=1)
    apart = 1 - torch.eye(experts.hidden_size)
    full = dataclasses.replace(
        statistics,
        moment_gate_up=torch.diag(statistics.moment_gate_up) + 0.1 * apart,
        moment_down=torch.stack([torch.diag(m) for m in statistics.moment_down]),
    )
    one, other = (mc_smoe(experts, groups=1, statistics=s, sparse_layout="bitmap").weights for s in (statistics, full))
    assert torch.equal(one.mask_gate_up, other.mask_gate_up) and torch.equal(one.mask_down, other.mask_down)


def test_rows_are_kept_whole_and_within_the_density():
    experts = make_experts(2, ancestors=1)
    given = {"stage": "compress", "groups": 2, "retain": 0, "sparse_layout": "rows", "density": 0.3}
    factored = mc_smoe(experts, statistics=make_statistics(experts, ancestors=1), **given).weights
    for e in range(2):
        entries = 0
        for matrix, width in (("gate_up", 40), ("down", 48)):
            kept = unpack_mask(getattr(factored, f"mask_{matrix}")[e], width).sum(1)
            assert set(kept.tolist()) <= {0, width}
            entries += int(kept.sum())
        assert 0.3 * 144 * 40 - 48 < entries <= 0.3 * 144 * 40


def test_keep_rows_takes_the_largest_means_until_one_does_not_fit():
    wide, narrow = torch.tensor([[1.0, 3.0, 2.0], [9.0, 0.0, 0.0]]), torch.tensor([[2.5], [0.5], [2.0]])
    kept = keep_rows([wide, narrow], 7)
    # Means 2, 3; 2.5, 0.5, 2: three entries, one, three, and then one that fits exactly no more.
    assert [k.any(1).tolist() for k in kept] == [[True, True], [True, False, False]]
    assert not any(k.any() for k in keep_rows([wide, narrow], 2))
    assert [int(k.sum()) for k in keep_entries([wide, narrow], 2)] == [2, 0]


def test_experts_alone_in_their_group_get_no_sparse_residual():
    experts = make_experts(5)
    dominants = {"dominants": [0, 1, 3]}
    result = mc_smoe(
        experts, stage="hybrid", plan=dominants, sparse_layout="bitmap", statistics=make_statistics(experts)
    )
    sizes = torch.tensor(result.weights.group.tolist()).bincount()
    alone = [e for e in range(5) if sizes[result.weights.group[e]] == 1]
    assert alone and not result.weights.mask_gate_up[alone].any() and not result.weights.mask_down[alone].any()
    assert all(result.weights.ranks(m)[e] == 0 for m in MATRICES for e in alone)
    assert result.weights.mask_gate_up.any()


@pytest.mark.parametrize("columns", [5, 31, 32, 40, 64])
@pytest.mark.parametrize("kept", [4, 8])
def test_block_keeps_the_largest_by_scale(columns, kept):
    generator = torch.Generator().manual_seed(columns)
    dense = torch.randn(3, columns, generator=generator)
    scale = torch.rand(columns, generator=generator)
    tensors = block(lambda e: (dense, dense), 1, kept=kept, scale=lambda e: (scale, torch.ones(columns)))
    plain = block(lambda e: (dense, dense), 1, kept=kept)
    for matrix, importance, same in (("gate_up", dense.abs() * scale, None), ("down", dense.abs(), plain)):
        expected = torch.zeros_like(dense)
        for word in range(0, columns, 32):
            own = importance[:, word : word + 32]
            chosen = own.topk(min(kept, own.shape[1])).indices + word
            expected.scatter_(1, chosen, dense.gather(1, chosen))
        mask, values = tensors[f"mask_{matrix}"][0], tensors[f"values_{matrix}"][0]
        assert torch.equal(expand_sparse_reference(mask, values, None, columns), expected)
        if same is not None:
            assert torch.equal(values, same[f"values_{matrix}"][0])


def test_bitmap_takes_a_share_for_each_expert():
    dense = torch.arange(1.0, 13.0).view(3, 4), torch.arange(1.0, 13.0).view(4, 3)
    tensors = bitmap(lambda e: dense, 3, retain=[0.5, 0, 1])
    assert [int(unpack_mask(tensors["mask_down"][e], 3).sum()) for e in range(3)] == [6, 0, 12]


def test_column_scale_is_one_in_the_mean_square_and_where_nothing_was_seen():
    scale = column_scale(torch.tensor([4.0, 16.0, 0.0]))
    assert float(scale.square().mean()) == pytest.approx(1) and float(scale[1] / scale[0]) == pytest.approx(2)
    assert torch.equal(column_scale(torch.zeros(3)), torch.ones(3))


# ---- in models


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_models_with_merged_experts_are_saved_and_loaded(family, tmp_path):
    """A softmax, a sigmoid in groups with a correction, and experts with biases behind a gate of their own."""
    tokens = torch.arange(240).view(8, 30) * 11 % 61 + 3
    statistics = collect(DenseModel(build(family)), tokens, progress=False)
    given = {"method": "mc-smoe", "statistics": statistics, "progress": False}
    expected = logits(build(family))
    exact, merged, both = build(family), build(family), build(family)
    rk.swap_experts(exact, stage="merge", groups=len(next(iter(statistics.layers.values())).count), **given)
    torch.testing.assert_close(logits(exact), expected, rtol=1e-4, atol=1e-5)
    rk.swap_experts(merged, stage="merge", groups=2, **given)
    assert not torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    changes = [m.router_change for m in loaded.modules() if isinstance(m, FactoredExpertsLayer)]
    assert sum(max(c.expert_of_slot) + 1 for c in changes) == 2 * len(changes) and all(c.fold for c in changes)
    rk.swap_experts(both, stage="hybrid", groups=2, retain=1.0, density=0, **given)
    torch.testing.assert_close(logits(both), expected, rtol=1e-4, atol=1e-4)


# ---- what was never seen, and bad input


def test_experts_without_tokens_are_named_and_merged_without_data(caplog):
    experts = make_experts()
    statistics = make_statistics(experts, never=(1, 4))
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        result = mc_smoe(experts, stage="merge", groups=2, statistics=statistics)
    assert [r.getMessage() for r in caplog.records] == [
        "mc-smoe: no calibration token reached experts 1, 4; a group takes nothing from them, use more tokens"
    ]
    assert result.report.experts_without_tokens == 2
    # Beside experts that were used they weigh nothing; where none was, all weigh the same.
    assert grouping(experts, statistics, [0, 3]).weights[[1, 4]].tolist() == [0, 0]
    nothing = dataclasses.replace(statistics, count=torch.zeros(6, dtype=torch.int64))
    assert grouping(experts, nothing, [0, 3]).weights.sum() == 2


def test_statistics_of_another_layer_are_refused():
    with pytest.raises(ValueError, match=r"^statistics: are of 4 experts, the layer has 6; calibrate this model$"):
        mc_smoe(make_experts(), statistics=make_statistics(make_experts(4)))


def test_statistics_are_needed():
    with pytest.raises(ValueError, match=r"^mc-smoe: needs calibration statistics, got none; give calibration text$"):
        mc_smoe(make_experts())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "train"}, r"^stage: must be one of merge, compress, hybrid, got 'train'$"),
        ({"budget": "free"}, r"^budget: must be one of global, uniform, got 'free'$"),
        ({"similarity": "names"}, r"^similarity: must be one of router-logits, weights, outputs, got 'names'$"),
        ({"sparse_layout": "csr"}, r"^sparse_layout: must be one of block, bitmap, rows, got 'csr'$"),
        ({"groups": 0}, r"^groups: must be a whole number of at least 1, got 0$"),
        ({"groups": 2.5}, r"^groups: must be a whole number of at least 1, got 2.5$"),
        ({"groups": 7}, r"^groups: must be at most the 6 experts of a layer, got 7$"),
        ({"retain": 1.5}, r"^retain: must be in \[0, 1\], got 1.5$"),
        ({"density": float("nan")}, r"^density: must be in \[0, 1\], got nan$"),
        (
            {"retain": 0, "density": 0},
            r"^retain and density: stage 'compress' needs one of them above 0; use stage='merge' for none$",
        ),
        (
            {"sparse_layout": "block", "density": 0.6},
            r"^density: the block layout keeps at most 0.5, got 0.6; use sparse_layout='bitmap'$",
        ),
    ],
)
def test_settings_are_checked_before_any_work(settings, message):
    said: list[str] = []
    experts = make_experts()
    with pytest.raises(ValueError, match=message):
        mc_smoe(experts, statistics=make_statistics(experts), progress=said.append, **settings)
    assert not said


def test_the_method_is_known_by_its_name():
    method = method_named("mc-smoe", {"stage": "merge", "groups": 2})
    assert method.needs_statistics and method.settings["similarity"] == "router-logits"
    experts = make_experts()
    assert method(experts, statistics=make_statistics(experts)).report.groups == 2
    with pytest.raises(ValueError, match="groups"):
        method_named("mc-smoe", {"groups": -1})
    check_settings(**method.settings)


def test_a_result_no_smaller_than_dense_is_warned_of(caplog):
    experts = make_experts()
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        report = mc_smoe(experts, stage="merge", groups=6, statistics=make_statistics(experts)).report
    assert [r.getMessage() for r in caplog.records] == [
        f"mc-smoe: {report.bytes_now} bytes, not smaller than the dense layer's {report.bytes_dense}; "
        "lower groups, retain or density"
    ]


def test_progress_is_told_of_alignment_and_residuals():
    said: list[str] = []
    experts = make_experts()
    mc_smoe(experts, groups=2, similarity="weights", statistics=make_statistics(experts), progress=said.append)
    for phrase in ("compare: expert 1 with 2 of 2 dominant ones", "align: expert ", "residual: expert 2 of 2"):
        assert any(s.startswith(phrase) for s in said)
