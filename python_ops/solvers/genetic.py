"""Search among sets of experts of one size: which to prune, if all that can be asked is how bad a set is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SEARCHES = ("genetic", "greedy", "random")
PARENTS = 0.2  # of the population
MUTATION = 0.3  # of the children
Error = Callable[[Tensor], Tensor]  # sets (C, E) bool -> (C,) float, lower is better


@dataclass(frozen=True)
class Sets:
    """All sets of ``size`` of ``num_experts`` experts that take the same number from each of ``groups`` neighbouring
    groups. A set is a row of (C, E) bool."""

    num_experts: int
    size: int
    groups: int = 1

    @property
    def count(self) -> int:
        return math.comb(self.num_experts // self.groups, self.size // self.groups) ** self.groups

    def all(self) -> Tensor:
        """(count, E)."""
        width, taken = self.num_experts // self.groups, self.size // self.groups
        of_group = torch.zeros(math.comb(width, taken), width, dtype=torch.bool)
        if taken:
            of_group.scatter_(1, torch.combinations(torch.arange(width), taken), True)
        rows = torch.arange(len(of_group))
        index = torch.cartesian_prod(*[rows] * self.groups).view(-1, self.groups)
        return of_group[index].flatten(1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, E), each set as likely as any other."""
        return self.choose(torch.ones(count, self.num_experts, dtype=torch.bool), generator)

    def choose(self, allowed: Tensor, generator: torch.Generator) -> Tensor:
        """A random set inside each of ``allowed`` (C, E) bool, which hold enough of every group."""
        draws = torch.rand(allowed.shape, generator=generator).where(allowed, -1).unflatten(1, (self.groups, -1))
        chosen = draws.topk(self.size // self.groups, dim=-1).indices
        return torch.zeros(draws.shape, dtype=torch.bool).scatter(-1, chosen, True).flatten(1)


class Found(NamedTuple):
    """What a search found: the best different sets (K, E) bool, best first, their errors (K,) float64, and how many
    different sets it asked about."""

    sets: Tensor
    errors: Tensor
    evaluations: int


def search(
    kind: str,
    error: Error,
    sets: Sets,
    *,
    population: int = 100,
    generations: int = 50,
    keep: int = 3,
    generator: torch.Generator,
) -> Found:
    """The ``keep`` best sets found by a search of SEARCHES; ``random`` may ask as often as ``genetic`` at most does.

    error: of sets (C, E) bool; asked about a set once.  Where there are no more sets than the first population
    holds, every search is exhaustive.
    """
    asked = _Asked(error)
    if sets.count <= population:
        asked(sets.all())
    elif kind == "genetic":
        _genetic(asked, sets, population, generations, generator)
    elif kind == "greedy":
        _greedy(asked, sets)
    else:
        _ask_random(asked, sets, population * generations, generator)
    return asked.best(sets, keep)


def _genetic(asked: _Asked, sets: Sets, population: int, generations: int, generator: torch.Generator) -> None:
    """The paper's: random sets at first, then children of the best fifth of a population.

        child = a random set inside the union of two parents;  with probability 0.3 one member for a non-member

    Source: MoE-I2, arXiv 2411.01016. Its parents and its mutation are not stated there; these are those of public
    re-implementations. Parents are the best different sets so far: they live on, and have no twins.
    """
    _ask_random(asked, sets, population, generator)
    parents = max(2, round(PARENTS * population))
    for _ in range(generations):
        best = asked.best(sets, parents).sets
        pairs = torch.rand(population - parents, parents, generator=generator).topk(2).indices
        children = sets.choose(best[pairs].any(1), generator)
        mutated = torch.rand(len(children), generator=generator) < MUTATION
        asked(_mutate(children, sets, generator).where(mutated.unsqueeze(1), children))


def _mutate(rows: Tensor, sets: Sets, generator: torch.Generator) -> Tensor:
    """In one random group of each, one member for one that is not."""
    draws = torch.rand(rows.shape, generator=generator)
    group = torch.randint(sets.groups, (len(rows), 1), generator=generator)
    inside = (torch.arange(rows.shape[1]) // (rows.shape[1] // sets.groups)) == group
    leaves = draws.where(inside & rows, -1).argmax(1, keepdim=True)
    enters = draws.where(inside & ~rows, -1).argmax(1, keepdim=True)
    return rows.scatter(1, leaves, False).scatter(1, enters, True)


def _greedy(asked: _Asked, sets: Sets) -> None:
    """Adds the expert that does least harm, until the set is full."""
    row = torch.zeros(sets.num_experts, dtype=torch.bool)
    for _ in range(sets.size):
        full = row.view(sets.groups, -1).sum(1) == sets.size // sets.groups
        free = ~row & ~full.repeat_interleave(sets.num_experts // sets.groups)
        candidates = row | torch.eye(sets.num_experts, dtype=torch.bool)[free]
        row = candidates[asked(candidates).argmin()]


def _ask_random(asked: _Asked, sets: Sets, count: int, generator: torch.Generator) -> None:
    """Asks about ``count`` different sets, or all there are."""
    if sets.count <= count:
        asked(sets.all())
        return
    while (missing := count - len(asked.errors)) > 0:
        asked(sets.draw(missing, generator))


class _Asked:
    """Answers by set, each asked for once."""

    def __init__(self, error: Error) -> None:
        self.error = error
        self.errors: dict[bytes, float] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Errors (C,) float64 of sets (C, E)."""
        keys = [row.tobytes() for row in rows.numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in self.errors}
        if new:
            self.errors.update(zip(new, self.error(rows[list(new.values())]).tolist(), strict=True))
        return torch.tensor([self.errors[key] for key in keys], dtype=torch.float64)

    def best(self, sets: Sets, keep: int) -> Found:
        full = [key for key in self.errors if sum(key) == sets.size]  # greedy also asks about smaller ones
        chosen = sorted(full, key=lambda key: self.errors[key])[:keep]
        rows = torch.tensor([list(key) for key in chosen], dtype=torch.bool).view(-1, sets.num_experts)
        return Found(rows, torch.tensor([self.errors[key] for key in chosen], dtype=torch.float64), len(self.errors))
