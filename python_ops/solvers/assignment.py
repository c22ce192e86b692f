"""Assignment: the permutation of one matrix's rows that brings it nearest to another."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from resmoe_kernels import ops
from resmoe_kernels.products import product

_log = logging.getLogger("resmoe_kernels")
_ROWS = 2048  # of scores at a time in another type beside them


class Assignment(NamedTuple):
    """A permutation, and how good it is.

        value = sum_i score[i, permutation_i]
        gap   = sum_i max_j (score[i, j] - prices_j) + sum_j prices_j - value

    permutation: (n,) int64
    prices: (n,) float64, of the columns; None where the solver does not tell
    gap: no permutation's value is larger by more; 0 but for rounding where the permutation is the best
    """

    permutation: Tensor
    value: float
    gap: float
    prices: Tensor | None


def solve(score: Tensor, *, prices: Tensor | None = None, exact: bool = True) -> Assignment:
    """Linear assignment: the permutation with the largest sum of scores.

    score: (n, n) float32, copied to the CPU from where it is
    prices: (n,) float64, where to start: those of a similar matrix; zeros by default, which take as long
    exact: without it rows that could do slightly better keep what they have: hardly faster, and a gap of a few
        millionths of the value on normal numbers

    Takes the extension's solver, see csrc/assignment.h, or, where it is not built, scipy's, which is always exact.
    Raises ValueError: a score is not finite or 2^120 or more, scipy needed and not installed.
    Source: Bertsekas, Annals of Operations Research 14, 1988; Jonker and Volgenant, Computing 38, 1987.
    """
    if score.dim() != 2 or score.shape[0] != score.shape[1] or score.dtype != torch.float32:
        raise ValueError(f"score: must be (n, n) float32, got {tuple(score.shape)} {score.dtype}")
    score = score.cpu().contiguous()
    if _is_built():
        start = score.new_zeros(len(score), dtype=torch.float64) if prices is None else prices
        permutation, final_prices, value, gap = ops.assignment(score, start, exact)
        return Assignment(permutation, value, gap, final_prices)
    if not bool(score.isfinite().all()):
        raise ValueError("score: must be below 2^120 and not a nan; check the matrices for an inf or a nan")
    _, best = import_or_say("scipy.optimize").linear_sum_assignment(score.numpy(), maximize=True)
    permutation = torch.from_numpy(best)
    return Assignment(permutation, _value(score, permutation), 0.0, None)


def assign(target: Tensor, source: Tensor, current: Tensor | None = None, *, half: bool = False) -> Tensor:
    """The permutation that brings ``source`` nearest to ``target``.

        pi = argmin sum_i ||target_i - source_pi(i)||^2 = argmax sum_i <target_i, source_pi(i)>

    The squared norms of the rows are the same for every permutation, so the inner products decide.

    target, source: (I, D) float
    current: (I,) int64, optional: returned as it is unless another permutation is strictly better, so that
        equally good ones cannot alternate for ever
    half: see ``inner_products``
    Returns (I,) int64.
    """
    score = inner_products(target, source, half=half)
    found = solve(score)
    if current is not None and found.value <= _value(score, current.to(score.device)):
        return current
    return found.permutation


def inner_products(target: Tensor, source: Tensor, *, half: bool) -> Tensor:
    """(I, D) and (I, D) float -> (I, I) float32, where they are.

    half: in bfloat16, the result rounded to it too, on a CPU with instructions for it: 2.3 times as fast (405 against
        177 GFLOP/s on two Zen 4 cores). Against float32 it costs 1e-5 to 3e-5 of the best value where nothing is alike
        and nothing where a tenth is common; barycenters of trained layers came out with objectives 4e-4 smaller to
        7e-4 larger, as from another start. float32 and float64 found the same permutations.
    """
    if not (half and target.device.type == "cpu" and _multiplies_bfloat16()):
        return product(target.float(), source.float().T)
    score = torch.empty(len(target), len(source))
    rounded = source.bfloat16().T
    for rows, part in zip(score.split(_ROWS), target.split(_ROWS), strict=True):
        rows.copy_(product(part.bfloat16(), rounded))
    return score


def _value(score: Tensor, permutation: Tensor) -> float:
    return float(score.gather(1, permutation.unsqueeze(1)).double().sum())


@cache
def _is_built() -> bool:
    built = ops.has_cpu_kernel("assignment")
    if not built:
        _log.warning("assignments are solved by scipy, several times slower: the extension is not built")
    return built


@cache
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def import_or_say(name: str) -> ModuleType:
    """The module. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = {"ot": "POT"}.get(name, name.partition(".")[0])
        raise ValueError(
            f'{package}: alignment needs it, it is not installed; run: pip install "resmoe_kernels[compress]"'
        ) from error
