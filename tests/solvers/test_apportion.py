"""Budgets in whole numbers: sums kept, bounds kept, in proportion as far as they allow."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_kernels.python_ops.solvers.apportion import Routed, apportion, prune_counts, shared_ranks

POSITIVE = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(POSITIVE, st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=9), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_apportion_keeps_the_sum_the_bounds_and_the_order_of_weights(rows, data):
    weights, lowest, room = zip(*rows, strict=True)
    highest = [low + r for low, r in zip(lowest, room, strict=True)]
    total = data.draw(st.integers(sum(lowest), sum(highest)))
    numbers = apportion(weights, total, lowest, highest)
    assert sum(numbers) == total
    assert all(low <= n <= high for low, n, high in zip(lowest, numbers, highest, strict=True))
    for i, j in itertools.permutations(range(len(rows)), 2):
        if weights[i] > weights[j] and (lowest[i], highest[i]) == (lowest[j], highest[j]):
            assert numbers[i] >= numbers[j]
    order = data.draw(st.permutations(range(len(rows))))
    if len(set(weights)) == len(weights):
        moved = apportion(
            *(
                [values[i] for i in order] if k != 1 else total
                for k, values in enumerate((weights, (), lowest, highest))
            )
        )
        assert moved == [numbers[i] for i in order]


def test_apportion_is_the_largest_remainder_where_nothing_is_in_the_way():
    assert apportion([3, 2, 2], 10, [0] * 3, [10] * 3) == [4, 3, 3]  # 4.29, 2.86, 2.86
    assert apportion([1, 1, 1], 5, [0] * 3, [5] * 3) == [2, 2, 1]
    assert apportion([10, 1, 1], 12, [0] * 3, [5] * 3) == [5, 4, 3]  # what the first cannot take goes to the others
    assert apportion([10, 1, 1], 12, [0, 0, 2], [12] * 3) == [9, 1, 2]
    assert apportion([], 0, [], []) == []


def test_apportion_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"^total: must be in \[2, 7\], got 8$"):
        apportion([1, 1], 8, [1, 1], [3, 4])


def layers_of(*experts, top_k=2, groups=1):
    return [Routed(f"layers.{i}.experts", e, top_k, groups) for i, e in enumerate(experts)]


def test_layers_that_matter_more_lose_less():
    counts = prune_counts(0.25, layers_of(8, 8, 8, 8), [1.0, 2.0, 4.0, 4.0])
    assert counts == [4, 2, 1, 1]
    assert prune_counts(0.25, layers_of(8, 8, 8, 8)) == [2, 2, 2, 2]
    assert prune_counts(0.0, layers_of(8, 8), [1.0, 2.0]) == [0, 0]
    assert prune_counts(0.25, layers_of(8, 8), [0.0, 0.0]) == [2, 2]
    assert prune_counts(0.25, layers_of(8, 8), [0.0, 3.0]) == [4, 0]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 100)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.floats(0, 0.99),
    st.integers(1, 4),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_layer_loses_what_its_router_needs(layers, top_k, prune, groups):
    width = [max(w, 2) for w, _ in layers]
    top_k = min(top_k, *width)
    routed = layers_of(*(groups * w for w in width), top_k=top_k, groups=groups)
    try:
        counts = prune_counts(prune, routed, [i for _, i in layers])
    except ValueError:
        return
    total = prune * sum(r.num_experts for r in routed)
    assert total - groups < sum(counts) <= total + 1e-6
    for r, count in zip(routed, counts, strict=True):
        assert count % groups == 0
        kept_per_group = (r.num_experts - count) // groups
        assert kept_per_group >= (top_k if groups == 1 else max(2, top_k))


def test_a_budget_below_top_k_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^prune: 0.8 of the experts is 9, and no more than 8 can go: layers.1.experts, for one, must keep 2 of "
        r"4 for its router to choose 2; lower prune$",
    ):
        prune_counts(0.8, layers_of(8, 4))


def test_groups_keep_two_experts_and_enough_for_top_k():
    assert Routed("x", 32, 6, groups=4, groups_kept=2).prunable == 32 - 4 * 3
    assert Routed("x", 32, 1, groups=4, groups_kept=2).prunable == 32 - 4 * 2
    assert Routed("x", 4, 6, groups=4, groups_kept=2).prunable == 0


@given(st.lists(POSITIVE, min_size=1, max_size=8), st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_ranks_are_blocks_with_the_sum_kept(weights, rows, columns, retain):
    ranks = shared_ranks(weights, rows, columns, retain)
    break_even = rows * columns / (rows + columns)
    highest = max(16, break_even // 16 * 16)
    assert all(rank % 16 == 0 and 16 <= rank <= highest for rank in ranks)
    wanted = min(max(retain * break_even * len(weights), 16 * len(weights)), highest * len(weights))
    assert wanted - 16 < sum(ranks) <= wanted + 1e-6


def test_ranks_follow_weights():
    assert shared_ranks([1.0] * 4, 256, 256, 0.5) == [64] * 4
    assert shared_ranks([2.0, 1.0, 1.0, 1.0], 256, 256, 0.5) == [112, 48, 48, 48]  # 102.4 and 51.2
    assert shared_ranks([9.0, 1.0, 1.0, 1.0], 256, 256, 0.5) == [128, 48, 48, 32]  # break-even is 128
