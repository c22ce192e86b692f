"""Naming activations by what they compute: those of the op where they agree, others registered under a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resmoe_kernels.activations import POINTWISE, register_gate, registered_gate

# Wide enough to tell a clamped gate (limits of 7 to 10 are usual) from a plain one, fine enough for gelu's two forms.
_PROBE = torch.tensor([i / 5 for i in range(-30, 31)] + [-200.0, -30.0, 30.0, 200.0], device="cpu")
_GRID = torch.cartesian_prod(_PROBE, _PROBE)  # every pair of gate and up value


def _same(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], z: Tensor) -> bool:
    # The two forms of gelu are 4e-4 apart.
    return torch.allclose(f(z).float(), g(z).float(), rtol=1e-5, atol=1e-5)


def pointwise_name(act: Callable[[Tensor], Tensor], gated: bool = False) -> str:
    for name, known in POINTWISE.items():
        if _same(act, known, _PROBE):
            return name

    def gate(z: Tensor) -> Tensor:
        if not gated:
            return act(z)
        first, second = z.chunk(2, dim=-1)
        return act(first) * second

    return _register(gate, act, _GRID if gated else _PROBE.unsqueeze(1))


def gate_name(gate: Callable[[Tensor], Tensor], owner: nn.Module) -> str:
    for name, known in POINTWISE.items():
        if _same(gate, lambda z, f=known: f(z[:, :1]) * z[:, 1:], _GRID):  # type: ignore[misc]
            return name
    return _register(gate, owner, _GRID)


def _register(gate: Callable[[Tensor], Tensor], owner: Any, probe: Tensor) -> str:
    """Registers a model's own activation under its class name, its numbers and its inner activation."""
    numbers = {k: v for k, v in getattr(owner, "__dict__", {}).items() if isinstance(v, float | int)}
    names = {k: str(v) for k, v in numbers.items() if k != "training" and not k.startswith("_")}
    if hasattr(owner, "act_fn"):
        names["act_fn"] = getattr(owner.act_fn, "__name__", type(owner.act_fn).__name__)
    stem = getattr(owner, "__name__", type(owner).__name__)
    stem += f"({', '.join(f'{k}={v}' for k, v in sorted(names.items()))})"
    name, number = stem, 1
    while (registered := registered_gate(name)) is not None:
        if _same(registered, gate, probe):
            return name
        number += 1  # two lambdas, or two classes of one name
        name = f"{stem}#{number}"
    register_gate(name, gate)
    return name
