"""Which of each layer's candidates go together: consecutive layers are judged by what leaves the last of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

State = TypeVar("State")
Change = TypeVar("Change")


def best_together(
    advance: Callable[[State, int, Change | None], State],
    entering: State,
    candidates: Sequence[Sequence[Change]],
    distance: Callable[[State, State], float],
    progress: Callable[[], object] | None = None,
) -> tuple[list[int], State]:
    """The combination of changes, one for each layer of a block, that changes the block's output least.

        min over c_1 ... c_T of ||Block(X) - Block(X; c_1 ... c_T)||_F,   K^T combinations

    Combinations that begin alike share what they have computed: K + K^2 + ... + K^T runs of a layer instead of T K^T.
    T + 1 states of the tokens are held at a time.

    advance(state, n, change): what leaves layer n of the block, changed or, for None, as it is
    entering: what enters the block;  candidates: for each layer of the block;  distance: ||X - Y||_F of two states
    progress: called after each of ``runs(candidates)`` runs
    Returns the number of each layer's candidate, and what leaves the dense block.

    Source: MoE-I2, arXiv 2411.01016, the block-wise KT-reception field; K = 3 and T = 3 there.
    """
    dense = entering
    for n in range(len(candidates)):
        dense = advance(dense, n, None)
    best: tuple[float, list[int]] = (math.inf, [])

    def extend(chosen: list[int], state: State) -> None:
        nonlocal best
        depth = len(chosen)
        if depth == len(candidates):
            error = distance(state, dense)
            if error < best[0]:
                best = error, chosen
            return
        for c, change in enumerate(candidates[depth]):
            then = advance(state, depth, change)
            if progress is not None:
                progress()
            extend([*chosen, c], then)

    extend([], entering)
    return best[1], dense


def runs(candidates: Sequence[Sequence[object]]) -> int:
    """How many runs of a layer ``best_together`` makes for a block."""
    return sum(math.prod(map(len, candidates[: depth + 1])) for depth in range(len(candidates)))
