"""ResMoE: exact when nothing is dropped, honest about what is, and what pruning keeps to the last weight."""

import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from resmoe_kernels.factored import BLOCK_KEPT, FACTORIZATIONS, MATRICES, DenseExperts
from resmoe_kernels.python_ops.methods.resmoe import resmoe
from resmoe_kernels.python_ops.solvers.align import barycenter, design_matrix
from resmoe_kernels.python_ops.solvers.prune import bitmap, block, block_kept, keep_largest, offsets
from resmoe_kernels.sparse import expand_sparse_reference, popcount

TINY_MIXTRAL = Path(__file__).parents[2] / "examples/tiny-mixtral/model.safetensors"
LOWRANK = [{"factorization": f} for f in FACTORIZATIONS]
BITMAP = {"residual": "sparse", "sparse_layout": "bitmap"}
BLOCK_LAYOUT = {"residual": "sparse", "sparse_layout": "block"}
KINDS = [*LOWRANK, BITMAP, BLOCK_LAYOUT]
FORMS = list(itertools.product([True, False], [True, False]))  # gated, bias


def kind_id(kind):
    return "-".join(kind.values())


def make_experts(count=3, hidden=40, inter=48, gated=True, bias=False, seed=0, dtype=torch.float32):
    """Neurons of one ancestor in an order of each expert's own, plus what each has learnt."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    halves = 2 if gated else 1
    gate_up, down = randn(halves, inter, hidden), randn(hidden, inter)
    experts = []
    for _ in range(count):
        order = torch.randperm(inter, generator=generator)
        experts.append((gate_up[:, order].flatten(0, 1), down[:, order]))
    stacked = [torch.stack(m) for m in zip(*experts, strict=True)]
    weights = [m + 0.5 * randn(*m.shape) for m in stacked]
    biases = [randn(count, halves * inter), randn(count, hidden)] if bias else []
    return DenseExperts(*(t.to(dtype) for t in (*weights, *biases)), gated=gated)


def outputs(experts, x):
    """Every expert's output in float64, written out: (E, T, H)."""
    answer = []
    for e in range(experts.num_experts):
        z = x @ experts.gate_up[e].double().T
        if experts.bias_gate_up is not None:
            z = z + experts.bias_gate_up[e].double()
        inter = experts.intermediate_size
        h = z[:, :inter] / (1 + torch.exp(-z[:, :inter]))
        if experts.gated:
            h = h * z[:, inter:]
        y = h @ experts.down[e].double().T
        answer.append(y if experts.bias_down is None else y + experts.bias_down[e].double())
    return torch.stack(answer)


def aligned(experts):
    """The experts in the barycenter's neuron order, both matrices, gathered here and not by the package."""
    orders = barycenter(experts).permutations
    inter = experts.intermediate_size
    rows = torch.cat([orders, orders + inter], 1) if experts.gated else orders
    gate_up = torch.stack([experts.gate_up[e][rows[e]] for e in range(experts.num_experts)])
    down = torch.stack([experts.down[e][:, orders[e]] for e in range(experts.num_experts)])
    return gate_up, down


