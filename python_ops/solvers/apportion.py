"""Budgets shared out unevenly, in whole numbers: experts to prune over layers, ranks over experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK


def apportion(weights: Sequence[float], total: int, lowest: Sequence[int], highest: Sequence[int]) -> list[int]:
    """Integers n_i with sum ``total``, in proportion to positive weights as far as lowest_i <= n_i <= highest_i allow.

        share_i = clamp(lambda weight_i, lowest_i, highest_i),  lambda such that the shares add up to the total

    Shares are rounded down; what is left goes one each to the largest remainders, earlier ones first among equals.

    Raises ValueError if the total is not within the sums of lowest and highest.
    """
    if not sum(lowest) <= total <= sum(highest):
        raise ValueError(f"total: must be in [{sum(lowest)}, {sum(highest)}], got {total}")

    def shares(scale: float) -> list[float]:
        return [min(max(scale * w, low), high) for w, low, high in zip(weights, lowest, highest, strict=True)]

    below, above = 0.0, max((high / w for w, high in zip(weights, highest, strict=True)), default=0.0)
    for _ in range(200):  # halving: the sum rises with the scale
        middle = (below + above) / 2
        if math.fsum(shares(middle)) < total:
            below = middle
        else:
            above = middle
    exact = shares(above)
    numbers = [math.floor(share + 1e-9) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: -round(exact[i] - numbers[i], 9))
    for i in order[: total - sum(numbers)]:
        numbers[i] += 1
    return numbers


class Routed(NamedTuple):
    """The experts of a layer, as a router has them: it chooses top_k, within groups_kept of its groups."""

    path: str
    num_experts: int
    top_k: int
    groups: int = 1
    groups_kept: int = 1

    @property
    def prunable(self) -> int:
        """How many may go: of a router's group 2 stay, which its score may need, and enough for top_k."""
        if self.groups == 1:
            return self.num_experts - self.top_k
        kept = max(2, -(-self.top_k // self.groups_kept))
        return max(0, self.num_experts - kept * self.groups)


def prune_counts(prune: float, layers: Sequence[Routed], importance: Sequence[float] | None = None) -> list[int]:
    """How many experts each layer loses: together ``prune`` of all, rounded down, in proportion to 1 / importance.

    importance: of each layer, None for equal ones.  Of routers with groups, multiples of their number.
    Raises ValueError where the layers cannot lose that many.
    """
    unit = math.lcm(*(layer.groups for layer in layers))
    total = int(prune * sum(layer.num_experts for layer in layers) / unit + 1e-9)
    most = [layer.prunable // unit for layer in layers]
    if total > sum(most):
        least = min(layers, key=lambda layer: layer.prunable / layer.num_experts)
        raise ValueError(
            f"prune: {prune} of the experts is {total * unit}, and no more than {sum(most) * unit} can go: "
            f"{least.path}, for one, must keep {least.num_experts - least.prunable} of {least.num_experts} "
            f"for its router to choose {least.top_k}; lower prune"
        )
    known = max(importance or [1.0])
    weights = [1.0] * len(layers) if importance is None else [1 / max(i, 1e-9 * known or 1.0) for i in importance]
    return [unit * n for n in apportion(weights, total, [0] * len(layers), most)]


def shared_ranks(weights: Sequence[float], rows: int, columns: int, retain: float) -> list[int]:
    """Ranks of matrices (N, K) in proportion to positive weights, multiples of 16, together ``retain`` of their size.

    Each is at least 16, and no larger than what makes the factors as large as the matrix, N K / (N + K).
    """
    break_even = rows * columns / (rows + columns)
    most = max(1, int(break_even / RANK_BLOCK))
    blocks = int(retain * break_even * len(weights) / RANK_BLOCK + 1e-9)
    blocks = min(max(blocks, len(weights)), most * len(weights))
    return [RANK_BLOCK * n for n in apportion(weights, blocks, [1] * len(weights), [most] * len(weights))]
