"""Fit: of a size named by the user the best model there is in it, its form chosen per layer and matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resmoe_kernels.factored import CODED, MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.parts import SCALES, payloads_text
from resmoe_kernels.payload import Payload, decode
from resmoe_kernels.python_ops.methods.method import Compressed, warn_if_not_smaller, weight_errors
from resmoe_kernels.python_ops.solvers.align import Progress, barycenter, in_order, squared_norm
from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK, block_energies
from resmoe_kernels.python_ops.solvers.fits import ROUNDS, Fitted, Matrix, Stored, fit_full, fit_low_rank
from resmoe_kernels.python_ops.solvers.moments import drawn_to_layer, lower_roots, shrunk_moments
from resmoe_kernels.python_ops.solvers.size_plan import Candidate, plan_sizes
from resmoe_kernels.python_ops.solvers.spectra import spectrum

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments
    from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
    from resmoe_kernels.python_ops.models.dense_model import DenseModel

BASES = ("auto", "always", "never")
RIDGE = 0.05
MEASURING_RIDGE = 1.0  # forms are chosen for text of every kind: by moments further drawn to the identity
GROUP = 128
FACTORS = Payload(4, GROUP)
LOW_RANK_BASE = Payload(4, GROUP)
VALUES = (2, 3, 4)  # bits of full residuals
FULL_BASES = (2, 3)  # bits of bases beside them: what a base's codes lose, the residual's make up for
MEASURED_EXPERTS = 8  # of a layer, on which full residuals are tried
_MEASURED_RANK = 1 / 8  # of what low rank may cost, at which the base is fitted that spectra are taken beside
_FACTOR_NOISE = 0.03  # of the energy that low rank keeps, what 4 bits lose of it under the moments


@dataclass(frozen=True)
class Report:
    """What the compression of one layer did; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    relative_error: ||W - W'||_F / ||W||_F, W' from the stored tensors; relative_error_gate_up and relative_error_down
        for each matrix alone. Fits under moments raise these where inputs are small
    output_error: of the layer's output over the calibration tokens, ||dF|| / ||F|| with the experts' errors taken as
        independent, under the shrunk moments; of the weights again where there was no data
    form_gate_up, form_down: what was chosen
    bytes_dense, bytes_now: of every tensor of the layer, indices and base included
    """

    relative_error: float
    relative_error_gate_up: float
    relative_error_down: float
    output_error: float
    form_gate_up: str
    form_down: str
    bytes_dense: int
    bytes_now: int


def fit(
    experts: DenseExperts,
    *,
    size: float | str | None = None,
    bits_per_weight: float | None = None,
    base: str = "auto",
    ridge: float = RIDGE,
    rounds: int = ROUNDS,
    statistics: LayerStatistics | None = None,
    plan: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compresses a layer as planned, each matrix in the form that costs the layer's output least for its bytes:

        W_e ~ B + U_e V_e     low rank in 4 bits, ranks by expert, with a base in 4 bits or none
        W_e ~ B + R_e         codes of 2, 3 or 4 bits for every weight, with a base in 2 or 3 bits or none

    fitted under the moments of each expert's inputs, see fits.py; without calibration under the identity.

    size: of all experts together: a share of the dense bytes, up to 1, or bytes as in ``6GiB``, ``500MB``
    bits_per_weight: the same as bits for each dense weight; one of the two must be given
    base: ``auto`` leaves it out where it does not pay
    ridge: how far moments are drawn to the identity, see shrunk_moments. The default is the one with the least KL on
        text of another domain that costs none in the domain of the calibration, see benchmarks/results/fits-*.csv
    rounds: of base and low rank in turn
    statistics, plan: the layer's, and what ``plan`` decided for it

    Raises ValueError naming the argument, what it may be and what came.
    """
    check_settings(size, bits_per_weight, base, ridge, rounds)
    if plan is None:
        raise ValueError("plan: needed, because what a layer gets depends on the others; see plan, got None")
    moments = None if statistics is None else statistics.expert_moments()
    aligned, moments = _in_order(experts, moments, plan["permutations"] if plan["base"] else None)
    fitted: dict[str, Fitted] = {}
    output_lost = output_whole = 0.0
    for matrix in MATRICES:
        if progress is not None:
            progress(f"fitting: {matrix}")
        form, problem = plan[matrix], _matrix(aligned, moments, matrix, ridge)
        own_base = _payload(form["base"])
        if form["values"] is None:
            fitted[matrix] = fit_low_rank(problem, form["ranks"], base=own_base, factors=FACTORS, rounds=rounds)
        else:
            fitted[matrix] = fit_full(problem, Payload.parse(form["values"]), base=own_base)
        output_lost += problem.error(fitted[matrix].weights)
        if matrix == "down":
            output_whole = problem.error(torch.zeros_like(fitted[matrix].weights))
    factored = _assembled(aligned, fitted)
    whole = {m: squared_norm(getattr(aligned, m).float()) for m in MATRICES}
    lost = {m: squared_norm(getattr(aligned, m).float() - fitted[m].weights) for m in MATRICES}
    report = Report(
        **weight_errors(lost, whole),
        output_error=(output_lost / output_whole) ** 0.5 if output_whole else 0.0,
        form_gate_up=_described(plan["gate_up"]),
        form_down=_described(plan["down"]),
        bytes_dense=experts.nbytes(),
        bytes_now=factored.nbytes(),
    )
    warn_if_not_smaller("fit", report, "lower size")
    return Compressed(factored, report)


