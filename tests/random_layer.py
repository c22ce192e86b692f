"""Layers of random numbers in every form, for tests and for the fuzz."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.parts import parse_payloads
from resmoe_kernels.python_ops.solvers.rounding import rounded
from resmoe_kernels.sparse import pack_bitmap, pack_block


def random_layer(
    generator: torch.Generator,
    *,
    num_experts: int = 6,
    hidden_size: int = 45,  # 45 and 37: odd, two words a row, and no multiple of a tile
    intermediate_size: int = 37,
    gated: bool = True,
    factorization: str = "stacked",
    group: list[int] | None = None,
    ranks: list[int] | None = None,
    sparse: int | str | None = None,
    bias: bool = False,
    only: str | None = None,
    full: bool = False,
    payloads: str = "",
    dtype: torch.dtype = torch.float32,
) -> FactoredExperts:
    """A layer of random numbers; its residuals are as large as the base, so that none is lost unseen.

    ranks: rank of each expert, for both matrices (down reversed, so that a mix-up of the two shows)
    sparse: n for the block layout, "bitmap", or "empty" for a bitmap that keeps nothing
    only: "gate_up" or "down" leaves the other matrix without residual
    full: whether the residual has every place;  payloads: what is rounded to codes, as FactoredExperts names it
    """
    sizes = {
        "num_experts": num_experts,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    E, H, inner = num_experts, hidden_size, intermediate_size
    shapes = {"gate_up": ((2 if gated else 1) * inner, H), "down": (H, inner)}
    matrices = {m: s for m, s in shapes.items() if only in (None, m)}

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    t: dict[str, Tensor] = {}
    if group is not None:
        t["group"] = torch.tensor(group, dtype=torch.int32)
        for m, (N, K) in shapes.items():
            t[f"base_{m}"] = normal(max(group) + 1, N, K, scale=K**-0.5)
    if ranks is not None:
        own = {"gate_up": ranks, "down": ranks[::-1]}
        if factorization == "joint":
            total = sum(ranks)
            t["rank_offsets_gate_up"] = torch.tensor([0, *ranks], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            t["u_gate_up"] = normal(total, inner, scale=inner**-0.5)
            t["v_gate_up"] = normal(total, (2 if gated else 1) * H, scale=2.0)
            t["u_down"] = normal(total, H, scale=2.0)
        else:
            for m, (N, K) in matrices.items():
                left = inner if m == "gate_up" and factorization == "separate" else N
                t[f"rank_offsets_{m}"] = torch.tensor([0, *own[m]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                t[f"u_{m}"] = normal(sum(own[m]), left, scale=0.5)
                t[f"v_{m}"] = normal(sum(own[m]), K, scale=K**-0.5)
    for m, (N, K) in matrices.items() if sparse is not None else ():
        dense = normal(E, N, K, scale=2 * K**-0.5)
        if isinstance(sparse, int):
            t[f"mask_{m}"], t[f"values_{m}"] = pack_block(dense, sparse)
        else:
            keep = torch.rand((E * N, K), generator=generator) < (0.0 if sparse == "empty" else 0.25)
            if sparse == "bitmap":
                keep[:, min(31, K - 1)] = True  # the sign bit of every word
                keep[0], keep[1] = False, True  # a row of none, a row of all
            mask, t[f"values_{m}"], offsets = pack_bitmap(dense.view(E * N, K), keep)
            t[f"mask_{m}"] = mask.view(E, N, -1)
            # One of each dtype that row offsets may have.
            t[f"row_offsets_{m}"] = offsets.to(torch.int32) if m == "gate_up" else offsets
    for m, (N, K) in matrices.items() if full else ():
        t[f"values_{m}"] = normal(E, N, K, scale=K**-0.5)
    if bias:
        t["bias_gate_up"] = normal(E, shapes["gate_up"][0], scale=0.5)
        t["bias_down"] = normal(E, H, scale=0.5)
    layer = FactoredExperts.from_tensors(t, **sizes, gated=gated, factorization=factorization)
    return rounded(layer, parse_payloads(payloads)) if payloads else layer
