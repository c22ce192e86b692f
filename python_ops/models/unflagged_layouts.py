"""Experts stacked without the flags by which transformers says how: told by shapes, and proved by running them.

A module of this kind is run once with random weights and few neurons. Unless that gives the weighted sum of what is
read from it, it is refused: nothing is taken for granted because of names.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resmoe_kernels.activations import activate
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.models.activation_names import gate_name, pointwise_name
from resmoe_kernels.python_ops.models.experts_module import ExpertsModule, Watcher
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layer_contracts import (
    FlatteningExpertsLayer,
    IdentityExpertsLayer,
    InputWeightedExpertsLayer,
    chosen_rows,
)
from resmoe_kernels.python_ops.models.probing import CLOSE, noise, small_sizes, smaller_copy


class _Unflagged(ExpertsModule):
    """What these have in common: the proof."""

    def refusal(self) -> str | None:
        try:
            with torch.device("cpu"):  # from_pretrained builds models with meta as the device of everything
                proved = self._is_proved()
        except Exception as error:  # of any type: a model's own code, run at another size
            return f"run with few neurons, its forward fails ({type(error).__name__}: {' '.join(str(error).split())})"
        return None if proved else "its forward computes something else than the weighted sum of its experts"

    def _is_proved(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        small = smaller_copy(self.module, self._small_sizes, generator)
        read = self.read({name: p.detach() for name, p in small.named_parameters()})
        routed, slots = read.num_experts, self.num_experts
        x = noise(generator, slots, read.hidden_size)
        index = torch.stack([torch.arange(slots), (torch.arange(slots) + 1) % slots], dim=1)
        weights = noise(generator, slots, 2).abs() + 0.5
        outputs = torch.stack([_output(read, e, x, self.activation) if e < routed else x for e in range(slots)])
        pairs = torch.arange(slots)
        expected = (weights.unsqueeze(-1) * outputs[index, pairs.unsqueeze(-1)]).sum(1)
        with torch.no_grad():
            return torch.allclose(self._run(small, x, index, weights), expected, rtol=CLOSE, atol=CLOSE)

    def _run(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x (T, H), index and weights (T, 2) -> (T, H): the module's own forward."""
        return module(x, index, weights)

    def _sizes(self) -> tuple[int, int, int]:
        """E of the router, H and I."""
        raise NotImplementedError

    @property
    def num_experts(self) -> int:
        return self._sizes()[0]

    @cached_property
    def _small_sizes(self) -> dict[int, int]:
        return small_sizes(*self._sizes())

    @cached_property
    def activation(self) -> str:
        # A copy without the parameters: the swapped model must not keep the dense weights alive.
        shell: Any = self.module.__class__.__new__(self.module.__class__)
        shell.__dict__.update(self.module.__dict__, _parameters={})
        if hasattr(shell, "_apply_gate"):
            return gate_name(shell._apply_gate, shell)
        return pointwise_name(shell.act_fn, gated=True)


def _output(experts: DenseExperts, e: int, x: Tensor, activation: str) -> Tensor:
    """x (T, H) -> (T, H), of one expert of a layer without biases."""
    return activate(x @ experts.gate_up[e].T, activation, experts.gated) @ experts.down[e].T


def _matrices(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)


class UnflaggedExperts(_Unflagged):
    """``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I), and nothing else: Step-3. Where there are more of
    gate_up than of down, the router's slots beyond E are the identity, and their gate_up is not used: LongCat-Flash."""

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        shapes = _matrices(module)
        if set(shapes) != {"gate_up_proj", "down_proj"} or any(len(s) != 3 for s in shapes.values()):
            return False
        (slots, rows, hidden), down = shapes["gate_up_proj"], shapes["down_proj"]
        fits = slots >= down[0] and (hidden, rows) == (down[1], 2 * down[2])
        return fits and not hasattr(module, "is_transposed") and _arguments(module) == 3

    @property
    def layer_class(self) -> type[FactoredExpertsLayer]:  # type: ignore[override]
        gate_up, down = self.module.gate_up_proj, self.module.down_proj
        return IdentityExpertsLayer if len(gate_up) > len(down) else FactoredExpertsLayer  # type: ignore[arg-type]

    def _sizes(self) -> tuple[int, int, int]:
        (_, hidden, inner), slots = self.module.down_proj.shape, len(self.module.gate_up_proj)  # type: ignore[arg-type, misc, union-attr]
        return slots, hidden, inner  # type: ignore[return-value]

    @property
    def identities(self) -> int:
        return len(self.module.gate_up_proj) - len(self.module.down_proj)  # type: ignore[arg-type]

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
        return DenseExperts(gate_up[: len(down)], down)

    def install(self, model: nn.Module, *what: Any) -> FactoredExpertsLayer:
        layer = super().install(model, *what)
        if isinstance(layer, IdentityExpertsLayer):
            layer.first_identity = len(self.module.down_proj)  # type: ignore[arg-type]
        return layer