def needs_statistics(**_: Any) -> bool:
    return False


def fits(**_: Any) -> bool:
    return True


def check_settings(
    size: float | str | None, bits_per_weight: float | None, base: str, ridge: float, rounds: int
) -> None:
    """Raises what ``fit`` would raise for its settings, before there are experts to compress."""
    if base not in BASES:
        raise ValueError(f"base: must be one of {', '.join(BASES)}, got {base!r}")
    if (size is None) == (bits_per_weight is None):
        raise ValueError("size: give it or bits_per_weight, one of the two, as in size=0.1, '6GiB' or 1.5 bits")
    if isinstance(size, str):
        _bytes_of(size)
    elif size is not None and not 0 < size <= 1:
        raise ValueError(f"size: a share of the dense bytes must be in (0, 1], got {size}; bytes are like '6GiB'")
    if bits_per_weight is not None and not 0 < bits_per_weight <= 64:
        raise ValueError(f"bits_per_weight: must be in (0, 64], got {bits_per_weight}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge: must be above 0 and finite, got {ridge}")
    if rounds < 0:
        raise ValueError(f"rounds: must be at least 0, got {rounds}")


def _bytes_of(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"size: must be a share in (0, 1], or bytes like '6GiB' or '500MB', got {size!r}")
    power = "KMGT".find(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


# ---- the plan


def measures(**_: Any) -> bool:
    return True


def measure(
    experts: DenseExperts,
    *,
    statistics: LayerStatistics | None = None,
    progress: Progress | None = None,
    base: str,
    ridge: float,
    **_: Any,
) -> dict[str, Tensor]:
    """What ``plan`` asks of a layer: by way and matrix the errors of its candidates, as shares of what its experts add.

    The ways are ``none`` and ``base``, the latter of experts aligned to their barycenter, whose ``permutations`` are
    given. ``gains`` (E, n) float64 of 16 ranks each, ``whole`` (), the error of nothing, ``full`` (candidates,).
    """
    moments, ridge = (None, ridge) if statistics is None else (statistics.expert_moments(), max(ridge, MEASURING_RIDGE))
    made: dict[str, Tensor] = {}
    if base != "never":
        made["permutations"] = barycenter(experts, progress=progress).permutations
    for way in _ways(base):
        permutations = made["permutations"] if way == "base" else None
        aligned, own = _in_order(experts, moments, permutations)
        for matrix in MATRICES:
            if progress is not None:
                progress(f"measuring: {matrix}, {way}")
            found = _measured(_matrix(aligned, own, matrix, ridge), way == "base")
            made |= {f"{way}.{matrix}.{name}": tensor for name, tensor in found.items()}
    # Of the layer's output: what a layer adds to the stream is of another size in each.
    output = next(v for name, v in made.items() if name.endswith("down.whole"))
    scale = 1 / float(output) if float(output) else 1.0
    return {name: tensor if name == "permutations" else tensor * scale for name, tensor in made.items()}


def _ways(base: str) -> list[str]:
    return {"auto": ["none", "base"], "always": ["base"], "never": ["none"]}[base]


def _measured(problem: Matrix, with_base: bool) -> dict[str, Tensor]:
    count, rows, columns = problem.weights.shape
    center = torch.zeros(rows, columns)
    if with_base:
        rank = int(_MEASURED_RANK * rows * columns / (rows + columns) / RANK_BLOCK + 1) * RANK_BLOCK
        ranks = [min(rank, min(rows, columns) // RANK_BLOCK * RANK_BLOCK)] * count
        kept = fit_low_rank(problem, ranks, base=LOW_RANK_BASE, factors=torch.float32, rounds=1).base
        assert kept is not None and kept.scales is not None and kept.payload is not None
        center = decode(kept.tensor, kept.scales, kept.payload, columns)
    roots, energies = lower_roots(problem.moments), []
    for e, share in enumerate(problem.mass.tolist()):
        seen = (problem.weights[e].double() - center.double()) @ roots[e]
        if problem.rows is not None:
            seen *= problem.rows[e].double().unsqueeze(1)
        energies.append(share * block_energies(spectrum(seen)))
    gains = torch.stack(energies)
    some = torch.linspace(0, count - 1, min(count, MEASURED_EXPERTS)).round().long()
    sample = Matrix(
        problem.weights[some],
        problem.moments[some],
        problem.mass[some],
        None if problem.rows is None else problem.rows[some],
    )
    share = float(problem.mass.sum() / sample.mass.sum()) if float(sample.mass.sum()) else 1.0
    full = [
        sample.error(fit_full(sample, values, base=b, refits=0, unbias=False).weights) * share
        for values, b in _full(with_base)
    ]
    return {"gains": gains, "whole": gains.sum(), "full": torch.tensor(full, dtype=torch.float64)}


def _full(with_base: bool) -> list[tuple[Payload, Payload | None]]:
    """The candidates without ranks: how the values are stored and how the base."""
    bases = [Payload(b, GROUP) for b in FULL_BASES] if with_base else [None]
    return [(Payload(bits, GROUP), base) for bits in VALUES for base in bases]


def plan(
    model: DenseModel,
    chosen: Sequence[int],
    *,
    measured: Sequence[dict[str, Tensor]] = (),
    statistics: Statistics | None = None,
    size: float | str | None,
    bits_per_weight: float | None,
    base: str,
    **_: Any,
) -> list[dict[str, Any]]:
    """What every layer becomes: by matrix ``base`` and ``values``, texts of payloads or None, and ``ranks``; ``base``,
    whether it has one, and then ``permutations`` of its neurons.

    Raises ValueError where the size is below what any form takes, which it names, or above that of the dense experts.
    """
    shapes = [model.experts[i].read(dict(model.experts[i].module.named_parameters())) for i in chosen]
    dense = sum(m.numel() * m.element_size() for s in shapes for m in (s.gate_up, s.down))
    if bits_per_weight is not None:
        budget = int(bits_per_weight * sum(s.gate_up.numel() + s.down.numel() for s in shapes) / 8)
    else:
        budget = _bytes_of(size) if isinstance(size, str) else int(size * dense)  # type: ignore[operator]
    if budget > dense:
        raise ValueError(f"size: {budget:,} bytes are more than the dense experts' {dense:,}; leave them dense")
    layers = [
        [_candidates(shape, way, found) for way in _ways(base)] for shape, found in zip(shapes, measured, strict=True)
    ]
    plans = []
    indices = sum(4 * (2 * (s.num_experts + 1) + s.num_experts) for s in shapes)  # rank offsets and groups
    for found, taken in zip(measured, plan_sizes(layers, budget - indices), strict=True):
        with_base = taken["gate_up"].form["base"] is not None
        forms = {m: {**c.form, "ranks": list(c.ranks), "error": c.error, "bytes": c.bytes} for m, c in taken.items()}
        own = {"permutations": found["permutations"]} if with_base else {}
        plans.append({**forms, "base": with_base, **own})
    return plans


def _candidates(experts: DenseExperts, way: str, measured: dict[str, Tensor]) -> dict[str, Sequence[Candidate]]:
    candidates: dict[str, Sequence[Candidate]] = {}
    for matrix in MATRICES:
        count, rows, columns = getattr(experts, matrix).shape
        found = {name: measured[f"{way}.{matrix}.{name}"] for name in ("gains", "whole", "full")}
        own_base = LOW_RANK_BASE if way == "base" else None
        gains = (1 - _FACTOR_NOISE) * found["gains"]
        price = FACTORS.nbytes((RANK_BLOCK, columns)) + Payload(FACTORS.bits, 0).nbytes((RANK_BLOCK, rows))
        low_rank = Candidate(
            {"base": None if own_base is None else str(own_base), "values": None},
            float(found["whole"] - gains[:, 0].sum()),
            count * price + _nbytes(own_base, (rows, columns)),
            gains[:, 1:],
            price,
        )
        full = [
            Candidate(
                {"base": None if b is None else str(b), "values": str(values)},
                float(error),
                values.nbytes((count, rows, columns)) + _nbytes(b, (rows, columns)),
                gains[:, :0],
            )
            for (values, b), error in zip(_full(way == "base"), found["full"], strict=True)
        ]
        candidates[matrix] = [low_rank, *full]
    return candidates


def _nbytes(payload: Payload | None, shape: tuple[int, ...]) -> int:
    return 0 if payload is None else payload.nbytes(shape)


def _payload(text: str | None) -> Payload | None:
    return None if text is None else Payload.parse(text)


def _described(form: dict[str, Any]) -> str:
    parts = [] if form["base"] is None else [f"base {form['base']}"]
    if form["values"] is None:
        parts.append(f"low rank {sum(form['ranks']) / len(form['ranks']):.0f} {FACTORS}")
    else:
        parts.append(f"full {form['values']}")
    return " + ".join(parts)


# ---- the layer


def _in_order(
    experts: DenseExperts, moments: LayerMoments | None, permutations: Tensor | None
) -> tuple[DenseExperts, LayerMoments | None]:
    """Experts and moments with their neurons in another order, the same for None."""
    if permutations is None:
        return experts, moments
    pairs = [in_order(experts, e, permutations[e]) for e in range(experts.num_experts)]
    gate_up, down = (torch.stack(m) for m in zip(*pairs, strict=True))
    bias = experts.bias_gate_up
    if bias is not None:
        halves = bias.unflatten(1, (-1, experts.intermediate_size))
        bias = halves.gather(2, permutations.unsqueeze(1).expand_as(halves)).flatten(1)
    moved = DenseExperts(gate_up, down, bias, experts.bias_down, experts.gated)
    return moved, None if moments is None else moments.permuted(permutations)


def _matrix(experts: DenseExperts, moments: LayerMoments | None, matrix: str, ridge: float) -> Matrix:
    """The problem of one matrix. Rows of gate_up count as their neurons do in the output:

    D_i^2 = E[(dh_i / dz_i)^2] ||down_i||^2        of each expert, with the layer's for those with few tokens
    """
    weights = getattr(experts, matrix).float()
    if moments is None:
        identity = torch.eye(weights.shape[-1]).expand(len(weights), -1, -1)
        return Matrix(weights, identity, torch.ones(len(weights)))
    sums = moments.gate_up if matrix == "gate_up" else moments.down
    mass = moments.mass.float()
    shrunk = shrunk_moments(sums, mass, moments.tokens, ridge=ridge)
    if matrix == "down":
        return Matrix(weights, shrunk, mass)
    slopes = drawn_to_layer(moments.slope, mass, moments.tokens)
    columns = experts.down.float().square().sum(1).repeat(1, slopes.shape[1] // experts.intermediate_size)
    rows = (slopes * columns).sqrt()
    return Matrix(weights, shrunk, mass, rows.clamp_min(1e-3 * float(rows.mean()) or 1.0))


def _assembled(experts: DenseExperts, fitted: dict[str, Fitted]) -> FactoredExperts:
    tensors: dict[str, Tensor] = {}
    payloads: dict[str, Payload] = {}

    def store(name: str, stored: Stored | None, group: bool = False) -> None:
        if stored is None:
            return
        tensors[name] = stored.tensor.unsqueeze(0) if group else stored.tensor
        if stored.payload is not None and stored.scales is not None:
            tensors[SCALES + name] = stored.scales.unsqueeze(0) if group else stored.scales
            payloads[name] = stored.payload

    for matrix, made in fitted.items():
        store(f"base_{matrix}", made.base, group=True)
        for stem in ("u", "v", "values"):
            store(f"{stem}_{matrix}", getattr(made, stem))
        if made.u is not None:
            ends = torch.tensor([0, *made.ranks]).cumsum(0)
            tensors[f"rank_offsets_{matrix}"] = ends.to(torch.int32)
    if "base_gate_up" in tensors:
        tensors["group"] = torch.zeros(experts.num_experts, dtype=torch.int32)
    biases = {"bias_gate_up": experts.bias_gate_up, "bias_down": experts.bias_down}
    return FactoredExperts.from_tensors(
        tensors | {name: bias for name, bias in biases.items() if bias is not None},
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        gated=experts.gated,
        payloads=payloads_text({name: payloads[name] for name in CODED if name in payloads}),
    )
