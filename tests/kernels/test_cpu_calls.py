"""Calls of the CPU kernels: any number of threads, several callers, values that are not finite, no memory kept."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import resmoe_kernels as rk
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.packed import PackedExperts
from tests.kernels.test_experts import FORMS

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["everything", "both", "low-rank-only", "base-only"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(generator: torch.Generator, tokens: int, hidden_size: int, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn((tokens, hidden_size), generator=generator).to(dtype)
    index = torch.randint(-1, 7, (tokens, 3), generator=generator)
    return [x, index, torch.rand((tokens, 3), generator=generator)]


@pytest.fixture(params=KINDS)
def layer(make_layer, request) -> PackedExperts:
    """Of several tasks in each phase, which threads may end in any order."""
    sizes = {"hidden_size": 200, "intermediate_size": 150}
    return PackedExperts.pack(make_layer(**FORMS[request.param], **sizes, dtype=torch.bfloat16))


# 1025: in three parts of at most 512 tokens.
@pytest.mark.parametrize("tokens", [1, 5, 40, 1025])
def test_the_same_bits_on_any_number_of_threads(layer, generator, tokens):
    call = inputs(generator, tokens, 200, torch.bfloat16)
    expected = rk.experts(*call, layer)
    for threads in range(2, 9):
        torch.set_num_threads(threads)  # one_thread sets it back
        assert torch.equal(rk.experts(*call, layer), expected), threads


def test_several_callers_at_once(layer, generator):
    torch.set_num_threads(2)
    calls = [inputs(generator, tokens, 200, torch.bfloat16) for tokens in (1, 7, 30, 64)] * 8
    expected = [rk.experts(*call, layer) for call in calls]
    with ThreadPoolExecutor(6) as pool:
        for got, want in zip(pool.map(lambda call: rk.experts(*call, layer), calls), expected, strict=True):
            assert torch.equal(got, want)


class Calls(torch.utils.data.Dataset):
    def __init__(self, calls: list, layer: PackedExperts) -> None:
        self.calls, self.layer = calls, layer

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> Tensor:
        return rk.experts(*self.calls[i], self.layer)


def test_in_the_workers_of_a_data_loader(layer, generator):
    torch.set_num_threads(2)
    calls = [inputs(generator, 7, 200, torch.bfloat16) for _ in range(4)]
    data = Calls(calls, layer)
    expected = [data[i] for i in range(4)]
    for got, want in zip(DataLoader(data, num_workers=2, batch_size=None, timeout=60), expected, strict=True):
        assert torch.equal(got, want)


# ---- values that are not finite


def _poison(tensor: Tensor, value: float) -> None:
    """An ordinary place, the last column, which the padding of weights follows, and a whole row."""
    tensor[2, 7 % tensor.shape[1]], tensor[5, -1], tensor[7] = value, value, value


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "router weights", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_exactly_where_the_reference_is(make_layer, generator, form, gated, dtype, where, value):
    weights = make_layer(**FORMS[form], gated=gated, dtype=dtype)
    x, index, top_k_weights = inputs(generator, 9, 45, dtype)
    if where == "weights":  # one of each tensor, in expert 2 where it belongs to one
        tensors = {name: tensor.clone() for name, tensor in weights.tensors().items()}
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.view(-1)[tensor.numel() // 3] = value
        weights = FactoredExperts.from_tensors(tensors, **weights.sizes())
    else:
        _poison(x if where == "x" else top_k_weights, value)
    for activation in ("silu", "relu"):
        call = (x, index, top_k_weights)
        with rk.backend("reference"):
            expected = rk.experts(*call, weights, activation)
        got = rk.experts(*call, PackedExperts.pack(weights), activation)
        assert not expected.isfinite().all()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(expected)), (kind, activation)


# ---- memory

GROWTH = """
    import ctypes, pathlib, sys
    import torch
    import resmoe_kernels as rk
    from resmoe_kernels.packed import PackedExperts

    class Mallinfo(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    weights, x, index, top_k_weights = torch.load(sys.argv[1], weights_only=False)
    layer = PackedExperts.pack(weights)
    torch.set_num_threads(2)
    for _ in range(100):
        rk.experts(x, index, top_k_weights, layer)
    used = mallinfo().uordblks + mallinfo().hblkhd
    for _ in range(1000):
        rk.experts(x, index, top_k_weights, layer)
    print((mallinfo().uordblks + mallinfo().hblkhd - used) / 1000)

    kept, before = [], resident()  # as a caller keeps small things from step to step
    for _ in range(2000):
        rk.experts(x, index, top_k_weights, layer)
        kept.append(torch.empty(3))
    print((resident() - before) / 2000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and glibc's mallinfo2")
def test_a_call_keeps_no_memory(make_layer, generator, tmp_path):
    weights = make_layer(group=[0] * 6, ranks=[16] * 6, hidden_size=64, intermediate_size=100)
    torch.save([weights, *inputs(generator, 20, 64, torch.float32)], tmp_path / "call.pt")
    command = [sys.executable, "-c", textwrap.dedent(GROWTH), str(tmp_path / "call.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    allocated, resident = map(float, run.stdout.split())
    assert allocated < 8, f"{allocated} bytes a call are never freed"  # 48 with torch's std::string arguments
    assert resident < 8192, f"resident memory grows by {resident} bytes a call"  # 70,000 with aligned_alloc
