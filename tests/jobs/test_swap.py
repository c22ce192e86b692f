"""The swap: layouts by contract, refusals by name, activations by what they compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn import Parameter

import resmoe_kernels as rk
from resmoe_kernels.activations import POINTWISE, activate
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import SelfRoutedExperts, StackedExperts, expert_nbytes, select_layers
from tests import families

# ---- the older style: a block that routes by itself over a ModuleList of MLPs


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Routes by softmax and top-k, then hands over to ``moe_infer``: flattened pairs, as deepseek-moe-16b's code
    does, or (T, top_k), as its successor's does."""

    def __init__(self, flat: bool, hidden: int = 16, inner: int = 40, experts: int = 6, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList([MLP(hidden, inner, bias) for _ in range(experts)])
        self.shared_experts = MLP(hidden, 24, bias)
        self.flat = flat

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        weight, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        if self.flat:
            ids, weight = ids.view(-1), weight.view(-1, 1)
        return self.moe_infer(x, ids, weight).view_as(hidden) + self.shared_experts(hidden)

    @torch.no_grad()
    def moe_infer(self, x, ids, weight):
        pairs, weights = ids.reshape(-1), weight.reshape(-1)
        out = torch.zeros_like(x)
        for position, expert in enumerate(pairs.tolist()):
            token = position // (len(pairs) // len(x))
            out[token] += weights[position] * self.experts[expert](x[token])
        return out


class Model(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(**settings) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flat", [True, False])
def test_a_block_that_routes_by_itself(flat, bias):
    torch.manual_seed(0)
    model, x = Model(flat=flat, bias=bias), torch.randn(2, 5, 16)
    dense = model(x)
    assert rk.swap_experts(model, retain=1.0, progress=False) == ["layers.0.experts", "layers.1.experts"]
    assert isinstance(model.layers[1].experts, FactoredExpertsLayer)
    torch.testing.assert_close(model(x), dense, rtol=0, atol=2e-6)


def test_such_a_block_survives_copies_and_refuses_to_train():
    torch.manual_seed(0)
    model, x = Model(flat=True), torch.randn(2, 5, 16)
    rk.swap_experts(model, progress=False)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    with pytest.raises(
        ValueError, match=r"cannot be called one by one, as this block does in training: call model\.eval"
    ):
        list(model.layers[0].experts)
    with pytest.raises(ValueError, match=r"cannot be called one by one"):
        model.layers[0].experts[0]


def test_bytes_of_a_partly_compressed_model_count_its_dense_layers():
    model = Model(flat=True)
    whole = expert_nbytes(model)
    rk.swap_experts(model, layers="0", progress=False)
    factored = model.layers[0].experts.weights.nbytes()
    assert expert_nbytes(model) == factored + whole // 2


def test_without_moe_infer_a_module_list_is_refused():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([MLP(16, 24, False)])

    assert not SelfRoutedExperts.covers(Silent().experts, Silent())
    with pytest.raises(ValueError, match=r"^experts \(ModuleList\) cannot be compressed: its layout is not one"):
        rk.swap_experts(Silent())


# ---- refusals


class Stacked(nn.Module):
    """The contract of transformers 5, by hand."""

    def __init__(self, act_fn=F.silu, gated: bool = True, **flags) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.is_transposed, self.is_concatenated, self.has_bias, self.has_gate = False, True, False, gated
        self.has_post_expert_norm = False
        self.__dict__.update(flags)
        first = torch.randn(3, 48 if gated else 24, 16)
        self.register_parameter("gate_up_proj" if gated else "up_proj", Parameter(first))
        self.down_proj = Parameter(torch.randn(3, 16, 24))

    def _apply_gate(self, z):
        gate, up = z.chunk(2, -1)
        return self.act_fn(gate) * up


def holder(experts: nn.Module) -> nn.Module:
    model = nn.Module()
    model.experts = experts
    return model


def test_a_norm_after_each_expert_is_refused():
    with pytest.raises(ValueError, match=r"^experts \(Stacked\) cannot be compressed: it normalises each expert's"):
        rk.swap_experts(holder(Stacked(has_post_expert_norm=True)))


def test_parameters_nobody_knows_are_refused():
    experts = Stacked()
    experts.per_expert_scale = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameters this package does not know: per_expert_scale"):
        rk.swap_experts(holder(experts))


def test_a_family_that_is_not_covered_is_refused_by_name():
    config = transformers.JetMoeConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_key_value_heads=2, kv_channels=8, vocab_size=64
    )
    model = transformers.JetMoeForCausalLM(config)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"JetMoeParallelExperts\) cannot be compressed"):
        rk.swap_experts(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_swap_that_would_swap_nothing_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential holds no experts modules: nothing to compress"):
        rk.swap_experts(model)
    swapped = Model(flat=True)
    rk.swap_experts(swapped, progress=False)
    with pytest.raises(ValueError, match="holds no experts modules"):
        rk.swap_experts(swapped)


@pytest.mark.parametrize(("settings", "message"), [
    ({"method": "magic"}, r"method: 'magic' is not known; known are resmoe"),
    ({"retian": 0.5}, r"resmoe: unknown setting 'retian'; known are residual, retain"),
    ({"retain": 1.5}, r"retain: must be in \(0, 1\], got 1.5"),
    ({"layers": "last:9"}, r"layers: must be .* for 2 experts modules; got 'last:9'"),
])  # fmt: skip
def test_wrong_settings_change_nothing(settings, message):
    model, x = Model(flat=True), torch.randn(1, 3, 16)
    before = model(x)
    with pytest.raises(ValueError, match=message):
        rk.swap_experts(model, progress=False, **settings)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(value):
    model = Model(flat=True)
    with torch.no_grad():
        model.layers[1].experts[3].up_proj.weight[2, 5] = value
    with pytest.raises(
        ValueError, match=r"layers\.1\.experts\.3\.up_proj\.weight: all weights must be finite, got .* at \(2, 5\)"
    ):
        rk.swap_experts(model, progress=False)
    assert not any(isinstance(m, FactoredExpertsLayer) for m in model.modules())


def test_a_model_quantised_by_another_method_is_refused():
    model = holder(Stacked())
    model.config = transformers.MixtralConfig()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match=r"^Module: holds quantised weights; start from an unquantised model"):
        rk.swap_experts(model)


