"""Low-rank residuals: truncated SVDs of every expert's two matrices under one budget for the layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from resmoe_kernels.python_ops.solvers.budgets import Curves, buy_blocks
from resmoe_kernels.python_ops.solvers.spectra import spectrum
from resmoe_kernels.python_ops.solvers.svd import truncated_svd

# e -> the residual of expert e: gate_up (N, H), down (H, I). On demand, so that one is alive at a time.
Residual = Callable[[int], tuple[Tensor, Tensor]]

RANK_BLOCK = 16  # ranks are multiples of it: the depth of a tensor-core tile
# Times the rank of an even split, one after the other: most matrices buy less than the first, which is a third faster.
OFFERS = (1.25, 2)


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
    energies: dict[str, list[Tensor]] = {}
    shapes: dict[str, list[torch.Size]] = {}
    for e in range(num_experts):
        gate_up, down = residual(e)
        for matrix, pieces in _pieces(gate_up, down, factorization, gated).items():
            shapes[matrix] = [p.shape for p in pieces]
            pairs, energy = _decomposed(pieces, offered_rank(shapes[matrix], retain, OFFERS[0]), dtype)
            factors.setdefault(matrix, []).append(pairs)
            energies.setdefault(matrix, []).append(energy)
    prices = {matrix: _block_price(shapes[matrix]) for matrix in shapes}
    parameters = num_experts * sum(s.numel() for of_matrix in shapes.values() for s in of_matrix)
    ranks = bought_ranks(energies, prices, parameters, retain)
    most = {matrix: offered_rank(shapes[matrix], retain, OFFERS[-1]) for matrix in shapes}
    for e in range(num_experts):
        # A matrix again only if all its blocks were bought: more on offer there cannot make others buy more.
        short = [m for m in ranks if RANK_BLOCK * len(energies[m][e]) == ranks[m][e] < most[m]]
        if short:
            again = _pieces(*residual(e), factorization, gated)
            for matrix in short:
                factors[matrix][e], energies[matrix][e] = _decomposed(again[matrix], most[matrix], dtype)
    ranks = bought_ranks(energies, prices, parameters, retain)
    kept = {
        matrix: [[(u[:rank], v[:rank]) for u, v in pairs] for pairs, rank in zip(experts, ranks[matrix], strict=True)]
        for matrix, experts in factors.items()
    }
    return _stored(kept, ranks, factorization, down)


def low_rank_at(
    residual: Residual,
    ranks: Mapping[str, Sequence[int]],
    *,
    factorization: str = "stacked",
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The same at given ranks: for each matrix those of its experts, multiples of 16; ``joint`` has gate_up's alone.

    Returns what ``low_rank`` does.
    """
    factors: dict[str, list[list[tuple[Tensor, Tensor]]]] = {matrix: [] for matrix in ranks}
    for e, of_expert in enumerate(zip(*ranks.values(), strict=True)):
        gate_up, down = residual(e)
        pieces = _pieces(gate_up, down, factorization, gated)
        for matrix, rank in zip(ranks, of_expert, strict=True):
            factors[matrix].append(_decomposed(pieces[matrix], rank, dtype)[0])
    return _stored(factors, ranks, factorization, down)


