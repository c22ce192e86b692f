"""ResMoE: one barycenter shared by all experts of a layer, and a compressed residual for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resmoe_kernels.factored import FACTORIZATIONS, MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.align import (
    INITS,
    SOLVERS,
    Progress,
    barycenter,
    design_matrix,
    mean_cosine,
    split_design,
    squared_norm,
)
from resmoe_kernels.python_ops.factorize import low_rank
from resmoe_kernels.python_ops.methods import Compressed, check_known, warn_if_not_smaller, weight_errors
from resmoe_kernels.python_ops.prune import bitmap, block, block_kept

RESIDUALS = ("lowrank", "sparse")
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
    init: str = "first",
    solver: str = "assignment",
    progress: Progress | None = None,
) -> Compressed:
    """Compresses a layer of experts to a shared base and one residual each.

        B, pi = barycenter(W)          neurons matched across experts, B their mean, in the experts' dtype
        Delta_e = W_e[pi_e] - B        against the rounded base, so that its rounding is not lost
        W_e[pi_e] ~ B + U_e V_e        residual="lowrank", see low_rank for ``factorization``
        W_e[pi_e] ~ B + S_e            residual="sparse", see block and bitmap for ``sparse_layout``

    An expert does not change when its neurons are permuted, so nothing is permuted back. Biases move with
    their neurons and keep their values. No data is needed and the router stays as it is.

    experts: the layer, in any floating-point type, which base and residual keep; worked on one expert at a
        time in float32
    retain: the part of the residual's parameters to keep, in (0, 1]. The base and indices come on top: the
        report has the sizes. The block layout rounds it down to 4, 8, 12 or 16 of 32, and up to 4
    init, solver: see barycenter
    progress: called with a short phrase after every step

    Raises ValueError naming the argument, what it may be and what came. Warns where the result is no smaller.
    Source: ResMoE, KDD 2025, arXiv 2503.06881. Differs from the paper: ``stacked`` and ``block``, the forms
    that kernels serve, are the defaults where the paper has ``joint`` and ``bitmap``; ranks follow the energy
    instead of being one number; the residual is taken against the base as stored.
    """
    check_settings(residual, retain, factorization, sparse_layout, init, solver)
    dtype, count = experts.gate_up.dtype, experts.num_experts

    aligned = barycenter(experts, init=init, solver=solver, progress=progress)
    base_gate_up, base_down = (m.to(dtype) for m in split_design(aligned.center, experts)[:2])

    def original(e: int) -> tuple[Tensor, Tensor]:
        return split_design(design_matrix(experts, e)[aligned.permutations[e]], experts)[:2]

    def residual_of(e: int) -> tuple[Tensor, Tensor]:
        if progress is not None:
            progress(f"residual: expert {e + 1} of {count}")
        gate_up, down = original(e)
        return gate_up.sub_(base_gate_up), down.sub_(base_down)

    if residual == "lowrank":
        tensors = low_rank(
            residual_of, count, retain=retain, factorization=factorization, gated=experts.gated, dtype=dtype
        )
    elif sparse_layout == "bitmap":
        tensors = bitmap(residual_of, count, retain=retain, dtype=dtype)
    else:
        tensors = block(residual_of, count, kept=block_kept(retain), dtype=dtype)

    factored = FactoredExperts(
        num_experts=count,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        gated=experts.gated,
        factorization=factorization if residual == "lowrank" else "stacked",
        group=torch.zeros(count, dtype=torch.int32, device=experts.gate_up.device),
        base_gate_up=base_gate_up.unsqueeze(0),
        base_down=base_down.unsqueeze(0),
        bias_gate_up=_permuted_bias(experts, aligned.permutations),
        bias_down=experts.bias_down,
        **tensors,  # type: ignore[arg-type]
    )

    lost, whole = dict.fromkeys(MATRICES, 0.0), dict.fromkeys(MATRICES, 0.0)
    for e in range(count):
        for matrix, weight in zip(MATRICES, original(e), strict=True):
            whole[matrix] += squared_norm(weight)
            lost[matrix] += squared_norm(weight.sub_(factored.materialize_matrix(matrix, e)))
    report = Report(
        **weight_errors(lost, whole),
        cosine_before=mean_cosine(experts),
        cosine_after=mean_cosine(experts, aligned.permutations),
        iterations=aligned.iterations,
        objective=aligned.objective,
        converged=aligned.converged,
        bytes_dense=experts.nbytes(),
        bytes_now=factored.nbytes(),
    )
    warn_if_not_smaller("resmoe", report, "lower retain")
    return Compressed(factored, report)


def needs_statistics(**_: Any) -> bool:
    return False


def check_settings(
    residual: str, retain: float, factorization: str, sparse_layout: str, init: str, solver: str
) -> None:
    """Raises what ``resmoe`` would raise for its settings, before there are experts to compress."""
    check_known("residual", residual, RESIDUALS)
    check_known("factorization", factorization, FACTORIZATIONS)
    check_known("sparse_layout", sparse_layout, SPARSE_LAYOUTS)
    check_known("init", init, INITS)
    check_known("solver", solver, SOLVERS)
    if not 0 < retain <= 1:
        raise ValueError(f"retain: must be in (0, 1], got {retain}")
    if (residual, sparse_layout) == ("sparse", "block"):
        block_kept(retain)


def _permuted_bias(experts: DenseExperts, permutations: Tensor) -> Tensor | None:
    if experts.bias_gate_up is None:
        return None
    halves = experts.bias_gate_up.unflatten(1, (-1, experts.intermediate_size))
    order = permutations.to(halves.device).unsqueeze(1).expand_as(halves)
    return halves.gather(2, order).flatten(1)
