"""The ops: schema, fake, compile, the sentences of their checks, and the choice of backend."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resmoe_kernels
from resmoe_kernels.activations import POINTWISE, check_activation, register_gate
from resmoe_kernels.factored import SIZE_NAMES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.ops import expand_sparse
from resmoe_kernels.sparse import pack_bitmap, pack_block

pytestmark = pytest.mark.usefixtures("one_thread")

RAGGED = [16, 0, 4, 32, 2, 8]
FORMS: dict[str, dict] = {
    "everything": {"group": [0, 1, -1, 0, 1, 0], "ranks": RAGGED, "sparse": 8, "bias": True},
    "bitmap": {"group": [0] * 6, "ranks": RAGGED, "sparse": "bitmap"},
    "base-only": {"group": [0] * 6},
    "low-rank-only": {"ranks": RAGGED},
    "joint": {"group": [0] * 6, "ranks": RAGGED, "factorization": "joint", "gated": False},
}
INDICES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "many": lambda g: torch.randint(0, 6, (9, 2), generator=g),
    "one": lambda g: torch.randint(0, 6, (1, 2), generator=g),
    "none": lambda g: torch.empty((0, 2), dtype=torch.int64),
    "sentinels": lambda g: torch.tensor([[-1, 6], [2**31 - 1, 0], [-1, -1]]),
    "int32": lambda g: torch.randint(0, 6, (9, 2), generator=g, dtype=torch.int32),
}


def flat(x: Tensor, index: Tensor, weights: Tensor, layer: FactoredExperts, activation: str = "silu") -> tuple:
    """The op's own arguments, in the order of its schema."""
    return (x, index, weights, *(getattr(layer, n) for n in (*TENSOR_NAMES, *SIZE_NAMES)), activation)


def inputs(
    index: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn((len(index), 45), generator=generator).to(dtype),
        index,
        torch.rand(index.shape, generator=generator),
    )


# ---- opcheck: schema, fake and autograd registration, and the compiled call with changing sizes


