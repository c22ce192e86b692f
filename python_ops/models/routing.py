"""Router changes: which experts a token uses where experts were pruned, merged or split, or a threshold chooses.

A change is a value, stored in a checkpoint's config beside the layer it belongs to. Its first half (scoring, masked,
threshold) acts on the logits of the model's router, see routers.py; the second (slots, folding, parts) on what
arrives at the layer of experts, see FactoredExpertsLayer. A *slot* is an expert as the router numbers it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from resmoe_kernels.python_ops.models.specs import from_plain

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")
MASKED = ("before", "after")
COMBINE = ("raw", "renormalised", "ones")
OVER = ("all", "chosen")


@dataclass(frozen=True)
class Scoring:
    """How a router makes scores, a choice and weights out of logits (T, E).

        s = softmax(logits) or sigmoid(logits), float32;  choice = s + correction bias, if it has one
        experts = the top_k of choice, inside the groups_kept groups of the best group score where groups > 1
        w = s of the chosen, divided by their sum if ``normalised``, times ``scale``

    A group is E / groups neighbouring experts; its score is the ``max`` of its choice or the sum of its ``top2``.
    """

    top_k: int
    score: str = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def is_one_softmax(self) -> bool:
        """Whether the scores are probabilities over all experts."""
        return self.score == "softmax" and self.groups == 1


@dataclass(frozen=True)
class Threshold:
    """A token uses the smallest set of its likeliest experts whose shares reach ``mass``, at least one.

    mass: in (0, 1]; at 1 all are used, whatever rounding does to their sum
    combine: weights of those used: ``raw`` (the paper) as they are, ``renormalised`` to the sum that all had, or
        ``ones`` times the router's own scale
    max_experts: never more than these, None for all
    over: ``all`` experts, by their softmax, in place of the router's top_k (the paper); or those that the router has
        ``chosen``, by w_i / sum w of the weights it gave. That asks nothing of how a router scores: sigmoid, a bias
        on the choice, groups. There mass 1 is the model itself, bit by bit
    """

    mass: float
    combine: str = "raw"
    max_experts: int | None = None
    over: str = "all"

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"threshold: must be in (0, 1], got {self.mass}")
        if self.combine not in COMBINE:
            raise ValueError(f"combine: must be one of {', '.join(COMBINE)}, got {self.combine!r}")
        if self.max_experts is not None and self.max_experts < 1:
            raise ValueError(f"max_experts: must be at least 1, got {self.max_experts}")
        if self.over not in OVER:
            raise ValueError(f"over: must be one of {', '.join(OVER)}, got {self.over!r}")
        if self.over == "chosen" and self.combine == "ones":
            raise ValueError(
                "combine: 'ones' needs a router whose scores are one softmax over all experts; "
                "use raw or renormalised with this one"
            )


@dataclass(frozen=True)
class RouterChange:
    """What differs from the router the model was trained with; ``RouterChange()`` changes nothing.

    expert_of_slot: for every slot of the router its expert in the layer, -1 where it was pruned; None: the same
    fold: slots of one expert that a token chose together are computed once, with summed weights
    scoring: the router's own, needed where its choice changes: slots pruned, or a threshold
    masked: pruned slots leave ``before`` the softmax (the others share their mass) or ``after`` it (it is lost)
    threshold: over the router's experts, in place of its top_k, or over what it chose
    parts: every expert was split into so many; expert e became e * parts ... e * parts + parts - 1
    part_mass: of a token's weight spread over the parts by the part router, how much is used; 1: all parts
    """

    expert_of_slot: tuple[int, ...] | None = None
    fold: bool = False
    scoring: Scoring | None = None
    masked: str = "before"
    threshold: Threshold | None = None
    parts: int = 1
    part_mass: float = 1.0

    def __post_init__(self) -> None:
        if self.masked not in MASKED:
            raise ValueError(f"masked: must be one of {', '.join(MASKED)}, got {self.masked!r}")
        if self.parts < 1:
            raise ValueError(f"parts: must be at least 1, got {self.parts}")
        if not 0 < self.part_mass <= 1:
            raise ValueError(f"part_mass: must be in (0, 1], got {self.part_mass}")
        if self.expert_of_slot is not None and max(self.expert_of_slot, default=-1) < 0:
            raise ValueError(f"expert_of_slot: must leave at least one expert, got {self.expert_of_slot}")
        if self.changes_choice and self.scoring is None:
            raise ValueError("scoring: needed where slots are pruned or a threshold chooses, got None")
        scoring = self.scoring
        if self.threshold_over_all is not None and scoring is not None and not scoring.is_one_softmax:
            raise ValueError(
                "threshold: over all experts needs a router whose scores are one softmax over them, "
                f"got {scoring.score} in {scoring.groups} groups"
            )

    @property
    def pruned_slots(self) -> tuple[bool, ...]:
        return tuple(e < 0 for e in self.expert_of_slot or ())

    @property
    def prunes(self) -> bool:
        return any(self.pruned_slots)

    @property
    def changes_choice(self) -> bool:
        """Whether the model's router has to choose otherwise than it did."""
        return self.prunes or self.threshold_over_all is not None

    @property
    def threshold_over_all(self) -> Threshold | None:
        return self.threshold if self.threshold is not None and self.threshold.over == "all" else None

    @property
    def threshold_over_chosen(self) -> Threshold | None:
        return self.threshold if self.threshold is not None and self.threshold.over == "chosen" else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RouterChange:
        """The inverse of ``to_json``. Raises ValueError naming the field if one is not known or of another type."""
        return from_plain(cls, value, "router")

    def check_fits(self, num_experts: int, slots: int | None, part_router: Tensor | None) -> None:
        """Raises ValueError unless the change is one of a layer with so many experts, parts counted one by one.

        slots: of the router, where it is known;  part_router: its rows are one for every part
        """
        if num_experts % self.parts:
            raise ValueError(f"router.parts: must divide the layer's {num_experts} experts, got {self.parts}")
        whole = num_experts // self.parts
        of_slot = self.expert_of_slot
        if of_slot is not None and not (min(of_slot) >= -1 and max(of_slot) < whole):
            raise ValueError(f"router.expert_of_slot: entries must be in [-1, {whole}), got {list(of_slot)}")
        known = whole if of_slot is None else len(of_slot)
        if slots is not None and known != slots:
            raise ValueError(f"router: the model's router has {slots} slots, this change is of one with {known}")
        if self.scoring is not None:
            scoring = self.scoring
            if not 1 <= scoring.top_k <= known:
                raise ValueError(f"router.scoring.top_k: must be in [1, {known}], got {scoring.top_k}")
            if scoring.groups < 1 or known % scoring.groups or not 1 <= scoring.groups_kept <= scoring.groups:
                raise ValueError(
                    f"router.scoring.groups: must divide the {known} slots, and groups_kept be at most as many, got "
                    f"{scoring.groups} and {scoring.groups_kept}"
                )
        if part_router is None:
            if self.part_mass < 1:
                raise ValueError(f"router.part_mass: below 1 it needs a part router, got {self.part_mass} without one")
        elif len(part_router) != num_experts:
            raise ValueError(f"part_router: must have {num_experts} rows, one a part, got {len(part_router)}")

    def describe(self) -> str:
        """One line for people: ``6 of 8 kept, 0.8 of the mass, 4 parts``; empty where nothing changes."""
        said = []
        if self.expert_of_slot is not None:
            slots, kept = len(self.expert_of_slot), sum(e >= 0 for e in self.expert_of_slot)
            if self.prunes:
                said.append(f"{kept} of {slots} kept")
            if (experts := max(self.expert_of_slot) + 1) < kept:
                said.append(f"{kept} slots on {experts} experts" + (", folded" if self.fold else ""))
        if self.threshold is not None:
            at_most = "" if self.threshold.max_experts is None else f", at most {self.threshold.max_experts}"
            chosen = " of the chosen" if self.threshold.over == "chosen" else ""
            said.append(f"threshold {self.threshold.mass:.4g}{chosen} {self.threshold.combine}{at_most}")
        if self.parts > 1:
            said.append(f"{self.parts} parts an expert, {self.part_mass:.4g} of their mass")
        return "; ".join(said)


