"""Loading factored checkpoints through transformers: with the package, without it, and from the wrong version."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from tests import families

REMOTE = Path(__file__).parent / "remote_code"


@pytest.fixture(scope="module")
def factored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("factored")
    families.build("mixtral").save_pretrained(folder / "dense")
    return rk.compress(folder / "dense", folder / "out", residual="sparse", progress=False)


@pytest.fixture
def copy(factored, tmp_path) -> Path:
    return Path(shutil.copytree(factored, tmp_path / "copy"))


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")


LOAD_WITHOUT = """
    import sys
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded")
"""


def test_without_the_package_a_load_fails_loudly(factored):
    result = run(LOAD_WITHOUT, factored)
    assert result.returncode != 0 and "loaded" not in result.stdout
    assert "ValueError" in result.stderr and "resmoe" in result.stderr.splitlines()[-1]


def test_so_does_a_checkpoint_that_was_loaded_and_saved_again(factored, tmp_path):
    AutoModelForCausalLM.from_pretrained(factored).save_pretrained(tmp_path / "again")
    assert run(LOAD_WITHOUT, tmp_path / "again").returncode != 0


def test_registration_waits_for_transformers_and_comes_in_either_order(factored):
    result = run(
        """
        import sys
        import resmoe_kernels
        assert "transformers" not in sys.modules
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.experts).__name__)
        """,
        factored,
    )
    assert result.stdout.split() == ["FactoredExpertsLayer"], result.stderr
    result = run(
        """
        import sys
        from transformers import AutoModelForCausalLM, MixtralForCausalLM
        import resmoe_kernels
        print(type(MixtralForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.experts).__name__)
        """,
        factored,
    )
    assert result.stdout.split() == ["FactoredExpertsLayer"], result.stderr


def test_the_dtype_asked_for_is_the_dtype_of_the_payload(factored):
    model = AutoModelForCausalLM.from_pretrained(factored, dtype=torch.bfloat16)
    weights = model.model.layers[0].mlp.experts.weights
    assert weights.base_gate_up.dtype == weights.values_down.dtype == torch.bfloat16
    assert weights.mask_down.dtype == weights.group.dtype == torch.int32


def test_saved_in_another_dtype_the_sizes_follow(factored, tmp_path):
    from resmoe_kernels.python_ops.cli import inspect_checkpoint

    AutoModelForCausalLM.from_pretrained(factored, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for before, after in zip(inspect_checkpoint(factored), inspect_checkpoint(tmp_path / "half"), strict=True):
        assert after["bytes_dense"] * 2 == before["bytes_dense"]
        assert after["bytes_now"] == halved.get_submodule(after["path"]).weights.nbytes() < before["bytes_now"]


def test_a_format_from_the_future_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 3, newer than the 2 this resmoe_kernels reads: upgrade"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("damage", ["one layer gone", "all layers gone"])
def test_a_config_that_describes_less_than_the_shards_hold_is_refused(copy, damage):
    from resmoe_kernels.python_ops.cli import inspect_checkpoint

    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["digests"]  # which would tell, too
    layers = config["quantization_config"]["layers"]
    layers.pop("model.layers.1.mlp.experts") if damage == "one layer gone" else layers.clear()
    (copy / "config.json").write_text(json.dumps(config))
    message = r"config\.json describes \d+ factored tensors, the shards hold 14: compress again"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(copy)


def test_the_model_without_its_head_loads_and_saves(factored, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(factored)
    part = AutoModel.from_pretrained(factored)
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert torch.equal(part(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    whole.model.save_pretrained(tmp_path / "part")
    again = AutoModel.from_pretrained(tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_layers_that_the_shards_do_not_hold_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["digests"]  # which would tell, too
    layers = config["quantization_config"]["layers"]
    layers["model.layers.9.mlp.experts"] = layers.pop("model.layers.1.mlp.experts")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"model\.layers\.9\.mlp\.experts: config\.json describes factored experts there, the shards"
    ):
        AutoModelForCausalLM.from_pretrained(copy)


def test_damaged_indices_are_refused_before_a_kernel_reads_them(copy):
    from safetensors.torch import load_file, save_file

    path = copy / "experts-00000.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.experts.mask_down"][1, 2, 0] = 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts-00000\.safetensors: does not hold what was written to it"):
        AutoModelForCausalLM.from_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["digests"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.mask_down: block layout keeps exactly 8"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_dense_model_is_not_compressed_by_loading_it(factored):
    from resmoe_kernels.python_ops.models.hf_quantizer import ResMoEConfig

    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(factored.parent / "dense", quantization_config=ResMoEConfig())


def test_compiled_without_a_graph_break(factored):
    model = AutoModelForCausalLM.from_pretrained(factored)
    layer = model.model.layers[0].mlp.experts
    x, index, weight = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    assert not any(p.requires_grad for p in layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index, weight), layer(x, index, weight))
    gradients = []
    for run_layer in (compiled, layer):  # with the backward pass in the graph
        leaf = x.clone().requires_grad_()
        run_layer(leaf, index, weight).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    with rk.backend("reference"):
        assert torch.equal(compiled(x, index, weight), layer(x, index, weight))


def test_a_layer_says_what_it_is(factored):
    layer = AutoModelForCausalLM.from_pretrained(factored).model.layers[0].mlp.experts
    assert "E=4, H=32, I=48, silu" in repr(layer) and "mask_gate_up" in repr(layer)
    assert layer.explain().startswith("resmoe::experts on cpu: cpu (")


def test_gradients_reach_the_router_through_the_layer(factored):
    model = AutoModelForCausalLM.from_pretrained(factored)
    model(**families.inputs(model)).logits.square().mean().backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.fixture
def remote_model(tmp_path, monkeypatch) -> Path:
    """A dense checkpoint whose architecture is not in transformers."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = Path(shutil.copytree(REMOTE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__")))
    auto_map = {
        "AutoConfig": "configuration_selfrouted.SelfRoutedConfig",
        "AutoModelForCausalLM": "modeling_selfrouted.SelfRoutedForCausalLM",
    }
    config = {"model_type": "self_routed", "architectures": ["SelfRoutedForCausalLM"], "auto_map": auto_map}
    (source / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(source)
    return source


def test_a_model_that_brings_its_own_code(remote_model, tmp_path):
    with pytest.raises(ValueError, match="transformers cannot build this model"):
        rk.compress(remote_model, tmp_path / "out", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(remote_model, trust_remote_code=True).eval()
    out = rk.compress(remote_model, tmp_path / "out", retain=1.0, trust_remote_code=True, progress=False)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded.layers[1].experts, FactoredExpertsLayer)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"cannot be called one by one, as this block does in training"):
        loaded.train()(ids)


