"""Counting the work of a compressed model: the pairs of token and expert that its layers really compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.routing import fold, keep_mass, map_slots

_COUNTED = ("tokens", "slots", "skipped", "folded", "pairs")


class Usage:
    """What one layer was asked for and what it computed.

    tokens: that reached it;  slots: tokens times the most experts its router gives to any token
    skipped: slots without an expert: below a threshold, pruned, over a capacity
    folded: slots whose expert another slot of the token had, computed once with it
    pairs: of token and expert, or part of one, that the op computed;  parts: of each expert

    slots = skipped + folded + pairs / parts where all parts are used.
    """

    def __init__(self, parts: int, device: torch.device | str) -> None:
        self.parts = parts
        self._counts = torch.zeros(len(_COUNTED), dtype=torch.int64, device=device)  # there, so that nothing waits

    def add(self, *counts: Tensor) -> None:
        """Each () int64, in the order above."""
        self._counts += torch.stack(counts)

    def __getattr__(self, name: str) -> int:
        if name not in _COUNTED:
            raise AttributeError(f"Usage has no attribute {name!r}")
        return int(self._counts[_COUNTED.index(name)])

    @property
    def experts_per_token(self) -> float:
        """Mean experts that a token was computed with, a part counting 1 / parts; nan where no token came."""
        return self.pairs / (self.tokens * self.parts) if self.tokens else float("nan")


@contextmanager
def count_usage(model: nn.Module) -> Iterator[dict[str, Usage]]:
    """Counts while the context lasts: a Usage for every factored layer of the model, by its path."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, FactoredExpertsLayer)}
    usage = {path: Usage(layer.router_change.parts, _device(layer)) for path, layer in layers.items()}
    before = {layer: (layer.__dict__.get("route"), layer.reroutes) for layer in layers.values()}
    for path, layer in layers.items():
        layer.__dict__["route"], layer.reroutes = _counting(layer, usage[path]), True
    try:
        yield usage
    finally:
        for layer, (route, reroutes) in before.items():
            layer.reroutes = reroutes
            if route is None:
                del layer.__dict__["route"]
            else:
                layer.__dict__["route"] = route


def _device(layer: FactoredExpertsLayer) -> torch.device | str:
    return next(layer.parameters()).device if layer.packed is None else "cpu"


def _counting(layer: FactoredExpertsLayer, usage: Usage) -> Callable[..., tuple[Tensor, Tensor]]:
    route, change = layer.route, layer.router_change
    whole = layer.num_experts // change.parts

    def counting_route(hidden_states: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        experts, expert_weights = route(hidden_states, slots, weights)
        chosen = slots
        if change.threshold_over_chosen is not None:
            chosen, weights = keep_mass(slots, weights, change.threshold_over_chosen)
        if change.expert_of_slot is not None:
            chosen = map_slots(chosen, torch.tensor(change.expert_of_slot, device=slots.device))
        skipped = ((chosen < 0) | (chosen >= whole)).sum()
        folded = torch.zeros_like(skipped)
        if change.fold:
            folded = ((fold(chosen, weights)[0] < 0) & (chosen >= 0)).sum()
        pairs = ((experts >= 0) & (experts < layer.num_experts)).sum()
        tokens, offered = (torch.full_like(skipped, n) for n in (len(slots), slots.numel()))
        usage.add(tokens, offered, skipped, folded, pairs)
        return experts, expert_weights

    return counting_route