def select(
    logits: Tensor,
    scoring: Scoring,
    *,
    pruned: Tensor | None = None,
    left: int | None = None,
    masked: str = "before",
    threshold: Threshold | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A router's choice and weights, from its logits.

    logits: (T, E) float;  scoring: see Scoring;  bias: (E,) float, of the choice of top_k only
    pruned: (E,) bool and left, the number of slots that are not, which the host must know; None for none pruned
    masked, threshold: see RouterChange
    Returns weights (T, K) float32 and slots (T, K) int64, -1 where unused: K = min(top_k, slots left) or, with a
    threshold, min(max_experts, slots left).

    Sources: XMoE, arXiv 2403.18926, the exclusive running sum of its released router, without its capacity;
    MoE-I2, arXiv 2411.01016, which masks before the softmax.
    """
    logits = logits.float()
    left = logits.shape[-1] if left is None else left
    if pruned is not None and masked == "before":
        logits = logits.masked_fill(pruned, -torch.inf)
    scores = logits.softmax(-1) if scoring.score == "softmax" else logits.sigmoid()
    choice = scores if bias is None or threshold is not None else scores + bias.float()
    if pruned is not None:
        choice = choice.masked_fill(pruned, -torch.inf)
    if threshold is not None:
        return _prefix(choice, threshold, left, scoring.scale)
    if scoring.groups > 1:
        choice = _best_groups(choice, scoring)
    best, slots = choice.topk(min(scoring.top_k, left), dim=-1)
    weights = scores.gather(-1, slots)
    if pruned is not None and scoring.groups > 1:  # the groups kept may hold fewer slots than top_k
        reached = best > -torch.inf
        weights, slots = weights.where(reached, 0), slots.where(reached, -1)
    if scoring.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scoring.scale, slots


def _prefix(probabilities: Tensor, threshold: Threshold, left: int, scale: float) -> tuple[Tensor, Tensor]:
    ordered, slots = probabilities.sort(dim=-1, descending=True, stable=True)
    limit = min(left, threshold.max_experts or left)
    ordered, slots = ordered[..., :limit], slots[..., :limit]
    used = _within_mass(ordered, threshold.mass)
    weights = ordered.where(used, 0)
    if threshold.combine == "renormalised":
        weights = weights / weights.sum(-1, keepdim=True)
    elif threshold.combine == "ones":
        weights = used.float()
    return weights * scale, slots.where(used, -1)


def keep_mass(slots: Tensor, weights: Tensor, threshold: Threshold) -> tuple[Tensor, Tensor]:
    """Of the slots a router chose, the fewest whose weights reach the threshold's mass of their sum.

    slots (T, K) int, outside [0, S) for unused; weights (T, K) -> the same shapes, -1 and 0 where no longer used. Of
    equal weights the earlier slot stays. With mass 1 and no ``max_experts`` both come back as they are.
    """
    if threshold.mass >= 1 and threshold.max_experts is None:
        return slots, weights
    given = weights.float().where(slots >= 0, 0)
    ordered, order = given.sort(dim=-1, descending=True, stable=True)
    total = given.sum(-1, keepdim=True)
    used = _within_mass(ordered, 1.0 if threshold.mass >= 1 else threshold.mass * total)
    used[..., threshold.max_experts or ordered.shape[-1] :] = False
    used[..., 0] = True  # also where no weight is above 0
    kept = torch.zeros_like(used).scatter(-1, order, used)
    made = given.where(kept, 0)
    if threshold.combine == "renormalised":
        made = made * (total / made.sum(-1, keepdim=True)).nan_to_num(1.0)
    return slots.where(kept, -1), made.to(weights.dtype)


def _within_mass(ordered: Tensor, mass: float | Tensor) -> Tensor:
    """(..., n) float, descending -> bool: those before which the running sum is below ``mass``; the first, as 0 is."""
    if isinstance(mass, float | int) and mass >= 1:
        return torch.ones_like(ordered, dtype=torch.bool)
    return mass_before(ordered) < mass


def mass_before(ordered: Tensor) -> Tensor:
    """(..., n) float -> the same shape: the sum of what stands before each, 0 for the first."""
    return torch.nn.functional.pad(ordered[..., :-1].cumsum(-1), (1, 0))


def _best_groups(choice: Tensor, scoring: Scoring) -> Tensor:
    """choice (T, E) with -inf outside each token's ``groups_kept`` best groups."""
    grouped = choice.unflatten(-1, (scoring.groups, -1))
    score = grouped.amax(-1) if scoring.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = score.topk(scoring.groups_kept, dim=-1).indices
    allowed = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)


