"""The model's own routers: found beside the experts, understood by probing, changed by a forward hook.

transformers 5 routers return (logits, weights, experts). How one scores is not read from its class: every candidate
is run on random logits, and the one that gives the router's own answers is it.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring, select

_PROBE_TOKENS = 64


def find_router(model: nn.Module, experts_path: str, num_slots: int) -> nn.Module:
    """The sibling of an experts module that routes to it: it has a top_k and one row of weights for every slot.

    Raises ValueError if there is none.
    """
    parent = model.get_submodule(experts_path.rpartition(".")[0])
    for child in parent.children():
        weight = getattr(child, "weight", None)
        if hasattr(child, "top_k") and isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == num_slots:
            return child
    raise ValueError(
        f"{experts_path}: no router with a top_k and {num_slots} rows of weights beside it, so its choice cannot "
        "be changed; use a method that leaves the router as it is"
    )


def read_scoring(router: nn.Module, experts_path: str) -> Scoring:
    """How a router scores; its weights are not looked at and may be on meta.

    Raises ValueError naming the experts it belongs to if it is of no known kind.
    """
    num_slots = len(router.weight)  # type: ignore[arg-type]
    probe = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in itertools.chain(probe.parameters(), probe.buffers()):
        if tensor.is_floating_point():
            # Logits of deviation 1: a softmax of wide ones is 0 and 1, whatever is done with it.
            tensor.data = torch.randn(tensor.shape, generator=generator) / max(tensor.shape, default=1) ** 0.5
    with torch.no_grad():
        x = torch.randn(_PROBE_TOKENS, probe.weight.shape[1], generator=generator)  # type: ignore[index, arg-type]
        try:
            answer = probe(x)
        except Exception:  # of any type: a router that wants more than hidden states
            answer = None
    if isinstance(answer, tuple) and len(answer) == 3:
        logits, weights, experts = answer
        wanted = _by_slot(weights.float(), experts, num_slots)
        bias = correction_bias(probe)
        for scoring in _candidates(router, experts.shape[-1]):
            if scoring.groups > 1 and (num_slots % scoring.groups or num_slots // scoring.groups < 2):
                continue
            made_weights, made_slots = select(logits, scoring, bias=bias)
            made = _by_slot(made_weights, made_slots, num_slots)
            scale = float(wanted.sum() / made.sum())
            if torch.allclose(made * scale, wanted, rtol=1e-4, atol=1e-6):
                return Scoring(**{**vars(scoring), "scale": round(scale, 5)})
    raise ValueError(
        f"{experts_path}: its router, a {type(router).__name__}, scores in a way that is not known (softmax or "
        "sigmoid, then top-k), so its choice cannot be changed; use a method that leaves the router as it is"
    )


def correction_bias(router: nn.Module) -> Tensor | None:
    """What DeepSeek-V3's router and its heirs add to scores when they choose."""
    return getattr(router, "e_score_correction_bias", None)


def _candidates(router: nn.Module, top_k: int):
    groups = next((int(g) for n in ("num_group", "n_group") if (g := getattr(router, n, None))), 1)
    kept = int(getattr(router, "topk_group", None) or 1)
    grouping = [(1, 1, "max")]
    if groups > 1 and kept < groups:
        grouping += [(groups, kept, "max"), (groups, kept, "top2")]
    for score, normalised, group in itertools.product(("softmax", "sigmoid"), (True, False), grouping):
        yield Scoring(top_k, score, normalised, 1.0, *group)


def _by_slot(weights: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """(T, K) weights and slots -> (T, num_slots): routers differ in the order of what they choose."""
    return torch.zeros(len(slots), num_slots).scatter(1, slots, weights)


def change_choice(router: nn.Module, change: RouterChange) -> RemovableHandle:
    """Makes the router choose by ``change`` until the handle is removed; its parameters and their names stay."""
    return router.register_forward_hook(_Rechoose(change))


class _Rechoose:
    """The forward hook of a changed router."""

    def __init__(self, change: RouterChange) -> None:
        self.change = change
        self.pruned = torch.tensor(change.pruned_slots, device="cpu") if change.prunes else None
        self.left = None if self.pruned is None else change.pruned_slots.count(False)

    def __call__(self, router: nn.Module, _, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, _ = output
        change = self.change
        assert change.scoring is not None
        if self.pruned is not None and self.pruned.device != logits.device:
            self.pruned = self.pruned.to(logits.device)  # once: a graph is captured after a first call
        chosen, slots = select(
            logits,
            change.scoring,
            pruned=self.pruned,
            left=self.left,
            masked=change.masked,
            threshold=change.threshold_over_all,
            bias=correction_bias(router),
        )
        return logits, chosen.to(weights.dtype), slots
