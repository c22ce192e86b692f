"""MoE-I2: experts pruned unevenly over the layers, the rest decomposed at uneven ranks, both by what they matter."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from resmoe_kernels.factored import MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.calibration.statistics import Statistics
from resmoe_kernels.python_ops.methods.method import Compressed, check_known, warn_if_not_smaller, weight_errors
from resmoe_kernels.python_ops.models.dense_model import DenseModel, Hidden
from resmoe_kernels.python_ops.models.routers import correction_bias
from resmoe_kernels.python_ops.models.routing import MASKED, RouterChange, Scoring, select
from resmoe_kernels.python_ops.solvers.align import Progress, squared_norm
from resmoe_kernels.python_ops.solvers.apportion import Routed, prune_counts, shared_ranks
from resmoe_kernels.python_ops.solvers.expert_outputs import ExpertOutputs, expert_outputs
from resmoe_kernels.python_ops.solvers.factorize import low_rank_at
from resmoe_kernels.python_ops.solvers.genetic import SEARCHES, Found, Sets, search
from resmoe_kernels.python_ops.solvers.reception_field import best_together, runs
from resmoe_kernels.python_ops.solvers.rounding import FLOATS, Storage

ALLOCATIONS = ("importance", "uniform")
_MEMORY_LIMIT = 4 << 30  # of all layers' inner products; above it they are files in the temporary folder
_BLOCK_TOKENS = 8192  # through the layers of a block, for every combination
_log = logging.getLogger("resmoe_kernels")


@dataclass(frozen=True)
class Report:
    """What the compression of one layer did; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    relative_error: ||W - W'||_F / ||W||_F over the experts kept, W' from the stored, rounded tensors;
        relative_error_gate_up and relative_error_down for each matrix alone
    output_error: ||F(X) - F'(X)||_F / ||F(X)||_F by pruning alone, X the sample of calibration tokens
    importance: of the layer, the sum of its experts'
    experts_pruned, experts_kept, mean_rank_gate_up, mean_rank_down: the ranks are 0 where nothing is decomposed
    evaluations: different sets the search asked about
    bytes_dense, bytes_now: of every tensor of the layer, indices included
    """

    relative_error: float
    relative_error_gate_up: float
    relative_error_down: float
    output_error: float
    importance: float
    experts_pruned: int
    experts_kept: int
    mean_rank_gate_up: float
    mean_rank_down: float
    evaluations: int
    bytes_dense: int
    bytes_now: int


def moe_i2(
    experts: DenseExperts,
    *,
    prune: float = 0.25,
    retain: float = 0.65,
    alpha: float = 0.15,
    allocation: str = "importance",
    search: str = "genetic",
    population: int = 100,
    generations: int = 50,
    candidates: int = 3,
    block: int = 3,
    masked: str = "before",
    seed: int = 0,
    plan: dict[str, Any] | None = None,
    storage: Storage = FLOATS,
    progress: Progress | None = None,
) -> Compressed:
    """Compresses a layer of experts as planned: some pruned, the others W_e ~ U_e V_e, without a base.

    What ``plan`` decides, over all layers i and experts j, on a sample X of calibration tokens:

        I_ij = ||F_i(X) - F_i(X; without j)||_F,   I_i = sum_j I_ij      the router chooses among the rest
        pruned per layer: in proportion to 1 / I_i, together ``prune`` of all experts
        which: sets C with a small ||F_i(X) - F_i(X; without C)||_F, the ``candidates`` best a search finds; of
            these, for every ``block`` of consecutive layers the combination that changes its output least
        R_ij = I_ij^alpha / (mean of I_ij^alpha over the survivors) * retain N K / (N + K)     for a matrix (N, K)

    Ranks are rounded to multiples of 16, within [16, N K / (N + K)], their sum kept.

    prune: part of the experts, in [0, 1). No layer keeps fewer than top_k; of a router with groups every group
        loses as many, and keeps 2 and enough for top_k
    retain: part of the survivors' parameters, in (0, 1]; 1 leaves them dense, each a base of its own
    alpha: how far ranks follow importance; 0 for equal ones
    allocation: of pruned experts over layers, by ``importance`` or ``uniform``
    search, population, generations: see genetic.search
    candidates, block: K and T, see reception_field; block 1 takes every layer's best by itself
    masked: whether pruned experts leave ``before`` the router's softmax or ``after``; differs where weights are
        not normalised
    plan: this layer's of ``plan``
    storage: bits of U and V, and where retain is 1 of the experts
    progress: called with a short phrase after every step

    Raises ValueError naming the argument, what it may be and what came. Warns where the result is no smaller.
    Source: MoE-I2, Findings of EMNLP 2024, arXiv 2411.01016. Differs from the paper: ``stacked``, the form that
    kernels serve, where the paper decomposes gate and up apart; ranks in blocks, where it rounds down; a sample of 4096
    tokens as one batch. The proportion to 1 / I_i is a public re-implementation's. The fine-tuning is in lora.py.
    """
    check_settings(prune, retain, alpha, allocation, search, population, generations, candidates, block, masked, seed)
    if plan is None:
        raise ValueError("plan: needed, because what a layer loses depends on the others; see plan, got None")
    pruned = plan["pruned"]
    kept = [e for e in range(experts.num_experts) if e not in pruned]
    dtype = experts.gate_up.dtype

    def original(e: int) -> tuple[Tensor, Tensor]:
        return experts.gate_up[kept[e]].float(), experts.down[kept[e]].float()

    def weight_of(e: int) -> tuple[Tensor, Tensor]:
        if progress is not None:
            progress(f"decomposing: expert {e + 1} of {len(kept)}")
        return original(e)

    tensors: dict[str, Tensor]
    if plan["ranks"] is None:
        group = torch.arange(len(kept), dtype=torch.int32, device=experts.gate_up.device)
        tensors = {"group": group, "base_gate_up": experts.gate_up[kept], "base_down": experts.down[kept]}
    else:
        tensors = low_rank_at(weight_of, plan["ranks"], dtype=dtype)
    plain = FactoredExperts(
        num_experts=len(kept),
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        gated=experts.gated,
        bias_gate_up=None if experts.bias_gate_up is None else experts.bias_gate_up[kept],
        bias_down=None if experts.bias_down is None else experts.bias_down[kept],
        **tensors,  # type: ignore[arg-type]
    )
    factored = storage.layer(plain)

    lost, whole = dict.fromkeys(MATRICES, 0.0), dict.fromkeys(MATRICES, 0.0)
    for e in range(len(kept)):
        for matrix, weight in zip(MATRICES, original(e), strict=True):
            whole[matrix] += squared_norm(weight)
            lost[matrix] += squared_norm(weight - factored.materialize_matrix(matrix, e))
    report = Report(
        **weight_errors(lost, whole),
        output_error=plan["output_error"],
        importance=math.fsum(plan["importance"]),
        experts_pruned=len(pruned),
        experts_kept=len(kept),
        mean_rank_gate_up=sum(factored.ranks("gate_up")) / len(kept),
        mean_rank_down=sum(factored.ranks("down")) / len(kept),
        evaluations=plan["evaluations"],
        bytes_dense=experts.nbytes(),
        bytes_now=factored.nbytes(),
    )
    warn_if_not_smaller("moe-i2", report, "lower retain or raise prune")
    scoring = Scoring(**plan["scoring"])
    return Compressed(factored, report, _without(pruned, experts.num_experts, scoring, masked) if pruned else None)


def needs_statistics(**_: Any) -> bool:
    return True


def check_settings(
    prune: float,
    retain: float,
    alpha: float,
    allocation: str,
    search: str,
    population: int,
    generations: int,
    candidates: int,
    block: int,
    masked: str,
    seed: int,
) -> None:
    """Raises what ``moe_i2`` would raise for its settings, before there are experts to compress."""
    check_known("allocation", allocation, ALLOCATIONS)
    check_known("search", search, SEARCHES)
    check_known("masked", masked, MASKED)
    if not 0 <= prune < 1:
        raise ValueError(f"prune: must be in [0, 1), got {prune}")
    if not 0 < retain <= 1:
        raise ValueError(f"retain: must be in (0, 1], got {retain}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: must be at least 0 and finite, got {alpha}")
    for argument, number, least in (
        ("population", population, 4),
        ("generations", generations, 1),
        ("candidates", candidates, 1),
        ("block", block, 1),
    ):
        if number < least:
            raise ValueError(f"{argument}: must be at least {least}, got {number}")


# ---- the plan


def check_model(model: DenseModel, chosen: Sequence[int]) -> None:
    """Raises ValueError if a router scores in a way that is not known: its choice among the kept cannot be told."""
    for i in chosen:
        model.scoring(i)


def plan(
    model: DenseModel,
    chosen: Sequence[int],
    *,
    statistics: Statistics,
    progress: bool = True,
    prune: float,
    retain: float,
    alpha: float,
    allocation: str,
    search: str,
    population: int,
    generations: int,
    candidates: int,
    block: int,
    masked: str,
    seed: int,
) -> list[dict[str, Any]]:
    """What every layer loses, see ``moe_i2``.

    Every expert runs once on the sample; candidates are weighted sums of what is kept of that, see expert_outputs:
    4 S E^2 bytes for each layer, together in memory up to 4 GiB, beyond that in files in the temporary folder (TMPDIR).
    The search of blocks runs decoder layers on 8,192 calibration tokens, 13 times each with K = T = 3.

    statistics: from calibration on this model
    Returns for each chosen layer ``pruned``, numbers of experts; ``ranks`` of the others by matrix, or None;
    ``scoring`` of its router; ``importance`` of its experts; ``output_error`` and ``evaluations``, see Report.

    Raises ValueError where pruning would leave a layer without what its router needs. Warns of experts that no
    sampled token chose: nothing is known of them but that they go first; kept, they get the mean rank.
    """
    held = sum(
        4 * len(s.sample_x) * s.num_experts**2 for s in (statistics.layers[model.experts[i].path] for i in chosen)
    )
    with tempfile.TemporaryDirectory() as folder:
        layers = [
            _survey(model, i, statistics, masked, Path(folder) / str(i) if held > _MEMORY_LIMIT else None)
            for i in tqdm(chosen, desc="running all experts", unit="layer", disable=not progress)
        ]
        counts = prune_counts(
            prune,
            [layer.routed() for layer in layers],
            [float(layer.importance.sum()) for layer in layers] if allocation == "importance" else None,
        )
        found = [
            _search(layer, count, search, population, generations, candidates, seed)
            for layer, count in zip(
                tqdm(layers, desc="searching", unit="layer", disable=not progress), counts, strict=True
            )
        ]
        best = _choose_by_blocks(model, layers, found, masked, block, statistics.token_ids, progress)
        return [
            {
                "pruned": _members(f.sets[c]),
                "ranks": None if retain == 1 else _ranks(layer, _members(~f.sets[c]), retain, alpha),
                "scoring": dataclasses.asdict(layer.scoring),
                "importance": layer.importance.tolist(),
                "output_error": float(f.errors[c]) / (layer.outputs.norm() or 1.0),
                "evaluations": f.evaluations,
            }
            for layer, f, c in zip(layers, found, best, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer, all its experts run. sizes: (N, K) of each matrix."""

    number: int
    path: str
    scoring: Scoring
    outputs: ExpertOutputs
    importance: Tensor
    sizes: dict[str, tuple[int, int]]

    def routed(self) -> Routed:
        router = self.scoring
        return Routed(self.path, len(self.importance), router.top_k, router.groups, router.groups_kept)


