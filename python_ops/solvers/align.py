"""Alignment: neurons have no order of their own, so every expert may be permuted to match the others.

Row i of an expert's design matrix is one hidden neuron, that is, everything that moves when neurons move:

    [gate_i | up_i | down[:, i] | bias_gate_i | bias_up_i]        (I, D), D = 3H + 2

without the up columns where there is no gate, and without the bias columns where there are no biases. The
bias of down belongs to outputs, not to neurons. An expert is the same function in any order of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.solvers.assignment import assign, import_or_say

INITS = ("progressive", "mean")
SOLVERS = ("assignment", "pot")
Progress = Callable[[str], None]  # called with a short phrase after every step


@dataclass(frozen=True, eq=False)
class Barycenter:
    """The matrix nearest to all experts, each in its best neuron order.

        objective = (1/E) sum_e ||W_e[permutations_e] - center||_F^2

    center: (I, D) float32, the mean of the permuted design matrices W_e[permutations_e]
    permutations: (E, I) int64, row i of the aligned expert e is row permutations[e, i] of the original
    iterations: sweeps over the experts, the start not counted
    converged: whether it ended by itself: no expert has a better order, or the last sweep gained too little
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
    design = experts.down.new_empty(experts.intermediate_size, sum(c.shape[1] for c in columns), dtype=torch.float32)
    start = 0
    for column in columns:
        end = start + column.shape[1]
        design[:, start:end] = column.contiguous()  # transposing and converting in one step took twice as long
        start = end
    return design


