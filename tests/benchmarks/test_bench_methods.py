"""The comparison of methods: every row's settings are known, output errors are what they say, the picture is drawn."""

from __future__ import annotations

import pytest
import torch

import resmoe_kernels as rk
from benchmarks.quality import bench_methods, plot_methods
from resmoe_kernels.python_ops.methods.named import method_named
from tests import families
from tests.conftest import REPO

TOKENS = (torch.arange(60).view(3, 20) * 7) % 61 + 3


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (32, 4), (128, 8)])
def test_every_row_has_settings_its_method_knows(experts, top_k):
    rows = list(bench_methods.cases(experts, top_k))
    assert {method for _, method, _ in rows} == {"resmoe", "mc-smoe", "moe-i2", "xmoe", "xmoe+resmoe"}
    for _, method, settings in rows:
        method_named(method, settings)  # raises


def test_output_errors_are_of_the_routed_experts_alone():
    dense = families.build("deepseek_v2")
    held_out = bench_methods.HeldOut(dense, TOKENS)
    assert held_out.errors(dense) == [0.0]
    model = families.build("deepseek_v2")
    rk.swap_experts(model, residual="lowrank", retain=1.0, progress=False)
    assert held_out.errors(model)[0] < 1e-5
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.shared_experts").down_proj.weight.zero_()
    assert held_out.errors(model)[0] < 1e-5
    model = families.build("deepseek_v2")
    rk.swap_experts(model, residual="lowrank", retain=0.25, progress=False)
    assert 0.05 < held_out.errors(model)[0] < 2


def test_the_committed_rows_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    sources = [REPO / f"benchmarks/results/methods-{model}.csv" for model in ("tiny-mixtral", "tiny-deepseek")]
    plot_methods.plot(sources, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 50_000
