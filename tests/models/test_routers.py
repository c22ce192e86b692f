"""Routers of real transformers models: how each scores, and what its hook does to whole models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.python_ops.models.hf_quantizer import ResMoEConfig, ResMoEQuantizer, layer_spec, mark_as_factored
from resmoe_kernels.python_ops.models.layouts import find_experts
from resmoe_kernels.python_ops.models.routers import (
    change_choice,
    correction_bias,
    find_router,
    logits_in,
    read_scoring,
)
from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring, Threshold, select
from tests import families

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("one_thread")]
TOKENS = (torch.arange(60).view(3, 20) * 7) % 61 + 3
# What each family's configuration says, read off the documentation of the models.
SCORINGS = {
    "mixtral": Scoring(2, normalised=True),
    "deepseek_v2": Scoring(3),
    "deepseek_v3": Scoring(3, "sigmoid", normalised=True, scale=2.5, groups=2, groups_kept=1, group_score="top2"),
    "qwen2_moe": Scoring(2),
    "qwen3_moe": Scoring(2),
    "olmoe": Scoring(2),
    "granitemoe": Scoring(2, normalised=True),
    "jamba": Scoring(2),
    "aria": Scoring(2, normalised=True),
    "gpt_oss": Scoring(2, normalised=True),
}


def changed(config, **values):
    for name, value in values.items():
        setattr(config, name, value)
    return config


VARIANTS = [
    ("qwen2_moe", {"norm_topk_prob": True}, Scoring(2, normalised=True)),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}, Scoring(3, normalised=True)),
    (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        Scoring(3, scale=16.0, groups=4, groups_kept=2),
    ),
    (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        Scoring(3, "sigmoid", groups=4, groups_kept=2, group_score="top2"),
    ),
    # Groups that are all kept limit nothing.
    ("deepseek_v3", {"n_group": 2, "topk_group": 2}, Scoring(3, "sigmoid", normalised=True, scale=2.5)),
    ("mixtral", {"hidden_size": 1024, "num_local_experts": 64}, Scoring(2, normalised=True)),
]


def build(family, changes):
    torch.manual_seed(0)
    config = changed(families.CONFIGS[family](), **changes)
    return AutoModelForCausalLM.from_config(config).eval()


def test_every_family_is_covered_here():
    assert {*SCORINGS, "phimoe", "switch"} == {*families.CONFIGS}


@pytest.mark.parametrize("family", SCORINGS)
def test_scoring_is_read_by_probing(family):
    model = families.build(family)
    for where in (model, copy.deepcopy(model).to("meta")):
        assert [f.scoring(where) for f in find_experts(where)] == [SCORINGS[family]] * len(find_experts(model))


@pytest.mark.parametrize(("family", "changes", "scoring"), VARIANTS)
def test_scoring_of_other_configurations(family, changes, scoring):
    model = build(family, changes)
    assert find_experts(model)[-1].scoring(model) == scoring


@pytest.mark.parametrize("family", SCORINGS)
def test_probing_leaves_the_router_alone(family):
    model = families.build(family)
    before, out = copy.deepcopy(model.state_dict()), families.logits(model)
    for found in find_experts(model):
        found.scoring(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(families.logits(model), out)


@pytest.mark.parametrize(("family", "changes"), [(f, {}) for f in SCORINGS] + [v[:2] for v in VARIANTS[:5]])
def test_a_change_that_changes_nothing_keeps_the_logits(family, changes):
    """The hook chooses as the router did, from its logits."""
    model = build(family, changes) if changes else families.build(family)
    expected = families.logits(model)
    for found in find_experts(model):
        change_choice(found.router(model), RouterChange(scoring=found.scoring(model)))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(families.logits(model), expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("masked", ["before", "after"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3"])
def test_pruned_slots_are_never_chosen(family, masked):
    model = families.build(family)
    found = find_experts(model)[0]
    router, slots = found.router(model), found.num_experts
    kept = [i % 4 != 1 for i in range(slots)]
    change = RouterChange(
        tuple(i if k else -1 for i, k in enumerate(kept)), scoring=found.scoring(model), masked=masked
    )
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    dense_logits, dense_weights, _ = router(x)
    handle = change_choice(router, change)
    logits, weights, chosen = router(x)
    assert torch.equal(logits, dense_logits) and weights.dtype == dense_weights.dtype
    assert all(i >= 0 and kept[i] for i in chosen.flatten().tolist())
    if family == "olmoe":  # raw probabilities: of what is left, or of all
        p = logits.softmax(-1)
        p = p / p[:, kept].sum(1, keepdim=True) if masked == "before" else p
        torch.testing.assert_close(weights, p.gather(1, chosen))
    handle.remove()
    assert torch.equal(router(x)[1], dense_weights)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_weights_come_in_the_dtype_of_the_router(family):
    model = families.build(family).to(torch.bfloat16)
    found = find_experts(model)[0]
    router = found.router(model)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    expected = router(x)[1].dtype
    assert expected == (torch.float32 if family == "mixtral" else torch.bfloat16)
    change_choice(router, RouterChange(scoring=Scoring(2), threshold=Threshold(0.5)))
    assert router(x)[1].dtype == expected


# ---- whole models


def changed_model(family="mixtral"):
    """A model whose layers are the dense experts in the factored form, one slot pruned or a threshold above."""
    model = families.build(family)
    specs = {}
    for i, found in enumerate(find_experts(model)):
        experts = found.read({name: p.detach() for name, p in found.module.named_parameters()})
        scoring, slots = found.scoring(model), found.num_experts
        change = RouterChange(scoring=scoring, threshold=Threshold(0.6, "renormalised"))
        if i == 0:
            of_slot = (0, *range(slots - 1))  # the second slot shares the first expert
            change = RouterChange((*of_slot[:-1], -1), fold=True, scoring=scoring)
            experts = type(experts)(experts.gate_up[: slots - 2], experts.down[: slots - 2])
        weights = FactoredExperts(
            num_experts=experts.num_experts,
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
            group=torch.arange(experts.num_experts, dtype=torch.int32),
            base_gate_up=experts.gate_up.clone(),
            base_down=experts.down.clone(),
        )
        specs[found.path] = layer_spec(weights, change)
        found.install(model, weights, change).pack()
    mark_as_factored(model, ResMoEQuantizer(ResMoEConfig(layers=specs), pre_quantized=True))
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_changed_model_is_what_its_parts_say():
    model = families.build("mixtral")
    found = find_experts(model)[0]
    experts = found.read({name: p.detach() for name, p in found.module.named_parameters()})
    made = changed_model()
    block, x = made.model.layers[0].mlp, torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = block(x)[0]
        router_logits = x[0] @ block.gate.weight.T
    for t in range(30):
        p = router_logits[t, :3].softmax(-1)  # the last slot is pruned
        best = sorted(range(3), key=lambda i: -p[i])[:2]
        weight = p[best] / p[best].sum()
        expected = torch.zeros(32)
        for w, slot in zip(weight, best, strict=True):
            e = (0, 0, 1)[slot]
            gate, up = (experts.gate_up[e] @ x[0, t]).chunk(2)
            expected += w * (experts.down[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(got[t], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_checkpoint_chooses_the_same(family, tmp_path):
    model = changed_model(family)
    expected = logits(model)
    assert not torch.allclose(expected, logits(families.build(family)), atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), expected)
    kept = {
        name: model.config.quantization_config.layers[name]["router"]
        for name in model.config.quantization_config.layers
    }
    assert kept == {n: s["router"] for n, s in loaded.config.quantization_config.layers.items()}
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS[:1], **settings), model.generate(TOKENS[:1], **settings))


def test_copies_choose_the_same():
    model = changed_model()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_compiled_without_a_graph_break():
    model = changed_model()
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-6)


# ---- refusals


def test_a_router_of_an_unknown_kind_is_refused_by_name():
    model = families.build("phimoe")
    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.0\.mlp\.experts: its router, a PhimoeTopKRouter, scores in a way that is not",
    ):
        find_experts(model)[0].scoring(model)


def test_no_router_beside_the_experts():
    model = families.build("mixtral")
    found = find_experts(model)[0]
    model.model.layers[0].mlp.gate = nn.Identity()
    with pytest.raises(
        ValueError, match=rf"^{found.path}: no router with 4 rows of weights beside it, so its choice can be neither"
    ):
        found.router(model)


def test_a_router_is_found_by_its_rows_and_top_k():
    class Router(nn.Linear):
        top_k = 2

    model = nn.Module()
    model.block = nn.Module()
    model.block.experts, model.block.other, model.block.gate = nn.Linear(1, 1), nn.Linear(4, 6), Router(4, 6)
    assert find_router(model, "block.experts", 6) is model.block.gate
    with pytest.raises(ValueError, match="no router with 5 rows"):
        find_router(model, "block.experts", 5)


@pytest.mark.parametrize("answer", ["two", "other"])
def test_a_router_that_answers_otherwise_is_refused(answer):
    class Router(nn.Linear):
        top_k = 2

        def forward(self, x):
            logits = super().forward(x)
            weights, slots = select(logits, Scoring(2))
            return (weights, slots) if answer == "two" else (logits, weights.square(), slots)

    with pytest.raises(ValueError, match=r"^experts: its router, a Router, scores in a way that is not known"):
        read_scoring(Router(8, 6), "experts", 6)


class HandedBias(nn.Module):
    """AFMoE's kind: the block holds the correction bias and hands it over; tokens come as (B, L, H)."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6, bias=False)

    def forward(self, hidden_states, expert_bias):
        _, _, hidden = hidden_states.shape
        logits = self.gate(hidden_states.view(-1, hidden))
        scores = logits.sigmoid()
        slots = (scores + expert_bias).topk(2, dim=-1).indices
        weights = scores.gather(1, slots)
        return logits, 3 * weights / weights.sum(-1, keepdim=True), slots


