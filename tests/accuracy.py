"""What error a layer may have: a function of its inputs alone, so the same on every machine and for every kernel.

An output passes through few kinds of roundings, and where each happens is part of what the op promises. To the operand
type (that of x, if every weight has it, else float32), half an ulp u each: V x and V' h, h, the sum of w h that meets a
base, a base weight with the sparse one added to it, what a pair leaves, and the output. To float32, f each: every
addition of every sum, in an order that is the kernel's own, and the activation. Each is a source of an error that no
other depends on, and float64 says how far it moves the output: ``spread`` is the root of the sum of the squares of
these movements, with half an ulp as the size of every source.

A rounding error is about uniform within its half ulp, and that is u of a number at the bottom of its binade only: the
mean of its square is u^2 / 6 of the number's. A weighted sum of such errors exceeds L spreads with a probability
below 2 exp(-3 L^2) (Hoeffding's bound, with the variance for proxy, as uniform numbers allow): 4e-12 for LARGEST. Its
root mean square is 0.41 spreads and, were every number at the bottom of its binade, 0.58; see ``rms_limit``.
tests/kernels/fuzz_experts.py looks at both over thousands of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import oracle
from tests.oracle import Expert, Gate, float64

LARGEST = 3.0
# Columns that a kernel sums in one register before it adds the sum to what it has; see csrc/cpu/kernels.inl.
SUM_COLUMNS = 256


def rms_limit(tokens: int) -> float:
    """Of the error in spreads. Outputs of one token share roundings (of h, of V x): their mean may be that of a single
    error, and the mean over n tokens has about n independent parts."""
    return 0.6 + (LARGEST - 0.6) / max(tokens, 1)


class Rounding:
    """Squares of the sizes of roundings: to the operand type, in sums of float32, and to the type of the output."""

    def __init__(self, x: Tensor, tensors: Mapping[str, Tensor], weights: bool) -> None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        floats = [t for name, t in tensors.items() if t.is_floating_point() and not name.startswith("scales_")]
        dtypes = {x.dtype, *(t.dtype for t in floats)}
        self._operand = x.dtype if len(dtypes) == 1 else wide
        self._output = x.dtype
        self.weights = weights
        self.f2 = (torch.finfo(wide).eps / 2) ** 2

    def operand(self, value: np.ndarray) -> np.ndarray:
        return _squared(self._operand, value)

    def output(self, value: np.ndarray) -> np.ndarray:
        return _squared(self._output, value)

    def sum(self, additions: int, partial: np.ndarray) -> np.ndarray:
        """Of a sum whose partial sums have, in some order, ``partial`` as the mean of their squares, or less."""
        return self.f2 * additions * partial


def _squared(dtype: torch.dtype, value: np.ndarray) -> np.ndarray:
    info = torch.finfo(dtype)
    # Below the normal numbers half an ulp is one size in float16; bfloat16 products may take such numbers as zero.
    least = info.smallest_normal * info.eps / 2 if dtype == torch.float16 else info.smallest_normal
    return (info.eps / 2 * value) ** 2 + least**2


def additions(columns: int) -> int:
    """Of which a sum over so many columns is made, one after another: those of a block, and the blocks."""
    return min(columns, SUM_COLUMNS) + -(-columns // SUM_COLUMNS)


class Product:
    """W x for one expert's matrix W = B + U V + S and one x (K,), with every size its errors need; all (N,) float64.

    value: W x;  residual: (U V + S) x;  base: B x
    rounded: square of what roundings of operands within the product move it by
    low: for each low-rank part (rows, U, the squared error of V x)
    partial: more than the mean square of the partial sums of W x. In a random order of n terms it is a third of the
        square of their sum and a sixth of the sum of their squares; here it is the whole of both, of every part and of
        all together, as orders are not random
    additions: how many there are, one after another
    """

    def __init__(self, part: Expert, x: np.ndarray, rows: int, inner: int, rounding: Rounding) -> None:
        self.inner = inner
        self.base, self.residual, self.partial, self.rounded = (np.zeros(rows) for _ in range(4))
        self.low: list[tuple[slice, np.ndarray, np.ndarray]] = []
        self.additions = 0
        squares = x**2
        for is_base, matrix in ((True, part.base), (False, part.sparse)):
            if matrix is None:
                continue
            value, square = matrix @ x, matrix**2 @ squares
            if is_base:
                self.base += value
            else:
                self.residual += value
            self.partial += value**2 + square
            self.additions += additions(len(x))
            if rounding.weights:
                self.rounded += rounding.operand(matrix) @ squares
        if part.base is not None and part.sparse is not None:  # may be added to each other, as operands
            self.rounded += rounding.operand(part.base + part.sparse) @ squares
        ranks = 0
        for own, u, v in part.low_rank:
            low, square = v @ x, v**2 @ squares
            error = rounding.operand(low) + rounding.sum(additions(len(x)), low**2 + square)
            if rounding.weights:
                error += rounding.operand(v) @ squares
                self.rounded[own] += rounding.operand(u) @ low**2
            self.low.append((own, u, error))
            value = u @ low
            self.residual[own] += value
            self.partial[own] += value**2 + u**2 @ low**2
            ranks = max(ranks, len(low))
        if ranks:
            self.additions += additions(ranks)
        self.value = self.base + self.residual
        self.partial += self.value**2


class Jacobian:
    """How h = f(z) (I,) answers to errors of z (Z,) of a given spread: by the larger of both differences of that size.

    Differences and not derivatives, since at the kink of a ReLU there is none. f of elements i and I + i of z alone is
    probed in two halves; a model's own gate, which may mix them otherwise, element by element.
    """

    def __init__(self, f: Callable[[np.ndarray], np.ndarray], z: np.ndarray, spread: np.ndarray, halves: int) -> None:
        h = f(z)
        size = len(h) if halves else 1
        self._parts = [slice(at, at + size) for at in range(0, len(z), size)]
        self._slopes = []
        for part in self._parts:
            step = np.zeros_like(z)
            step[part] = spread[part]
            above, below = f(z + step) - h, h - f(z - step)
            largest = np.where(np.abs(above) > np.abs(below), above, below)
            moved = np.broadcast_to(spread[part], h.shape)
            self._slopes.append(np.divide(largest, moved, out=np.zeros_like(h), where=moved > 0))

    def of(self, sources: np.ndarray) -> np.ndarray:
        """sources (Z, n): by how much each of n moves z -> (I, n), by how much it moves h."""
        return sum(slope[:, None] * sources[part] for part, slope in zip(self._parts, self._slopes, strict=True))

    def of_independent(self, squares: np.ndarray) -> np.ndarray:
        """squares (Z,) of errors that have nothing to do with each other -> (I,), of h."""
        return sum(slope**2 * squares[part] for part, slope in zip(self._parts, self._slopes, strict=True))


class Activated(NamedTuple):
    """h = w f(z) (I,). sources (I, n): what errors of V x move it by; squares (I,): of its other errors, but for the
    rounding of h itself."""

    h: np.ndarray
    sources: np.ndarray
    squares: np.ndarray


def activated(
    product: Product, bias: np.ndarray, w: float, activation: str, gates: Mapping[str, Gate], rounding: Rounding
) -> Activated:
    z = product.value + bias
    squares = product.rounded + rounding.sum(product.additions + 1, product.partial + bias**2)
    sources = [np.zeros((len(z), 0))]
    for rows, u, low in product.low:
        sources.append(np.zeros((len(z), len(low))))
        sources[-1][rows] = u * np.sqrt(low)
    moved = np.concatenate(sources, axis=1)
    inner = product.inner

    def f(z: np.ndarray) -> np.ndarray:
        return w * oracle.activate(z, inner, activation, gates)

    h, own_gate = f(z), activation in gates
    jacobian = Jacobian(f, z, np.sqrt(squares + (moved**2).sum(1)), halves=not own_gate)
    # The activation itself: a few roundings of its result, of its argument, and of 1 + erf, which may cancel.
    few = 16 * (h**2 + jacobian.of_independent(z**2))
    if not own_gate:
        few += (w * z[:inner] * (z[inner:] if len(z) > inner else 1)) ** 2
    return Activated(h, jacobian.of(moved), jacobian.of_independent(squares) + rounding.f2 * few)


def spread(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping,
    activation: str = "silu",
    gates: Mapping[str, Gate] | None = None,
    rounded_weights: bool = False,
) -> np.ndarray:
    """The spread (T, H) of a layer's output.

    rounded_weights: a weight may be rounded to the operand type, as codes times scales are where a tile is multiplied
    """
    rounding, shapes = Rounding(x, tensors, rounded_weights), oracle.matrix_shapes(sizes)
    tensors = oracle.decoded(tensors, sizes)
    tokens, weights = float64(x), float64(top_k_weights)
    bias_gate_up, bias_down = (
        float64(tensors[f"bias_{m}"]) if f"bias_{m}" in tensors else np.zeros((sizes["num_experts"], shape[0]))
        for m, shape in shapes.items()
    )
    stored: dict[int, tuple[Expert, Expert]] = {}
    squares = np.zeros_like(tokens)
    for t, slots in enumerate(top_k_index.tolist()):
        y, partial, count = np.zeros(sizes["hidden_size"]), np.zeros(sizes["hidden_size"]), 0
        weighted_h: dict[int, np.ndarray] = {}
        bases: dict[int, np.ndarray] = {}
        for slot, e in enumerate(slots):
            if not 0 <= e < sizes["num_experts"]:
                continue
            if e not in stored:
                stored[e] = tuple(oracle.stored_expert(matrix, e, tensors, sizes) for matrix in shapes)
            gate_up, down = stored[e]
            w, bias = weights[t, slot], weights[t, slot] * bias_down[e]
            z = Product(gate_up, tokens[t], shapes["gate_up"][0], sizes["intermediate_size"], rounding)
            a = activated(z, bias_gate_up[e], w, activation, gates or {}, rounding)
            product = Product(down, a.h, len(y), len(a.h), rounding)
            # What is wrong in h moves the whole product; rounded to an operand it is once for the base, once besides.
            whole = down.dense(*shapes["down"])
            base = np.zeros_like(whole) if down.base is None else down.base
            squares[t] += whole**2 @ a.squares + ((whole @ a.sources) ** 2).sum(1) + product.rounded
            squares[t] += (base**2 + (whole - base) ** 2) @ rounding.operand(a.h)
            for rows, u, low in product.low:
                squares[t, rows] += u**2 @ low
            squares[t] += rounding.output(product.residual + bias) + rounding.output(product.base)
            y += product.value + bias
            partial += product.partial + bias**2
            count += product.additions + 2
            if down.base is not None:
                group = int(tensors["group"][e])
                bases[group], weighted_h[group] = down.base, weighted_h.get(group, 0) + a.h
        for group, h in weighted_h.items():
            squares[t] += bases[group] ** 2 @ rounding.operand(h)
            partial += (bases[group] @ h) ** 2 + bases[group] ** 2 @ h**2
        squares[t] += rounding.sum(count, partial + y**2) + rounding.output(y)
    return np.sqrt(squares)


def assert_accurate(
    actual: Tensor,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping,
    **how,
) -> None:
    """Holds ``actual`` to the oracle: every output to LARGEST spreads, all together to ``rms_limit``.

    how: activation, gates, rounded_weights; see ``spread``.
    """
    largest, rms, text = error_in_spreads(actual, x, top_k_index, top_k_weights, tensors, sizes, **how)
    limit = rms_limit(len(x))
    if largest > LARGEST or rms > limit:
        raise AssertionError(
            f"largest error {largest:.2f} spreads (allowed {LARGEST:g}), rms {rms:.2f} (allowed {limit:.2f}); {text}"
        )


def error_in_spreads(
    actual: Tensor,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping,
    **how,
) -> tuple[float, float, str]:
    """(largest, root mean square) of error / spread over the outputs, and where the largest is, in words."""
    x, top_k_index, top_k_weights = x.detach().cpu(), top_k_index.cpu(), top_k_weights.detach().cpu()
    layer = (x, top_k_index, top_k_weights, {name: t.detach().cpu() for name, t in tensors.items()}, sizes)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    got = float64(actual)
    assert np.isfinite(got).all(), f"not finite at (token, column) {np.argwhere(~np.isfinite(got))[:5].tolist()}"
    allowed = spread(*layer, **how)
    how.pop("rounded_weights", None)
    expected = oracle.oracle(*layer, **how)
    error = np.abs(got - expected)
    if error.size == 0:
        return 0.0, 0.0, "no output"
    assert (error[allowed == 0] == 0).all()
    share = np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0)
    t, column = np.unravel_index(share.argmax(), share.shape)
    where = (
        f"worst at token {t}, column {column}: got {got[t, column]:.6e}, oracle {expected[t, column]:.6e}, "
        f"spread {allowed[t, column]:.1e}"
    )
    return float(share.max()), float(np.sqrt((share**2).mean())), where
