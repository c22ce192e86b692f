"""Which of each layer's candidates go together: consecutive layers are judged by what leaves the last of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from resmoe_kernels.python_ops.models.dense_model import DenseModel, Hidden
from resmoe_kernels.python_ops.models.routing import RouterChange


def best_together(
    model: DenseModel,
    hidden: Hidden,
    block: Sequence[int],
    candidates: Sequence[Sequence[RouterChange]],
    progress: Callable[[], object] | None = None,
) -> tuple[list[int], Hidden]:
    """The combination of router changes, one for each layer of a block, that changes the block's output least.

        min over c_1 ... c_T of ||Block(X) - Block(X; c_1 ... c_T)||_F,   K^T combinations

    The block reaches from the decoder layer of its first experts to that of its last. Combinations that begin alike
    share what they have computed: K + K^2 + ... + K^T runs of a layer instead of T K^T. T + 1 states of the
    tokens are held at a time.

    hidden: what enters the block in the dense model;  block: numbers in ``model.experts``, ascending
    candidates: for each layer of the block;  progress: called after each of ``runs(candidates)`` runs
    Returns the number of each layer's candidate, and what leaves the dense block.

    Source: MoE-I2, arXiv 2411.01016, the block-wise KT-reception field; K = 3 and T = 3 there.
    """
    first = [model.decoder_layer_of(i) for i in block]
    stops = [*first[1:], first[-1] + 1]
    dense = model.run(hidden, first[0], stops[-1])
    best: tuple[float, list[int]] = (math.inf, [])

    def extend(chosen: list[int], states: Hidden) -> None:
        nonlocal best
        depth = len(chosen)
        if depth == len(block):
            error = _distance(states, dense)
            if error < best[0]:
                best = error, chosen
            return
        for c, change in enumerate(candidates[depth]):
            then = model.run(states, first[depth], stops[depth], {block[depth]: change})
            if progress is not None:
                progress()
            extend([*chosen, c], then)

    extend([], hidden)
    return best[1], dense


def runs(candidates: Sequence[Sequence[RouterChange]]) -> int:
    """How many runs of a layer ``best_together`` makes for a block."""
    return sum(math.prod(map(len, candidates[: depth + 1])) for depth in range(len(candidates)))


def _distance(one: Hidden, other: Hidden) -> float:
    squares = [
        (a.float() - b.float()).square().sum(dtype=torch.float64) for a, b in zip(one.states, other.states, strict=True)
    ]
    return float(torch.stack(squares).sum().sqrt())
