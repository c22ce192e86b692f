"""Plain rounding: every expert by itself as codes, without a base. What every other method is to be held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from resmoe_kernels.factored import MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.methods.fitting import RIDGE, assembled, problem_of
from resmoe_kernels.python_ops.methods.method import Compressed, warn_if_not_smaller, weight_errors
from resmoe_kernels.python_ops.solvers.align import Progress, squared_norm
from resmoe_kernels.python_ops.solvers.fits import fit_full
from resmoe_kernels.python_ops.solvers.rounding import FLOATS, Storage, full

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics


@dataclass(frozen=True)
class Report:
    """What the compression of one layer did; plain numbers, so that ``dataclasses.asdict`` makes JSON.

    relative_error: ||W - W'||_F / ||W||_F over the layer; relative_error_gate_up and relative_error_down of each matrix
    bytes_dense, bytes_now: of every tensor of the layer, scales included
    """

    relative_error: float
    relative_error_gate_up: float
    relative_error_down: float
    bytes_dense: int
    bytes_now: int


def quantise(
    experts: DenseExperts,
    *,
    statistics: LayerStatistics | None = None,
    storage: Storage = FLOATS,
    progress: Progress | None = None,
) -> Compressed:
    """Rounds every expert: W_e ~ the full residual (E, N, K) of a layer without a base.

    statistics: the layer's. With them codes are found with error feedback under the moments of each expert's inputs,
        and their rows made unbiased, see fit_full; without, scales are searched, see ``payload.encode``
    storage: bits of the residual, and columns to a scale;  progress: called with a short phrase after every expert
    Raises ValueError where no bits are asked for. The router stays.
    """
    check_storage(storage)
    payload = storage.payload("values_gate_up")
    assert payload is not None

    def weight_of(e: int) -> tuple[Tensor, Tensor]:
        if progress is not None:
            progress(f"rounding: expert {e + 1} of {experts.num_experts}")
        return experts.gate_up[e].float(), experts.down[e].float()

    # Floats in the place of codes, to have the sizes; they share the memory of the experts.
    plain = FactoredExperts(
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        gated=experts.gated,
        values_gate_up=experts.gate_up,
        values_down=experts.down,
        bias_gate_up=experts.bias_gate_up,
        bias_down=experts.bias_down,
    )
    if statistics is None:
        factored = full(plain, weight_of, payload)
    else:
        moments, fitted = statistics.expert_moments(), {}
        for matrix in MATRICES:
            if progress is not None:
                progress(f"rounding with feedback: {matrix}")
            fitted[matrix] = fit_full(problem_of(experts, moments, matrix, RIDGE), payload, base=None)
        factored = assembled(experts, fitted)
    lost, whole = dict.fromkeys(MATRICES, 0.0), dict.fromkeys(MATRICES, 0.0)
    for e in range(experts.num_experts):
        for matrix, weight in zip(MATRICES, (experts.gate_up[e].float(), experts.down[e].float()), strict=True):
            whole[matrix] += squared_norm(weight)
            lost[matrix] += squared_norm(weight - factored.materialize_matrix(matrix, e))
    report = Report(**weight_errors(lost, whole), bytes_dense=experts.nbytes(), bytes_now=factored.nbytes())
    warn_if_not_smaller("quantise", report, "lower bits")
    return Compressed(factored, report)


def needs_statistics(**_: Any) -> bool:
    return False


def fits(**_: Any) -> bool:
    return True


def check_settings() -> None:
    """There are none but those of Storage."""


def check_storage(storage: Storage) -> None:
    """Raises ValueError unless the experts are to be codes."""
    if storage.of_part(base=False) is None:
        raise ValueError("bits: quantise needs 8, 4, 3 or 2, got none; floats would be the dense experts again")
    if storage.base_bits is not None:
        raise ValueError(f"base_bits: quantise has no base, got {storage.base_bits}; use method='resmoe'")
