"""Diagnosis: its numbers against hand computation and the methods' own, its sentences, what it says to bad input."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import resmoe_kernels as rk
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.methods.resmoe import resmoe
from resmoe_kernels.python_ops.solvers import factorize
from resmoe_kernels.python_ops.solvers.align import barycenter, mean_cosine
from resmoe_kernels.python_ops.solvers.byte_budgets import FormError, round_to_nearest
from resmoe_kernels.python_ops.solvers.spectra import energy_kept, random_energy_kept, spectrum
from resmoe_kernels.python_ops.solvers.svd import truncated_svd
from resmoe_kernels.python_ops.tools.diagnose import LayerDiagnosis, diagnose, diagnose_layer, model_errors, verdict
from resmoe_kernels.python_ops.tools.diagnose_plot import plot
from tests import families
from tests.tools.test_cli import Result, refused, run  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def experts(
    count: int, *, noise: float = 1.0, common: float = 0.0, H: int = 40, I: int = 48, seed: int = 0, gated: bool = True
) -> DenseExperts:
    """A common expert in another neuron order each time, plus independent noise."""
    g = torch.Generator().manual_seed(seed)
    halves = 2 if gated else 1
    gate_up, down = torch.randn(halves, I, H, generator=g), torch.randn(H, I, generator=g)
    layers = []
    for _ in range(count):
        order = torch.randperm(I, generator=g)
        a = common * gate_up[:, order].flatten(0, 1) + noise * torch.randn(halves * I, H, generator=g)
        layers.append((a, common * down[:, order] + noise * torch.randn(H, I, generator=g)))
    return DenseExperts(*(torch.stack(m) for m in zip(*layers, strict=True)), gated=gated)


def error_of(diagnosis: LayerDiagnosis, form: str, budget: float | None) -> FormError:
    return next(e for e in diagnosis.errors if (e.form, e.budget) == (form, budget))


# ---- what the numbers say


def test_a_common_expert_pays():
    layer = diagnose_layer(experts(6, common=1.0, noise=0.3), "a")
    assert layer.cosine_before < 0.05 and layer.cosine_after > 0.85
    # Independent noise around a common part: the barycenter keeps 1/6 of it, the residual 5/6.
    assert layer.residual_energy == pytest.approx(5 / 6 * 0.09 / 1.09, rel=0.03)
    said = verdict([layer])
    assert said[0] == "A shared base pays here."
    assert "at 0.25 of the dense bytes a base pays, base + " in said[2].lower()


@pytest.mark.parametrize("count", [4, 16])
def test_independent_experts_do_not_pay(count):
    layer = diagnose_layer(experts(count), "a")
    assert layer.residual_energy > 0.6
    assert verdict([layer])[0] == "A shared base does not pay here."


def test_cosines():
    dense = experts(11, common=0.5)
    layer = diagnose_layer(dense, "a", [0.5])
    assert layer.measured == [0, 2, 3, 4, 6, 7, 8, 10]
    orders = barycenter(dense).permutations
    for name, permuted in (("cosines_before", False), ("cosines_after", True)):
        rows = []
        for e in layer.measured:
            order = orders[e] if permuted else torch.arange(48)
            gate, up = dense.gate_up[e].chunk(2)
            rows.append(torch.cat([m.flatten() for m in (gate[order], up[order], dense.down[e][:, order])]).double())
        unit = torch.nn.functional.normalize(torch.stack(rows))
        torch.testing.assert_close(torch.tensor(getattr(layer, name)).double(), unit @ unit.T, atol=1e-6, rtol=0)
    all_of_few = diagnose_layer(experts(5, common=1.0), "a", [0.5])
    assert all_of_few.measured == [0, 1, 2, 3, 4]
    for matrix, mean in (("cosines_before", "cosine_before"), ("cosines_after", "cosine_after")):
        full = torch.tensor(getattr(all_of_few, matrix))
        assert (full.sum() - 5) / 20 == pytest.approx(getattr(all_of_few, mean), abs=1e-6)
    assert all_of_few.cosine_before == mean_cosine(experts(5, common=1.0))


# ---- errors, each form against a computation that shares no code with it


def test_direct_forms_by_hand():
    dense = experts(3)
    layer = diagnose_layer(dense, "a", [0.6])
    matrices = [m[e].double() for e in range(3) for m in (dense.gate_up, dense.down)]
    whole = sum(float(m.square().sum()) for m in matrices)
    count = sum(m.numel() for m in matrices)
    assert layer.bytes_dense == 4 * count and layer.energy == pytest.approx(whole)
    budget = 0.6 * 4 * count

    # Block: a word is 32 bits of mask and n weights of 32. Rows of 40 or 48 are two words.
    words = sum(m.shape[0] * 2 for m in matrices)
    kept = max(n for n in (4, 8, 12, 16) if words * 4 * (n + 1) <= budget)
    lost = sum(
        float(chunk.abs().sort(descending=True).values[kept:].square().sum())
        for m in matrices
        for row in m
        for chunk in row.split(32)
    )
    block = error_of(layer, "block", 0.6)
    assert block.bytes_now == words * 4 * (kept + 1)
    assert block.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-5)

    # Bitmap: what masks and row offsets leave, the largest of each expert.
    rows = sum(m.shape[0] for m in matrices)
    values = int((budget - 4 * words - 4 * (rows + 2)) / 4 / 3)
    of_expert = [torch.cat([matrices[2 * e].flatten(), matrices[2 * e + 1].flatten()]) for e in range(3)]
    lost = sum(float(w.abs().sort(descending=True).values[values:].square().sum()) for w in of_expert)
    bitmap = error_of(layer, "bitmap", 0.6)
    assert bitmap.bytes_now == 4 * words + 4 * (rows + 2) + 4 * 3 * values
    assert bitmap.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-5)

    # Low rank: blocks of 16 singular triplets, the most energy per parameter first.
    offers = []
    for m in matrices:
        energy = torch.linalg.svdvals(m).square()
        price = 4 * 16 * sum(m.shape)
        offers += [(float(part.sum()) / price, float(part.sum()), price) for part in energy.split(16)]
    spent, gained = 2 * 4 * 4, 0.0
    for _, gain, price in sorted(offers, reverse=True):
        if spent + price <= budget:
            spent, gained = spent + price, gained + gain
    rank = error_of(layer, "low rank", 0.6)
    assert rank.bytes_now == spent
    assert rank.relative_error == pytest.approx(math.sqrt(1 - gained / whole), rel=1e-4)


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_integers_by_hand(bits, largest):
    dense = experts(2, H=130, I=24)
    layer = diagnose_layer(dense, "a", [0.5])
    lost = whole = 0.0
    size = 0
    for m in (*dense.gate_up, *dense.down):
        for row in m.tolist():
            for start in range(0, len(row), 128):
                group = row[start : start + 128]
                scale = float(torch.tensor(max(map(abs, group)) / largest).half())
                lost += sum((w - scale * max(-largest, min(largest, round(w / scale)))) ** 2 for w in group)
                whole += sum(w * w for w in group)
                size += 2
            size += len(row) * bits // 8
    error = error_of(layer, f"int{bits}", None)
    assert error.bytes_now == size
    assert error.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)


def test_integers_of_extremes():
    weight = torch.tensor([[0.0, 0.0], [1e-12, 0.0], [1e30, -1e30], [1.0, -0.5]])
    rounded = round_to_nearest(weight, 8)
    assert bool(rounded.isfinite().all())
    assert rounded[0].tolist() == [0, 0] and rounded[1].tolist() == [0, 0]
    assert rounded[3].tolist() == pytest.approx([1.0, -0.5], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_with_a_base_are_what_the_method_makes(dtype):
    """Same tensors, so the same error and the same bytes."""
    dense = experts(4, common=1.0, noise=0.5)
    dense = DenseExperts(dense.gate_up.to(dtype), dense.down.to(dtype))
    layer = diagnose_layer(dense, "a", [0.8])
    count, width = dense.gate_up.numel() + dense.down.numel(), dtype.itemsize
    room = 0.8 * count * width - count * width / 4 - 4 * 4
    words = 4 * (96 + 40) * 2
    rows = 4 * (96 + 40)
    retain = {
        "low rank": (room - 2 * 4 * 5) / width / count,
        "block": max(n for n in (4, 8, 12, 16) if words * (4 + n * width) <= room) / 32,
        "bitmap": (room - 4 * words - 4 * (rows + 2)) / width / count,
    }
    for form, kept in retain.items():
        residual = "lowrank" if form == "low rank" else "sparse"
        made = resmoe(dense, residual=residual, retain=kept, sparse_layout=form if residual == "sparse" else "block")
        error = error_of(layer, f"base + {form}", 0.8)
        assert error.bytes_now == made.report.bytes_now <= 0.8 * layer.bytes_dense
        assert error.relative_error == pytest.approx(made.report.relative_error, rel=1e-6)


def test_few_of_many_stand_for_all():
    """Bytes are the whole layer's; no form exceeds its budget, and more bytes mean no larger an error."""
    layer = diagnose_layer(experts(20, common=1.0, gated=False), "a", [0.2, 0.4, 0.8])
    assert len(layer.measured) == 8
    forms = dict.fromkeys(e.form for e in layer.errors if e.budget)
    for form in forms:
        errors = [error_of(layer, form, b) for b in (0.2, 0.4, 0.8)]
        fitting = [e for e in errors if e.bytes_now is not None]
        assert all(e.bytes_now <= e.budget * layer.bytes_dense for e in fitting)
        if "bitmap" in form:
            assert errors[2].bytes_now > 0.795 * layer.bytes_dense
        assert [e.relative_error for e in fitting] == sorted((e.relative_error for e in fitting), reverse=True)


