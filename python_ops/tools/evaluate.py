"""Quality of a causal language model: KL from the dense one and perplexity of a text, LAMBADA and PIQA."""

from __future__ import annotations

import inspect
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resmoe_kernels.python_ops.calibration.usage import count_usage
from resmoe_kernels.python_ops.models.text import encode, read_text
from resmoe_kernels.python_ops.tools.divergence import Divergence
from resmoe_kernels.python_ops.tools.kept_logits import KeptLogits, LogitsWriter, described

DEFAULT_STRIDE = 512
WINDOW_CAP = 2048  # the window at which compression papers report perplexity
ROWS_PER_BATCH = 16  # 3 times the rows per second of 1 on two CPU cores; 64 pads more and is slower


class _Row(NamedTuple):
    tokens: list[int]  # context and continuation, at most window + 1
    scored: int  # how many of the last tokens are the continuation


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Path | str | None = None,
    lambada: Path | str | None = None,
    piqa: Path | str | None = None,
    piqa_labels: Path | str | None = None,
    stride: int | None = None,
    window: int | None = None,
    limit: int | None = None,
    against: PreTrainedModel | Path | str | None = None,
    keep: Path | str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Scores a causal language model on the files given and returns every metric by name.

        perplexity = exp(nll_per_token),    nll_per_token = -1/(n-1) Σ_{i≥1} log p(t_i | t_{s(i)} … t_{i-1})

    The text's n tokens are cut into windows that advance by ``stride``. Each token but the first is scored
    once, in the first window that reaches it, so s(i) leaves it ``window - stride`` tokens of context or more
    where the text has them. Where ``stride == window``, a window still sees the one token before its first.
    A row of the other two files is a context and a continuation, scored as Σ log p(continuation | context);
    whitespace between the two belongs to the continuation, and a long context loses its beginning. No special
    tokens are added anywhere. Every file is read and checked before the model first runs. Logits are taken in
    float32, sums in float64.

    text: UTF-8 file -> ``perplexity``, ``nll_per_token``, ``tokens`` (those scored), ``tokens_per_second``
        (tokens scored per second of model forwards, after one that is not timed)
    lambada: JSON lines with ``text``, whose last word is the continuation -> ``lambada_accuracy`` (every
        token of the word is the most likely one), ``lambada_perplexity`` (per word)
    piqa: JSON lines with ``goal``, ``sol1``, ``sol2`` -> ``piqa_accuracy`` (the likelier solution is the
        right one), ``piqa_accuracy_norm`` (likelier per UTF-8 byte of the solution)
    piqa_labels: 0 or 1 per line, the right solution; ``<stem>-labels.lst`` beside ``piqa`` where not given
    stride: tokens by which the window advances, 1 … window; by default 512, or the window where that is less
    window: most tokens the model sees at once; by default its ``max_position_embeddings``, at most 2048
    limit: reads only the first tokens of the text and the first rows of the other files
    against: what the model was compressed from, beside it in memory and run window by window, or a file of its logits
        of this very text (see ``keep``) -> ``kl``, the mean over tokens of the KL divergence from its next-token
        distribution to the model's, in nats and float64; ``kl_99``, which 99 of 100 tokens stay within;
        ``same_first_choice``, the share of tokens where both find the same one likeliest
    keep: file to write the model's logits of the text to, exactly as the head gives them: V entries of its dtype for
        each token scored, for ``against`` where two models do not fit in memory

    Of a compressed model there is ``experts_per_token`` besides: with how many experts a token was computed, a part
    counting as its fraction, mean over all tokens run (padding included) and over layers.

    Raises ValueError for a model that is not a decoder with a language-modelling head, no file to evaluate, a
    file that is missing, empty or malformed (named with its line), labels that do not match the rows, and a
    stride, window or limit out of range.

    Source: strided perplexity as Hugging Face defines it; LAMBADA (Paperno et al. 2016) and PIQA (Bisk et al.
    2019) as continuations, where PIQA's is "<goal> <solution>" without lm-eval's "Question: … Answer:" frame.
    """
    if text is None and lambada is None and piqa is None:
        raise ValueError("evaluate: nothing to evaluate; give text, lambada or piqa")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"evaluate: the model must be decoder-only, {name} is an encoder-decoder")
    if model.get_output_embeddings() is None:
        raise ValueError(f"evaluate: {name} has no language-modelling head; load it with AutoModelForCausalLM")
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate: limit must be at least 1, got {limit}")
    for argument, value in (("against", against), ("keep", keep)):
        if value is not None and text is None:
            raise ValueError(f"evaluate: {argument} is about the tokens of a text; give text")
    window = _window(model, window)
    if stride is None:
        stride = min(DEFAULT_STRIDE, window)

    ids: list[int] = []
    lambada_rows: list[_Row] = []
    piqa_rows: list[_Row] = []
    if text is not None:
        if not 1 <= stride <= window:
            raise ValueError(f"evaluate: stride must be in 1 … window ({window}), got {stride}")
        ids = encode(tokenizer, read_text(text))[:limit]
        if len(ids) < 2:
            raise ValueError(f"{text}: perplexity needs at least two tokens, got {len(ids)}")
    kept = None
    if isinstance(against, (str, Path)):
        kept = KeptLogits(against, described(torch.tensor(ids), stride, window))
    if lambada is not None:
        lambada_rows = _lambada_rows(tokenizer, lambada, window, limit)
    if piqa is not None:
        piqa_labels = piqa_labels or Path(piqa).with_name(f"{Path(piqa).stem}-labels.lst")
        piqa_rows, labels, sizes = _piqa_rows(tokenizer, piqa, piqa_labels, window, limit)

    metrics: dict[str, float] = {}
    models = [model] if against is None or kept else [model, against]
    modes = {module: module.training for m in models for module in m.modules()}  # type: ignore[union-attr]
    for m in models:
        m.eval()  # type: ignore[union-attr]
    try:
        with torch.inference_mode(), count_usage(model) as usage:
            if text is not None:
                token_ids = torch.tensor(ids, device=model.device)
                metrics |= _of_text(model, token_ids, stride, window, kept or against, keep, progress)  # type: ignore[arg-type]
            if lambada is not None:
                scores = _score(model, lambada_rows, "lambada", progress)
                metrics["lambada_accuracy"] = sum(greedy for _, greedy in scores) / len(scores)
                metrics["lambada_perplexity"] = _exp(-math.fsum(logp for logp, _ in scores) / len(scores))
            if piqa is not None:
                logps = [logp for logp, _ in _score(model, piqa_rows, "piqa", progress)]
                per_byte = [logp / size for logp, size in zip(logps, sizes, strict=True)]
                metrics["piqa_accuracy"] = _two_choice_accuracy(logps, labels)
                metrics["piqa_accuracy_norm"] = _two_choice_accuracy(per_byte, labels)
        if used := [layer.experts_per_token for layer in usage.values() if layer.tokens]:
            metrics["experts_per_token"] = math.fsum(used) / len(used)
    finally:
        for module, training in modes.items():
            module.training = training
    return metrics


def _window(model: PreTrainedModel, window: int | None) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return min(longest or WINDOW_CAP, WINDOW_CAP)
    if window < 1 or (longest is not None and window > longest):
        raise ValueError(
            f"evaluate: window must be at least 1 and at most the model's {longest} positions, got {window}"
        )
    return window


def _of_text(
    model: PreTrainedModel,
    ids: Tensor,
    stride: int,
    window: int,
    against: PreTrainedModel | KeptLogits | None,
    keep: Path | str | None,
    progress: bool,
) -> dict[str, float]:
    """ids: (n,) int64, the whole text."""
    n = len(ids)
    overlap = max(window - stride, 1)
    # Not timed: the first forward also compiles kernels and allocates buffers.
    _last_logits(model, ids[None, : min(overlap + stride, n) - 1], keep=1)
    nll = seconds = 0.0
    divergence = None if against is None else Divergence()
    with (
        tqdm(total=n - 1, desc="perplexity", unit="token", disable=not progress) as bar,
        _writer(keep, n - 1, described(ids, stride, window)) as writer,
    ):
        for start in range(0, max(n - overlap, 1), stride):
            first = start + overlap if start else 1
            end = min(start + overlap + stride, n)
            seen = ids[None, start : end - 1]
            _synchronize(model.device)
            began = time.perf_counter()
            logits = _last_logits(model, seen, keep=end - first)[0]
            _synchronize(model.device)
            seconds += time.perf_counter() - began
            nll -= _log_probs(logits, ids[first:end]).sum().item()
            if isinstance(against, KeptLogits):
                divergence.add(logits, against.rows(first - 1, end - 1))  # type: ignore[union-attr]
            elif against is not None:
                divergence.add(logits, _last_logits(against, seen.to(against.device), keep=end - first)[0])  # type: ignore[union-attr]
            if writer is not None:
                writer.add(logits)
            bar.update(end - first)
    per_token = nll / (n - 1)
    return {
        "perplexity": _exp(per_token),
        "nll_per_token": per_token,
        "tokens": n - 1,
        "tokens_per_second": (n - 1) / seconds,
        **({} if divergence is None else divergence.metrics()),
    }


@contextmanager
def _writer(path: Path | str | None, tokens: int, windows: dict[str, str]) -> Iterator[LogitsWriter | None]:
    if path is None:
        yield None
        return
    writer = LogitsWriter(path, tokens, windows)
    try:
        yield writer
    except BaseException:
        writer.close(whole=False)
        raise
    writer.close()


def _score(model: PreTrainedModel, rows: list[_Row], name: str, progress: bool) -> list[tuple[float, bool]]:
    """Log-probability of each row's continuation and whether greedy decoding would have written it."""
    scores: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
    # Longest first: like lengths side by side need little padding, and a batch too big for memory fails soon.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    with tqdm(total=len(rows), desc=name, unit="row", disable=not progress) as bar:
        for at in range(0, len(order), ROWS_PER_BATCH):
            batch = order[at : at + ROWS_PER_BATCH]
            longest = len(rows[batch[0]].tokens) - 1  # a row's last token is a target, never an input
            # Padding stands on the right, where a causal model cannot look back at it; any id will do.
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for b, i in enumerate(batch):
                length = len(rows[i].tokens) - 1
                ids[b, :length] = torch.tensor(rows[i].tokens[:-1])
                mask[b, :length] = 1
            keep = longest - min(len(rows[i].tokens) - 1 - rows[i].scored for i in batch)
            logits = _last_logits(model, ids.to(model.device), keep, mask.to(model.device))
            for b, i in enumerate(batch):
                tokens, scored = rows[i]
                end = len(tokens) - 1 - (longest - keep)
                targets = torch.tensor(tokens[-scored:], device=logits.device)
                mine = logits[b, end - scored : end]
                greedy = bool((mine.argmax(-1) == targets).all())
                scores[i] = (_log_probs(mine, targets).sum().item(), greedy)
            bar.update(len(batch))
    return scores


