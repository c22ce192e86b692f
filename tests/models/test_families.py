"""Every covered family, from dense checkpoint to factored and back: the logits say whether each step was right."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import expert_nbytes, find_experts
from tests import families

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FAMILIES = sorted(families.CONFIGS)
# Full rank keeps every singular triplet; what differs is float32 rounding through two thin products and two layers.
EXACT = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_full_rank_reproduces_the_dense_logits_through_a_checkpoint(family, tmp_path):
    model = families.build(family)
    dense = families.logits(model)
    model.save_pretrained(tmp_path / "dense")
    rk.compress(tmp_path / "dense", tmp_path / "out", retain=1.0, progress=False)

    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info  # no key missing, unexpected or mismatched
    layers = [m for m in loaded.modules() if isinstance(m, FactoredExpertsLayer)]
    assert len(layers) == len(find_experts(model)) > 0
    scale = dense.abs().max().item()
    torch.testing.assert_close(families.logits(loaded), dense, rtol=0, atol=2e-6 * max(scale, 1))

    # and back again: what save_pretrained writes is the same model, bit for bit
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    first, second = loaded.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert torch.equal(families.logits(again), families.logits(loaded))


def test_swap_in_memory_equals_the_checkpoint(family, tmp_path):
    settings = {"residual": "sparse", "retain": 0.25, "progress": False}
    model = families.build(family)
    model.save_pretrained(tmp_path / "dense")
    rk.compress(tmp_path / "dense", tmp_path / "out", **settings)
    dense_bytes = expert_nbytes(model)

    paths = rk.swap_experts(model, **settings)
    assert paths == [name for name, m in model.named_modules() if isinstance(m, FactoredExpertsLayer)]
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(families.logits(model), families.logits(loaded))
    assert expert_nbytes(model) == expert_nbytes(loaded) < dense_bytes

    # a swapped model saves as a factored checkpoint of its own
    model.save_pretrained(tmp_path / "swapped")
    assert torch.equal(families.logits(type(model).from_pretrained(tmp_path / "swapped")), families.logits(model))


def test_bytes_in_the_config_are_the_bytes_on_disk_and_in_memory(family, tmp_path):
    model = families.build(family)
    model.save_pretrained(tmp_path / "dense")
    out = rk.compress(tmp_path / "dense", tmp_path / "out", residual="sparse", sparse_layout="bitmap", progress=False)
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = type(model).from_pretrained(out)
    for path, spec in layers.items():
        on_disk = 0
        for name in spec["tensors"]:
            with safe_open(out / weight_map[f"{path}.{name}"], "pt") as file:
                tensor = file.get_tensor(f"{path}.{name}")
            on_disk += tensor.numel() * tensor.element_size()
        layer = loaded.get_submodule(path)
        in_memory = sum(p.untyped_storage().nbytes() for p in layer.parameters())
        assert spec["report"]["bytes_now"] == on_disk == in_memory == layer.weights.nbytes()


def test_generate(family, tmp_path):
    model = families.build(family)
    model.save_pretrained(tmp_path / "dense")
    rk.compress(tmp_path / "dense", tmp_path / "out", retain=1.0, progress=False)
    loaded = type(model).from_pretrained(tmp_path / "out")
    prompt = families.inputs(model)["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **settings), model.generate(prompt, **settings))
