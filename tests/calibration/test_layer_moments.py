"""Moments of each expert's inputs against plain loops; in memory, from disk and from files to the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments, MomentSums, activated, moments_nbytes
from resmoe_kernels.python_ops.calibration.statistics import Statistics, moments_file
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from tests import families
from tests.threaded_library import threads

TOKENS = (torch.arange(60).view(3, 20) * 7) % 61 + 3
KEYS = ("x", "index", "weight", "logits")
NAMES = [f.name for f in dataclasses.fields(LayerMoments)]


def routed(model, dense: DenseModel, i: int) -> dict[str, torch.Tensor]:
    """What the experts of a layer are called with while the whole model runs."""
    seen: dict[str, torch.Tensor] = {}
    hooks = dense.experts[i].watch(model, lambda *given: seen.update(zip(KEYS, given, strict=True)))
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_moments_are_what_plain_loops_say(family):
    model = families.build(family)
    dense = DenseModel(model)
    collected = collect(dense, TOKENS, moments="experts", progress=False)
    for i, found in enumerate(dense.experts):
        seen, got, experts = routed(model, dense, i), collected.layers[found.path].expert_moments(), dense.read(i)
        assert got.num_experts == experts.num_experts
        for e in range(experts.num_experts):
            pairs = [(t, s) for t, row in enumerate(seen["index"].tolist()) for s, k in enumerate(row) if k == e]
            assert int(got.tokens[e]) == len(pairs)
            gate_up, down, slopes, mass = 0.0, 0.0, torch.zeros(experts.gate_up.shape[1]).double(), 0.0
            for t, s in pairs:
                x, w = seen["x"][t].double(), float(seen["weight"][t, s])
                z = experts.gate_up[e].double() @ x
                if experts.bias_gate_up is not None:
                    z = z + experts.bias_gate_up[e].double()
                h, slope = activated(z[None], found.activation, experts.gated)
                gate_up, down = gate_up + w**2 * torch.outer(x, x), down + w**2 * torch.outer(h[0], h[0])
                slopes, mass = slopes + w**2 * slope[0].square(), mass + w**2
            if pairs:
                torch.testing.assert_close(got.gate_up[e], gate_up.float(), rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(got.down[e], down.float(), rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(got.slope[e], slopes.float(), rtol=1e-3, atol=1e-6)
                assert float(got.mass[e]) == pytest.approx(mass, rel=1e-5)
        assert moments_nbytes(experts) == sum(getattr(got, n).numel() * getattr(got, n).element_size() for n in NAMES)


@pytest.mark.parametrize("gated", [True, False])
def test_slopes_are_differences(gated):
    z = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h, slope = activated(z, "silu", gated)
    inner, step = h.shape[1], 1e-6
    for k in range(12):
        moved = z.clone()
        moved[:, k] += step
        difference = (activated(moved, "silu", gated)[0] - h) / step
        torch.testing.assert_close(slope[:, k], difference[:, k % inner], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(activated(z, "silu", gated)[1], slope)


def test_moments_go_to_files_as_they_come_and_come_back(tmp_path):
    dense = DenseModel(families.build("mixtral"))
    held = collect(dense, TOKENS, moments="experts", progress=False)
    assert all(isinstance(layer.moments, LayerMoments) for layer in held.layers.values())
    file = tmp_path / "kept.safetensors"
    collect(dense, TOKENS, moments="experts", file=file, progress=False).save(file)
    held.save(tmp_path / "other.safetensors")
    for kept in (Statistics.load(file), Statistics.load(tmp_path / "other.safetensors")):
        for path in kept.layers:
            for name in NAMES:
                got, expected = (getattr(s.layers[path].expert_moments(), name) for s in (kept, held))
                assert torch.equal(got, expected)
    Statistics.load(file).save(tmp_path / "third.safetensors")  # moments that are in files go along
    assert moments_file(tmp_path / "third.safetensors", path).is_file()
    for one in tmp_path.glob("third.moments/*"):
        one.write_bytes(b"{}")
    with pytest.raises(ValueError, match="not a file of a layer's moments"):
        Statistics.load(tmp_path / "third.safetensors").layers[path].expert_moments()
    plain = collect(dense, TOKENS, progress=False)
    with pytest.raises(ValueError, match="statistics: hold no moments of experts"):
        plain.layers[path].expert_moments()


def test_moments_follow_their_neurons():
    dense = DenseModel(families.build("mixtral"))
    moments = next(iter(collect(dense, TOKENS, moments="experts", progress=False).layers.values())).expert_moments()
    inner = moments.down.shape[1]
    orders = torch.stack(
        [torch.randperm(inner, generator=torch.Generator().manual_seed(e)) for e in range(moments.num_experts)]
    )
    moved = moments.permuted(orders)
    for e, order in enumerate(orders.tolist()):
        for a, k in enumerate(order):
            assert torch.equal(moved.down[e, a], moments.down[e, k][order])
            assert moved.slope[e, a] == moments.slope[e, k] and moved.slope[e, inner + a] == moments.slope[e, inner + k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads(dtype):
    experts = DenseModel(families.build("mixtral")).read(0)
    x, weight = torch.randn(600, experts.hidden_size), torch.rand(600)  # enough for threads to share out
    found = []
    for count in (1, 3):
        with threads(count), torch.no_grad():
            sums = MomentSums(experts, "silu")
            sums.add(0, x.to(dtype), weight)
            found.append(sums.result())
    for name in NAMES:
        assert torch.equal(*(getattr(f, name) for f in found)), name
