"""Before compressing: what a model's experts have in common, and what any compressed form of them would cost.

The cost is the error of the weights, which needs no data. How a model answers with such weights is for ``evaluate``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from resmoe_kernels.factored import MATRICES, DenseExperts
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader
from resmoe_kernels.python_ops.models.dense_model import DenseModel, build_on_meta
from resmoe_kernels.python_ops.models.layouts import find_experts, select_layers
from resmoe_kernels.python_ops.solvers.align import (
    Progress,
    barycenter,
    design_matrix,
    in_order,
    mean_cosine,
    split_design,
    squared_norm,
)
from resmoe_kernels.python_ops.solvers.byte_budgets import RESIDUALS, FormError, errors_at, integer_errors, matrix_bytes
from resmoe_kernels.python_ops.solvers.spectra import QUARTER, energy_kept, random_energy_kept, spectrum

BUDGETS = (0.25, 0.375, 0.5)
# Experts of a layer whose spectra and errors are taken, evenly spaced; alignment takes all.
MEASURED = 8


@dataclass(frozen=True)
class LayerDiagnosis:
    """What one layer of experts looks like; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    measured: the experts that cosines_*, spectra and errors are of
    bytes_dense: of gate_up and down of all experts;  energy: ||W||_F^2 of the same
    cosine_before, cosine_after: mean over all pairs of experts, before and after alignment;  cosines_before,
        cosines_after: of every pair of measured ones
    residual_energy: ||W - B||_F^2 / ||W||_F^2 over all aligned experts, B as it would be stored; 0 where W is 0
    spectra: matrix -> ``weight``, ``residual`` and ``random`` -> the part of the energy that the best i/32 of the rank
        keep, i = 0 ... 32, mean over the measured experts
    errors: see FormError
    """

    path: str
    num_experts: int
    measured: list[int]
    bytes_dense: int
    energy: float
    cosine_before: float
    cosine_after: float
    cosines_before: list[list[float]]
    cosines_after: list[list[float]]
    residual_energy: float
    spectra: dict[str, dict[str, list[float]]]
    errors: list[FormError]


def diagnose(
    model: str | os.PathLike[str],
    *,
    layers: str = "all",
    budgets: Sequence[float] = BUDGETS,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> list[LayerDiagnosis]:
    """Measures the experts of a dense Hugging Face checkpoint, one layer in memory at a time.

    model, layers, trust_remote_code: as for ``compress``
    budgets: parts of the dense experts' bytes, in (0, 1], at which forms are compared

    Of a layer of experts of 1408 x 2048, spectra and errors took 85 s of one core and 1.4 GB, whatever the number of
    experts, and alignment 0.7 s for each: of a large model, choose some layers.

    Raises ValueError as ``compress`` does for the model and the layers, and for a budget out of range.
    """
    check_budgets(budgets)
    source = Checkpoint(model)
    dense = build_on_meta(source, trust_remote_code)
    found = find_experts(dense)
    chosen = select_layers(found, layers)
    whole = DenseModel(dense, ModuleReader(source, dense), found)
    diagnoses = []
    with tqdm(total=len(chosen), desc="diagnosing", unit="layer", disable=not progress) as bar:
        for experts in chosen:
            weights = whole.read(found.index(experts))
            diagnoses.append(diagnose_layer(weights, experts.path, budgets, bar.set_postfix_str))
            bar.update()
    return diagnoses


def check_budgets(budgets: Sequence[float]) -> None:
    """Raises ValueError unless there is at least one and all are in (0, 1]."""
    wrong = next((b for b in budgets if not 0 < b <= 1), None)
    if wrong is not None or not budgets:
        raise ValueError(
            f"budget: must be in (0, 1], as parts of the dense bytes, got {'none' if wrong is None else wrong}"
        )


def diagnose_layer(
    experts: DenseExperts, path: str, budgets: Sequence[float] = BUDGETS, progress: Progress | None = None
) -> LayerDiagnosis:
    """The same for the experts of one layer. Raises ValueError if a weight is not finite."""
    say = progress or (lambda _: None)
    count, dtype = experts.num_experts, experts.gate_up.dtype
    aligned = barycenter(experts, progress=progress)
    base_gate_up, base_down = (m.to(dtype) for m in split_design(aligned.center, experts)[:2])

    def original(e: int) -> tuple[Tensor, Tensor]:
        say(f"errors: expert {e} of {count}")
        return experts.gate_up[e].float(), experts.down[e].float()

    def permuted(e: int) -> tuple[Tensor, Tensor]:
        say(f"errors: expert {e} of {count}, aligned")
        return in_order(experts, e, aligned.permutations[e])

    energy = left = 0.0
    for e in range(count):
        gate_up, down = permuted(e)
        energy += squared_norm(gate_up) + squared_norm(down)
        left += squared_norm(gate_up - base_gate_up) + squared_norm(down - base_down)
    kept = min(count, MEASURED)
    measured = [(2 * i + 1) * count // (2 * kept) for i in range(kept)]
    base = base_gate_up, base_down
    own: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    residual: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
    for e in measured:
        for matrix, weight, shared in zip(MATRICES, permuted(e), base, strict=True):
            own[matrix].append(spectrum(weight))
            residual[matrix].append(spectrum(weight - shared))
    errors = errors_at(experts, measured, permuted, base, budgets, residual)
    errors += errors_at(experts, measured, original, None, budgets, own)
    errors += integer_errors(experts, measured, original)
    return LayerDiagnosis(
        path=path,
        num_experts=count,
        measured=measured,
        bytes_dense=matrix_bytes(experts),
        energy=energy,
        cosine_before=mean_cosine(experts),
        cosine_after=mean_cosine(experts, aligned.permutations),
        cosines_before=_cosines(experts, measured),
        cosines_after=_cosines(experts, measured, aligned.permutations),
        residual_energy=left / energy if energy else 0.0,
        spectra={
            matrix: {
                "weight": _mean_kept(own[matrix]),
                "residual": _mean_kept(residual[matrix]),
                "random": random_energy_kept(*getattr(experts, matrix).shape[1:]).tolist(),
            }
            for matrix in MATRICES
        },
        errors=errors,
    )


def _mean_kept(energies: Sequence[Tensor]) -> list[float]:
    return torch.stack([energy_kept(energy) for energy in energies]).mean(0).tolist()


def _cosines(experts: DenseExperts, measured: Sequence[int], permutations: Tensor | None = None) -> list[list[float]]:
    """Cosine similarity of every pair's flattened design matrices; an expert of zeros is orthogonal to all others."""
    cosines = torch.eye(len(measured), dtype=torch.float64)
    for i, j in torch.combinations(torch.arange(len(measured))).tolist():
        pair = [design_matrix(experts, measured[k]) for k in (i, j)]
        if permutations is not None:
            pair = [d[permutations[measured[k]]] for d, k in zip(pair, (i, j), strict=True)]
        norms = math.sqrt(squared_norm(pair[0]) * squared_norm(pair[1]))
        dot = float((pair[0] * pair[1]).sum(1).double().sum())
        cosines[i, j] = cosines[j, i] = dot / norms if norms else 0.0
    return cosines.tolist()


