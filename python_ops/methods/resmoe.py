"""ResMoE: one barycenter shared by all experts of a layer, and a compressed residual for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resmoe_kernels.factored import BLOCK_KEPT, FACTORIZATIONS, MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.methods.fitting import RIDGE, assembled, in_neuron_order, problem_of
from resmoe_kernels.python_ops.methods.method import (
    Compressed,
    check_known,
    warn_if_not_smaller,
    warn_of_unreached,
    weight_errors,
)
from resmoe_kernels.python_ops.solvers.align import (
    INITS,
    SOLVERS,
    Progress,
    barycenter,
    in_order,
    mean_cosine,
    mean_design,
    split_design,
    squared_norm,
)
from resmoe_kernels.python_ops.solvers.budgets import BUDGETS, Curves, allot, weights_of_errors
from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK, low_rank, low_rank_at, low_rank_curves
from resmoe_kernels.python_ops.solvers.fits import Fitted, fit_full, fit_low_rank, ranks_under
from resmoe_kernels.python_ops.solvers.prune import bitmap, bitmap_at, bitmap_curves, block, block_curves, block_kept
from resmoe_kernels.python_ops.solvers.rounding import FLOATS, Storage, full
from resmoe_kernels.sparse import BLOCK

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments
    from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
    from resmoe_kernels.python_ops.models.dense_model import DenseModel

RESIDUALS = ("lowrank", "sparse", "full")
SPARSE_LAYOUTS = ("block", "bitmap")


@dataclass(frozen=True)
class Report:
    """What the compression of one layer did; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    relative_error: ||W - W'||_F / ||W||_F over the layer's aligned experts, W' from the stored, rounded
        tensors; relative_error_gate_up and relative_error_down for each matrix alone
    cosine_before, cosine_after: mean cosine similarity of the experts' design matrices over all pairs, before
        and after alignment
    iterations, objective, converged: of the barycenter
    bytes_dense, bytes_now: of every tensor of the layer, indices and base included
    """

    relative_error: float
    relative_error_gate_up: float
    relative_error_down: float
    cosine_before: float
    cosine_after: float
    iterations: int
    objective: float
    converged: bool
    bytes_dense: int
    bytes_now: int


def resmoe(
    experts: DenseExperts,
    *,
    residual: str = "lowrank",
    retain: float = 0.25,
    factorization: str = "stacked",
    sparse_layout: str = "block",
    budget: str = "uniform",
    init: str = "progressive",
    solver: str = "assignment",
    statistics: LayerStatistics | None = None,
    plan: dict[str, Any] | None = None,
    storage: Storage = FLOATS,
    progress: Progress | None = None,
) -> Compressed:
    """Compresses a layer of experts to a shared base and one residual each.

        B, pi = barycenter(W)          neurons matched across experts, B their mean, as it is stored
        Delta_e = W_e[pi_e] - B        against the rounded base, so that its rounding is not lost
        W_e[pi_e] ~ B + U_e V_e        residual="lowrank", see low_rank for ``factorization``
        W_e[pi_e] ~ B + S_e            residual="sparse", see block and bitmap for ``sparse_layout``
        W_e[pi_e] ~ B + Delta_e        residual="full", in few bits: every place is kept, and ``retain`` not read

    An expert does not change when its neurons are permuted, so nothing is permuted back. Biases move with
    their neurons and keep their values. The router stays as it is.

    experts: the layer, in any floating-point type, which base and residual keep; worked on one expert at a
        time in float32
    retain: the part of the residual's parameters to keep, in (0, 1]. The base and indices come on top: the
        report has the sizes. The block layout rounds it down to 4, 8, 12 or 16 of 32, and up to 4
    budget: ``uniform``, every layer keeps ``retain``; or ``retain`` is the mean over layers, and the same bytes go to
        layers, matrices and experts by ``error``, without data, or by ``usage``, errors weighted by how often a
        calibration text uses an expert; see weights_of_errors. The block layout keeps one number of 32 for a matrix of
        a layer and meets any mean from 4 to 16 of 32; at means that ``uniform`` has too, perplexity was never better
        than with that, see benchmarks/results/budgets-*.csv
    init, solver: see barycenter
    statistics: the layer's, for ``lowrank`` (stacked) and ``full``. Where they hold moments of experts, base and
        residual are fitted under them, ranks too where the budget is uniform, see fit_low_rank and fit_full
    plan: this layer's of ``plan``; without one the budget is uniform, and only that can be
    storage: bits of the base and of the residual; what a plan measures is measured in floats
    progress: called with a short phrase after every step

    Raises ValueError naming the argument, what it may be and what came. Warns where the result is no smaller.
    Source: ResMoE, KDD 2025, arXiv 2503.06881. Differs from the paper: ``stacked`` and ``block``, the forms
    that kernels serve, are the defaults where the paper has ``joint`` and ``bitmap``; ranks follow the energy
    instead of being one number; the residual is taken against the base as stored.
    """
    check_settings(residual, retain, factorization, sparse_layout, budget, init, solver)
    check_storage(storage, residual=residual)
    if budget != "uniform" and not plan:
        raise ValueError(f"plan: budget={budget!r} needs it, because what a layer gets depends on the others; see plan")
    dtype, count = experts.gate_up.dtype, experts.num_experts
    aligned = _planned(experts, plan) if plan else _align(experts, init, solver, progress)
    allotted = plan["allotted"] if plan else None

    if statistics is not None and statistics.moments is not None:
        fitted = _fitted(aligned, statistics.expert_moments(), residual, retain, allotted, storage, progress)
        return _reported(aligned, fitted)

    def residual_of(e: int) -> tuple[Tensor, Tensor]:
        if progress is not None:
            progress(f"residual: expert {e + 1} of {count}")
        return aligned.residual(e)

    shared = storage.layer(
        FactoredExperts(
            num_experts=count,
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
            gated=experts.gated,
            group=torch.zeros(count, dtype=torch.int32, device=experts.gate_up.device),
            base_gate_up=aligned.base[0].unsqueeze(0),
            base_down=aligned.base[1].unsqueeze(0),
            bias_gate_up=_permuted_bias(experts, aligned.permutations),
            bias_down=experts.bias_down,
        )
    )
    if shared.payloads:
        aligned = replace(aligned, base=[shared.read(f"base_{m}", 0, torch.float32) for m in MATRICES])

    tensors: dict[str, Tensor] = {}
    if residual == "full":
        payload = storage.payload("values_gate_up")
        assert payload is not None  # check_storage
        shared = full(shared, residual_of, payload)
    elif residual == "lowrank":
        how = {"factorization": factorization, "gated": experts.gated, "dtype": dtype}
        if allotted:
            tensors = low_rank_at(residual_of, allotted, **how)
        else:
            tensors = low_rank(residual_of, count, retain=retain, **how)
    elif sparse_layout == "bitmap":
        if allotted:
            tensors = bitmap_at(residual_of, allotted, dtype=dtype)
        else:
            tensors = bitmap(residual_of, count, retain=retain, dtype=dtype)
    else:
        tensors = block(residual_of, count, kept=allotted or block_kept(retain), dtype=dtype)

    stacked = "stacked" if residual != "lowrank" else factorization
    factored = storage.layer(replace(shared, factorization=stacked, **tensors))  # type: ignore[arg-type]
    return _reported(aligned, factored)


def _reported(aligned: _Aligned, factored: FactoredExperts) -> Compressed:
    experts, count = aligned.experts, aligned.experts.num_experts
    lost, whole = dict.fromkeys(MATRICES, 0.0), dict.fromkeys(MATRICES, 0.0)
    for e in range(count):
        for matrix, weight in zip(MATRICES, aligned.original(e), strict=True):
            whole[matrix] += squared_norm(weight)
            lost[matrix] += squared_norm(weight.sub_(factored.materialize_matrix(matrix, e)))
    report = Report(
        **weight_errors(lost, whole),
        **aligned.reported,
        bytes_dense=experts.nbytes(),
        bytes_now=factored.nbytes(),
    )
    warn_if_not_smaller("resmoe", report, "lower retain")
    return Compressed(factored, report)


def _fitted(
    aligned: _Aligned,
    moments: LayerMoments,
    residual: str,
    retain: float,
    allotted: dict[str, list[int]] | None,
    storage: Storage,
    progress: Progress | None,
) -> FactoredExperts:
    """The same form fitted under moments. allotted: ranks, by matrix, where a plan says them"""
    dtype = aligned.experts.gate_up.dtype
    experts, own = in_neuron_order(aligned.experts, moments, aligned.permutations)
    problems = [problem_of(experts, own, m, RIDGE) for m in MATRICES]
    base = storage.payload("base_gate_up") or dtype
    if residual == "lowrank":
        ranks = [allotted[m] for m in MATRICES] if allotted else ranks_under(problems, aligned.base, retain)
    made: dict[str, Fitted] = {}
    for i, matrix in enumerate(MATRICES):
        if progress is not None:
            progress(f"fitting: {matrix}")
        if residual == "lowrank":
            made[matrix] = fit_low_rank(problems[i], ranks[i], base=base, factors=storage.payload("v_gate_up") or dtype)
        else:
            payload = storage.payload("values_gate_up")
            assert payload is not None  # check_storage
            made[matrix] = fit_full(problems[i], payload, base=base)
    return assembled(experts, made)


@dataclass(frozen=True, eq=False)
class _Aligned:
    """Experts in one neuron order, with the base as it will be stored; of a report what alignment has to say."""

    experts: DenseExperts
    permutations: Tensor
    base: Sequence[Tensor]
    reported: dict[str, Any]

    def original(self, e: int) -> tuple[Tensor, Tensor]:
        return in_order(self.experts, e, self.permutations[e])

    def residual(self, e: int) -> tuple[Tensor, Tensor]:
        gate_up, down = self.original(e)
        return gate_up.sub_(self.base[0]), down.sub_(self.base[1])


def _align(experts: DenseExperts, init: str, solver: str, progress: Progress | None) -> _Aligned:
    found = barycenter(experts, init=init, solver=solver, progress=progress)
    reported = {
        "cosine_before": mean_cosine(experts),
        "cosine_after": mean_cosine(experts, found.permutations),
        "iterations": found.iterations,
        "objective": found.objective,
        "converged": found.converged,
    }
    return _Aligned(experts, found.permutations, _base(experts, found.center), reported)


def _planned(experts: DenseExperts, plan: dict[str, Any]) -> _Aligned:
    """What was aligned for the plan, as it was then."""
    center = mean_design(experts, plan["permutations"])
    return _Aligned(experts, plan["permutations"], _base(experts, center), plan["reported"])


def _base(experts: DenseExperts, center: Tensor) -> list[Tensor]:
    return [matrix.to(experts.gate_up.dtype) for matrix in split_design(center, experts)[:2]]


# ---- budgets over layers


def measures(*, budget: str, **_: Any) -> bool:
    """Whether these settings need every layer measured before the first is compressed."""
    return budget != "uniform"


def measure(
    experts: DenseExperts,
    *,
    residual: str,
    retain: float,
    factorization: str,
    sparse_layout: str,
    budget: str,
    init: str,
    solver: str,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """What ``plan`` asks of a layer: permutations, energies of the weights, and the Curves of its residuals' form."""
    check_settings(residual, retain, factorization, sparse_layout, budget, init, solver)
    aligned, count = _align(experts, init, solver, progress), experts.num_experts
    energy = torch.tensor([[squared_norm(w) for w in aligned.original(e)] for e in range(count)], dtype=torch.float64)

    def residual_of(e: int) -> tuple[Tensor, Tensor]:
        if progress is not None:
            progress(f"measure: expert {e + 1} of {count}")
        return aligned.residual(e)

    how: dict[str, Any] = {"retain": retain, "width": experts.gate_up.element_size()}
    if residual == "lowrank":
        curves = low_rank_curves(residual_of, count, factorization=factorization, gated=experts.gated, **how)
    else:
        curves = (bitmap_curves if sparse_layout == "bitmap" else block_curves)(residual_of, count, **how)
    reported = {f"reported.{name}": _scalar(value) for name, value in aligned.reported.items()}
    return {"permutations": aligned.permutations, "energy": energy, **curves.tensors(), **reported}


