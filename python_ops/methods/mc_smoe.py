"""MC-SMoE: experts merged into groups by how tokens use them, and what is merged compressed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resmoe_kernels.factored import BLOCK_KEPT, MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.parts import parse_payloads, payloads_text
from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
from resmoe_kernels.python_ops.methods.method import Compressed, check_known, warn_if_not_smaller, weight_errors
from resmoe_kernels.python_ops.models.routing import RouterChange, fold, map_slots
from resmoe_kernels.python_ops.solvers.align import Progress, relative, split_design, squared_norm
from resmoe_kernels.python_ops.solvers.factorize import Residual, low_rank
from resmoe_kernels.python_ops.solvers.merge import (
    SIMILARITIES,
    Grouping,
    aligned_design,
    dominant_experts,
    grouping,
    merged_bias_down,
    merged_design,
)
from resmoe_kernels.python_ops.solvers.prune import Scale, bitmap, block, block_kept, column_scale
from resmoe_kernels.python_ops.solvers.rounding import FLOATS, Storage
from resmoe_kernels.sparse import BLOCK

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.models.dense_model import DenseModel

STAGES = ("merge", "compress", "hybrid")
BUDGETS = ("global", "uniform")
SPARSE_LAYOUTS = ("block", "bitmap", "rows")
_log = logging.getLogger("resmoe_kernels")


@dataclass(frozen=True)
class Report:
    """What the compression of one layer did; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    relative_error: ||W - W'||_F / ||W||_F over the layer's aligned experts, W' what now stands for each, from the
        stored, rounded tensors; relative_error_gate_up and relative_error_down for each matrix alone
    merge_error: the same for what merging alone does
    groups: merged experts;  experts_without_tokens: those that no calibration token reached
    pairs_folded: the share of the calibration tokens' (token, expert) pairs that folding saves
    bytes_dense, bytes_now: of every tensor of the layer, indices and base included
    """

    relative_error: float
    relative_error_gate_up: float
    relative_error_down: float
    merge_error: float
    groups: int
    experts_without_tokens: int
    pairs_folded: float
    bytes_dense: int
    bytes_now: int


def plan(
    model: DenseModel,
    chosen: Sequence[int],
    *,
    statistics: Statistics | None,
    progress: bool = False,
    groups: int | None = None,
    budget: str = "global",
    **_: Any,
) -> list[dict[str, Any]]:
    """The dominant experts of each chosen layer: ``{"dominants": [numbers, ascending]}``.

    ``groups`` per layer in the mean, handed out over all layers by normalised usage, see ``dominant_experts``; with
    ``budget="uniform"`` every layer gets as many.
    """
    if statistics is None:
        raise _needs_statistics()
    layers = [statistics.layers[model.experts[i].path] for i in chosen]
    counts = [_groups(groups, layer.num_experts) for layer in layers]
    if budget == "uniform":
        return [{"dominants": dominant_experts([layer], g)[0]} for layer, g in zip(layers, counts, strict=True)]
    return [{"dominants": dominants} for dominants in dominant_experts(layers, sum(counts))]


def mc_smoe(
    experts: DenseExperts,
    *,
    stage: str = "compress",
    groups: int | None = None,
    budget: str = "global",
    similarity: str = "router-logits",
    align: bool = True,
    retain: float = 0.25,
    density: float = 0.125,
    sparse_layout: str = "block",
    statistics: LayerStatistics | None = None,
    plan: dict[str, Any] | None = None,
    storage: Storage = FLOATS,
    progress: Progress | None = None,
) -> Compressed:
    """Merges a layer's experts into G groups, and compresses what comes of it.

        B_g = sum over e in g of count_e W_e[pi_e] / sum of count_e,    pi_e: neurons as in g's dominant expert

        stage="merge"     W_e ~ B_g(e)                          G experts; the paper's M-SMoE
        stage="compress"  W_e ~ U_g V_g + S_g,  g = g(e)        G experts, no base; the paper's MC-SMoE
        stage="hybrid"    W_e ~ B_g(e) + U_e V_e + S_e          E experts on G bases, a residual each; not in the paper

    In the first two the router's slots are mapped to groups and folded: of the slots of one group that a token chose,
    one is computed, with their summed weight, which is exact. U V is the truncated SVD of what it stands for (B_g, or
    an expert's distance from it), and S what of the rest is largest by |entry| |x|, x the calibration inputs. Nothing
    is trained; finetune.py has the paper's training.

    groups: G, in the mean over the layers, in [1, E]; None for a quarter of the experts, as in the paper
    budget: of groups, ``global`` over layers by usage, or ``uniform``; read by ``plan``
    similarity: by which experts join groups, see merge.similarities
    align: False merges neurons by their numbers
    retain, density: the shares of the parameters of U V (see low_rank) and of S; one of the two may be 0. In a
        hybrid, experts alone in their group have no residual and do not count; ``block`` stores zeros for them
    sparse_layout: ``block`` keeps the largest entries of every 32, where density is rounded as by resmoe; ``bitmap``
        the largest of a matrix pair; ``rows`` those rows, each an output's weights, that are largest in the mean. All
        store a bit for every position, 1/16 of a matrix in bfloat16, so whole rows save nothing
    statistics, plan: the layer's, and what ``plan`` said of it; without a plan, groups are those of this layer alone
    storage: bits of the bases and of U, V and S; what comes after a part is taken against that part as it is stored

    Experts that no token reached add nothing to their group, unless none of it was reached: then all add the same, and
    entries count by magnitude alone. Raises ValueError naming the argument, what it may be and what came. Warns where
    experts were not reached, naming them, or the result is no smaller.

    Source: MC-SMoE, ICLR 2024, arXiv 2310.01334. Differs from the paper: every expert is aligned to its group's
    dominant one, not to expert 0, gated ones too; ranks follow the energy, in blocks of 16; S is found without
    training, and ``block``, which kernels serve and which is nearer, is the default where the paper has ``rows``
    (tiny-mixtral on WikiText-2, 4 groups of 8, density 1/8 and retain 1/4, 0.22 of the bytes: error 0.56 and
    perplexity 146; with rows 0.61 and 152; without S, at 0.12 of the bytes, 0.64 and 155). What the paper calls a
    column of S is read as all weights of one output, since that is what its code prunes: a row here.
    """
    check_settings(stage, groups, budget, similarity, align, retain, density, sparse_layout)
    if statistics is None:
        raise _needs_statistics()
    if statistics.num_experts != experts.num_experts:
        raise ValueError(
            f"statistics: are of {statistics.num_experts} experts, the layer has {experts.num_experts}; "
            "calibrate this model"
        )
    count, dtype = experts.num_experts, experts.gate_up.dtype
    dominants = plan["dominants"] if plan else dominant_experts([statistics], _groups(groups, count))[0]
    unused = (statistics.count == 0).nonzero().flatten().tolist()
    if unused:
        _log.warning(
            "mc-smoe: no calibration token reached expert%s %s; a group takes nothing from them, use more tokens",
            "s" if len(unused) > 1 else "",
            ", ".join(map(str, unused)),
        )
    grouped = grouping(experts, statistics, dominants, similarity=similarity, align=align, progress=progress)
    sizes = [len(grouped.members(g)) for g in range(grouped.num_groups)]
    own = stage == "hybrid"  # every expert keeps something of its own
    number = count if own else grouped.num_groups

    def whole(i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        design = aligned_design(experts, grouped, i) if own else merged_design(experts, grouped, i)
        return split_design(design, experts)

    def base(g: int) -> tuple[Tensor, ...]:
        return tuple(m.to(dtype) for m in split_design(merged_design(experts, grouped, g), experts)[:2])

    tensors: dict[str, Tensor] = {}
    if stage != "compress":
        bases = zip(*map(base, range(grouped.num_groups)), strict=True)
        tensors = {f"base_{matrix}": torch.stack(b) for matrix, b in zip(MATRICES, bases, strict=True)}
        index = grouped.group if own else range(number)
        tensors["group"] = torch.tensor(index, dtype=torch.int32, device=experts.gate_up.device)
    if experts.bias_gate_up is not None:
        biases = [whole(i)[2] for i in range(number)]
        tensors["bias_gate_up"] = torch.stack(biases).to(dtype)  # type: ignore[arg-type]
    if experts.bias_down is not None:
        tensors["bias_down"] = experts.bias_down if own else merged_bias_down(experts, grouped)
    sizes_of_layer = {
        "num_experts": number,
        "hidden_size": experts.hidden_size,
        "intermediate_size": experts.intermediate_size,
        "gated": experts.gated,
    }
    factored = storage.layer(FactoredExperts.from_tensors(tensors, **sizes_of_layer)) if tensors else None
    if stage != "merge":

        def residual(i: int) -> tuple[Tensor, Tensor]:
            if progress is not None:
                progress(f"residual: expert {i + 1} of {number}")
            gate_up, down, _ = whole(i)
            if own:
                assert factored is not None
                g = grouped.group[i]
                gate_up = gate_up - factored.read("base_gate_up", g, torch.float32)
                down = down - factored.read("base_down", g, torch.float32)
            return gate_up, down

        def scale(i: int) -> tuple[Tensor, Tensor]:
            scales = _scale(statistics, grouped, [i] if own else grouped.members(i))
            return scales[0].to(experts.gate_up.device), scales[1].to(experts.gate_up.device)

        holds = [sizes[g] > 1 for g in grouped.group] if own else [True] * number
        parts = _low_rank_and_sparse(residual, holds, experts, retain, density, sparse_layout, scale, storage)
        if parts is not None and factored is not None:
            text = payloads_text(parse_payloads(factored.payloads) | parse_payloads(parts.payloads))
            parts = FactoredExperts.from_tensors(factored.tensors() | parts.tensors(), **sizes_of_layer, payloads=text)
        factored = parts or factored
    assert factored is not None

    change = None
    if number < count:
        change = RouterChange(expert_of_slot=tuple(grouped.group), fold=True)
    report = Report(
        **_errors(experts, grouped, factored, own),
        groups=grouped.num_groups,
        experts_without_tokens=len(unused),
        pairs_folded=_pairs_folded(statistics, change),
        bytes_dense=experts.nbytes(),
        bytes_now=factored.nbytes(),
    )
    warn_if_not_smaller("mc-smoe", report, "lower groups, retain or density")
    return Compressed(factored, report, change)


def needs_statistics(**_: Any) -> bool:
    return True


def check_settings(
    stage: str,
    groups: int | None,
    budget: str,
    similarity: str,
    align: bool,
    retain: float,
    density: float,
    sparse_layout: str,
) -> None:
    """Raises what ``mc_smoe`` would raise for its settings, before there are experts to compress."""
    check_known("stage", stage, STAGES)
    check_known("budget", budget, BUDGETS)
    check_known("similarity", similarity, SIMILARITIES)
    check_known("sparse_layout", sparse_layout, SPARSE_LAYOUTS)
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"groups: must be a whole number of at least 1, got {groups}")
    for argument, value in (("retain", retain), ("density", density)):
        if not 0 <= value <= 1:
            raise ValueError(f"{argument}: must be in [0, 1], got {value}")
    if stage != "merge" and retain == density == 0:
        raise ValueError(f"retain and density: stage {stage!r} needs one of them above 0; use stage='merge' for none")
    if sparse_layout == "block" and density > BLOCK_KEPT[-1] / BLOCK:
        raise ValueError(f"density: the block layout keeps at most 0.5, got {density}; use sparse_layout='bitmap'")


def _needs_statistics() -> ValueError:
    return ValueError("mc-smoe: needs calibration statistics, got none; give calibration text")


def _groups(groups: int | None, count: int) -> int:
    if groups is None:
        return max(1, count // 4)
    if groups > count:
        raise ValueError(f"groups: must be at most the {count} experts of a layer, got {groups}")
    return groups


def _low_rank_and_sparse(
    residual: Residual,
    holds: list[bool],
    like: DenseExperts,
    retain: float,
    density: float,
    sparse_layout: str,
    scale: Scale,
    storage: Storage,
) -> FactoredExperts | None:
    """U V of the residuals and S of the rest, as a layer; ``holds``: whose residual is not zero."""
    if not any(holds):
        return None
    number, dtype = len(holds), like.gate_up.dtype
    sizes = {
        "num_experts": number,
        "hidden_size": like.hidden_size,
        "intermediate_size": like.intermediate_size,
        "gated": like.gated,
    }
    stored = None
    if retain:
        share = retain if retain == 1 else retain * sum(holds) / number
        low = low_rank(residual, number, retain=share, gated=like.gated, dtype=dtype)
        stored = storage.layer(FactoredExperts.from_tensors(low, **sizes))
    if not density:
        return stored

    def rest(i: int) -> tuple[Tensor, Tensor]:
        gate_up, down = residual(i)
        if stored is None:
            return gate_up, down
        return gate_up - stored.materialize_matrix("gate_up", i), down - stored.materialize_matrix("down", i)

    if sparse_layout == "block":
        sparse = block(rest, number, kept=block_kept(density), scale=scale, dtype=dtype)
    else:
        shares = [density * held for held in holds]
        sparse = bitmap(rest, number, retain=shares, rows=sparse_layout == "rows", scale=scale, dtype=dtype)
    if stored is None:
        return storage.layer(FactoredExperts.from_tensors(sparse, **sizes))
    return storage.layer(replace(stored, **sparse))  # type: ignore[arg-type]


def _scale(statistics: LayerStatistics, grouped: Grouping, members: list[int]) -> tuple[Tensor, Tensor]:
    """What the columns of gate_up and down were multiplied by, in calibration, where ``members`` are one expert."""
    down = torch.zeros(grouped.permutations.shape[1], dtype=torch.float64)
    for e in members:
        moment = statistics.moment_down[e]
        down += (moment.diagonal() if moment.dim() == 2 else moment)[grouped.permutations[e]]
    return column_scale(statistics.moment_gate_up), column_scale(down)


def _pairs_folded(statistics: LayerStatistics, change: RouterChange | None) -> float:
    if change is None or change.expert_of_slot is None:
        return 0.0
    before = map_slots(statistics.sample_index, torch.tensor(change.expert_of_slot))
    after, _ = fold(before, statistics.sample_weight)
    used = int((before >= 0).sum())
    return 1 - int((after >= 0).sum()) / used if used else 0.0


def _errors(experts: DenseExperts, grouped: Grouping, factored: FactoredExperts, own: bool) -> dict[str, float]:
    whole, lost, apart = dict.fromkeys(MATRICES, 0.0), dict.fromkeys(MATRICES, 0.0), 0.0
    for g in range(grouped.num_groups):
        merged = split_design(merged_design(experts, grouped, g), experts)[:2]
        for e in grouped.members(g):
            aligned = split_design(aligned_design(experts, grouped, e), experts)[:2]
            for matrix, weight, base in zip(MATRICES, aligned, merged, strict=True):
                whole[matrix] += squared_norm(weight)
                apart += squared_norm(weight - base)
                lost[matrix] += squared_norm(weight - factored.materialize_matrix(matrix, e if own else g))
    return {**weight_errors(lost, whole), "merge_error": relative(apart, sum(whole.values()))}
