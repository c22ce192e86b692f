"""Router changes against plain loops, and what a change says of itself."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_kernels.python_ops.models.routing import (
    COMBINE,
    RouterChange,
    Scoring,
    Threshold,
    choose_parts,
    fold,
    keep_mass,
    map_slots,
    mass_before,
    part_shares,
    select,
)

NEVER = -math.inf


def random_logits(tokens, experts, seed=0, spread=2.0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * spread


def by_size(values):
    """Indices from the largest value to the smallest, equal ones by index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def scores_of(row, kind):
    if kind == "sigmoid":
        return [1 / (1 + math.exp(-v)) if v > NEVER else 0.0 for v in row]
    top = max(row)
    powers = [math.exp(v - top) if v > NEVER else 0.0 for v in row]
    return [p / sum(powers) for p in powers]


def plain_select(row, scoring, pruned=None, masked="before", threshold=None, bias=None):
    """One token, as the docstrings say it: [(slot, weight)] in order of choice."""
    E = len(row)
    pruned = pruned or [False] * E
    scores = scores_of([NEVER if pruned[i] and masked == "before" else row[i] for i in range(E)], scoring.score)
    left = [i for i in range(E) if not pruned[i]]
    if threshold is not None:
        order = [left[i] for i in by_size([scores[i] for i in left])]
        used, mass = [], 0.0
        for i in order[: threshold.max_experts]:
            if used and mass >= threshold.mass and threshold.mass < 1:
                break
            used.append(i)
            mass += scores[i]
        weights = {
            "raw": [scores[i] for i in used],
            "ones": [1.0 for i in used],
            "renormalised": [scores[i] / mass for i in used],
        }[threshold.combine]
        return [(i, w * scoring.scale) for i, w in zip(used, weights, strict=True)]
    choice = [scores[i] + (bias[i] if bias else 0.0) for i in range(E)]
    if scoring.groups > 1:
        size = E // scoring.groups
        of_group = []
        for g in range(scoring.groups):
            members = sorted((choice[i] for i in range(g * size, (g + 1) * size) if not pruned[i]), reverse=True)
            members += [NEVER] * size
            of_group.append(members[0] if scoring.group_score == "max" else members[0] + members[1])
        kept = by_size(of_group)[: scoring.groups_kept]
        left = [i for i in left if i // size in kept]
    used = [left[i] for i in by_size([choice[i] for i in left])][: scoring.top_k]
    total = sum(scores[i] for i in used) if scoring.normalised else 1.0
    return [(i, scores[i] / total * scoring.scale) for i in used]


def assert_selects(logits, scoring, **how):
    pruned = how.get("pruned")
    given_pruned = {} if pruned is None else {"pruned": torch.tensor(pruned), "left": pruned.count(False)}
    bias = {} if how.get("bias") is None else {"bias": torch.tensor(how["bias"])}
    weights, slots = select(logits, scoring, **{**how, **given_pruned, **bias})
    assert weights.dtype == torch.float32 and slots.dtype == torch.int64 and weights.shape == slots.shape
    for row, got_slots, got_weights in zip(logits.tolist(), slots.tolist(), weights.tolist(), strict=True):
        expected = plain_select(row, scoring, **how)
        got = [(s, w) for s, w in zip(got_slots, got_weights, strict=True) if s >= 0]
        assert all(w == 0 for s, w in zip(got_slots, got_weights, strict=True) if s < 0)
        assert [s for s, _ in got] == [s for s, _ in expected]
        assert [w for _, w in got] == pytest.approx([w for _, w in expected], rel=1e-5, abs=1e-7)
    return slots


# ---- top-k as it was, and with pruned slots

SCORINGS = [
    Scoring(2),
    Scoring(3, normalised=True, scale=2.5),
    Scoring(3, "sigmoid", normalised=True),
    Scoring(4, "sigmoid", groups=4, groups_kept=2, group_score="top2"),
    Scoring(4, groups=2, groups_kept=1, group_score="max", scale=0.5),
    Scoring(8, groups=4, groups_kept=3),
]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("masked", ["before", "after"])
@pytest.mark.parametrize("pruned", [(), (0,), (1, 5, 6), (0, 2, 4, 6)])
def test_top_k(scoring, masked, pruned):
    slots = assert_selects(
        random_logits(40, 12), scoring, pruned=[i in pruned for i in range(12)] if pruned else None, masked=masked
    )
    assert not set(pruned) & set(slots.flatten().tolist())


@pytest.mark.parametrize("groups", [1, 4])
def test_a_correction_bias_is_of_the_choice_only(groups):
    bias = [0.0, 2.0, 0.0, -2.0, 0.5, 0.0, 0.1, 0.0]
    scoring = Scoring(2, "sigmoid", normalised=True, groups=groups, groups_kept=2, group_score="top2")
    slots = assert_selects(random_logits(30, 8), scoring, bias=bias)
    assert bool((slots == 1).any(1).all()) or groups > 1


def test_fewer_slots_left_than_top_k():
    pruned = [True, False, True, True, False]
    slots = assert_selects(random_logits(9, 5), Scoring(4, normalised=True), pruned=pruned)
    assert slots.shape == (9, 2)


def test_a_group_with_fewer_slots_left_than_top_k_leaves_slots_unused():
    pruned = [True, True, True, False, False, False, False, False]
    logits = random_logits(200, 8)
    slots = assert_selects(logits, Scoring(4, groups=2, groups_kept=1), pruned=pruned)
    in_first = (slots == 3).any(1)
    assert in_first.any() and bool((slots[in_first] >= 0).sum(1).eq(1).all())


# ---- thresholds


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("max_experts", [None, 1, 3])
@pytest.mark.parametrize("masked", ["before", "after"])
@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_threshold(mass, combine, max_experts, masked):
    threshold = Threshold(mass, combine, max_experts)
    for pruned in (None, [False, True, False, False, True, False, False]):
        slots = assert_selects(
            random_logits(50, 7), Scoring(2, scale=1.5), pruned=pruned, masked=masked, threshold=threshold
        )
        assert bool((slots[:, 0] >= 0).all())
        left = 7 if pruned is None else 5
        assert slots.shape[1] == min(max_experts or left, left)
        if mass == 1 and max_experts is None:
            assert bool((slots >= 0).all())


@given(
    experts=st.integers(1, 9),
    mass=st.floats(1e-9, 1),
    combine=st.sampled_from(COMBINE),
    max_experts=st.none() | st.integers(1, 10),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_thresholds_of_any_size(experts, mass, combine, max_experts, spread, seed):
    logits = random_logits(6, experts, seed, spread)
    before = mass_before(logits.softmax(-1).sort(-1, descending=True).values)
    if bool((before - mass).abs().lt(1e-6).any()):
        return  # which side of the threshold is a matter of rounding
    assert_selects(logits, Scoring(1), threshold=Threshold(mass, combine, max_experts))


def test_a_token_as_sure_as_the_threshold_uses_one_expert():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    slots = assert_selects(logits, Scoring(2), threshold=Threshold(0.9))
    assert slots[0].tolist() == [0, -1, -1, -1] and slots[1].tolist() == [0, 1, 2, 3]


def test_equal_probabilities_are_taken_by_index():
    logits = torch.zeros(3, 6)
    weights, slots = select(logits, Scoring(2), threshold=Threshold(0.49))
    assert slots.tolist() == [[0, 1, 2, -1, -1, -1]] * 3
    assert weights[0].tolist() == pytest.approx([1 / 6] * 3 + [0] * 3)


def test_all_experts_at_one_whatever_rounding_does_to_their_sum():
    # In float32 the running sum passes 1 before the last of these experts, whose probability is not zero.
    probability = torch.tensor([[0.4, 0.3, 0.2, 0.1, 1e-9]])
    slots = select(probability.log(), Scoring(2), threshold=Threshold(1.0))[1]
    assert slots.tolist() == [[0, 1, 2, 3, 4]]


def test_a_threshold_looks_at_probabilities_not_at_the_bias_of_a_choice():
    logits, bias = random_logits(20, 6), torch.tensor([0.0, 5, 0, 0, 0, 0])
    plain = select(logits, Scoring(2), threshold=Threshold(0.6))
    biased = select(logits, Scoring(2), threshold=Threshold(0.6), bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(plain, biased, strict=True))


def test_more_mass_never_uses_fewer_experts():
    logits, before = random_logits(100, 16), torch.zeros(100)
    for mass in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        used = (select(logits, Scoring(2), threshold=Threshold(mass))[1] >= 0).sum(1)
        assert bool((used >= before).all()) and used.sum() > before.sum()
        before = used


def test_mass_before():
    ordered = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert mass_before(ordered).tolist() == [[0.0, 0.5, 0.75], [0.0, 1.0, 1.0]]
    assert mass_before(torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


# ---- slots


def test_map_slots():
    expert_of_slot = torch.tensor([2, -1, 0, 0])
    slots = torch.tensor([[0, 1, 2], [3, -1, 4], [-5, 99, 2]], dtype=torch.int32)
    mapped = map_slots(slots, expert_of_slot)
    assert mapped.tolist() == [[2, -1, 0], [0, -1, -1], [-1, -1, 0]] and mapped.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold(dtype):
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(-1, 4, (200, 5), generator=generator)
    weights = torch.rand(200, 5, generator=generator).to(dtype)
    folded, summed = fold(experts, weights)
    assert summed.dtype == dtype
    for row, w, got, got_w in zip(*(t.tolist() for t in (experts, weights, folded, summed)), strict=True):
        first = {e: row.index(e) for e in row if e >= 0}
        assert got == [e if e >= 0 and first[e] == k else -1 for k, e in enumerate(row)]
        for e, k in first.items():
            total = sum(w[i] for i in range(5) if row[i] == e)
            assert got_w[k] == pytest.approx(total, rel=1e-6 if dtype == torch.float32 else 2**-8)


# ---- parts


def plain_parts(x, experts, weights, router, parts, mass):
    """One token: {part id: weight}."""
    E = len(router) // parts
    shares = []
    for k, (e, w) in enumerate(zip(experts, weights, strict=True)):
        if 0 <= e < E:
            logits = [sum(a * b for a, b in zip(x, router[e * parts + j], strict=True)) for j in range(parts)]
            shares += [(w * q, k * parts + j, e * parts + j, w) for j, q in enumerate(scores_of(logits, "softmax"))]
    shares.sort(key=lambda s: (-s[0], s[1]))
    total, sum_before, used = sum(s[0] for s in shares), 0.0, {}
    for share, _, part, w in shares:
        if used and sum_before >= mass * total and mass < 1:
            break
        used[part] = w
        sum_before += share
    return used


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("mass", [1e-6, 0.35, 0.8, 0.999, 1.0])
def test_choose_parts(parts, mass):
    generator = torch.Generator().manual_seed(1)
    E, K, H = 4, 3, 6
    x, router = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (60, E * parts))
    experts = torch.stack([torch.randperm(E + 2, generator=generator)[:K] - 1 for _ in x])  # also -1 and E
    weights = torch.rand(60, K, generator=generator)
    ids, spread = choose_parts(x, experts, weights, router, parts, mass)
    assert ids.shape == spread.shape == (60, K * parts)
    for t in range(60):
        expected = plain_parts(*(v[t].tolist() for v in (x, experts, weights)), router.tolist(), parts, mass)
        got = {i: w for i, w in zip(ids[t].tolist(), spread[t].tolist(), strict=True) if 0 <= i < E * parts}
        assert got == pytest.approx(expected)


def test_equal_parts_are_taken_by_index_and_one_always():
    x, router = torch.randn(4, 3), torch.zeros(8, 3)
    ids, _ = choose_parts(x, torch.tensor([[1]] * 4), torch.ones(4, 1), router, 4, 0.5)
    assert ids.tolist() == [[4, 5, -1, -1]] * 4
    ids, _ = choose_parts(x, torch.tensor([[1]] * 4), torch.ones(4, 1), router, 4, 1e-9)
    assert ids.tolist() == [[4, -1, -1, -1]] * 4


def test_shares_of_a_token_sum_to_its_weight():
    generator = torch.Generator().manual_seed(2)
    x, router = torch.randn(9, 5, generator=generator), torch.randn(12, 5, generator=generator)
    experts, weights = torch.tensor([[0, 2], [3, -1], [1, 0]] * 3), torch.rand(9, 2, generator=generator)
    shares = part_shares(x.bfloat16(), experts, weights.bfloat16(), router.bfloat16(), 3)
    expected = weights.bfloat16().float().where((experts >= 0) & (experts < 4), 0).sum(1)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(1), expected)


# ---- a threshold over what a router chose


@given(
    tokens=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=4),
    unused=st.integers(0, 3),
    mass=st.sampled_from([0.1, 0.31, 0.5, 0.77, 1.0]),
    combine=st.sampled_from(["raw", "renormalised"]),
    most=st.sampled_from([None, 1, 2, 5]),
)
@settings(deadline=None, max_examples=80)
def test_kept_mass(tokens, unused, mass, combine, most):
    weights = torch.tensor(tokens, dtype=torch.float32) / 16  # sums are exact, and equal weights happen
    slots = torch.arange(3).repeat(len(tokens), 1)
    slots[:, unused:] = slots[:, unused:].where(torch.arange(3)[unused:] != 1, -1)
    made_slots, made = keep_mass(slots, weights, Threshold(mass, combine, most, "chosen"))
    for t in range(len(tokens)):
        given_here = [float(w) if s >= 0 else 0.0 for w, s in zip(weights[t], slots[t], strict=True)]
        total, kept = sum(given_here), []
        for k in by_size(given_here)[: most or 3]:
            if not kept or mass == 1 or sum(given_here[i] for i in kept) < mass * total:
                kept.append(k)
        expected = {k: given_here[k] for k in kept if slots[t, k] >= 0}
        if combine == "renormalised" and (whole := sum(expected.values())):
            expected = {k: w * total / whole for k, w in expected.items()}
        got = {k: float(made[t, k]) for k in range(3) if made_slots[t, k] >= 0}
        assert got == pytest.approx(expected, rel=1e-6)