# ---- over all layers


@dataclass(frozen=True)
class ModelError:
    """A form at one budget over all layers: see FormError, with bytes as a part of the dense bytes."""

    form: str
    budget: float | None
    size: float
    error: float


def model_errors(layers: Sequence[LayerDiagnosis]) -> list[ModelError]:
    """The errors over all layers, each layer's weighed by its energy; forms that fit in every layer.

    error^2 = sum_l energy_l error_l^2 / sum_l energy_l
    """
    energy, dense = sum(d.energy for d in layers), sum(d.bytes_dense for d in layers)
    totals = []
    for same in zip(*(d.errors for d in layers), strict=True):
        if any(e.relative_error is None for e in same):
            continue
        lost = sum(d.energy * (e.relative_error or 0.0) ** 2 for d, e in zip(layers, same, strict=True))
        size = sum(e.bytes_now or 0 for e in same) / dense
        totals.append(ModelError(same[0].form, same[0].budget, size, math.sqrt(lost / energy) if energy else 0.0))
    return totals


def verdict(layers: Sequence[LayerDiagnosis]) -> list[str]:
    """In sentences: whether a shared base pays, at which budgets, what is best at each, and whether rank is low.

    A base pays at a budget where the best of its three forms has a smaller error than the best of the same three
    without a base. The best form of all is chosen among everything that fits, integers included.
    """
    budgets = list(dict.fromkeys(e.budget for e in layers[0].errors if e.budget is not None))
    totals = model_errors(layers)
    integers = [t for t in totals if t.budget is None]
    pays, sentences = {}, []
    for budget in budgets:
        at_budget = [t for t in totals if t.budget == budget]
        with_base = _best([t for t in at_budget if t.form not in RESIDUALS])
        without = _best([t for t in at_budget if t.form in RESIDUALS])
        best = _best(at_budget + [t for t in integers if t.size <= budget])
        pays[budget] = with_base is not None and (without is None or with_base.error < without.error)
        sentences.append(
            f"At {budget:g} of the dense bytes {_compared(with_base, without, pays[budget])}{_told(best)}."
        )
    for integer in integers:
        others = [t for t in totals if t.budget is not None]
        beaten = (
            ""
            if any(t.error <= integer.error for t in others)
            else ", smaller than that of any low-rank or sparse form here"
        )
        sentences.append(
            f"{integer.form} round-to-nearest takes {integer.size:.3f} of the bytes, with a relative error of "
            f"{integer.error:.3f}{beaten}."
        )
    mean = {name: _mean(layers, name) for name in ("cosine_before", "cosine_after", "residual_energy")}
    return [
        _headline(pays),
        f"Alignment takes the mean cosine between experts from {mean['cosine_before']:.3f} to "
        f"{mean['cosine_after']:.3f}; {mean['residual_energy']:.1%} of the energy stays in the residual.",
        *sentences,
        *(_rank_sentence(layers, matrix) for matrix in MATRICES),
    ]