def _last_logits(model: PreTrainedModel, ids: Tensor, keep: int, mask: Tensor | None = None) -> Tensor:
    """Logits (B, keep, V) of the last ``keep`` positions of ids (B, L), from the head alone where it can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -keep:]


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(targets) (n,) float64 on the CPU, from logits (n, V) of any dtype and targets (n,)."""
    nll = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return -nll.cpu().double()


def _two_choice_accuracy(scores: list[float], labels: list[int]) -> float:
    """Share of pairs (scores[2i], scores[2i+1]) whose higher score is the labelled one; a tie: the first."""
    chosen = [int(second > first) for first, second in zip(scores[::2], scores[1::2], strict=True)]
    return sum(c == label for c, label in zip(chosen, labels, strict=True)) / len(labels)


def _exp(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).exp().item()  # math.exp raises where this says inf


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _lambada_rows(tokenizer: PreTrainedTokenizerBase, path: Path | str, window: int, limit: int | None) -> list[_Row]:
    rows = []
    for where, (passage,) in _read_json_lines(path, ("text",))[:limit]:
        split = re.fullmatch(r"(.*\S)(\s+\S+)\s*", passage, re.DOTALL)
        if split is None:
            raise ValueError(f"{where}: text must have at least two words, got {passage!r}")
        rows.append(_row(tokenizer, split[1], split[2], window, where))
    return rows