def test_a_bias_that_the_block_hands_over_is_used():
    torch.manual_seed(0)
    block = nn.Module()
    block.router, block.bias = HandedBias(), nn.Parameter(torch.linspace(1, -1, 6))
    scoring = read_scoring(block.router, "experts", 6)
    assert (scoring.score, scoring.normalised, scoring.scale) == ("sigmoid", True, 3.0)
    bias = correction_bias(block.router, block)
    assert bias is block.bias
    x = torch.randn(2, 5, 8)
    logits, weights, slots = block.router(x, block.bias)
    made_weights, made_slots = select(logits, scoring, bias=bias)
    assert torch.equal(made_slots, slots) and torch.allclose(made_weights, weights)
    assert not torch.equal(select(logits, scoring)[1], slots)  # without it others are chosen
    keep = RouterChange(expert_of_slot=(-1, 0, 1, 2, 3, 4), scoring=scoring)
    change_choice(block.router, keep)
    _, _, changed = block.router(x, block.bias)
    pruned = torch.tensor(keep.pruned_slots)
    assert torch.equal(changed, select(logits, scoring, bias=bias, pruned=pruned, left=5)[1])


def test_a_router_that_wants_something_else_is_refused():
    class Hash(nn.Linear):
        top_k = 2

        def forward(self, x, input_ids):
            return super().forward(x), None, self.table[input_ids]

    with pytest.raises(ValueError, match="its router, a Hash, scores in a way that is not known"):
        read_scoring(Hash(8, 6), "experts", 6)


def test_probabilities_are_read_as_logits_and_anything_else_is_refused():
    logits = torch.randn(5, 6)
    read = logits_in((logits.softmax(-1), None), nn.Identity(), 6)
    torch.testing.assert_close(read.softmax(-1), logits.softmax(-1))
    assert torch.equal(logits_in(logits.view(1, 5, 6), nn.Identity(), 6), logits)
    with pytest.raises(
        ValueError, match=r"Identity: a router must answer with logits of 6 experts first, got \(5, 2\)"
    ):
        logits_in((torch.zeros(5, 2), logits), nn.Identity(), 6)
