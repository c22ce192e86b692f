"""What the triton backend refuses, one sentence each, and where the automatic choice goes instead."""

from __future__ import annotations

import importlib.util
import logging
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import resmoe_kernels
from resmoe_kernels import dispatch, ops
from resmoe_kernels.activations import register_gate
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.packed import PackedExperts
from tests.kernels.test_experts import EVERYTHING, inputs

pytest.importorskip("triton")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def call(make_layer, generator) -> dict:
    layer = make_layer(**EVERYTHING)
    x, index, weights = inputs(torch.randint(0, 6, (4, 2), generator=generator), layer.hidden_size, generator)
    return {"x": x, "top_k_index": index, "top_k_weights": weights, "weights": layer}


def _refused(reason: str, call: dict) -> None:
    sentence = f"experts: the triton kernels do not serve {reason}; use backend('auto') or backend('reference')"
    with resmoe_kernels.backend("triton"), pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        resmoe_kernels.experts(**call)


@pytest.fixture
def no_triton(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))


@pytest.fixture
def as_if_there_was_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "missing", lambda backend: None)


# ---- it is not there


@without_gpu
def test_no_driver():
    sentence = "backend: 'triton' is not there (torch finds no GPU and its driver); there are auto, reference"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"), resmoe_kernels.backend("triton"):
        pass
    assert "triton" not in resmoe_kernels.backends()


def test_no_triton(no_triton):
    sentence = "backend: 'triton' is not there (triton is not installed: pip install triton); there are auto, reference"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"), resmoe_kernels.backend("triton"):
        pass
    assert "triton" not in resmoe_kernels.backends()


def test_without_triton_a_gpu_runs_the_reference_and_says_so_once(no_triton, call, caplog):
    """The kernel registered for CUDA, called as the dispatcher would call it there."""
    dispatch._warn_once.cache_clear()
    layer = call.pop("weights")
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        for _ in range(2):
            output = dispatch._experts_on_gpu(*call.values(), *ops.flatten(layer), "silu")
    with resmoe_kernels.backend("reference"):
        assert torch.equal(output, resmoe_kernels.experts(**call, weights=layer))
    sentence = "resmoe_kernels: triton is not installed: pip install triton; layers on a GPU run on the slow reference"
    assert [record.message for record in caplog.records] == [sentence]


# ---- it does not serve


def test_tensors_on_the_cpu(as_if_there_was_a_gpu, call):
    _refused("tensors on cpu", call)


def test_packed_weights(as_if_there_was_a_gpu, call):
    if "cpu" not in resmoe_kernels.backends():
        pytest.skip("needs the C++ extension, which packs")
    _refused("weights packed for the CPU", {**call, "weights": PackedExperts.pack(call["weights"])})


@pytest.mark.interpreter
def test_x_of_float64(call):
    _refused("x of float64", {**call, "x": call["x"].double()})


@pytest.mark.interpreter
def test_weights_of_float64(call, make_layer):
    _refused("weights of float64", {**call, "weights": make_layer(**EVERYTHING, dtype=torch.float64)})


@pytest.mark.interpreter
@pytest.mark.parametrize("factorization", ["separate", "joint"])
def test_factorization(call, make_layer, factorization):
    layer = make_layer(**EVERYTHING, factorization=factorization)
    _refused(f"factorization '{factorization}'", {**call, "weights": layer})


@pytest.mark.interpreter
def test_a_gate_of_the_model(call):
    register_gate("test_triton_gate", lambda z: z.chunk(2, -1)[0])
    _refused("the gate 'test_triton_gate'", {**call, "activation": "test_triton_gate"})


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["top_k_index", "top_k_weights", "base_down", "group"])
def test_mixed_devices(call, name):
    layer = call["weights"]
    if name in call:
        call[name] = call[name].to("meta")
    else:
        parts = {**layer.tensors(), name: layer.tensors()[name].to("meta")}
        call["weights"] = FactoredExperts.from_tensors(parts, **layer.sizes())
    sentence = f"^experts: {name} must be on x's device cpu, got meta$"
    with resmoe_kernels.backend("triton"), pytest.raises(ValueError, match=sentence):
        resmoe_kernels.experts(**call)


@pytest.mark.interpreter
def test_what_is_not_served_runs_on_the_reference_under_auto(call, caplog):
    """As on a GPU: the kernel that is registered there, without a backend forced."""
    dispatch._warn_once.cache_clear()
    layer = call.pop("weights")
    x = call["x"] = call["x"].double()
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        output = dispatch._experts_on_gpu(*call.values(), *ops.flatten(layer), "silu")
    with resmoe_kernels.backend("reference"):
        assert torch.equal(output, resmoe_kernels.experts(**call, weights=layer)) and output.dtype == x.dtype
    sentence = "resmoe_kernels: the triton kernels do not serve x of float64; such layers run on the slow reference"
    assert [record.message for record in caplog.records] == [sentence]


# ---- explain


def _on_cuda(layer: FactoredExperts) -> FactoredExperts:
    with FakeTensorMode():
        tensors = {n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in layer.tensors().items()}
        return FactoredExperts.from_tensors(tensors, **layer.sizes())


@without_gpu
def test_explain_without_a_driver(make_layer):
    layer = _on_cuda(make_layer(group=[0] * 6))
    assert resmoe_kernels.explain(layer) == "resmoe::experts on cuda: reference (torch finds no GPU and its driver)"


def test_explain_without_triton(no_triton, make_layer):
    layer = _on_cuda(make_layer(group=[0] * 6))
    expected = "resmoe::experts on cuda: reference (triton is not installed: pip install triton)"
    assert resmoe_kernels.explain(layer) == expected


def test_explain_what_is_not_served(as_if_there_was_a_gpu, make_layer):
    layer = _on_cuda(make_layer(ranks=[2] * 6, factorization="joint"))
    reason = "the triton kernels do not serve factorization 'joint'"
    assert resmoe_kernels.explain(layer) == f"resmoe::experts on cuda: reference ({reason})"
    with resmoe_kernels.backend("triton"):
        assert resmoe_kernels.explain(layer) == f"resmoe::experts on cuda: refused ({reason})"


@pytest.mark.interpreter
def test_explain_the_interpreter(make_layer):
    with resmoe_kernels.backend("triton"):
        assert resmoe_kernels.explain(make_layer(**EVERYTHING)) == "resmoe::experts on cpu: triton (interpreter)"
