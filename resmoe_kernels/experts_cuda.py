"""The CUDA twin of experts_reference: same arguments, for few tokens on NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from resmoe_kernels.factored import MATRICES, SIZE_NAMES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.ops import declines_call

ALIGNMENT = 16  # bytes: what one load of a weight reads


def experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: FactoredExperts, activation: str = "silu"
) -> Tensor:
    """What ``experts_reference.experts`` computes, for calls that ``declines`` lets pass: one persistent kernel, of
    low-rank or of block-sparse experts.

    Products multiply operands in the dtype of x; V x, w h and their sums are rounded to it, everything else is float32.
    The result does not depend on scheduling. The call can be captured in a CUDA graph: it clears its flags itself.
    """
    tensors = [None if (t := getattr(weights, name)) is None else t.contiguous() for name in TENSOR_NAMES]
    sizes = [getattr(weights, name) for name in SIZE_NAMES]
    call = (x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous())
    op = torch.ops.resmoe.low_rank_decode if weights.mask_down is None else torch.ops.resmoe.block_sparse_decode
    return op(*call, *tensors, *sizes, activation)


@cache
def limits() -> tuple[int, int, int]:
    """T, pairs T·top_k and E up to which the kernels serve a call; needs the extension, whatever it was built with."""
    tokens, pairs, experts = torch.ops.resmoe.decode_limits()
    return tokens, pairs, experts


def declines(x: Tensor, top_k_index: Tensor, weights: FactoredExperts, activation: str) -> str | None:
    """What of a call the CUDA kernels do not serve, None if they serve it all. Reads no contents."""
    tokens, pairs, (most_tokens, most_pairs, _) = x.shape[0], top_k_index.numel(), limits()
    if not 0 < tokens <= most_tokens or not 0 < pairs <= most_pairs:
        return f"{tokens} tokens of {top_k_index.shape[1]} slots (1 to {most_tokens}, {most_pairs} pairs)"
    for name, tensor in weights.tensors().items():
        if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT:
            return f"{name} that does not begin at a multiple of {ALIGNMENT} bytes"
    return declines_layer(weights, x.dtype, activation)


def declines_layer(weights: FactoredExperts, dtype: torch.dtype, activation: str) -> str | None:
    """What of a layer they do not serve with x of this dtype, at any number of tokens."""
    sparse = [getattr(weights, f"mask_{m}") is not None for m in MATRICES]
    low_rank = any(getattr(weights, f"u_{m}") is not None for m in MATRICES)
    if weights.factorization != "stacked":
        return f"factorization {weights.factorization!r}"
    if (declined := weights.declined_payload()) is not None:
        return declined
    if any(getattr(weights, f"bias_{m}") is not None for m in MATRICES):
        return "biases"
    if any(sparse) and (low_rank or not all(sparse)):
        return "a sparse residual that is not alone and in both matrices"
    if any(getattr(weights, f"row_offsets_{m}") is not None for m in MATRICES):
        return "a bitmap"
    if weights.base_gate_up is not None and weights.base_gate_up.shape[0] > 1:
        return f"{weights.base_gate_up.shape[0]} groups"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x of {_name(dtype)}"
    for name, tensor in weights.tensors().items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            return f"{name} of {_name(tensor.dtype)} with x of {_name(dtype)}"
    least = 32 if any(sparse) else 16
    if weights.hidden_size % 32 or weights.intermediate_size % least:
        return f"H = {weights.hidden_size}, I = {weights.intermediate_size} (multiples of 32 and {least})"
    if weights.num_experts > (most_experts := limits()[2]):
        return f"{weights.num_experts} experts (at most {most_experts})"
    return declines_call(dtype, activation)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
