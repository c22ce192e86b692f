"""Calls of the Triton kernels: no wait for the device, captured, compiled, in any order of programs, overlapping."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import resmoe_kernels
from resmoe_kernels.factored import FactoredExperts
from tests.accuracy import assert_accurate
from tests.kernels.test_experts import EVERYTHING, FORMS, ROUTINGS, inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

SHARED_BASE = {"group": [0] * 6, "ranks": [16, 0, 4, 32, 2, 8], "bias": True}


# ---- no host sync: whoever reads a value of a fake tensor raises


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
@pytest.mark.parametrize("form", ["everything", "both", "dense", "shared-base"])
def test_launches_depend_on_shapes_only(make_layer, form, tokens, target):
    from resmoe_kernels.triton_kernels.experts import experts
    from resmoe_kernels.triton_kernels.launch import recorded

    layer = make_layer(**SHARED_BASE if form == "shared-base" else FORMS[form], dtype=torch.bfloat16)
    call = inputs(torch.zeros((tokens, 3), dtype=torch.int64), layer.hidden_size, torch.Generator(), torch.bfloat16)
    with FakeTensorMode(), recorded(target) as launches:  # on the CPU: without CUDA, none there can be sliced
        fake = FactoredExperts.from_tensors({n: _fake(t) for n, t in layer.tensors().items()}, **layer.sizes())
        output = experts(*(_fake(t) for t in call), fake)
    assert output.shape == call[0].shape and output.dtype == torch.bfloat16
    names = [launch.name for launch in launches]
    assert len(launches) <= 4 if tokens <= 64 else "route_scan" in names, names
    assert all(isinstance(n, int) and n > 0 for launch in launches for n in launch.grid)


def test_a_fake_tensor_notices_a_host_sync():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(3).max().item()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # whether it is interpreted
@pytest.mark.parametrize("form", ["everything", "shared-base"])
def test_compiled_without_a_graph_break(on_triton, make_layer, generator, form):
    layer = make_layer(**SHARED_BASE if form == "shared-base" else EVERYTHING).to(on_triton.device)

    def double(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return resmoe_kernels.experts(2 * x, index, weights, layer)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for routing in ("uniform", "skipped-slots"):  # the second call takes what the first has compiled
        index = ROUTINGS[routing](generator, 6)
        call = [t.to(on_triton.device) for t in inputs(index, layer.hidden_size, generator)]
        with torch.compiler.set_stance("fail_on_recompile") if routing != "uniform" else nullcontext():
            assert torch.equal(compiled(*call), double(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["everything", "both", "shared-base"])
@pytest.mark.parametrize("tokens", [11, 300])
def test_captured_in_a_cuda_graph(on_triton, make_layer, generator, form, tokens):
    """One capture serves every later input and routing of its shape, and gives the bits of an eager call."""
    form = SHARED_BASE if form == "shared-base" else FORMS[form]
    layer = make_layer(**form, dtype=torch.bfloat16).to("cuda")

    def call(index: Tensor) -> list[Tensor]:
        return [t.cuda() for t in inputs(index, layer.hidden_size, generator, torch.bfloat16)]

    static = call(torch.rand((tokens, 6), generator=generator).topk(3).indices)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        resmoe_kernels.experts(*static, layer)  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = resmoe_kernels.experts(*static, layer)
    routings = {
        "uniform": torch.rand((tokens, 6), generator=generator).topk(3).indices,
        "one expert": torch.full((tokens, 3), 4),
        "skipping": torch.randint(-2, 8, (tokens, 3), generator=generator),
        "all skipped": torch.full((tokens, 3), -1),
    }
    for name, index in routings.items():
        changed = call(index)
        for tensor, new in zip(static, changed, strict=True):
            tensor.copy_(new)
        graph.replay()
        assert torch.equal(output, resmoe_kernels.experts(*changed, layer)), name


@pytest.mark.gpu
def test_no_call_waits_for_the_device(on_triton, make_layer, generator):
    layer = make_layer(**EVERYTHING).to("cuda")
    call = [t.cuda() for t in inputs(ROUTINGS["uniform"](generator, 6), layer.hidden_size, generator)]
    resmoe_kernels.experts(*call, layer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        resmoe_kernels.experts(*call, layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_device_that_is_not_current(make_layer, generator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = make_layer(**EVERYTHING)
    call = inputs(ROUTINGS["uniform"](generator, 6), layer.hidden_size, generator)
    with torch.cuda.device(0):
        output = resmoe_kernels.experts(*(t.to("cuda:1") for t in call), layer.to("cuda:1"))
    assert_accurate(output, *call, layer.tensors(), layer.sizes())


# ---- order


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["everything", "both", "shared-base"])
def test_result_does_not_depend_on_the_order_of_programs(on_triton, make_layer, generator, form):
    """Whichever program arrives last: the same bits. That no order lets two race, every interpreted call checks."""
    from tests.triton_kernels.interpreter import shuffled

    layer = make_layer(**SHARED_BASE if form == "shared-base" else FORMS[form], dtype=torch.bfloat16)
    index = torch.randint(-1, 7, (12, 3), generator=generator)
    call = inputs(index, layer.hidden_size, generator, torch.bfloat16)
    in_order = resmoe_kernels.experts(*call, layer)
    for seed in (0, 1):
        with shuffled(seed):
            assert torch.equal(resmoe_kernels.experts(*call, layer), in_order)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["everything", "both", "shared-base", "bias-alone", "dense"])
def test_overlapping_launches_wait(make_layer, generator, monkeypatch, form):
    """As on sm_90, where a launch may begin while the one ahead of it still runs: nothing is touched too early."""
    from resmoe_kernels.triton_kernels import decode
    from tests.triton_kernels.interpreter import gdc_wait

    waits = []
    monkeypatch.setattr(decode, "has_dependent_launch", lambda target: True)
    monkeypatch.setattr(decode, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(decode, "gdc_wait", lambda: (waits.append(1), gdc_wait())[1])
    layer = make_layer(**SHARED_BASE if form == "shared-base" else FORMS[form])
    call = inputs(torch.randint(-1, 7, (5, 3), generator=generator), layer.hidden_size, generator)
    with resmoe_kernels.backend("triton"):
        output = resmoe_kernels.experts(*call, layer)
    assert waits
    assert_accurate(output, *call, layer.tensors(), layer.sizes())