@pytest.mark.parametrize("op", ["experts", "experts_reference"])
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_experts(make_layer, generator, form, index, op):
    call = inputs(INDICES[index](generator), generator)
    torch.library.opcheck(getattr(torch.ops.resmoe, op), flat(*call, make_layer(**FORMS[form])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_experts_dtype(make_layer, generator, dtype):
    call = inputs(INDICES["many"](generator), generator, dtype)
    torch.library.opcheck(torch.ops.resmoe.experts, flat(*call, make_layer(**FORMS["everything"], dtype=dtype)))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_experts_gradients(make_layer, generator, form):
    layer = make_layer(**FORMS[form])
    x, index, weights = inputs(INDICES["sentinels"](generator), generator)
    for tensor in (x, weights, *layer.tensors().values()):
        tensor.requires_grad_(tensor.is_floating_point())
    torch.library.opcheck(torch.ops.resmoe.experts, flat(x, index, weights, layer))


def test_opcheck_experts_strided(make_layer, generator):
    """The fake must promise the strides that the real op returns, whatever those of x are."""
    x, index, weights = inputs(INDICES["many"](generator), generator)
    call = (x.T.contiguous().T, index.T.contiguous().T, weights[:, :1].expand(-1, 2))
    torch.library.opcheck(torch.ops.resmoe.experts, flat(*call, make_layer(**FORMS["everything"])))


@pytest.mark.parametrize("op", ["expand_sparse", "expand_sparse_reference"])
@pytest.mark.parametrize("width", [31, 32, 45])
@pytest.mark.parametrize("layout", ["block", "bitmap", "no-rows"])
def test_opcheck_expand_sparse(generator, layout, width, op):
    dense = torch.randn((0 if layout == "no-rows" else 5, width), generator=generator)
    arguments = (*pack_block(dense, 8), None) if layout != "bitmap" else pack_bitmap(dense, dense > 0.5)
    torch.library.opcheck(getattr(torch.ops.resmoe, op), (*arguments, width))


# ---- compile


@pytest.mark.parametrize("form", ["everything", "bitmap"])
def test_compile_breaks_no_graph(make_layer, generator, form):
    layer = make_layer(**FORMS[form])
    compiled = torch.compile(lambda *call: 2 * resmoe_kernels.experts(*call, layer), fullgraph=True, backend="eager")
    for index in ("many", "sentinels", "one", "none"):
        call = inputs(INDICES[index](generator), generator)
        assert torch.equal(compiled(*call), 2 * resmoe_kernels.experts(*call, layer))


def test_compile_keeps_the_layer_one_opaque_op(make_layer, generator):
    layer, graphs = make_layer(**FORMS["everything"]), []

    def collect(graph: torch.fx.GraphModule, examples: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    call = inputs(INDICES["many"](generator), generator)
    torch.compile(lambda *call: resmoe_kernels.experts(*call, layer), fullgraph=True, backend=collect)(*call)
    (graph,) = graphs
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == ["resmoe.experts"]


def test_compiled_call_follows_the_backend(make_layer, generator):
    """A graph compiled for one backend must not answer for another."""
    layer, targets = make_layer(**FORMS["base-only"]), []

    def collect(graph: torch.fx.GraphModule, examples: list) -> Callable:
        targets.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    call = inputs(INDICES["many"](generator), generator)
    compiled = torch.compile(lambda *call: resmoe_kernels.experts(*call, layer), fullgraph=True, backend=collect)
    compiled(*call)
    with resmoe_kernels.backend("reference"):
        compiled(*call)
    compiled(*call)
    assert targets == [["resmoe.experts"], ["resmoe.experts_reference"]]


@pytest.mark.parametrize("form", ["everything", "bitmap"])
def test_compile_traces_the_backward_pass(make_layer, generator, form):
    """Forward and backward are traced ahead of time: the backward op must be as opaque as the forward op."""
    layer = make_layer(**FORMS[form])
    x, index, weights = inputs(INDICES["sentinels"](generator), generator)
    values = layer.tensors()["values_down"]

    def gradients(experts: Callable) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weights, values)]
        return torch.autograd.grad(experts(*leaves).square().sum(), leaves)

    def experts(x: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        changed = FactoredExperts.from_tensors({**layer.tensors(), "values_down": values}, **layer.sizes())
        return resmoe_kernels.experts(x, index, weights, changed)

    compiled = gradients(torch.compile(experts, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(got, expected) for got, expected in zip(compiled, gradients(experts), strict=True))


# ---- fakes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_experts(make_layer, generator, form, dtype):
    layer, call = make_layer(**FORMS[form]), inputs(INDICES["many"](generator), generator, dtype)
    with FakeTensorMode() as mode:
        fake_layer = FactoredExperts.from_tensors(
            {n: mode.from_tensor(t) for n, t in layer.tensors().items()}, **layer.sizes()
        )
        output = resmoe_kernels.experts(*(mode.from_tensor(t) for t in call), fake_layer)
    assert (output.shape, output.dtype, output.stride()) == ((9, 45), dtype, (45, 1))


def test_meta_experts(make_layer, generator):
    """A model built on the meta device runs through to learn its shapes."""
    layer, call = make_layer(**FORMS["everything"]).to("meta"), inputs(INDICES["many"](generator), generator)
    output = resmoe_kernels.experts(*(t.to("meta") for t in call), layer)
    assert output.device.type == "meta" and output.shape == (9, 45)


# ---- what the checks refuse, in eager mode and with fake tensors alike

Call = dict[str, Tensor]
REFUSED: list[tuple[Callable[[Call], Tensor], str, str]] = [
    (lambda c: c["x"][0], "x", "experts: x must be (T, 45) floating point, got (45,) float32"),
    (lambda c: c["x"][:, :44], "x", "experts: x must be (T, 45) floating point, got (9, 44) float32"),
    (lambda c: c["x"][None], "x", "experts: x must be (T, 45) floating point, got (1, 9, 45) float32"),
    (lambda c: c["x"].int(), "x", "experts: x must be (T, 45) floating point, got (9, 45) int32"),
    (lambda c: c["i"][:8], "i", "experts: top_k_index must be (9, top_k) int32 or int64, got (8, 2) int64"),
    (lambda c: c["i"][:, 0], "i", "experts: top_k_index must be (9, top_k) int32 or int64, got (9,) int64"),
    (
        lambda c: c["i"].float(),
        "i",
        "experts: top_k_index must be (9, top_k) int32 or int64, got (9, 2) float32",
    ),
    (
        lambda c: c["i"].to(torch.uint8),
        "i",
        "experts: top_k_index must be (9, top_k) int32 or int64, got (9, 2) uint8",
    ),
    (
        lambda c: c["w"][:, :1],
        "w",
        "experts: top_k_weights must be (9, 2) floating point, got (9, 1) float32",
    ),
    (lambda c: c["w"].long(), "w", "experts: top_k_weights must be (9, 2) floating point, got (9, 2) int64"),
    (lambda c: c["i"].to("meta"), "i", "experts: top_k_index must be on x's device cpu, got meta"),
    (lambda c: c["w"].to("meta"), "w", "experts: top_k_weights must be on x's device cpu, got meta"),
]


@pytest.mark.parametrize("change, name, sentence", REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)])
@pytest.mark.parametrize("how", ["eager", "fake", "fake-op"])
def test_experts_refuses(make_layer, generator, change, name, sentence, how):
    """``fake-op`` calls the op itself, as a trace does: wrapper and fake hold the same check."""
    layer = make_layer(**FORMS["everything"])
    call = dict(zip("xiw", inputs(INDICES["many"](generator), generator), strict=True))
    call[name] = change(call)
    expected = pytest.raises(ValueError, match=f"^{re.escape(sentence)}$")
    if how == "eager":
        with expected:
            resmoe_kernels.experts(call["x"], call["i"], call["w"], layer)
        return
    with FakeTensorMode() as mode, expected:
        x, i, w = (mode.from_tensor(call[n]) for n in "xiw")
        fake = FactoredExperts.from_tensors(
            {n: mode.from_tensor(t) for n, t in layer.tensors().items()}, **layer.sizes()
        )
        if how == "fake":
            resmoe_kernels.experts(x, i, w, fake)
        else:
            torch.ops.resmoe.experts(*flat(x, i, w, fake))


def test_experts_refuses_a_layer_elsewhere(make_layer, generator):
    layer = make_layer(**FORMS["everything"]).to("meta")
    with pytest.raises(ValueError, match=r"^experts: group must be on x's device cpu, got meta$"):
        resmoe_kernels.experts(*inputs(INDICES["many"](generator), generator), layer)


def test_unknown_activation(make_layer, generator):
    register_gate("test_ops_gate", lambda z: z)
    layer, call = make_layer(**FORMS["base-only"]), inputs(INDICES["many"](generator), generator)
    known = r"silu, gelu, gelu_tanh, relu, relu2, identity, .*test_ops_gate.*"
    sentence = rf"^activation: 'swish' is not known; known are {known}; a model's own gate is known once that model"
    with pytest.raises(ValueError, match=sentence):
        resmoe_kernels.experts(*call, layer, "swish")
    check_activation("test_ops_gate")


@pytest.mark.parametrize("name", POINTWISE)
def test_a_gate_may_not_take_a_built_in_name(name):
    with pytest.raises(ValueError, match=f"^register_gate: '{name}' is a built-in activation; choose another name$"):
        register_gate(name, lambda z: z)


SPARSE_REFUSED: list[tuple[str, dict, str]] = [
    (
        "block",
        {"mask": torch.zeros(5, 3, dtype=torch.int32)},
        "mask must be (N, 2) int32 for width 45, got (5, 3) torch.int32",
    ),
    (
        "block",
        {"mask": torch.zeros(5, 2, dtype=torch.int64)},
        "mask must be (N, 2) int32 for width 45, got (5, 2) torch.int64",
    ),
    (
        "block",
        {"mask": torch.zeros(2, dtype=torch.int32)},
        "mask must be (N, 2) int32 for width 45, got (2,) torch.int32",
    ),
    ("block", {"width": 65}, "mask must be (N, 3) int32 for width 65, got (5, 2) torch.int32"),
    (
        "block",
        {"values": torch.zeros(5, 3, 8)},
        "block values must be (5, 2, 'n'), got (5, 3, 8); bitmap values need row_offsets",
    ),
    (
        "block",
        {"values": torch.zeros(80)},
        "block values must be (5, 2, 'n'), got (80,); bitmap values need row_offsets",
    ),
    (
        "bitmap",
        {"row_offsets": torch.zeros(5, dtype=torch.int64)},
        "bitmap needs row_offsets (6,) int32 or int64 and values (nnz,), got (5,) torch.int64 and (9,)",
    ),
    (
        "bitmap",
        {"row_offsets": torch.zeros(6, dtype=torch.int16)},
        "bitmap needs row_offsets (6,) int32 or int64 and values (nnz,), got (6,) torch.int16 and (9,)",
    ),
    (
        "bitmap",
        {"values": torch.zeros(3, 3)},
        "bitmap needs row_offsets (6,) int32 or int64 and values (nnz,), got (6,) torch.int64 and (3, 3)",
    ),
]


@pytest.mark.parametrize(
    "layout, change, sentence", SPARSE_REFUSED, ids=[f"{i}-{r[0]}" for i, r in enumerate(SPARSE_REFUSED)]
)
@pytest.mark.parametrize("how", ["eager", "fake", "fake-op"])
def test_expand_sparse_refuses(layout, change, sentence, how):
    dense = torch.zeros(5, 45)
    dense[:3, :3] = 1
    mask, values, *offsets = pack_block(dense, 8) if layout == "block" else pack_bitmap(dense, dense > 0)
    call = {
        "mask": mask,
        "values": values,
        "row_offsets": offsets[0] if offsets else None,
        "width": 45,
        **change,
    }
    expected = pytest.raises(ValueError, match=f"^{re.escape('expand_sparse: ' + sentence)}$")
    if how == "eager":
        with expected:
            expand_sparse(**call)
        return
    with FakeTensorMode() as mode, expected:
        fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in call.items()}
        (expand_sparse if how == "fake" else torch.ops.resmoe.expand_sparse)(*fake.values())


