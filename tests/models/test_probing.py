"""Modules are taken over for what they compute, not for the names of their children."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.layouts import find_experts


class Config:
    hidden_size, intermediate_size, mlp_bias, hidden_act = 12, 18, True, "silu"


class Scaled(LlamaMLP):
    """Falcon-H1's kind."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * 0.5) * self.up_proj(x))


class Cut(LlamaMLP):
    """Gemma-3n's kind: gates below the mean of their token are 0."""

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn((gate - gate.mean(-1, keepdim=True)).relu()) * self.up_proj(x))


class NeedsMore(LlamaMLP):
    def forward(self, x, mask):
        return super().forward(x) * mask


def model_of(*kinds: type[nn.Module]) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(kind(Config) for kind in kinds)
    return model


def test_the_ordinary_kind_is_found_on_meta_and_in_memory():
    assert [f.path for f in find_experts(model_of(LlamaMLP, LlamaMLP), or_ffns=True)] == ["layers.0", "layers.1"]
    with torch.device("meta"):
        model = model_of(LlamaMLP)
        assert len(find_experts(model, or_ffns=True)) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "computes something else"),
        (Cut, "computes something else"),
        (NeedsMore, r"its forward fails \(TypeError: .*missing 1 required positional argument"),
    ],
)
def test_what_computes_otherwise_is_refused_with_the_reason(kind, reason):
    with pytest.raises(ValueError, match=rf"^layers\.0 \({kind.__name__}\) cannot be compressed, nor can .*{reason}"):
        find_experts(model_of(kind, kind), or_ffns=True)


def test_beside_others_it_stays_dense_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        found = find_experts(model_of(LlamaMLP, Cut), or_ffns=True)
    assert [f.path for f in found] == ["layers.0"]
    assert "layers.1 (Cut) stays dense: its forward computes something else" in caplog.text


@pytest.mark.parametrize("kind", [LlamaMLP, Scaled])
def test_so_are_the_experts_of_a_block_that_routes_by_itself(kind):
    model = nn.Module()
    model.block = nn.Module()
    model.block.experts, model.block.moe_infer = nn.ModuleList(kind(Config) for _ in range(3)), lambda x: x
    if kind is LlamaMLP:
        assert len(find_experts(model)) == 1
        return
    with pytest.raises(ValueError, match=r"^block\.experts \(ModuleList\) cannot be compressed: its forward computes"):
        find_experts(model)


def test_a_model_with_layers_of_both_kinds_is_the_same_in_parts(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    model = LlamaForCausalLM(config).eval()
    model.model.layers[0].mlp.__class__ = Cut
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        before = model(ids).logits
        rk.swap_experts(model, method="xmoe", parts=2, progress=False)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    assert isinstance(model.model.layers[0].mlp, Cut)
