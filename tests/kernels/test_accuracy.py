"""The rule for errors itself: what it is in a case done by hand, that it holds everywhere, and that it sees faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import resmoe_kernels as rk
from resmoe_kernels.factored import FactoredExperts
from tests.accuracy import LARGEST, assert_accurate, error_in_spreads, rms_limit, spread
from tests.kernels import fuzz_experts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def on_the_reference():
    with rk.backend("reference"):
        yield


def test_every_instruction_set_stays_within_it():
    """tests/kernels/fuzz_experts.py runs 2,000 of these."""
    seen = set()
    found = fuzz_experts.failures(range(24), lambda name, dtype, *errors: seen.add((name, dtype)))
    assert found == []
    assert len(seen) == 3 * len(fuzz_experts.implementations())


def test_a_failure_is_told(monkeypatch):
    wrong = {"wrong": lambda c: rk.experts(c.x, c.index, c.weights, c.layer, c.activation) * 1.01}
    monkeypatch.setattr(fuzz_experts, "implementations", lambda: wrong)
    (line, *_) = fuzz_experts.failures(range(3), lambda *seen: None)
    assert line.startswith("case 0 on wrong: largest ")


def test_by_hand():
    """One expert, y = w D G x with the identity between: every rounding of it, written down."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(1, *shape, generator=generator).bfloat16() for shape in ((5, 7), (7, 5)))
    tensors = {"group": torch.zeros(1, dtype=torch.int32), "base_gate_up": gate_up, "base_down": down}
    layer = FactoredExperts.from_tensors(tensors, num_experts=1, hidden_size=7, intermediate_size=5, gated=False)
    x, w = torch.randn(1, 7, generator=generator).bfloat16(), 0.75
    call = (x, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), w, dtype=torch.bfloat16))
    (G,), (D,), x64 = gate_up.double().numpy(), down.double().numpy(), x[0].double().numpy()
    u, f = 2.0**-8, 2.0**-24
    z, h = G @ x64, w * G @ x64
    y = D @ h
    z_sum = f**2 * (7 + 1 + 1) * (2 * z**2 + G**2 @ x64**2)  # 7 additions to a block, it to z, a bias that is not there
    h_other = w**2 * z_sum + f**2 * (16 * (h**2 + h**2) + h**2)
    squares = D**2 @ h_other + 2 * u**2 * D**2 @ h**2  # h, and the sum of w h, as operands
    squares += 2 * u**2 * y**2  # what a pair leaves, and the output
    squares += f**2 * (5 + 1 + 2) * (2 * y**2 + D**2 @ h**2 + y**2 + D**2 @ h**2 + y**2)
    found = spread(*call, tensors, layer.sizes(), activation="identity")[0]
    np.testing.assert_allclose(found, np.sqrt(squares), rtol=1e-6)


# ---- faults: each changes the result by little, and is seen


def _without(name: str, at: slice):
    def plant(layer: FactoredExperts) -> FactoredExperts:
        tensors = {n: t.clone() for n, t in layer.tensors().items()}
        tensors[name][..., at] = 0
        return FactoredExperts.from_tensors(tensors, **layer.sizes())

    return plant


def _perturbed(share: float):
    def plant(layer: FactoredExperts) -> FactoredExperts:
        tensors = {n: t * (1 + share) if t.is_floating_point() else t for n, t in layer.tensors().items()}
        return FactoredExperts.from_tensors(tensors, **layer.sizes())

    return plant


FAULTS = {
    "last column of the base": _without("base_gate_up", slice(-1, None)),
    "last column of down": _without("base_down", slice(-1, None)),
    "last column of V": _without("v_gate_up", slice(-1, None)),
    "one row of U of down": _without("u_down", slice(3, 4)),
    "weights scaled by 2^-6": _perturbed(2.0**-6),
}


def _layer_and_call(make_layer, generator, dtype: torch.dtype) -> tuple[FactoredExperts, tuple[Tensor, Tensor, Tensor]]:
    layer = make_layer(group=[0] * 6, ranks=[16] * 6, hidden_size=128, intermediate_size=96, dtype=dtype, sparse=8)
    index = torch.rand((40, 6), generator=generator).topk(3).indices
    x = torch.randn((40, 128), generator=generator).to(dtype)
    return layer, (x, index, torch.rand(index.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(make_layer, generator, dtype, fault):
    layer, call = _layer_and_call(make_layer, generator, dtype)
    assert_accurate(rk.experts(*call, layer), *call, layer.tensors(), layer.sizes())
    wrong = rk.experts(*call, FAULTS[fault](layer))
    with pytest.raises(AssertionError, match=r"^largest error .* spreads \(allowed 3\), rms .*; worst at token \d+"):
        assert_accurate(wrong, *call, layer.tensors(), layer.sizes())


def test_float32_operands_are_told_from_tf32(make_layer, generator):
    layer, (x, index, weights) = _layer_and_call(make_layer, generator, torch.float32)
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)  # the 10 bits that TF32 keeps
    largest, rms, _ = error_in_spreads(
        rk.experts(cut, index, weights, layer), x, index, weights, layer.tensors(), layer.sizes()
    )
    assert largest > 100 * LARGEST and rms > 100 * rms_limit(len(x))


def test_rounded_router_weights_are_seen(make_layer, generator):
    layer, (x, index, weights) = _layer_and_call(make_layer, generator, torch.bfloat16)
    small = weights / 7
    got = rk.experts(x, index, small.to(torch.float8_e4m3fn).float(), layer)
    with pytest.raises(AssertionError, match=r"^largest error"):
        assert_accurate(got, x, index, small, layer.tensors(), layer.sizes())


def test_a_gate_of_a_model_is_probed_element_by_element(make_layer, generator):
    """Interleaved, element 1 of z is the factor of element 0: probed in halves it would count for another output."""
    layer, call = _layer_and_call(make_layer, generator, torch.bfloat16)

    def gate(z: np.ndarray) -> np.ndarray:
        return z[::2] * z[1::2]

    def in_halves(z: np.ndarray) -> np.ndarray:
        return z[: len(z) // 2] * z[len(z) // 2 :]

    tensors, sizes = layer.tensors(), layer.sizes()
    interleaved = spread(*call, tensors, sizes, activation="gate", gates={"gate": gate})
    assert not np.allclose(interleaved, spread(*call, tensors, sizes, activation="identity"), rtol=0.01)
    halves = spread(*call, tensors, sizes, activation="gate", gates={"gate": in_halves})
    np.testing.assert_allclose(halves, spread(*call, tensors, sizes, activation="identity"), rtol=1e-3)


def test_rounded_weights_are_allowed_for_where_they_are_asked_for(make_layer, generator):
    layer, call = _layer_and_call(make_layer, generator, torch.bfloat16)
    plain, rounded = (
        spread(*call, layer.tensors(), layer.sizes(), rounded_weights=rounded) for rounded in (False, True)
    )
    assert (rounded > plain).all() and (rounded < 3 * plain).all()
