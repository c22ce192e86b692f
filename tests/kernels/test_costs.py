"""Bytes and operations of every launch: against the ideal, against the tensors that launches are given, by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import shapes
from resmoe_kernels.costs import CHUNK, Routing, layer_costs
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import TARGETS

pytest.importorskip("triton")
from resmoe_kernels.triton_kernels import experts as experts_triton
from resmoe_kernels.triton_kernels import routing as routing_triton
from resmoe_kernels.triton_kernels.experts import problem_of
from resmoe_kernels.triton_kernels.launch import Launch, recorded


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(weights: FactoredExperts, tokens: int, top_k: int, dtype: torch.dtype = torch.bfloat16):
    return problem_of(on_meta(tokens, weights.hidden_size, dtype=dtype), on_meta(tokens, top_k), weights)


# ---- the ideal of a layer: every weight that is needed once, activations written once and read once


def ideal_bytes(shape: shapes.Shape, form: str, T: int, retain: float = 0.25) -> float:
    """x and y, h of every pair, base products and the weighted sum of h in bfloat16, V x and V' h where there are any;
    the base, and of every expert that uniform routing meets what it retains: 2 bytes a weight, 2.5 where one of four
    weights is stored beside a bit for each."""
    H, I, E, k = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k
    expert, hit = 3 * H * I, E * (1 - (1 - k / E) ** T)
    activations = 2 * T * H * 2 + 2 * T * k * I * 2 + 2 * T * 2 * I * 2 + 2 * T * I * 2
    if form == "lowrank":
        rank = retain * H * I / (H + I)
        activations += 2 * T * k * 2 * rank * 2 + 2 * T * k * rank * 2
        return 2 * expert + hit * retain * expert * 2 + activations
    return 2 * expert + hit * expert * (retain * 2 + 1 / 8) + activations


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["lowrank", "block", "bitmap"])
@pytest.mark.parametrize("name", ["mixtral", "dsv2lite", "qwen3", "olmoe"])
def test_decode_moves_what_the_ideal_moves(name, form, target):
    shape = shapes.SHAPES[name]
    weights = shapes.layer_sizes(shape, form, 0.25)
    for T in (1, 8, 64):
        costs = layer_costs(weights, Routing.uniform(T, shape.top_k, weights), problem(weights, T, shape.top_k), target)
        ideal = ideal_bytes(shape, form, T)
        assert sum(cost.nbytes for cost in costs) == pytest.approx(ideal, rel=0.05), T
        flops = 2 * 3 * shape.hidden_size * shape.intermediate_size * T
        flops *= 1 + (0.25 if form == "lowrank" else 1) * shape.top_k
        assert sum(cost.flops for cost in costs) == pytest.approx(flops, rel=0.03)


def test_what_the_readme_says_of_prefill():
    """Bytes beyond the ideal and the sum of all launches at their rooflines; clocks that a pass issues for."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    text = " ".join((results.parent / "gpu" / "prefill.md").read_text().split())

    def listed(numbers: list[float]) -> str:
        *first, last = (f"{number:.0f}" for number in numbers)
        return f"{', '.join(first)} and {last}"

    def of(name: str, T: int) -> tuple[float, float]:
        shape = shapes.SHAPES[name]
        weights = shapes.layer_sizes(shape, "lowrank", 0.25)
        call = problem(weights, T, shape.top_k)
        costs = layer_costs(weights, Routing.uniform(T, shape.top_k, weights), call, "sm_90")
        beyond = sum(cost.nbytes for cost in costs) / ideal_bytes(shape, "lowrank", T) - 1
        return 100 * beyond, sum(max(c.nbytes / 3350e9, c.flops / 990e12) for c in costs) * 1e6

    models = ("mixtral", "dsv2lite", "qwen3", "olmoe")
    few, many = ([of(name, T) for name in models] for T in (512, 4096))
    assert f"At T = 512 launches move {listed([beyond for beyond, _ in few])} % more" in text
    assert f"At T = 4096 it is {listed([beyond for beyond, _ in many])} %." in text
    assert f"of all launches at their rooflines, {listed([time for _, time in many])} us" in text
    clocks = {"shrink": set(), "down": set(), "gate_up": set()}
    with (results / "compile.csv").open() as file:
        for row in csv.DictReader(file):
            large = (
                row["target"] == "sm_90" and "BLOCK_M=128" in row["constants"] and "OPERAND=bf16" in row["constants"]
            )
            grouped = any(f"{name} lowrank bfloat16 G=1 T=4096" in row["launched_by"] for name in models)
            if large and grouped and row["kernel"] != "prefill_sum":
                clocks[row["kernel"].removeprefix("prefill_")].add(
                    int(row["main_instructions"]) * int(row["warps"]) // 4
                )
    found = (min(clocks["shrink"]), max(clocks["shrink"]), *clocks["down"], *clocks["gate_up"])
    assert "takes {} to {} clocks to issue (shrink), {} (down) or {} (gate_up)".format(*found) in text


