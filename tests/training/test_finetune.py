"""Fine-tuning: the schedule, what pruning by movement keeps, and a short real run that recovers perplexity."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import expert_nbytes
from resmoe_kernels.python_ops.training.finetune import _Movement, distil, share_kept
from resmoe_kernels.sparse import popcount, unpack_mask
from tests.families import build

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(96).view(4, 24) * 7 % 61 + 1


def batches(tokens=TOKENS, size=2):
    rows = itertools.cycle(tokens.split(size))
    yield from rows


def swapped(model, tokens=TOKENS, **settings):
    statistics = collect(DenseModel(model), tokens, progress=False)
    rk.swap_experts(model, method="mc-smoe", statistics=statistics, progress=False, **settings)
    return model


def student(family="mixtral", **settings):
    return swapped(build(family), **{"stage": "merge", "groups": 2, **settings})


def layers_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, FactoredExpertsLayer)}


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items() if p.is_floating_point()}


def train(model, teacher=None, steps=6, **settings):
    return distil(model, teacher or build("mixtral"), batches(), steps=steps, progress=False, **settings)


# ---- the schedule


def test_the_share_falls_from_all_to_the_density_as_a_cube():
    shares = [share_kept(step, 100, 0.1) for step in range(101)]
    assert shares[:5] == [1.0] * 5 and shares[84:] == [0.1] * 17
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[4:85]))
    assert shares[44] == pytest.approx(0.1 + 0.9 / 8)  # half of the way


# ---- what learns


def test_everything_learns_but_routers():
    model = student()
    before = parameters_of(model)
    losses = train(model, learning_rate=1e-2)
    after = parameters_of(model)
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert still == {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_the_rate_falls_in_a_straight_line():
    model = student()
    before = parameters_of(model)
    distil(model, build("mixtral"), itertools.repeat(TOKENS), steps=10, learning_rate=1e-5, progress=False)
    moved = max(float((tensor - before[name]).abs().max()) for name, tensor in parameters_of(model).items())
    # So small that gradients stay what they are, and Adam goes on by the whole rate every time.
    assert moved == pytest.approx(1e-5 * sum(range(1, 11)) / 10, rel=0.03)


def test_afterwards_the_op_runs_and_nothing_of_the_layers_learns():
    model = student().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    train(model)
    assert model.training and not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    for layer in layers_of(model).values():
        assert not layer.differentiable and not any(p.requires_grad for p in layer.parameters())
        assert (layer.packed is not None) == ("cpu" in rk.backends())
    assert all(p.grad is None for p in model.parameters())


def test_the_same_run_gives_the_same_bits():
    one, two = student(), student()
    assert train(one, density=0.3) == train(two, density=0.3)
    after = parameters_of(two)
    assert all(torch.equal(tensor, after[name]) for name, tensor in parameters_of(one).items())


def test_distillation_draws_the_student_to_the_teacher():
    teacher = build("mixtral")

    def apart(model):
        with torch.no_grad():
            wanted, got = (m(input_ids=TOKENS).logits.log_softmax(-1) for m in (teacher, model))
        return float(torch.nn.functional.kl_div(got, wanted, log_target=True, reduction="sum"))

    alone, taught = student(), student()
    train(alone, teacher, steps=12, distillation=0.0, learning_rate=1e-3)
    train(taught, teacher, steps=12, distillation=1000.0, learning_rate=1e-3)
    assert apart(taught) < 0.3 * apart(alone)


# ---- pruning while learning


@pytest.mark.parametrize("rows", [False, True])
def test_the_sparse_part_ends_at_its_density_over_all_layers(rows):
    model = student()
    train(model, density=0.25, retain=0.9, rows=rows)
    stored = total = 0
    for layer in layers_of(model).values():
        weights = layer.weights
        weights.check_values()
        assert weights.base_gate_up is None and weights.group is None
        for matrix in ("gate_up", "down"):
            mask = getattr(weights, f"mask_{matrix}")
            width = weights.rows_columns(matrix)[1]
            stored += int(popcount(mask).sum())
            total += mask.shape[0] * mask.shape[1] * width
            if rows:
                assert set(unpack_mask(mask, width).sum(-1).flatten().tolist()) <= {0, width}
    assert 0.25 * total - (48 if rows else 1) < stored <= 0.25 * total


def test_low_rank_and_sparse_begin_as_what_was_merged():
    model, split = student(), student()
    train(split, density=1.0, retain=0.9, learning_rate=0.0)
    for before, after in zip(layers_of(model).values(), layers_of(split).values(), strict=True):
        assert any(after.weights.ranks("gate_up"))
        old, new = before.weights.materialize(), after.weights.materialize()
        torch.testing.assert_close(new.gate_up, old.gate_up, rtol=0, atol=1e-5)
        torch.testing.assert_close(new.down, old.down, rtol=0, atol=1e-5)


def test_what_is_kept_is_what_the_loss_hangs_on():
    tokens = TOKENS[:2]
    model, probe, teacher = student(), student(), build("mixtral")
    # One step, at a rate of nothing, goes to the density at once: the movement is that of the merged experts.
    distil(model, teacher, [tokens], steps=1, learning_rate=0.0, density=0.4, retain=0.0, progress=False)
    for layer in layers_of(probe).values():
        layer.make_differentiable(train=True)
    wanted = (teacher(input_ids=tokens).logits / 2).log_softmax(-1).detach()
    logits = probe(input_ids=tokens).logits
    hard = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    kl = (wanted.exp() * (wanted - (logits / 2).log_softmax(-1))).sum(-1).mean()
    (hard + 0.2 * kl).backward()
    bases = [getattr(layer, f"base_{m}") for layer in layers_of(probe).values() for m in ("gate_up", "down")]
    importance = torch.cat([(b * b.grad).abs().detach().flatten() for b in bases])
    least = importance.sort(descending=True).values[math.floor(0.4 * len(importance)) - 1]
    kept = []
    for layer in layers_of(model).values():
        for matrix in ("gate_up", "down"):
            width = layer.form.rows_columns(matrix)[1]
            kept.append(unpack_mask(getattr(layer.weights, f"mask_{matrix}"), width).flatten())
    # Up to what rounding does to those at the border.
    assert torch.cat(kept)[importance > 1.001 * least].all() and not torch.cat(kept)[importance < 0.999 * least].any()


def test_importance_is_a_running_mean():
    part = torch.nn.Parameter(torch.tensor([[[2.0, -1.0]]]))
    movement = _Movement([part], rows=False)
    for grad in ([[[1.0, 4.0]]], [[[-3.0, 0.0]]]):
        part.grad = torch.tensor(grad)
        movement.observe()
    expected = [0.85 * 0.15 * 2 + 0.15 * 6, 0.85 * 0.15 * 4]
    torch.testing.assert_close(movement.importance[0].flatten(), torch.tensor(expected))
    movement.prune(0.5)
    assert part.flatten().tolist() == [2.0, 0.0]


def test_a_trained_model_is_saved_and_loaded(tmp_path):
    model = student()
    train(model, density=0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    for spec, layer in zip(loaded.config.quantization_config.layers.values(), layers_of(model).values(), strict=True):
        assert spec["report"]["bytes_now"] == layer.weights.nbytes()
        assert spec["router"]["fold"] and "mask_down" in spec["tensors"] and "base_down" not in spec["tensors"]


# ---- a real one


def test_a_short_run_on_tiny_mixtral_recovers_perplexity(repo, tmp_path):
    """Of the excerpt's first half, measured on its second; the dense model was not trained on this kind of text."""
    folder = repo / "examples/tiny-mixtral"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((repo / "examples/wikitext2-excerpt.txt").read_text())["input_ids"]
    half = len(ids) // 2
    rest = tmp_path / "rest.txt"
    rest.write_text(tokenizer.decode(ids[half:]))
    tokens = torch.tensor(ids[: half // 128 * 128]).view(-1, 128)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def perplexity(model):
        return rk.evaluate(model, tokenizer, text=rest, stride=128, limit=1500, progress=False)["perplexity"]

    one_shot = swapped(load(), tokens[:16], groups=2, sparse_layout="bitmap")
    trained = swapped(load(), tokens[:16], groups=2, stage="merge")
    merged = perplexity(trained)
    distil(trained, load(), batches(tokens[order], 2), steps=14, learning_rate=1e-3, density=0.125, progress=False)
    assert expert_nbytes(trained) <= 1.001 * expert_nbytes(one_shot)
    assert perplexity(trained) < 0.8 * merged < 0.8 * perplexity(one_shot)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"^steps: must be at least 1, got 0$"),
        ({"temperature": 0.0}, r"^temperature: must be above 0, got 0.0$"),
        ({"density": 0.0}, r"^density: must be in \(0, 1\], got 0.0$"),
        ({"retain": 1.0}, r"^retain: must be in \[0, 1\), got 1.0$"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        train(student(), **settings)


def test_a_dense_student_is_refused():
    with pytest.raises(ValueError, match=r"^student: MixtralForCausalLM holds no factored layers; compress it first$"):
        train(build("mixtral"))


def test_parameters_in_16_bits_are_refused():
    message = (
        r"^model.embed_tokens.weight: must be float32 to learn in small steps, got bfloat16; use student.float\(\)$"
    )
    with pytest.raises(ValueError, match=message):
        train(student().bfloat16())


def test_a_density_needs_merged_experts():
    message = (
        r"^model.layers.0.mlp.experts: with a density, its experts must be merged ones, a base each and nothing else; "
        r"compress with method='mc-smoe', stage='merge'$"
    )
    for settings in ({"stage": "compress"}, {"stage": "hybrid"}):
        with pytest.raises(ValueError, match=message):
            train(student(**settings), density=0.2)


def test_layers_without_a_router_beside_them_are_refused():
    model = student()
    model.model.layers[1].mlp.gate = torch.nn.Identity()
    message = (
        r"^model.layers.1.mlp.experts: found no router of 4 experts beside it, so it cannot be kept from learning$"
    )
    with pytest.raises(ValueError, match=message):
        train(model)


def test_too_few_batches_leave_a_model_that_runs():
    model = student()
    with pytest.raises(ValueError, match=r"^batches: ended after 2 of 5 steps; give more, or fewer steps$"):
        distil(model, build("mixtral"), [TOKENS, TOKENS], steps=5, density=0.5, progress=False)
    assert model(TOKENS).logits.isfinite().all() and not any(la.differentiable for la in layers_of(model).values())
