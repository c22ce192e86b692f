"""The Triton twin of experts_reference: same arguments, for GPUs, and for the CPU under Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import Problem, decodes
from resmoe_kernels.ops import KERNEL_DTYPES, declines_call
from resmoe_kernels.triton_kernels.decode import decode
from resmoe_kernels.triton_kernels.launch import target_of
from resmoe_kernels.triton_kernels.prefill import prefill


def experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: FactoredExperts, activation: str = "silu"
) -> Tensor:
    """What ``experts_reference.experts`` computes, for what ``declines`` lets pass.

    x, weights: bfloat16, float16 or float32, in any mix; activation: a pointwise one

    Products multiply tiles in the dtype of x where all weights have it, else in float32; V x, w h and their sums are
    rounded to that dtype between kernels, everything else is float32. The result does not depend on scheduling: no
    sum is made by atomics. The call can be captured in a CUDA graph: it never waits for the device, and the shapes
    it allocates depend on shapes only. Tensors that are not contiguous are copied.
    """
    if 0 in top_k_index.shape:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    if not all(t.is_contiguous() for t in weights.tensors().values()):
        tensors = {name: t.contiguous() for name, t in weights.tensors().items()}
        weights = FactoredExperts.from_tensors(tensors, **weights.sizes())
    problem, operand, target = problem_of(x, top_k_index, weights), operand_dtype(x, weights), target_of(x.device)
    run = decode if decodes(problem, target) else prefill
    arguments = (x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous(), weights, activation)
    return run(*arguments, problem, target, operand)


def declines(weights: FactoredExperts, activation: str = "silu") -> str | None:
    """What of a layer the Triton kernels do not serve, None if they serve it all. Reads no contents."""
    if weights.factorization != "stacked":
        return f"factorization {weights.factorization!r}"
    if (declined := weights.declined_payload()) is not None:
        return declined
    for dtype in weights.dtypes() - set(KERNEL_DTYPES):
        return f"weights of {str(dtype).removeprefix('torch.')}"
    return declines_call(torch.float32, activation)


def operand_dtype(x: Tensor, weights: FactoredExperts) -> torch.dtype:
    """The dtype of x if every weight has it, else float32."""
    dtypes = {x.dtype, *weights.dtypes()}
    return x.dtype if len(dtypes) == 1 else torch.float32


def problem_of(x: Tensor, top_k_index: Tensor, weights: FactoredExperts) -> Problem:
    """A call as heuristics see it; reads shapes only."""
    mean_rank = [0 if u is None else -(-u.shape[0] // weights.num_experts) for u in (weights.u_gate_up, weights.u_down)]
    return Problem(
        tokens=x.shape[0],
        top_k=top_k_index.shape[1],
        num_experts=weights.num_experts,
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        gated=weights.gated,
        groups=0 if weights.base_gate_up is None else weights.base_gate_up.shape[0],
        rank_gate_up=mean_rank[0],
        rank_down=mean_rank[1],
        sparse=weights.mask_gate_up is not None or weights.mask_down is not None,
        itemsize=operand_dtype(x, weights).itemsize,
    )
