"""The packed form: bit by bit there and back, what is refused, layers and models that hold it."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resmoe_kernels as rk
from resmoe_kernels import dispatch, ops
from resmoe_kernels.activations import register_gate
from resmoe_kernels.factored import SIZE_NAMES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.packed import PackedExperts, declines
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import expert_nbytes
from tests import families
from tests.kernels.test_experts import FORMS

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = FORMS["everything"]
CODES = FORMS["codes-full"]
PACKED = [form for form in FORMS if form != "codes-block"]  # which stays as it is, see test_declines
BITMAP = FORMS["both"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def warn_anew():
    dispatch._warn_once.cache_clear()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same(got: FactoredExperts, expected: FactoredExperts) -> None:
    """Names, sizes, shapes, dtypes and every bit."""
    assert got.sizes() == expected.sizes() and list(got.tensors()) == list(expected.tensors())
    for name, tensor in expected.tensors().items():
        other = got.tensors()[name]
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(bits(other), bits(tensor)), name


def inputs(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randint(-1, 7, (9, 3), generator=generator)
    return torch.randn((9, 45), generator=generator).to(dtype), index, torch.rand((9, 3), generator=generator)


# ---- there and back


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_unpack_gives_back_what_was_packed(make_layer, form, dtype, gated):
    weights = make_layer(**{**FORMS[form], "dtype": dtype, "gated": gated})
    packed = PackedExperts.pack(weights)
    assert_same(packed.unpack(), weights)
    assert packed.form.nbytes() == weights.nbytes() and packed.nbytes() == packed.block.numel()


@pytest.mark.parametrize("hidden_size, intermediate_size", [(1, 1), (31, 33), (32, 64), (8, 100), (130, 7)])
@pytest.mark.parametrize("sparse", [4, 16, "bitmap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_any_size(make_layer, hidden_size, intermediate_size, sparse, dtype):
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    weights = make_layer(**{**EVERYTHING, "sparse": sparse, **sizes}, dtype=dtype)
    assert_same(PackedExperts.pack(weights).unpack(), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_comes_back(make_layer, dtype):
    """NaNs with their payload and sign, infinities, subnormals, -0.0, and zeros that are stored."""
    weights = make_layer(**{**EVERYTHING, "sparse": "bitmap"}, dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    special = {2: [0x7FC1, 0x7F81, 0x7C01, 0x7E00, 1, -0x8000, 0], 4: [0x7FC00001, 0x7F800001, 1, -(2**31), 0]}
    for tensor in weights.tensors().values():
        if tensor.is_floating_point():
            flat = tensor.view(integer).view(-1)
            patterns = torch.tensor(special[dtype.itemsize], dtype=integer)
            flat[:] = patterns.repeat(-(-len(flat) // len(patterns)))[: len(flat)]
    assert_same(PackedExperts.pack(weights).unpack(), weights)
    if dtype != torch.float32:  # every one there is, also as a bias, which the block holds in float32
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
        layer = FactoredExperts(
            num_experts=64, hidden_size=1024, intermediate_size=512, bias_gate_up=every, bias_down=every.flip(0)
        )
        assert_same(PackedExperts.pack(layer).unpack(), layer)


def test_views_are_packed_as_what_they_show(make_layer):
    weights = make_layer(**EVERYTHING)
    views = {}
    for name, tensor in weights.tensors().items():
        views[name] = torch.stack([tensor, torch.ones_like(tensor)], dim=-1)[..., 0]
    packed = PackedExperts.pack(FactoredExperts.from_tensors(views, **weights.sizes()))
    assert torch.equal(packed.block, PackedExperts.pack(weights).block)


def test_the_block_does_not_depend_on_threads(make_layer):
    weights = make_layer(**{**EVERYTHING, "sparse": "bitmap"}, dtype=torch.bfloat16)
    block = PackedExperts.pack(weights).block
    torch.set_num_threads(2)  # one_thread sets it back
    again = PackedExperts.pack(weights)
    assert torch.equal(again.block, block)
    assert_same(again.unpack(), weights)


# ---- what is refused

DAMAGE: list[tuple[dict, Callable[[dict[str, Tensor]], object], str]] = [
    (EVERYTHING, lambda t: t["group"].__setitem__(3, 2), "group: entries must be in [-1, 2), got "),
    (EVERYTHING, lambda t: t["group"].__setitem__(3, -2), "group: entries must be in [-1, 2), got "),
    (EVERYTHING, lambda t: t["rank_offsets_down"].__setitem__(0, 1),
     "rank_offsets_down: must rise from 0 to 62 without falling, got "),
    (EVERYTHING, lambda t: t["rank_offsets_gate_up"].__setitem__(6, 63),
     "rank_offsets_gate_up: must rise from 0 to 62 without falling, got "),
    (EVERYTHING, lambda t: t["rank_offsets_gate_up"].__setitem__(2, 99),
     "rank_offsets_gate_up: must rise from 0 to 62 without falling, got "),
    (EVERYTHING, lambda t: t["mask_gate_up"][2, 5, 1:].bitwise_or_(1 << 13),
     "mask_gate_up: bits at columns >= 45 must be zero"),
    (EVERYTHING, lambda t: t["mask_down"][2, 5, :1].zero_(),
     "mask_down: block layout keeps exactly 8 of these 32 columns, got 0 at expert 2, row 5, word 0"),
    (EVERYTHING, lambda t: t["mask_down"][2, 5, 1:].zero_(),
     "mask_down: block layout keeps exactly 5 of these 5 columns, got 0 at expert 2, row 5, word 1"),
    (EVERYTHING, lambda t: t["values_down"][2, 5, 1, 5:].fill_(-0.0),
     "values_down: behind the 5 values of a word all must be zero, got another at expert 2, row 5, word 1"),
    (BITMAP, lambda t: t["row_offsets_down"].__setitem__(0, 1), "row_offsets_down: must rise from 0 to "),
    (BITMAP, lambda t: t["row_offsets_down"].__setitem__(-1, 2**40), "row_offsets_down: must rise from 0 to "),
    (BITMAP, lambda t: t["mask_down"][0, 0].fill_(1),  # a row that stores nothing
     "row_offsets_down: differences must equal the bits set in mask_down, row by row"),
    (CODES, lambda t: t["base_gate_up"][1, 3, -1:].fill_(16),
     "base_gate_up: codes behind the 45 of a row must be 0, got "),
    (CODES, lambda t: t["u_down"][61, -1:].fill_(128), "u_down: codes behind the 45 of a row must be 0, got "),
    (CODES, lambda t: t["v_gate_up"][0, -1:].fill_(1), "v_gate_up: codes behind the 45 of a row must be 0, got "),
    (CODES, lambda t: t["values_gate_up"][5, 73, -1:].fill_(128),
     "values_gate_up: codes behind the 45 of a row must be 0, got 4 at (5, 73, 63)"),
    (CODES, lambda t: t["scales_base_down"][0, 0].fill_(float("nan")),
     "scales_base_down: scales must be finite and at least +0, got nan at (0, 0, 0)"),
    (CODES, lambda t: t["scales_u_gate_up"][2:].fill_(float("inf")),
     "scales_u_gate_up: scales must be finite and at least +0, got inf at (2,)"),
    (CODES, lambda t: t["scales_v_down"][7, 1:].fill_(-0.0),
     "scales_v_down: scales must be finite and at least +0, got -0"),
    (CODES, lambda t: t["scales_values_down"][5, 44].fill_(-1.5),
     "scales_values_down: scales must be finite and at least +0, got -1.5 at (5, 44, 0)"),
]  # fmt: skip


@pytest.mark.parametrize("form, damage, sentence", DAMAGE, ids=[d[2].partition(" ")[0] for d in DAMAGE])
@pytest.mark.parametrize("how", ["pack", "check_values"])
def test_contents_that_lead_out_of_bounds(make_layer, form, damage, sentence, how):
    """Packing and ``check_values`` refuse the same, with the same words."""
    weights = make_layer(**form)
    damage(weights.tensors())
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        PackedExperts.pack(weights) if how == "pack" else weights.check_values()


OTHER_TENSORS: list[tuple[dict, str]] = [
    ({"group": torch.zeros(5, dtype=torch.int32)}, "pack: group must be (6,) Int contiguous, got (5,) Int"),
    ({"group": torch.zeros(6)}, "pack: group must be (6,) Int contiguous, got (6,) Float"),
    ({"group": None}, "pack: group, base_gate_up and base_down must be given together"),
    ({"base_down": torch.zeros(2, 37, 45)}, "pack: base_down must be (2, 45, 37) Float contiguous, got (2, 37, 45) "),
    ({"base_down": torch.zeros(2, 37, 45).mT}, "pack: base_down must be (2, 45, 37) Float contiguous, got (2, 45, 37) "
     "Float, not contiguous"),
    ({"u_down": None}, "pack: u_down, v_down and rank_offsets_down must be given together"),
    ({"v_down": torch.zeros(61, 37)}, "pack: v_down must be (62, 37) Float contiguous, got (61, 37) Float"),
    ({"u_gate_up": torch.zeros(62, 74).half()}, "pack: u_gate_up must be (62, 74) Float contiguous, got (62, 74) Half"),
    ({"values_down": None}, "pack: mask_down and values_down must be given together, and row_offsets_down only with "),
    ({"mask_gate_up": torch.zeros(6, 74, 1, dtype=torch.int32)}, "pack: mask_gate_up must be (6, 74, 2) Int "),
    ({"values_gate_up": torch.zeros(6, 74, 2, 33)}, "pack: values_gate_up must keep 1 to 32 of 32 columns, got 33"),
    ({"row_offsets_down": torch.zeros(9, dtype=torch.int64)}, "pack: row_offsets_down must be (271,) Long contiguous"),
    ({"bias_down": torch.zeros(6, 46)}, "pack: bias_down must be (6, 45) Float contiguous, got (6, 46) Float"),
    ({"num_experts": 0}, "pack: num_experts, hidden_size and intermediate_size must be at least 1, got 0, 45 and 37"),
    ({"factorization": "joint"}, "pack: factorization must be 'stacked', got 'joint'; the reference runs the others"),
    ({name: None for name in TENSOR_NAMES if name != "group"}, "pack: there must be a base, a low-rank or a sparse "),
]  # fmt: skip


@pytest.mark.parametrize("change, sentence", OTHER_TENSORS, ids=[next(iter(c)) for c, _ in OTHER_TENSORS])
def test_the_op_refuses_tensors_that_are_no_layer(make_layer, change, sentence):
    """FactoredExperts cannot be made of these; the op itself can be called with them."""
    weights = make_layer(**EVERYTHING)
    arguments = {name: getattr(weights, name) for name in (*TENSOR_NAMES, *SIZE_NAMES)}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        torch.ops.resmoe.pack(*{**arguments, **change}.values())


def test_the_op_refuses_float64(make_layer):
    weights = make_layer(**EVERYTHING, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^pack: weights must be bfloat16, float16 or float32, got Double$"):
        ops.pack(weights)


def _behind(block: Tensor, by: int) -> Tensor:
    return torch.cat([torch.zeros(by, dtype=torch.uint8), block])[by:]


NO_BLOCK: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cut short": (lambda b: b[:-1].clone(), "packed: must be whole, "),
    "too long": (lambda b: torch.cat([b, b[:64]]), "packed: must be whole, "),
    "empty": (lambda b: b[:0], "packed: must be a block that resmoe::pack returned, got 0 bytes of something else; "),
    "zeros": (torch.zeros_like, "packed: must be a block that resmoe::pack returned, got "),
    "misaligned": (lambda b: _behind(b, 8), "packed: must begin at a multiple of 64 bytes, got one 8 bytes behind; "),
    "another version": (
        lambda b: torch.cat([b[:8], b[8:16] + 1, b[16:]]),
        "packed: must have version 2, got 72340172838076675; pack the checkpoint's tensors again",
    ),
    "not contiguous": (
        lambda b: torch.stack([b, b], dim=1)[:, 0],
        "packed: must be (bytes,) contiguous uint8, as PackedExperts.pack makes it, got (",
    ),
    "another dtype": (
        lambda b: b.view(torch.int8),
        "packed: must be (bytes,) contiguous uint8, as PackedExperts.pack makes it, got (",
    ),
    "two dimensions": (
        lambda b: b[None],
        "packed: must be (bytes,) contiguous uint8, as PackedExperts.pack makes it, got (1, ",
    ),
}


@pytest.mark.parametrize("damage", NO_BLOCK)
@pytest.mark.parametrize("op", ["unpack", "experts"])
def test_what_is_no_block_is_refused(make_layer, generator, damage, op):
    change, sentence = NO_BLOCK[damage]
    block = change(PackedExperts.pack(make_layer(**EVERYTHING)).block)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        ops.unpack(block) if op == "unpack" else dispatch.experts_packed(*inputs(generator), block, 45, "silu")


# ---- what the kernels do not serve


def test_declines(make_layer):
    register_gate("test_packed_gate", lambda z: z)
    assert declines(make_layer(**EVERYTHING)) is None
    assert declines(make_layer(**EVERYTHING).to("meta"), "gelu_tanh") is None
    assert declines(make_layer(**CODES)) is None
    assert declines(make_layer(**FORMS["codes-block"])) == "values_gate_up of int4/32 under a mask"
    assert declines(make_layer(**EVERYTHING), "test_packed_gate") == "the gate 'test_packed_gate'"
    assert declines(make_layer(ranks=[1] * 6, factorization="separate")) == "factorization 'separate'"
    assert declines(make_layer(ranks=[1] * 6, factorization="joint")) == "factorization 'joint'"
    assert declines(make_layer(**EVERYTHING, dtype=torch.float64)) == "weights of float64"
    weights = make_layer(**EVERYTHING)
    mixed = {**weights.tensors(), "bias_down": weights.tensors()["bias_down"].bfloat16()}
    reason = "weights of several dtypes (bfloat16, float32)"
    assert declines(FactoredExperts.from_tensors(mixed, **weights.sizes())) == reason


def test_packing_needs_the_cpu_and_its_kernels(make_layer, monkeypatch):
    with pytest.raises(ValueError, match=r"^PackedExperts: weights must be on the CPU, got meta$"):
        PackedExperts.pack(make_layer(**EVERYTHING).to("meta"))
    monkeypatch.setattr(ops, "has_cpu_kernel", lambda op: False)
    with pytest.raises(ValueError, match=r"^PackedExperts: the cpu backend is not built; resmoe env says what is$"):
        PackedExperts.pack(make_layer(**EVERYTHING))
    assert not FactoredExpertsLayer(make_layer(**EVERYTHING), "silu").pack()


DECLINED: dict[str, tuple[dict, torch.dtype, str, str]] = {
    "joint": ({"ranks": [2] * 6, "factorization": "joint"}, torch.float32, "silu", "factorization 'joint'"),
    "float64": (EVERYTHING, torch.float64, "silu", "weights of float64"),
    "a gate": (EVERYTHING, torch.float32, "test_packed_gate", "the gate 'test_packed_gate'"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined_runs_on_the_reference_and_says_so_once(make_layer, generator, caplog, case):
    form, dtype, activation, reason = DECLINED[case]
    register_gate("test_packed_gate", lambda z: z.chunk(2, -1)[0])
    weights, call = make_layer(**form, dtype=dtype), inputs(generator)
    with rk.backend("reference"):
        expected = rk.experts(*call, weights, activation)
    for _ in range(2):
        assert torch.equal(rk.experts(*call, weights, activation), expected)
    (record,) = caplog.records
    assert record.name == "resmoe_kernels" and record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"resmoe_kernels: the cpu kernels do not serve {reason}; such layers run on the slow reference"
    )
    with rk.backend("cpu"), pytest.raises(ValueError, match=rf"^experts: the cpu kernels do not serve {reason}; use "):
        rk.experts(*call, weights, activation)
    if activation == "silu":
        with pytest.raises(ValueError, match=f"^PackedExperts: the CPU kernels do not serve {reason}$"):
            PackedExperts.pack(weights)


@pytest.mark.parametrize("change", ["float64 x", "a gate"])
def test_calls_that_are_declined_although_packed(make_layer, generator, caplog, change):
    register_gate("test_packed_gate", lambda z: z.chunk(2, -1)[0])
    weights, activation = make_layer(**EVERYTHING), "test_packed_gate" if change == "a gate" else "silu"
    packed, call = (
        PackedExperts.pack(weights),
        inputs(generator, torch.float64 if change == "float64 x" else torch.half),
    )
    with rk.backend("reference"):
        expected = rk.experts(*call, weights, activation)
        assert torch.equal(rk.experts(*call, packed, activation), expected)
    assert not caplog.records  # forced is not declined
    for _ in range(2):
        assert torch.equal(rk.experts(*call, packed, activation), expected)
    reason = "the gate 'test_packed_gate'" if change == "a gate" else "x of float64"
    assert [r.getMessage() for r in caplog.records] == [
        f"resmoe_kernels: the cpu kernels do not serve {reason}; such layers run on the slow reference"
    ]
    with rk.backend("cpu"), pytest.raises(ValueError, match=rf"^experts: the cpu kernels do not serve {reason}; use "):
        rk.experts(*call, packed, activation)


def test_packing_for_one_call_is_said_once(make_layer, generator, caplog):
    weights, call = make_layer(**EVERYTHING), inputs(generator)
    for _ in range(2):
        rk.experts(*call, weights)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().startswith(
        "resmoe_kernels: weights were packed for one call, which takes longer than the call; PackedExperts.pack"
    )


def test_explain(make_layer):
    register_gate("test_packed_gate", lambda z: z)
    weights, isa = make_layer(**EVERYTHING), torch.ops.resmoe.cpu_isa()
    packed = PackedExperts.pack(weights)
    assert rk.explain(packed) == f"resmoe::experts on cpu: cpu ({isa})"
    anew = "packed anew for every call, PackedExperts.pack does it once"
    assert rk.explain(weights) == f"resmoe::experts on cpu: cpu ({isa}; {anew})"
    for form in (weights, packed):
        assert rk.explain(form, "test_packed_gate") == (
            "resmoe::experts on cpu: reference (the cpu kernels do not serve the gate 'test_packed_gate')\n"
            "resmoe::expand_sparse on cpu: cpu"
        )
    with rk.backend("reference"):
        assert rk.explain(packed).splitlines()[0] == "resmoe::experts on cpu: reference (forced)"


# ---- the call


@pytest.mark.parametrize("form", ["everything", "both", "base-only", "low-rank-only"])
@pytest.mark.parametrize("x_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_or_not_is_the_same_layer(backend, make_layer, generator, form, dtype, x_dtype):
    if backend.device != "cpu" or (backend.name == "cpu" and x_dtype == torch.float64):
        pytest.skip("packed weights live on the CPU, whose kernels do not serve float64")
    weights, call = make_layer(**FORMS[form], dtype=dtype), inputs(generator, x_dtype)
    got, expected = rk.experts(*call, PackedExperts.pack(weights)), rk.experts(*call, weights)
    assert got.dtype == x_dtype and torch.equal(got, expected)


@pytest.mark.parametrize("op", ["experts_packed", "experts_packed_reference"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(make_layer, generator, op, gradients, strided):
    x, index, weights = inputs(generator)
    if strided:
        x, index, weights = x.T.contiguous().T, index.T.contiguous().T, weights[:, :1].expand(-1, 3)
    block = PackedExperts.pack(make_layer(**EVERYTHING)).block
    arguments = (x.requires_grad_(gradients), index, weights.detach().requires_grad_(gradients), block, 45, "silu")
    torch.library.opcheck(getattr(torch.ops.resmoe, op), arguments)


def test_compiled_it_is_one_opaque_op(make_layer, generator):
    packed, targets = PackedExperts.pack(make_layer(**EVERYTHING)), []

    def collect(graph: torch.fx.GraphModule, examples: list) -> Callable:
        targets.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    call = inputs(generator)
    compiled = torch.compile(lambda *call: rk.experts(*call, packed), fullgraph=True, backend=collect)
    assert torch.equal(compiled(*call), rk.experts(*call, packed))
    with rk.backend("reference"):
        assert torch.equal(compiled(*call), rk.experts(*call, packed))
    compiled(call[0].double(), *call[1:])
    reference = ["resmoe.experts_packed_reference"]
    assert targets == [["resmoe.experts_packed"], reference, reference]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_x_and_the_router_weights(make_layer, generator, compiled):
    weights, (x, index, router) = make_layer(**EVERYTHING), inputs(generator)
    packed = PackedExperts.pack(weights)

    def gradients(layer) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), router.clone().requires_grad_()]

        def run(x: Tensor, router: Tensor) -> Tensor:
            return rk.experts(x, index, router, layer)

        if compiled:
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        return torch.autograd.grad(run(*leaves).sum(), leaves)

    for got, expected in zip(gradients(packed), gradients(weights), strict=True):
        assert torch.equal(got, expected) and got.abs().sum() > 0


REFUSED: dict[str, tuple[Callable[[list], object], str]] = {
    "x": (lambda c: c.__setitem__(0, c[0][:, 1:]), "experts: x must be (T, 45) floating point, got (9, 44) float32"),
    "index": (lambda c: c.__setitem__(1, c[1].float()), "experts: top_k_index must be (9, top_k) int32 or int64, got "),
    "weights": (lambda c: c.__setitem__(2, c[2].to("meta")), "experts: top_k_weights must be on x's device cpu, got "),
    "packed": (lambda c: c.__setitem__(3, c[3].to("meta")), "experts: packed must be on x's device cpu, got meta"),
    "activation": (lambda c: c.__setitem__(5, "swish"), "activation: 'swish' is not known; known are silu, "),
}


@pytest.mark.parametrize("which", REFUSED)
@pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake-op"])
def test_wrong_arguments_are_refused(make_layer, generator, which, fake):
    change, sentence = REFUSED[which]
    call = [*inputs(generator), PackedExperts.pack(make_layer(**EVERYTHING)).block, 45, "silu"]
    change(call)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        if fake:
            with FakeTensorMode() as mode:
                torch.ops.resmoe.experts_packed(*(mode.from_tensor(c) if isinstance(c, Tensor) else c for c in call))
        else:
            dispatch.experts_packed(*call)


NO_CALL: dict[str, tuple[Callable[[list], object], str]] = {
    "x's dtype": (lambda c: c.__setitem__(0, c[0].double()),
                  "experts: x must be (T, 45) bfloat16, float16 or float32, got (9, 45) Double"),
    "x's width": (lambda c: c.__setitem__(0, c[0][:, 1:]),
                  "experts: x must be (T, 45) bfloat16, float16 or float32, got (9, 44) Float, not contiguous"),
    "index": (lambda c: c.__setitem__(1, c[1][:8]),
              "experts: top_k_index must be (9, top_k) int32 or int64, got (8, 3) Long"),
    "weights": (lambda c: c.__setitem__(2, c[2][:, :2]), "experts: top_k_weights must be (9, 3), got (9, 2) Float"),
    "hidden_size": (lambda c: c.__setitem__(4, 44),
                    "experts: hidden_size must be 45, that of the packed layer, got 44"),
    "activation": (lambda c: c.__setitem__(5, "swish"),
                   "experts: activation must be silu, gelu, gelu_tanh, relu, relu2 or identity, got 'swish'"),
}  # fmt: skip


@pytest.mark.parametrize("which", NO_CALL)
def test_the_op_refuses_what_the_wrapper_would(make_layer, generator, which):
    """The extension checks by itself: who calls the op passes no wrapper."""
    change, sentence = NO_CALL[which]
    call = [*inputs(generator), PackedExperts.pack(make_layer(**EVERYTHING)).block, 45, "silu"]
    change(call)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        torch.ops.resmoe.experts_packed(*call)


# ---- a layer that holds it


@pytest.fixture
def weights(make_layer) -> FactoredExperts:
    return make_layer(**{**EVERYTHING, "sparse": "bitmap"}, dtype=torch.bfloat16)


def copied(weights: FactoredExperts) -> FactoredExperts:
    return FactoredExperts.from_tensors({n: t.clone() for n, t in weights.tensors().items()}, **weights.sizes())


@pytest.fixture
def layer(weights) -> FactoredExpertsLayer:
    layer = FactoredExpertsLayer(copied(weights), "silu")
    assert layer.pack() and layer.pack() and layer.packed is not None
    return layer


def test_a_packed_layer_holds_the_block_and_nothing_else(layer, weights, generator):
    assert all(p.is_meta and not p.requires_grad for p in layer.parameters())
    assert not list(layer.buffers())
    described = {n: (p.shape, p.dtype) for n, p in layer.named_parameters()}
    assert described == {n: (t.shape, t.dtype) for n, t in weights.tensors().items()}
    assert_same(layer.weights, weights)
    assert layer.form.nbytes() == weights.nbytes() and layer.form.tensors()["group"].is_meta
    call = inputs(generator, torch.bfloat16)
    assert torch.equal(layer(*call), rk.experts(*call, weights))
    assert layer.explain().startswith("resmoe::experts on cpu: cpu (") and "anew" not in layer.explain()
    assert "E=6, H=45, I=37, silu" in repr(layer) and "mask_gate_up" in repr(layer)
    assert repr(layer) == repr(FactoredExpertsLayer(weights, "silu"))


def test_state_dict_is_the_checkpoint_form(layer, weights):
    state = layer.state_dict(prefix="a.")
    assert list(state) == [f"a.{n}" for n in FactoredExpertsLayer(weights, "silu").state_dict()]
    stripped = {name.removeprefix("a."): tensor for name, tensor in state.items()}
    assert_same(FactoredExperts.from_tensors(stripped, **weights.sizes()), weights)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_into_a_packed_layer(layer, weights, assign):
    changed = {n: t * 2 if t.is_floating_point() else t for n, t in weights.tensors().items()}
    assert layer.load_state_dict(changed, assign=assign).missing_keys == []
    assert layer.packed is not None and all(p.is_meta for p in layer.parameters())
    assert_same(layer.weights, FactoredExperts.from_tensors(changed, **weights.sizes()))
    with pytest.raises(RuntimeError, match="size mismatch for group"):
        layer.load_state_dict({**changed, "group": torch.zeros(7, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"^group: entries must be in \[-1, 2\), got 9 for expert 0$"):
        layer.load_state_dict({**changed, "group": torch.full((6,), 9, dtype=torch.int32)})


def test_a_refused_load_does_not_end_packing(layer, weights, generator):
    """Contents that lead out of bounds are refused by the load and by every call; the next good load is packed."""
    bad = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    bad["rank_offsets_down"][2] = 99
    sentence = "^rank_offsets_down: must rise from 0 to 62 without falling, got 99 at place 2$"
    call = inputs(generator, torch.bfloat16)
    with pytest.raises(ValueError, match=sentence):
        layer.load_state_dict(bad)
    with pytest.raises(ValueError, match=sentence):
        layer(*call)
    layer.load_state_dict(weights.tensors())
    assert layer.packed is not None
    assert_same(layer.weights, weights)


def test_emptied_and_loaded_a_layer_is_packed(layer, weights):
    """As a model that was built on meta: to_empty leaves whatever memory held, which need not be a layer."""
    layer.to("meta")
    layer._apply(lambda t: torch.full_like(t, 77, device="cpu"))  # to_empty, with what memory may have held
    assert layer.packed is None
    layer.load_state_dict(weights.tensors())
    assert layer.packed is not None
    assert_same(layer.weights, weights)


def test_moves_that_change_nothing_pack_nothing_anew(layer):
    block = layer.packed.block
    for same in (lambda: layer.to("cpu"), lambda: layer.bfloat16(), lambda: layer.to(torch.bfloat16), layer.cpu):
        assert same() is layer and layer.packed.block is block


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["to", "method"])
def test_another_dtype_is_packed_again(layer, weights, dtype, how):
    model = torch.nn.Sequential(layer)
    model.to(dtype) if how == "to" else (model.half() if dtype == torch.float16 else model.float())
    assert layer.packed is not None and layer.base_down.dtype == dtype
    assert_same(layer.weights, weights.to(dtype))


def test_a_dtype_that_is_not_served_stays_unpacked_until_it_is(layer, weights):
    layer.double()
    assert layer.packed is None and layer.base_down.device.type == "cpu"
    assert_same(layer.weights, weights.to(torch.float64))
    assert "do not serve weights of float64" in layer.explain()
    layer.float()
    assert layer.packed is not None


def test_a_layer_on_another_device_is_not_packed(layer):
    layer.to("meta")
    assert layer.packed is None and not layer.pack()


def test_a_move_to_the_default_device_is_one(layer):
    with torch.device("meta"):
        layer.to("meta")
    assert layer.packed is None


def test_a_layer_that_was_never_packed_stays_so(weights):
    assert FactoredExpertsLayer(weights, "silu").to(torch.float32).packed is None


def test_unpack_undoes_pack(layer, weights, generator):
    call = inputs(generator, torch.bfloat16)
    expected = layer(*call)
    layer.unpack()
    assert layer.packed is None and not any(p.is_meta or p.requires_grad for p in layer.parameters())
    assert_same(layer.weights, weights)
    assert torch.equal(layer(*call), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(layer, weights, generator, how):
    def saved(layer: FactoredExpertsLayer) -> FactoredExpertsLayer:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        return torch.load(file, weights_only=False)

    make = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "save": saved}[how]
    other = make(layer)
    assert other.packed.block.data_ptr() != layer.packed.block.data_ptr()
    call = inputs(generator, torch.bfloat16)
    assert torch.equal(other(*call), layer(*call))
    assert_same(other.weights, weights)


@pytest.mark.parametrize("case", DECLINED)
def test_a_layer_that_is_declined_stays_as_it_is(make_layer, case):
    form, dtype, activation, reason = DECLINED[case]
    register_gate("test_packed_gate", lambda z: z.chunk(2, -1)[0])
    weights = make_layer(**form, dtype=dtype)
    layer = FactoredExpertsLayer(weights, activation)
    assert not layer.pack() and layer.packed is None
    assert layer.weights.tensors()["u_down"].data_ptr() == weights.tensors()["u_down"].data_ptr()
    assert f"reference (the cpu kernels do not serve {reason})" in layer.explain()


def test_a_compiled_layer(layer, generator):
    call = inputs(generator, torch.bfloat16)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(*call), layer(*call))


# ---- models


@pytest.mark.parametrize("settings", [{"residual": "lowrank"}, {"residual": "sparse", "sparse_layout": "bitmap"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_and_saved_again_a_checkpoint_is_the_same(tmp_path, settings, dtype):
    model = families.build("olmoe").to(dtype)  # of which transformers renames nothing
    model.save_pretrained(tmp_path / "dense")
    out = rk.compress(tmp_path / "dense", tmp_path / "out", **settings, progress=False)
    loaded = type(model).from_pretrained(out)
    layers = [m for m in loaded.modules() if isinstance(m, FactoredExpertsLayer)]
    assert layers and all(layer.packed is not None for layer in layers)
    loaded.save_pretrained(tmp_path / "again")

    def tensors(folder) -> dict[str, Tensor]:
        return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}

    before, after = tensors(out), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(bits(tensor), bits(after[name])), name
    again, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(families.logits(again), families.logits(loaded))


def test_what_a_model_says_of_itself_does_not_depend_on_packing(tmp_path):
    model = families.build("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    rk.compress(tmp_path / "dense", tmp_path / "out", progress=False)
    packed, unpacked = (type(model).from_pretrained(tmp_path / "out") for _ in range(2))
    for module in unpacked.modules():
        if isinstance(module, FactoredExpertsLayer):
            module.unpack()
    assert packed.num_parameters() == unpacked.num_parameters()
    assert packed.get_memory_footprint() == unpacked.get_memory_footprint()
    assert expert_nbytes(packed) == expert_nbytes(unpacked)
    assert (packed.device, packed.dtype) == (unpacked.device, unpacked.dtype)
    assert list(packed.state_dict()) == list(unpacked.state_dict())
    assert packed.to("cpu") is packed and packed.requires_grad_(False) is packed


def test_a_swapped_model_is_packed():
    model = families.build("mixtral")
    paths = rk.swap_experts(model, progress=False)
    assert all(model.get_submodule(path).packed is not None for path in paths)


# ---- memory


def test_resident_memory_of_a_layer():
    """About 190 MB of base, low rank and block-sparse bfloat16: resident is what nbytes() says, not a second copy."""
    code = """
        import gc, os, torch
        from resmoe_kernels.factored import FactoredExperts
        from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer

        def resident():
            gc.collect()
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def layer(E, H, I, rank):
            t = {"group": torch.zeros(E, dtype=torch.int32)}
            for m, (N, K) in {"gate_up": (2 * I, H), "down": (H, I)}.items():
                t[f"base_{m}"] = torch.ones(1, N, K, dtype=torch.bfloat16)
                t[f"rank_offsets_{m}"] = torch.arange(0, E * rank + 1, rank, dtype=torch.int32)
                t[f"u_{m}"] = torch.ones(E * rank, N, dtype=torch.bfloat16)
                t[f"v_{m}"] = torch.ones(E * rank, K, dtype=torch.bfloat16)
                t[f"mask_{m}"] = torch.full((E, N, K // 32), 0x0F0F, dtype=torch.int32)
                t[f"values_{m}"] = torch.ones(E, N, K // 32, 8, dtype=torch.bfloat16)
            sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": I}
            return FactoredExpertsLayer(FactoredExperts.from_tensors(t, **sizes), "silu")

        layer(2, 64, 32, 16).pack()  # what the first use of everything costs
        before = resident()
        loaded = layer(24, 2048, 1024, 128)
        nbytes = loaded.weights.nbytes()
        assert loaded.pack()
        print((resident() - before) / nbytes, loaded.packed.nbytes() / nbytes, nbytes)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    held, block, nbytes = map(float, result.stdout.split())
    assert nbytes > 150e6
    assert block <= 1.001, block
    assert 0.98 <= held <= 1.05, held
