"""Rounding with error feedback: what a column loses by rounding, the columns after it make up for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resmoe_kernels.payload import Payload, nearest_codes, search_scales
from resmoe_kernels.products import one_thread, product
from resmoe_kernels.python_ops.solvers.moments import lower_roots

BLOCK = 128  # columns whose feedback is applied one by one; to those behind them it goes in one product


class Coded(NamedTuple):
    """Matrices as codes, before they are packed.

    codes: (E, N, K) uint8;  scales: (E, N, ceil(K / group)) bfloat16
    """

    codes: Tensor
    scales: Tensor


def feedback_factors(moments: Tensor) -> Tensor:
    """C (E, K, K) float32, upper triangular, H^-1 = C^T C: row k says how columns after k make up for column k."""
    roots = lower_roots(moments)
    with one_thread():
        return torch.linalg.cholesky(torch.cholesky_inverse(roots), upper=True).float()


def feedback_codes(values: Tensor, factors: Tensor, payload: Payload) -> Coded:
    """Codes q that keep tr((W - q) H (W - q)^T) small: columns rounded in turn, the rest adjusted to the error so far.

        q_k = round(w_k),    w_j -= (w_k - q_k) / C_kk C_kj  for j > k,    H^-1 = C^T C

    The scale of a group is searched when its first column is reached, for the values as adjusted until then.

    values: (E, N, K) float;  factors: (E, K, K) or (1, K, K), of ``feedback_factors``
    Where H is diagonal the result is that of rounding alone.
    Source: GPTQ, arXiv 2210.17323 (the order of columns is as given; no reordering by activation).
    """
    work = values.to(torch.float32, copy=True)
    columns = work.shape[-1]
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    scales = []
    run = payload.group or columns
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = work[..., start:stop]
        errors = torch.zeros_like(block)
        for k in range(start, stop):
            at = k - start
            if k % run == 0:
                scales.append(search_scales(work[..., k : k + run], Payload(payload.bits, 0)))  # (E, N)
            of_column = scales[-1]
            column = block[..., at]
            code = nearest_codes(column, of_column, payload)
            codes[..., k] = code
            rounded = (code.float() - payload.offset) * of_column.float()
            error = (column - rounded) / factors[:, k, k].unsqueeze(1)
            errors[..., at] = error
            block[..., at + 1 :] -= error.unsqueeze(-1) * factors[:, k, k + 1 : stop].unsqueeze(1)
        if stop < columns:
            shared = factors.expand(len(work), -1, -1)
            for e, own in enumerate(errors):
                work[e, :, stop:] -= product(own, shared[e, start:stop, stop:])
    return Coded(codes, torch.stack(scales, -1))


def decoded(coded: Coded, payload: Payload) -> Tensor:
    """The weights (E, N, K) float32 that codes stand for."""
    steps = coded.codes.float() - payload.offset
    run = payload.group or coded.codes.shape[-1]
    return steps * coded.scales.float().repeat_interleave(run, -1)[..., : steps.shape[-1]]


def unbiased(coded: Coded, payload: Payload, target: Tensor, moments: Tensor) -> Coded:
    """The same codes, each row's scales times alpha = w H w^T / (w H q^T): rounding shrinks rows, this undoes it.

    With it q = w + error has no part of its error along w, under H. At 2 bits it is what KL gains most from
    beside feedback. Rows without a positive w H q^T stay as they are.

    target: (E, N, K), what the codes were made for;  moments: (E, K, K)
    """
    image = torch.stack([product(t.float(), m.float()) for t, m in zip(target, moments, strict=True)])
    whole = (image * target).sum(-1)
    along = (image * decoded(coded, payload)).sum(-1)
    alpha = torch.where((along > 0) & (whole > 0), whole / along.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return Coded(coded.codes, (coded.scales.float() * alpha.unsqueeze(-1)).to(torch.bfloat16))