@torch.inference_mode()
def _survey(model: DenseModel, i: int, statistics: Statistics, masked: str, file: Path | None) -> _Layer:
    found = model.experts[i]
    sample = statistics.layers[found.path]
    with model.layer_in_memory(model.decoder_layer_of(i)):
        experts = found.read({name: p.detach() for name, p in found.module.named_parameters()})
        block = model.module.get_submodule(found.path.rpartition(".")[0])
        scoring, bias = model.scoring(i), correction_bias(found.router(model.module), block)
        bias = None if bias is None else bias.detach().float().cpu()
        outputs = expert_outputs(
            experts,
            sample.sample_x,
            sample.sample_logits,
            partial(select, scoring=scoring, masked=masked, bias=bias),
            activation=found.activation,
            file=file,
        )
    importance = outputs.importance()
    unused = _members(importance == 0)
    if unused:
        _log.warning(
            "%s: none of the %d sampled tokens uses experts %s; they are pruned first, and where kept they get the "
            "mean rank; calibrate on more tokens to know better",
            found.path,
            len(sample.sample_x),
            ", ".join(map(str, unused)),
        )
    sizes = {m: (getattr(experts, m).shape[1], getattr(experts, m).shape[2]) for m in MATRICES}
    return _Layer(i, found.path, scoring, outputs, importance, sizes)


