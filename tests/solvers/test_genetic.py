"""The search among sets of experts: what it may return, that it finds what there is, and that it can be repeated."""

import csv
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_kernels.python_ops.solvers.genetic import SEARCHES, Sets, search
from tests.conftest import REPO


def quadratic(num_experts, seed):
    """A rugged error: ||sum of the members' vectors||^2, where members make up for each other or add up."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_experts, 12, generator=generator, dtype=torch.float64)
    vectors *= torch.rand(num_experts, 1, generator=generator, dtype=torch.float64)
    return lambda rows: (rows.double() @ vectors).square().sum(1)


def run(kind, error, sets, seed=0, **arguments):
    return search(kind, error, sets, generator=torch.Generator().manual_seed(seed), **arguments)


def exhaustive(error, sets):
    """All errors in order, the sets made here."""
    width, taken = sets.num_experts // sets.groups, sets.size // sets.groups
    of_group = [c for c in itertools.combinations(range(width), taken)]
    errors = []
    for combination in itertools.product(of_group, repeat=sets.groups):
        row = torch.zeros(1, sets.num_experts, dtype=torch.bool)
        for g, members in enumerate(combination):
            row[0, [g * width + m for m in members]] = True
        errors.append(float(error(row)))
    return sorted(errors)


@pytest.mark.parametrize(
    "sets", [Sets(8, 3), Sets(8, 0), Sets(4, 4), Sets(1, 0), Sets(12, 4, 4), Sets(8, 8, 2)], ids=str
)
def test_all_sets_are_there_once(sets):
    rows = sets.all()
    assert rows.shape == (sets.count, sets.num_experts)
    assert len(rows.unique(dim=0)) == sets.count
    taken = rows.view(len(rows), sets.groups, -1).sum(-1)
    assert bool((taken == sets.size // sets.groups).all())


@given(
    groups=st.integers(1, 4),
    width=st.integers(2, 6),
    data=st.data(),
    kind=st.sampled_from(SEARCHES),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_found_are_different_sets_of_the_size_asked_for_best_first(groups, width, data, kind, seed):
    sets = Sets(groups * width, groups * data.draw(st.integers(0, width)), groups)
    error = quadratic(sets.num_experts, seed)
    found = run(kind, error, sets, seed, population=12, generations=4, keep=5)
    assert 1 <= len(found.sets) <= 5
    assert len(found.sets.unique(dim=0)) == len(found.sets)
    assert bool((found.sets.view(len(found.sets), groups, -1).sum(-1) == sets.size // groups).all())
    assert torch.equal(found.errors, found.errors.sort().values)
    torch.testing.assert_close(found.errors, error(found.sets), rtol=0, atol=0)


@pytest.mark.parametrize("kind", SEARCHES)
def test_every_set_is_asked_about_once(kind):
    asked = []

    def error(rows):
        asked.extend(map(bytes, rows.numpy().tolist()))
        return quadratic(14, 0)(rows)

    found = run(kind, error, Sets(14, 5), population=20, generations=6)
    assert len(asked) == len(set(asked)) == found.evaluations
    assert found.evaluations <= {"genetic": 20 + 16 * 6, "random": 20 * 6, "greedy": 14 * 5}[kind]


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("sets", [Sets(8, 2), Sets(8, 4, 4), Sets(6, 0)], ids=str)
def test_few_sets_are_all_looked_at(kind, sets):
    error = quadratic(sets.num_experts, 3)
    found = run(kind, error, sets, population=100)
    assert found.evaluations == sets.count
    assert found.errors.tolist() == pytest.approx(exhaustive(error, sets)[:3], rel=1e-12)


@pytest.mark.parametrize("sets", [Sets(14, 5), Sets(16, 8, 4)], ids=str)
def test_genetic_is_near_exhaustive_and_no_worse_than_random_at_equal_evaluations(sets):
    better = exact = 0
    for seed in range(6):
        error = quadratic(sets.num_experts, seed)
        genetic = run("genetic", error, sets, population=40, generations=12)
        random = run("random", error, sets, population=genetic.evaluations, generations=1)
        assert random.evaluations == genetic.evaluations < 0.4 * sets.count
        assert float(genetic.errors[0]) <= float(random.errors[0])
        better += float(genetic.errors[0]) < float(random.errors[0])
        everything = exhaustive(error, sets)
        assert float(genetic.errors[0]) <= everything[len(everything) // 200] * (1 + 1e-9)  # of the best half percent
        exact += float(genetic.errors[0]) <= everything[0] * (1 + 1e-9)
    assert better >= 3 and exact >= 3


def test_greedy_takes_the_least_harmful_expert_at_each_step():
    error, sets = quadratic(9, 1), Sets(9, 3)
    members = []
    for _ in range(3):
        rows = {e: torch.zeros(1, 9, dtype=torch.bool) for e in range(9) if e not in members}
        for e, row in rows.items():
            row[0, [*members, e]] = True
        members.append(min(rows, key=lambda e: float(error(rows[e]))))
    found = run("greedy", error, sets, population=4)
    assert found.sets[0].nonzero().flatten().tolist() == sorted(members)
    assert found.evaluations == 9 + 8 + 7


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_same_seed_gives_the_same_and_another_seed_another_search(kind):
    asked = []

    def error(rows):
        asked[-1].append(rows.clone())
        return quadratic(14, 2)(rows)

    for seed in (0, 0, 1):
        asked.append([])
        run(kind, error, Sets(14, 5), seed, population=20, generations=5)
    first, again, other = (torch.cat(rows) for rows in asked)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind == "greedy")


def test_the_benchmark_measures_every_layer_of_a_model(tmp_path):
    command = ["-m", "benchmarks.compression.bench_genetic", "examples/tiny-mixtral", "--tokens", 128, "--threads", 1]
    command += ["--text", REPO / "examples/wikitext2-excerpt.txt", "--csv", tmp_path / "new/g.csv"]
    subprocess.run([sys.executable, *map(str, command)], cwd=REPO, check=True, capture_output=True, text=True)
    with (tmp_path / "new/g.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        assert (row["experts"], row["pruned"], row["sets"], row["evaluations"]) == ("8", "2", "28", "28")
        assert row["error_genetic"] == row["error_exhaustive"] <= row["error_greedy"]
