"""What a method may know of how a layer is used: sums over calibration tokens, and a sample of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments
from resmoe_kernels.python_ops.storage.files import copy_file
from resmoe_kernels.python_ops.storage.sealed import read_sealed, write_sealed

MOMENTS = ("diagonal", "full", "experts")
OVERFLOWED = (
    "the model's numbers are too large for its dtype on this text: compress it in bfloat16 or float32 "
    "(dtype in config.json and of the weights)"
)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one layer of E experts, over n tokens x; f_e(x) is an expert's output, h_e(x) its hidden activations,
    p_e the softmax of the router's logits over all experts, w_e the weight of a token's pair with an expert.

    count: (E,) int64, tokens routed to each;  weight: (E,) float64, sum of w_e over them
    probability: (E,) float64, sum of p_e over all tokens
    logit_gram: (E, E) float64, sum of logits_i logits_j over all tokens
    moment_gate_up: (H,) float32, sum of x^2 over all tokens, or (H, H), sum of x x^T
    moment_down: (E, I) float32, sum of h_e^2 over the tokens of each expert, or (E, I, I), sum of h_e h_e^T
    output: (E, H) float32, sum of f_e(x) over the tokens of each expert
    weighted_norm: (E,) float64, sum of w_e ||f_e(x)|| over the tokens of each expert
    sample_x: (S, H) in the model's dtype, some of the tokens, evenly spread
    sample_logits: (S, E) float32, the router's logits of those
    sample_index, sample_weight: (S, top_k) int64 and float32, their routing as the model had it
    tokens: n
    moments: where they were asked for, those of each expert, or the file that holds them, see LayerMoments
    """

    count: Tensor
    weight: Tensor
    probability: Tensor
    logit_gram: Tensor
    moment_gate_up: Tensor
    moment_down: Tensor
    output: Tensor
    weighted_norm: Tensor
    sample_x: Tensor
    sample_logits: Tensor
    sample_index: Tensor
    sample_weight: Tensor
    tokens: int
    moments: LayerMoments | Path | None = None

    def expert_moments(self) -> LayerMoments:
        """Raises ValueError where they were not collected, or their file is not there any more."""
        if self.moments is None:
            raise ValueError("statistics: hold no moments of experts, which fits are made under; collect 'experts'")
        return LayerMoments.load(self.moments) if isinstance(self.moments, Path) else self.moments

    @property
    def num_experts(self) -> int:
        return len(self.count)

    def check_finite(self, path: str) -> None:
        """Raises ValueError naming the layer, and what of it holds NaN or Inf, which nothing can be decided on."""
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{path}: calibration overflowed, {name} is not finite; {OVERFLOWED}")


_TENSORS = tuple(f.name for f in fields(LayerStatistics) if f.name not in ("tokens", "moments"))


@dataclass(frozen=True, eq=False)
class Statistics:
    """Those of every layer, by the path of its experts module, and what they were collected from.

    origin: plain values: the model's fingerprint, a hash of the tokens, their number, the kind of moments
    token_ids: (windows, L) int64, the tokens themselves
    """

    layers: dict[str, LayerStatistics]
    origin: dict[str, Any]
    token_ids: Tensor

    def check_holds(self, paths: Iterable[str]) -> None:
        """Raises ValueError naming the first layer of which nothing was collected."""
        for path in paths:
            if path not in self.layers:
                raise ValueError(
                    f"statistics: hold nothing of {path}; calibrate this model, or leave out of layers what no token "
                    "of a text comes to"
                )

    def save(self, path_of: Path | str) -> None:
        """Writes one safetensors file, and the moments of experts that are in memory beside it, a file for each layer,
        see ``moments_file``; it appears under its name only once all is whole."""
        tensors = {f"{path}.{n}": getattr(layer, n) for path, layer in self.layers.items() for n in _TENSORS}
        tokens = {path: layer.tokens for path, layer in self.layers.items()}
        tensors[_TOKENS] = self.token_ids
        held = {layer: moments_file(Path(path_of), layer) for layer in self.layers if self.layers[layer].moments}
        for layer, file in held.items():
            file.parent.mkdir(exist_ok=True)
            moments = self.layers[layer].moments
            if isinstance(moments, LayerMoments):
                moments.save(file)
            elif moments != file:
                copy_file(moments, file)
        described = {"origin": self.origin, "tokens": tokens}
        tensors[_DESCRIPTION] = torch.tensor(list(json.dumps(described, sort_keys=True).encode()), dtype=torch.uint8)
        write_sealed(tensors, Path(path_of))

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """The inverse of ``save``. Raises ValueError naming the file if it is not such a file, whole and bit by bit."""
        tensors = read_sealed(Path(path))
        if tensors is None:
            raise ValueError(
                f"{path}: not a file of calibration statistics, damaged, or of an older version; calibrate again"
            )
        try:
            described = json.loads(bytes(tensors[_DESCRIPTION].tolist()))
            held = described["origin"]["moments"] == "experts"
            layers = {
                layer: LayerStatistics(
                    **{n: tensors[f"{layer}.{n}"] for n in _TENSORS},
                    tokens=tokens,
                    moments=moments_file(Path(path), layer) if held else None,
                )
                for layer, tokens in described["tokens"].items()
            }
            return cls(layers, described["origin"], tensors[_TOKENS])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a file of calibration statistics ({error}); calibrate again") from None


def moments_file(statistics: Path, layer: str) -> Path:
    """Where the moments of a layer's experts are, beside a file of statistics: they are too large for all in memory."""
    return statistics.with_suffix(".moments") / f"{layer}.safetensors"


_TOKENS = "token_ids"
_DESCRIPTION = "description"  # a tensor, because safetensors writes several metadata keys in any order