def map_slots(slots: Tensor, expert_of_slot: Tensor) -> Tensor:
    """slots (T, K) int -> experts (T, K): ``expert_of_slot`` (S,) of each, -1 for ids outside [0, S)."""
    inside = (slots >= 0) & (slots < len(expert_of_slot))
    return expert_of_slot[slots.where(inside, 0)].to(slots.dtype).where(inside, -1)


def fold(experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of the slots of a token that are one expert, the first gets the sum of the weights, the others are skipped.

    Exact where the slots share their whole expert, which is linear in its weight. experts (T, K) int, weights (T, K).
    """
    same = experts.unsqueeze(-1) == experts.unsqueeze(-2)
    earlier = torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril(-1)
    repeated = (same & earlier).any(-1) & (experts >= 0)
    summed = (same * weights.unsqueeze(-2)).sum(-1).to(weights.dtype)
    return experts.where(~repeated, -1), summed


def choose_parts(
    x: Tensor, experts: Tensor, weights: Tensor, part_router: Tensor | None, parts: int, mass: float
) -> tuple[Tensor, Tensor]:
    """Replaces every expert of a token by those of its parts that matter.

        q_e = softmax of rows e * parts ... of part_router x;  share of part (e, j) = w_e q_ej
        used: the largest shares, until they reach ``mass`` of the token's sum of w_e; at least one, unless that is 0

    A part is an additive piece of its expert, so every part used has the expert's own weight w_e: with all parts the
    result is the expert's.

    x: (T, H) float;  experts: (T, K) int, outside [0, E) for unused;  weights: (T, K) float
    part_router: (E parts, H) float; not read, and may be None, where mass is 1
    Returns experts (T, K parts) int, -1 where unused, and weights (T, K parts).
    """
    offsets = torch.arange(parts, device=experts.device, dtype=experts.dtype)
    ids = experts.unsqueeze(-1) * parts + offsets
    ids = ids.where(experts.unsqueeze(-1) >= 0, -1).flatten(1)
    spread = weights.repeat_interleave(parts, dim=1)
    if mass < 1:
        assert part_router is not None
        share = part_shares(x, experts, weights, part_router, parts)
        ordered, order = share.sort(dim=-1, descending=True, stable=True)
        used = _within_mass(ordered, mass * ordered.sum(-1, keepdim=True))
        ids = ids.where(torch.zeros_like(used).scatter(1, order, used), -1)
    return ids, spread


def part_shares(x: Tensor, experts: Tensor, weights: Tensor, part_router: Tensor, parts: int) -> Tensor:
    """(T, K parts) float32: how much of each token's weight every part of its experts stands for, see choose_parts."""
    inside = (experts >= 0) & (experts < len(part_router) // parts)
    logits = (x.to(part_router.dtype) @ part_router.T).float().unflatten(-1, (-1, parts))
    rows = experts.where(inside, 0).long().unsqueeze(-1).expand(-1, -1, parts)
    q = logits.softmax(-1).gather(1, rows)
    return (q * weights.float().where(inside, 0).unsqueeze(-1)).flatten(1)
