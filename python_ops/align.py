"""Alignment: neurons have no order of their own, so every expert may be permuted to match the others.

Row i of an expert's design matrix is one hidden neuron, that is, everything that moves when neurons move:

    [gate_i | up_i | down[:, i] | bias_gate_i | bias_up_i]        (I, D), D = 3H + 2

without the up columns where there is no gate, and without the bias columns where there are no biases. The
bias of down belongs to outputs, not to neurons. An expert is the same function in any order of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.assignment import assign, import_or_say

INITS = ("first", "mean")
SOLVERS = ("assignment", "pot")
Progress = Callable[[str], None]  # called with a short phrase after every step


@dataclass(frozen=True, eq=False)
class Barycenter:
    """The matrix nearest to all experts, each in its best neuron order.

        objective = (1/E) sum_e ||W_e[permutations_e] - center||_F^2

    center: (I, D) float32, the mean of the permuted design matrices W_e[permutations_e]
    permutations: (E, I) int64, row i of the aligned expert e is row permutations[e, i] of the original
    iterations: sweeps over the experts;  converged: whether the last one changed nothing
    """

    center: Tensor
    permutations: Tensor
    iterations: int
    objective: float
    converged: bool


def design_matrix(experts: DenseExperts, e: int) -> Tensor:
    """The design matrix of one expert: (I, D) float32, see the head of this file."""
    halves = 2 if experts.gated else 1
    columns = [*experts.gate_up[e].chunk(halves), experts.down[e].T]
    if experts.bias_gate_up is not None:
        columns += [b.unsqueeze(1) for b in experts.bias_gate_up[e].chunk(halves)]
    return torch.cat(columns, dim=1).float()


def split_design(design: Tensor, like: DenseExperts) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of ``design_matrix`` for experts shaped as ``like``.

    design: (I, D) float
    Returns gate_up (2I, H) or (I, H), down (H, I) and bias_gate_up (2I,) or (I,), None where there is none.
    """
    halves = 2 if like.gated else 1
    biases = 0 if like.bias_gate_up is None else halves
    columns = design.split([like.hidden_size] * (halves + 1) + [1] * biases, dim=1)
    bias = torch.cat(columns[halves + 1 :]).squeeze(1) if biases else None
    return torch.cat(columns[:halves]), columns[halves].T.contiguous(), bias


def barycenter(
    experts: DenseExperts,
    *,
    init: str = "first",
    max_iter: int = 100,
    solver: str = "assignment",
    progress: Progress | None = None,
) -> Barycenter:
    """The Wasserstein barycenter of the experts' neurons, as many atoms as neurons, uniform weights.

        min over center and pi_e of (1/E) sum_e ||W_e[pi_e] - center||_F^2

    Between two uniform measures of I atoms some optimal transport plan is a permutation, so the free-support
    barycenter alternates between assigning every expert to the center and taking the mean. The objective
    never rises and permutations are finitely many: it is finished, in a local minimum, when none changes.

    experts: the layer; only one design matrix at a time is held in float32 beside the center
    init: the first center, ``first`` (expert 0, the paper's) or ``mean`` (of the experts in their own order)
    max_iter: sweeps at most
    solver: ``assignment`` (the above) or ``pot`` (POT's free_support_barycenter: an (I, I) linear program per
        expert and the whole layer in float64, for comparison on small layers)

    Raises ValueError: init or solver unknown, max_iter < 1, weights not finite, a package missing.
    Source: ResMoE, arXiv 2503.06881, proposition 4.1; Cuturi and Doucet, ICML 2014, algorithm 2.
    """
    if init not in INITS:
        raise ValueError(f"init: must be one of {', '.join(INITS)}, got {init!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if max_iter < 1:
        raise ValueError(f"max_iter: must be at least 1, got {max_iter}")
    for e in range(experts.num_experts):
        if not bool(design_matrix(experts, e).isfinite().all()):
            raise ValueError(f"experts: must be finite, expert {e} has an inf or a nan; check the checkpoint")

    identity = torch.arange(experts.intermediate_size).repeat(experts.num_experts, 1)
    start = design_matrix(experts, 0) if init == "first" else _mean(experts, identity)
    solve = _alternate if solver == "assignment" else _free_support
    permutations, iterations, converged = solve(experts, start, identity, max_iter, progress)
    center = _mean(experts, permutations)
    distances = [squared_norm(design_matrix(experts, e)[p] - center) for e, p in enumerate(permutations)]
    return Barycenter(center, permutations, iterations, sum(distances) / len(distances), converged)


def mean_cosine(experts: DenseExperts, permutations: Tensor | None = None) -> float:
    """Mean cosine similarity of the experts' flattened design matrices over all pairs.

        (||sum_e W_e / ||W_e|| ||^2 - E) / (E (E - 1))

    which needs one pass and no pair. An expert of zeros counts as orthogonal to all; a single expert gives 1.

    permutations: (E, I) int64 neuron orders, None for the experts' own
    """
    count = experts.num_experts
    if count == 1:
        return 1.0
    total = torch.zeros_like(design_matrix(experts, 0))
    nonzero = 0
    for e in range(count):
        design = design_matrix(experts, e)
        norm = squared_norm(design) ** 0.5
        if norm > 0:
            nonzero += 1
            total += (design if permutations is None else design[permutations[e]]) / norm
    return (squared_norm(total) - nonzero) / (count * (count - 1))


def squared_norm(matrix: Tensor) -> float:
    """The sum of squares of a (N, K) matrix: rows in its own dtype, their sum in float64."""
    return float(matrix.square().sum(1).double().sum())


def _mean(experts: DenseExperts, permutations: Tensor) -> Tensor:
    total = torch.zeros_like(design_matrix(experts, 0))
    for e, permutation in enumerate(permutations):
        total += design_matrix(experts, e)[permutation]
    return total / len(permutations)


def _alternate(
    experts: DenseExperts, center: Tensor, permutations: Tensor, max_iter: int, progress: Progress | None
) -> tuple[Tensor, int, bool]:
    permutations = permutations.clone()
    for sweep in range(1, max_iter + 1):
        before = permutations.clone()
        for e in range(experts.num_experts):
            permutations[e] = assign(center, design_matrix(experts, e), permutations[e])
            if progress is not None:
                progress(f"align: sweep {sweep}, expert {e + 1} of {experts.num_experts}")
        # The first center is a start, not a mean, so a first sweep without a change proves nothing.
        if sweep > 1 and torch.equal(before, permutations):
            return permutations, sweep, True
        if sweep < max_iter:
            center = _mean(experts, permutations)
    return permutations, max_iter, False


def _free_support(
    experts: DenseExperts, center: Tensor, permutations: Tensor, max_iter: int, progress: Progress | None
) -> tuple[Tensor, int, bool]:
    ot, threshold = import_or_say("ot"), 1e-14
    designs = [design_matrix(experts, e) for e in range(experts.num_experts)]
    uniform = torch.full((experts.intermediate_size,), 1 / experts.intermediate_size, dtype=torch.float64)
    atoms, log = ot.lp.free_support_barycenter(
        [d.double().cpu().numpy() for d in designs],
        [uniform.numpy()] * len(designs),
        center.double().cpu().numpy(),
        numItermax=max_iter,
        stopThr=threshold,
        log=True,
    )
    moved = log["displacement_square_norms"]
    if progress is not None:
        progress(f"align: POT, {len(moved)} sweeps")
    target = torch.from_numpy(atoms).to(center)
    permutations = torch.stack([assign(target, d, p) for d, p in zip(designs, permutations, strict=True)])
    return permutations, len(moved), bool(moved[-1] <= threshold)
