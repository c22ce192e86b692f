"""The reference: what a layer of factored experts computes, in plain PyTorch, on any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.activations import activate
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.ops import expand_sparse


def experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: FactoredExperts, activation: str = "silu"
) -> Tensor:
    """Routes every token through its experts and sums their weighted outputs.

    For token t with surviving pairs (e, w) and g = g(e):

        a   = B_gate_up[g] x                                   once per (token, group)
        z_e = a + U_e (V_e x) + S_e x + bias_gate_up[e]
        h_e = f(z_e[:I]) * z_e[I:]                             f(z_e) where there is no gate
        y   = sum_g B_down[g] (sum_{e in g} w_e h_e)           once per (token, group)
            + sum_e w_e (U'_e (V'_e h_e) + S'_e h_e + bias_down[e])

    x: (T, H) float, any strides
    top_k_index: (T, top_k) int32 or int64; an id outside [0, E) skips its slot
    top_k_weights: (T, top_k) float of any precision
    weights: the layer, see FactoredExperts
    activation: a name of resmoe_kernels.activations
    Returns (T, H) in the dtype of x.

    All arithmetic and every sum is in float32 (float64 for float64 x), rounded once at the end. Sums run in the order
    of expert ids, so the result does not depend on scheduling. Source: ResMoE, arXiv 2503.06881, section 4; the paper's
    code adds a whole base expert's output to the residual's instead, which is not the compressed model.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, top_k = top_k_index.shape
    output = torch.zeros(tokens, weights.hidden_size, dtype=compute, device=x.device)
    dtype, x = x.dtype, x.to(compute)

    pair_expert = top_k_index.reshape(-1)
    pair_weight = top_k_weights.reshape(-1, 1).to(compute)
    in_range = (pair_expert >= 0) & (pair_expert < weights.num_experts)
    groups = _experts_by_group(weights, pair_expert[in_range].unique().tolist())

    for group, members in groups.items():
        pairs = [(pair_expert == e).nonzero().squeeze(1) for e in members]
        token_of = [p // top_k for p in pairs]
        group_tokens, row_of = torch.cat(token_of).unique(return_inverse=True)
        rows = row_of.split([len(p) for p in pairs])

        shared = _base_product(weights, "gate_up", group, x[group_tokens])
        weighted_h = x.new_zeros(len(group_tokens), weights.intermediate_size)
        for e, pair, token, row in zip(members, pairs, token_of, rows, strict=True):
            z = _residual_product(weights, "gate_up", e, x[token])
            if shared is not None:
                z = z + shared[row]
            if weights.bias_gate_up is not None:
                z = z + weights.bias_gate_up[e].to(compute)
            h = activate(z, activation, weights.gated) * pair_weight[pair]
            weighted_h.index_add_(0, row, h)
            y = _residual_product(weights, "down", e, h)
            if weights.bias_down is not None:
                y = y + pair_weight[pair] * weights.bias_down[e].to(compute)
            output.index_add_(0, token, y)
        shared = _base_product(weights, "down", group, weighted_h)
        if shared is not None:
            output.index_add_(0, group_tokens, shared)
    return output.to(dtype)


def _experts_by_group(weights: FactoredExperts, hit: list[int]) -> dict[int, list[int]]:
    group = [-1] * weights.num_experts if weights.group is None else weights.group.tolist()
    members: dict[int, list[int]] = {}
    for e in hit:
        members.setdefault(group[e], []).append(e)
    return members


def _base_product(weights: FactoredExperts, matrix: str, group: int, x: Tensor) -> Tensor | None:
    """x (rows, K) -> x base[group]^T (rows, N); None where the group has no base."""
    if weights.group is None or group < 0:
        return None
    return x @ weights.read(f"base_{matrix}", group, x.dtype).T


def _residual_product(weights: FactoredExperts, matrix: str, e: int, x: Tensor) -> Tensor:
    """x (rows, K) -> x (U_e V_e + S_e)^T (rows, N), the low rank through its two thin factors."""
    rows, columns = weights.rows_columns(matrix)
    y = x.new_zeros(x.shape[0], rows)
    offsets = weights.low_rank_offsets(matrix)
    if offsets is not None:
        y = y + _low_rank_product(weights, matrix, slice(int(offsets[e]), int(offsets[e + 1])), x)
    sparse = weights.sparse_rows(matrix, e, x.dtype)
    if sparse is not None:
        y = y + x @ expand_sparse(*sparse, columns).to(x.dtype).T
    if weights.has_full(matrix):
        y = y + x @ weights.read(f"values_{matrix}", e, x.dtype).T
    return y


def _low_rank_product(weights: FactoredExperts, matrix: str, own: slice, x: Tensor) -> Tensor:
    u = weights.read(f"u_{matrix}", own, x.dtype)
    if weights.factorization == "joint":
        if matrix == "down":
            return (x @ weights.read("u_gate_up", own, x.dtype).T) @ u
        halves = weights.read("v_gate_up", own, x.dtype).split(weights.hidden_size, dim=1)
        return torch.cat([(x @ half.T) @ u for half in halves], dim=1)
    v = weights.read(f"v_{matrix}", own, x.dtype)
    if weights.factorization == "separate" and matrix == "gate_up" and weights.gated:
        half = u.shape[0] // 2
        return torch.cat([(x @ v[:half].T) @ u[:half], (x @ v[half:].T) @ u[half:]], dim=1)
    return (x @ v.T) @ u
