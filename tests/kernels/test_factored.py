"""The weight form: what it refuses, what it weighs, and that its tensors mean what they are documented to."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_kernels.factored import DenseExperts, FactoredExperts
from tests.oracle import dense_experts

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = {"group": [0, 1, -1, 0, 1, 0], "ranks": [16, 0, 4, 32, 2, 8], "bias": True}
FORMS: dict[str, dict] = {
    "block": {**EVERYTHING, "sparse": 8},
    "bitmap": {**EVERYTHING, "sparse": "bitmap"},
    "separate": {**EVERYTHING, "factorization": "separate"},
    "joint": {**EVERYTHING, "factorization": "joint"},
    "joint-ungated": {**EVERYTHING, "factorization": "joint", "gated": False},
    "separate-ungated": {**EVERYTHING, "factorization": "separate", "gated": False},
    "stacked-ungated": {**EVERYTHING, "gated": False, "sparse": 16},
    "no-base": {"ranks": [16, 0, 4, 32, 2, 8]},
    "base-only": {"group": [0] * 6},
    "empty": {"group": [0] * 6, "ranks": [0] * 6, "sparse": "empty"},
    "one-matrix": {"group": [0] * 6, "ranks": [4] * 6, "sparse": 4, "only": "down"},
    "full": {**EVERYTHING, "full": True},
}
_LOW_RANK = "base_gate_up=int4/128 base_down=int8/64 u_gate_up=int3 v_gate_up=int4/32 u_down=int2 v_down=int8/32"
CODES: dict[str, dict] = {  # 45 and 37 columns: two groups of 32, the second padded, or one of 64 or 128
    "codes": {**EVERYTHING, "payloads": _LOW_RANK},
    "codes-full": {**EVERYTHING, "full": True, "payloads": f"{_LOW_RANK} values_gate_up=int3/32 values_down=int2/64"},
    "codes-only": {"full": True, "payloads": "values_gate_up=int4/32 values_down=int8/128"},
    "codes-block": {**EVERYTHING, "sparse": 8, "payloads": "values_gate_up=int4/32 values_down=int2/64"},
    "codes-wide-block": {
        "sparse": 12,
        "hidden_size": 250,
        "payloads": "values_gate_up=int3/64 values_down=int8/32",
        "num_experts": 2,
    },
    "codes-bitmap": {**EVERYTHING, "sparse": "bitmap", "payloads": "values_gate_up=int3/32 values_down=int4/128"},
    "codes-and-floats": {**EVERYTHING, "sparse": 16, "gated": False, "payloads": "base_down=int2/32 u_gate_up=int4"},
    "codes-empty": {
        "ranks": [0] * 6,
        "sparse": "empty",
        "payloads": "u_gate_up=int3 v_gate_up=int3/32 u_down=int2 values_gate_up=int3/32 values_down=int4/64",
    },
}
FORMS |= CODES


@pytest.mark.parametrize("form", FORMS)
def test_materialize_equals_the_oracle(make_layer, form):
    layer = make_layer(**FORMS[form], dtype=torch.float64)
    dense = layer.materialize(torch.float64)
    gate_up, down = dense_experts(layer.tensors(), layer.sizes())
    np.testing.assert_allclose(dense.gate_up.numpy(), gate_up, rtol=0, atol=1e-13)
    np.testing.assert_allclose(dense.down.numpy(), down, rtol=0, atol=1e-13)
    assert dense.gated == layer.gated
    for name in ("bias_gate_up", "bias_down"):
        bias = layer.tensors().get(name)
        assert (getattr(dense, name) is None) == (bias is None)
        assert bias is None or torch.equal(getattr(dense, name), bias)


def test_materialize_sums_in_the_dtype_asked_for(make_layer):
    """bfloat16 parts summed in float32, not each sum rounded to bfloat16."""
    layer = make_layer(**FORMS["block"], dtype=torch.bfloat16)
    dense = layer.materialize()
    assert dense.gate_up.dtype == torch.float32
    np.testing.assert_allclose(
        dense.gate_up.numpy(), dense_experts(layer.tensors(), layer.sizes())[0], rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_are_right_pass(make_layer, form):
    make_layer(**FORMS[form]).check_values()


@pytest.mark.parametrize("form", FORMS)
def test_from_tensors_is_the_inverse_of_tensors_and_sizes(make_layer, form):
    layer = make_layer(**FORMS[form])
    again = FactoredExperts.from_tensors(layer.tensors(), **layer.sizes())
    assert again.sizes() == layer.sizes() and list(again.tensors()) == list(layer.tensors())
    assert all(again.tensors()[n] is t for n, t in layer.tensors().items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nbytes_is_the_memory_really_held(make_layer, form, dtype):
    layer = make_layer(**FORMS[form], dtype=dtype)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.tensors().values() if t.numel()}
    assert layer.nbytes() == sum(held.values())
    assert len(held) == sum(t.numel() > 0 for t in layer.tensors().values())  # no two share memory and count twice


def test_nbytes_by_part(make_layer):
    E, H, inner, R, n, b = 6, 45, 37, 62, 8, 2
    layer = make_layer(**FORMS["block"], dtype=torch.bfloat16)
    words = E * (2 * inner * 2 + H * 2)  # 45 and 37 columns: two words a row
    assert layer.nbytes_by_part() == {
        "base": 2 * (2 * inner * H + H * inner) * b,
        "low_rank": R * (2 * inner + H + H + inner) * b,
        "sparse": words * n * b,
        "index": 4 * E + 2 * 4 * (E + 1) + 4 * words,
        "bias": E * (2 * inner + H) * b,
    }
    assert layer.nbytes() == sum(layer.nbytes_by_part().values())


def test_nbytes_by_part_of_a_bitmap(make_layer):
    layer = make_layer(sparse="bitmap", dtype=torch.float32)
    nnz = [layer.tensors()[f"values_{m}"].numel() for m in ("gate_up", "down")]
    mask = 4 * 6 * (74 * 2 + 45 * 2)
    offsets = 4 * (6 * 74 + 1) + 8 * (6 * 45 + 1)  # int32 and int64
    assert layer.nbytes_by_part() == {
        "base": 0,
        "low_rank": 0,
        "sparse": 4 * sum(nnz),
        "index": mask + offsets,
        "bias": 0,
    }


@pytest.mark.parametrize("form", FORMS)
def test_to_converts_floats_and_keeps_indices(make_layer, form):
    layer = make_layer(**FORMS[form])
    moved = layer.to(torch.bfloat16)
    assert moved.sizes() == layer.sizes()
    for name, tensor in layer.tensors().items():
        if tensor.is_floating_point():
            assert torch.equal(moved.tensors()[name], tensor.bfloat16())
        else:
            assert moved.tensors()[name].dtype == tensor.dtype and torch.equal(moved.tensors()[name], tensor)


def test_to_takes_what_tensor_to_takes(make_layer):
    layer = make_layer(**FORMS["bitmap"])
    for moved in (
        layer.to("meta"),
        layer.to(device="meta"),
        layer.to("meta", torch.float16),
        layer.to(torch.empty((), device="meta")),
    ):
        assert all(t.device.type == "meta" for t in moved.tensors().values())
        assert {t.dtype for t in moved.tensors().values() if not t.is_floating_point()} == {
            torch.int32,
            torch.int64,
        }


def test_ranks(make_layer):
    ranks = [16, 0, 4, 32, 2, 8]
    layer = make_layer(ranks=ranks)
    assert layer.ranks("gate_up") == ranks and layer.ranks("down") == ranks[::-1]
    joint = make_layer(ranks=ranks, factorization="joint")
    assert joint.ranks("gate_up") == ranks and joint.ranks("down") == ranks
    assert make_layer(group=[0] * 6).ranks("down") == [0] * 6


def test_rows_columns(make_layer):
    assert make_layer(group=[0] * 6).rows_columns("gate_up") == (74, 45)
    assert make_layer(group=[0] * 6, gated=False).rows_columns("gate_up") == (37, 45)
    assert make_layer(group=[0] * 6).rows_columns("down") == (45, 37)


# ---- what the constructor refuses

# A layer of the form, one change to its tensors or sizes, and the whole sentence.
Change = Callable[[dict[str, Tensor], dict], object]


def _set(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, sizes: tensors.__setitem__(name, value(tensors[name]))


def _drop(*names: str) -> Change:
    return lambda tensors, sizes: [tensors.pop(n) for n in names]


def _size(**changed: object) -> Change:
    return lambda tensors, sizes: sizes.update(changed)


REFUSED: list[tuple[str, Change, str | re.Pattern]] = [
    ("block", _size(num_experts=0), "num_experts: must be at least 1, got 0"),
    ("block", _size(hidden_size=-3), "hidden_size: must be at least 1, got -3"),
    ("block", _size(intermediate_size=0), "intermediate_size: must be at least 1, got 0"),
    (
        "block",
        _size(factorization="tucker"),
        "factorization: must be one of stacked, separate, joint, got 'tucker'",
    ),
    (
        "base-only",
        lambda t, s: t.clear(),
        "FactoredExperts: holds no tensor; give a base, a low-rank, a sparse or a full part",
    ),
    # Parts that come together.
    ("base-only", _drop("group"), "group: must be given together with base_gate_up"),
    ("base-only", _drop("base_gate_up", "base_down"), "base_gate_up: must be given together with group"),
    ("base-only", _drop("base_down"), "base_down: must be given together with group"),
    ("no-base", _drop("v_down"), "v_down: must be given together with u_down"),
    ("no-base", _drop("rank_offsets_gate_up"), "rank_offsets_gate_up: must be given together with u_gate_up"),
    ("joint", _drop("u_down"), "u_down: must be given together with u_gate_up"),
    ("block", _drop("values_down"), "values_down: must be given together with mask_down"),
    ("bitmap", _drop("mask_gate_up"), "mask_gate_up: must be given together with row_offsets_gate_up"),
    ("bitmap", _drop("mask_down", "values_down"), "mask_down: must be given together with row_offsets_down"),
    # A joint layer has neither, they are those of gate_up.
    (
        "joint",
        lambda t, s: t.update(v_down=torch.zeros(62, 37)),
        "v_down: the joint factorisation ties it to gate_up's, so it must be absent",
    ),
    (
        "joint",
        lambda t, s: t.update(rank_offsets_down=t["rank_offsets_gate_up"]),
        "rank_offsets_down: the joint factorisation ties it to gate_up's, so it must be absent",
    ),
    # Shapes and dtypes.
    ("block", _set("group", lambda t: t[:5]), "group: must be (6) int32, got (5,) int32"),
    ("block", _set("group", lambda t: t.long()), "group: must be (6) int32, got (6,) int64"),
    (
        "block",
        _set("base_gate_up", lambda t: t.mT),
        "base_gate_up: must be (G, 74, 45) floating point, got (2, 45, 74) float32",
    ),
    (
        "block",
        _set("base_down", lambda t: t.int()),
        "base_down: must be (2, 45, 37) floating point, got (2, 45, 37) int32",
    ),
    (
        "block",
        _set("base_down", lambda t: t[:1]),
        "base_down: must be (2, 45, 37) floating point, got (1, 45, 37) float32",
    ),
    (
        "block",
        _set("base_down", lambda t: t[0]),
        "base_down: must be (2, 45, 37) floating point, got (45, 37) float32",
    ),
    (
        "no-base",
        _set("rank_offsets_gate_up", lambda t: t[1:]),
        "rank_offsets_gate_up: must be (7) int32, got (6,) int32",
    ),
    (
        "no-base",
        _set("rank_offsets_down", lambda t: t.long()),
        "rank_offsets_down: must be (7) int32, got (7,) int64",
    ),
    (
        "no-base",
        _set("u_gate_up", lambda t: t.mT),
        "u_gate_up: must be (R, 74) floating point, got (74, 62) float32",
    ),
    (
        "no-base",
        _set("v_gate_up", lambda t: t[:61]),
        "v_gate_up: must be (62, 45) floating point, got (61, 45) float32",
    ),
    (
        "no-base",
        _set("u_down", lambda t: t[:, :44]),
        "u_down: must be (R, 45) floating point, got (62, 44) float32",
    ),
    (
        "no-base",
        _set("v_down", lambda t: t[:, :36]),
        "v_down: must be (62, 37) floating point, got (62, 36) float32",
    ),
    (
        "no-base",
        _set("u_gate_up", lambda t: t.sum()),
        "u_gate_up: must be (R, 74) floating point, got () float32",
    ),
    ("no-base", _set("u_down", lambda t: t.sum()), "u_down: must be (R, 45) floating point, got () float32"),
    (
        "separate",
        _set("u_gate_up", lambda t: torch.cat([t, t], 1)),
        "u_gate_up: must be (R, 37) floating point, got (62, 74) float32",
    ),
    (
        "joint",
        _set("v_gate_up", lambda t: t[:, :45]),
        "v_gate_up: must be (62, 90) floating point, got (62, 45) float32",
    ),
    (
        "joint-ungated",
        _set("v_gate_up", lambda t: torch.cat([t, t], 1)),
        "v_gate_up: must be (62, 45) floating point, got (62, 90) float32",
    ),
    (
        "joint",
        _set("u_down", lambda t: t[:61]),
        "u_down: must be (62, 45) floating point, got (61, 45) float32",
    ),
    (
        "block",
        _set("mask_gate_up", lambda t: t[..., :1]),
        "mask_gate_up: must be (6, 74, 2) int32, got (6, 74, 1) int32",
    ),
    (
        "block",
        _set("mask_down", lambda t: t.long()),
        "mask_down: must be (6, 45, 2) int32, got (6, 45, 2) int64",
    ),
    (
        "block",
        _set("values_gate_up", lambda t: t[..., :7]),
        "values_gate_up: block layout keeps n of 32 with n in (4, 8, 12, 16), got n = 7",
    ),
    (
        "block",
        _set("values_down", lambda t: t.flatten()),
        "values_down: must be (6, 45, 2, n) floating point, got (4320,) float32",
    ),
    (
        "bitmap",
        _set("values_down", lambda t: t[None]),
        re.compile(r"values_down: must be \(nnz\) floating point, got \(1, \d+\) float32"),
    ),
    (
        "bitmap",
        _set("row_offsets_down", lambda t: t[1:]),
        "row_offsets_down: must be (271) int32 or int64, got (270,) int64",
    ),
    (
        "bitmap",
        _set("row_offsets_down", lambda t: t.short()),
        "row_offsets_down: must be (271) int32 or int64, got (271,) int16",
    ),
    (
        "block",
        _set("bias_gate_up", lambda t: t[:, :37]),
        "bias_gate_up: must be (6, 74) floating point, got (6, 37) float32",
    ),
    (
        "block",
        _set("bias_down", lambda t: t[0]),
        "bias_down: must be (6, 45) floating point, got (45,) float32",
    ),
    # Codes.
    (
        "codes",
        _size(payloads="base_gate_up=int5/128"),
        "payload: bits must be one of 8, 4, 3, 2, got 5",
    ),
    (
        "codes",
        _size(payloads="base_gate_up=int4/48"),
        "payload: group must be one of 32, 64, 128 columns, or 0 for one scale a row, got 48",
    ),
    (
        "codes",
        _size(payloads="base_gate_up int4"),
        "payloads: must be like 'base_down=int4/128 u_down=int4', each once, got 'base_gate_up int4'",
    ),
    (
        "codes",
        _size(payloads="group=int4/128"),
        "payloads: 'group' is not stored as codes; what can be are base_gate_up, base_down, u_gate_up, v_gate_up, "
        "u_down, v_down, values_gate_up, values_down",
    ),
    (
        "codes",
        _size(payloads="base_down=int4/64 base_gate_up=int4/64"),
        "payloads: must be in the order of the form, 'base_gate_up=int4/64 base_down=int4/64', "
        "got 'base_down=int4/64 base_gate_up=int4/64'",
    ),
    (
        "codes",
        _size(factorization="separate"),
        "payloads: only the factorization 'stacked' is stored as codes, got 'separate'",
    ),
    (
        "codes-only",
        _size(payloads="base_gate_up=int4/32 values_gate_up=int4/32 values_down=int8/128"),
        "payloads: base_gate_up is int4/32 there, but the layer has no base_gate_up",
    ),
    (
        "codes",
        _size(payloads=_LOW_RANK.replace("u_down=int2", "u_down=int2/32")),
        "payloads: u_down must have one scale a rank, as int4, got int2/32",
    ),
    (
        "codes",
        _size(payloads=_LOW_RANK.replace("v_down=int8/32", "v_down=int8")),
        "payloads: v_down must have groups of 32, 64 or 128, as int4/128, got int8",
    ),
    ("codes", _drop("scales_u_down"), "scales_u_down: must be given, u_down is int2"),
    (
        "codes",
        _size(payloads=_LOW_RANK.removeprefix("base_gate_up=int4/128 ")),
        "scales_base_gate_up: must be absent, base_gate_up is not stored as codes",
    ),
    (
        "codes",
        _size(payloads=_LOW_RANK.replace("int4/128", "int2/128")),
        "base_gate_up: must be (G, 74, 32) uint8, got (2, 74, 64) uint8",
    ),
    (
        "codes",
        _set("u_gate_up", lambda t: t.to(torch.int8)),
        "u_gate_up: must be (R, 36) uint8, got (62, 36) int8",
    ),
    (
        "codes",
        _set("scales_v_gate_up", lambda t: t[:, :1]),
        "scales_v_gate_up: must be (62, 2) bfloat16, got (62, 1) bfloat16",
    ),
    (
        "codes",
        _set("scales_u_gate_up", lambda t: t.float()),
        "scales_u_gate_up: must be (62) bfloat16, got (62,) float32",
    ),
    (
        "codes-block",
        _set("values_gate_up", lambda t: t[..., :5]),
        "values_gate_up: a row of 2 words of int4/32 must be 4 (n = 4), 8 (n = 8), 12 (n = 12), 16 (n = 16) bytes, "
        "got 5",
    ),
    (
        "codes-block",
        lambda t, s: (
            s.update(payloads="values_gate_up=int3/32 values_down=int2/64"),
            t.update(values_gate_up=torch.zeros(6, 74, 12, dtype=torch.uint8)),
        ),
        "values_gate_up: a block layout of int3/32 with 2 words a row does not tell n by its bytes, 12 (n = 4), "
        "12 (n = 8), 12 (n = 12), 12 (n = 16); rows of 7 words and more do: take 2 or 4 bits, or a bitmap",
    ),
    (
        "codes-bitmap",
        _set("values_down", lambda t: t[:-1]),
        re.compile(r"values_down: codes of int4/128 must be a multiple of 16 bytes, got \d+"),
    ),
    (
        "full",
        _set("values_down", lambda t: t.mT),
        "values_down: must be (6, 45, 37) floating point, got (6, 37, 45) float32",
    ),
]


def raises_sentence(sentence: str | re.Pattern):
    """ValueError with exactly this sentence, in one line."""
    pattern = sentence.pattern if isinstance(sentence, re.Pattern) else re.escape(sentence)
    return pytest.raises(ValueError, match=f"^{pattern}$(?!\n)")


@pytest.mark.parametrize(
    "form, change, sentence",
    REFUSED,
    ids=[f"{i}-{getattr(r[2], 'pattern', r[2]).split(':')[0]}" for i, r in enumerate(REFUSED)],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_constructor_refuses(make_layer, form, change, sentence, device):
    """Shapes and dtypes alone decide, so the same sentence comes for tensors without contents."""
    layer = make_layer(**FORMS[form])
    tensors, sizes = {n: t.to(device) for n, t in layer.tensors().items()}, layer.sizes()
    change(tensors, sizes)
    tensors = {n: t.to(device) for n, t in tensors.items()}
    with raises_sentence(sentence):
        FactoredExperts.from_tensors(tensors, **sizes)


def test_unknown_names_are_refused(make_layer):
    layer = make_layer(group=[0] * 6)
    with pytest.raises(
        ValueError,
        match=r"^FactoredExperts: unknown name 'base_gate'; known are group, base_gate_up, .*scales_values_down$",
    ):
        FactoredExperts.from_tensors({**layer.tensors(), "base_gate": torch.zeros(1)}, **layer.sizes())
    with pytest.raises(ValueError, match=r"^FactoredExperts: unknown name 'top_k'"):
        FactoredExperts.from_tensors(layer.tensors(), **layer.sizes(), top_k=2)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"gate_up": torch.zeros(4, 3)},
            "DenseExperts: gate_up and down must be 3-D (E, out, in), got (4, 3) and (2, 3, 2)",
        ),
        (
            {"gate_up": torch.zeros(2, 5, 3)},
            "DenseExperts: gated gate_up must have an even number of rows (2I), got 5",
        ),
        ({"down": torch.zeros(2, 2, 3)}, "DenseExperts: down must be (2, 3, 2), got (2, 2, 3)"),
        ({"gated": False}, "DenseExperts: down must be (2, 3, 4), got (2, 3, 2)"),
        ({"bias_gate_up": torch.zeros(2, 2)}, "DenseExperts: bias_gate_up must be (2, 4), got (2, 2)"),
        ({"bias_down": torch.zeros(3)}, "DenseExperts: bias_down must be (2, 3), got (3,)"),
    ],
)
def test_dense_experts_refuse(change, sentence):
    right = {"gate_up": torch.zeros(2, 4, 3), "down": torch.zeros(2, 3, 2)}
    dense = DenseExperts(**right)
    assert (dense.num_experts, dense.hidden_size, dense.intermediate_size, dense.nbytes()) == (
        2,
        3,
        2,
        4 * (24 + 12),
    )
    with raises_sentence(sentence):
        DenseExperts(**{**right, **change})


# ---- what check_values refuses: contents that would make a kernel read out of bounds


def _at(name: str, place: tuple | int, value: float) -> Change:
    return lambda tensors, sizes: tensors[name].__setitem__(place, value)


def _flip(name: str, place: tuple, bit: int) -> Change:
    def flip(tensors: dict[str, Tensor], sizes: dict) -> None:
        tensors[name][place] ^= -(2**31) if bit == 31 else 2**bit

    return flip


def _ranks(ranks: list[int]) -> Change:
    return lambda tensors, sizes: tensors.update(rank_offsets_gate_up=torch.tensor([0, *ranks]).cumsum(0).int())


CORRUPT: list[tuple[str, Change, str | re.Pattern]] = [
    ("block", _at("group", 3, 2), "group: entries must be in [-1, 2), got [0, 1, -1, 2, 1, 0]"),
    ("block", _at("group", 0, -2), "group: entries must be in [-1, 2), got [-2, 1, -1, 0, 1, 0]"),
    (
        "no-base",
        _at("rank_offsets_gate_up", 0, 1),
        "rank_offsets_gate_up: must rise from 0 to 62 without falling, got [1, 16, 16, 20, 52, 54, 62]",
    ),
    (
        "no-base",
        _at("rank_offsets_down", 6, 63),
        "rank_offsets_down: must rise from 0 to 62 without falling, got [0, 8, 10, 42, 46, 46, 63]",
    ),
    (
        "no-base",
        _at("rank_offsets_gate_up", 2, 21),
        "rank_offsets_gate_up: must rise from 0 to 62 without falling, got [0, 16, 21, 20, 52, 54, 62]",
    ),
    (
        "joint",
        _at("rank_offsets_gate_up", 6, 61),
        "rank_offsets_gate_up: must rise from 0 to 62 without falling, got [0, 16, 16, 20, 52, 54, 61]",
    ),
    (
        "separate",
        _ranks([15, 1, 4, 32, 2, 8]),
        "rank_offsets_gate_up: 'separate' needs even ranks, got [15, 1, 4, 32, 2, 8]",
    ),
    # 45 columns are 13 bits of the second word, 37 are 5.
    ("block", _flip("mask_gate_up", (0, 0, 1), 13), "mask_gate_up: bits at columns >= 45 must be zero"),
    ("block", _flip("mask_gate_up", (5, 73, 1), 31), "mask_gate_up: bits at columns >= 45 must be zero"),
    ("bitmap", _flip("mask_down", (2, 7, 1), 5), "mask_down: bits at columns >= 37 must be zero"),
    (
        "block",
        _at("mask_gate_up", (4, 70, 0), -1),
        "mask_gate_up: block layout keeps exactly 8 of these 32 columns, got 32 at expert 4, row 70, word 0",
    ),
    (
        "block",
        _at("mask_down", (1, 2, 1), 0b1011),
        "mask_down: block layout keeps exactly 5 of these 5 columns, got 3 at expert 1, row 2, word 1",
    ),
    (
        "bitmap",
        _flip("mask_gate_up", (3, 5, 0), 4),
        "row_offsets_gate_up: differences must equal the bits set in mask_gate_up, row by row",
    ),
    (
        "bitmap",
        lambda t, s: t["row_offsets_down"][3:5].add_(1),  # still rising, but two rows trade a value
        "row_offsets_down: differences must equal the bits set in mask_down, row by row",
    ),
    (
        "bitmap",
        lambda t, s: t.update(values_gate_up=t["values_gate_up"][:-1]),
        re.compile(r"row_offsets_gate_up: must rise from 0 to \d+ without falling, got \[0, .*, \.\.\., \d+\]"),
    ),
    (
        "codes",
        _at("scales_base_down", (1, 44, 0), float("nan")),
        "scales_base_down: scales must be finite and at least +0, got nan at (1, 44, 0)",
    ),
    ("codes", _at("scales_u_down", 3, -1.0), "scales_u_down: scales must be finite and at least +0, got -1.0 at (3,)"),
    # 45 columns in groups of 32 are 64 codes of 4 bits: byte 22 holds the 45th and the 46th.
    (
        "codes",
        _at("v_gate_up", (61, 22), 0xF0),
        "v_gate_up: codes behind the 45 of a row must be 0, got 15 at (61, 45)",
    ),
    (
        "codes-full",
        _at("values_down", (5, 44, 15), 0x40),
        "values_down: codes behind the 37 of a row must be 0, got 1 at (5, 44, 63)",
    ),
    (
        "codes-block",
        _at("values_down", (1, 2, 3), 0x80),
        "values_down: behind the 5 codes of a word all must be 0, got another at expert 1, row 2, word 1",
    ),
    (
        "codes-bitmap",
        lambda t, s: t.update(values_gate_up=t["values_gate_up"][:-12]),
        re.compile(r"values_gate_up: \d+ codes of int3/32, as row_offsets_gate_up ends, are not \d+ bytes"),
    ),
    (
        "codes-bitmap",
        _at("values_down", -1, 0xF0),
        re.compile(r"values_down: codes behind the \d+ of a row must be 0, got 15 at \(\d+,\)"),
    ),
    (
        "bitmap",
        _at("row_offsets_down", 7, -5),
        re.compile(r"row_offsets_down: must rise from 0 to \d+ without falling, got \[0, .*, \.\.\., \d+\]"),
    ),
]


@pytest.mark.parametrize("form, change, sentence", CORRUPT, ids=[f"{i}-{r[0]}" for i, r in enumerate(CORRUPT)])
def test_check_values_refuses(make_layer, form, change, sentence):
    layer = make_layer(**FORMS[form])
    tensors, sizes = layer.tensors(), layer.sizes()
    change(tensors, sizes)
    corrupt = FactoredExperts.from_tensors(tensors, **sizes)  # the shapes are right
    with raises_sentence(sentence):
        corrupt.check_values()


def test_check_values_reads_rank_offsets_of_a_layer_without_rows(make_layer):
    layer = make_layer(ranks=[0] * 6)
    layer.check_values()
    layer.tensors()["rank_offsets_down"][1:] = 1
    with raises_sentence("rank_offsets_down: must rise from 0 to 0 without falling, got [0, 1, 1, 1, 1, 1, 1]"):
        layer.check_values()


def test_odd_ranks_are_refused_only_where_halves_exist(make_layer):
    """Separate without a gate has one matrix, so nothing to halve."""
    make_layer(ranks=[15, 1, 4, 32, 2, 8], factorization="separate", gated=False).check_values()
    make_layer(ranks=[15, 1, 4, 32, 2, 8]).check_values()
