"""Fine-tuning by adapters: what is trained, what is left alone, that it helps, and that a usual model comes out."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from resmoe_kernels.python_ops.calibration.calibrate import collect, windows
from resmoe_kernels.python_ops.jobs.swap import swap_experts
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.training.lora import fine_tune
from tests import families
from tests.conftest import REPO

pytest.importorskip("peft")
TINY_MIXTRAL = REPO / "examples/tiny-mixtral"
PRUNED = {"method": "moe-i2", "prune": 0.5, "retain": 0.4, "population": 8, "generations": 2, "block": 1}


def tokens(count=6, length=16):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))


def compressed(family="mixtral", **settings):
    """A tiny random model, its experts compressed."""
    model = families.build(family)
    settings = PRUNED | {"population": 4, "prune": 0.25} | settings
    statistics = collect(DenseModel(model), tokens(), progress=False) if settings["method"] == "moe-i2" else None
    if statistics is None:
        settings = {"method": settings["method"], "retain": 0.9}
    swap_experts(model, statistics=statistics, progress=False, **settings)
    return model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, FactoredExpertsLayer)]


def changed(before, after):
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@torch.no_grad()
def loss_of(model, token_ids):
    losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in token_ids.split(8)]
    return sum(losses) / len(token_ids)


def test_tuning_a_compressed_model_helps_on_text_it_was_not_tuned_on(tmp_path):
    # Measured: 5.16 dense, 5.37 compressed to 20 % of the bytes, 5.03 after these 10 steps of 512 tokens. Much of it is
    # the kind of text: the dense model, tuned alike, comes to 4.73.
    model = AutoModelForCausalLM.from_pretrained(TINY_MIXTRAL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MIXTRAL)
    text = windows(model.config, tokenizer, REPO / "examples/wikitext2-excerpt.txt", 10_000)
    text = text.flatten()[: text.numel() // 64 * 64].view(-1, 64)
    train, held_out = text[:-24], text[-24:]
    statistics = collect(DenseModel(model), train[:16], progress=False)
    swap_experts(model, statistics=statistics, progress=False, **PRUNED)
    before = loss_of(model, held_out)
    was_packed = [layer.packed is not None for layer in layers_of(model)]

    losses = fine_tune(model, train, steps=10, progress=False)
    after = loss_of(model, held_out)
    assert len(losses) == 10
    assert after < before - 0.1
    # What comes out is a model as it went in: run by the op, nothing left of peft, and it can be saved.
    assert [layer.packed is not None for layer in layers_of(model)] == was_packed
    assert not any(layer.differentiable for layer in layers_of(model))
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loss_of(loaded, held_out) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("settings", [{}, {"retain": 1.0}, {"method": "resmoe"}], ids=["moe-i2", "pruned", "resmoe"])
def test_attention_and_factors_are_trained_and_nothing_else(family, settings):
    model = compressed(family, **settings)
    before = copy.deepcopy(model.state_dict())
    trains = [p.requires_grad for p in model.parameters()]
    fine_tune(model, tokens(), steps=2, windows_per_step=2, rank=4, progress=False)
    trained = changed(before, model.state_dict())
    parts = {"base": {"base"}, "uv": {"u", "v"}, "both": {"base", "u", "v"}}
    expected = parts["both" if "method" in settings else "base" if "retain" in settings else "uv"]
    experts = {name.rpartition(".")[2] for name in trained if ".experts." in name}
    assert experts == {f"{part}_{matrix}" for part in expected for matrix in ("gate_up", "down")}
    rest = {name for name in trained if ".experts." not in name}
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "self_attn" in n}
    assert rest == linears and len(rest) >= 8
    assert [p.requires_grad for p in model.parameters()] == trains


def test_what_was_trained_is_what_is_merged():
    """The loss of the last step, run again on the merged model: the last update moves by a rate of almost 0."""
    model = compressed()
    windows_ = tokens(1)
    losses = fine_tune(model, windows_, steps=100, windows_per_step=1, rank=4, learning_rate=3e-3, progress=False)
    assert losses[-1] < 0.9 * losses[0]
    assert loss_of(model, windows_) == pytest.approx(losses[-1], rel=1e-3)


def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_left_alone():
    made = []
    for seed in (0, 0, 1):
        model = compressed()
        torch.manual_seed(len(made))
        state = torch.get_rng_state()
        losses = fine_tune(model, tokens(), steps=3, windows_per_step=4, rank=4, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        made.append((losses, model.state_dict()))
    (first, one), (second, two), (third, _) = made
    assert first == second != third and not changed(one, two)


def test_steps_go_around_all_windows():
    from resmoe_kernels.python_ops.training.lora import _windows

    drawn = _windows(5, 3, 0)
    numbers = torch.cat([next(drawn) for _ in range(5)]).tolist()
    assert [sorted(numbers[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert numbers[:5] != numbers[5:10]


def test_a_model_in_bfloat16_stays_in_it():
    model = compressed().to(torch.bfloat16)
    losses = fine_tune(model, tokens(), steps=2, windows_per_step=2, rank=4, progress=False)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"^steps: must be at least 1, got 0$"),
        ({"windows_per_step": 0}, r"^windows_per_step: must be at least 1, got 0$"),
        ({"rank": 0}, r"^rank: must be at least 1, got 0$"),
        ({"learning_rate": 0.0}, r"^learning_rate: must be above 0, got 0.0$"),
        ({"token_ids": torch.zeros(5)}, r"^token_ids: must be \(windows, L\) with L of 2 or more, got \(5,\)$"),
        ({"token_ids": torch.zeros(5, 1)}, r"^token_ids: must be \(windows, L\) with L of 2 or more, got \(5, 1\)$"),
        ({"token_ids": torch.zeros(0, 8)}, r"^token_ids: must be \(windows, L\) with L of 2 or more, got \(0, 8\)$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(compressed(), **{"token_ids": tokens(), "steps": 1, **arguments})


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match=r"^MixtralForCausalLM: holds no factored experts; compress it first$"):
        fine_tune(families.build("mixtral"), tokens(), steps=1)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'^peft: fine-tuning needs it, .* run: pip install "resmoe_kernels\[finetune'):
        fine_tune(compressed(), tokens(), steps=1)
