"""The model's own routers: found beside the experts, understood by probing, changed by a forward hook.

transformers 5 routers return (logits, weights, experts). How one scores is not read from its class: every candidate
is run on random logits, and the one that gives the router's own answers is it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring, select

_PROBE_TOKENS = 64


def find_router(model: nn.Module, experts_path: str, num_slots: int) -> nn.Module:
    """The sibling of an experts module that routes to it: it holds one row of weights for every slot, and a top_k where
    several do.

    Raises ValueError if there is none.
    """
    parent = model.get_submodule(experts_path.rpartition(".")[0])
    found = [child for child in parent.children() if _rows(child, num_slots) is not None]
    found = [child for child in found if hasattr(child, "top_k")] or found
    if len(found) != 1:
        raise ValueError(
            f"{experts_path}: no router with {num_slots} rows of weights beside it, so its choice can be neither "
            "changed nor watched; use a method that leaves the router as it is and needs no data"
        )
    return found[0]


def _rows(router: nn.Module, num_slots: int) -> Tensor | None:
    """The (num_slots, H) weights of a router; None if it has none, or several."""
    rows = [p for p in router.parameters() if p.dim() == 2 and len(p) == num_slots]
    return rows[0] if len(rows) == 1 else None


def logits_in(output: Tensor | tuple[Tensor, ...], router: nn.Module, num_slots: int) -> Tensor:
    """The logits (T, num_slots) in what a router answered, up to a constant for each token.

    Raises ValueError if there are none.
    """
    logits = output if isinstance(output, Tensor) else output[0]
    if logits.shape[-1] != num_slots or not logits.is_floating_point():
        raise ValueError(
            f"{type(router).__name__}: a router must answer with logits of {num_slots} experts first, got "
            f"{tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}; use a method that needs no data"
        )
    logits = logits.flatten(0, -2)
    sums = logits.float().sum(-1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return logits.float().clamp_min(torch.finfo(torch.float32).tiny).log()  # it answers with its softmax
    return logits


def read_scoring(router: nn.Module, experts_path: str, num_slots: int) -> Scoring:
    """How a router scores; its weights are not looked at and may be on meta.

    Raises ValueError naming the experts it belongs to if it is of no known kind.
    """
    # In float32, also while a model of another dtype is being built and torch's default is that.
    probe = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in itertools.chain(probe.parameters(), probe.buffers()):
        if tensor.is_floating_point():
            # Logits of deviation 1: a softmax of wide ones is 0 and 1, whatever is done with it.
            random = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.data = random / max(tensor.shape, default=1) ** 0.5
    rows = _rows(probe, num_slots)
    assert rows is not None  # as find_router has seen
    x = torch.randn(_PROBE_TOKENS, rows.shape[1], generator=generator, dtype=torch.float32)
    given = torch.randn(num_slots, generator=generator, dtype=torch.float32) / num_slots**0.5
    answer, bias = _answer(probe, x, given)
    if isinstance(answer, tuple) and len(answer) == 3:
        logits, weights, experts = answer
        logits = logits_in(logits, router, num_slots)
        wanted = _by_slot(weights.float(), experts, num_slots)
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


@torch.no_grad()
def _answer(probe: nn.Module, x: Tensor, given: Tensor) -> tuple[object, Tensor | None]:
    """What a router answers to x (T, H), and the bias of its choice: its own, or ``given`` (E,) if it is handed one by
    the block around. None if it takes neither form of call."""
    own = correction_bias(probe)
    for hidden in (x, x.unsqueeze(0)):
        for arguments, bias in (((hidden,), own), ((hidden, given), given)):
            with suppress(Exception):  # of any type: a router that wants something else
                return probe(*arguments), bias
    return None, None


def correction_bias(router: nn.Module, block: nn.Module | None = None) -> Tensor | None:
    """What DeepSeek-V3's router and its heirs add to scores when they choose: their own, or what ``block``, the module
    around, holds and hands to a router that takes more than hidden states."""
    own = getattr(router, "e_score_correction_bias", None)
    if own is not None or block is None or len(inspect.signature(router.forward).parameters) < 2:
        return own
    rows = {len(p) for p in router.parameters() if p.dim() == 2}
    held = itertools.chain(block.named_parameters(recurse=False), block.named_buffers(recurse=False))
    found = [t for _, t in held if t.dim() == 1 and t.is_floating_point() and len(t) in rows]
    return found[0] if len(found) == 1 else None


def _bias_of_call(router: nn.Module, arguments: tuple, named: dict, num_slots: int) -> Tensor | None:
    """The bias of the choice in one call of a router, which may have been handed one."""
    handed = [
        a
        for a in (*arguments[1:], *named.values())
        if isinstance(a, Tensor) and a.shape == (num_slots,) and a.is_floating_point()
    ]
    return handed[0] if handed else correction_bias(router)


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
    return weights.new_zeros(len(slots), num_slots).scatter(1, slots, weights)


def change_choice(router: nn.Module, change: RouterChange) -> RemovableHandle:
    """Makes the router choose by ``change`` until the handle is removed; its parameters and their names stay."""
    return router.register_forward_hook(_Rechoose(change), with_kwargs=True)


def as_asked(change: RouterChange, scoring: Scoring, experts_path: str) -> RouterChange:
    """A change that was stored, for the router as it is now: how it scores is a setting of the model, which a load may
    have changed (``num_experts_per_tok=4``), and the model's own word counts.

    Raises ValueError naming the experts where a threshold has taken the place of what was asked for.
    """
    check_top_k(change, scoring.top_k, experts_path)
    return dataclasses.replace(change, scoring=scoring)


def check_top_k(change: RouterChange, top_k: int, where: str) -> None:
    """Raises ValueError if another number of experts is asked of a router that a threshold took over."""
    if change.threshold_over_all is not None and change.scoring is not None and top_k != change.scoring.top_k:
        raise ValueError(
            f"{where}: a threshold says how many experts a token uses here, so {top_k} of them cannot be asked for; "
            f"leave the model's number at {change.scoring.top_k}, or compress with another threshold"
        )


class _Rechoose:
    """The forward hook of a changed router."""

    def __init__(self, change: RouterChange) -> None:
        self.change = change
        self.pruned = torch.tensor(change.pruned_slots, device="cpu") if change.prunes else None
        self.left = None if self.pruned is None else change.pruned_slots.count(False)

    def __call__(
        self, router: nn.Module, arguments: tuple, named: dict, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        answered, weights, own = output
        logits = answered.flatten(0, -2)
        change, scoring = self.change, self.change.scoring
        assert scoring is not None
        if own.shape[-1] != scoring.top_k:  # the router's own number was changed since
            check_top_k(change, own.shape[-1], type(router).__name__)
            scoring = dataclasses.replace(scoring, top_k=own.shape[-1])
        if self.pruned is not None and self.pruned.device != logits.device:
            self.pruned = self.pruned.to(logits.device)  # once: a graph is captured after a first call
        chosen, slots = select(
            logits,
            scoring,
            pruned=self.pruned,
            left=self.left,
            masked=change.masked,
            threshold=change.threshold_over_all,
            bias=_bias_of_call(router, arguments, named, logits.shape[-1]),
        )
        return answered, chosen.to(weights.dtype), slots
