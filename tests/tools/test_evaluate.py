"""evaluate(): perplexity, LAMBADA and PIQA against definitions that share no code with it."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from resmoe_kernels.python_ops.tools import evaluate as module
from resmoe_kernels.python_ops.tools.evaluate import evaluate
from tests.conftest import REPO

DATA = REPO.parent / "shared" / "data"
POSITIONS = 32


class CharTokenizer:
    """One token per character or string of ``merges``; a special token in front unless switched off."""

    def __init__(self, vocab_size: int = 128, merges: tuple[str, ...] = ()) -> None:
        self.vocab_size, self.merges = vocab_size, merges

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        ids = [0] if add_special_tokens else []
        while text:
            merge = next((m for m in self.merges if text.startswith(m)), None)
            ids.append(self.vocab_size - 1 - self.merges.index(merge) if merge else ord(text[0]) % self.vocab_size)
            text = text[len(merge or "x") :]
        return {"input_ids": ids}


class Bigram(nn.Module):
    """A language model that follows ``table`` with odds e^3 : 1 over each other character."""

    SCORE = 3.0
    HIT = -math.log(math.exp(SCORE) / (math.exp(SCORE) + 127))  # nats
    MISS = HIT + SCORE

    def __init__(self, table: dict[str, str]) -> None:
        super().__init__()
        self.config = MixtralConfig(max_position_embeddings=POSITIONS)
        self.device = torch.device("cpu")
        self.head = nn.Embedding(128, 128)
        nn.init.zeros_(self.head.weight)
        for current, following in table.items():
            self.head.weight.data[ord(current), ord(following)] = self.SCORE
        self.calls = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        self.calls += 1
        return CausalLMOutput(logits=self.head(input_ids))


def tiny_mixtral(dtype: torch.dtype) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,  # far from uniform, so that a token scored from a wrong context shows
    )
    config._experts_implementation = "eager"  # the only one that computes in float64
    return MixtralForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return tiny_mixtral(torch.float64)


@pytest.fixture(scope="module")
def trained():
    folder = REPO / "examples" / "tiny-mixtral"
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )


def data(name: str) -> Path:
    path = DATA / name
    if not path.exists() and "CI" not in os.environ:
        pytest.skip(f"evaluation text {path} is not here")
    return path


def write(path: Path, content: str | list[dict]) -> Path:
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")
    return path


def passage(n: int) -> str:
    generator = torch.Generator().manual_seed(n)
    return "".join(chr(c) for c in torch.randint(33, 127, (n,), generator=generator).tolist())


def naive_log_prob(model: nn.Module, ids: list[int], begin: int, i: int) -> float:
    """log p(token i | tokens begin … i-1), in float64, one forward for one token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[begin:i]])).logits[0, -1]
    return (logits.double() - logits.double().logsumexp(-1))[ids[i]].item()


# ---------------------------------------------------------------------------------------------- perplexity

STRIDES = [
    (1, 8),  # as much context as there is, for every token
    (3, 8),  # the last window is ragged
    (4, 8),
    (8, 8),  # windows side by side
    (1, 1),  # one token of context
    (30, 32),
    (32, 32),
]


@pytest.mark.parametrize(("stride", "window"), STRIDES)
@pytest.mark.parametrize("n", [2, 8, 9, 41])  # one target; as long as a window; one more; many windows
def test_perplexity_is_the_naive_loop(model, tmp_path, monkeypatch, stride, window, n):
    text = write(tmp_path / "text.txt", passage(n))
    ids = [ord(c) for c in passage(n)]
    scored: list[int] = []
    log_probs = module._log_probs
    monkeypatch.setattr(
        module,
        "_log_probs",
        lambda logits, targets: scored.extend(targets.tolist()) or log_probs(logits, targets),
    )

    got = evaluate(model, CharTokenizer(), text=text, stride=stride, window=window, progress=False)

    total = 0.0
    for i in range(1, n):
        span = window + (stride == window)  # tokens that a window reaches
        number = next(k for k in range(n) if k * stride + span > i)  # the first window that reaches token i
        total -= naive_log_prob(model, ids, number * stride, i)
    assert scored == ids[1:]  # each token once, in order
    assert got["tokens"] == n - 1
    assert got["nll_per_token"] == pytest.approx(total / (n - 1), rel=1e-5)  # logits go through float32
    assert got["perplexity"] == pytest.approx(math.exp(total / (n - 1)), rel=1e-5)
    assert got["tokens_per_second"] > 0


