"""Forms under a budget: against every combination there is, on problems small enough for that."""

from __future__ import annotations

import itertools

import pytest
import torch

from resmoe_kernels.python_ops.solvers.size_plan import Candidate, plan_sizes


def whole(error: float, size: int, name: str = "") -> Candidate:
    return Candidate({"name": name}, error, size, torch.zeros(2, 0, dtype=torch.float64))


def ranked(error: float, size: int, gains: list[list[float]], price: int) -> Candidate:
    return Candidate({}, error, size, torch.tensor(gains, dtype=torch.float64), price)


def every_choice(layers, budget: int) -> float:
    """The least error of all combinations, ranks included."""

    def of(c: Candidate):
        if not c.price:
            return [(c.error, c.bytes)]
        counts = itertools.product(*(range(len(row) + 1) for row in c.gains.tolist()))
        return [
            (c.error - sum(sum(r[:n]) for r, n in zip(c.gains.tolist(), ns, strict=True)), c.bytes + c.price * sum(ns))
            for ns in counts
        ]

    per_layer = [
        [pair for way in ways for pair in itertools.product(*([o for c in cs for o in of(c)] for cs in way.values()))]
        for ways in layers
    ]
    fits = [
        sum(e for matrices in combination for e, _ in matrices)
        for combination in itertools.product(*per_layer)
        if sum(b for matrices in combination for _, b in matrices) <= budget
    ]
    return min(fits)


LAYERS = [
    [
        {"up": [ranked(9, 10, [[4, 1], [2, 0.5]], 3), whole(1, 40)], "down": [whole(5, 8), whole(2, 16)]},
        {"up": [ranked(4, 22, [[1, 0.3], [0.5, 0.2]], 3)], "down": [whole(3, 12)]},
    ],
    [{"up": [ranked(20, 10, [[8, 3], [8, 3]], 4)], "down": [whole(6, 8), whole(0.5, 30)]}],
]


@pytest.mark.parametrize("budget", range(36, 130, 3))
def test_no_worse_than_every_choice_up_to_one_step(budget):
    taken = plan_sizes(LAYERS, budget)
    spent = sum(c.bytes for layer in taken for c in layer.values())
    error = sum(c.error for layer in taken for c in layer.values())
    assert spent <= budget
    # A Lagrangian is exact at the bytes it spends; between two of its points it can lack a step.
    assert every_choice(LAYERS, spent) <= error + 1e-9
    assert error <= every_choice(LAYERS, budget - 24) + 1e-9 if budget >= 60 else True


def test_one_way_for_all_matrices_of_a_layer():
    ways = [
        {"up": [whole(9, 10, "a")], "down": [whole(9, 10, "a")]},
        {"up": [whole(0, 15, "b")], "down": [whole(8, 15, "b")]},
    ]
    taken = plan_sizes([ways], 30)
    assert [c.form["name"] for c in taken[0].values()] == ["b", "b"]
    assert [c.form["name"] for c in plan_sizes([ways], 29)[0].values()] == ["a", "a"]


def test_what_is_left_buys_ranks():
    layers = [[{"up": [ranked(10, 10, [[4, 3, 0.1], [1, 0.5, 0.2]], 5)]}]]
    assert plan_sizes(layers, 10)[0]["up"].ranks == (16, 16)
    assert plan_sizes(layers, 24)[0]["up"].ranks == (48, 16)
    assert plan_sizes(layers, 26)[0]["up"].ranks == (48, 32)
    most = plan_sizes(layers, 1000)[0]["up"]
    assert most.ranks == (64, 64) and most.bytes == 40 and most.error == pytest.approx(10 - 8.8)


def test_a_budget_that_nothing_fits_names_the_least():
    with pytest.raises(ValueError, match="size: the least that these layers can be stored in is 36 bytes, got 35"):
        plan_sizes(LAYERS, 35)


def test_a_form_between_two_prices_is_found():
    """Of one layer the middle form is the best in 30 bytes, and no price of a byte takes it: it is above the line from
    the first to the last."""
    forms = [ranked(10, 10, [[1, 0.5], [0.1, 0]], 2), whole(6, 30, "middle"), whole(0, 40, "last")]
    layers = [[{"up": forms}], [{"up": forms}]]
    for count in (1, 2):
        taken = plan_sizes(layers[:count], 30 * count)
        assert [layer["up"].form["name"] for layer in taken] == ["middle"] * count
    other = [[{"up": [whole(6, 30, "another"), whole(0, 40, "last")]}]]
    assert plan_sizes([layers[0], *other], 60)[1]["up"].form["name"] == "last"  # forms differ: by price alone


@pytest.mark.parametrize(("lost", "differ"), [(9.0, False), (5.0, True)])
def test_forms_differ_by_layer_only_where_that_loses_clearly_less(lost, differ):
    """Alike: 5 + 5 in 40 bytes. By price the second layer is left at the cheap form, and the first has more for it."""
    forms = [whole(9, 10, "cheap"), whole(5, 20, "middle"), whole(0.5, 30, "dear")]
    other = [whole(lost, 10, "cheap"), whole(5, 20, "middle"), whole(4.9, 30, "dear")]
    names = [layer["up"].form["name"] for layer in plan_sizes([[{"up": forms}], [{"up": other}]], 40)]
    assert names == (["dear", "cheap"] if differ else ["middle", "middle"])