# ---- against the tensors of real launches: where all experts meet all tokens, a launch needs all it is given


LAYERS = {
    "low-rank": {"group": [0] * 6, "ranks": [16] * 6},
    "groups-bias": {"group": [0, 1, 2, 0, 1, 2], "ranks": [16, 8, 32, 40, 16, 16], "bias": True},
    "no-base": {"ranks": [16] * 6},
    "plain-dense": {"group": [0, 1, 2, 3, 4, 5]},
    "block": {"group": [0] * 6, "sparse": 8},
    "bitmap": {"group": [0] * 6, "sparse": "bitmap", "bias": True},
    "all": {"group": [0, 1, 0, 1, 0, 1], "ranks": [16] * 6, "sparse": 8},
    "ungated": {"group": [0] * 6, "ranks": [16] * 6, "gated": False},
    "gate-up-only": {"group": [0] * 6, "ranks": [16] * 6, "sparse": 8, "only": "gate_up"},
    "down-only": {"group": [0] * 6, "ranks": [16] * 6, "sparse": "bitmap", "only": "down"},
    "float32": {"group": [0] * 6, "ranks": [16] * 6, "dtype": torch.float32},
}
H, I = 192, 128
LISTS = {
    f"{name}_ptr"
    for name in ("group", "rank_offsets", "down_offsets", "hit", "blocks", "counters", "expert_offsets", "partial")
}  # a few kilobytes, and partial sums, which stay in L2: costs leave them out


def needed_bytes(launch: Launch, used_of_c: int) -> int:
    """What a launch is given and needs, every tensor once."""
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    given = {name: t for name, t in given.items() if isinstance(t, torch.Tensor) and name not in LISTS}
    unused: set[str] = set()
    if launch.name in ("decode_gate_up", "prefill_gate_up") and not given.keys() & {"base_ptr", "mask_ptr"}:
        unused = {"x_ptr"}
    elif launch.name == "prefill_down":
        unused |= set() if given.keys() & {"base_ptr", "mask_ptr"} else {"wh_ptr"}
        unused |= set() if "bias_ptr" in given else {"weights_ptr"}
    elif launch.name == "decode_h" and not given.keys() & {"v_ptr", "mask_ptr"}:
        unused = {"wh_ptr"}
    elif launch.name == "decode_down" and "bias_ptr" not in given:
        unused = {"index_ptr", "weights_ptr"}
    elif launch.name == "prefill_sum" and "pairs_ptr" not in given:
        unused = {"index_ptr"}
    total = 0
    for name, tensor in given.items():
        if name == "c_ptr":
            total += used_of_c  # it has room for ranks that are padded, or for the longest there could be
        elif name not in unused:
            total += tensor.nbytes
    return total


@pytest.mark.parametrize("T", [1, 5, 64, 65, 300])
@pytest.mark.parametrize("case", LAYERS)
def test_costs_are_the_tensors_that_launches_get(case, T, make_layer):
    layer = {"dtype": torch.bfloat16, **LAYERS[case]}
    weights, dtype = make_layer(**layer, hidden_size=H, intermediate_size=I), layer["dtype"]
    E = weights.num_experts
    index = torch.arange(E).expand(T, E).contiguous()
    call = problem(weights, T, E, dtype)
    costs = layer_costs(weights, Routing.of(index, weights), call, "sm_90")
    meta = FactoredExperts.from_tensors({n: t.to("meta") for n, t in weights.tensors().items()}, **weights.sizes())
    with recorded("sm_90") as launches:
        experts_triton.experts(on_meta(T, H, dtype=dtype), index.to("meta"), on_meta(T, E, dtype=dtype), meta, "silu")
    own = [cost for cost in costs if cost.launch != "mm"]
    assert [cost.launch for cost in own] == [launch.name for launch in launches]
    matrix = "gate_up"
    for cost, launch in zip(own, launches, strict=True):
        used_of_c = T * sum(weights.ranks(matrix)) * call.itemsize
        # Row offsets are one more than rows.
        assert cost.nbytes == pytest.approx(needed_bytes(launch, used_of_c), abs=8), launch.name
        matrix = "down" if launch.name.endswith("gate_up") else matrix

    assert ("mm" in {cost.launch for cost in costs}) == (T > 64 and case in (
        "low-rank", "ungated", "gate-up-only", "down-only", "float32"
    ))  # fmt: skip
    rows = 2 * I if weights.gated else I
    pairs = T * E
    flops = 2 * pairs * (sum(weights.ranks("gate_up")) * (rows + H) + sum(weights.ranks("down")) * (H + I)) / E
    dense = {"gate_up": 2 * rows * H, "down": 2 * H * I}
    for m, product in dense.items():
        if getattr(weights, f"mask_{m}") is not None:
            merges = T > 64 or weights.base_gate_up is None
            flops += pairs * product + (0 if merges else T * weights.base_gate_up.shape[0] * product)
        elif weights.base_gate_up is not None:
            groups = weights.base_gate_up.shape[0]
            flops += product * (pairs if T > 64 and groups > 1 else T * groups)
    sums = sum(cost.flops for cost in costs if cost.launch == "prefill_sum")
    assert sum(cost.flops for cost in costs) - sums == pytest.approx(flops)