def test_perplexity_is_transformers_own_loss_over_strided_windows(model, tmp_path):
    """The published recipe: labels of tokens already scored are -100 and the loss is transformers' own."""
    stride, window, n = 10, 32, 100
    ids = torch.tensor([[ord(c) for c in passage(n)]])
    total, count, previous = 0.0, 0, 0
    for begin in range(0, n, stride):
        end = min(begin + window, n)
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        targets = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids[:, begin:end], labels=labels).loss.item() * targets
        count, previous = count + targets, end
        if end == n:
            break
    text = write(tmp_path / "text.txt", passage(n))
    got = evaluate(model, CharTokenizer(), text=text, stride=stride, progress=False)  # window: the model's own
    assert got["tokens"] == count
    assert got["nll_per_token"] == pytest.approx(total / count, rel=1e-5)


def test_head_is_not_computed_for_context(model, tmp_path):
    text = write(tmp_path / "text.txt", passage(75))
    positions: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: positions.append(out.shape[1]))
    evaluate(model, CharTokenizer(), text=text, stride=4, window=16, progress=False)
    hook.remove()
    assert sum(positions) == 1 + 74  # the forward before the clock starts, and each scored token


def test_models_without_logits_to_keep_give_the_same(model, tmp_path, monkeypatch):
    text = write(tmp_path / "text.txt", passage(75))
    rows = write(tmp_path / "rows.jsonl", [{"text": f"{passage(n)} {passage(3)}"} for n in (3, 9, 20)])
    files = {"text": text, "lambada": rows, "stride": 4, "progress": False}
    expected = evaluate(model, CharTokenizer(), **files)
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, attention_mask, use_cache: forward(input_ids=input_ids, attention_mask=attention_mask),
    )
    got = evaluate(model, CharTokenizer(), **files)
    for name in ("perplexity", "lambada_perplexity", "lambada_accuracy"):
        assert got[name] == pytest.approx(expected[name], rel=1e-6)


def test_limit_caps_tokens_and_rows(tmp_path):
    text = write(tmp_path / "text.txt", passage(75))
    rows = write(tmp_path / "rows.jsonl", [{"text": "q xy"}, {"text": "q xz"}])  # the first is right
    bigram = Bigram({"q": " ", " ": "x", "x": "y"})
    got = evaluate(bigram, CharTokenizer(), text=text, lambada=rows, limit=20, stride=8, progress=False)
    assert got["tokens"] == 19
    assert got["lambada_accuracy"] == 0.5
    got = evaluate(bigram, CharTokenizer(), lambada=rows, limit=1, progress=False)
    assert got == {"lambada_accuracy": 1.0, "lambada_perplexity": pytest.approx(math.exp(3 * Bigram.HIT))}


def test_default_window_is_the_models_but_at_most_2048_and_stride_512_or_less(tmp_path):
    lengths: list[int] = []
    bigram = Bigram({})
    bigram.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    text = write(tmp_path / "text.txt", passage(3000))
    assert evaluate(bigram, CharTokenizer(), text=text, progress=False)["tokens"] == 2999
    assert lengths[:3] == [POSITIONS] * 3  # disjoint windows
    lengths.clear()
    bigram.config.max_position_embeddings = 131072
    evaluate(bigram, CharTokenizer(), text=text, progress=False)
    assert lengths == [2047, 2047, 2047, 3000 - 2 * 512 - 1]  # an untimed one, then 0 …, 512 …, 1024 …


