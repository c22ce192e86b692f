"""What a layer of factored experts means, in float64 and plain loops. Shares no code with the package.

It reads the raw tensors a layer stores (``FactoredExperts.tensors()``) by their documented meaning, so that a
mistake that packing and expanding share in the package is still seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: max(z, 0.0),
    "relu2": lambda z: max(z, 0.0) ** 2,
    "identity": lambda z: z,
}
# The same in PyTorch, for the dense layer that sets the allowed error.
_TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z) ** 2,
    "identity": lambda z: z,
}
Gate = Callable[[np.ndarray], np.ndarray]


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def expand_row(words: list[int], values: list[list[float]], width: int) -> list[float]:
    """One row of a sparse matrix, bit by bit: values[w] are those that words[w] stores, in column order."""
    row = [0.0] * width
    for w, word in enumerate(words):
        stored = iter(values[w])
        for bit in range(32):
            if (word % 2**32) // 2**bit % 2 == 1:
                row[32 * w + bit] = next(stored)
    return row


def expand(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> np.ndarray:
    """mask (N, W), values and row_offsets as a layer stores them -> (N, width) float64."""
    masks, numbers = mask.tolist(), float64(values).tolist()
    offsets = None if row_offsets is None else row_offsets.tolist()
    rows = []
    for i, words in enumerate(masks):
        if offsets is None:
            per_word = numbers[i]
        else:
            per_word, at = [], offsets[i]
            for word in words:
                count = bin(word % 2**32).count("1")
                per_word.append(numbers[at : at + count])
                at += count
            assert at == offsets[i + 1], (
                f"row {i} stores {offsets[i + 1] - offsets[i]} values, its mask has {at - offsets[i]}"
            )
        rows.append(expand_row(words, per_word, width))
    return np.array(rows).reshape(len(rows), width)


def dense_experts(tensors: Mapping[str, Tensor], sizes: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Every expert as plain matrices: gate_up (E, 2I or I, H) and down (E, H, I), float64."""
    num_experts, hidden, inner = sizes["num_experts"], sizes["hidden_size"], sizes["intermediate_size"]
    rows = 2 * inner if sizes["gated"] else inner
    gate_up = np.zeros((num_experts, rows, hidden))
    down = np.zeros((num_experts, hidden, inner))
    for e in range(num_experts):
        if "base_gate_up" in tensors and tensors["group"][e] != -1:
            gate_up[e] += float64(tensors["base_gate_up"][tensors["group"][e]])
            down[e] += float64(tensors["base_down"][tensors["group"][e]])
        _add_low_rank(gate_up[e], down[e], e, tensors, sizes)
        for name, matrix in (("gate_up", gate_up[e]), ("down", down[e])):
            if f"mask_{name}" in tensors:
                mask, values = tensors[f"mask_{name}"][e], tensors[f"values_{name}"]
                offsets = tensors.get(f"row_offsets_{name}")
                if offsets is None:
                    matrix += expand(mask, values[e], None, matrix.shape[1])
                else:
                    first = e * matrix.shape[0]
                    matrix += expand(mask, values, offsets[first : first + matrix.shape[0] + 1], matrix.shape[1])
    return gate_up, down


def _add_low_rank(gate_up: np.ndarray, down: np.ndarray, e: int, tensors: Mapping[str, Tensor], sizes: Mapping) -> None:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    if sizes["factorization"] == "joint":
        if "u_gate_up" not in tensors:
            return
        offsets = tensors["rank_offsets_gate_up"]
        for r in range(int(offsets[e]), int(offsets[e + 1])):
            shared, right = float64(tensors["u_gate_up"][r]), float64(tensors["v_gate_up"][r])
            gate_up[:inner] += np.outer(shared, right[:hidden])
            if sizes["gated"]:
                gate_up[inner:] += np.outer(shared, right[hidden:])
            down += np.outer(float64(tensors["u_down"][r]), shared)
        return
    for name, matrix in (("gate_up", gate_up), ("down", down)):
        if f"u_{name}" not in tensors:
            continue
        offsets = tensors[f"rank_offsets_{name}"]
        start, stop = int(offsets[e]), int(offsets[e + 1])
        for r in range(start, stop):
            term = np.outer(float64(tensors[f"u_{name}"][r]), float64(tensors[f"v_{name}"][r]))
            if sizes["factorization"] == "separate" and name == "gate_up" and sizes["gated"]:
                half = slice(0, inner) if r - start < (stop - start) // 2 else slice(inner, 2 * inner)
                matrix[half] += term
            else:
                matrix += term


