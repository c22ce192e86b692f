"""MoE-I2: what leaving experts out costs, who loses how many, at which ranks, and the layer that comes of it."""

import copy
import dataclasses
import itertools
import json
import logging
import math
from functools import partial

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from resmoe_kernels.factored import MATRICES, DenseExperts
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.jobs.compress import compress
from resmoe_kernels.python_ops.jobs.swap import swap_experts
from resmoe_kernels.python_ops.methods import moe_i2 as method_module
from resmoe_kernels.python_ops.methods.moe_i2 import moe_i2
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.dense_model import DenseModel, Hidden
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring, select
from resmoe_kernels.python_ops.solvers import expert_outputs as expert_outputs_module
from resmoe_kernels.python_ops.solvers.expert_outputs import expert_outputs
from resmoe_kernels.python_ops.solvers.factorize import low_rank_at
from resmoe_kernels.python_ops.solvers.reception_field import best_together, runs
from tests import families
from tests.conftest import REPO

TINY_MIXTRAL = REPO / "examples/tiny-mixtral"
FORMS = list(itertools.product([True, False], [True, False]))  # gated, bias
EXCERPT = REPO / "examples/wikitext2-excerpt.txt"


# ---- made-up layers, and what they compute written out


def make_experts(count=6, hidden=20, inter=24, gated=True, bias=False, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = (2 if gated else 1) * inter
    biases = [randn(count, rows), randn(count, hidden)] if bias else []
    return DenseExperts(randn(count, rows, hidden) / 4, randn(count, hidden, inter) / 4, *biases, gated=gated)


def output_of(experts, e, x):
    """Expert e of one token x (H,) float64."""
    z = experts.gate_up[e].double() @ x
    if experts.bias_gate_up is not None:
        z = z + experts.bias_gate_up[e].double()
    h = z[: experts.intermediate_size]
    h = h / (1 + torch.exp(-h))
    if experts.gated:
        h = h * z[experts.intermediate_size :]
    y = experts.down[e].double() @ h
    return y if experts.bias_down is None else y + experts.bias_down[e].double()


def route(logits, scoring, pruned, masked, bias):
    """expert -> weight of one token, by the definitions."""
    count = len(logits)
    left = [e for e in range(count) if e not in pruned]
    seen = left if masked == "before" else range(count)
    if scoring.score == "softmax":
        total = sum(math.exp(logits[e]) for e in seen)
        scores = {e: math.exp(logits[e]) / total for e in seen}
    else:
        scores = {e: 1 / (1 + math.exp(-logits[e])) for e in seen}
    choice = {e: scores[e] + (bias[e] if bias else 0.0) for e in left}
    width = count // scoring.groups
    if scoring.groups > 1:

        def group_score(g):
            best = sorted((choice[e] for e in left if e // width == g), reverse=True)
            return sum(best[:2]) if scoring.group_score == "top2" else best[0]

        best_groups = sorted(range(scoring.groups), key=group_score, reverse=True)[: scoring.groups_kept]
        choice = {e: c for e, c in choice.items() if e // width in best_groups}
    chosen = sorted(choice, key=lambda e: choice[e], reverse=True)[: scoring.top_k]
    total = sum(scores[e] for e in chosen) if scoring.normalised else 1.0
    return {e: scoring.scale * scores[e] / total for e in chosen}


def layer_output(experts, x, logits, scoring, pruned=(), masked="before", bias=None):
    """F(X) (S, H) float64."""
    rows = []
    for token, row in zip(x.double(), logits.tolist(), strict=True):
        weights = route(row, scoring, set(pruned), masked, bias)
        rows.append(sum(w * output_of(experts, e, token) for e, w in weights.items()))
    return torch.stack(rows)


def masks(count, *sets):
    return torch.tensor([[e in members for e in range(count)] for members in sets])


# ---- what is lost without some experts

ROUTERS = {
    "mixtral": (Scoring(2, normalised=True), None),
    "deepseek-v2": (Scoring(3, scale=1.5), None),
    "one expert": (Scoring(1), None),
    "groups by their best": (Scoring(2, groups=3, groups_kept=2), None),
    "deepseek-v3": (
        Scoring(2, "sigmoid", True, 2.5, groups=2, groups_kept=1, group_score="top2"),
        [0.3, -0.2, 0.1, 0.0, -0.4, 0.2],
    ),
}


@pytest.mark.parametrize("masked", ["before", "after"])
@pytest.mark.parametrize("router", ROUTERS)
def test_change_is_that_of_the_layer_written_out(router, masked):
    scoring, bias = ROUTERS[router]
    experts, generator = make_experts(), torch.Generator().manual_seed(1)
    x, logits = torch.randn(17, 20, generator=generator), torch.randn(17, 6, generator=generator)
    given = None if bias is None else torch.tensor(bias)
    outputs = expert_outputs(experts, x, logits, partial(select, scoring=scoring, masked=masked, bias=given))
    dense = layer_output(experts, x, logits, scoring, bias=bias)
    assert outputs.norm() == pytest.approx(float(dense.norm()), rel=1e-5)
    sets = [(), (0,), (5,), (1, 4), (0, 3)]  # of different sizes, in every group of 3 and in both of 2
    got = outputs.change(masks(6, *sets))
    for members, change in zip(sets, got.tolist(), strict=True):
        without = layer_output(experts, x, logits, scoring, members, masked, bias)
        assert change == pytest.approx(float((dense - without).norm()), rel=1e-4, abs=1e-12)
    assert got[0] == 0
    alone = [float((dense - layer_output(experts, x, logits, scoring, {e}, masked, bias)).norm()) for e in range(6)]
    assert outputs.importance().tolist() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_experts_of_every_form_are_run(gated, bias):
    experts = make_experts(gated=gated, bias=bias, dtype=torch.bfloat16)
    x, logits = torch.randn(9, 20).bfloat16(), torch.randn(9, 6)
    outputs = expert_outputs(experts, x, logits, partial(select, scoring=Scoring(2)))
    dense, without = (layer_output(experts, x, logits, Scoring(2), pruned) for pruned in ((), (1, 2)))
    assert float(outputs.change(masks(6, (1, 2)))) == pytest.approx(float((dense - without).norm()), rel=1e-4)


@pytest.mark.parametrize("masked", ["before", "after"])
def test_a_token_uses_fewer_experts_where_its_group_has_fewer_left(masked):
    scoring = Scoring(2, "sigmoid", True, groups=3, groups_kept=1)
    experts, generator = make_experts(), torch.Generator().manual_seed(2)
    x, logits = torch.randn(15, 20, generator=generator), torch.randn(15, 6, generator=generator)
    dense, without = (layer_output(experts, x, logits, scoring, pruned, masked) for pruned in ((), (0,)))
    assert any(len(route(row, scoring, {0}, masked, None)) == 1 for row in logits.tolist())
    outputs = expert_outputs(experts, x, logits, partial(select, scoring=scoring, masked=masked))
    assert float(outputs.change(masks(6, (0,)))) == pytest.approx(float((dense - without).norm()), rel=1e-4)


def test_an_expert_no_token_uses_changes_nothing():
    logits = torch.randn(40, 6)
    logits[:, 3] = -50
    routed = partial(select, scoring=Scoring(2, normalised=True))
    outputs = expert_outputs(make_experts(), torch.randn(40, 20), logits, routed)
    importance = outputs.importance()
    assert importance[3] == 0 and bool((importance[[0, 1, 2, 4, 5]] > 0).all())


def test_tokens_in_pieces_and_a_file_change_nothing(tmp_path, monkeypatch):
    arguments = (make_experts(), torch.randn(23, 20), torch.randn(23, 6), partial(select, scoring=Scoring(2)))
    rows = masks(6, (0,), (1,), (5,))
    whole = expert_outputs(*arguments).change(rows)
    monkeypatch.setattr(expert_outputs_module, "_OUTPUT_BYTES", 4 * 6 * 20 * 5)  # 5 tokens
    monkeypatch.setattr(expert_outputs_module, "_CHANGE_ELEMENTS", 3 * 6 * 4)  # 4 tokens
    outputs = expert_outputs(*arguments, file=tmp_path / "gram")
    torch.testing.assert_close(outputs.change(rows), whole, rtol=1e-6, atol=0)
    assert (tmp_path / "gram").stat().st_size == 4 * 23 * 6 * 6


# ---- factors at given ranks


def test_low_rank_at_is_the_best_of_each_rank():
    experts = make_experts(3, 40, 48, dtype=torch.float64)
    ranks = {"gate_up": [16, 32, 48], "down": [32, 16, 16]}
    tensors = low_rank_at(lambda e: (experts.gate_up[e], experts.down[e]), ranks, dtype=torch.float64)
    for matrix in MATRICES:
        offsets = tensors[f"rank_offsets_{matrix}"]
        assert offsets.diff().tolist() == ranks[matrix] and offsets.dtype == torch.int32
        for e, rank in enumerate(ranks[matrix]):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            product = tensors[f"u_{matrix}"][rows].T @ tensors[f"v_{matrix}"][rows]
            lost = torch.linalg.svdvals(getattr(experts, matrix)[e])[rank:].norm()
            error = (product - getattr(experts, matrix)[e]).norm()
            assert float(error) == pytest.approx(float(lost), rel=1e-6, abs=1e-9)


# ---- models


def mixtral(num_experts=12, num_layers=3, seed=0):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that layers differ and experts matter
    return model


def grouped():
    """Like DeepSeek-V3: 16 experts in 4 groups of which 2 are kept, top 3 by sigmoid plus a bias."""
    torch.manual_seed(0)
    config = families.CONFIGS["deepseek_v3"]()
    config.update({"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_hidden_layers": 3})
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(16) / 4)
    return model


def tokens(count=8, length=20):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))


def statistics_of(model, token_ids=None):
    return collect(DenseModel(model), tokens() if token_ids is None else token_ids, progress=False)


FAST = {"population": 12, "generations": 3, "block": 1}


def planned(model, statistics=None, **settings):
    method = method_named("moe-i2", FAST | settings)
    dense = DenseModel(model)
    statistics = statistics or statistics_of(model)
    return method.plan(dense, range(len(dense.experts)), statistics, progress=False)


def swapped(model, statistics=None, **settings):
    """A compressed copy and the reports of its layers."""
    statistics = statistics or statistics_of(model)
    made = copy.deepcopy(model)
    settings = {"method": "moe-i2", **FAST, **settings}
    swap_experts(made, statistics=statistics, progress=False, **settings)
    return made, [spec["report"] for spec in made.config.quantization_config.layers.values()]


@torch.no_grad()
def logits(model):
    return model(tokens(2)).logits


MODELS = {"mixtral": mixtral, "grouped": grouped, **{f: None for f in ("qwen2_moe", "deepseek_v2", "gpt_oss")}}


def build(name):
    return families.build(name) if MODELS[name] is None else MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_pruned_and_nothing_decomposed_is_the_dense_model(name):
    model = build(name)
    made, reports = swapped(model, prune=0.0, retain=1.0)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-5)
    assert all(r["relative_error"] == r["output_error"] == r["experts_pruned"] == 0 for r in reports)


