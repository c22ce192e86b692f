"""KL from a reference and agreement of the first choice, against closed forms and a sum that shares no code."""

from __future__ import annotations

import math

import pytest
import torch

from resmoe_kernels.python_ops.tools.divergence import Divergence
from resmoe_kernels.python_ops.tools.evaluate import evaluate
from tests.tools.test_evaluate import POSITIONS, Bigram, CharTokenizer, passage, tiny_mixtral, write


def biased(table: dict[str, str], score: float) -> Bigram:
    """A Bigram whose odds are e^score : 1."""
    model = Bigram(table)
    model.head.weight.data *= score / Bigram.SCORE
    return model


def test_kl_of_two_bigrams_is_the_closed_form(tmp_path):
    text = write(tmp_path / "text.txt", "xy" * 20)
    table = {"x": "y", "y": "x"}

    def log_p(score):
        total = math.log(math.exp(score) + 127)
        return score - total, -total

    (p_hit, p_miss), (q_hit, q_miss) = log_p(3.0), log_p(1.0)
    expected = math.exp(p_hit) * (p_hit - q_hit) + 127 * math.exp(p_miss) * (p_miss - q_miss)
    got = evaluate(biased(table, 1.0), CharTokenizer(), text=text, against=biased(table, 3.0), progress=False)
    assert got["kl"] == pytest.approx(expected, rel=1e-6)
    assert got["kl_99"] == pytest.approx(expected, rel=1e-6)
    assert got["same_first_choice"] == 1.0
    # From p to q, not from q to p: they differ by far more than the tolerance.
    other = evaluate(biased(table, 3.0), CharTokenizer(), text=text, against=biased(table, 1.0), progress=False)
    assert abs(other["kl"] - expected) > 0.01


def test_first_choice_and_percentile_are_by_token():
    logits = torch.zeros(200, 4)
    logits[:, 0] = 1.0
    reference = logits.clone()
    reference[:3] = torch.tensor([0.0, 5.0, 0.0, 0.0])  # 1.5 % of the tokens: beyond the 99th percentile lie 2
    divergence = Divergence()
    divergence.add(logits[:77], reference[:77])
    divergence.add(logits[77:], reference[77:])
    p, q = reference[0].double().softmax(-1), logits[0].double().softmax(-1)
    far = float((p * (p / q).log()).sum())
    got = divergence.metrics()
    assert got["same_first_choice"] == 197 / 200
    assert got["kl"] == pytest.approx(3 * far / 200)
    assert got["kl_99"] == pytest.approx(far)
    one_fewer = Divergence()
    one_fewer.add(logits[1:], reference[1:])  # 2 of 199 are far: 198 of 199, the 99 of 100, still include one
    assert one_fewer.metrics()["kl_99"] == pytest.approx(far)
    none_left = Divergence()
    none_left.add(logits[2:], reference[2:])
    assert none_left.metrics()["kl_99"] == 0.0


def test_an_entry_that_is_never_given_counts_nothing():
    reference = torch.tensor([[0.0, -math.inf, 0.0]])
    divergence = Divergence()
    divergence.add(torch.zeros(1, 3), reference)
    assert divergence.metrics()["kl"] == pytest.approx(math.log(1.5))
    impossible = Divergence()
    impossible.add(reference, torch.zeros(1, 3))
    assert impossible.metrics()["kl"] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [8, POSITIONS])
def test_kept_logits_judge_as_the_model_itself(tmp_path, dtype, stride):
    text = write(tmp_path / "text.txt", passage(100))
    dense, other = tiny_mixtral(dtype), tiny_mixtral(dtype)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(3.0)
    how = {"text": text, "stride": stride, "progress": False}
    file = tmp_path / "dense.safetensors"
    evaluate(dense, CharTokenizer(), keep=file, **how)
    timeless = ("kl", "kl_99", "same_first_choice", "perplexity")
    streamed = evaluate(other, CharTokenizer(), against=dense, **how)
    kept = evaluate(other, CharTokenizer(), against=file, **how)
    assert [kept[n] for n in timeless] == [streamed[n] for n in timeless]
    assert kept["kl"] > 0
    assert evaluate(dense, CharTokenizer(), against=file, **how)["kl"] == 0.0
    # V entries of the head's dtype for each token scored, and a header.
    assert 0 < file.stat().st_size - 99 * 128 * dtype.itemsize < 1000


def test_both_models_come_back_in_the_mode_they_had(tmp_path):
    text = write(tmp_path / "text.txt", passage(20))
    model, dense = Bigram({}), Bigram({})
    model.train()
    dense.train()
    dense.register_forward_pre_hook(lambda m, _: pytest.fail("in training") if m.training else None)
    evaluate(model, CharTokenizer(), text=text, against=dense, progress=False)
    assert (model.training, dense.training) == (True, True)


def test_what_cannot_be_held_against_is_refused(tmp_path):
    text = write(tmp_path / "text.txt", passage(60))
    rows = write(tmp_path / "rows.jsonl", [{"text": "q xy"}])
    file = tmp_path / "kept.safetensors"
    how = {"stride": 8, "progress": False}
    evaluate(Bigram({}), CharTokenizer(), text=text, keep=file, **how)
    with pytest.raises(ValueError, match="evaluate: keep is about the tokens of a text; give text"):
        evaluate(Bigram({}), CharTokenizer(), lambada=rows, keep=file)
    with pytest.raises(ValueError, match="evaluate: against is about the tokens of a text"):
        evaluate(Bigram({}), CharTokenizer(), lambada=rows, against=file)
    for change, what in (({"stride": 4}, "stride"), ({"window": 16}, "window"), ({"limit": 30}, "tokens")):
        with pytest.raises(ValueError, match=f"kept.safetensors: was kept of other {what} than are evaluated now"):
            evaluate(Bigram({}), CharTokenizer(), text=text, against=file, **(how | change))
    for bad in (tmp_path / "none.safetensors", text):
        with pytest.raises(ValueError, match=f"{bad.name}: holds no kept logits"):
            evaluate(Bigram({}), CharTokenizer(), text=text, against=bad, **how)
    narrow = Bigram({})
    narrow.head = torch.nn.Embedding(128, 100)
    with pytest.raises(ValueError, match="against: its vocabulary has 100 entries, the model's 128"):
        evaluate(Bigram({}), CharTokenizer(), text=text, against=narrow, **how)


def test_a_file_that_is_not_whole_has_no_name(tmp_path):
    text = write(tmp_path / "text.txt", passage(60))
    model = Bigram({})
    model.register_forward_pre_hook(lambda m, _: pytest.fail("stop") if m.calls > 2 else None)
    with pytest.raises(pytest.fail.Exception):
        evaluate(model, CharTokenizer(), text=text, keep=tmp_path / "kept.safetensors", stride=8, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
