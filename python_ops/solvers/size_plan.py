"""Forms of layers under one budget of bytes: of measured candidates those with the least error for the bytes spent.

    minimise  sum over layers of error(form)   subject to   sum of bytes(form) <= budget

by one Lagrangian: every layer by itself takes the form with the least error + price * bytes, and the price is the
lowest at which all together fit. That is the best there is at the bytes it spends; what is left buys ranks in turn.

With few layers that can be far below the budget: between two neighbouring prices a whole layer may change its form, and
ranks, which are worth least there, cannot make up for it. So every plan that has the same forms in all layers, with its
ranks bought in the same way, stands beside it. The best of those is taken unless forms that differ by layer are found
to lose 10 % less: errors are estimates, and what is picked layer by layer is picked where they err in its favour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK

# What an error counts more where forms differ by layer: set after seeing KL of tiny-mixtral on the text its table is
# of, and by no more than that. Alike / differing: .047 / .060 at 0.065 of the bytes, where differing was to lose 4 %
# less, but .0163 / .0146 at 0.1, where it was to lose 2 % less.
_DIFFERING = 1.1
_HALVINGS = 80  # of the interval of prices, taken as logarithms


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to store one matrix of all experts of a layer.

    form: what it is, plain values;  error, bytes: of it at rank 16 for every expert, or without ranks
    gains: (E, n) float64, by how much 16 ranks more lower an expert's error, falling; (E, 0) without ranks
    price: bytes of 16 ranks of an expert
    """

    form: dict[str, object]
    error: float
    bytes: int
    gains: Tensor
    price: int = 0


@dataclass(frozen=True)
class Chosen:
    """A candidate, and the rank of each expert where it has ranks."""

    form: dict[str, object]
    ranks: tuple[int, ...]
    error: float
    bytes: int


# a layer: ways to store it, each a candidate for each of its matrices, from which one is taken per matrix
Ways = Sequence[dict[str, Sequence[Candidate]]]


def plan_sizes(layers: Sequence[Ways], budget: int) -> list[dict[str, Chosen]]:
    """For each layer and matrix what is chosen.

    layers: of each the ways to store it (with a base, without), and in each, by matrix, the candidates
    budget: bytes of all together
    Raises ValueError naming the least bytes where no choice fits.
    """
    if (least := _least(layers)) > budget:
        raise ValueError(f"size: the least that these layers can be stored in is {least:,} bytes, got {budget:,}")
    differing = _bought_within(layers, budget)
    alike = [_bought_within(same, budget) for same in _alike(layers) if _least(same) <= budget]
    best = min(alike, key=_error, default=differing)
    return best if _error(best) <= _DIFFERING * _error(differing) else differing


def _least(layers: Sequence[Ways]) -> int:
    return sum(min(sum(min(c.bytes for c in cs) for cs in way.values()) for way in ways) for ways in layers)


def _error(plan: list[dict[str, Chosen]]) -> float:
    return sum(chosen.error for layer in plan for chosen in layer.values())


def _alike(layers: Sequence[Ways]) -> Iterator[list[Ways]]:
    """The layers with one candidate for each matrix, all of the same forms; none where layers do not have the same."""
    ways_of = [[{m: [c.form for c in cs] for m, cs in way.items()} for way in ways] for ways in layers]
    if any(ways != ways_of[0] for ways in ways_of):
        return
    for w, way in enumerate(ways_of[0]):
        for picked in product(*(range(len(forms)) for forms in way.values())):
            yield [[{m: [ways[w][m][k]] for m, k in zip(way, picked, strict=True)}] for ways in layers]


def _bought_within(layers: Sequence[Ways], budget: int) -> list[dict[str, Chosen]]:
    """What the layers take at the lowest price at which all fit."""
    low, high = -60.0, 60.0  # log2 of the price: at the higher end everything is at its least
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spent = sum(c.bytes for layer in _at(layers, 2.0**middle) for c, _ in layer.values())
        low, high = (low, middle) if spent <= budget else (middle, high)
    return _filled(_at(layers, 2.0**high), budget)


_Taken = dict[str, tuple[Chosen, Candidate]]


def _at(layers: Sequence[Ways], price: float) -> list[_Taken]:
    """What every layer takes at a price of a byte."""

    def cost(chosen: Chosen) -> tuple[float, int]:
        return chosen.error + price * chosen.bytes, chosen.bytes

    best = []
    for ways in layers:
        taken = [
            {m: min(((_bought(c, price), c) for c in cs), key=lambda pair: cost(pair[0])) for m, cs in way.items()}
            for way in ways
        ]
        best.append(min(taken, key=lambda way: sum(cost(chosen)[0] for chosen, _ in way.values())))
    return best


def _bought(candidate: Candidate, price: float) -> Chosen:
    blocks = (candidate.gains > price * candidate.price).sum(1) if candidate.price else candidate.gains.sum(1)
    return _with_blocks(candidate, blocks.long())


def _with_blocks(candidate: Candidate, blocks: Tensor) -> Chosen:
    if not candidate.price:
        return Chosen(candidate.form, (), candidate.error, candidate.bytes)
    upto = torch.nn.functional.pad(candidate.gains.cumsum(1), (1, 0))
    gained = float(upto.gather(1, blocks.unsqueeze(1)).sum())
    ranks = tuple(RANK_BLOCK * (1 + n) for n in blocks.tolist())
    size = candidate.bytes + candidate.price * int(blocks.sum())
    return Chosen(candidate.form, ranks, candidate.error - gained, size)


def _filled(taken: list[_Taken], budget: int) -> list[dict[str, Chosen]]:
    """More ranks for what was chosen, the most gain for a byte first, while they fit."""
    left = budget - sum(chosen.bytes for layer in taken for chosen, _ in layer.values())
    blocks = {
        (i, m): torch.tensor([r // RANK_BLOCK - 1 for r in chosen.ranks])
        for i, layer in enumerate(taken)
        for m, (chosen, candidate) in layer.items()
        if candidate.price
    }
    offers = []
    for (i, m), own in blocks.items():
        candidate = taken[i][m][1]
        for e, row in enumerate(candidate.gains.tolist()):
            offers += [(gain / candidate.price, i, m, e, n) for n, gain in enumerate(row) if n >= own[e]]
    for _, i, m, e, n in sorted(offers, key=lambda offer: (-offer[0], offer[1:])):
        price = taken[i][m][1].price
        if price <= left and n == blocks[i, m][e]:
            blocks[i, m][e] += 1
            left -= price
    return [
        {m: _with_blocks(c, blocks[i, m]) if c.price else chosen for m, (chosen, c) in layer.items()}
        for i, layer in enumerate(taken)
    ]