def test_every_matrix_is_decomposed_once_for_all_budgets(monkeypatch):
    """And what is cut from it is what it would be at that budget alone."""
    asked = []

    def counted(matrix, rank):
        asked.append((tuple(matrix.shape), rank))
        return truncated_svd(matrix, rank)

    monkeypatch.setattr(factorize, "truncated_svd", counted)
    budgets, dense = [0.4, 0.7], experts(3, common=0.5, noise=0.5)
    together = diagnose_layer(dense, "a", budgets).errors
    assert len(asked) == 2 * 2 * 3  # with and without a base, two matrices, three experts
    for budget in budgets:
        alone = diagnose_layer(dense, "a", [budget]).errors
        same = [e for e in together if e.budget == budget]
        for one, other in zip([e for e in alone if e.budget], same, strict=True):
            assert (one.form, one.bytes_now) == (other.form, other.bytes_now)
            assert one.relative_error == (other.relative_error and pytest.approx(other.relative_error, rel=1e-6))


# ---- spectra


@pytest.mark.parametrize("shape", [(70, 33), (33, 70), (5, 5)])
def test_energy_kept(shape, generator):
    matrix = torch.randn(shape, generator=generator)
    energy = torch.linalg.svdvals(matrix.double()).square()
    expected = [float(energy[: i * min(shape) // 32].sum() / energy.sum()) for i in range(33)]
    assert energy_kept(spectrum(matrix)).tolist() == pytest.approx(expected, abs=1e-9)
    assert energy_kept(spectrum(128 * matrix)).tolist() == pytest.approx(expected, abs=1e-9)


def test_random_control():
    orthogonal = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    flat = energy_kept(spectrum(orthogonal))
    random = random_energy_kept(64, 64)
    assert flat.tolist() == pytest.approx([i / 32 for i in range(33)], abs=1e-5)
    assert bool((random[1:-1] > flat[1:-1] + 0.01).all())
    planted = energy_kept(spectrum(torch.ones(64, 64) + 0.1 * orthogonal))
    assert bool((planted[1:-1] > random[1:-1]).all())
    dense = experts(2)
    spectra = diagnose_layer(dense, "a", [0.5]).spectra
    assert spectra["gate_up"]["weight"] == pytest.approx(
        torch.stack([energy_kept(spectrum(m)) for m in dense.gate_up]).mean(0).tolist()
    )
    assert spectra["down"]["random"] == random_energy_kept(40, 48).tolist()
    # The base of two experts is half-way between them, so half of what lies between is the residual of both.
    first, second = (dense.down[e][:, order] for e, order in enumerate(barycenter(dense).permutations))
    assert spectra["down"]["residual"] == pytest.approx(energy_kept(spectrum((first - second) / 2)).tolist(), abs=1e-5)


# ---- degenerate layers


def finite(layer: LayerDiagnosis) -> LayerDiagnosis:
    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        return [n for v in value for n in numbers(v)] if isinstance(value, list) else [value]

    assert all(math.isfinite(n) for n in numbers(asdict(layer)) if isinstance(n, float))
    assert all(math.isfinite(t.error) for t in model_errors([layer]))
    return layer


def test_all_experts_equal():
    one = experts(1)
    layer = finite(diagnose_layer(DenseExperts(one.gate_up.repeat(6, 1, 1), one.down.repeat(6, 1, 1)), "a"))
    assert layer.cosine_before == pytest.approx(1) and layer.residual_energy == pytest.approx(0, abs=1e-12)
    assert error_of(layer, "base + bitmap", 0.25).relative_error == pytest.approx(0, abs=1e-6)
    assert verdict([layer])[0] == "A shared base pays here."


def test_one_expert():
    """Its base is the expert, and takes all the bytes."""
    layer = finite(diagnose_layer(experts(1), "a"))
    assert layer.cosine_before == layer.cosine_after == 1.0 and layer.cosines_after == [[1.0]]
    assert error_of(layer, "base + low rank", 0.5) == FormError("base + low rank", 0.5, None, None)
    said = verdict([layer])
    assert said[0] == "A shared base does not pay here."
    assert said[2].startswith("At 0.25 of the dense bytes no form with a base fits; best of all is ")


def test_zeros():
    layer = finite(diagnose_layer(DenseExperts(torch.zeros(3, 64, 32), torch.zeros(3, 32, 32)), "a"))
    assert layer.energy == layer.residual_energy == 0
    assert {e.relative_error for e in layer.errors} <= {0.0, None}
    assert verdict([layer])[0] == "A shared base does not pay here."


def test_zero_and_duplicate_neurons():
    dense = experts(3, common=1.0)
    for half in (0, 48):
        dense.gate_up[:, half + 5] = 0
        dense.gate_up[:, half + 7] = dense.gate_up[:, half + 8]
    dense.down[:, :, 5] = 0
    dense.down[:, :, 7] = dense.down[:, :, 8]
    finite(diagnose_layer(dense, "a"))


def test_biases_move_with_their_neurons_and_cost_nothing():
    plain = experts(3)
    generator = torch.Generator().manual_seed(1)
    biases = torch.randn(3, 96, generator=generator), torch.randn(3, 40, generator=generator)
    layer, without = (finite(diagnose_layer(d, "a")) for d in (DenseExperts(plain.gate_up, plain.down, *biases), plain))
    assert layer.bytes_dense == without.bytes_dense and layer.energy == pytest.approx(without.energy)
    assert [e for e in layer.errors if "base" not in e.form] == [e for e in without.errors if "base" not in e.form]


# ---- sentences


def told(*errors: FormError, path: str = "a", energy: float = 1.0) -> LayerDiagnosis:
    kept = [i / 32 for i in range(33)]
    spectra = {m: dict.fromkeys(("weight", "residual", "random"), kept) for m in ("gate_up", "down")}
    return LayerDiagnosis(path, 2, [0, 1], 1000, energy, 0.1, 0.2, [], [], 0.4, spectra, list(errors))


def test_verdict_at_some_budgets():
    layer = told(
        FormError("base + block", 0.25, 250, 0.5),
        FormError("base + block", 0.5, 500, 0.3),
        FormError("bitmap", 0.25, 250, 0.4),
        FormError("bitmap", 0.5, 490, 0.35),
        FormError("int4", None, 260, 0.1),
    )
    said = verdict([layer])
    assert said == [
        "A shared base pays here at 0.5 of the dense bytes, not at 0.25.",
        "Alignment takes the mean cosine between experts from 0.100 to 0.200; 40.0% of the energy stays in the "
        "residual.",
        "At 0.25 of the dense bytes a base does not pay, base + block with an error of 0.500 against bitmap with an "
        "error of 0.400; best of all is bitmap with an error of 0.400.",
        "At 0.5 of the dense bytes a base pays, base + block with an error of 0.300 against bitmap with an error of "
        "0.350; best of all is int4 with an error of 0.100.",
        "int4 round-to-nearest takes 0.260 of the bytes, with a relative error of 0.100, smaller than that of any "
        "low-rank or sparse form here.",
        "A quarter of the rank keeps 25% of the energy of gate_up and 25% of its residual's; of a random matrix of its "
        "shape, 25%.",
        "A quarter of the rank keeps 25% of the energy of down and 25% of its residual's; of a random matrix of its "
        "shape, 25%.",
    ]


def test_verdict_where_little_fits():
    said = verdict([told(FormError("base + block", 0.1, 90, 0.5), FormError("bitmap", 0.1, None, None))])
    assert said[0] == "A shared base pays here."
    assert said[2].startswith(
        "At 0.1 of the dense bytes only forms with a base fit, base + block with an error of 0.500;"
    )
    said = verdict([told(FormError("base + block", 0.1, None, None), FormError("bitmap", 0.1, None, None))])
    assert said[0] == "A shared base does not pay here."
    assert said[2] == "At 0.1 of the dense bytes no form with a base fits; best of all is nothing: none fits."
    said = verdict([told(FormError("bitmap", 0.5, 490, 0.1), FormError("int4", None, 260, 0.1))])
    assert "int4 round-to-nearest takes 0.260 of the bytes, with a relative error of 0.100." in said


def test_layers_are_weighed_by_their_energy():
    layers = [
        told(FormError("bitmap", 0.5, 400, 0.1), FormError("block", 0.5, 500, 0.3), energy=3.0),
        told(FormError("bitmap", 0.5, 200, 0.5), FormError("block", 0.5, None, None), energy=1.0),
    ]
    (only,) = model_errors(layers)  # what does not fit in one layer does not fit
    assert (only.form, only.size) == ("bitmap", 0.3)
    assert only.error == pytest.approx(math.sqrt((3 * 0.01 + 0.25) / 4))


# ---- models and the command line


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral. Not to be changed."""
    folder = tmp_path_factory.mktemp("diagnose") / "model"
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(families.CONFIGS["mixtral"]()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "answer"),
    [("tiny-mixtral", "A shared base pays here."), ("tiny-deepseek", "A shared base does not pay here.")],
)
def test_trained_models(name, answer, shared):
    layers = diagnose(shared(f"models/{name}"), layers="first:1", budgets=[0.375], progress=False)
    assert verdict(layers)[0] == answer


def test_command(run, model, tmp_path):  # noqa: F811
    layers = diagnose(model, budgets=(0.25, 0.375, 0.5), progress=False)
    assert [d.path for d in layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    done = run("diagnose", model)
    assert done.code == 0
    assert done.out.endswith("\n".join(verdict(layers)) + "\n")
    for word in (
        "4 of 4 experts",
        "base + low rank",
        "int4",
        f"{error_of(layers[0], 'bitmap', 0.5).relative_error:.4f}",
    ):
        assert word in done.out
    as_json = run("diagnose", model, "--json")
    assert json.loads(as_json.out) == {"verdict": verdict(layers), "layers": [asdict(d) for d in layers]}
    one = run("diagnose", model, "--json", "--layers", "1", "--budget", "0.5", "--plot", tmp_path / "a.png")
    assert json.loads(one.out)["layers"] == [asdict(d) for d in diagnose(model, layers="1", budgets=[0.5])]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_degenerate_layers(tmp_path):
    plot([diagnose_layer(DenseExperts(torch.zeros(1, 64, 32), torch.zeros(1, 32, 32)), "a")], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"a\.xyz: a picture's name must end in"):
        plot([], tmp_path / "a.xyz")


def no_experts(folder: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def a_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][3, 4] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (a_nan, "experts.2.w1.weight: all weights must be finite, got nan at (3, 4)"),
        (no_experts, "LlamaForCausalLM holds no experts modules"),
        (lambda f: rk.compress(f, f.parent / "out", progress=False).rename(f / "out"), None),
    ],
    ids=["no config", "nan", "no experts", "compressed"],
)
def test_bad_model(spoil: Callable, words: str | None, run, model, tmp_path):  # noqa: F811
    folder = shutil.copytree(model, tmp_path / "model")
    spoil(folder)
    if words is None:
        refused(run("diagnose", folder / "out"), "holds resmoe-quantised weights; it is compressed already")
    else:
        refused(run("diagnose", folder), words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "2"], "layers: must be 'all'"),
        (["--budget", "much"], "budget: must be numbers like 0.25,0.375, got 'much'"),
        (["--budget", ""], "budget: must be numbers like 0.25,0.375, got ''"),
        (["--budget", "0.5,0"], "budget: must be in (0, 1], as parts of the dense bytes, got 0.0"),
        (["--budget", "1.5"], "budget: must be in (0, 1], as parts of the dense bytes, got 1.5"),
        (["--budget", "nan"], "budget: must be in (0, 1], as parts of the dense bytes, got nan"),
        (["--plot", "a.xyz"], "a.xyz: a picture's name must end in one of ."),
        (["--plot", "no/such/a.png"], "no/such: no such folder to make a.png in; make it first"),
    ],
)
def test_bad_words(flags, words, run, model):  # noqa: F811
    refused(run("diagnose", model, *flags), words)


def test_no_budget(model):
    with pytest.raises(ValueError, match=r"budget: must be in .* got none"):
        diagnose(model, budgets=[])


def test_without_matplotlib(run, model, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    done: Result = run("diagnose", model, "--plot", "a.png")
    refused(done, 'matplotlib: --plot needs it, it is not installed; run: pip install "resmoe_kernels[plot]"')
