"""What a number of bytes buys in every form an expert's weights can take, and the error that is left.

Bytes are those of the two matrices of all experts of a layer, with base, masks, offsets and scales; biases, the same
in every form, are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import ceil, floor, prod

import torch
from torch import Tensor

from resmoe_kernels.factored import BLOCK_KEPT, MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.solvers.align import relative, squared_norm
from resmoe_kernels.python_ops.solvers.budgets import buy_blocks
from resmoe_kernels.python_ops.solvers.factorize import RANK_BLOCK, Residual, block_energies, low_rank_at, offered_rank
from resmoe_kernels.python_ops.solvers.prune import bitmap, block
from resmoe_kernels.sparse import BLOCK

RESIDUALS = ("low rank", "block", "bitmap")
BITS = {"int8": 8, "int4": 4}
GROUP = 128  # weights that share a scale
_OFFSET = 4  # bytes of a rank or row offset, of a mask's word, of an expert's group

Pair = tuple[Tensor, Tensor]  # base_gate_up (N, H), base_down (H, I)


@dataclass(frozen=True)
class FormError:
    """One form at one budget.

    form: ``low rank``, ``block``, ``bitmap``, ``base + ...`` of these, ``int8`` or ``int4``
    budget: part of the dense bytes it may take; None for the integers, whose size is fixed
    bytes_now: what it takes, of the whole layer;  relative_error: ||W - W'||_F / ||W||_F over the measured experts;
        both None where even the form's smallest does not fit
    """

    form: str
    budget: float | None
    bytes_now: int | None
    relative_error: float | None


def matrix_bytes(experts: DenseExperts) -> int:
    """Bytes of gate_up and down of all experts."""
    return sum(m.numel() * m.element_size() for m in (experts.gate_up, experts.down))


def errors_at(
    experts: DenseExperts,
    measured: Sequence[int],
    weight: Residual,
    base: Pair | None,
    budgets: Sequence[float],
    energies: Mapping[str, Sequence[Tensor]],
) -> list[FormError]:
    """Low rank, block and bitmap at every budget: of the experts, or of what a base leaves of them.

    experts: the layer;  measured: the experts to compress, which share the room as evenly as all of them would
    weight: e -> gate_up (N, H), down (H, I) float32 of expert e, in the base's neuron order
    base: in the experts' dtype, or None for direct compression
    energies: matrix -> of every measured expert, the spectrum of what is compressed

    Each is made by the method's own function, in the experts' dtype, and expanded again. Within a budget low rank
    takes the most blocks of 16 that fit, block the largest of 4, 8, 12, 16 of 32, bitmap the most weights. Every matrix
    is decomposed once, at the largest rank it has at any budget.
    """

    def residual(i: int) -> Pair:
        pair = weight(measured[i])
        return pair if base is None else (pair[0] - base[0], pair[1] - base[1])

    whole, count = matrix_bytes(experts), experts.num_experts
    spent = 0 if base is None else whole // count + _OFFSET * count
    dtype, kept = experts.gate_up.dtype, len(measured)
    rooms = [floor((budget * whole - spent) * kept / count) for budget in budgets]
    ranks = [_ranks(energies, experts, kept, room) for room in rooms]
    largest = {m: [max(r[m][i] for r in ranks if r) for i in range(kept)] for m in MATRICES} if any(ranks) else {}
    widest = low_rank_at(residual, largest, gated=experts.gated, dtype=dtype) if largest else {}
    results = []
    for budget, room, ranks_there in zip(budgets, rooms, ranks, strict=True):
        for form in RESIDUALS:
            name = form if base is None else f"base + {form}"
            if form == "low rank":
                tensors = None if ranks_there is None else _cut(widest, ranks_there)
            else:
                tensors = _sparse(form, residual, experts, kept, room)
            if tensors is None:
                results.append(FormError(name, budget, None, None))
                continue
            if base is not None:
                tensors["group"] = torch.zeros(kept, dtype=torch.int32, device=experts.gate_up.device)
                tensors |= {f"base_{m}": b.unsqueeze(0) for m, b in zip(MATRICES, base, strict=True)}
            factored = FactoredExperts(
                num_experts=kept,
                hidden_size=experts.hidden_size,
                intermediate_size=experts.intermediate_size,
                gated=experts.gated,
                **tensors,  # type: ignore[arg-type]
            )
            parts = factored.nbytes_by_part()
            per_expert = parts["low_rank"] + parts["sparse"] + parts["index"] - (_OFFSET * kept if base else 0)
            error = _relative_error(measured, weight, partial(_expanded, factored))
            results.append(FormError(name, budget, spent + ceil(per_expert * count / kept), error))
    return results


def integer_errors(experts: DenseExperts, measured: Sequence[int], weight: Residual) -> list[FormError]:
    """int8 and int4 of the dense experts, see ``round_to_nearest``, at the size that they have."""
    shapes = [(m.shape[1] * experts.num_experts, m.shape[2]) for m in (experts.gate_up, experts.down)]
    results = []
    for form, bits in BITS.items():
        size = sum(rows * (ceil(columns * bits / 8) + 2 * ceil(columns / GROUP)) for rows, columns in shapes)
        error = _relative_error(measured, weight, partial(_rounded, weight, measured, bits))
        results.append(FormError(form, None, size, error))
    return results


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Symmetric integers with one float16 scale for 128 weights of a row, as weights again.

        s = max |w| / (2^(bits - 1) - 1),    w' = s round(w / s)

    weight: (N, K) float32 -> the same; a last group may be narrower, and a group whose scale float16 cannot tell
    from 0 becomes 0.
    """
    columns, largest = weight.shape[1], 2 ** (bits - 1) - 1
    groups = torch.nn.functional.pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp(max=torch.finfo(torch.float16).max)
    scale = scale.half().to(weight.dtype)
    steps = (groups / torch.where(scale > 0, scale, 1)).round().clamp(-largest, largest)
    return (steps * scale).flatten(1)[:, :columns]


