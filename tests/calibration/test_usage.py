"""Counting: every number against the routing it was counted from, and nothing left behind."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.python_ops.calibration.usage import Usage, count_usage
from resmoe_kernels.python_ops.methods.method import warn_of_unreached
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer, OneHotExpertsLayer
from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring
from tests import families
from tests.conftest import REPO

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("one_thread")]


def layer_of(num_experts=4, hidden=8, inner=4, layer_class=FactoredExpertsLayer):
    generator = torch.Generator().manual_seed(0)
    weights = FactoredExperts(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=inner,
        group=torch.arange(num_experts, dtype=torch.int32),
        base_gate_up=torch.randn(num_experts, 2 * inner, hidden, generator=generator),
        base_down=torch.randn(num_experts, hidden, inner, generator=generator),
    )
    return layer_class(weights, "silu")


def counted(layer, *calls):
    with count_usage(layer) as usage, torch.no_grad():
        for index, weight in calls:
            layer(torch.ones(len(index), 8), index, weight)
    (only,) = usage.values()
    return {name: getattr(only, name) for name in ("tokens", "slots", "skipped", "folded", "pairs")} | {
        "experts_per_token": only.experts_per_token
    }


INDEX = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 2, 2]])  # the 4 and the -1 name no expert


def test_an_unchanged_layer():
    once = {"tokens": 3, "slots": 9, "skipped": 3, "folded": 0, "pairs": 6, "experts_per_token": 2.0}
    assert counted(layer_of(), (INDEX, torch.rand(3, 3))) == once
    twice = counted(layer_of(), (INDEX, torch.rand(3, 3)), (INDEX[:1], torch.rand(1, 3)))
    assert twice == {"tokens": 4, "slots": 12, "skipped": 3, "folded": 0, "pairs": 9, "experts_per_token": 9 / 4}


def test_slots_pruned_and_folded():
    layer = layer_of(num_experts=2)
    layer.change_routing(RouterChange(expert_of_slot=(0, 0, 1, 1), fold=True))
    # [0, 0, 1] folds one, [1, -, -], [-, 1, 1] folds one
    got = counted(layer, (INDEX, torch.rand(3, 3)))
    assert got == {"tokens": 3, "slots": 9, "skipped": 3, "folded": 2, "pairs": 4, "experts_per_token": 4 / 3}
    layer.change_routing(RouterChange(expert_of_slot=(0, -1, 1, 1), scoring=Scoring(3)))
    got = counted(layer, (INDEX, torch.rand(3, 3)))
    assert got == {"tokens": 3, "slots": 9, "skipped": 4, "folded": 0, "pairs": 5, "experts_per_token": 5 / 3}


def test_parts_count_as_fractions():
    layer = layer_of(num_experts=4)  # two experts in two parts
    layer.change_routing(RouterChange(parts=2))
    index = torch.tensor([[0, 1], [1, -1]])
    got = counted(layer, (index, torch.rand(2, 2)))
    assert got == {"tokens": 2, "slots": 4, "skipped": 1, "folded": 0, "pairs": 6, "experts_per_token": 1.5}
    layer.change_routing(RouterChange(parts=2, part_mass=0.4), torch.zeros(4, 8))
    got = counted(layer, (index, torch.ones(2, 2)))
    assert got["pairs"] == 2 + 1 and got["experts_per_token"] == 0.75


def test_a_capacity_skips():
    layer = layer_of(layer_class=OneHotExpertsLayer)
    one_hot = torch.nn.functional.one_hot(torch.tensor([[0], [3], [3]]), 4)
    one_hot[2] = 0
    got = counted(layer, (one_hot, torch.rand(3, 1)))
    assert got == {"tokens": 3, "slots": 3, "skipped": 1, "folded": 0, "pairs": 2, "experts_per_token": 2 / 3}


def test_a_layer_no_token_came_to():
    assert math.isnan(counted(layer_of())["experts_per_token"])
    with pytest.raises(AttributeError, match="Usage has no attribute 'pears'"):
        Usage(1, "cpu").pears  # noqa: B018


def test_counting_leaves_nothing_behind_and_changes_no_result():
    model = families.build("mixtral")
    rk.swap_experts(model, method="xmoe", threshold=0.6, progress=False)
    expected = families.logits(model)
    layers = [m for m in model.modules() if isinstance(m, FactoredExpertsLayer)]
    before = [dict(vars(layer)) for layer in layers]
    with pytest.raises(KeyError), count_usage(model) as outer:
        with count_usage(model) as inner:
            assert torch.equal(families.logits(model), expected)
        families.logits(model)
        raise KeyError
    assert [dict(vars(layer)) for layer in layers] == before
    families.logits(model)
    for path, usage in outer.items():
        assert usage.tokens == 2 * inner[path].tokens == 80 and usage.pairs == 2 * inner[path].pairs > 0


def test_a_compiled_model_is_counted_without_a_graph_break():
    model = families.build("mixtral")
    rk.swap_experts(model, method="xmoe", threshold=0.6, progress=False)
    with count_usage(model) as expected:
        families.logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with count_usage(model) as usage, torch.no_grad():
        for _ in range(10):  # more often than dynamo would compile anew
            compiled(**families.inputs(model))
    assert all(u.pairs == 10 * expected[path].pairs for path, u in usage.items())


def test_work_is_that_of_the_experts_used():
    """Counted, not timed: at a small threshold the router offers four slots a token and the op gets one."""
    model = families.build("mixtral")
    rk.swap_experts(model, method="xmoe", threshold=1e-3, progress=False)
    with count_usage(model) as usage:
        families.logits(model)
    assert [(u.slots, u.pairs, u.skipped) for u in usage.values()] == [(160, 40, 120)] * 2


def test_evaluate_says_with_how_many_experts():
    folder = REPO / "examples" / "tiny-mixtral"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    how = {"text": REPO / "examples" / "wikitext2-excerpt.txt", "limit": 300, "progress": False}
    assert "experts_per_token" not in rk.evaluate(model, tokenizer, **how)
    rk.swap_experts(model, method="xmoe", threshold=1e-6, layers="last:1", progress=False)
    assert rk.evaluate(model, tokenizer, **how)["experts_per_token"] == 1
    rk.swap_experts(model, method="xmoe", parts=2, layers="first:1", progress=False)
    assert rk.evaluate(model, tokenizer, **how)["experts_per_token"] == 1.5


def test_experts_that_no_token_reached_are_named(caplog):
    warn_of_unreached("model.layers.0.mlp", torch.tensor([3, 0, 1, 0]), "they count as one token each")
    warn_of_unreached("model.layers.1.mlp", torch.tensor([3, 1]), "they count as one token each")
    (record,) = caplog.records
    assert record.getMessage() == (
        "model.layers.0.mlp: no calibration token reached experts 1, 3; they count as one token each; use more tokens"
    )
