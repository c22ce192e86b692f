"""XMoE: as many experts as a token needs, by a threshold on its probabilities, and experts split into small ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from resmoe_kernels.factored import MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
from resmoe_kernels.python_ops.methods.method import Compressed, check_known
from resmoe_kernels.python_ops.models.layouts import DenseFFN, ExpertsModule, find_experts
from resmoe_kernels.python_ops.models.routing import (
    RouterChange,
    Scoring,
    Threshold,
    choose_parts,
    keep_mass,
    mass_before,
    part_shares,
    select,
)
from resmoe_kernels.python_ops.solvers.align import Progress, relative, squared_norm
from resmoe_kernels.python_ops.solvers.rounding import FLOATS, Storage
from resmoe_kernels.python_ops.solvers.split import (
    co_active,
    contiguous,
    rows_from_tokens,
    rows_from_weights,
    split_experts,
)

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.models.dense_model import DenseModel

SOURCES = ("activations", "weights")
SPLITS = ("activations", "contiguous")
FEWEST_TOKENS = 16  # of calibration, that an expert must have met to be split by them
_log = logging.getLogger("resmoe_kernels")


@dataclass(frozen=True)
class Report:
    """What was decided for one layer; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    relative_error: of the weights, 0 in floats: none is changed. What is lost then is lost by not using all of them
    threshold, part_mass: as calibrated;  parts: of every expert
    experts_per_token: over the sampled tokens of calibration, mean, parts counted as fractions; None without
    experts_without_data: numbers of those that met too few tokens to be split by their activations
    bytes_dense, bytes_now: of every tensor of the layer, the part router included
    """

    relative_error: float
    threshold: float | None
    parts: int
    part_mass: float
    experts_per_token: float | None
    experts_without_data: list[int]
    bytes_dense: int
    bytes_now: int


def xmoe(
    experts: DenseExperts,
    *,
    threshold: float | None = None,
    experts_per_token: float | None = None,
    combine: str | None = None,
    max_experts: int | None = None,
    parts: int = 1,
    split: str = "activations",
    part_router: str = "activations",
    part_mass: float = 1.0,
    parts_per_token: float | None = None,
    statistics: LayerStatistics | None = None,
    plan: dict[str, Any],
    storage: Storage = FLOATS,
    progress: Progress | None = None,
) -> Compressed:
    """Makes the number of experts a token uses depend on the token, and experts finer. No weight is changed.

        p = softmax of the router's logits, p_1 >= p_2 >= ...;    y = sum of w_i f_i(x) over i with sum_{j<i} p_j < t
        where the router's scores are no such p (sigmoid, groups, any other): the same of its own choice, with p_i the
        weights that it gives, each token's divided by their sum;    t = 1 is then the model itself
        f_e(x) = sum of f_ej(x) over parts j;    used: the largest w_e q_ej, until they reach part_mass of sum_e w_e

    so a token uses the smallest set of experts, and of parts of those, that holds the mass, and at least one.

    experts: the layer, of a mixture or a dense feed-forward module read as one expert
    threshold: t, in (0, 1];  experts_per_token: in its place, the mean number of experts that this layer's own t is
        calibrated to
    combine: w_i: ``raw`` p_i (the paper), ``renormalised`` p_i / sum, ``ones``; by default raw where the model's
        router is known not to normalise, else renormalised
    max_experts: of a token, at most
    parts: of each expert; its number of neurons must be divisible by it
    split: ``activations`` puts neurons active on the same tokens together, ``contiguous`` leaves them as they are
    part_router: its rows fitted to ``activations``, or means of gate rows, from ``weights`` alone. Router and split
        are read only where not all parts are kept
    part_mass: in (0, 1]; 1 keeps all parts, and is exact;  parts_per_token: in its place, the mean number of parts
    statistics: of this layer;  plan: this layer's, from ``plan``;  progress: called after every step
    storage: bits of the experts, each a base of its own

    The result is not smaller, and it is meant to be faster: work is that of the experts used, there is no capacity.
    ``xmoe+resmoe`` compresses what this leaves.

    Raises ValueError naming the argument, what it may be and what came.
    Source: XMoE, Findings of ACL 2024, arXiv 2403.18926, which trains a model with this router; here t is calibrated
    on one that was not. Its released code computes a fixed number of slots per expert whatever t is, and drops
    tokens beyond it; this does neither. Its dense-to-sparse models are trained at t = 1 with raw weights; here parts
    keep their expert's own weight, so that an untrained split is exact when all are used.
    """
    settings = (threshold, experts_per_token, combine, max_experts, parts, split, part_router, part_mass)
    check_settings(*settings, parts_per_token)
    if experts.intermediate_size % parts:
        raise ValueError(
            f"parts: must divide the {experts.intermediate_size} neurons of an expert, got {parts}; "
            f"near it are {_divisors_near(experts.intermediate_size, parts)}"
        )
    scoring = None if plan["scoring"] is None else Scoring(**plan["scoring"])
    rule = _threshold(threshold, experts_per_token, combine, max_experts, scoring, statistics, experts.num_experts)
    sample = None if statistics is None else _sample(statistics, rule, scoring)
    dense = experts
    router: Tensor | None = None
    without_data: list[int] = []
    if parts > 1:
        chooses = part_mass < 1 or parts_per_token is not None
        tokens = sample.by_expert(experts.num_experts) if sample is not None and chooses else None
        activation = plan["activation"]
        dense, without_data = _split(experts, tokens, parts, split, activation, progress)
        if chooses:
            router = _part_router(dense, tokens if part_router == "activations" else None, parts, activation)
            router = router.to(experts.gate_up.dtype)
    if parts_per_token is not None:
        assert sample is not None and router is not None
        part_mass = _part_mass(sample, router, parts, parts_per_token)
        router = router if part_mass < 1 else None

    scores = scoring if rule is not None and rule.over == "all" else None
    change = RouterChange(scoring=scores, threshold=rule, parts=parts, part_mass=part_mass)
    plain = FactoredExperts(
        num_experts=dense.num_experts,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        gated=dense.gated,
        group=torch.arange(dense.num_experts, dtype=torch.int32, device=dense.gate_up.device),
        base_gate_up=dense.gate_up.contiguous(),
        base_down=dense.down.contiguous(),
        bias_gate_up=dense.bias_gate_up,
        bias_down=dense.bias_down,
    )
    factored = storage.layer(plain)
    report = Report(
        relative_error=_rounding_error(dense, factored) if factored.payloads else 0.0,
        threshold=None if rule is None else rule.mass,
        parts=parts,
        part_mass=part_mass,
        experts_per_token=None if sample is None else _experts_per_token(sample, router, change),
        experts_without_data=without_data,
        bytes_dense=experts.nbytes(),
        bytes_now=factored.nbytes() + (0 if router is None else router.numel() * router.element_size()),
    )
    return Compressed(factored, report, change, router)


def _rounding_error(dense: DenseExperts, factored: FactoredExperts) -> float:
    lost = whole = 0.0
    for e in range(dense.num_experts):
        for matrix in MATRICES:
            weight = getattr(dense, matrix)[e].float()
            whole += squared_norm(weight)
            lost += squared_norm(weight - factored.materialize_matrix(matrix, e))
    return relative(lost, whole)


def check_settings(
    threshold: float | None,
    experts_per_token: float | None,
    combine: str | None,
    max_experts: int | None,
    parts: int,
    split: str,
    part_router: str,
    part_mass: float,
    parts_per_token: float | None,
) -> None:
    """Raises what ``xmoe`` would raise for its settings, before there are experts to compress."""
    if threshold is not None and experts_per_token is not None:
        raise ValueError(
            f"threshold: is what experts_per_token calibrates; give one, got {threshold} and {experts_per_token}"
        )
    chooses = threshold is not None or experts_per_token is not None
    if not chooses and parts == 1:
        raise ValueError("xmoe: nothing to do; give threshold, experts_per_token or parts")
    for name, value in (("combine", combine), ("max_experts", max_experts)):
        if value is not None and not chooses:
            raise ValueError(f"{name}: belongs to a threshold; give threshold or experts_per_token too, got {value!r}")
    Threshold(1.0 if threshold is None else threshold, combine or "raw", max_experts)
    if experts_per_token is not None and not experts_per_token >= 1:
        raise ValueError(f"experts_per_token: must be at least 1, got {experts_per_token}")
    RouterChange(parts=parts, part_mass=part_mass)
    check_known("split", split, SPLITS)
    check_known("part_router", part_router, SOURCES)
    if parts_per_token is not None and part_mass < 1:
        raise ValueError(
            f"part_mass: is what parts_per_token calibrates; give one, got {part_mass} and {parts_per_token}"
        )
    if parts_per_token is not None and not parts_per_token >= 1:
        raise ValueError(f"parts_per_token: must be at least 1, got {parts_per_token}")
    if parts == 1 and (part_mass < 1 or parts_per_token is not None):
        raise ValueError("parts: must be at least 2 where not all of them are to be used, got 1")


def needs_statistics(**settings: Any) -> bool:
    """Whether these settings are calibrated on data."""
    by_data = "activations" in (settings["split"], settings["part_router"])
    targets = (settings["experts_per_token"], settings["parts_per_token"])
    return any(t is not None for t in targets) or (by_data and settings["part_mass"] < 1)


def find(model: nn.Module) -> list[ExpertsModule]:
    """The experts modules of a model; of a dense model its feed-forward modules."""
    return find_experts(model, or_ffns=True)


def plan(
    model: DenseModel, chosen: Sequence[int], *, statistics: Statistics | None, progress: bool, **settings: Any
) -> list[dict[str, Any]]:
    """What the model itself says of each layer: how its router scores, where that is needed and known, and its
    activation.

    Raises ValueError naming the layer if no threshold can be put on it: a dense feed-forward module, or weights whose
    mass means nothing.
    """
    chooses = settings["threshold"] is not None or settings["experts_per_token"] is not None
    plans = []
    for i in chosen:
        found, scoring = model.experts[i], None
        if isinstance(found, DenseFFN) and settings["parts"] == 1:
            raise ValueError(f"{found.path}: a dense feed-forward module is one expert; give parts to split it into")
        if chooses and (reason := found.layer_class.no_threshold) is not None:
            raise ValueError(f"{found.path}: {reason}, so no threshold can be put on its weights; use parts")
        if chooses:
            scoring = _scoring(model, i)
        plans.append({"scoring": None if scoring is None else asdict(scoring), "activation": found.activation})
    return plans


# ---- thresholds


def _scoring(model: DenseModel, i: int) -> Scoring | None:
    """None where it is not known, which a threshold over what the router chose does not need."""
    try:
        return model.scoring(i)
    except ValueError:
        if isinstance(model.experts[i], DenseFFN):  # no router at all
            raise
        return None


def _threshold(
    mass: float | None,
    experts_per_token: float | None,
    combine: str | None,
    max_experts: int | None,
    scoring: Scoring | None,
    statistics: LayerStatistics | None,
    count: int,
) -> Threshold | None:
    if mass is None and experts_per_token is None:
        return None
    over = "all" if scoring is not None and scoring.is_one_softmax else "chosen"
    if experts_per_token is not None:
        assert statistics is not None
        shares = statistics.sample_logits.float().softmax(-1) if over == "all" else _shares(statistics.sample_weight)
        most = min(shares.shape[-1], max_experts or count)
        if experts_per_token > most:
            which = (
                f"of a layer of {count} experts" if over == "all" else f"of {shares.shape[-1]} that the router chooses"
            )
            raise ValueError(
                f"experts_per_token: must be at most {most}, {which}"
                f"{'' if max_experts is None else f' and max_experts {max_experts}'}, got {experts_per_token}"
            )
        mass = mass_for(shares, experts_per_token, most)
    assert mass is not None
    normalises = scoring is None or scoring.normalised
    return Threshold(mass, combine or ("renormalised" if normalises else "raw"), max_experts, over)


def _shares(weights: Tensor) -> Tensor:
    """(S, K) weights -> the same divided by each row's sum."""
    return weights.float() / weights.float().sum(-1, keepdim=True).clamp(min=1e-20)