def test_trained_model_on_real_text(trained):
    model, tokenizer = trained
    text = data("heldout.txt")
    disjoint = evaluate(model, tokenizer, text=text, limit=600, stride=64, window=64, progress=False)
    strided = evaluate(model, tokenizer, text=text, limit=600, stride=64, window=256, progress=False)
    # One forward of transformers over the first 512 tokens: what the first window must give.
    ids = torch.tensor([tokenizer(text.read_text(encoding="utf-8")[:4000], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :512], labels=ids[:, :512]).loss.item()
    got = evaluate(model, tokenizer, text=text, limit=512, window=512, stride=500, progress=False)
    assert got["nll_per_token"] == pytest.approx(first, rel=1e-5)
    assert strided["perplexity"] < disjoint["perplexity"] < 4096 / 10  # it reads, and context helps it


def test_bfloat16_logits_are_scored_in_float32(trained):
    tokenizer = trained[1]
    model = AutoModelForCausalLM.from_pretrained(REPO / "examples" / "tiny-mixtral", dtype=torch.bfloat16)
    text = data("heldout.txt")
    got = evaluate(model, tokenizer, text=text, limit=200, stride=256, window=256, progress=False)
    ids = tokenizer(text.read_text(encoding="utf-8")[:4000], add_special_tokens=False)["input_ids"][:200]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    expected = -sum(log_p[i, token].item() for i, token in enumerate(ids[1:])) / 199
    assert got["nll_per_token"] == pytest.approx(expected, rel=1e-6)


def test_long_text_raises_no_tokenizer_warning(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(tokenizer, "model_max_length", 10)
    text = write(tmp_path / "text.txt", "the quick brown fox jumps over the lazy dog, and then again " * 2)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        evaluate(model, tokenizer, text=text, progress=False)
        assert records == []
        tokenizer(text.read_text())
        assert any("longer than" in record for record in records)  # the warning there would have been
    finally:
        logger.removeHandler(handler)


# --------------------------------------------------------------------------------------- LAMBADA and PIQA


def test_lambada_of_a_bigram_model(tmp_path):
    bigram = Bigram({"q": " ", " ": "x", "x": "y"})
    rows = [
        {"text": "a\u2028q xy"},  # greedy from end to end; a line separator does not end the row
        {"text": "a q xz"},  # the last token is not
        {"text": "a q zy\n"},  # nor the middle one, nor y after z; whitespace at the end is not a word
        {"text": "q\nx"},  # the newline belongs to the continuation and is not what the model expects
    ]
    path = write(tmp_path / "lambada.jsonl", rows)
    got = evaluate(bigram, CharTokenizer(), lambada=path, progress=False)
    # The table has no row for z and newline: there every character is as likely as another.
    uniform, hit, miss = math.log(128), Bigram.HIT, Bigram.MISS
    nll = [3 * hit, 2 * hit + miss, hit + miss + uniform, miss + uniform]
    assert got["lambada_accuracy"] == 1 / 4
    assert got["lambada_perplexity"] == pytest.approx(math.exp(sum(nll) / 4), rel=1e-5)


def test_lambada_perplexity_of_a_hopeless_model_is_inf(tmp_path):
    bigram = Bigram({"q": "a"})
    bigram.head.weight.data *= 1e4
    path = write(tmp_path / "lambada.jsonl", [{"text": "q x"}])
    assert evaluate(bigram, CharTokenizer(), lambada=path, progress=False)["lambada_perplexity"] == math.inf


PIQA = {
    # Sum and sum per byte agree: xy is what the model expects.
    "both": ({"goal": "q", "sol1": "xz", "sol2": "xy"}, 1, 1),
    # z is one byte with one miss; xxxy has one miss too and costs more, but over four bytes.
    "per byte": ({"goal": "q", "sol1": "w", "sol2": "wq xy"}, 0, 1),
    # Bytes, not characters: two accented letters are four bytes. Per character the second would win.
    "bytes": ({"goal": "q", "sol1": "éé", "sol2": "www"}, 0, 0),
    "tie": ({"goal": "q", "sol1": "xy", "sol2": "xy"}, 0, 0),
}


@pytest.mark.parametrize("case", PIQA)
@pytest.mark.parametrize("label", [0, 1])
def test_piqa_of_a_bigram_model(tmp_path, case, label):
    # After w comes q, so that its continuation is cheap; what follows é is never likely.
    bigram = Bigram({"q": " ", " ": "x", "x": "y", "w": "q", "i": "x"})
    row, chosen, chosen_norm = PIQA[case]
    path = write(tmp_path / "valid.jsonl", [row])
    write(tmp_path / "valid-labels.lst", f"{label}\n")
    got = evaluate(bigram, CharTokenizer(), piqa=path, progress=False)
    assert got == {"piqa_accuracy": chosen == label, "piqa_accuracy_norm": chosen_norm == label}


def test_a_space_at_the_end_of_a_goal_does_not_make_two(tmp_path):
    labels = write(tmp_path / "labels.txt", "0\n")
    rows = []
    for goal in ("q", "q "):
        path = write(tmp_path / "rows.jsonl", [PIQA["both"][0] | {"goal": goal}])
        rows.append(module._piqa_rows(CharTokenizer(), path, labels, POSITIONS, None))
    assert rows[0] == rows[1]
    assert rows[0][0][0] == ([ord(c) for c in "q xz"], 3)


def test_piqa_labels_may_be_elsewhere(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [PIQA["both"][0]] * 4)
    labels = write(tmp_path / "labels.txt", "1\n0\n1\n1\n")
    bigram = Bigram({"q": " ", " ": "x", "x": "y"})
    got = evaluate(bigram, CharTokenizer(), piqa=rows, piqa_labels=labels, progress=False)
    assert got == {"piqa_accuracy": 0.75, "piqa_accuracy_norm": 0.75}
    got = evaluate(bigram, CharTokenizer(), piqa=rows, piqa_labels=labels, limit=2, progress=False)
    assert got == {"piqa_accuracy": 0.5, "piqa_accuracy_norm": 0.5}


def test_batches_give_what_single_rows_give(tmp_path, monkeypatch):
    model = tiny_mixtral(torch.float32)
    lengths = [1, 2, 30, 3, 3, 31, 8, 60, 17, 1, 5, 12, 25, 4, 4, 9, 33, 2, 7]  # some longer than the window
    texts = [f"{passage(n)} {passage(1 + n % 5)}" for n in lengths]
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    rows = module._lambada_rows(CharTokenizer(), path, POSITIONS, None)
    scores = {}
    for size in (1, 4, 16):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", size)
        with torch.inference_mode():
            scores[size] = [logp for logp, _ in module._score(model, rows, "rows", progress=False)]
    assert scores[4] == pytest.approx(scores[1], abs=1e-4)
    assert scores[16] == pytest.approx(scores[1], abs=1e-4)
    # And both give what one forward per token gives.
    exact = tiny_mixtral(torch.float64)
    naive = []
    for text in texts:
        ids = [ord(c) for c in text][-(POSITIONS + 1) :]
        word = 1 + len(text.split()[-1])
        naive.append(sum(naive_log_prob(exact, ids, 0, i) for i in range(len(ids) - word, len(ids))))
    assert scores[16] == pytest.approx(naive, abs=1e-3)


def test_trained_model_on_lambada_and_piqa(trained):
    model, tokenizer = trained
    files = {"lambada": data("lambada_test.jsonl"), "piqa": data("piqa-valid.jsonl")}
    got = evaluate(model, tokenizer, **files, limit=12, progress=False)
    assert set(got) == {"lambada_accuracy", "lambada_perplexity", "piqa_accuracy", "piqa_accuracy_norm"}
    # A word is one to three of 4096 tokens: far better than guessing one token, far worse than a real model.
    assert 1e3 < got["lambada_perplexity"] < 4096**2
    assert all(0 <= got[name] <= 1 for name in got if "accuracy" in name)


def test_a_token_that_spans_the_boundary_is_scored_whole(tmp_path):
    """With "b x" one token, the context "a b" is not a prefix of the passage's tokens; its first "a " is."""
    tokenizer = CharTokenizer(merges=("b x",))
    row = module._row(tokenizer, "a b", " xy", POSITIONS, "here")
    assert row.tokens == [ord("a"), ord(" "), 127, ord("y")]
    assert row.scored == 2


# ------------------------------------------------------------------------------------ behaviour and errors


def test_training_mode_comes_back_module_by_module(model, tmp_path):
    text = write(tmp_path / "text.txt", passage(20))
    bigram = Bigram({})
    bigram.train()
    bigram.head.eval()
    seen: list[bool] = []
    bigram.register_forward_pre_hook(lambda m, args: seen.append(m.training or torch.is_grad_enabled()))
    evaluate(bigram, CharTokenizer(), text=text, stride=8, progress=False)
    assert not any(seen)
    assert seen
    assert (bigram.training, bigram.head.training) == (True, False)

    def fail(*args):
        raise RuntimeError("out of memory")

    bigram.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(bigram, CharTokenizer(), text=text, stride=8, progress=False)
    assert (bigram.training, bigram.head.training) == (True, False)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_goes_to_stderr_or_nowhere(tmp_path, capsys, progress):
    text = write(tmp_path / "text.txt", passage(20))
    rows = write(tmp_path / "rows.jsonl", [{"text": "q xy"}])
    evaluate(Bigram({}), CharTokenizer(), text=text, lambada=rows, stride=8, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert [name in err for name in ("perplexity", "19/19", "lambada")] == [progress] * 3


GOOD = {"goal": "q", "sol1": "xy", "sol2": "xz"}
ERRORS = {
    "nothing": ({}, {}, "nothing to evaluate; give text, lambada or piqa"),
    "missing": ({"text": "no.txt"}, {}, "no.txt: cannot be read: No such file or directory"),
    "empty text": ({"text": "a.txt"}, {"a.txt": ""}, "a.txt: perplexity needs at least two tokens, got 0"),
    "one token": ({"text": "a.txt"}, {"a.txt": "x"}, "a.txt: perplexity needs at least two tokens, got 1"),
    "limit": ({"text": "a.txt", "limit": 0}, {"a.txt": "xyz"}, "limit must be at least 1, got 0"),
    "stride 0": (
        {"text": "a.txt", "stride": 0},
        {"a.txt": "xyz"},
        r"stride must be in 1 … window \(32\), got 0",
    ),
    "stride": (
        {"text": "a.txt", "stride": 33},
        {"a.txt": "xyz"},
        r"stride must be in 1 … window \(32\), got 33",
    ),
    "window 0": ({"text": "a.txt", "window": 0}, {"a.txt": "xyz"}, "window must be at least 1 .*, got 0"),
    "window": ({"text": "a.txt", "window": 64}, {"a.txt": "x"}, "at most the model's 32 positions, got 64"),
    "no rows": ({"lambada": "a.jsonl"}, {"a.jsonl": "\n"}, "a.jsonl: must have at least one row, got none"),
    "not JSON": (
        {"lambada": "a.jsonl"},
        {"a.jsonl": '{"text": "q xy"}\n{"text": \n'},
        "a.jsonl, line 2: must be a JSON object, got '{\"text\": '",
    ),
    "not an object": (
        {"lambada": "a.jsonl"},
        {"a.jsonl": "[1]\n"},
        r"line 1: must be a JSON object, got '\[1\]'",
    ),
    "no key": (
        {"lambada": "a.jsonl"},
        {"a.jsonl": [GOOD]},
        "line 1: 'text' must be a non-empty string, got None",
    ),
    "one word": (
        {"lambada": "a.jsonl"},
        {"a.jsonl": [{"text": " word "}]},
        "line 1: text must have at least two words, got ' word '",
    ),
    "long word": (
        {"lambada": "a.jsonl"},
        {"a.jsonl": [{"text": "q xy"}, {"text": "q " + "x" * 32}]},
        "line 2: the continuation is 33 tokens long, more than the window of 32",
    ),
    "empty goal": (
        {"piqa": "a.jsonl"},
        {"a.jsonl": [GOOD | {"goal": " "}], "a-labels.lst": "0\n"},
        "line 1: 'goal' must be a non-empty string, got ' '",
    ),
    "no labels": ({"piqa": "a.jsonl"}, {"a.jsonl": [GOOD]}, "a-labels.lst: cannot be read: No such file"),
    "label": (
        {"piqa": "a.jsonl"},
        {"a.jsonl": [GOOD, GOOD], "a-labels.lst": "0\n2\n"},
        "a-labels.lst, line 2: a label must be 0 or 1, got '2'",
    ),
    "label count": (
        {"piqa": "a.jsonl", "limit": 1},
        {"a.jsonl": [GOOD, GOOD], "a-labels.lst": "0\n"},
        "a-labels.lst: must have one label per row of .*a.jsonl, got 1 labels for 2 rows",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path, case):
    arguments, files, message = ERRORS[case]
    for name, content in files.items():
        write(tmp_path / name, content)
    arguments = {k: tmp_path / v if isinstance(v, str) else v for k, v in arguments.items()}
    if "lambada" in arguments:  # a mistake in a later file is found before an earlier one is scored
        arguments |= {"text": write(tmp_path / "good.txt", passage(20))}
    bigram = Bigram({})
    with pytest.raises(ValueError, match=message) as error:
        evaluate(bigram, CharTokenizer(), **{"stride": 8, "progress": False} | arguments)
    assert "\n" not in str(error.value)
    assert bigram.calls == 0


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt: must be UTF-8 text, byte 3 is not"):
        evaluate(Bigram({}), CharTokenizer(), text=tmp_path / "a.txt", stride=8, progress=False)


def test_a_continuation_without_a_context_token_is_refused():
    with pytest.raises(ValueError, match="here: no token ends before the continuation ' x'; it needs a context"):
        module._row(CharTokenizer(merges=("b x",)), "b", " x", POSITIONS, "here")


def test_models_that_are_not_causal_lms_are_refused(tmp_path):
    text = write(tmp_path / "text.txt", passage(20))
    small = {"vocab_size": 128, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1}
    with pytest.raises(ValueError, match="must be decoder-only, T5ForConditionalGeneration is an encoder-dec"):
        evaluate(T5ForConditionalGeneration(T5Config(**small)), CharTokenizer(), text=text)
    config = tiny_mixtral(torch.float32).config
    with pytest.raises(ValueError, match="MixtralModel has no language-modelling head; load it with AutoModelFor"):
        evaluate(MixtralModel(config), CharTokenizer(), text=text)
