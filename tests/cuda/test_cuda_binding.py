"""The CUDA ops up to their launch, on CPU tensors: what they refuse, and what they say where no GPU can be used.

``redispatch`` calls the implementation for CUDA whatever the tensors' device, so this needs nvcc at build, and no GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resmoe_kernels.ops  # noqa: F401  defines the ops and loads the extension
from resmoe_kernels.factored import SIZE_NAMES, TENSOR_NAMES, FactoredExperts

OPS = ("low_rank_decode", "block_sparse_decode")
BF16 = torch.bfloat16
T, TOP_K, E, H, INNER, RANK = 2, 2, 4, 64, 32, 16

pytestmark = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("resmoe::low_rank_decode", "CUDA"),
    reason="the extension is built without CUDA kernels, resmoe env says why",
)


def weights(op: str) -> FactoredExperts:
    """Zeros in the form that an op serves."""
    parts: dict[str, Any] = {"group": torch.zeros(E, dtype=torch.int32)}
    for name, rows, columns in (("gate_up", 2 * INNER, H), ("down", H, INNER)):
        parts[f"base_{name}"] = torch.zeros(1, rows, columns, dtype=BF16)
        if op == "low_rank_decode":
            parts[f"u_{name}"] = torch.zeros(E * RANK, rows, dtype=BF16)
            parts[f"v_{name}"] = torch.zeros(E * RANK, columns, dtype=BF16)
            parts[f"rank_offsets_{name}"] = torch.arange(0, E * RANK + 1, RANK, dtype=torch.int32)
        else:
            parts[f"mask_{name}"] = torch.full((E, rows, columns // 32), 255, dtype=torch.int32)
            parts[f"values_{name}"] = torch.zeros(E, rows, columns // 32, 8, dtype=BF16)
    return FactoredExperts(num_experts=E, hidden_size=H, intermediate_size=INNER, gated=True, **parts)


def call(op: str, activation: str = "silu", **changed: Any) -> Tensor:
    """A right call, with some arguments replaced."""
    layer = weights(op)
    arguments = {name: getattr(layer, name) for name in (*TENSOR_NAMES, *SIZE_NAMES)}
    arguments["x"] = torch.zeros(T, H, dtype=BF16)
    arguments["top_k_index"] = torch.zeros(T, TOP_K, dtype=torch.int64)
    arguments["top_k_weights"] = torch.zeros(T, TOP_K)
    assert changed.keys() <= arguments.keys()
    arguments |= changed
    first = [arguments.pop(name) for name in ("x", "top_k_index", "top_k_weights")]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.resmoe, op).default.redispatch(cuda, *first, *arguments.values(), activation)


def test_what_was_built_is_registered():
    assert " and CUDA kernels (sm_" in torch.ops.resmoe.build_info()
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resmoe::{op}", "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"resmoe::{op}", "CPU")


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_do_needs_no_gpu(op):
    y = call(op, x=torch.zeros(0, H, dtype=BF16), top_k_index=torch.zeros(0, 2).int(), top_k_weights=torch.zeros(0, 2))
    assert y.shape == (0, H) and y.dtype == BF16
    y = call(op, top_k_index=torch.zeros(T, 0).int(), top_k_weights=torch.zeros(T, 0))
    assert torch.equal(y, torch.zeros(T, H, dtype=BF16))


def misaligned(tensor: Tensor) -> Tensor:
    """The same values from 2 or 4 bytes after a multiple of 16."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].reshape(tensor.shape)