def oracle(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping,
    activation: str = "silu",
    gates: Mapping[str, Gate] | None = None,
) -> np.ndarray:
    """The layer's output (T, H) float64: token by token, slot by slot, every expert as dense matrices."""
    gate_up, down = dense_experts(tensors, sizes)
    num_experts, inner = sizes["num_experts"], sizes["intermediate_size"]
    bias_gate_up = float64(tensors["bias_gate_up"]) if "bias_gate_up" in tensors else np.zeros(gate_up.shape[:2])
    bias_down = float64(tensors["bias_down"]) if "bias_down" in tensors else np.zeros(down.shape[:2])
    tokens, weights = float64(x), float64(top_k_weights)
    output = np.zeros_like(tokens)
    for t, slots in enumerate(top_k_index.tolist()):
        for slot, e in enumerate(slots):
            if not 0 <= e < num_experts:
                continue
            z = gate_up[e] @ tokens[t] + bias_gate_up[e]
            if gates is not None and activation in gates:
                h = gates[activation](z)
            else:
                h = np.array([ACTIVATIONS[activation](value) for value in z[:inner]])
                if sizes["gated"]:
                    h = h * z[inner:]
            output[t] += weights[t, slot] * (down[e] @ h + bias_down[e])
    return output


def plain_pytorch(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping,
    activation: str = "silu",
    gates: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """The layer as models run it without this package: dense experts in x's dtype, F.linear in a loop."""
    gate_up, down = (torch.from_numpy(w).to(x.dtype) for w in dense_experts(tensors, sizes))
    bias_gate_up, bias_down = (
        tensors[name].to(x.dtype) if name in tensors else [None] * len(gate_up)
        for name in ("bias_gate_up", "bias_down")
    )
    output = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, slot = (top_k_index == e).nonzero(as_tuple=True)
        z = torch.nn.functional.linear(x[token], gate_up[e], bias_gate_up[e])
        if gates is not None and activation in gates:
            h = gates[activation](z)
        elif sizes["gated"]:
            gate, up = z.chunk(2, dim=-1)
            h = _TORCH_ACTIVATIONS[activation](gate) * up
        else:
            h = _TORCH_ACTIVATIONS[activation](z)
        y = torch.nn.functional.linear(h, down[e], bias_down[e])
        output.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(x.dtype))
    return output


def errors(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(largest, root mean square) of the absolute error."""
    error = np.abs(actual - expected)
    return float(error.max(initial=0.0)), float(np.sqrt((error**2).mean())) if error.size else 0.0


def same_dtype_error(expected: np.ndarray, *arguments, **keywords) -> tuple[float, float]:
    """(largest, root mean square) error of ``plain_pytorch``, which runs in the dtype of x."""
    return errors(float64(plain_pytorch(*arguments, **keywords)), expected)


def assert_as_good_as_pytorch(
    actual: Tensor,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping,
    **how,
) -> None:
    """Holds ``actual`` to twice plain PyTorch's error in the same dtype, largest and root mean square.

    One ulp of the largest output (of the rms output for the rms) is allowed besides: where PyTorch happens to
    round without error, nothing else could pass. ``how``: activation, gates {name: (numpy, torch)}.
    """
    gates = how.pop("gates", {})
    numpy_gates, torch_gates = ({name: both[i] for name, both in gates.items()} for i in (0, 1))
    x, top_k_index, top_k_weights = x.detach().cpu(), top_k_index.cpu(), top_k_weights.detach().cpu()
    tensors = {name: t.detach().cpu() for name, t in tensors.items()}
    layer = (x, top_k_index, top_k_weights, tensors, sizes)

    expected = oracle(*layer, **how, gates=numpy_gates)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    got = float64(actual)
    assert np.isfinite(got).all(), f"not finite at (token, column) {np.argwhere(~np.isfinite(got))[:5].tolist()}"
    plain_max, plain_rms = same_dtype_error(expected, *layer, **how, gates=torch_gates)
    ulp = torch.finfo(x.dtype).eps
    allowed_max = 2 * plain_max + ulp * np.abs(expected).max(initial=0.0)
    allowed_rms = 2 * plain_rms + ulp * errors(expected, np.zeros_like(expected))[1]
    worst, rms = errors(got, expected)
    if worst > allowed_max or rms > allowed_rms:
        t, column = np.unravel_index(np.abs(got - expected).argmax(), got.shape)
        raise AssertionError(
            f"max error {worst:.3e} (allowed {allowed_max:.3e}, plain PyTorch {plain_max:.3e}), "
            f"rms {rms:.3e} (allowed {allowed_rms:.3e}, plain PyTorch {plain_rms:.3e}); worst at token {t}, "
            f"column {column}: got {got[t, column]:.6e}, oracle {expected[t, column]:.6e}"
        )
