"""The method fit: what it plans is what it stores, bytes are kept to, data and bases are used where they pay."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import resmoe_kernels as rk
from resmoe_kernels.factored import MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments
from resmoe_kernels.python_ops.cli import method_for
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from tests import families
from tests.threaded_library import threads

TOKENS = (torch.arange(240).view(12, 20) * 7) % 61 + 3


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class OneLayer:
    """What plan asks of a model, with one layer of experts."""

    def __init__(self, shared: float) -> None:
        inner, hidden, count = 128, 96, 6
        up = shared * rand(1, 2 * inner, hidden, seed=0) + rand(count, 2 * inner, hidden, seed=1)
        down = shared * rand(1, hidden, inner, seed=2) + rand(count, hidden, inner, seed=3)
        self.dense = DenseExperts(up.bfloat16(), down.bfloat16())
        self.experts = [self]
        self.module = torch.nn.Module()

    def read(self, *_):
        return self.dense

    def compressed(self, statistics=None, **settings):
        method = method_named("fit", settings)
        measured = method.measure(self.dense, plan={}, statistics=statistics)
        (plan,) = method.plan(self, [0], None, False, lambda _: [measured])
        return plan, method(self.dense, plan=plan, statistics=statistics)


@pytest.mark.parametrize("size", [0.14, 0.2, 0.3])  # below 0.1203 there is no room for a base
@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_what_is_planned_is_stored_within_the_size(size, shared):
    layer = OneLayer(shared)
    plan, made = layer.compressed(size=size)
    weights, dense = made.weights, layer.dense.nbytes()
    assert plan["base"] == (shared > 0) == (weights.base_gate_up is not None)
    assert size * dense * 0.85 < weights.nbytes() <= size * dense
    assert weights.nbytes() == made.report.bytes_now <= sum(plan[m]["bytes"] for m in MATRICES) + 4 * (2 * 7 + 6)
    for matrix in MATRICES:
        if plan[matrix]["values"] is None:
            assert weights.ranks(matrix) == plan[matrix]["ranks"]
            assert str(weights.payload(f"u_{matrix}")) == "int4"
        else:
            assert str(weights.payload(f"values_{matrix}")) == plan[matrix]["values"]
    weights.check_values()
    again = FactoredExperts.from_tensors(weights.tensors(), **weights.sizes())
    lost = sum(
        float((getattr(again.materialize(), m) - getattr(layer.dense, m).float()).square().sum()) for m in MATRICES
    )
    whole = sum(float(getattr(layer.dense, m).float().square().sum()) for m in MATRICES)
    if not shared:  # else neurons are in another order
        assert made.report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    json.dumps(dataclasses.asdict(made.report))


def test_more_bytes_lose_less_and_a_base_is_left_out_where_it_does_not_pay():
    errors = {}
    for base in ("auto", "always", "never"):
        for shared in (0.0, 3.0):
            errors[base, shared] = OneLayer(shared).compressed(size=0.15, base=base)[1].report.relative_error
    assert errors["auto", 0.0] == errors["never", 0.0] <= errors["always", 0.0]
    assert errors["auto", 3.0] == errors["always", 3.0] < 0.8 * errors["never", 3.0]
    falling = [OneLayer(3.0).compressed(size=s)[1].report.relative_error for s in (0.08, 0.12, 0.2, 0.3)]
    assert falling == sorted(falling, reverse=True)


def moments(layer: OneLayer) -> LayerMoments:
    count, rows, hidden = layer.dense.gate_up.shape
    x, h = (
        rand(count, 200, 8, seed=5) @ rand(8, hidden, seed=6),
        rand(count, 200, 12, seed=7) @ rand(12, rows // 2, seed=8),
    )
    return LayerMoments(
        tokens=torch.full((count,), 200),
        mass=torch.full((count,), 50.0, dtype=torch.float64),
        gate_up=x.transpose(1, 2) @ x / 4,
        down=h.transpose(1, 2) @ h / 4,
        slope=rand(count, rows, seed=9).square(),
    )


class Stats:
    moments = True

    def __init__(self, held: LayerMoments) -> None:
        self.held = held

    def expert_moments(self) -> LayerMoments:
        return self.held


def test_what_inputs_are_not_like_is_not_paid_for():
    layer = OneLayer(0.0)
    held = moments(layer)
    _, seen = layer.compressed(Stats(held), size=0.1, base="never")
    _, blind = layer.compressed(size=0.1, base="never")

    def lost(made):
        difference = made.weights.materialize().gate_up - layer.dense.gate_up.float()
        return float(((difference @ held.gate_up) * difference).sum())

    assert lost(seen) < 0.3 * lost(blind)


def test_an_expert_without_tokens_gets_the_layers_moments():
    layer = OneLayer(0.0)
    held = moments(layer)
    for sums in (held.tokens, held.mass, held.gate_up, held.down, held.slope):
        sums[2] = 0
    _, made = layer.compressed(Stats(held), size=0.15)
    assert bool(torch.isfinite(made.weights.materialize().gate_up).all())


FITS = {
    "low rank": ("fit", {"size": 0.12, "base": "never"}),
    "low rank on a base": ("fit", {"size": 0.14, "base": "always", "rounds": 1}),
    "codes": ("fit", {"size": 0.3}),
    "resmoe": ("resmoe", {"residual": "lowrank", "retain": 0.2, "bits": 4}),
    "quantise": ("quantise", {"bits": 2}),
}


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_has_the_same_bits_with_any_number_of_threads(name, data):
    """One layer, of which tests/jobs/test_threads.py would take minutes in a checkpoint."""
    method, settings = FITS[name]
    layer, found = OneLayer(1.0), []
    statistics = Stats(moments(layer)) if data else None
    for count in (1, 3):
        with threads(count, noise=1e-3):
            if method == "fit":
                plan, made = layer.compressed(statistics, **settings)
            else:
                plan, made = None, method_named(method, settings)(layer.dense, statistics=statistics)
        forms = {m: plan[m] for m in MATRICES} if plan else None
        found.append((made.weights.tensors(), forms, dataclasses.asdict(made.report)))
    (one, *others), (other, *theirs) = found
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []
    assert others == theirs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_fitted_in_memory_runs(family):
    """Of widths so small that groups are narrower than their scales' worth: 12 bits a weight are 4 and the padding."""
    model = families.build(family)
    with torch.no_grad():
        expected = model(TOKENS).logits
    statistics = collect(DenseModel(model), TOKENS, moments="experts", progress=False)
    rk.swap_experts(model, method="fit", statistics=statistics, bits_per_weight=12.0, progress=False)
    with torch.no_grad():
        got = model(TOKENS).logits
    near = float((got - expected).square().mean() / expected.square().mean())
    assert near < 0.05


