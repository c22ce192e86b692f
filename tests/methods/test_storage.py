"""Methods whose result is stored as codes: what is stored, what it is rounded against, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.payload import Payload
from resmoe_kernels.python_ops.methods.named import method_named, setting_defaults, setting_types
from resmoe_kernels.python_ops.solvers.rounding import Storage, requantised, rounded

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "lowrank": {"retain": 0.5},
    "block": {"residual": "sparse", "retain": 0.25},
    "bitmap": {"residual": "sparse", "sparse_layout": "bitmap"},
    "full": {"residual": "full"},
}


def dense(generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> DenseExperts:
    """Four experts, half of each shared, of 64 and 48 columns."""
    shared = [torch.randn(96, 64, generator=generator), torch.randn(64, 48, generator=generator)]
    own = [torch.randn(4, *s.shape, generator=generator) * 0.5 + s for s in shared]
    return DenseExperts(own[0].to(dtype) / 8, own[1].to(dtype) / 7)


@pytest.mark.parametrize("form", SETTINGS)
def test_resmoe_stores_codes_and_fits_the_residual_to_the_stored_base(generator, form):
    experts = dense(generator)
    settings = SETTINGS[form]
    method = method_named("resmoe", {**settings, "base_bits": 3, "residual_bits": 4, "group": 32})
    made = method(experts)
    weights = made.weights
    weights.check_values()
    stored = {name: weights.payload(name) for name in ("base_gate_up", "base_down")}
    assert set(stored.values()) == {Payload(3, 32)}
    names = ["u_gate_up", "v_down"] if form == "lowrank" else ["values_gate_up", "values_down"]
    for name in names:
        assert weights.payload(name) == Payload(4, 0 if name.startswith("u_") else 32)
    assert made.report.bytes_now == weights.nbytes() < experts.nbytes()
    assert weights.dtypes() == set()
    assert method.recorded == {**method.settings, "base_bits": 3, "residual_bits": 4, "group": 32}

    # What is lost is what the report says, and what the base lost by rounding went into the residual.
    plain = method_named(
        "resmoe",
        {**settings, "base_bits": 3, "group": 32}
        if form != "full"
        else {**settings, "base_bits": 16, "bits": 4, "group": 32},
    )(experts)
    if form == "full":
        base_error = (
            plain.weights.read("base_down", 0, torch.float32) - weights.read("base_down", 0, torch.float32)
        ).norm()
        left = weights.read("values_down", 0, torch.float32) - plain.weights.read("values_down", 0, torch.float32)
        assert base_error > 0.05 * plain.weights.read("base_down", 0, torch.float32).norm()
        assert left.norm() > 0.5 * base_error
        assert made.report.relative_error < 1.2 * plain.report.relative_error
    else:
        assert made.report.relative_error < plain.report.relative_error + 0.1


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_quantise_is_rounding_of_every_expert(generator, bits):
    experts = dense(generator, torch.float32)
    made = method_named("quantise", {"bits": bits, "group": 64})(experts)
    weights = made.weights
    assert weights.payloads == f"values_gate_up=int{bits}/64 values_down=int{bits}/64" and weights.group is None
    again = weights.materialize()
    lost = (again.gate_up - experts.gate_up).square().sum() + (again.down - experts.down).square().sum()
    whole = experts.gate_up.square().sum() + experts.down.square().sum()
    assert made.report.relative_error == pytest.approx(float((lost / whole).sqrt()), rel=1e-4)
    assert made.report.relative_error < {8: 0.01, 4: 0.11, 3: 0.2, 2: 0.37}[bits]
    # 64 and 48 columns, the second padded to 64: bytes by formula.
    assert weights.nbytes() == 4 * (96 * (64 * bits // 8 + 2) + 64 * (64 * bits // 8 + 2))


def test_bits_of_xmoe_and_of_what_follows_it(generator):
    experts = dense(generator)
    plan = {"scoring": None, "activation": "silu"}
    alone = method_named("xmoe", {"parts": 2, "split": "contiguous", "bits": 8, "group": 32})(experts, plan=plan)
    assert alone.weights.payloads == "base_gate_up=int8/32 base_down=int8/32"
    assert 0 < alone.report.relative_error < 0.01
    chain = method_named("xmoe+quantise", {"parts": 2, "split": "contiguous", "bits": 3, "group": 32})
    made = chain(experts, plan={"first": plan, "second": {}})
    assert made.weights.payloads == "values_gate_up=int3/32 values_down=int3/32" and made.weights.num_experts == 8
    assert chain.recorded["bits"] == 3


def test_floats_stay_as_they_were(generator):
    """Without bits, or with 16, nothing differs, and nothing is recorded."""
    experts = dense(generator)
    plain, sixteen = (method_named("resmoe", settings) for settings in ({}, {"bits": 16}))
    assert plain.recorded == plain.settings
    one, other = plain(experts).weights, sixteen(experts).weights
    assert one.payloads == other.payloads == ""
    assert all(torch.equal(t, other.tensors()[name]) for name, t in one.tensors().items())


def test_settings_of_storage_belong_to_every_method():
    for method in ("resmoe", "mc-smoe", "moe-i2", "xmoe", "quantise", "xmoe+quantise"):
        assert {"bits": None, "base_bits": None, "residual_bits": None, "group": 128}.items() <= setting_defaults(
            method
        ).items()
        assert setting_types(method)["bits"] == (int, type(None)) and setting_types(method)["group"] == (int,)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("resmoe", {"bits": 5}, "bits: must be one of 16, 8, 4, 3, 2, or none for floats, got 5"),
        ("resmoe", {"base_bits": 1}, "base_bits: must be one of 16, 8, 4, 3, 2, or none for floats, got 1"),
        ("resmoe", {"bits": 4, "group": 48}, "group: must be one of 32, 64, 128 columns, got 48"),
        (
            "resmoe",
            {"bits": 4, "factorization": "joint"},
            "bits: only factorization 'stacked' is stored as codes, got 'joint'",
        ),
        (
            "resmoe",
            {"residual": "full", "base_bits": 4},
            "residual: 'full' needs bits, 8, 4, 3 or 2, or residual_bits; in floats it would be larger than the layer",
        ),
        (
            "resmoe",
            {"residual": "full", "bits": 4, "budget": "error"},
            "budget: a full residual has nothing to allot, so it must be uniform, got 'error'",
        ),
        (
            "quantise",
            {},
            "bits: quantise needs 8, 4, 3 or 2, got none; floats would be the dense experts again",
        ),
        ("quantise", {"bits": 4, "base_bits": 4}, "base_bits: quantise has no base, got 4; use method='resmoe'"),
        (
            "quantise",
            {"bits": 4, "retain": 0.5},
            "quantise: unknown setting 'retain'; known are bits, base_bits, residual_bits, group",
        ),
    ],
)
def test_refused(method, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method_named(method, settings)


def test_rounding_leaves_codes_and_indices(make_layer):
    layer = make_layer(group=[0] * 6, ranks=[16] * 6, bias=True)
    once = Storage(base_bits=4, group=32).layer(layer)
    twice = Storage(bits=4, group=32).layer(once)
    assert once.payloads == "base_gate_up=int4/32 base_down=int4/32"
    assert twice.payloads.endswith("v_down=int4/32") and "u_down=int4 " in twice.payloads
    for name in ("base_gate_up", "scales_base_down", "group", "rank_offsets_down", "bias_down"):
        assert torch.equal(twice.tensors()[name], once.tensors()[name])
    direct = rounded(layer, {n: p for n in ("u_gate_up", "v_gate_up") if (p := Storage(bits=4, group=32).payload(n))})
    assert torch.equal(direct.tensors()["u_gate_up"], twice.tensors()["u_gate_up"])


@pytest.mark.parametrize("form", [{"ranks": [16] * 6}, {"sparse": 8}, {"sparse": "bitmap"}, {"full": True}], ids=str)
def test_requantised(make_layer, form):
    layer = make_layer(group=[0, 0, -1, 0, 0, 0], **form)
    eight = requantised(layer, Storage(bits=8, group=32))
    four = requantised(eight, Storage(bits=4, group=32))
    four.check_values()
    assert all(four.payload(n).bits == 4 for n in ("base_down", *(n for n in four.tensors() if n[:6] == "values")))
    whole, near, far = layer.materialize(), eight.materialize(), four.materialize()
    error = [float((w.gate_up - whole.gate_up).norm() / whole.gate_up.norm()) for w in (near, far)]
    assert error[0] < 0.02 and 0.02 < error[1] < 0.2
    if "full" in form:  # what the base lost is in the residual: the error is the residual's rounding alone
        separate = Storage(bits=4, group=32).layer(layer).materialize()
        assert error[1] < 0.9 * float((separate.gate_up - whole.gate_up).norm() / whole.gate_up.norm())
    same = requantised(four, Storage(bits=4, group=32))
    assert all(same.tensors()[name] is t for name, t in four.tensors().items())
    with pytest.raises(
        ValueError, match=r"^base_gate_up: is stored as int4/32, which has fewer bits than int8/32; ask"
    ):
        requantised(four, Storage(bits=8, group=32))