def _best(errors: Sequence[ModelError]) -> ModelError | None:
    return min(errors, key=lambda e: e.error, default=None)


def _headline(pays: dict[float, bool]) -> str:
    yes, no = ([f"{b:g}" for b, p in pays.items() if p is answer] for answer in (True, False))
    if not no:
        return "A shared base pays here."
    if not yes:
        return "A shared base does not pay here."
    return f"A shared base pays here at {', '.join(yes)} of the dense bytes, not at {', '.join(no)}."


def _compared(with_base: ModelError | None, without: ModelError | None, pays: bool) -> str:
    if with_base is None:
        return "no form with a base fits; best of all is "
    if without is None:
        return f"only forms with a base fit, {_told(with_base)}; best of all is "
    return f"a base {'pays' if pays else 'does not pay'}, {_told(with_base)} against {_told(without)}; best of all is "


def _told(error: ModelError | None) -> str:
    return "nothing: none fits" if error is None else f"{error.form} with an error of {error.error:.3f}"


def _rank_sentence(layers: Sequence[LayerDiagnosis], matrix: str) -> str:
    kept = {
        kind: sum(d.spectra[matrix][kind][QUARTER] for d in layers) / len(layers)
        for kind in ("weight", "residual", "random")
    }
    return (
        f"A quarter of the rank keeps {kept['weight']:.0%} of the energy of {matrix} and {kept['residual']:.0%} of its "
        f"residual's; of a random matrix of its shape, {kept['random']:.0%}."
    )


def _mean(layers: Sequence[LayerDiagnosis], name: str) -> float:
    return sum(getattr(d, name) for d in layers) / len(layers)