def _scalar(value: bool | float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def plan(
    model: DenseModel,
    chosen: Sequence[int],
    *,
    measured: Sequence[dict[str, Tensor]] = (),
    statistics: Statistics | None = None,
    residual: str,
    budget: str,
    **_: Any,
) -> list[dict[str, Any]]:
    """What every layer is allotted: nothing where the budget is uniform.

    measured: of each chosen layer, from ``measure``;  statistics: for budget="usage"
    Returns for each ``permutations``; ``reported``, what its report says of alignment; and ``allotted``, by matrix
    ranks, counts or numbers of 32.
    """
    if budget == "uniform":
        return [{} for _ in chosen]
    layers = [Curves.from_tensors(m) for m in measured]
    weights = []
    for i, curves, of_layer in zip(chosen, layers, measured, strict=True):
        energy = dict(zip(MATRICES, of_layer["energy"].T, strict=True))
        if len(curves.gains) == 1:  # joint
            energy = {"gate_up": of_layer["energy"].sum(1)}
        counts = None
        if budget == "usage":
            assert statistics is not None
            counts = statistics.layers[model.experts[i].path].count
            warn_of_unreached(model.experts[i].path, counts, "they count as one token each")
        weights.append(weights_of_errors(energy, counts))

    def in_units(curves: Curves, matrix: str, parameters: list[int]) -> Any:
        if residual == "lowrank":
            return [RANK_BLOCK * p // curves.prices[matrix] for p in parameters]
        if curves.divisible:
            return parameters
        return BLOCK_KEPT[0] * (1 + parameters[0] // (len(curves.gains[matrix]) * curves.prices[matrix]))

    return [
        {
            "permutations": of_layer["permutations"],
            "reported": {n.removeprefix("reported."): t.item() for n, t in of_layer.items() if "reported." in n},
            "allotted": {m: in_units(curves, m, parameters) for m, parameters in shares.items()},
        }
        for of_layer, curves, shares in zip(measured, layers, allot(layers, weights), strict=True)
    ]


def peak_bytes(experts: DenseExperts, *, solver: str, retain: float, residual: str, **_: Any) -> int:
    """Bytes at the peak, the layer of E experts included; its tensors may be on meta.

        max of align      layer + 4 design + scores, or, with POT, layer + (2 E + 2) design64 + 4 scores64
               residual   layer + base + min(2.5 retain, 1) layer + 3 design      1/2 layer for a full one

    design: (I, D), one expert in float32;  scores: (I, I);  of 64: in float64. Of the layers of
    benchmarks/results/layer.csv, which took 6.0, 2.1 and 2.2 GiB with the process around, it says 6.6, 1.8 and 1.9.
    """
    layer, count = experts.nbytes(), experts.num_experts
    design = 4 * sum(m.numel() for m in (experts.gate_up, experts.down)) // count
    scores = 4 * experts.intermediate_size**2
    align = layer + 4 * design + scores
    share = 0.5 if residual == "full" else min(2.5 * retain, 1)
    fitting = int(layer * (1 + 1 / count + share)) + 3 * design
    if solver == "pot":
        align = layer + 2 * ((2 * count + 2) * design + 4 * scores)
    return max(align, fitting)


def less_memory(*, solver: str, **_: Any) -> str | None:
    return "use solver='assignment', which needs less" if solver == "pot" else None


def needs_statistics(*, budget: str, **_: Any) -> bool:
    return budget == "usage"


def fits(*, residual: str, factorization: str, **_: Any) -> bool:
    return residual == "full" or (residual == "lowrank" and factorization == "stacked")


def check_settings(
    residual: str, retain: float, factorization: str, sparse_layout: str, budget: str, init: str, solver: str
) -> None:
    """Raises what ``resmoe`` would raise for its settings, before there are experts to compress."""
    check_known("residual", residual, RESIDUALS)
    check_known("factorization", factorization, FACTORIZATIONS)
    check_known("sparse_layout", sparse_layout, SPARSE_LAYOUTS)
    check_known("budget", budget, BUDGETS)
    check_known("init", init, INITS)
    check_known("solver", solver, SOLVERS)
    if not 0 < retain <= 1:
        raise ValueError(f"retain: must be in (0, 1], got {retain}")
    if residual == "full" and budget != "uniform":
        raise ValueError(f"budget: a full residual has nothing to allot, so it must be uniform, got {budget!r}")
    if (residual, sparse_layout) == ("sparse", "block"):
        block_kept(retain)
        if budget != "uniform" and retain < BLOCK_KEPT[0] / BLOCK:
            raise ValueError(
                f"retain: the block layout keeps at least {BLOCK_KEPT[0]} of {BLOCK}, so that a mean is at least "
                f"{BLOCK_KEPT[0] / BLOCK}, got {retain}; use sparse_layout='bitmap', or budget='uniform' to round up"
            )


def check_storage(storage: Storage, *, residual: str, **_: Any) -> None:
    """Raises ValueError where a full residual is not to be codes."""
    if residual == "full" and storage.of_part(base=False) is None:
        raise ValueError(
            "residual: 'full' needs bits, 8, 4, 3 or 2, or residual_bits; in floats it would be larger than the layer"
        )


def _permuted_bias(experts: DenseExperts, permutations: Tensor) -> Tensor | None:
    if experts.bias_gate_up is None:
        return None
    halves = experts.bias_gate_up.unflatten(1, (-1, experts.intermediate_size))
    order = permutations.to(halves.device).unsqueeze(1).expand_as(halves)
    return halves.gather(2, order).flatten(1)
