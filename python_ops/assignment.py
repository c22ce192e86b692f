"""Assignment: the permutation of one matrix's rows that brings it nearest to another."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor


def assign(target: Tensor, source: Tensor, current: Tensor | None = None) -> Tensor:
    """The permutation that brings ``source`` nearest to ``target``, exactly.

        pi = argmin sum_i ||target_i - source_pi(i)||^2 = argmax sum_i <target_i, source_pi(i)>

    The squared norms of the rows are the same for every permutation, so the inner products decide.

    target, source: (I, D) float
    current: (I,) int64, optional: returned as it is unless another permutation is strictly better, so that
        equally good ones cannot alternate for ever
    Returns (I,) int64.
    """
    score = (target @ source.T).cpu().numpy()
    rows, best = import_or_say("scipy.optimize").linear_sum_assignment(score, maximize=True)
    if current is not None:
        gain = score[rows, best].sum(dtype="float64") - score[rows, current].sum(dtype="float64")
        if gain <= 0:
            return current
    return torch.from_numpy(best)


def import_or_say(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = {"ot": "POT"}.get(name, name.partition(".")[0])
        raise ValueError(
            f'{package}: alignment needs it, it is not installed; run: pip install "resmoe_kernels[compress]"'
        ) from error