def in_order(experts: DenseExperts, e: int, permutation: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up (2I, H) or (I, H) and down (H, I) of expert e, float32, its neurons permuted: permutation (I,) int64."""
    order = permutation.to(experts.down.device)
    halves = experts.gate_up[e].unflatten(0, (-1, experts.intermediate_size))
    return halves[:, order].flatten(0, 1).float(), experts.down[e][:, order].float()


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
    init: str = "progressive",
    max_iter: int = 100,
    tolerance: float = 1e-3,
    solver: str = "assignment",
    progress: Progress | None = None,
) -> Barycenter:
    """The Wasserstein barycenter of the experts' neurons, as many atoms as neurons, uniform weights.

        min over center and pi_e of (1/E) sum_e ||W_e[pi_e] - center||_F^2
            = (1/E) sum_e ||W_e||_F^2 - max over pi_e of ||(1/E) sum_e W_e[pi_e]||_F^2

    Between two uniform measures of I atoms some optimal transport plan is a permutation, so only orders are sought:
    one expert after the other gets the best order for the sum of all others, which takes its place at once,

        pi_e = argmax_pi <W_e[pi], sum_{f != e} W_f[pi_f]>

    The objective never rises and permutations are finitely many: it is finished, in a local minimum, when every
    expert keeps its order. The paper assigns all experts to their mean and takes the mean again: that holds every
    expert back by its own share in the mean, and all minima of this descent are fixed points of that one.

    experts: the layer; one design matrix at a time is held in float32 beside the sum, and one (I, I) matrix
    init: the orders to start from: ``progressive`` (expert 0 in its own, each next one assigned to the sum of those
        before it: E - 1 assignments) or ``mean`` (every expert in its own: none, enough for experts that share an
        ancestor)
    max_iter: sweeps over all experts at most
    tolerance: a sweep that lowers the objective by less than this part of it is the last; 0 goes on to a minimum. The
        default took 3 sweeps instead of 29 on a trained layer of 32 experts and got 98 % of what the minimum explains.
        It stops short where many experts share very little: 64 with a planted cosine of 0.05 needed the minimum
    solver: ``assignment`` (the above) or ``pot`` (the paper's, for comparison on small layers: POT's
        free_support_barycenter from expert 0, or from the mean for ``mean``, without tolerance; an (I, I) linear
        program per expert and sweep, and the whole layer in float64)

    Raises ValueError: init or solver unknown, max_iter < 1, tolerance outside [0, 1), weights not finite, a package
    missing.
    Source: ResMoE, arXiv 2503.06881, proposition 4.1; Cuturi and Doucet, ICML 2014, algorithm 2. Differs in start and
    descent, as above.
    """
    if init not in INITS:
        raise ValueError(f"init: must be one of {', '.join(INITS)}, got {init!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if max_iter < 1:
        raise ValueError(f"max_iter: must be at least 1, got {max_iter}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: must be in [0, 1), got {tolerance}; 0 stops only in a minimum")
    energy = 0.0
    for e in range(experts.num_experts):
        design = design_matrix(experts, e)
        if not bool(torch.stack(torch.aminmax(design)).isfinite().all()):
            raise ValueError(f"experts: must be finite, expert {e} has an inf or a nan; check the checkpoint")
        energy += squared_norm(design) / experts.num_experts

    own = torch.arange(experts.intermediate_size).repeat(experts.num_experts, 1)
    if solver == "pot":
        center = design_matrix(experts, 0) if init == "progressive" else mean_design(experts, own)
        permutations, iterations, converged = _free_support(experts, center, own, max_iter, progress)
    else:
        permutations, iterations, converged = _descend(experts, own, energy, init, max_iter, tolerance, progress)
    center = mean_design(experts, permutations)
    objective = 0.0
    for e, permutation in enumerate(permutations):
        residual = design_matrix(experts, e)
        _add(residual, center, permutation.argsort(), -1)  # in the expert's own order
        objective += squared_norm(residual) / experts.num_experts
    return Barycenter(center, permutations, iterations, objective, converged)


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
            if permutations is None:
                total.add_(design, alpha=1 / norm)
            else:
                _add(total, design, permutations[e], 1 / norm)
    return (squared_norm(total) - nonzero) / (count * (count - 1))


def mean_design(experts: DenseExperts, permutations: Tensor) -> Tensor:
    """The mean of the permuted design matrices: (I, D) float32.  permutations: (E, I) int64"""
    return _sum(experts, permutations).div_(experts.num_experts)


def squared_norm(matrix: Tensor) -> float:
    """The sum of squares of a (N, K) matrix: rows in its own dtype, their sum in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def relative(lost: float, whole: float) -> float:
    """sqrt(lost / whole) of two sums of squares: a relative error; 0 where there was nothing to lose."""
    return math.sqrt(lost / whole) if whole else 0.0


def _add(total: Tensor, design: Tensor, permutation: Tensor, factor: float = 1) -> None:
    """total += factor * design[permutation], without a permuted copy."""
    total.index_add_(0, permutation.argsort().to(total.device), design, alpha=factor)


def _sum(experts: DenseExperts, permutations: Tensor) -> Tensor:
    """The sum of the permuted design matrices: (I, D) float32, always in the order of the experts."""
    total = torch.zeros_like(design_matrix(experts, 0))
    for e, permutation in enumerate(permutations):
        _add(total, design_matrix(experts, e), permutation)
    return total


def _place(experts: DenseExperts, e: int, total: Tensor, current: Tensor, counted: bool) -> Tensor:
    """The best order of expert e for the sum of others, to which it is added in that order.

    counted: whether the sum holds it in its current order, from where it is taken out first
    """
    design = design_matrix(experts, e)
    if counted:
        _add(total, design, current, -1)
    best = assign(total, design, current, half=experts.gate_up.dtype == torch.bfloat16)
    _add(total, design, best)
    return best


def _descend(
    experts: DenseExperts,
    permutations: Tensor,
    energy: float,
    init: str,
    max_iter: int,
    tolerance: float,
    progress: Progress | None,
) -> tuple[Tensor, int, bool]:
    count, permutations = experts.num_experts, permutations.clone()
    say = progress or (lambda _: None)
    kept = 0  # how many experts in a row, up to this one, are in the best order for the others as they are now
    if init == "progressive":
        total, kept = design_matrix(experts, 0), 1
        for e in range(1, count):
            permutations[e] = _place(experts, e, total, permutations[e], counted=False)
            say(f"align: start, expert {e + 1} of {count}")
    else:
        total = _sum(experts, permutations)
    objective = energy - squared_norm(total) / count**2
    for sweep in range(1, max_iter + 1):
        before = permutations.clone()
        for e in range(count):
            best = _place(experts, e, total, permutations[e], counted=True)
            kept = kept + 1 if torch.equal(best, permutations[e]) else 1
            permutations[e] = best
            say(f"align: sweep {sweep}, expert {e + 1} of {count}")
            if kept >= count:
                return permutations, sweep, True
        # Summed anew, so that what additions and subtractions round off does not add up over sweeps.
        total = _sum(experts, permutations)
        lower = energy - squared_norm(total) / count**2
        if lower > objective:  # by rounding: what float32 scores call better need not be
            return before, sweep, True
        if objective - lower <= tolerance * objective:
            return permutations, sweep, True
        objective = lower
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