@pytest.mark.parametrize("masked", ["before", "after"])
@pytest.mark.parametrize("name", ["mixtral", "grouped", "qwen2_moe", "deepseek_v2"])
def test_the_output_error_planned_is_the_one_the_swapped_model_has(name, masked):
    model = build(name)
    statistics = statistics_of(model)
    made, (report, *_) = swapped(model, statistics, prune=0.5, retain=1.0, layers="0", masked=masked)
    path = next(iter(statistics.layers))
    seen = []
    for one in (model, made):
        hook = one.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[-1].flatten(0, -2)))
        with torch.no_grad():
            one(statistics.token_ids)
        hook.remove()
    dense, pruned = seen
    assert report["output_error"] > 0.01
    assert report["output_error"] == pytest.approx(float((dense - pruned).norm() / dense.norm()), rel=1e-3)


def test_groups_of_the_router_lose_as_many_each():
    plans = planned(grouped(), prune=0.5)
    for layer in plans:
        assert [sum(e // 4 == g for e in layer["pruned"]) for g in range(4)] == [2] * 4


@pytest.mark.parametrize("prune", [0.1, 0.5, 0.8])
def test_a_token_uses_top_k_of_those_left_and_never_another(prune):
    model = mixtral()
    made, reports = swapped(model, prune=prune, retain=1.0)
    used = []
    for module in made.modules():
        if isinstance(module, FactoredExpertsLayer):
            route = module.route
            module.route = lambda *given, route=route: used.append(route(*given)[0]) or route(*given)
    logits(made)
    assert sum(r["experts_pruned"] for r in reports) == int(prune * 36 + 1e-9)
    for experts, report in zip(used, reports, strict=True):
        assert report["experts_kept"] >= 2 and experts.shape[1] == 2
        assert int(experts.min()) >= 0 and int(experts.max()) < report["experts_kept"]


@pytest.mark.parametrize("what", [{"prune": (0.75, 0.5, 0.25, 0.1, 0.0)}, {"retain": (0.5, 0.7, 0.85, 1.0)}], ids=str)
def test_the_error_falls_as_the_budget_grows(what):
    ((name, steps),) = what.items()
    model = mixtral()
    statistics, dense = statistics_of(model), logits(model)
    errors, sizes = [], []
    for step in steps:
        made, reports = swapped(model, statistics, **{"prune": 0.0, "retain": 1.0, name: step})
        errors.append(float((logits(made) - dense).norm() / dense.norm()))
        sizes.append(sum(r["bytes_now"] for r in reports))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert all(later > earlier for earlier, later in itertools.pairwise(sizes))


def test_the_same_seed_gives_the_same_plan_and_files_change_nothing(monkeypatch):
    model = mixtral()
    statistics = statistics_of(model)
    first = planned(model, statistics, block=3)
    monkeypatch.setattr(method_module, "_MEMORY_LIMIT", 0)
    assert planned(model, statistics, block=3) == first
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("kind", ["genetic", "greedy", "random"])
def test_the_plan_does_not_depend_on_the_order_of_experts(kind):
    model, moved = mixtral(), mixtral()
    orders = []
    with torch.no_grad():
        for layer in moved.model.layers:
            orders.append(torch.randperm(12, generator=torch.Generator().manual_seed(len(orders))))
            for parameter in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                parameter.copy_(parameter[orders[-1]].clone())
    settings = {"search": kind, "prune": 0.34, "retain": 0.7, "alpha": 1.0}
    for one, other, order in zip(planned(model, **settings), planned(moved, **settings), orders, strict=True):
        place = order.argsort()
        assert len(one["pruned"]) >= 2
        assert sorted(place[one["pruned"]].tolist()) == other["pruned"]
        assert one["evaluations"] == other["evaluations"] > 20
        for matrix in MATRICES:
            ranks = dict(zip((e for e in range(12) if e not in one["pruned"]), one["ranks"][matrix], strict=True))
            kept = [e for e in range(12) if e not in other["pruned"]]
            assert [ranks[int(order[e])] for e in kept] == other["ranks"][matrix]
            assert len(set(other["ranks"][matrix])) > 1


def test_alpha_spreads_ranks_by_importance_at_the_same_size():
    model = mixtral()
    statistics = statistics_of(model)
    by_alpha = {alpha: planned(model, statistics, alpha=alpha, retain=0.7) for alpha in (0.0, 0.15, 2.0)}
    for matrix in MATRICES:
        for layer in range(3):
            ranks = {alpha: plans[layer]["ranks"][matrix] for alpha, plans in by_alpha.items()}
            assert len({sum(r) for r in ranks.values()}) == 1
            assert max(ranks[0.0]) - min(ranks[0.0]) <= 16
            plan = by_alpha[2.0][layer]
            kept = [i for e, i in enumerate(plan["importance"]) if e not in plan["pruned"]]
            ordered = [r for _, r in sorted(zip(kept, ranks[2.0], strict=True))]
            assert ordered == sorted(ordered) and ordered[0] < ordered[-1]


def test_allocation_follows_importance_only_where_asked():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(20)
    uneven, even = (planned(model, allocation=a, prune=0.5) for a in ("importance", "uniform"))
    assert [len(layer["pruned"]) for layer in even] == [6, 6, 6]
    counts = [len(layer["pruned"]) for layer in uneven]
    assert sum(counts) == 18 and counts[1] < min(counts[0], counts[2])


# ---- blocks


def measured_best(model, block, candidates, token_ids):
    """The best combination, each run through the whole block."""
    dense = DenseModel(model)
    hidden = dense.embed(token_ids)
    stop = dense.decoder_layer_of(block[-1]) + 1
    reference = torch.cat(dense.run(hidden, 0, stop).states)
    errors = {}
    for combination in itertools.product(*map(range, map(len, candidates))):
        changes = {i: candidates[n][c] for n, (i, c) in enumerate(zip(block, combination, strict=True))}
        errors[combination] = float((torch.cat(dense.run(hidden, 0, stop, changes).states) - reference).norm())
    return list(min(errors, key=errors.get)), errors


def without(*pruned):
    kept = [e for e in range(12) if e not in pruned]
    numbers = tuple(kept.index(e) if e in kept else -1 for e in range(12))
    return RouterChange(expert_of_slot=numbers, scoring=Scoring(2, normalised=True))


def test_the_combination_of_a_block_is_the_best_of_all():
    model = mixtral(num_layers=4)
    candidates = [[without(0, 1), without(2, 3), without(4, 5)], [without(6), without(7)], [without(8), without(3)]]
    block = [0, 1, 3]  # a dense layer lies between
    expected, errors = measured_best(model, block, candidates, tokens())
    assert expected != [0, 0, 0] and len(set(errors.values())) == 12
    dense = DenseModel(model)
    said = []
    through = partial(method_module._through, dense, block)
    chosen, leaving = best_together(through, dense.embed(tokens()), candidates, Hidden.distance, lambda: said.append(1))
    assert chosen == expected
    assert len(said) == runs(candidates) == 3 + 6 + 12
    direct = dense.run(dense.embed(tokens()), 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(leaving.states, direct.states, strict=True))


def test_blocks_choose_among_the_best_of_every_layer(monkeypatch):
    model = mixtral(num_layers=4, seed=1)
    statistics = statistics_of(model)
    alone, together = (planned(model, statistics, block=block) for block in (1, 3))
    assert [p["pruned"] for p in alone] != [p["pruned"] for p in together]
    assert alone[3] == together[3]  # a block of one
    for one, other in zip(alone, together, strict=True):
        assert one["output_error"] <= other["output_error"]
    blocks = []

    def noted(advance, hidden, candidates, *rest):
        dense = DenseModel(model)
        direct = dense.run(dense.embed(statistics.token_ids), 0, sum(map(len, blocks)))  # the block's first layer
        assert torch.equal(torch.cat(hidden.states), torch.cat(direct.states))
        blocks.append([len(c) for c in candidates])
        return best_together(advance, hidden, candidates, *rest)

    monkeypatch.setattr(method_module, "best_together", noted)
    planned(model, statistics, block=2, candidates=2)
    assert blocks == [[2, 2], [2, 2]]


# ---- one layer


def plan_for(pruned=(), ranks=None, scoring=None, count=6):
    scoring = dataclasses.asdict(scoring or Scoring(2))
    planned = {"pruned": list(pruned), "ranks": ranks, "scoring": scoring, "importance": [1.0] * count}
    return {**planned, "output_error": 0.1, "evaluations": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_a_layer_is_compressed_as_planned(gated, bias, dtype):
    experts = make_experts(6, 40, 48, gated, bias, dtype=dtype)
    ranks = {"gate_up": [16, 32, 16, 16], "down": [16, 16, 32, 16]}
    said = []
    plan = plan_for((1, 4), ranks)
    factored, report, change, _ = moe_i2(experts, masked="after", plan=plan, progress=said.append)
    factored.check_values()
    kept = [0, 2, 3, 5]
    assert {m: factored.ranks(m) for m in MATRICES} == ranks
    assert {t.dtype for t in factored.tensors().values() if t.is_floating_point()} == {dtype}
    assert factored.group is None and factored.base_gate_up is None and factored.factorization == "stacked"
    assert change == RouterChange(expert_of_slot=(0, -1, 1, 2, -1, 3), scoring=Scoring(2), masked="after")
    assert said[-1] == "decomposing: expert 4 of 4" and len(said) == 4
    if bias:
        assert torch.equal(factored.bias_gate_up, experts.bias_gate_up[kept])
        assert torch.equal(factored.bias_down, experts.bias_down[kept])
    lost, whole = {}, {}
    for matrix in MATRICES:
        weight = getattr(experts, matrix)[kept].double()
        lost[matrix] = float((weight - getattr(factored.materialize(torch.float64), matrix)).square().sum())
        whole[matrix] = float(weight.square().sum())
        assert getattr(report, f"relative_error_{matrix}") == pytest.approx(
            math.sqrt(lost[matrix] / whole[matrix]), rel=1e-4
        )
    assert report.relative_error == pytest.approx(math.sqrt(sum(lost.values()) / sum(whole.values())), rel=1e-4)
    assert (report.experts_pruned, report.experts_kept, report.importance) == (2, 4, 6.0)
    assert (report.mean_rank_gate_up, report.mean_rank_down) == (20, 20)
    assert (report.bytes_dense, report.bytes_now) == (experts.nbytes(), factored.nbytes())
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)


def test_retain_one_keeps_the_survivors_to_the_bit():
    experts = make_experts(bias=True, dtype=torch.bfloat16)
    factored, report, change, _ = moe_i2(experts, plan=plan_for((0,)))
    assert torch.equal(factored.base_gate_up, experts.gate_up[1:]) and torch.equal(factored.base_down, experts.down[1:])
    assert factored.group.tolist() == [0, 1, 2, 3, 4] and factored.u_gate_up is None
    assert report.relative_error == 0 and report.mean_rank_down == 0
    assert change.expert_of_slot == (-1, 0, 1, 2, 3, 4)


def test_a_checkpoint_compressed_from_disk_runs_as_the_model_compressed_in_memory(tmp_path):
    settings = {"candidates": 2, "prune": 0.3, "retain": 0.5}
    made = compress(
        TINY_MIXTRAL,
        tmp_path / "out",
        method="moe-i2",
        calibration=EXCERPT,
        calibration_tokens=600,
        layers="0,1",
        progress=False,
        **settings,
    )
    loaded = AutoModelForCausalLM.from_pretrained(made)
    dense = AutoModelForCausalLM.from_pretrained(TINY_MIXTRAL)
    statistics = collect(DenseModel(dense), _windows_of(made), progress=False)
    swap_experts(dense, method="moe-i2", layers="0,1", statistics=statistics, progress=False, **settings)
    ids = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=0, atol=0)
    change = loaded.model.layers[0].mlp.experts.router_change
    assert change.prunes and change == dense.model.layers[0].mlp.experts.router_change


def _windows_of(checkpoint):
    from resmoe_kernels.python_ops.calibration.statistics import Statistics

    (file,) = checkpoint.parent.glob("*.statistics.safetensors")
    return Statistics.load(file).token_ids


# ---- errors and warnings

ERRORS = [
    ({"allocation": "even"}, r"^allocation: must be one of importance, uniform, got 'even'$"),
    ({"search": "beam"}, r"^search: must be one of genetic, greedy, random, got 'beam'$"),
    ({"masked": "never"}, r"^masked: must be one of before, after, got 'never'$"),
    ({"prune": 1.0}, r"^prune: must be in \[0, 1\), got 1.0$"),
    ({"prune": float("nan")}, r"^prune: must be in \[0, 1\), got nan$"),
    ({"retain": 0.0}, r"^retain: must be in \(0, 1\], got 0.0$"),
    ({"alpha": -0.1}, r"^alpha: must be at least 0 and finite, got -0.1$"),
    ({"alpha": math.inf}, r"^alpha: must be at least 0 and finite, got inf$"),
    ({"population": 3}, r"^population: must be at least 4, got 3$"),
    ({"generations": 0}, r"^generations: must be at least 1, got 0$"),
    ({"candidates": 0}, r"^candidates: must be at least 1, got 0$"),
    ({"block": 0}, r"^block: must be at least 1, got 0$"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_settings_are_checked_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        method_named("moe-i2", arguments)
    with pytest.raises(ValueError, match=message):
        moe_i2(make_experts(), plan=plan_for(), **arguments)


def test_a_layer_is_not_compressed_by_itself():
    with pytest.raises(ValueError, match=r"^plan: needed, because what a layer loses depends on the others"):
        moe_i2(make_experts())


def test_experts_no_token_uses_are_named(caplog):
    model = mixtral(num_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20  # a constant feature, by which two experts are shut out
        model.model.layers[0].mlp.gate.weight[[3, 7], 0] = -100
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        (layer,) = planned(model, prune=0.09, retain=0.4, alpha=0.5)
    assert [r.getMessage() for r in caplog.records] == [
        "model.layers.0.mlp.experts: none of the 160 sampled tokens uses experts 3, 7; they are pruned first, and "
        "where kept they get the mean rank; calibrate on more tokens to know better"
    ]
    (pruned,) = layer["pruned"]
    assert pruned in (3, 7)
    kept = [e for e in range(12) if e != pruned]
    ranks = layer["ranks"]["gate_up"]
    assert min(ranks) < ranks[kept.index({3: 7, 7: 3}[pruned])] < max(ranks)


def test_a_result_no_smaller_than_dense_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        report = moe_i2(make_experts(), plan=plan_for()).report
    assert [r.getMessage() for r in caplog.records] == [
        f"moe-i2: {report.bytes_now} bytes, not smaller than the dense layer's {report.bytes_dense}; lower retain or "
        "raise prune"
    ]
