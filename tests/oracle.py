"""What a layer of factored experts means, in float64 and plain loops. Shares no code with the package.

It reads the raw tensors a layer stores (``FactoredExperts.tensors()``) by their documented meaning, so that a
mistake that packing and expanding share in the package is still seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

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


def codes_of(stored: Tensor, bits: int) -> np.ndarray:
    """(..., bytes) uint8 -> (..., 8 bytes / bits) int: the codes of a payload, bit by bit as payload.py documents."""
    flags = np.unpackbits(stored.cpu().numpy(), axis=-1, bitorder="little").astype(int)
    if bits != 3:
        return flags.reshape(*stored.shape[:-1], 8 * stored.shape[-1] // bits, bits) @ (2 ** np.arange(bits))
    chunks = flags.reshape(*stored.shape[:-1], stored.shape[-1] // 12, 96)
    low = chunks[..., :64].reshape(*chunks.shape[:-1], 32, 2) @ np.array([1, 2])
    return (low + 4 * chunks[..., 64:]).reshape(*stored.shape[:-1], 8 * stored.shape[-1] // 3)


def decoded(tensors: Mapping[str, Tensor], sizes: Mapping) -> dict[str, Tensor]:
    """The tensors of a layer with float64 numbers in place of codes; without scales."""
    found = {name: t for name, t in tensors.items() if not name.startswith("scales_")}
    for word in sizes.get("payloads", "").split():
        name, payload = word.split("=")
        kind, _, group = payload.partition("/")
        bits = int(kind.removeprefix("int"))
        steps = codes_of(tensors[name], bits) - (2**bits - 1) / 2
        scales = float64(tensors[f"scales_{name}"])
        matrix = "down" if name.endswith("_down") else "gate_up"
        N, K = matrix_shapes(sizes)[matrix]
        mask = tensors.get(f"mask_{matrix}") if name.startswith("values") else None
        if not group:
            numbers = steps[:, :N] * scales[:, None]
        elif mask is None:
            numbers = steps[..., :K] * np.repeat(scales, int(group), -1)[..., :K]
        else:
            stored = np.unpackbits(mask.cpu().numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
            of_value = np.repeat(scales, int(group), -1)
            if f"row_offsets_{matrix}" in tensors:
                places = [(e, i, k) for e, i, k in np.argwhere(stored).tolist()]
                numbers = np.array([steps[at] * of_value[place] for at, place in enumerate(places)])
            else:
                words, kept = mask.shape[-1], _kept(tensors[name].shape[-1], mask.shape[-1], bits)
                numbers = steps[..., : words * kept].reshape(*mask.shape, kept) * of_value[..., : 32 * words : 32, None]
        found[name] = torch.from_numpy(np.asarray(numbers, dtype=np.float64))
    return found


def _kept(row_bytes: int, words: int, bits: int) -> int:
    """n of the block layout."""
    return next(
        n
        for n in (4, 8, 12, 16)
        if -(-words * n // 32) * 32 * bits // 8 == row_bytes or (bits != 3 and words * n * bits == 8 * row_bytes)
    )


class Expert(NamedTuple):
    """One matrix (N, K) of one expert as it is stored, in float64: the sum of these parts."""

    base: np.ndarray | None
    low_rank: list[tuple[slice, np.ndarray, np.ndarray]]  # rows of the matrix, U (n, r), V (r, K)
    sparse: np.ndarray | None  # or full

    def dense(self, rows: int, columns: int) -> np.ndarray:
        matrix = np.zeros((rows, columns))
        for whole in (self.base, self.sparse):
            if whole is not None:
                matrix += whole
        for own, u, v in self.low_rank:
            matrix[own] += u @ v
        return matrix


def matrix_shapes(sizes: Mapping) -> dict[str, tuple[int, int]]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    return {"gate_up": (2 * inner if sizes["gated"] else inner, hidden), "down": (hidden, inner)}


def stored_expert(matrix: str, e: int, tensors: Mapping[str, Tensor], sizes: Mapping) -> Expert:
    """The parts of one expert's matrix, "gate_up" or "down", of a layer without codes, see ``decoded``."""
    rows, columns = matrix_shapes(sizes)[matrix]
    base = sparse = None
    if f"base_{matrix}" in tensors and tensors["group"][e] != -1:
        base = float64(tensors[f"base_{matrix}"][tensors["group"][e]])
    if f"mask_{matrix}" in tensors:
        mask, values = tensors[f"mask_{matrix}"][e], tensors[f"values_{matrix}"]
        offsets = tensors.get(f"row_offsets_{matrix}")
        if offsets is None:
            sparse = expand(mask, values[e], None, columns)
        else:
            sparse = expand(mask, values, offsets[e * rows : (e + 1) * rows + 1], columns)
    elif f"values_{matrix}" in tensors:
        sparse = float64(tensors[f"values_{matrix}"][e])
    return Expert(base, _low_rank(matrix, e, tensors, sizes), sparse)


def _low_rank(
    matrix: str, e: int, tensors: Mapping[str, Tensor], sizes: Mapping
) -> list[tuple[slice, np.ndarray, np.ndarray]]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    everything, gate, up = slice(None), slice(0, inner), slice(inner, 2 * inner)
    joint = sizes["factorization"] == "joint"
    if f"u_{matrix}" not in tensors:
        return []
    offsets = tensors["rank_offsets_gate_up" if joint else f"rank_offsets_{matrix}"]
    own = slice(int(offsets[e]), int(offsets[e + 1]))
    u = float64(tensors[f"u_{matrix}"][own]).T
    if joint and matrix == "down":
        return [(everything, u, float64(tensors["u_gate_up"][own]))]
    v = float64(tensors[f"v_{matrix}"][own])
    if joint:
        return [(gate, u, v[:, :hidden]), (up, u, v[:, hidden:])] if sizes["gated"] else [(everything, u, v)]
    if sizes["factorization"] == "separate" and matrix == "gate_up" and sizes["gated"]:
        half = len(v) // 2
        return [(gate, u[:, :half], v[:half]), (up, u[:, half:], v[half:])]
    return [(everything, u, v)]


def dense_experts(tensors: Mapping[str, Tensor], sizes: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Every expert as plain matrices: gate_up (E, 2I or I, H) and down (E, H, I), float64."""
    tensors = decoded(tensors, sizes)
    gate_up, down = (
        np.array([stored_expert(m, e, tensors, sizes).dense(*shape) for e in range(sizes["num_experts"])])
        for m, shape in matrix_shapes(sizes).items()
    )
    return gate_up, down


def activate(z: np.ndarray, inner: int, activation: str, gates: Mapping[str, Gate] | None = None) -> np.ndarray:
    """z (2I,) or, without a gate, (I,) -> h (I,)."""
    if gates is not None and activation in gates:
        return gates[activation](z)
    h = np.array([ACTIVATIONS[activation](value) for value in z[:inner]])
    return h * z[inner:] if len(z) > inner else h


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
            h = activate(z, inner, activation, gates)
            output[t] += weights[t, slot] * (down[e] @ h + bias_down[e])
    return output


def errors(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(largest, root mean square) of the absolute error."""
    error = np.abs(actual - expected)
    return float(error.max(initial=0.0)), float(np.sqrt((error**2).mean())) if error.size else 0.0