# ---- weights that are somewhere else

_PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def test_layers_left_on_disk_give_the_same(factored, tmp_path):
    ids = torch.arange(20).view(1, 20)
    whole = AutoModelForCausalLM.from_pretrained(factored)
    model = AutoModelForCausalLM.from_pretrained(factored, device_map=_PLACES, offload_folder=tmp_path / "off")
    assert model.model.layers[1].mlp.experts.base_down.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)


def test_damaged_indices_are_refused_on_disk_too(copy, tmp_path):
    from safetensors.torch import load_file, save_file

    path = copy / "experts-00001.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.mask_down"][1, 2, 0] = 1
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["digests"]  # which would tell, too
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.mask_down: block layout keeps exactly 8"):
        AutoModelForCausalLM.from_pretrained(copy, device_map=_PLACES, offload_folder=tmp_path / "off")


def test_a_swap_of_what_is_offloaded_is_refused():
    model = families.build("mixtral")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.gate_up_proj: is offloaded and not in mem"):
        rk.swap_experts(model, progress=False)
    assert not any(isinstance(m, FactoredExpertsLayer) for m in model.modules())


# ---- parameters with two owners


class Adapter(torch.nn.Module):
    """As peft's on a parameter."""

    def __init__(self, shape):
        super().__init__()
        self.delta = torch.nn.Parameter(torch.full(shape, 0.1))

    def forward(self, parameter):
        return parameter + self.delta


def test_an_adapter_of_a_factor_acts_or_is_refused(factored):
    layer = AutoModelForCausalLM.from_pretrained(factored).model.layers[0].mlp.experts
    x, index, weight = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    before = layer(x, index, weight)
    adapter = Adapter(layer.base_down.shape)
    if layer.packed is not None:  # whose contents an adapter would not reach
        there = Adapter(layer.base_down.shape).to("meta")  # as peft makes it, where the parameter is
        torch.nn.utils.parametrize.register_parametrization(layer, "base_down", there)
        with pytest.raises(ValueError, match=r"^base_down: adapted while the layer is packed for the CPU's kernels"):
            layer(x, index, weight)
        torch.nn.utils.parametrize.remove_parametrizations(layer, "base_down", leave_parametrized=False)
    layer.make_differentiable(train=False)
    torch.nn.utils.parametrize.register_parametrization(layer, "base_down", adapter)
    after = layer(x, index, weight)
    assert not torch.allclose(after, before, atol=1e-4)
    after.sum().backward()
    assert adapter.delta.grad.abs().sum() > 0
    layer.differentiable = False  # unpacked only
    torch.testing.assert_close(layer(x, index, weight), after)


def test_without_its_quantization_config_nothing_loads(copy):
    """The name of its experts' implementation is one that nobody ever registers, this package included."""
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='experts_implementation="resmoe"'):
        AutoModelForCausalLM.from_pretrained(copy)


def test_what_save_pretrained_writes_is_held_against_digests_too(factored, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(factored)
    model.save_pretrained(tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    file = tmp_path / "again" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: does not hold what was written to it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