def mass_for(shares: Tensor, target: float, most: int | None = None) -> float:
    """The mass at which rows of shares (S, n), each of sum 1, use ``target`` of their entries on the mean.

    most: never more entries of a row. An entry is used if those before it sum to less than the mass, so the mass
    stands between two such sums: the one of the last entry to be used and that of the first not to be.
    """
    ordered = shares.sort(dim=-1, descending=True).values[:, :most]
    before = mass_before(ordered)[:, 1:][ordered[:, 1:] > 0].sort().values
    wanted = round((target - 1) * len(shares))
    if wanted >= len(before):
        return 1.0
    last = float(before[wanted - 1]) if wanted else 0.0
    return min((last + float(before[wanted])) / 2, 1 - 2.0**-24)  # 1 would use all


# ---- the sampled tokens of calibration


class _Sample(NamedTuple):
    """Tokens x (S, H) and their routing: slots and weights (S, K)."""

    x: Tensor
    slots: Tensor
    weights: Tensor

    def by_expert(self, count: int) -> list[Tensor]:
        """The tokens of each expert; of one that met too few of them none."""
        tokens = [self.x[(self.slots == e).any(1)] for e in range(count)]
        return [x if len(x) >= FEWEST_TOKENS else x[:0] for x in tokens]


def _sample(statistics: LayerStatistics, rule: Threshold | None, scoring: Scoring | None) -> _Sample:
    index, weight = statistics.sample_index, statistics.sample_weight
    if rule is None:
        return _Sample(statistics.sample_x, index, weight)
    if rule.over == "chosen":
        return _Sample(statistics.sample_x, *keep_mass(index, weight, rule))
    assert scoring is not None
    weights, slots = select(statistics.sample_logits, scoring, threshold=rule)
    return _Sample(statistics.sample_x, slots, weights)