def low_rank_curves(
    residual: Residual, num_experts: int, *, retain: float, factorization: str, gated: bool, width: int
) -> Curves:
    """What 16 triplets more gain, to full rank. Eigenvalues alone take a fraction of the time of triplets.

    residual, retain, factorization, gated: see low_rank, whose ranks are the budget;  width: bytes of a parameter
    """
    energies: dict[str, list[Tensor]] = {}
    offered: dict[str, list[Tensor]] = {}
    prices: dict[str, int] = {}
    parameters = 0
    for e in range(num_experts):
        gate_up, down = residual(e)
        parameters += gate_up.numel() + down.numel()
        for matrix, pieces in _pieces(gate_up, down, factorization, gated).items():
            energy = torch.stack([block_energies(spectrum(piece)) for piece in pieces]).sum(0)
            most = offered_rank([p.shape for p in pieces], retain)
            energies.setdefault(matrix, []).append(energy)
            offered.setdefault(matrix, []).append(energy[: most // RANK_BLOCK])
            prices[matrix] = _block_price([p.shape for p in pieces])
    ranks = bought_ranks(offered, prices, parameters, retain)
    return Curves(
        {m: torch.stack(rows) for m, rows in energies.items()},
        prices,
        {m: prices[m] * len(rows[0]) for m, rows in energies.items()},
        sum(sum(ranks[m]) // RANK_BLOCK * prices[m] for m in ranks),
        width,
    )


def bought_ranks(
    energies: Mapping[str, Sequence[Tensor]], prices: Mapping[str, int], parameters: int, retain: float
) -> dict[str, list[int]]:
    """The ranks of every matrix's experts under one budget for the layer, see ``low_rank``.

    energies: by matrix, of each expert, of the blocks on offer;  prices: of a block, in parameters
    parameters: of the layer's residuals
    """
    # Expert by expert: the order that decides among equals.
    rows = [row for expert in zip(*energies.values(), strict=True) for row in expert]
    costs = [prices[matrix] for matrix in energies] * (len(rows) // len(energies))
    bought = buy_blocks(rows, costs, math.inf if retain == 1 else retain * parameters)
    return {matrix: [RANK_BLOCK * n for n in bought[i :: len(energies)]] for i, matrix in enumerate(energies)}


def _pieces(gate_up: Tensor, down: Tensor, factorization: str, gated: bool) -> dict[str, Sequence[Tensor]]:
    """By matrix, what is decomposed at equal ranks."""
    halves = gate_up.chunk(2 if gated else 1)
    if factorization == "joint":
        return {"gate_up": [torch.cat([*halves, down.T], dim=1)]}
    return {"gate_up": halves if factorization == "separate" else [gate_up], "down": [down]}


def _decomposed(pieces: Sequence[Tensor], rank: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(u, v) of every piece, and the energy of every 16 triplets, of all pieces together."""
    triplets = [truncated_svd(p, rank) for p in pieces]
    energy = torch.stack([sigma.square() for _, _, sigma in triplets]).sum(0).view(-1, RANK_BLOCK).sum(1)
    return [(u.to(dtype), v.to(dtype)) for u, v, _ in triplets], energy


def _block_price(shapes: Sequence[torch.Size]) -> int:
    """The parameters of 16 triplets of each piece."""
    return RANK_BLOCK * sum(sum(s) for s in shapes)


def offered_rank(shapes: Sequence[Sequence[int]], retain: float, offer: float = OFFERS[-1]) -> int:
    """``offer`` times the rank that costs ``retain`` of the parameters of pieces of equal shapes, at most full; a
    multiple of 16."""
    full = min(shapes[0])
    even = retain * sum(N * K for N, K in shapes) / sum(N + K for N, K in shapes)
    rank = full if retain == 1 else min(full, math.ceil(offer * even))
    return -(-rank // RANK_BLOCK) * RANK_BLOCK


def block_energies(energy: Tensor) -> Tensor:
    """Of a spectrum, sigma^2 descending, the energy of every 16 triplets; what rounding leaves of zeros counts as 0."""
    energy = energy.where(energy > energy[0] * len(energy) * torch.finfo(torch.float64).eps, 0)
    return torch.nn.functional.pad(energy, (0, -len(energy) % RANK_BLOCK)).view(-1, RANK_BLOCK).sum(1)


def _stored(
    factors: Mapping[str, Sequence[Sequence[tuple[Tensor, Tensor]]]],
    ranks: Mapping[str, Sequence[int]],
    factorization: str,
    down: Tensor,
) -> dict[str, Tensor]:
    """As FactoredExperts has it.  factors: matrix -> expert -> (u, v) of its pieces;  down: any expert's."""
    tensors: dict[str, Tensor] = {}
    for matrix, experts in factors.items():
        pairs = [pair for expert in experts for pair in expert]
        tensors[f"u_{matrix}"], tensors[f"v_{matrix}"] = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        rows_of = [rank * len(expert) for rank, expert in zip(ranks[matrix], experts, strict=True)]
        ends = [0, *itertools.accumulate(rows_of)]
        tensors[f"rank_offsets_{matrix}"] = torch.tensor(ends, dtype=torch.int32, device=down.device)
    if factorization == "joint":
        v, hidden = tensors.pop("v_gate_up"), down.shape[0]
        tensors["v_gate_up"], tensors["u_down"] = v[:, :-hidden].contiguous(), v[:, -hidden:].contiguous()
    return tensors
