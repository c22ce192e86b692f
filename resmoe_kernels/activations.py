"""Activations by name, so that the op's schema can carry them.

A pointwise activation f makes h = f(z[:I]) * z[I:] in gated experts and h = f(z) in ungated ones. A model's own gate
(``_apply_gate`` of transformers) takes the whole z and is registered under a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "identity": lambda z: z,
}
_GATES: dict[str, Callable[[Tensor], Tensor]] = {}


def register_gate(name: str, gate: Callable[[Tensor], Tensor]) -> None:
    """Registers a gate, z (P, 2I) or (P, I) float32 -> h (P, I); a later call with the same name replaces it."""
    if name in POINTWISE:
        raise ValueError(f"register_gate: {name!r} is a built-in activation; choose another name")
    _GATES[name] = gate


def registered_gate(name: str) -> Callable[[Tensor], Tensor] | None:
    """The gate registered under a name, None if there is none."""
    return _GATES.get(name)


def check_activation(name: str) -> None:
    """Raises ValueError, listing the known names, unless ``name`` is one of them."""
    if name not in POINTWISE and name not in _GATES:
        raise ValueError(
            f"activation: {name!r} is not known; known are {', '.join([*POINTWISE, *_GATES])}; "
            "a model's own gate is known once that model is loaded or swapped"
        )


def activate(z: Tensor, name: str, gated: bool) -> Tensor:
    """z: (P, 2I) where ``gated``, else (P, I) -> h (P, I)."""
    if name in _GATES:
        return _GATES[name](z)
    if not gated:
        return POINTWISE[name](z)
    gate, up = torch.chunk(z, 2, dim=-1)
    return POINTWISE[name](gate) * up
