"""Which of cuda and triton serves a call: the table, what explain says of it, what overrides it; no GPU needed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import resmoe_kernels
from resmoe_kernels import dispatch, experts_cuda, heuristics
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import CUDA_UP_TO, Row, cuda_up_to

LOW_RANK = {"group": [0] * 6, "ranks": [16] * 6, "hidden_size": 64, "intermediate_size": 32, "dtype": torch.bfloat16}
SPARSE = {**LOW_RANK, "ranks": None, "sparse": 8}


@pytest.fixture
def gpu(monkeypatch) -> None:
    """As if there was an H100."""
    pytest.importorskip("triton")
    from resmoe_kernels.triton_kernels import launch as launch_triton

    monkeypatch.setattr(dispatch, "missing", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(launch_triton, "_target", lambda device: "sm_90")
    monkeypatch.setattr(experts_cuda, "limits", lambda: (16, 256, 1024))


@pytest.fixture
def layer(make_layer):
    """layer(form): on a GPU, without memory."""

    def make(form: dict, **changed) -> FactoredExperts:
        made = make_layer(**form, **changed)
        with FakeTensorMode():
            tensors = {n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in made.tensors().items()}
            return FactoredExperts.from_tensors(tensors, **made.sizes())

    return make


def test_the_table_has_every_target_and_form():
    targets = [target for target in heuristics.TARGETS if target.startswith("sm_")]
    assert CUDA_UP_TO.keys() == {(target, form) for target in targets for form in ("low-rank", "block-sparse")}
    assert all(row.tokens <= 16 and row.reason for row in CUDA_UP_TO.values())
    assert cuda_up_to("sm_90", sparse=True) is CUDA_UP_TO["sm_90", "block-sparse"]
    assert cuda_up_to("sm_80", sparse=False) is CUDA_UP_TO["sm_80", "low-rank"]
    assert cuda_up_to("sm_86", sparse=False).tokens == 0  # not listed


def test_nothing_is_chosen_unasked_before_a_gpu_has_run_it():
    assert all(row.tokens == 0 and row.reason.startswith(heuristics.UNTRIED) for row in CUDA_UP_TO.values())


def test_explain_says_what_the_table_says(gpu, layer, monkeypatch):
    def explained(form: dict, **changed) -> str:
        return resmoe_kernels.explain(layer(form, **changed)).removeprefix("resmoe::experts on cuda: ")

    for form in (LOW_RANK, SPARSE):
        reason = cuda_up_to("sm_90", form is SPARSE).reason
        assert explained(form) == f"triton (sm_90; cuda where it is asked for: {reason})"
    assert explained(LOW_RANK, bias=True) == "triton (sm_90; the cuda kernels do not serve biases)"
    monkeypatch.setitem(CUDA_UP_TO, ("sm_90", "low-rank"), Row(8, "measured"))
    assert explained(LOW_RANK) == "cuda up to 8 tokens, triton beyond (sm_90; measured)"
    assert explained(SPARSE).startswith("triton")
    for name in ("triton", "cuda"):
        with resmoe_kernels.backend(name):
            assert explained(LOW_RANK) == f"{name} (sm_90)"
    monkeypatch.setattr(dispatch, "missing", lambda backend: "it is not built" if backend == "cuda" else None)
    assert explained(LOW_RANK) == "triton (sm_90; no cuda: it is not built)"


def test_calls_go_where_the_table_says_unless_a_backend_is_asked_for(gpu, layer, monkeypatch):
    monkeypatch.setattr(experts_cuda, "declines", lambda *_: None)
    layers = {"low-rank": layer(LOW_RANK), "block-sparse": layer(SPARSE)}

    def takes_cuda(tokens: int, form: str = "low-rank") -> bool:
        with FakeTensorMode():
            x = torch.empty(tokens, 64, dtype=torch.bfloat16, device="cuda")
            index = torch.empty(tokens, 2, dtype=torch.int64, device="cuda")
            return dispatch._takes_cuda(x, index, layers[form], "silu")

    assert not takes_cuda(1)
    monkeypatch.setitem(CUDA_UP_TO, ("sm_90", "low-rank"), Row(8, "measured"))
    assert takes_cuda(1) and takes_cuda(8) and not takes_cuda(9) and not takes_cuda(1, "block-sparse")
    with resmoe_kernels.backend("cuda"):
        assert takes_cuda(9) and takes_cuda(1, "block-sparse")
    with resmoe_kernels.backend("triton"):
        assert not takes_cuda(1)
    monkeypatch.setattr(experts_cuda, "declines", lambda *_: "biases")
    assert not takes_cuda(1)
    sentence = "^experts: the cuda kernels do not serve biases; use backend"
    with resmoe_kernels.backend("cuda"), pytest.raises(ValueError, match=sentence):
        takes_cuda(1)


@pytest.mark.parametrize(
    "capability, words",
    [
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 3), None),
        ((7, 5), "the kernels need sm_80 or later"),
        ((8, 6), "no kernel is compiled for its shared memory"),
        ((12, 0), "no kernel is compiled for its shared memory"),
    ],
)
def test_gpus_that_the_cuda_kernels_cannot_run_on_are_named(monkeypatch, capability, words):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = dispatch.missing("cuda")
    assert reason == words or (words is not None and reason.endswith(words) and "sm_" in reason)


def test_amd_is_refused_by_name(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.missing("triton") is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch.missing("triton").startswith("this is an AMD GPU")
