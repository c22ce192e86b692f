"""Budgets that follow the error: the bytes are those of a uniform one, and nothing else would lose less."""

from __future__ import annotations

import itertools
import json
import math
import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import resmoe_kernels as rk
from benchmarks import tables
from benchmarks.quality import bench_budgets
from resmoe_kernels.factored import MATRICES, DenseExperts
from resmoe_kernels.python_ops.calibration.statistics import Statistics
from resmoe_kernels.python_ops.cli import inspect_checkpoint
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.methods.resmoe import resmoe
from resmoe_kernels.python_ops.solvers.budgets import BUDGETS, Curves, allot, buy_blocks, weights_of_errors
from tests import families
from tests.conftest import REPO

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {
    "stacked": {},
    "separate": {"factorization": "separate"},
    "joint": {"factorization": "joint"},
    "bitmap": {"residual": "sparse", "sparse_layout": "bitmap"},
    "block": {"residual": "sparse", "sparse_layout": "block"},
}
UNEVEN = ("error", "usage")
HIDDEN, INNER, COUNT = 40, 56, 4  # no multiples of 32: words of the sparse layouts end early


def make_layer(seed: int, gated: bool = True, dtype: torch.dtype = torch.float32) -> DenseExperts:
    """Layers and experts differ in size, in how far they are from each other and in how their spectra fall."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        inner = min(rows, columns)
        common = torch.randn(rows, columns, generator=generator)
        own = [
            torch.randn(rows, inner, generator=generator)
            * torch.exp(-0.05 * (e + seed) * torch.arange(inner))
            @ torch.randn(inner, columns, generator=generator)
            for e in range(COUNT)
        ]
        return ((1 + seed) * torch.stack([common + 0.1 * (e + 1) * o for e, o in enumerate(own)])).to(dtype)

    rows = 2 * INNER if gated else INNER
    return DenseExperts(matrix(rows, HIDDEN), matrix(HIDDEN, INNER), gated=gated)


class Model:
    """As much of a DenseModel as planning takes."""

    def __init__(self, layers: list[DenseExperts]) -> None:
        self.layers = layers
        self.experts = [types.SimpleNamespace(path=str(i)) for i in range(len(layers))]

    def read(self, i: int) -> DenseExperts:
        return self.layers[i]


def statistics(layers: int) -> Statistics:
    """Expert 0 has nearly all tokens of layer 0, no expert of layer 1 has any."""
    counts = [torch.tensor([90, 5, 0, 5]), torch.zeros(COUNT, dtype=torch.int64), torch.tensor([1, 2, 3, 4])]
    return Statistics({str(i): types.SimpleNamespace(count=counts[i % 3]) for i in range(layers)}, {}, torch.empty(0))


def compressed(layers: list[DenseExperts], **settings):
    method, model = method_named("resmoe", settings), Model(layers)
    known = statistics(len(layers)) if method.needs_statistics else None
    plans = method.plan(model, range(len(layers)), known, False)
    return plans, [method(layer, plan=plan) for layer, plan in zip(layers, plans, strict=True)]


def stored(made) -> int:
    return sum(m.weights.nbytes() for m in made)


# ---- what is spent


RETAIN = (0.13, 0.25, 0.375, 0.5, 0.9)
# Between the block layout's numbers a uniform budget rounds.
CASES = [(form, retain) for form in FORMS for retain in (RETAIN if form != "block" else RETAIN[1:4])]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("budget", UNEVEN)
@pytest.mark.parametrize(("form", "retain"), CASES)
def test_bytes_are_those_of_the_uniform_budget(form, retain, budget, gated):
    """Not more, and less by no more than a step: all indices are counted."""
    layers = [make_layer(seed, gated) for seed in range(3)]
    uniform, uneven = (
        stored(compressed(layers, retain=retain, budget=b, **FORMS[form])[1]) for b in ("uniform", budget)
    )
    rows = (2 if gated else 1) * INNER
    step = (
        4
        * {
            "stacked": 16 * (INNER + HIDDEN),
            "separate": 16 * (INNER + HIDDEN),
            "joint": 16 * (INNER + (3 if gated else 2) * HIDDEN),
            "bitmap": 1,
            "block": 4 * COUNT * rows * 2,  # the dearer matrix: of the other all may be kept already
        }[form]
    )
    assert uniform - step < uneven <= uniform


@pytest.mark.parametrize("budget", UNEVEN)
def test_a_mean_between_the_numbers_of_the_block_layout(budget):
    """A uniform budget rounds 0.3, which is 9.6 of 32, down to 8."""
    layers = [make_layer(seed) for seed in range(3)]
    lower, mean, upper = (
        stored(compressed(layers, retain=r, budget=b, **FORMS["block"])[1])
        for r, b in ((0.25, "uniform"), (0.3, budget), (0.375, "uniform"))
    )
    step = 4 * 4 * COUNT * HIDDEN * 2
    assert lower + 0.4 * (upper - lower) - step < mean <= lower + 0.4 * (upper - lower)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_and_layers_of_two_types(form):
    """Bytes are what is pooled: of the float32 layer half as many values as of the other."""
    layers = [make_layer(0, dtype=torch.bfloat16), make_layer(1)]
    uniform, uneven = (stored(compressed(layers, budget=b, **FORMS[form])[1]) for b in ("uniform", "error"))
    assert 0.9 * uniform < uneven <= uniform


# ---- where it goes


def weighted_error(layers, made, counts=None) -> float:
    """What allot minimises, from the weights that are stored."""
    total = 0.0
    for i, (layer, m) in enumerate(zip(layers, made, strict=True)):
        dense = m.weights.materialize()
        # In any order of the neurons, norms are what they are; errors need the order that was stored.
        order = made_orders(layer)
        share = torch.ones(COUNT).double() if counts is None else counts[i].double() + 1
        lost, energy = {}, {}
        for matrix in MATRICES:
            original = torch.stack([aligned(layer, matrix, e, order[e]) for e in range(COUNT)]).double()
            lost[matrix] = (original - getattr(dense, matrix).double()).square().sum((1, 2))
            energy[matrix] = original.square().sum((1, 2))
        sums = {m: (share * energy[m]).sum() for m in MATRICES}
        total += sum(float((share * lost[m]).sum() / (sums[m] * sum(sums.values())).sqrt()) for m in MATRICES)
    return total


def made_orders(layer):
    from resmoe_kernels.python_ops.solvers.align import barycenter

    return barycenter(layer).permutations


def aligned(layer, matrix, e, order):
    weight = getattr(layer, matrix)[e]
    if matrix == "down":
        return weight[:, order]
    return torch.cat([half[order] for half in weight.chunk(2 if layer.gated else 1)])


@pytest.mark.parametrize("budget", UNEVEN)
@pytest.mark.parametrize("form", ["stacked", "separate", "bitmap", "block"])
def test_the_weighted_error_is_less_than_with_a_uniform_budget(form, budget):
    layers = [make_layer(seed % 3) for seed in range(3 if form != "block" else 9)]
    counts = [s.count for s in statistics(len(layers)).layers.values()] if budget == "usage" else None
    errors = [
        weighted_error(layers, compressed(layers, retain=0.375, budget=b, **FORMS[form])[1], counts)
        for b in ("uniform", budget)
    ]
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_curves_are_what_compression_then_saves(form):
    layer = make_layer(1)
    method = method_named("resmoe", {"budget": "error", "retain": 0.375, **FORMS[form]})
    measured = method.measure(layer, plan={})
    curves = Curves.from_tensors(measured)
    (plan,) = method.plan(Model([layer]), [0], None, False)
    made = method(layer, plan=plan)
    dense, order = made.weights.materialize(torch.float64), measured["permutations"]
    for matrix, gains in curves.gains.items():
        kept = plan["allotted"][matrix]
        unit = {"bitmap": curves.prices[matrix], "block": 4}.get(form, 16)
        steps = [(n - 4 if form == "block" else n) / unit for n in ([kept] * COUNT if form == "block" else kept)]
        for e in range(COUNT):
            # A part of a step counts for less than its share: the largest entries come first.
            least = float(gains[e, : math.floor(steps[e])].sum())
            most = float(gains[e, : math.ceil(steps[e])].sum())
            saved = 0.0
            for m in MATRICES if form == "joint" else [matrix]:
                base = getattr(made.weights, f"base_{m}")[0].double()
                delta = aligned(layer, m, e, order[e]).double() - base
                left = aligned(layer, m, e, order[e]).double() - getattr(dense, m)[e]
                saved += float(delta.square().sum() - left.square().sum())
                if form == "block":
                    padded = torch.nn.functional.pad(delta.square(), (0, -delta.shape[1] % 32)).unflatten(1, (-1, 32))
                    saved -= float(padded.topk(4).values.sum())
            assert least * (1 - 1e-5) - 1e-9 <= saved <= most * (1 + 1e-5) + 1e-9


def test_the_joint_factorisation_has_one_error_of_all_matrices(monkeypatch):
    given = []
    module = "resmoe_kernels.python_ops.methods.resmoe.allot"
    monkeypatch.setattr(module, lambda layers, weights: given.extend(weights) or allot(layers, weights))
    layer = make_layer(1)
    compressed([layer], budget="usage", **FORMS["joint"])
    energy = sum(getattr(layer, m).double().square().sum((1, 2)) for m in MATRICES)
    expected = weights_of_errors({"gate_up": energy}, statistics(1).layers["0"].count)
    assert given[0].keys() == expected.keys()
    torch.testing.assert_close(given[0]["gate_up"], expected["gate_up"])


def test_an_expert_that_is_used_gets_more():
    layers = [make_layer(0)] * 2
    for form in ("stacked", "bitmap"):
        plans, _ = compressed(layers, retain=0.3, budget="usage", **FORMS[form])
        for matrix in MATRICES:
            used, unused = (p["allotted"][matrix] for p in plans)
            assert used[0] >= unused[0] and used[2] <= unused[2]
        (first, third), (first_unused, third_unused) = (
            [sum(p["allotted"][m][e] for m in MATRICES) for e in (0, 2)] for p in plans
        )
        assert first > 1.2 * first_unused and third < third_unused


def test_a_layer_all_alike_gets_what_a_uniform_budget_gives():
    """Nothing is left to choose between layers that are the same."""
    layers = [make_layer(2)] * 3
    plans, _ = compressed(layers, retain=0.25, budget="error", **FORMS["bitmap"])
    totals = [sum(map(sum, p["allotted"].values())) for p in plans]
    assert max(totals) - min(totals) <= 4 * HIDDEN * INNER * 2 // 64


@pytest.mark.parametrize("form", FORMS)
def test_degenerate_layers(form):
    """Experts all equal leave nothing to save; zeros have no energy to be relative to."""
    equal = make_layer(0)
    equal = DenseExperts(equal.gate_up[:1].repeat(COUNT, 1, 1), equal.down[:1].repeat(COUNT, 1, 1))
    zeros = DenseExperts(torch.zeros_like(equal.gate_up), torch.zeros_like(equal.down))
    for layers in ([equal, zeros], [equal, make_layer(1), zeros]):
        plans, made = compressed(layers, budget="error", **FORMS[form])
        assert made[0].report.relative_error < 1e-6 and made[-1].report.relative_error == 0
        if form != "block" and len(layers) == 2:
            assert not any(n for plan in plans for counts in plan["allotted"].values() for n in counts)


# ---- the rule


def curves_of(gains, prices, budget, **options):
    gains = {m: torch.tensor(g, dtype=torch.float64) for m, g in gains.items()}
    sizes = {m: prices[m] * g.shape[1] for m, g in gains.items()}
    return Curves(gains, prices, sizes, budget, options.pop("width", 1), **options)


def test_what_an_error_counts_for():
    energy = {"gate_up": torch.tensor([4.0, 12.0]).double(), "down": torch.tensor([3.0, 1.0]).double()}
    alike = weights_of_errors(energy)
    assert alike["gate_up"].tolist() == pytest.approx([1 / math.sqrt(16 * 20)] * 2)
    assert alike["down"].tolist() == pytest.approx([1 / math.sqrt(4 * 20)] * 2)
    used = weights_of_errors(energy, torch.tensor([2, 0]))
    sums = {"gate_up": 3 * 4 + 12, "down": 3 * 3 + 1}
    for matrix, whole in sums.items():
        root = math.sqrt(whole * sum(sums.values()))
        assert used[matrix].tolist() == pytest.approx([3 / root, 1 / root])
    assert weights_of_errors({"down": torch.zeros(2).double()})["down"].tolist() == [1, 1]
    unknown = weights_of_errors(energy, torch.zeros(2, dtype=torch.int64))  # no token reached the layer
    assert all(torch.equal(unknown[m], alike[m]) for m in MATRICES)


@pytest.mark.parametrize("budget", [1, 5, 8, 12])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_is_better(seed, budget):
    """Two layers, a matrix and two experts each, three falling steps a row: all 256 choices."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(2, 2, 3, generator=generator).double().sort(dim=-1, descending=True).values
    weights = torch.rand(2, 2, 1, generator=generator).double()
    layers = [curves_of({"down": g.tolist()}, {"down": 7}, 7 * n) for g, n in zip(gains, (budget, 0), strict=True)]
    found = allot(layers, [{"down": w.flatten()} for w in weights])
    saved = torch.nn.functional.pad((gains * weights).cumsum(-1), (1, 0)).view(4, 4)

    def worth(steps):
        return sum(float(row[n]) for row, n in zip(saved, steps, strict=True))

    steps = [p // 7 for of_layer in found for p in of_layer["down"]]
    assert sum(steps) == budget
    choices = (s for s in itertools.product(range(4), repeat=4) if sum(s) <= budget)
    assert worth(steps) == pytest.approx(max(map(worth, choices)), rel=1e-12)


def test_blocks_are_bought_by_energy_per_price():
    rows = [torch.tensor([8.0, 2.0]), torch.tensor([12.0, 1.0])]
    assert buy_blocks(rows, [1, 2], 1) == [1, 0]  # 8 a piece against 6
    assert buy_blocks(rows, [1, 2], 3) == [1, 1]
    assert buy_blocks(rows, [1, 2], 4) == [2, 1]
    assert buy_blocks(rows, [1, 2], 2) == [2, 0]  # the dearer one does not fit, the next that fits is taken
    assert buy_blocks(rows, [1, 2], math.inf) == [2, 2]
    assert buy_blocks(rows, [5, 5], 4) == [0, 0]


def test_blocks_of_zeros_are_never_bought():
    assert buy_blocks([torch.tensor([1.0, 0.0, 0.0])], [1], math.inf) == [1]


def test_budgets_are_pooled_in_bytes():
    """One layer's parameters are twice as wide, and what it does not spend goes to the other."""
    wide = curves_of({"down": [[1.0, 1.0]]}, {"down": 5}, 10, width=2)
    narrow = curves_of({"down": [[9.0] * 8]}, {"down": 5}, 10)
    one = {"down": torch.ones(1).double()}
    assert allot([wide, narrow], [one, one]) == [{"down": [0]}, {"down": [30]}]


def test_divisible_steps_spend_all():
    layer = curves_of({"gate_up": [[5.0, 1.0]], "down": [[3.0, 2.0]]}, {"gate_up": 10, "down": 10}, 27, divisible=True)
    one = {m: torch.ones(1).double() for m in MATRICES}
    assert allot([layer], [one]) == [{"gate_up": [10], "down": [17]}]
    dear = curves_of({"gate_up": [[5.0, 2.0]], "down": [[4.0, 1.5]]}, {"gate_up": 10, "down": 5}, 19, divisible=True)
    assert allot([dear], [one]) == [{"gate_up": [10], "down": [9]}]  # 1.5 for 5 is more than 2 for 10
    last = Curves(layer.gains, layer.prices, {"gate_up": 20, "down": 13}, 36, 1, divisible=True)
    assert allot([last], [one]) == [{"gate_up": [20], "down": [13]}]  # no matrix has more than its size


def test_steps_taken_together_weigh_all_experts():
    layer = curves_of({"gate_up": [[5.0], [0.0]], "down": [[3.0], [3.0]]}, {"gate_up": 1, "down": 1}, 2, together=True)
    one = {m: torch.ones(2).double() for m in MATRICES}
    assert allot([layer], [one]) == [{"gate_up": [0], "down": [2]}]
    first = {m: torch.tensor([1.0, 0.1]).double() for m in MATRICES}
    assert allot([layer], [first]) == [{"gate_up": [2], "down": [0]}]


def test_curves_are_stored_and_read():
    for options in ({}, {"together": True}, {"divisible": True, "width": 2}):
        curves = curves_of({"gate_up": [[5.0, 1.0]], "down": [[3.0, 2.0]]}, {"gate_up": 10, "down": 7}, 27, **options)
        back = Curves.from_tensors({**curves.tensors(), "permutations": torch.arange(3)})
        assert back.gains.keys() == curves.gains.keys()
        assert all(torch.equal(back.gains[m], curves.gains[m]) for m in curves.gains)
        same = ("prices", "sizes", "budget", "width", "together", "divisible")
        assert all(getattr(back, name) == getattr(curves, name) for name in same)


# ---- whole models


def test_uniform_plans_nothing():
    layers = [make_layer(0)]
    plans, (made,) = compressed(layers)
    assert plans == [{}]
    direct = resmoe(layers[0])
    assert all(torch.equal(t, made.weights.tensors()[n]) for n, t in direct.weights.tensors().items())


@pytest.mark.parametrize("form", FORMS)
def test_in_memory_gives_the_same_as_on_disk(form, tmp_path):
    families.build("qwen3_moe").save_pretrained(tmp_path / "dense")
    settings = {"budget": "error", "retain": 0.375, **FORMS[form]}
    rk.compress(tmp_path / "dense", tmp_path / "out", progress=False, **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    rk.swap_experts(model, progress=False, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    stored_layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    in_memory = model.config.quantization_config.layers
    assert {p: s["report"] for p, s in stored_layers.items()} == {p: s["report"] for p, s in in_memory.items()}


def test_inspect_shows_what_each_layer_was_allotted(repo, tmp_path):
    out = rk.compress(
        repo / "examples" / "tiny-mixtral", tmp_path / "out", budget="error", progress=False, **FORMS["block"]
    )
    rows = inspect_checkpoint(out)
    for i, row in enumerate(rows):
        tensors = load_file(out / f"experts-{i:05d}.safetensors")
        of_32 = {m: tensors[f"{row['path']}.values_{m}"].shape[-1] for m in MATRICES}
        assert row["kept"] == {m: n / 32 for m, n in of_32.items()}
        numbers = "/".join(dict.fromkeys(map(str, of_32.values())))
        assert row["form"] == f"base x1 + block {numbers}:32"
    assert any("/" in row["form"] for row in rows)
    mean = sum(2 * row["kept"]["gate_up"] + row["kept"]["down"] for row in rows) / (3 * len(rows))
    assert mean == 0.25


def test_usage_takes_calibration(repo, tmp_path):
    dense = repo / "examples" / "tiny-mixtral"
    text = {"calibration": repo / "examples" / "wikitext2-excerpt.txt", "calibration_tokens": 512}
    out = rk.compress(dense, tmp_path / "out", budget="usage", progress=False, **text)
    rk.compress(dense, tmp_path / "even", progress=False)
    ranks = [row["mean_rank"] for folder in (out, tmp_path / "even") for row in inspect_checkpoint(folder)]
    assert ranks[: len(ranks) // 2] != ranks[len(ranks) // 2 :]
    spent, even = (sum(row["bytes_now"] for row in inspect_checkpoint(f)) for f in (out, tmp_path / "even"))
    assert even - 16 * (256 + 512) * 2 < spent <= even


@pytest.mark.parametrize("parts", [1, 2])
def test_after_xmoe_what_it_leaves_is_measured(parts, tmp_path):
    families.build("mixtral").save_pretrained(tmp_path / "dense")
    xmoe = {"threshold": 0.9} if parts == 1 else {"parts": 2, "split": "contiguous"}
    settings = {"method": "xmoe+resmoe", "budget": "error", "retain": 0.5, **xmoe}
    out = rk.compress(tmp_path / "dense", tmp_path / "out", progress=False, **settings)
    rk.compress(tmp_path / "dense", tmp_path / "even", progress=False, **{**settings, "budget": "uniform"})
    rows, even = inspect_checkpoint(out), inspect_checkpoint(tmp_path / "even")
    assert sum(r["bytes_now"] for r in rows) <= sum(r["bytes_now"] for r in even)
    if parts == 1:  # weights as they are: what resmoe by itself makes
        alone = rk.compress(tmp_path / "dense", tmp_path / "alone", budget="error", retain=0.5, progress=False)
        for name in ("experts-00000.safetensors", "experts-00001.safetensors"):
            assert (alone / name).read_bytes() == (out / name).read_bytes()


# ---- the comparison


@pytest.mark.parametrize("model", ["tiny-mixtral", "tiny-deepseek"])
def test_the_committed_rows_are_of_the_same_bytes_and_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    source = REPO / "benchmarks" / "results" / f"budgets-{model}.csv"
    dense, *rows = tables.read_rows(source)
    assert dense["form"] == "dense"
    cases = [(row["form"], float(row["retain"]), row["budget"]) for row in rows]
    assert cases == [(*case, budget) for case in bench_budgets.CASES for budget in BUDGETS]
    for uniform, *uneven in zip(*[iter(rows)] * len(BUDGETS), strict=True):
        for row in uneven:
            spent = int(row["expert_bytes"]) / int(uniform["expert_bytes"])
            assert (0.97 if row["form"] == "block" else 0.998) < spent <= 1
    bench_budgets.plot(source, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").stat().st_size > 20_000


# ---- refused


@pytest.mark.parametrize("budget", UNEVEN)
def test_a_mean_that_the_block_layout_cannot_meet(budget):
    message = (
        r"^retain: the block layout keeps at least 4 of 32, so that a mean is at least 0\.125, got 0\.1; "
        r"use sparse_layout='bitmap', or budget='uniform' to round up$"
    )
    with pytest.raises(ValueError, match=message):
        method_named("resmoe", {"budget": budget, "retain": 0.1, **FORMS["block"]})
    with pytest.raises(ValueError, match=r"^retain: the block layout keeps at most 16 of 32"):
        method_named("resmoe", {"budget": budget, "retain": 0.6, **FORMS["block"]})
    method_named("resmoe", {"budget": "uniform", "retain": 0.1, **FORMS["block"]})
    method_named("resmoe", {"budget": budget, "retain": 0.1, **FORMS["bitmap"]})


@pytest.mark.parametrize("retain", [0, 1.5, -0.25, math.nan])
@pytest.mark.parametrize("budget", BUDGETS)
def test_retain_out_of_range(budget, retain):
    with pytest.raises(ValueError, match=rf"^retain: must be in \(0, 1\], got {retain}$"):
        method_named("resmoe", {"budget": budget, "retain": retain})


def test_a_budget_that_is_not_known():
    with pytest.raises(ValueError, match=r"^budget: must be one of uniform, error, usage, got 'global'$"):
        method_named("resmoe", {"budget": "global"})


def test_a_layer_without_its_plan():
    message = r"^plan: budget='error' needs it, because what a layer gets depends on the others; see plan$"
    with pytest.raises(ValueError, match=message):
        resmoe(make_layer(0), budget="error")


def test_calibration_that_is_missing_or_not_used(repo, tmp_path):
    dense = repo / "examples" / "tiny-mixtral"
    with pytest.raises(ValueError, match=r"^calibration: resmoe needs a text to see how the experts are used; name a"):
        rk.compress(dense, tmp_path / "out", budget="usage", progress=False)
    with pytest.raises(ValueError, match=r"^calibration: resmoe uses no calibration with these settings; leave it out"):
        rk.compress(dense, tmp_path / "out", budget="error", residual="sparse", calibration="text.txt", progress=False)
    with pytest.raises(ValueError, match=r"^statistics: resmoe with these settings needs statistics, see calibrate"):
        rk.swap_experts(families.build("mixtral"), budget="usage")
    assert not list(tmp_path.iterdir())


def test_usage_of_parts_is_not_known():
    message = r"statistics of the experts it compresses, .* or follow with resmoe and a budget other than usage$"
    with pytest.raises(ValueError, match=message):
        method_named("xmoe+resmoe", {"parts": 4, "part_mass": 0.9, "budget": "usage"})
    method_named("xmoe+resmoe", {"parts": 4, "part_mass": 0.9, "budget": "error"})