def _ranks(
    energies: Mapping[str, Sequence[Tensor]], experts: DenseExperts, kept: int, room: int
) -> dict[str, list[int]] | None:
    """By matrix, the ranks that ``low_rank`` would give ``kept`` experts in ``room`` bytes, None where none fits."""
    shapes = {m: tuple(getattr(experts, m).shape[1:]) for m in MATRICES}
    left = room - len(MATRICES) * _OFFSET * (kept + 1)
    if left < 0:
        return None
    budget = left // experts.gate_up.element_size()
    share = budget / (kept * sum(map(prod, shapes.values())))
    rows, prices = [], []
    for i in range(kept):
        for matrix, (N, K) in shapes.items():
            most = offered_rank([(N, K)], share) // RANK_BLOCK
            rows.append(block_energies(energies[matrix][i])[:most])
            prices.append(RANK_BLOCK * (N + K))
    bought = buy_blocks(rows, prices, budget)
    return {m: [RANK_BLOCK * n for n in bought[j :: len(MATRICES)]] for j, m in enumerate(MATRICES)}


def _cut(widest: dict[str, Tensor], ranks: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The first of every expert's triplets, as many as ranks say."""
    tensors = {}
    for matrix, of_experts in ranks.items():
        starts = widest[f"rank_offsets_{matrix}"].tolist()
        for side in "uv":
            rows = widest[f"{side}_{matrix}"]
            tensors[f"{side}_{matrix}"] = torch.cat([rows[s : s + r] for s, r in zip(starts, of_experts, strict=False)])
        ends = [0, *accumulate(of_experts)]
        tensors[f"rank_offsets_{matrix}"] = torch.tensor(ends, dtype=torch.int32, device=rows.device)
    return tensors


def _sparse(form: str, residual: Residual, experts: DenseExperts, kept: int, room: int) -> dict[str, Tensor] | None:
    """The tensors of ``kept`` experts in a form that takes at most ``room`` bytes, None where there is none."""
    shapes = [tuple(m.shape[1:]) for m in (experts.gate_up, experts.down)]
    dtype = experts.gate_up.dtype
    parameters, width = kept * sum(map(prod, shapes)), dtype.itemsize
    words = kept * sum(rows * ceil(columns / BLOCK) for rows, columns in shapes)
    if form == "block":
        fitting = [n for n in BLOCK_KEPT if words * (n * width + _OFFSET) <= room]
        return block(residual, kept, kept=max(fitting), dtype=dtype) if fitting else None
    left = room - _OFFSET * (words + sum(kept * rows + 1 for rows, _ in shapes))
    if left < 0:
        return None
    values = min(left // (width * kept), parameters // kept)
    # Half a weight more: values / count * count may come out just below values.
    return bitmap(residual, kept, retain=(values + 0.5) * kept / parameters, dtype=dtype)


def _expanded(factored: FactoredExperts, i: int) -> Pair:
    return factored.materialize_matrix("gate_up", i), factored.materialize_matrix("down", i)


def _rounded(weight: Residual, measured: Sequence[int], bits: int, i: int) -> Pair:
    gate_up, down = weight(measured[i])
    return round_to_nearest(gate_up, bits), round_to_nearest(down, bits)


def _relative_error(measured: Sequence[int], weight: Residual, made: Residual) -> float:
    """made: place in ``measured`` -> the two matrices that stand for that expert's."""
    lost = whole = 0.0
    for i, e in enumerate(measured):
        for exact, other in zip(weight(e), made(i), strict=True):
            whole += squared_norm(exact)
            lost += squared_norm(exact - other)
    return relative(lost, whole)