class RowStackedExperts(_Unflagged):
    """DBRX: below ``mlp`` the matrices ``w1`` (gate), ``v1`` (up) and ``w2`` (down, transposed) are each (E I, H), and
    tokens come as (B, L, H)."""

    layer_class = FlatteningExpertsLayer

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        shapes = _matrices(module)
        if set(shapes) != {"mlp.w1", "mlp.v1", "mlp.w2"} or len(set(shapes.values())) != 1:
            return False
        count = getattr(module, "num_experts", 0)
        shape = shapes["mlp.w1"]
        return len(shape) == 2 and count > 0 and shape[0] % count == 0 and _arguments(module) == 3

    def _sizes(self) -> tuple[int, int, int]:
        rows, hidden = self.module.mlp.w1.shape  # type: ignore[union-attr, misc]
        count = self.module.num_experts
        return count, hidden, rows // count  # type: ignore[return-value, operator]

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        gate, up, down = (parameters[f"mlp.{name}"].unflatten(0, (self.num_experts, -1)) for name in ("w1", "v1", "w2"))
        return DenseExperts(torch.cat([gate, up], dim=1), down.transpose(1, 2))

    def _run(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return module(x.unsqueeze(0), index, weights).squeeze(0)

    @cached_property
    def activation(self) -> str:
        return pointwise_name(self.module.mlp.activation_fn, gated=True)  # type: ignore[union-attr, arg-type]


class InputWeightedExperts(_Unflagged):
    """Llama 4: ``gate_up_proj`` (E, H, 2I) and ``down_proj`` (E, I, H). The block hands over, for every expert, every
    token times its weight, which is 0 where the expert was not chosen; (E T, H)."""

    layer_class = InputWeightedExpertsLayer

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        shapes = _matrices(module)
        if set(shapes) != {"gate_up_proj", "down_proj"} or any(len(s) != 3 for s in shapes.values()):
            return False
        (count, hidden, columns), down = shapes["gate_up_proj"], shapes["down_proj"]
        fits = (count, columns, hidden) == (down[0], 2 * down[1], down[2])
        return fits and not hasattr(module, "is_transposed") and _arguments(module) == 1

    def _sizes(self) -> tuple[int, int, int]:
        count, inner, hidden = self.module.down_proj.shape  # type: ignore[union-attr, misc]
        return count, hidden, inner  # type: ignore[return-value]

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        return DenseExperts(parameters["gate_up_proj"].transpose(1, 2), parameters["down_proj"].transpose(1, 2))

    def _is_proved(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        small = smaller_copy(self.module, self._small_sizes, generator)
        read = self.read({name: p.detach() for name, p in small.named_parameters()})
        x = noise(generator, self.num_experts, 3, read.hidden_size)
        expected = torch.stack([_output(read, e, x[e], self.activation) for e in range(self.num_experts)])
        with torch.no_grad():
            return torch.allclose(small(x.flatten(0, 1)), expected.flatten(0, 1), rtol=CLOSE, atol=CLOSE)

    def install(self, model: nn.Module, *what: Any) -> FactoredExpertsLayer:
        layer = super().install(model, *what)
        assert isinstance(layer, InputWeightedExpertsLayer)
        layer.num_slots = self.num_experts
        layer.top_k = int(self.router(model).top_k)  # type: ignore[arg-type]
        return layer

    def watch(self, model: nn.Module, called: Watcher) -> list[RemovableHandle]:
        """As an expert sees it: x is a token times its weight, and its own weight is 1."""
        logits: list[Tensor] = []
        top_k = int(self.router(model).top_k)  # type: ignore[arg-type]

        def on_experts(module, positional: tuple[Tensor, ...]) -> None:
            rows, slots = chosen_rows(positional[0], self.num_experts, top_k)
            called(rows, slots, torch.ones_like(slots, dtype=torch.float32), logits.pop().repeat_interleave(top_k, 0))

        return [
            self.router(model).register_forward_hook(lambda module, _, output: logits.append(output[-1])),
            self.module.register_forward_pre_hook(on_experts),
        ]


UNFLAGGED: tuple[type[ExpertsModule], ...] = (UnflaggedExperts, RowStackedExperts, InputWeightedExperts)