# ---- which


def _search(
    layer: _Layer, count: int, kind: str, population: int, generations: int, candidates: int, seed: int
) -> Found:
    """Sets of the layer's experts. The search sees them by importance, so that it does not depend on their order."""
    groups = layer.scoring.groups
    of_groups = layer.importance.view(groups, -1)
    inside, between = of_groups.argsort(dim=1, stable=True), of_groups.sum(1).argsort(stable=True)
    order = (inside + torch.arange(groups).unsqueeze(1) * of_groups.shape[1])[between].flatten()
    place = order.argsort()
    found = search(
        kind,
        lambda rows: layer.outputs.change(rows[:, place]),
        Sets(len(order), count, groups),
        population=population,
        generations=generations,
        keep=candidates,
        generator=torch.Generator().manual_seed(seed),
    )
    return found._replace(sets=found.sets[:, place])


def _choose_by_blocks(
    model: DenseModel,
    layers: Sequence[_Layer],
    found: Sequence[Found],
    masked: str,
    block: int,
    token_ids: Tensor,
    progress: bool,
) -> list[int]:
    """Of every layer's sets the number of the one that goes best with its neighbours'."""
    changes = [
        [_without(_members(row), len(row), layer.scoring, masked) for row in f.sets]
        for layer, f in zip(layers, found, strict=True)
    ]
    blocks = [range(start, min(start + block, len(layers))) for start in range(0, len(layers), block)]
    blocks = [b for b in blocks if len(b) > 1 and any(len(changes[n]) > 1 for n in b)]
    chosen, reached = [0] * len(layers), 0
    if not blocks:
        return chosen
    hidden = model.embed(token_ids[: max(1, _BLOCK_TOKENS // token_ids.shape[1])])
    total = sum(runs([changes[n] for n in b]) for b in blocks)
    with tqdm(total=total, desc="choosing by blocks", unit="run", disable=not progress) as bar:
        for b in blocks:
            numbers = [layers[n].number for n in b]
            start = model.decoder_layer_of(numbers[0])
            hidden = model.run(hidden, reached, start)
            together, hidden = best_together(
                partial(_through, model, numbers), hidden, [changes[n] for n in b], Hidden.distance, bar.update
            )
            chosen[b.start : b.stop] = together
            reached = model.decoder_layer_of(numbers[-1]) + 1
    return chosen


def _through(model: DenseModel, numbers: Sequence[int], hidden: Hidden, n: int, change: RouterChange | None) -> Hidden:
    """From the decoder layer of the n-th experts to that of the next; behind the last, out of its own."""
    start = model.decoder_layer_of(numbers[n])
    stop = start + 1 if n + 1 == len(numbers) else model.decoder_layer_of(numbers[n + 1])
    return model.run(hidden, start, stop, {} if change is None else {numbers[n]: change})


def _without(pruned: Sequence[int], num_experts: int, scoring: Scoring, masked: str) -> RouterChange:
    """The router's change that leaves experts out; the others keep their order."""
    if not pruned:
        return RouterChange()
    kept = [e for e in range(num_experts) if e not in set(pruned)]
    numbers = tuple(kept.index(e) if e in kept else -1 for e in range(num_experts))
    return RouterChange(expert_of_slot=numbers, scoring=scoring, masked=masked)


def _members(row: Tensor) -> list[int]:
    return row.nonzero().flatten().tolist()


# ---- how much of each


def _powers(importance: Tensor, alpha: float) -> list[float]:
    """importance^alpha over its largest. Below 1e-30 of that, all get the same: what any alpha can ask of ranks."""
    logs = importance.double().log()
    return ((logs - logs.max()) * alpha).exp().clamp_min(1e-30).tolist()


def _ranks(layer: _Layer, kept: Sequence[int], retain: float, alpha: float) -> dict[str, list[int]]:
    known = layer.importance[layer.importance > 0]
    importance = layer.importance[kept]
    if len(known):
        importance = importance.where(importance > 0, known.mean()) / known.mean()
    weights = _powers(importance, alpha) if len(known) else [1.0] * len(kept)
    return {m: shared_ranks(weights, *size, retain) for m, size in layer.sizes.items()}