def tiny_mixtral():
    with safe_open(TINY_MIXTRAL, "pt") as file:

        def read(e, w):
            return file.get_tensor(f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight")

        gate_up = torch.stack([torch.cat([read(e, "w1"), read(e, "w3")]) for e in range(8)])
        return DenseExperts(gate_up, torch.stack([read(e, "w2") for e in range(8)]))


# ---- nothing dropped


@pytest.mark.parametrize(("gated", "bias"), FORMS)
@pytest.mark.parametrize("kind", [*LOWRANK, BITMAP], ids=kind_id)
def test_retain_one_reproduces_the_expert_functions(kind, gated, bias):
    experts = make_experts(gated=gated, bias=bias)
    factored, report, *_ = resmoe(experts, retain=1.0, **kind)
    factored.check_values()
    x = torch.randn(7, experts.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, got = outputs(experts, x), outputs(factored.materialize(torch.float64), x)
    assert float((got - expected).norm() / expected.norm()) < 1e-6
    assert report.relative_error < 1e-6
    # The neurons did move: it is the functions that agree, not the matrices.
    assert not torch.allclose(factored.materialize().gate_up[1], experts.gate_up[1], atol=0.1)


@given(
    count=st.integers(1, 4),
    hidden=st.integers(1, 40),
    inter=st.integers(1, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from([*LOWRANK, BITMAP]),
    seed=st.integers(0, 5),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_retain_one_reproduces_layers_of_any_size(count, hidden, inter, gated, bias, kind, seed):
    experts = make_experts(count, hidden, inter, gated, bias, seed)
    factored = resmoe(experts, retain=1.0, **kind).weights
    x = torch.randn(3, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, got = outputs(experts, x), outputs(factored.materialize(torch.float64), x)
    assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


def test_the_residual_makes_up_for_the_rounding_of_the_base():
    experts = make_experts(dtype=torch.bfloat16)
    report = resmoe(experts, retain=1.0, **BITMAP).report
    # Residuals are rounded to 8 bits of themselves; the rounding of the base, larger, would add to it.
    whole = sum(float(design_matrix(experts, e).square().sum()) for e in range(3)) / 3
    assert report.relative_error < 2**-9 * (report.objective / whole) ** 0.5


# ---- something dropped


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_the_error_falls_as_more_is_kept(kind):
    experts = make_experts(hidden=96, inter=96)
    steps = (0.125, 0.25, 0.375, 0.5) if kind is BLOCK_LAYOUT else (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
    errors = [resmoe(experts, retain=s, **kind)[1].relative_error for s in steps]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize(("gated", "bias"), FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_the_report_agrees_with_the_materialised_layer(kind, gated, bias):
    experts = make_experts(gated=gated, bias=bias, dtype=torch.bfloat16)
    factored, report, *_ = resmoe(experts, **kind)
    dense = factored.materialize(torch.float64)
    lost, whole = {}, {}
    for matrix, weight in zip(MATRICES, aligned(experts), strict=True):
        lost[matrix] = float((getattr(dense, matrix) - weight.double()).square().sum())
        whole[matrix] = float(weight.double().square().sum())
        relative = math.sqrt(lost[matrix] / whole[matrix])
        assert getattr(report, f"relative_error_{matrix}") == pytest.approx(relative, rel=1e-4)
    relative = math.sqrt(sum(lost.values()) / sum(whole.values()))
    assert report.relative_error == pytest.approx(relative, rel=1e-4)
    assert report.relative_error > 0.01
    held = [t for t in vars(experts).values() if torch.is_tensor(t)]
    assert report.bytes_dense == sum(t.untyped_storage().nbytes() for t in held)
    assert report.bytes_now == factored.nbytes()


@pytest.fixture(scope="module")
def trained():
    """The first layer of a trained model by each factorisation at a quarter: {name: Compressed}."""
    experts = tiny_mixtral()
    return {f: resmoe(experts, factorization=f) for f in FACTORIZATIONS}


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_low_rank_bytes_stay_within_the_budget(trained, factorization):
    factored, report, *_ = trained[factorization]
    parts = factored.nbytes_by_part()
    assert parts["base"] == report.bytes_dense / 8
    assert 0.95 / 4 * report.bytes_dense < parts["low_rank"] <= report.bytes_dense / 4


def test_stacked_is_nearest_on_a_trained_model_at_equal_bytes(trained):
    # Measured on this layer: 0.180 stacked, 0.191 separate, 0.240 joint. The other layers are ordered alike.
    sizes = [made.report.bytes_now for made in trained.values()]
    errors = {f: made.report.relative_error for f, made in trained.items()}
    assert max(sizes) < 1.01 * min(sizes)
    assert errors["stacked"] < 0.97 * errors["separate"]
    assert errors["separate"] < 0.97 * errors["joint"]
    assert errors["stacked"] == pytest.approx(0.180, abs=0.002)


def test_alignment_pays_where_neurons_are_shuffled():
    report = resmoe(make_experts()).report
    assert report.cosine_before < 0.1 and report.cosine_after > 0.7
    assert report.converged and report.iterations >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_experts_is_kept(dtype):
    for kind in KINDS:
        factored = resmoe(make_experts(bias=True, dtype=dtype), **kind).weights
        assert {t.dtype for t in factored.tensors().values() if t.is_floating_point()} == {dtype}


def test_biases_are_kept_exactly():
    experts = make_experts(bias=True, dtype=torch.bfloat16)
    factored = resmoe(experts).weights
    orders = barycenter(experts).permutations
    for e, order in enumerate(orders):
        assert torch.equal(factored.bias_gate_up[e], experts.bias_gate_up[e][torch.cat([order, order + 48])])
    assert torch.equal(factored.bias_down, experts.bias_down)


def test_one_group_for_all_experts():
    factored = resmoe(make_experts()).weights
    assert factored.group.tolist() == [0, 0, 0]
    assert factored.base_gate_up.shape[0] == factored.base_down.shape[0] == 1


def test_solver_and_init_reach_the_barycenter():
    experts = make_experts()
    first, mean, pot = (resmoe(experts, **a)[0] for a in ({}, {"init": "mean"}, {"solver": "pot"}))
    assert not torch.equal(first.base_gate_up, mean.base_gate_up)
    torch.testing.assert_close(first.base_gate_up, pot.base_gate_up, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_a_layer_of_zeros(kind):
    experts = DenseExperts(torch.zeros(2, 16, 8), torch.zeros(2, 8, 8))
    factored, report, *_ = resmoe(experts, **kind)
    assert report.relative_error == report.relative_error_down == 0
    assert not factored.materialize().gate_up.any()


# ---- pruning


def ranked(*matrices):
    """(matrix, index, magnitude) of all entries, largest first, earlier ones first among equals."""
    flat = [matrix.flatten().tolist() for matrix in matrices]
    entries = [(m, i, abs(v)) for m, values in enumerate(flat) for i, v in enumerate(values)]
    return sorted(entries, key=lambda entry: -entry[2])  # sorted() is stable


@given(st.integers(1, 5), st.integers(1, 70), st.floats(0.001, 1), st.integers(0, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_bitmap_keeps_exactly_the_largest_of_both_matrices(rows, columns, retain, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small integers, so that there are ties and zeros.
    pair = tuple(
        torch.randint(-4, 5, shape, generator=generator).float() for shape in ((2 * columns, rows), (rows, columns))
    )
    tensors = bitmap(lambda e: pair, 2, retain=retain)
    largest = ranked(*pair)[: math.floor(retain * 3 * rows * columns)]
    for m, (matrix, dense) in enumerate(zip(MATRICES, pair, strict=True)):
        expected = torch.zeros_like(dense).flatten()
        chosen = [i for which, i, _ in largest if which == m]
        expected[chosen] = dense.flatten()[chosen]
        mask, row_offsets = tensors[f"mask_{matrix}"], tensors[f"row_offsets_{matrix}"]
        n = dense.shape[0]
        assert int(popcount(mask).sum()) == 2 * len(chosen) == len(tensors[f"values_{matrix}"])
        for e in range(2):
            own = row_offsets[e * n : (e + 1) * n + 1]
            got = expand_sparse_reference(mask[e], tensors[f"values_{matrix}"], own, dense.shape[1])
            assert torch.equal(got, expected.view_as(dense))


@pytest.mark.parametrize("retain", [0.01, 0.25, 0.333, 1.0])
def test_bitmap_keeps_floor_of_retain_per_expert(retain):
    factored = resmoe(make_experts(), retain=retain, **BITMAP).weights
    factored.check_values()
    kept = sum(popcount(getattr(factored, f"mask_{m}")).sum((1, 2)) for m in MATRICES)
    assert kept.tolist() == [math.floor(retain * 3 * 40 * 48)] * 3


def test_bitmap_may_keep_nothing():
    factored = resmoe(make_experts(), retain=1e-5, **BITMAP).weights
    factored.check_values()
    assert factored.values_gate_up.numel() == factored.values_down.numel() == 0


def test_bitmap_weighs_both_matrices_together():
    pair = torch.full((4, 8), 1.0), torch.full((4, 8), 2.0)
    tensors = bitmap(lambda e: pair, 1, retain=0.5)
    assert tensors["values_gate_up"].numel() == 0 and tensors["values_down"].numel() == 32


def test_keep_largest_takes_lower_indices_among_equals():
    magnitude = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    assert keep_largest(magnitude, 3).nonzero().flatten().tolist() == [1, 2, 3]
    assert keep_largest(magnitude, 0).sum() == 0
    assert keep_largest(magnitude, 6).all()


def test_offsets_widen_only_where_they_must():
    assert offsets(torch.tensor([2**31 - 2, 1])).dtype == torch.int32
    wide = offsets(torch.tensor([2**31 - 2, 2]))
    assert wide.dtype == torch.int64 and wide.tolist() == [0, 2**31 - 2, 2**31]


@pytest.mark.parametrize("kept", BLOCK_KEPT)
def test_block_keeps_exactly_n_of_every_32(kept):
    factored = resmoe(make_experts(hidden=64, inter=32), retain=kept / 32, **BLOCK_LAYOUT).weights
    factored.check_values()
    for matrix in MATRICES:
        assert bool((popcount(getattr(factored, f"mask_{matrix}")) == kept).all())
        assert getattr(factored, f"values_{matrix}").shape[-1] == kept


def test_block_keeps_the_largest_before_rounding():
    # 1 + 2^-10 and 1 are one number in bfloat16: the choice is made before.
    row = torch.zeros(1, 32)
    row[0, 3:8], row[0, 20] = 1.0, 1 + 2**-10
    tensors = block(lambda e: (row, row), 1, kept=4, dtype=torch.bfloat16)
    assert int(tensors["mask_down"]) == (0b111 << 3) | (1 << 20)


ROUNDED = [(0.01, 4), (0.125, 4), (0.24, 4), (0.25, 8), (0.374, 8), (0.375, 12), (0.5, 16)]


@pytest.mark.parametrize(("retain", "kept"), ROUNDED)
def test_block_rounds_retain_down_to_what_the_layout_has(retain, kept):
    assert block_kept(retain) == kept


# ---- errors and warnings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual": "dense"}, r"^residual: must be one of lowrank, sparse, full, got 'dense'$"),
        ({"factorization": "cp"}, r"^factorization: must be one of stacked, separate, joint, got 'cp'$"),
        ({"sparse_layout": "csr"}, r"^sparse_layout: must be one of block, bitmap, got 'csr'$"),
        ({"solver": "emd"}, r"^solver: must be one of assignment, pot, got 'emd'$"),
        ({"init": "last"}, r"^init: must be one of progressive, mean, got 'last'$"),
        ({"retain": 1.5}, r"^retain: must be in \(0, 1\], got 1.5$"),
        ({"retain": 0}, r"^retain: must be in \(0, 1\], got 0$"),
        ({"retain": float("nan")}, r"^retain: must be in \(0, 1\], got nan$"),
        (
            {"retain": 0.6, **BLOCK_LAYOUT},
            r"^retain: the block layout keeps at most 16 of 32, that is 0.5, got 0.6; use sparse_layout="
            r"'bitmap'$",
        ),
    ],
)
def test_arguments_are_checked_before_any_work(arguments, message):
    said: list[str] = []
    with pytest.raises(ValueError, match=message):
        resmoe(make_experts(), progress=said.append, **arguments)
    assert not said


def test_a_result_no_smaller_than_dense_is_warned_of(caplog):
    experts = make_experts()
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        resmoe(experts, retain=0.25)
        assert not caplog.records
        report = resmoe(experts, retain=1.0).report
    assert report.bytes_now >= report.bytes_dense
    assert [r.getMessage() for r in caplog.records] == [
        f"resmoe: {report.bytes_now} bytes, not smaller than the dense layer's {report.bytes_dense}; lower retain"
    ]


def test_the_report_is_json():
    report = resmoe(make_experts()).report
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)


def test_progress_is_told_of_both_phases():
    said: list[str] = []
    resmoe(make_experts(), progress=said.append)
    phases = [phrase.partition(":")[0] for phrase in said]
    assert phases == sorted(phases) and set(phases) == {"align", "residual"}
    first = phases.index("residual")
    assert said[first : first + 3] == [f"residual: expert {e} of 3" for e in (1, 2, 3)]