def _experts_per_token(sample: _Sample, router: Tensor | None, change: RouterChange) -> float:
    slots = sample.slots
    if change.parts > 1:
        rows = None if router is None else router.to(sample.x.device)
        slots, _ = choose_parts(*sample, rows, change.parts, change.part_mass)
    return float((slots >= 0).sum()) / len(slots) / change.parts


def _part_mass(sample: _Sample, router: Tensor, parts: int, parts_per_token: float) -> float:
    if parts_per_token > len(router):
        raise ValueError(f"parts_per_token: must be at most the layer's {len(router)} parts, got {parts_per_token}")
    shares = part_shares(*sample, router.to(sample.x.device), parts)
    return mass_for(shares / shares.sum(1, keepdim=True), parts_per_token)


# ---- parts


def _split(
    experts: DenseExperts,
    tokens: list[Tensor] | None,
    parts: int,
    split: str,
    activation: str,
    progress: Progress | None,
) -> tuple[DenseExperts, list[int]]:
    orders = []
    for e in range(experts.num_experts):
        if progress is not None:
            progress(f"split: expert {e + 1} of {experts.num_experts}")
        if tokens is None or split == "contiguous" or not len(tokens[e]):
            orders.append(contiguous(experts.intermediate_size))
        else:
            x = tokens[e].to(experts.gate_up.device)
            orders.append(co_active(experts, e, x, activation, parts))
    without_data = [] if tokens is None else [e for e, x in enumerate(tokens) if not len(x)]
    if without_data:
        _log.warning(
            "xmoe: experts %s met fewer than %d calibration tokens and are split without data; calibrate on more text",
            ", ".join(map(str, without_data)),
            FEWEST_TOKENS,
        )
    return split_experts(experts, orders, parts), without_data


def _part_router(dense: DenseExperts, tokens: list[Tensor] | None, parts: int, activation: str) -> Tensor:
    rows = []
    for e in range(dense.num_experts // parts):
        numbers = range(e * parts, (e + 1) * parts)
        if tokens is None or not len(tokens[e]):
            rows.append(rows_from_weights(dense.gate_up[numbers.start : numbers.stop], dense.intermediate_size))
        else:
            rows.append(rows_from_tokens(dense, numbers, tokens[e].to(dense.gate_up.device), activation))
    return torch.cat(rows)


def _divisors_near(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wanted], [d for d in divisors if d > wanted]
    return " and ".join(str(d) for d in below[-1:] + above[:1])
