"""Fit: of a size named by the user the best model there is in it, its form chosen per layer and matrix."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from resmoe_kernels.factored import MATRICES, DenseExperts
from resmoe_kernels.payload import Payload, decode
from resmoe_kernels.products import total
from resmoe_kernels.python_ops.methods.fitting import RIDGE, assembled, in_neuron_order, problem_of
from resmoe_kernels.python_ops.methods.method import Compressed, warn_if_not_smaller, weight_errors
from resmoe_kernels.python_ops.solvers.align import Progress, barycenter, squared_norm
from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK
from resmoe_kernels.python_ops.solvers.fits import ROUNDS, Fitted, Matrix, fit_full, fit_low_rank, rank_gains
from resmoe_kernels.python_ops.solvers.rounding import Storage
from resmoe_kernels.python_ops.solvers.size_plan import Candidate, plan_sizes

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
    from resmoe_kernels.python_ops.models.dense_model import DenseModel

BASES = ("auto", "always", "never")
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
    ridge: how far moments are drawn to the identity, see shrunk_moments. KL in the calibration's domain / on WikiText-2
        of equal ranks, 4 bits, at 0.064 of the bytes: tiny-mixtral .02 .046/.100, .05 .049/.102, .15 .052/.104, .5
        .057/.110; tiny-deepseek .02 .042/.101, .05 .042/.099, .15 .042/.096, .5 .042/.090, 2 .047/.082
    rounds: of base and low rank in turn
    statistics, plan: the layer's, and what ``plan`` decided for it

    Raises ValueError naming the argument, what it may be and what came.
    """
    check_settings(size, bits_per_weight, base, ridge, rounds)
    if plan is None:
        raise ValueError("plan: needed, because what a layer gets depends on the others; see plan, got None")
    moments = None if statistics is None else statistics.expert_moments()
    aligned, moments = in_neuron_order(experts, moments, plan["permutations"] if plan["base"] else None)
    fitted: dict[str, Fitted] = {}
    output_lost = output_whole = 0.0
    for matrix in MATRICES:
        if progress is not None:
            progress(f"fitting: {matrix}")
        form, problem = plan[matrix], problem_of(aligned, moments, matrix, ridge)
        own_base = _payload(form["base"])
        if form["values"] is None:
            fitted[matrix] = fit_low_rank(problem, form["ranks"], base=own_base, factors=FACTORS, rounds=rounds)
        else:
            fitted[matrix] = fit_full(problem, Payload.parse(form["values"]), base=own_base)
        output_lost += problem.error(fitted[matrix].weights)
        if matrix == "down":
            output_whole = problem.error(torch.zeros_like(fitted[matrix].weights))
    factored = assembled(aligned, fitted)
    whole = {m: sum(squared_norm(w.float()) for w in getattr(aligned, m)) for m in MATRICES}
    lost = {
        m: sum(squared_norm(w.float() - own) for w, own in zip(getattr(aligned, m), fitted[m].weights, strict=True))
        for m in MATRICES
    }
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


def check_storage(storage: Storage, **_: Any) -> None:
    """Raises ValueError if bits are asked for: they follow from the size."""
    if storage.codes:
        raise ValueError("bits: fit chooses them for the size; leave bits, base_bits and residual_bits out")


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
    rounds: int,
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
        aligned, own = in_neuron_order(experts, moments, permutations)
        for matrix in MATRICES:
            if progress is not None:
                progress(f"measuring: {matrix}, {way}")
            found = _measured(problem_of(aligned, own, matrix, ridge), way == "base", rounds)
            made |= {f"{way}.{matrix}.{name}": tensor for name, tensor in found.items()}
    # Of the layer's output: what a layer adds to the stream is of another size in each.
    output = next(v for name, v in made.items() if name.endswith("down.whole"))
    scale = 1 / float(output) if float(output) else 1.0
    return {name: tensor if name == "permutations" else tensor * scale for name, tensor in made.items()}


def _ways(base: str) -> list[str]:
    return {"auto": ["none", "base"], "always": ["base"], "never": ["none"]}[base]


def _measured(problem: Matrix, with_base: bool, rounds: int) -> dict[str, Tensor]:
    count, rows, columns = problem.weights.shape
    center = torch.zeros(rows, columns)
    if with_base:
        rank = int(_MEASURED_RANK * rows * columns / (rows + columns) / RANK_BLOCK + 1) * RANK_BLOCK
        ranks = [min(rank, min(rows, columns) // RANK_BLOCK * RANK_BLOCK)] * count
        kept = fit_low_rank(problem, ranks, base=LOW_RANK_BASE, factors=torch.float32, rounds=rounds).base
        assert kept is not None and kept.scales is not None and kept.payload is not None
        center = decode(kept.tensor, kept.scales, kept.payload, columns)
    gains = rank_gains(problem, center)
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
    return {
        "gains": gains,
        "whole": torch.tensor(total(gains), dtype=torch.float64),
        "full": torch.tensor(full, dtype=torch.float64),
    }


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
    progress: bool = False,
    size: float | str | None,
    bits_per_weight: float | None,
    base: str,
    **_: Any,
) -> list[dict[str, Any]]:
    """What every layer becomes: by matrix ``base`` and ``values``, texts of payloads or None, and ``ranks``; ``base``,
    whether it has one, and then ``permutations`` of its neurons. Said on stderr where there is ``progress``, before the
    layers are compressed; what was chosen stands in every layer's report in config.json too.

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
    plans: list[dict[str, Any]] = []
    indices = sum(4 * (2 * (s.num_experts + 1) + s.num_experts) for s in shapes)  # rank offsets and groups
    for found, taken in zip(measured, plan_sizes(layers, budget - indices), strict=True):
        with_base = taken["gate_up"].form["base"] is not None
        forms: dict[str, Any] = {
            m: {**c.form, "ranks": list(c.ranks), "error": c.error, "bytes": c.bytes} for m, c in taken.items()
        }
        own = {"permutations": found["permutations"]} if with_base else {}
        plans.append({**forms, "base": with_base, **own})
    if progress:
        for i, made in zip(chosen, plans, strict=True):
            tqdm.write(f"{model.experts[i].path}: {_summary(made)}", file=sys.stderr)
        spent = sum(made[m]["bytes"] for made in plans for m in MATRICES) + indices
        tqdm.write(f"{spent:,} bytes, {spent / dense:.4f} of the dense experts'", file=sys.stderr)
    return plans


def _summary(plan: dict[str, Any]) -> str:
    return "; ".join(f"{m} {_described(plan[m])}, {plan[m]['bytes']:,} bytes" for m in MATRICES)


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
