"""One experts module of a model, behind one interface whatever its layout: read, watched, replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resmoe_kernels.factored import DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.routers import as_asked, change_choice, find_router, logits_in, read_scoring
from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring

Watcher = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of a model. Subclasses know a layout.

    path: where it is, e.g. ``model.layers.3.mlp.experts``;  module: the module itself, on any device, meta included
    """

    path: str
    module: nn.Module
    layer_class: ClassVar[type[FactoredExpertsLayer]] = FactoredExpertsLayer  # what takes the module's place

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        """Whether the module (below ``parent``) follows this layout's contract."""
        raise NotImplementedError

    def refusal(self) -> str | None:
        """Why this module cannot be compressed although its layout is covered; None if it can."""
        return None

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        """The module's parameters, by name below ``path``, as (E, 2I, H) and (E, H, I) with gate rows first."""
        raise NotImplementedError

    def install(
        self,
        model: nn.Module,
        weights: FactoredExperts,
        change: RouterChange | None = None,
        part_router: Tensor | None = None,
    ) -> FactoredExpertsLayer:
        """Puts the factored layer in the module's place, changes its router and returns the layer.

        Raises ValueError if the change does not fit the layer or the model's router.
        """
        layer = self.layer_class(weights, self.activation)
        if change is not None:
            slots = self.num_experts - (0 if change.expert_of_slot is not None else self.identities)
            change.check_fits(weights.num_experts, slots, part_router)
            if change.changes_choice:
                change = as_asked(change, self.scoring(model), self.path)
                change_choice(self.router(model), change)
            layer.change_routing(change, part_router)
        model.set_submodule(self.path, layer)
        untie(model, self.path)
        return layer

    @property
    def identities(self) -> int:
        """Slots of the router that stand for no expert: a token that chooses one is passed on as it is."""
        return 0

    def router(self, model: nn.Module) -> nn.Module:
        """The module that routes to these experts. Raises ValueError if there is none whose choice can be changed."""
        return find_router(model, self.path, self.num_experts)

    def scoring(self, model: nn.Module) -> Scoring:
        """How that router scores. Raises ValueError if that is not known."""
        with torch.device("cpu"):  # also where the model is being built on meta
            return read_scoring(self.router(model), self.path, self.num_experts)

    def watch(self, model: nn.Module, called: Watcher) -> list[RemovableHandle]:
        """Calls ``called(x, index, weight, logits)`` whenever the dense module runs, until the handles are removed.

        x (T, H);  index, weight (T, top_k), the routing of these tokens;  logits (T, E) of the router
        """
        logits: list[Tensor] = []

        def on_experts(module, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x, index, weight = (*positional, *named.values())
            called(x, index, weight, logits.pop())

        def on_router(module, _, output) -> None:
            logits.append(logits_in(output, module, self.num_experts))

        return [
            self.router(model).register_forward_hook(on_router),
            self.module.register_forward_pre_hook(on_experts, with_kwargs=True),
        ]

    @property
    def num_experts(self) -> int:
        """As the router counts them."""
        return len(self.module)  # type: ignore[arg-type]

    @cached_property
    def activation(self) -> str:
        """The name under which the op knows this module's activation."""
        raise NotImplementedError

    @property
    def parameter_names(self) -> list[str]:
        return [name for name, _ in self.module.named_parameters()]

    def _stack(self, parameters: Mapping[str, Tensor], name: str) -> Tensor | None:
        """Of modules that hold one matrix per expert: those named by the pattern; None where there are none."""
        names = [name.format(i) for i in range(len(self.module))]  # type: ignore[arg-type]
        return torch.stack([parameters[n] for n in names]) if names[0] in parameters else None


def untie(model: nn.Module, path: str) -> None:
    """Takes the parameters below a module that was replaced out of what transformers ties.

    Experts of two modules (encoder and decoder of DiffusionGemma) are then two layers, each with its own factors.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target in [pair[0] for pair in tied.items() if any(name.startswith(f"{path}.") for name in pair)]:
        del tied[target]


def linears(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