@pytest.mark.parametrize("G", [1, 3])
def test_only_experts_and_groups_that_are_hit_are_counted(G, make_layer):
    """One expert more reads its own weights, and its group's base where no one else had it."""
    weights = make_layer(
        group=[e % G for e in range(6)], ranks=[16, 32, 0, 16, 48, 16], sparse=8, bias=True, hidden_size=H,
        intermediate_size=I,
    )  # fmt: skip

    def nbytes(*experts: int) -> float:
        index = torch.tensor([[*experts, *[6] * (3 - len(experts))]])
        return sum(
            c.nbytes
            for c in layer_costs(weights, Routing.of(index, weights), problem(weights, 1, 3, torch.float32), "sm_90")
        )

    part = weights.nbytes_by_part()
    for e in range(1, 6):
        own = sum(
            (weights.rows_columns(m)[0] + weights.rows_columns(m)[1]) * weights.ranks(m)[e] * 4
            for m in ("gate_up", "down")
        )
        own += (part["sparse"] + part["bias"] + 4 * (weights.mask_gate_up.numel() + weights.mask_down.numel())) // 6
        own += 0 if e % G == 0 else part["base"] // G
        # What it leaves: ranks of both products, h, and of a further group a.
        between = 2 * 4 * (weights.ranks("gate_up")[e] + weights.ranks("down")[e] + I) + (
            0 if e % G == 0 else 2 * 4 * 2 * I
        )
        assert nbytes(0, e) - nbytes(0) == pytest.approx(own + between), e


def test_ranks_of_down_are_stored_for_every_token(make_layer):
    """V x is stored for the tokens of an expert; V' h for all, zeros for the others."""
    weights = make_layer(group=[0] * 6, ranks=[16, 32, 0, 16, 48, 16], hidden_size=H, intermediate_size=I)
    index = torch.tensor([[0], [1], [4]])
    x, _, h, _ = layer_costs(weights, Routing.of(index, weights), problem(weights, 3, 1, torch.float32), "sm_90")
    assert x.nbytes == 3 * 8 + 4 * (3 * H + 2 * I * H + 96 * H + 3 * 2 * I + 96)
    assert h.nbytes == 3 * 8 + 4 * (3 * I + H * I + 3 * I + 96 * I + 96 * 3 + 3 * H)  # 16, 48 and 32 in down


def test_skipped_slots_count_for_nothing(make_layer):
    weights = make_layer(group=[0, 1, -1, 0, 1, -1], ranks=[16] * 6)
    routing = Routing.of(torch.tensor([[0, 3, 6], [1, -1, 2**32], [5, 2, 7]]), weights)
    assert routing.pairs.tolist() == [1, 1, 1, 1, 0, 1] == routing.hit.tolist()
    assert routing.group_tokens.tolist() == [1, 1] == routing.group_hit.tolist()
    assert routing.based.tolist() == [True, True, False, True, True, False]
    again = Routing.of(torch.tensor([[0, 0, 3]] * 5), weights)
    assert again.pairs.tolist() == [10, 0, 0, 5, 0, 0] and again.group_tokens.tolist() == [5, 0]


def test_expected_routing_is_the_mean_of_draws(make_layer, generator):
    weights = make_layer(group=[0, 0, 1, 0, -1, 0])
    draws = [
        Routing.of(torch.rand(4, 6, generator=generator).argsort(1)[:, :2], weights) for _ in range(2000)
    ]  # fmt: skip
    expected = Routing.uniform(4, 2, weights)
    for name in ("hit", "pairs", "group_hit", "group_tokens"):
        mean = torch.stack([getattr(r, name) for r in draws]).mean(0)
        torch.testing.assert_close(mean, getattr(expected, name), rtol=0.03, atol=0.03)


def test_prefill_counts_pairs_in_chunks_of_the_sort():
    assert CHUNK == routing_triton.CHUNK
