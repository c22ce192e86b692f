"""Low-rank residuals: truncated SVDs of every expert's two matrices under one budget for the layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resmoe_kernels.python_ops.svd import truncated_svd

# e -> the residual of expert e: gate_up (N, H), down (H, I). On demand, so that one is alive at a time.
Residual = Callable[[int], tuple[Tensor, Tensor]]

RANK_BLOCK = 16  # ranks are multiples of it: the depth of a tensor-core tile


def low_rank(
    residual: Residual,
    num_experts: int,
    *,
    retain: float,
    factorization: str = "stacked",
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The low-rank part of FactoredExperts: for each matrix W of each expert, W ~ u^T v.

    What one SVD decomposes, with h = 2 for gated experts and 1 otherwise:

        stacked   gate_up (hI, H); down (H, I)
        separate  gate (I, H) and up (I, H), at equal ranks; down (H, I)
        joint     [gate | up | down^T] (I, (h + 1) H)

    The layer may spend ``retain`` times the parameters of its residuals, E (hI H + H I). Blocks of 16
    triplets are bought by descending energy (the sum of sigma^2) per parameter, over all experts and
    matrices, while they fit. Where no block fits, ranks are 0 everywhere. ``retain=1`` sets no limit: full
    rank, exact and larger than dense, for checking. Every matrix offers at most twice the rank of an even
    split, which bounds the memory to about twice the result.

    residual: e -> gate_up (hI, H), down (H, I) float
    dtype: of u and v; sqrt(sigma) is on both sides, so neither outgrows a 16-bit type
    Returns u_gate_up, v_gate_up, rank_offsets_gate_up, u_down and, unless joint, v_down, rank_offsets_down.

    Source: ResMoE, arXiv 2503.06881. Differs from the paper, which has ``joint`` with one rank for all; the
    objective, squared error over the design matrix, is the paper's.
    """
    factors: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}  # matrix -> expert -> (u, v) of its pieces
    energies, prices = [], []  # of every expert's matrices in turn
    parameters = 0
    for e in range(num_experts):
        gate_up, down = residual(e)
        hidden = down.shape[0]
        parameters += gate_up.numel() + down.numel()
        for matrix, pieces in _pieces(gate_up, down, factorization, gated).items():
            price = sum(sum(p.shape) for p in pieces)
            rank = _offered_rank(pieces, price, retain)
            triplets = [truncated_svd(p, rank) for p in pieces]
            factors.setdefault(matrix, []).append([(u.to(dtype), v.to(dtype)) for u, v, _ in triplets])
            energy = torch.stack([sigma.square() for _, _, sigma in triplets]).sum(0)
            energies.append(energy.view(-1, RANK_BLOCK).sum(1))
            prices.append(price * RANK_BLOCK)

    bought = buy_blocks(energies, prices, math.inf if retain == 1 else retain * parameters)
    tensors: dict[str, Tensor] = {}
    for i, (matrix, experts) in enumerate(factors.items()):
        kept, ends = [], [0]
        for blocks, pairs in zip(bought[i :: len(factors)], experts, strict=True):
            rank = RANK_BLOCK * blocks
            kept += [(u[:rank], v[:rank]) for u, v in pairs]
            ends.append(ends[-1] + rank * len(pairs))
        tensors[f"u_{matrix}"], tensors[f"v_{matrix}"] = (torch.cat(rows) for rows in zip(*kept, strict=True))
        tensors[f"rank_offsets_{matrix}"] = torch.tensor(ends, dtype=torch.int32, device=gate_up.device)
    if factorization == "joint":
        v = tensors.pop("v_gate_up")
        tensors["v_gate_up"], tensors["u_down"] = v[:, :-hidden].contiguous(), v[:, -hidden:].contiguous()
    return tensors


def low_rank_at(
    residual: Residual, ranks: dict[str, Sequence[int]], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The same, ``stacked``, at given ranks: for each matrix those of its experts, multiples of 16.

    Returns u_gate_up, v_gate_up, rank_offsets_gate_up, u_down, v_down, rank_offsets_down.
    """
    tensors: dict[str, Tensor] = {}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {matrix: [] for matrix in ranks}
    for e, of_expert in enumerate(zip(*ranks.values(), strict=True)):
        for matrix, weight, rank in zip(ranks, residual(e), of_expert, strict=True):
            u, v, _ = truncated_svd(weight, rank)
            kept[matrix].append((u.to(dtype), v.to(dtype)))
    for matrix, pairs in kept.items():
        tensors[f"u_{matrix}"], tensors[f"v_{matrix}"] = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        ends = [0, *itertools.accumulate(ranks[matrix])]
        tensors[f"rank_offsets_{matrix}"] = torch.tensor(ends, dtype=torch.int32, device=pairs[0][0].device)
    return tensors


def buy_blocks(energies: Sequence[Tensor], prices: Sequence[int], budget: float) -> list[int]:
    """How many blocks of each row to keep: by energy per parameter while they fit, blocks of zeros never.

    energies: per row (blocks,) float, descending
    prices: per row, the parameters of one block;  budget: parameters
    """
    offers = [(energy / prices[i], i) for i, row in enumerate(energies) for energy in row.tolist() if energy > 0]
    bought = [0] * len(prices)
    for _, i in sorted(offers, key=lambda offer: -offer[0]):
        if prices[i] <= budget:
            budget -= prices[i]
            bought[i] += 1
    return bought


def _pieces(gate_up: Tensor, down: Tensor, factorization: str, gated: bool) -> dict[str, Sequence[Tensor]]:
    """By matrix, what is decomposed at equal ranks."""
    halves = gate_up.chunk(2 if gated else 1)
    if factorization == "joint":
        return {"gate_up": [torch.cat([*halves, down.T], dim=1)]}
    return {"gate_up": halves if factorization == "separate" else [gate_up], "down": [down]}


def _offered_rank(pieces: Sequence[Tensor], price: int, retain: float) -> int:
    """Twice the rank that costs ``retain`` of the pieces' parameters, at most full; a multiple of 16."""
    full = min(pieces[0].shape)
    even = retain * sum(p.numel() for p in pieces) / price
    rank = full if retain == 1 else min(full, math.ceil(2 * even))
    return -(-rank // RANK_BLOCK) * RANK_BLOCK
