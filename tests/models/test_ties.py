"""Experts that two modules of a model share: each becomes a layer of its own, and the model stays what it is."""

from __future__ import annotations

import pytest
import torch

import resmoe_kernels as rk
from benchmarks.families import tiny_models
from resmoe_kernels.python_ops.models.experts_module import untie
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def model():
    """DiffusionGemma: the experts of its encoder are those of its decoder."""
    config = tiny_models.tiny_config("diffusion_gemma")
    return tiny_models.build(config, tiny_models.classes_for(type(config))[0])


@pytest.mark.parametrize("layers", ["all", "first:1"])
def test_a_swap_leaves_no_tie_to_what_is_gone(model, layers, tmp_path):
    expected = tiny_models.outputs(model)
    before = len(model.all_tied_weights_keys)
    paths = rk.swap_experts(model, layers=layers, retain=1.0, progress=False)
    left = model.all_tied_weights_keys
    assert 0 < len(left) < before
    assert not [n for pair in left.items() for n in pair if n.startswith(tuple(f"{p}." for p in paths))]
    torch.testing.assert_close(tiny_models.outputs(model), expected, rtol=0, atol=1e-4)

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert [n for n, m in loaded.named_modules() if isinstance(m, FactoredExpertsLayer)] == paths
    torch.testing.assert_close(tiny_models.outputs(loaded), expected, rtol=0, atol=1e-4)


def test_only_ties_below_the_path_go(model):
    path = "model.decoder.layers.1.experts"
    gone = {t: s for t, s in model.all_tied_weights_keys.items() if s.startswith(f"{path}.")}
    kept = {t: s for t, s in model.all_tied_weights_keys.items() if t not in gone}
    assert gone
    untie(model, path)
    assert model.all_tied_weights_keys == kept
    untie(torch.nn.Linear(2, 2), path)  # not a model of transformers: nothing is tied