ARGUMENTS = [
    (
        {"x": torch.zeros(T, H)},
        r"x must be \(T, 64\) bfloat16 or float16, and the weights the same, which are BFloat16, got \(2, 64\) Float",
    ),
    ({"x": torch.zeros(T, H, dtype=torch.float16)}, r"x must be .* which are BFloat16, got \(2, 64\) Half"),
    ({"x": torch.zeros(T, 32, dtype=BF16)}, r"x must be .* got \(2, 32\) BFloat16"),
    ({"x": torch.zeros(H, dtype=BF16)}, r"x must be .* got \(64,\) BFloat16"),
    ({"top_k_index": torch.zeros(T, TOP_K)}, r"top_k_index must be \(2, top_k\) int32 or int64, got \(2, 2\) Float"),
    ({"top_k_index": torch.zeros(3, TOP_K).int()}, r"top_k_index must be .* got \(3, 2\) Int"),
    ({"top_k_weights": torch.zeros(T, 3)}, r"top_k_weights must be \(2, 2\), got \(2, 3\) Float"),
    ({"factorization": "joint"}, r"factorization must be 'stacked', got 'joint'; the reference runs the others"),
    ({"num_experts": 0}, "num_experts, hidden_size and intermediate_size must be at least 1, got 0, 64 and 32"),
    ({"group": None}, "group, base_gate_up and base_down must be given together"),
    (
        {"base_gate_up": torch.zeros(2, 2 * INNER, H, dtype=BF16), "base_down": torch.zeros(2, H, INNER, dtype=BF16)},
        "weights must be at most one base and a .* part, got 2 bases",
    ),
    (
        {"base_down": torch.zeros(1, H, INNER)},
        r"base_down must be \(1, 64, 32\) BFloat16 contiguous, got \(1, 64, 32\) Float",
    ),
    (
        {"base_down": misaligned(torch.zeros(1, H, INNER, dtype=BF16))},
        "base_down must begin at a multiple of 16 bytes, got one at 0x[0-9a-f]+2",
    ),
    ({"bias_down": torch.zeros(E, H, dtype=BF16)}, "weights must be .* part, got 1 bases, biases"),
    (
        {
            "x": torch.zeros(17, H, dtype=BF16),
            "top_k_index": torch.zeros(17, TOP_K).int(),
            "top_k_weights": torch.zeros(17, TOP_K),
        },
        "the kernel does not serve more than 16 tokens, got T 17, top_k 2, E 4, H 64, I 32",
    ),
    (
        {"top_k_index": torch.zeros(T, 129).int(), "top_k_weights": torch.zeros(T, 129)},
        "the kernel does not serve .* pairs, got T 2, top_k 129, E 4, H 64, I 32",
    ),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("changed, message", ARGUMENTS)
def test_what_is_wrong_is_refused_before_the_launch(op, changed, message):
    with pytest.raises(ValueError, match=f"^{op}: {message}$"):
        call(op, **changed)


@pytest.mark.parametrize("op", OPS)
def test_other_activations_and_endless_calls_are_refused(op):
    known = "silu, gelu, gelu_tanh, relu, relu2 or identity"
    with pytest.raises(ValueError, match=f"^{op}: activation must be {known}, got 'swish'$"):
        call(op, activation="swish")
    endless = torch.zeros(1, 1).expand(T, (1 << 26) + 1)  # one value
    index = torch.zeros(1, 1).int().expand_as(endless)
    with pytest.raises(ValueError, match=f"^{op}: top_k must be at most 67108864, got 67108865$"):
        call(op, top_k_index=index, top_k_weights=endless)


def test_forms_of_other_kernels_are_refused():
    sparse, low_rank = weights("block_sparse_decode"), weights("low_rank_decode")
    message = "^{}: weights must be at most one base and {}, got 1 bases, other parts$"
    with pytest.raises(ValueError, match=message.format("low_rank_decode", "a low-rank part")):
        call("low_rank_decode", mask_down=sparse.mask_down, values_down=sparse.values_down)
    message = message.format("block_sparse_decode", "a block-sparse part")
    names = ("u_down", "v_down", "rank_offsets_down")
    with pytest.raises(ValueError, match=message):
        call("block_sparse_decode", **{name: getattr(low_rank, name) for name in names})


# ---- from here on a GPU would run it


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
@pytest.mark.parametrize("op", OPS)
def test_a_torch_without_cuda_is_named(op):
    with pytest.raises(RuntimeError, match=r"^resmoe_kernels: this torch is built without CUDA$"):
        call(op)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_what_the_cuda_runtime_says_is_raised(tmp_path):
    """With a stand-in for the library that knows torch's current stream; a driver there is none."""
    source, library = tmp_path / "stream.c", tmp_path / "libtorch_cuda.so"
    source.write_text(
        "int fails;\nint aoti_torch_get_current_cuda_stream(int gpu, void** stream) { *stream = 0; return fails; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", source, "-o", library], check=True)
    code = (
        f"import ctypes, sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        f"lib = ctypes.CDLL({str(library)!r})\n"
        "from tests.cuda import test_cuda_binding as t\n"
        "for fails in (0, 1):\n"
        "    ctypes.c_int.in_dll(lib, 'fails').value = fails\n"
        "    for op in t.OPS:\n"
        "        try:\n            t.call(op)\n        except RuntimeError as error:\n            print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(OPS)
    for op, sentence in zip(OPS, said[: len(OPS)], strict=True):
        assert sentence.startswith(f"{op}: GPU -1: ") and "driver" in sentence
    assert set(said[len(OPS) :]) == {"resmoe_kernels: torch has no current stream on GPU -1"}
