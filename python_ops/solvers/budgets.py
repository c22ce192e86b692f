"""Budgets that follow the error: bytes spent where a byte saves most, in steps that kernels can use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUDGETS = ("uniform", "error", "usage")


@dataclass(frozen=True, eq=False)
class Curves:
    """What a form saves of the residuals of one layer of E experts by what it stores.

    gains: by matrix (E, steps) float64, what each step takes off ||Delta_e - kept_e||_F^2; descending along a row, so
        that steps are taken in their order
    prices: by matrix, parameters of a step of one expert
    sizes: by matrix, most parameters of one expert
    budget: parameters that a uniform budget spends on all steps of the layer
    width: bytes of a parameter
    together: whether all experts take the same steps;  divisible: whether a step may be taken in part
    """

    gains: dict[str, Tensor]
    prices: dict[str, int]
    sizes: dict[str, int]
    budget: int
    width: int
    together: bool = False
    divisible: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """To be stored."""
        named = {n: torch.tensor(getattr(self, n)) for n in ("budget", "width", "together", "divisible")}
        for matrix, gains in self.gains.items():
            named[f"gains.{matrix}"] = gains
            named[f"prices.{matrix}"] = torch.tensor(self.prices[matrix])
            named[f"sizes.{matrix}"] = torch.tensor(self.sizes[matrix])
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Curves:
        """The inverse of ``tensors``; other names are passed over."""
        gains = {name.removeprefix("gains."): t for name, t in tensors.items() if name.startswith("gains.")}
        prices, sizes = ({m: int(tensors[f"{what}.{m}"]) for m in gains} for what in ("prices", "sizes"))
        budget, width, together, divisible = (int(tensors[n]) for n in ("budget", "width", "together", "divisible"))
        return cls(gains, prices, sizes, budget, width, bool(together), bool(divisible))


def weights_of_errors(energy: Mapping[str, Tensor], counts: Tensor | None = None) -> dict[str, Tensor]:
    """What a squared error of each expert's matrix m counts for, by matrix (E,) float64:

        a_e / sqrt(S_m sum_m S_m),    S_m = sum_e a_e ||W_e,m||_F^2,    a_e = counts_e + 1, or 1 without counts

    so that errors are relative, and one layer as important as another: in absolute terms the later ones, whose weights
    are larger, would get most. The root is between errors relative to the layer and to its matrix alone. Perplexity of
    tiny-mixtral / tiny-deepseek, low rank, on the last third of WikiText-2's validation set (counts from its first
    32,768 tokens): of those without counts it is best in the mean, though not everywhere.

        retain   uniform budget   absolute        to the layer    to the matrix   between         with counts
        0.1      141.9 / 345.7    147.6 / 348.6   141.0 / 347.6   139.9 / 347.2   139.1 / 335.5   134.9 / 339.2
        0.25     133.1 / 336.8    135.2 / 336.9   133.0 / 336.6   132.5 / 329.2   133.7 / 332.1   131.5 / 335.8

    energy: by matrix (E,) float64, ||W_e||_F^2
    counts: (E,) tokens of a text that were routed to each expert. One more, by the rule of succession: what an expert
        does that no token reached is little and not nothing
    """
    shares = {m: torch.ones_like(e) if counts is None else counts.double() + 1 for m, e in energy.items()}
    sums = {m: float((shares[m] * e).sum()) for m, e in energy.items()}
    return {m: shares[m] / (math.sqrt(sums[m] * sum(sums.values())) or 1.0) for m in energy}


def allot(layers: Sequence[Curves], weights: Sequence[Mapping[str, Tensor]]) -> list[dict[str, list[int]]]:
    """Spends the budgets of all layers together so that the sum of weighted errors is least.

    As gains descend along every row, taking the step that gains most per byte, over and over, is optimal but for the
    last few bytes, which pay for no step; where steps are divisible the best that is left takes them.

    weights: of each layer, by matrix (E,) float64, of its experts' squared errors
    Returns for each layer, by matrix, how many parameters each expert gets, or all of them where they go together.
    """
    rows: list[Tensor] = []
    owners: list[tuple[int, str]] = []  # of each row its layer and matrix
    prices: list[int] = []  # bytes
    sizes: list[int] = []  # bytes
    for i, curves in enumerate(layers):
        for matrix, gains in curves.gains.items():
            worth = gains * weights[i][matrix].unsqueeze(1)
            bytes_each = curves.width
            if curves.together:
                worth, bytes_each = worth.sum(0, keepdim=True), curves.width * len(gains)
            rows += list(worth)
            owners += [(i, matrix)] * len(worth)
            prices += [curves.prices[matrix] * bytes_each] * len(worth)
            sizes += [curves.sizes[matrix] * bytes_each] * len(worth)
    budget = sum(curves.budget * curves.width for curves in layers)
    bought = buy_blocks(rows, prices, budget)
    spent = [min(n * price, size) for n, price, size in zip(bought, prices, sizes, strict=True)]
    left = budget - sum(spent)
    next_gain = [float(row[n]) if n < len(row) else 0.0 for row, n in zip(rows, bought, strict=True)]
    divisible = [k for k, gain in enumerate(next_gain) if gain > 0 and layers[owners[k][0]].divisible]
    for k in sorted(divisible, key=lambda k: -next_gain[k] / prices[k]):
        width = layers[owners[k][0]].width
        more = min(left // width * width, sizes[k] - spent[k])
        spent[k] += more
        left -= more
    allotted: list[dict[str, list[int]]] = [{matrix: [] for matrix in curves.gains} for curves in layers]
    for (i, matrix), size in zip(owners, spent, strict=True):
        allotted[i][matrix].append(size // layers[i].width)
    return allotted


def buy_blocks(energies: Sequence[Tensor], prices: Sequence[int], budget: float) -> list[int]:
    """How many blocks of each row to keep: by energy per unit of price while they fit, blocks of zeros never.

    energies: per row (blocks,) float, descending
    prices: per row, of one block;  budget: in the same unit
    """
    offers = [(energy / prices[i], i) for i, row in enumerate(energies) for energy in row.tolist() if energy > 0]
    bought = [0] * len(prices)
    for _, i in sorted(offers, key=lambda offer: -offer[0]):
        if prices[i] <= budget:
            budget -= prices[i]
            bought[i] += 1
    return bought