def test_a_shared_expert_beside_the_routed_ones_is_left_alone():
    class SomeSharedExperts(MLP):
        pass

    model = holder(Stacked())
    model.shared_experts = SomeSharedExperts(16, 24, False)
    assert rk.swap_experts(model, progress=False) == ["experts"]


# ---- layers


def test_a_second_swap_adds_to_the_first(tmp_path):
    model = families.build("mixtral")
    assert rk.swap_experts(model, layers="last:1", progress=False) == ["model.layers.1.mlp.experts"]
    assert rk.swap_experts(model, residual="sparse", progress=False) == ["model.layers.0.mlp.experts"]
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(families.logits(loaded), families.logits(model))


def test_layer_selection():
    found = [StackedExperts(str(i), Stacked()) for i in range(8)]
    assert [f.path for f in select_layers(found, "all")] == list("01234567")
    assert [f.path for f in select_layers(found, "first:2")] == ["0", "1"]
    assert [f.path for f in select_layers(found, "last:3")] == ["5", "6", "7"]
    assert [f.path for f in select_layers(found, "6,0-2")] == ["0", "1", "2", "6"]
    for wrong in ("", "some", "last:", "last:0", "first:-1", "8", "0-8", "3-1", "3-", "-3", "1,,2", "-1"):
        with pytest.raises(ValueError, match="layers: must be"):
            select_layers(found, wrong)


def test_layers_left_dense_still_run_and_load(tmp_path):
    model = families.build("mixtral")
    dense = families.logits(model)
    model.save_pretrained(tmp_path / "dense")
    rk.compress(tmp_path / "dense", tmp_path / "out", layers="last:1", retain=1.0, progress=False)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    kinds = [type(layer.mlp.experts).__name__ for layer in loaded.model.layers]
    assert kinds == ["MixtralExperts", "FactoredExpertsLayer"]
    assert loaded.config._experts_implementation != "resmoe"
    torch.testing.assert_close(families.logits(loaded), dense, rtol=0, atol=2e-6)


# ---- activations


@pytest.mark.parametrize(("act", "name"), [
    (nn.SiLU(), "silu"), (F.silu, "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.ReLU(), "relu"), (nn.Identity(), "identity"),
    *((transformers.activations.ACT2FN[a], b) for a, b in [
        ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu2", "relu2"),
        ("swish", "silu"),
    ]),
])  # fmt: skip
@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_named_by_what_they_compute(act, name, gated):
    experts = StackedExperts("experts", Stacked(act_fn=act, gated=gated))
    assert experts.activation == name in POINTWISE


def test_a_gate_of_its_own_is_registered_and_keeps_no_weights():
    class Clamped(Stacked):
        def _apply_gate(self, z):
            gate, up = z.chunk(2, -1)
            return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)

    module = Clamped(limit=7.0)
    name = StackedExperts("experts", module).activation
    assert name.startswith("Clamped(") and "limit=7.0" in name
    assert StackedExperts("experts", Clamped(limit=9.0)).activation != name
    z = torch.linspace(-20, 20, 96).view(2, 48)
    torch.testing.assert_close(activate(z, name, gated=True), module._apply_gate(z))


def test_an_unknown_pointwise_activation_is_registered():
    def snake(x):
        return x + torch.sin(x) ** 2

    z = torch.randn(4, 48)
    gated = StackedExperts("experts", Stacked(act_fn=snake)).activation
    torch.testing.assert_close(activate(z, gated, gated=True), snake(z[:, :24]) * z[:, 24:])
    plain = StackedExperts("experts", Stacked(act_fn=snake, gated=False)).activation
    torch.testing.assert_close(activate(z, plain, gated=False), snake(z))


def test_two_activations_of_one_name_stay_apart():
    first, second = (lambda x: x * x.abs()), (lambda x: x.sin())
    names = [StackedExperts("experts", Stacked(act_fn=f)).activation for f in (first, second, first)]
    assert names[0] == names[2] != names[1]
    z = torch.randn(4, 48)
    torch.testing.assert_close(activate(z, names[1], gated=True), second(z[:, :24]) * z[:, 24:])


# ---- layouts of one and the same experts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_stacked_layouts_read_alike(transposed, interleaved):
    plain = Stacked()
    first, down = plain.gate_up_proj.detach(), plain.down_proj.detach()
    if interleaved:
        first = torch.stack(first.chunk(2, 1), 2).flatten(1, 2)
    other = Stacked(is_transposed=transposed, is_concatenated=not interleaved)
    parameters = {"gate_up_proj": first, "down_proj": down}
    if transposed:
        parameters = {name: p.transpose(1, 2) for name, p in parameters.items()}
    dense = StackedExperts("experts", other).read(parameters)
    assert torch.equal(dense.gate_up, plain.gate_up_proj) and torch.equal(dense.down, plain.down_proj)
