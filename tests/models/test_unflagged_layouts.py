"""Experts stacked without flags: what is read from them is what their module computes, and their contracts are kept."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import resmoe_kernels as rk
from benchmarks.families import tiny_models
from resmoe_kernels.python_ops.models.layer_contracts import IdentityExpertsLayer, chosen_rows
from resmoe_kernels.python_ops.models.layouts import find_experts
from resmoe_kernels.python_ops.models.routing import RouterChange, Threshold
from resmoe_kernels.python_ops.models.unflagged_layouts import UnflaggedExperts

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
FAMILIES = ["dbrx", "llama4_text", "longcat_flash", "step3p7"]


def build(family):
    config = tiny_models.tiny_config(family)
    return tiny_models.build(config, tiny_models.classes_for(type(config))[0])


def swapped_layer(family, **settings):
    """The dense module of a family's first layer of experts, and the factored one in its place."""
    model = build(family)
    found = find_experts(model)[0]
    dense = found.module
    rk.swap_experts(model, layers="first:1", progress=False, **({"retain": 1.0} | settings))
    return dense, model.get_submodule(found.path)


def routing(kind, tokens, slots, generator):
    """index (T, 2) of different slots, weights (T, 2)."""
    index = torch.rand(tokens, slots, generator=generator).argsort(-1)[:, :2]
    if kind == "one expert":
        index = torch.tensor([[0, slots - 1]]).expand(tokens, 2)
    return index, torch.rand(tokens, 2, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", ["uniform", "one expert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_the_module(family, kind, tokens, generator):
    dense, layer = swapped_layer(family)
    slots = find_slots(dense)
    index, weights = routing(kind, tokens, slots, generator)
    x = torch.randn(tokens, 32, generator=generator)
    given = (x, index, weights)
    if family == "dbrx":
        given = (x.unsqueeze(0), index, weights)
    if family == "llama4_text":
        scores = torch.zeros(tokens, slots).scatter(1, index, weights)
        given = ((x * scores.T.unsqueeze(-1)).flatten(0, 1),)  # every token for every expert
    expected = dense(*given)
    got = layer(*given)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


def find_slots(module):
    return len(module.gate_up_proj) if hasattr(module, "gate_up_proj") else module.num_experts


@torch.no_grad()
def test_identity_experts_alone_give_the_token_back(generator):
    _, layer = swapped_layer("longcat_flash")
    assert isinstance(layer, IdentityExpertsLayer)
    x, index = torch.randn(3, 32, generator=generator), torch.full((3, 2), layer.first_identity)
    torch.testing.assert_close(layer(x, index, torch.full((3, 2), 0.75)), 1.5 * x)


def test_rows_of_chosen_experts():
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # 3 experts, 2 tokens
    rows, slots = chosen_rows(x, 3, 1)
    assert slots.tolist() == [[1], [0]] and rows.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    rows, slots = chosen_rows(x, 3, 2)  # one was chosen: the other slot is skipped
    assert sorted(slots[:2].flatten().tolist()) == [-1, 1] and sorted(slots[2:].flatten().tolist()) == [-1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_parts_are_the_model(family):
    model = build(family)
    expected = tiny_models.outputs(model)
    rk.swap_experts(model, method="xmoe", parts=2, progress=False)
    torch.testing.assert_close(tiny_models.outputs(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "message"), [
    ("longcat_flash", "model.layers.0.mlp.experts: some of its experts are the identity, which costs nothing, so no"),
    ("llama4_text", "model.layers.0.feed_forward.experts: its weights are on the input of experts, so no"),
])  # fmt: skip
def test_thresholds_are_refused_where_the_mass_of_weights_means_nothing(family, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rk.swap_experts(build(family), method="xmoe", threshold=0.5, progress=False)
    _, layer = swapped_layer(family)
    with pytest.raises(ValueError, match=r"^threshold: .*so none can be put on its weights; use parts$"):
        layer.change_routing(RouterChange(threshold=Threshold(0.5, over="chosen")))


def test_a_checkpoint_loads_in_another_dtype(tmp_path):
    """from_pretrained changes the default dtype and device while it builds, and the proof must not mind."""
    model = build("longcat_flash")
    rk.swap_experts(model, retain=1.0, progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert tiny_models.outputs(loaded).isfinite().all()


# ---- the proof

SIZES = [(4, 32, 24), (4, 16, 16), (3, 32, 16), (16, 16, 8), (3, 7, 5), (64, 512, 256), (5, 48, 96)]


def step3(count, hidden, inner, kind=Step3p7Experts, limit=None):
    config = SimpleNamespace(
        num_local_experts=count, hidden_size=hidden, moe_intermediate_size=inner, hidden_act="silu"
    )
    with torch.device("meta"):
        return kind(config, swiglu_limit=limit)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_module_of_any_size_is_proved_without_its_weights(sizes):
    module = step3(*sizes, limit=7.0)
    assert UnflaggedExperts.covers(module, None)
    assert UnflaggedExperts("experts", module).refusal() is None
    assert all(p.is_meta for p in module.parameters())


def test_it_is_run_with_few_neurons():
    found = UnflaggedExperts("experts", step3(8, 4096, 1024))
    assert found._small_sizes == {4096: 16, 1024: 4, 2048: 8, 8 * 1024: 8 * 4}


class Doubled(Step3p7Experts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class UpFirst(Step3p7Experts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        turned = Step3p7Experts.__new__(Step3p7Experts)
        turned.__dict__.update(self.__dict__)
        turned._parameters = dict(self._parameters)
        turned.gate_up_proj = nn.Parameter(torch.cat(self.gate_up_proj.chunk(2, 1)[::-1], 1))
        return Step3p7Experts.forward(turned, hidden_states, top_k_index, top_k_weights)


class Broken(Step3p7Experts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise KeyError("scale")


@pytest.mark.parametrize(("kind", "reason"), [
    (Doubled, "its forward computes something else than the weighted sum of its experts"),
    (UpFirst, "its forward computes something else than the weighted sum of its experts"),
    (Broken, "run with few neurons, its forward fails (KeyError: 'scale')"),
])  # fmt: skip
def test_what_computes_something_else_is_refused(kind, reason):
    block = nn.ModuleDict({"experts": step3(4, 32, 24, kind)})
    with pytest.raises(ValueError, match=f"^{re.escape(f'experts ({kind.__name__}) cannot be compressed: {reason}')}$"):
        find_experts(block)