# ---- the choice of backend


class Calls(TorchDispatchMode):
    """Names of the resmoe ops called inside (not of those that they call)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "resmoe":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def which(layer: FactoredExperts, call: tuple[Tensor, Tensor, Tensor]) -> str:
    with Calls() as calls:
        resmoe_kernels.experts(*call, layer)
    return calls.names[0]


@pytest.fixture
def small(make_layer, generator) -> tuple[FactoredExperts, tuple[Tensor, Tensor, Tensor]]:
    return make_layer(**FORMS["base-only"]), inputs(INDICES["many"](generator), generator)


def test_backend_is_forced_inside_and_restored_after(small):
    assert which(*small) == "resmoe::experts"
    with resmoe_kernels.backend("reference"):
        assert which(*small) == "resmoe::experts_reference"
        with resmoe_kernels.backend("auto"):
            assert which(*small) == "resmoe::experts"
        assert which(*small) == "resmoe::experts_reference"
    assert which(*small) == "resmoe::experts"


def test_backend_is_restored_after_an_exception(small):
    with pytest.raises(KeyError), resmoe_kernels.backend("reference"):
        raise KeyError
    assert which(*small) == "resmoe::experts"


def test_forced_backend_reaches_the_ops_inside(make_layer, generator):
    """Forcing the reference is a way around a broken kernel, so its sparse part is expanded by it too."""
    layer, call = make_layer(**FORMS["everything"]), inputs(INDICES["many"](generator), generator)
    with resmoe_kernels.backend("reference"), torch.autograd.profiler.profile() as profile:
        resmoe_kernels.experts(*call, layer)
    ran = {event.name for event in profile.function_events if event.name.startswith("resmoe::")}
    assert ran == {"resmoe::experts_reference", "resmoe::expand_sparse_reference"}


@pytest.mark.parametrize("name", ["cuda9", "", "REFERENCE"])
def test_unknown_backend_lists_those_that_are_there(small, name):
    there = ", ".join(("auto", *resmoe_kernels.backends()))
    with (
        pytest.raises(ValueError, match=f"^backend: '{name}' is not there; there are {there}$"),
        resmoe_kernels.backend(name),
    ):
        pass
    assert which(*small) == "resmoe::experts"


def test_backends():
    assert resmoe_kernels.backends() == ("reference", "cpu")


def test_every_listed_backend_can_be_forced(small):
    for name in ("auto", *resmoe_kernels.backends()):
        with resmoe_kernels.backend(name):
            resmoe_kernels.experts(*small[1], small[0])


def test_a_forced_backend_serves_no_other_device(small):
    layer, call = small[0].to("meta"), [t.to("meta") for t in small[1]]
    assert resmoe_kernels.experts(*call, layer).is_meta
    sentence = r"^experts: the cpu kernels do not serve x on meta; use backend\('auto'\) or backend\('reference'\)$"
    with resmoe_kernels.backend("cpu"), pytest.raises(ValueError, match=sentence):
        resmoe_kernels.experts(*call, layer)


def test_backend_holds_in_every_thread(small):
    """A server loads on one thread and answers on others."""
    seen: list[str] = []
    with resmoe_kernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(which(*small)))
        thread.start()
        thread.join()
    assert seen == ["resmoe::experts_reference"]


def test_threads_do_not_disturb_each_other(make_layer, generator):
    layer = make_layer(**FORMS["everything"])
    calls = [inputs(torch.randint(-1, 7, (20, 2), generator=generator), generator) for _ in range(8)]
    expected = [resmoe_kernels.experts(*call, layer) for call in calls]
    got: dict[int, Tensor] = {}

    def run(i: int) -> None:
        x, index, weights = calls[i]
        for _ in range(5):
            got[i] = resmoe_kernels.experts(x, index, weights, layer)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], e) for i, e in enumerate(expected))


def test_explain(make_layer):
    explain = resmoe_kernels.explain
    assert explain(make_layer(**FORMS["base-only"])).startswith("resmoe::experts on cpu: cpu (")
    declined = "resmoe::experts on cpu: reference (the cpu kernels do not serve factorization 'joint')"
    assert explain(make_layer(**FORMS["joint"])) == declined
    both = f"{declined}\nresmoe::expand_sparse on cpu: cpu"
    sparse = {**FORMS["joint"], "sparse": 8}
    assert explain(make_layer(**sparse)) == both
    assert explain(
        make_layer(**{**FORMS["everything"], "dtype": torch.float64, "only": "down"})
    ) == (  # a sparse part in one matrix is one
        "resmoe::experts on cpu: reference (the cpu kernels do not serve weights of float64)\n"
        "resmoe::expand_sparse on cpu: cpu"
    )
    no_kernel = "reference (there are no kernels for meta)"
    assert explain(make_layer(**FORMS["base-only"]).to("meta")) == f"resmoe::experts on meta: {no_kernel}"
    assert explain(make_layer(**FORMS["everything"]).to("meta")) == (
        f"resmoe::experts on meta: {no_kernel}\nresmoe::expand_sparse on meta: {no_kernel}"
    )
    with resmoe_kernels.backend("reference"):
        assert explain(make_layer(**FORMS["everything"])) == (
            "resmoe::experts on cpu: reference (forced)\nresmoe::expand_sparse on cpu: reference (forced)"
        )


def test_nothing_is_logged_where_the_extension_is_built(caplog, small):
    packed = resmoe_kernels.PackedExperts.pack(small[0])
    with caplog.at_level(logging.DEBUG, logger="resmoe_kernels"):
        resmoe_kernels.experts(*small[1], packed)
    assert not caplog.records
