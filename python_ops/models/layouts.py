"""Where a model keeps its experts, and in which layout: found by contract, never by a list of class names.

Covered are experts stacked in 3-D parameters (transformers 5), a ModuleDict of two-matrix experts behind a one-hot
contract (Switch Transformers), a ModuleList of MLPs in a block that routes by itself (older remote code), and those
stacked without flags (unflagged_layouts.py). In models without experts, the gated feed-forward modules are found where
they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.models.activation_names import gate_name, pointwise_name
from resmoe_kernels.python_ops.models.experts_module import ExpertsModule, Watcher, linears
from resmoe_kernels.python_ops.models.layer import (
    DenseFFNLayer,
    FactoredExpertsLayer,
    OneHotExpertsLayer,
    SelfRoutedExpertsLayer,
)
from resmoe_kernels.python_ops.models.probing import refusal_of_mlp
from resmoe_kernels.python_ops.models.unflagged_layouts import UNFLAGGED

_log = logging.getLogger("resmoe_kernels")


class StackedExperts(ExpertsModule):
    """transformers 5: ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` are 3-D parameters, and flags say how."""

    _FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        if not all(hasattr(module, flag) for flag in cls._FLAGS):
            return False
        first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
        down = getattr(module, "down_proj", None)
        return all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in (first, down))

    def refusal(self) -> str | None:
        if getattr(self.module, "has_post_expert_norm", False):
            return "it normalises each expert's output before the sum, so a shared base cannot be applied once"
        known = {f"{m}{b}" for m in (self._first, "down_proj") for b in ("", "_bias")}
        unknown = sorted(set(self.parameter_names) - known)
        return f"it holds parameters this package does not know: {', '.join(unknown)}" if unknown else None

    @property
    def num_experts(self) -> int:
        return len(self.module.down_proj)  # type: ignore[arg-type]

    @property
    def _first(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        first, down = parameters[self._first], parameters["down_proj"]
        bias_first, bias_down = parameters.get(f"{self._first}_bias"), parameters.get("down_proj_bias")
        if self.module.is_transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        if self._interleaved:
            first = torch.cat([first[:, ::2], first[:, 1::2]], dim=1)
            if bias_first is not None:
                bias_first = torch.cat([bias_first[:, ::2], bias_first[:, 1::2]], dim=1)
        return DenseExperts(first, down, bias_first, bias_down, gated=bool(self.module.has_gate))

    @property
    def _interleaved(self) -> bool:
        return bool(self.module.has_gate) and not self.module.is_concatenated

    @cached_property
    def activation(self) -> str:
        # A copy without the parameters: the swapped model must not keep the dense weights alive.
        shell: Any = self.module.__class__.__new__(self.module.__class__)
        shell.__dict__.update(self.module.__dict__, _parameters={})
        if not self.module.has_gate:
            return pointwise_name(shell.act_fn)
        if not self._interleaved:
            return gate_name(shell._apply_gate, shell)
        return gate_name(lambda z: shell._apply_gate(torch.stack(z.chunk(2, -1), -1).flatten(-2)), shell)


class OneHotExperts(ExpertsModule):
    """Switch Transformers: ``ModuleDict`` of ``expert_<i>``, each with linears ``wi`` and ``wo`` and no gate."""

    layer_class = OneHotExpertsLayer

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        if not isinstance(module, nn.ModuleDict) or not len(module):
            return False
        names = [f"expert_{i}" for i in range(len(module))]
        return list(module) == names and all(linears(module[n]) == {"wi", "wo"} for n in names)

    def refusal(self) -> str | None:
        first = self.module["expert_0"]  # type: ignore[index]
        inner, hidden = first.wi.weight.shape
        alone = type(self)("", nn.ModuleDict({"expert_0": first}))
        return refusal_of_mlp(first, hidden, inner, lambda p: alone.read(_below("expert_0", p)), self.activation)

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        first, down, bias_first, bias_down = (
            self._stack(parameters, f"expert_{{}}.{name}") for name in ("wi.weight", "wo.weight", "wi.bias", "wo.bias")
        )
        assert first is not None and down is not None
        return DenseExperts(first, down, bias_first, bias_down, gated=False)

    def install(self, model: nn.Module, *what: Any) -> FactoredExpertsLayer:
        layer = super().install(model, *what)
        # from_pretrained initialises what has no weights yet block by block, and this block would reach for experts
        # by their old names. Nothing of its own is left to initialise: router and experts are modules below it.
        model.get_submodule(self.path.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        return layer

    @cached_property
    def activation(self) -> str:
        return pointwise_name(self.module["expert_0"].act)  # type: ignore[index]


class SelfRoutedExperts(ExpertsModule):
    """deepseek-moe-16b's own code and its heirs: ``experts`` is a ModuleList of gated MLPs, and the block around it
    hands tokens and routing to its method ``moe_infer(x, expert ids, expert weights)``, which is replaced."""

    layer_class = SelfRoutedExpertsLayer

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        mlp = {"gate_proj", "up_proj", "down_proj"}
        return (
            isinstance(module, nn.ModuleList)
            and len(module) > 0
            and all(linears(expert) == mlp and hasattr(expert, "act_fn") for expert in module)
            and callable(getattr(parent, "moe_infer", None))
        )

    def refusal(self) -> str | None:
        first = self.module[0]  # type: ignore[index]
        inner, hidden = first.gate_proj.weight.shape
        alone = type(self)("", nn.ModuleList([first]))
        return refusal_of_mlp(first, hidden, inner, lambda p: alone.read(_below("0", p)), self.activation)

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        gate, up, down, bias_gate, bias_up, bias_down = (
            self._stack(parameters, f"{{}}.{m}_proj.{kind}")
            for kind in ("weight", "bias")
            for m in ("gate", "up", "down")
        )
        assert gate is not None and up is not None and down is not None
        bias = None if bias_gate is None or bias_up is None else torch.cat([bias_gate, bias_up], dim=1)
        return DenseExperts(torch.cat([gate, up], dim=1), down, bias, bias_down)

    def install(self, model: nn.Module, *what: Any) -> FactoredExpertsLayer:
        layer = super().install(model, *what)
        model.get_submodule(self.path.rpartition(".")[0]).moe_infer = layer.moe_infer  # type: ignore[assignment]
        return layer

    @cached_property
    def activation(self) -> str:
        return pointwise_name(self.module[0].act_fn, gated=True)  # type: ignore[index]


class DenseFFN(ExpertsModule):
    """The feed-forward module of Llama and its heirs, down(act(gate x) * up x), read as a single expert that every
    token uses with weight 1. It has no router."""

    layer_class = DenseFFNLayer

    @classmethod
    def covers(cls, module: nn.Module, parent: nn.Module | None) -> bool:
        mlp = {"gate_proj", "up_proj", "down_proj"}
        return linears(module) == mlp and hasattr(module, "act_fn") and not _own_parameters(module)

    def refusal(self) -> str | None:
        inner, hidden = self.module.gate_proj.weight.shape  # type: ignore[union-attr, misc]
        return refusal_of_mlp(self.module, hidden, inner, self.read, self.activation)  # type: ignore[arg-type]

    @property
    def num_experts(self) -> int:
        return 1

    def read(self, parameters: Mapping[str, Tensor]) -> DenseExperts:
        gate_up, bias_gate_up = (
            torch.cat([parameters[f"{m}_proj.{kind}"] for m in ("gate", "up")]).unsqueeze(0)
            if f"gate_proj.{kind}" in parameters
            else None
            for kind in ("weight", "bias")
        )
        assert gate_up is not None
        bias_down = parameters.get("down_proj.bias")
        return DenseExperts(
            gate_up,
            parameters["down_proj.weight"].unsqueeze(0),
            bias_gate_up,
            None if bias_down is None else bias_down.unsqueeze(0),
        )

    def router(self, model: nn.Module) -> nn.Module:
        raise ValueError(f"{self.path}: a dense feed-forward module has no router; its parts are what can be chosen")

    def watch(self, model: nn.Module, called: Watcher) -> list[RemovableHandle]:
        def on_module(module, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = (*positional, *named.values())[0].flatten(0, -2)
            one = torch.ones(len(x), 1, device=x.device)
            called(x, torch.zeros_like(one, dtype=torch.int64), one, torch.zeros_like(one))

        return [self.module.register_forward_pre_hook(on_module, with_kwargs=True)]

    @cached_property
    def activation(self) -> str:
        return pointwise_name(self.module.act_fn, gated=True)  # type: ignore[arg-type]


LAYOUTS: tuple[type[ExpertsModule], ...] = (StackedExperts, OneHotExperts, SelfRoutedExperts, *UNFLAGGED)


def find_experts(model: nn.Module, *, or_ffns: bool = False) -> list[ExpertsModule]:
    """Every experts module of a model, in order; of a model without, and ``or_ffns``, its feed-forward modules.

    Raises ValueError naming module and reason if one of them is of a kind that is not covered, or if there is none.
    """
    found = _find(model)
    if not found and or_ffns:
        named = _named_as_ffns(model)
        refused = {
            f"{f.path} ({type(f.module).__name__})": reason for f in named if (reason := f.refusal()) is not None
        }
        found = list(_find_ffns(model))
        if not found and refused:
            path, reason = next(iter(refused.items()))
            raise ValueError(f"{path} cannot be compressed, nor can the {len(refused) - 1} others: {reason}")
        if not found:
            raise ValueError(
                f"{type(model).__name__} holds neither experts modules nor feed-forward modules of linears gate_proj, "
                "up_proj and down_proj: nothing to compress"
            )
        for path, reason in refused.items():
            _warn_once(f"{path} stays dense: {reason}")
    if not found:
        raise ValueError(f"{type(model).__name__} holds no experts modules: nothing to compress")
    return found


def experts_or_ffns(model: nn.Module) -> list[ExpertsModule]:
    """Every experts module of a model that is still dense or, of a model without, its feed-forward modules; maybe none.

    Raises ValueError as ``find_experts`` does for a kind that is not covered.
    """
    return _find(model) or list(_find_ffns(model))


def _find(model: nn.Module) -> list[ExpertsModule]:
    found: list[ExpertsModule] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if any(path.startswith(f"{f.path}.") for f in found) or isinstance(module, FactoredExpertsLayer):
            continue
        parent = modules[path.rpartition(".")[0]] if path else None
        layout = next((layout for layout in LAYOUTS if layout.covers(module, parent)), None)
        if layout is not None:
            experts = layout(path, module)
            reason = experts.refusal()
            if reason is not None:
                raise ValueError(f"{path} ({type(module).__name__}) cannot be compressed: {reason}")
            found.append(experts)
        elif _looks_like_experts(path, module):
            raise ValueError(
                f"{path} ({type(module).__name__}) cannot be compressed: its layout is not one of those covered "
                "(stacked 3-D parameters with layout flags, a one-hot ModuleDict, a ModuleList served by moe_infer)"
            )
    return found


def _find_ffns(model: nn.Module) -> Sequence[ExpertsModule]:
    """The feed-forward modules of a model that has no experts, not those beside experts that were compressed."""
    return [found for found in _named_as_ffns(model) if found.refusal() is None]


def _named_as_ffns(model: nn.Module) -> list[DenseFFN]:
    layers = [m for m in model.modules() if isinstance(m, FactoredExpertsLayer)]
    if not all(isinstance(m, DenseFFNLayer) for m in layers):
        return []
    return [DenseFFN(path, m) for path, m in model.named_modules() if DenseFFN.covers(m, None)]


@lru_cache
def _warn_once(sentence: str) -> None:
    _log.warning("%s", sentence)


def select_layers(found: list[ExpertsModule], layers: str) -> list[ExpertsModule]:
    """``all``; ``first:N`` or ``last:N`` of the experts modules; or their numbers, ``0,3,5-7``.

    Raises ValueError for anything else.
    """
    rule = "layers: must be 'all', 'first:N', 'last:N' or numbers like '0,3,5-7'"
    try:
        if layers == "all":
            return found
        end, _, count = layers.partition(":")
        if end in ("first", "last"):
            number = int(count)
            if not 1 <= number <= len(found):
                raise ValueError
            return found[:number] if end == "first" else found[-number:]
        chosen: set[int] = set()
        for part in layers.split(","):
            start, dash, stop = part.partition("-")
            numbers = range(int(start), int(stop if dash else start) + 1)
            if not numbers or numbers[-1] >= len(found):
                raise ValueError
            chosen.update(numbers)
        return [found[i] for i in sorted(chosen)]
    except ValueError:
        raise ValueError(f"{rule}, for {len(found)} experts modules; got {layers!r}") from None


def _below(name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{parameter}": tensor for parameter, tensor in parameters.items()}


def _looks_like_experts(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    named = name == "experts" or "Experts" in type(module).__name__
    return named and not name.startswith("shared") and next(module.parameters(), None) is not None


def _own_parameters(module: nn.Module) -> list[str]:
    """Parameters that are not those of its linears."""
    return [n for n, _ in module.named_parameters() if n.partition(".")[0] not in linears(module)]


def expert_nbytes(model: nn.Module) -> int:
    """Bytes of all expert weights of a model, factored (indices, base and part routers included) and dense ones
    together; of a model without experts those of its feed-forward modules."""
    factored = [m for m in model.modules() if isinstance(m, FactoredExpertsLayer)]
    tensors = [m.part_router for m in factored if m.part_router is not None]
    tensors += [p for experts in experts_or_ffns(model) for p in experts.module.parameters()]
    return sum(m.form.nbytes() for m in factored) + sum(t.numel() * t.element_size() for t in tensors)