def test_a_checkpoint_of_a_size(tmp_path, repo, capsys):
    dense = repo / "examples" / "tiny-mixtral"
    text = repo / "examples" / "wikitext2-excerpt.txt"
    how = {"method": "fit", "size": 0.08, "rounds": 1, "layers": "first:1", "calibration": text}
    out = rk.compress(dense, tmp_path / "out", calibration_tokens=1024, **how)
    (layer,) = json.loads((out / "config.json").read_text())["quantization_config"]["layers"].values()
    report = layer["report"]
    assert report["bytes_now"] <= 0.08 * report["bytes_dense"]
    assert f"model.layers.0.mlp.experts: gate_up {report['form_gate_up']}" in capsys.readouterr().err
    rk.compress(dense, tmp_path / "again", calibration_tokens=1024, workers=2, **how)
    shard = "experts-00000.safetensors"
    assert (tmp_path / "again" / shard).read_bytes() == (out / shard).read_bytes()


def test_a_size_alone_asks_for_fit():
    assert method_for(["--size", "0.1"]) == method_for(["--bits-per-weight=1.5"]) == "fit"
    assert method_for(["--retain", "0.1"]) == method_for([]) == "resmoe"


BAD = {
    "size: give it or bits_per_weight": {},
    "size: give it or bits_per_weight, one": {"size": 0.1, "bits_per_weight": 2.0},
    "size: a share of the dense bytes must be in \\(0, 1\\], got 1.5": {"size": 1.5},
    "size: must be a share in \\(0, 1\\], or bytes like '6GiB' or '500MB', got 'small'": {"size": "small"},
    "bits_per_weight: must be in \\(0, 64\\], got 0": {"bits_per_weight": 0},
    "base: must be one of auto, always, never, got 'x'": {"size": 0.1, "base": "x"},
    "ridge: must be above 0 and finite, got 0": {"size": 0.1, "ridge": 0},
    "bits: fit chooses them for the size; leave bits": {"size": 0.1, "bits": 4},
    "rounds: must be at least 0, got -1": {"size": 0.1, "rounds": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_named(message):
    with pytest.raises(ValueError, match=message):
        method_named("fit", BAD[message])


def test_sizes_that_cannot_be_met_are_named():
    layer = OneLayer(0.0)
    with pytest.raises(ValueError, match=r"size: the least that these layers can be stored in is [\d,]+ bytes, got"):
        layer.compressed(size="1KB")
    with pytest.raises(ValueError, match="size: 1,000,000,000 bytes are more than the dense experts' 442,368"):
        layer.compressed(size="1GB")
    _, in_bytes = layer.compressed(size="64.8KiB")
    _, in_bits = layer.compressed(bits_per_weight=2.4)
    assert 0.9 * 64.8 * 1024 < in_bits.report.bytes_now == in_bytes.report.bytes_now <= 64.8 * 1024


def test_moments_of_other_experts_are_refused():
    held = moments(OneLayer(0.0))
    fewer = dataclasses.replace(held, **{f.name: getattr(held, f.name)[:4] for f in dataclasses.fields(held)})
    with pytest.raises(ValueError, match=r"statistics: their moments are of \(experts, I, H\) = \(4, 128, 96\)"):
        OneLayer(0.0).compressed(Stats(fewer), size=0.1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("quantise", {"bits": 2}),
        ("resmoe", {"residual": "full", "bits": 2}),
        ("resmoe", {"residual": "lowrank", "retain": 0.2, "bits": 4}),
        ("resmoe", {"residual": "lowrank", "retain": 0.2}),
    ],
)
def test_other_methods_fit_their_forms_too(method, settings):
    """With calibration: the same tensors in the same bytes, and less lost of what inputs are like."""
    layer = OneLayer(1.0)
    held = moments(layer)
    seen = method_named(method, settings)(layer.dense, statistics=Stats(held))
    blind = method_named(method, settings)(layer.dense)
    assert seen.weights.tensors().keys() == blind.weights.tensors().keys()
    assert seen.weights.payloads == blind.weights.payloads
    assert seen.weights.nbytes() <= 1.02 * blind.weights.nbytes()

    def lost(made):
        """Of what all neurons of an expert make of its inputs: their order does not matter."""
        total = 0.0
        for e in range(6):
            got, own = made.weights.materialize_matrix("gate_up", e), layer.dense.gate_up[e].float()
            half = len(own) // 2
            nearest = torch.cdist(own[:half], got[:half]).argmin(0)
            order = torch.cat([nearest, nearest + half])
            difference = got - own[order]
            total += float(((difference @ held.gate_up[e]) * difference).sum())
        return total

    assert lost(seen) < 0.8 * lost(blind)
