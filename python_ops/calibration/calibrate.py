"""Calibration: one pass of the dense model over text, which collects what methods want to know of every layer."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resmoe_kernels.products import product
from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments, MomentSums
from resmoe_kernels.python_ops.calibration.statistics import MOMENTS, LayerStatistics, Statistics, moments_file
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.layouts import DenseFFN
from resmoe_kernels.python_ops.models.text import encode, read_text
from resmoe_kernels.python_ops.solvers.expert_outputs import expert_output, hidden_activations

_log = logging.getLogger("resmoe_kernels")

WINDOW_CAP = 512  # MC-SMoE's
DEFAULT_TOKENS = 65_536
SAMPLE = 4096  # tokens of each layer that are kept as they are


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path | str,
    *,
    tokens: int = DEFAULT_TOKENS,
    moments: str = "diagonal",
    progress: bool = True,
) -> Statistics:
    """Runs a loaded dense model over a text and returns the statistics methods ask for.

    text: UTF-8 file; read in windows of the model's length, at most 512 tokens, with nothing added
    tokens: how many of its tokens to read, whole windows
    moments: of the inputs of both matrices, ``diagonal`` or ``full``; or ``experts``, which is ``diagonal`` and beside
        it, for fits, the full ones of each expert's own inputs, see LayerMoments

    Raises ValueError for a text that cannot be read or is shorter than two tokens, tokens < 2, unknown moments, and
    a model that is no decoder or has a router that does not return logits, and for numbers too large for its dtype.
    """
    dense = DenseModel(model)
    return collect(dense, windows(model.config, tokenizer, text, tokens), moments=moments, progress=progress)


def windows(config: Any, tokenizer: PreTrainedTokenizerBase, text: Path | str, tokens: int) -> Tensor:
    """The first tokens of a text as (windows, L) int64, L = min(512, the model's positions, the text's tokens)."""
    if tokens < 2:
        raise ValueError(f"calibration tokens: must be at least 2, got {tokens}")
    ids = encode(tokenizer, read_text(text))[:tokens]
    if len(ids) < 2:
        raise ValueError(f"{text}: calibration needs at least two tokens, got {len(ids)}")
    length = min(WINDOW_CAP, getattr(config.get_text_config(), "max_position_embeddings", None) or WINDOW_CAP, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def origin_of(token_ids: Tensor, model: str | None, moments: str) -> dict[str, Any]:
    """What statistics are told apart by. model: its fingerprint, None for one in memory."""
    digest = hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()
    return {"model": model, "windows": list(token_ids.shape), "token_ids": digest, "moments": moments}


def collect(
    model: DenseModel,
    token_ids: Tensor,
    *,
    moments: str = "diagonal",
    fingerprint: str | None = None,
    file: Path | None = None,
    progress: bool = True,
) -> Statistics:
    """The same for tokens (windows, L) and a model that may be on disk: layer by layer, hidden states carried on.

    Memory, beside the model or, from disk, its embeddings and one decoder layer: hidden states, n H in the model's
    dtype; for each layer E I float32 of moments (E I^2 where ``full``) and 4096 (H + E) of sampled tokens. Moments of
    ``experts`` are E (H^2 + I^2) float32, of one layer at a time where there is a file to be saved as: they go there.

    file: what the statistics will be saved as, see moments_file
    """
    check_moments(moments)
    layers: dict[str, LayerStatistics] = {}
    of_layer: dict[int, list[int]] = {}
    for i in range(len(model.experts)):
        of_layer.setdefault(model.decoder_layer_of(i), []).append(i)
        if not isinstance(model.experts[i], DenseFFN):
            model.experts[i].router(model.module)  # so that what cannot be watched is said before the work
    last = max(of_layer)
    with torch.inference_mode(), tqdm(total=last + 1, desc="calibrating", unit="layer", disable=not progress) as bar:
        hidden = model.embed(token_ids)
        for number in range(last + 1):
            with model.layer_in_memory(number):
                collectors = {i: _Collector(model, i, token_ids.numel(), moments) for i in of_layer.get(number, [])}
                try:
                    hidden = model.run(hidden, number, number + 1)
                finally:
                    for collector in collectors.values():
                        collector.remove()
                for i, collector in collectors.items():
                    path = model.experts[i].path
                    if not collector.seen:  # experts of images, say
                        _log.warning("%s: no token of the text comes there; nothing is known of this layer", path)
                        continue
                    layers[path] = collector.statistics(None if file is None else moments_file(file, path))
                    layers[path].check_finite(path)
                del collectors
            bar.update()
    return Statistics(layers, origin_of(token_ids, fingerprint, moments), token_ids)


def check_moments(moments: str) -> None:
    """Raises ValueError if there are none of the name."""
    if moments not in MOMENTS:
        raise ValueError(f"moments: must be one of {', '.join(MOMENTS)}, got {moments!r}")


class _Collector:
    """Watches the router and the experts of one layer while tokens pass, and sums up."""

    def __init__(self, model: DenseModel, i: int, tokens: int, moments: str) -> None:
        found = model.experts[i]
        self.path, self.activation = found.path, found.activation
        # In memory at this point, also where the model is on disk.
        self.experts = found.read({name: p.detach() for name, p in found.module.named_parameters()})
        self.full = moments == "full"
        self.moments = MomentSums(self.experts, self.activation) if moments == "experts" else None
        self.seen, self.tokens = 0, tokens
        self.wanted = torch.linspace(0, tokens - 1, min(SAMPLE, tokens)).round().long()
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {"x": [], "logits": [], "index": [], "weight": []}
        self.hooks = found.watch(model.module, self._on_experts)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _on_experts(self, x: Tensor, index: Tensor, weight: Tensor, logits: Tensor) -> None:
        logits = logits.float()
        count = self.experts.num_experts
        add = self._add
        add("probability", logits.softmax(-1).double().sum(0))
        add("logit_gram", product(logits.double().T, logits.double()))
        add("moment_gate_up", self._moment(x))
        pairs, weights = index.flatten(), weight.flatten().double()
        inside = (pairs >= 0) & (pairs < count)
        add("count", pairs[inside].bincount(minlength=count))
        add("weight", weights.new_zeros(count).index_add_(0, pairs[inside], weights[inside]))
        per_expert = [self._of_expert(e, x, index, weight) for e in range(count)]
        for name, values in zip(("moment_down", "output", "weighted_norm"), zip(*per_expert, strict=True), strict=True):
            add(name, torch.stack(values))
        here = self.wanted[(self.wanted >= self.seen) & (self.wanted < self.seen + len(x))] - self.seen
        for name, tensor in (("x", x), ("logits", logits), ("index", index), ("weight", weight.float())):
            self.samples[name].append(tensor[here].clone())
        self.seen += len(x)

    def _of_expert(self, e: int, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token, slot = (index == e).nonzero(as_tuple=True)
        h = hidden_activations(self.experts, e, x[token].to(self.experts.gate_up.dtype), self.activation)
        output = expert_output(self.experts, e, h)
        if self.moments is not None:
            self.moments.add(e, x[token].to(self.experts.gate_up.dtype), weight[token, slot])
        norm = (output.float().norm(dim=-1).double() * weight[token, slot].double()).sum()
        return self._moment(h), output.float().sum(0), norm

    def _moment(self, values: Tensor) -> Tensor:
        values = values.float()
        return product(values.T, values) if self.full else values.square().sum(0)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value if name not in self.sums else self.sums[name].add_(value)

    def statistics(self, file: Path | None) -> LayerStatistics:
        moments: LayerMoments | Path | None = None if self.moments is None else self.moments.result()
        if isinstance(moments, LayerMoments) and file is not None:
            file.parent.mkdir(exist_ok=True)
            moments.save(file)
            moments = file
        samples = {f"sample_{name}": torch.cat(parts) for name, parts in self.samples.items()}
        tensors = {name: tensor.cpu() for name, tensor in (self.sums | samples).items()}
        return LayerStatistics(**tensors, tokens=self.seen, moments=moments)