def test_all_mass_of_what_was_chosen_comes_back_as_it_is():
    slots, weights = torch.tensor([[2, -1, 0]]), torch.tensor([[0.1, 7.0, -0.3]])
    for combine in ("raw", "renormalised"):
        kept = keep_mass(slots, weights, Threshold(1.0, combine, over="chosen"))
        assert kept[0] is slots and kept[1] is weights


# ---- the change as a value

CHANGES = [
    RouterChange(),
    RouterChange(expert_of_slot=(0, 1, 0, 1), fold=True),
    RouterChange(expert_of_slot=(0, -1, 1, -1), scoring=Scoring(2, normalised=True), masked="after"),
    RouterChange(scoring=Scoring(2), threshold=Threshold(0.8, "ones", 3), parts=4, part_mass=0.5),
    RouterChange(threshold=Threshold(0.7, "renormalised", over="chosen")),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_survives_json(change):
    assert RouterChange.from_json(json.loads(json.dumps(change.to_json()))) == change


def test_a_change_describes_itself():
    described = [c.describe() for c in CHANGES]
    assert described == [
        "",
        "4 slots on 2 experts, folded",
        "2 of 4 kept",
        "threshold 0.8 ones, at most 3; 4 parts an expert, 0.5 of their mass",
        "threshold 0.7 of the chosen renormalised",
    ]
    assert [c.changes_choice for c in CHANGES] == [False, False, True, True, False]
    assert RouterChange(expert_of_slot=(0, 0, -1), scoring=Scoring(1)).describe() == "2 of 3 kept; 2 slots on 1 experts"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Threshold(0.0), "threshold: must be in (0, 1], got 0.0"),
    (lambda: Threshold(1.1), "threshold: must be in (0, 1], got 1.1"),
    (lambda: Threshold(math.nan), "threshold: must be in (0, 1], got nan"),
    (lambda: Threshold(0.5, "mean"), "combine: must be one of raw, renormalised, ones, got 'mean'"),
    (lambda: Threshold(0.5, max_experts=0), "max_experts: must be at least 1, got 0"),
    (lambda: Threshold(0.5, over="some"), "over: must be one of all, chosen, got 'some'"),
    (lambda: Threshold(0.5, "ones", over="chosen"), "combine: 'ones' needs a router whose scores are one softmax over"),
    (lambda: RouterChange(masked="never"), "masked: must be one of before, after, got 'never'"),
    (lambda: RouterChange(parts=0), "parts: must be at least 1, got 0"),
    (lambda: RouterChange(part_mass=0.0), "part_mass: must be in (0, 1], got 0.0"),
    (lambda: RouterChange(expert_of_slot=(-1, -1)), "expert_of_slot: must leave at least one expert, got (-1, -1)"),
    (
        lambda: RouterChange(expert_of_slot=(0, -1)),
        "scoring: needed where slots are pruned or a threshold chooses, got None",
    ),
    (lambda: RouterChange(threshold=Threshold(0.5)), "scoring: needed where slots are pruned or a threshold chooses"),
    (
        lambda: RouterChange(threshold=Threshold(0.5), scoring=Scoring(2, "sigmoid")),
        "threshold: over all experts needs a router whose scores are one softmax over them, got sigmoid in 1 groups",
    ),
    (
        lambda: RouterChange(threshold=Threshold(0.5), scoring=Scoring(2, groups=4)),
        "threshold: over all experts needs a router whose scores are one softmax over them, got softmax in 4 groups",
    ),
])  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