def _piqa_rows(
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str,
    labels_path: Path | str,
    window: int,
    limit: int | None,
) -> tuple[list[_Row], list[int], list[int]]:
    """Two rows per question, the label of each question, and the bytes of each row's solution."""
    questions = _read_json_lines(path, ("goal", "sol1", "sol2"))
    lines = _lines(labels_path)
    for number, line in enumerate(lines, start=1):
        if line.strip() not in ("0", "1"):
            raise ValueError(f"{labels_path}, line {number}: a label must be 0 or 1, got {line!r}")
    if len(lines) != len(questions):
        raise ValueError(
            f"{labels_path}: must have one label per row of {path}, got {len(lines)} labels for {len(questions)} rows"
        )
    rows, sizes = [], []
    for where, (goal, *solutions) in questions[:limit]:
        context = goal.rstrip()
        for solution in solutions:
            rows.append(_row(tokenizer, context, f" {solution}", window, where))
            sizes.append(len(solution.encode()))
    return rows, [int(line) for line in lines[:limit]], sizes


def _row(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, window: int, where: str) -> _Row:
    tokens = encode(tokenizer, context + continuation)
    # A token that spans the boundary is not in the context's own encoding: it counts as continuation.
    pairs = zip(tokens, encode(tokenizer, context), strict=False)
    scored = len(tokens) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if scored == len(tokens):
        raise ValueError(f"{where}: no token ends before the continuation {continuation!r}; it needs a context")
    if scored > window:
        raise ValueError(f"{where}: the continuation is {scored} tokens long, more than the window of {window}")
    return _Row(tokens[-(window + 1) :], scored)


def _lines(path: Path | str) -> list[str]:
    content = read_text(path)
    if not content.strip():
        raise ValueError(f"{path}: must have at least one row, got none")
    # Not splitlines: it would also split at a U+2028 inside a JSON string.
    return content.rstrip("\n").split("\n")


def _read_json_lines(path: Path | str, keys: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Each row's place in the file and its values of ``keys``, in that order."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, got {line[:40]!r}")
        for key in keys:
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: {key!r} must be a non-empty string, got {row.get(key)!r}")
        rows.append((where, [row[key] for key in keys]))
    return rows
