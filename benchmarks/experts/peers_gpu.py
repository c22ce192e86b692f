"""The dense layers that others ship for GPUs. Weights are those of ``peers.py``, on the GPU; nothing is packed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.experts.peers import Peer, gated_silu, transformers_layers
from benchmarks.measure import Draw, Layer
from benchmarks.shapes import Shape
from resmoe_kernels import DenseExperts
from resmoe_kernels.activations import activate

GET = "pip install vllm, or kernels 'nvidia-cutlass-dsl>=4.6.0' 'apache-tvm-ffi>=0.1.10' for sonicmoe"


def torch_grouped_mm(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
    """Pairs sorted by expert, and torch's grouped GEMM twice; nothing waits for the device."""

    def layer(weights: DenseExperts) -> Layer:
        E, gate_up, down = weights.num_experts, weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)
        experts = torch.arange(E, device=gate_up.device)

        def call(d: Draw) -> Tensor:
            expert, order = d.index.flatten().sort()
            ends = torch.searchsorted(expert, experts, right=True).int()
            z = torch.nn.functional.grouped_mm(d.x[order // d.index.shape[1]], gate_up, offs=ends)
            h = activate(z, shape.activation, weights.gated)
            pairs = torch.nn.functional.grouped_mm(h, down, offs=ends) * d.weights.flatten()[order, None]
            y = torch.empty_like(pairs).index_copy_(0, order, pairs)
            return y.view(*d.index.shape, -1).sum(1)

        return lambda d: lambda: call(d)

    return [layer(weights) for weights in copies]


def _vllm_missing(shape: Shape) -> str | None:
    return "vllm is not installed" if importlib.util.find_spec("vllm") is None else gated_silu(shape)


def _vllm(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
    """The Triton kernels of vLLM, with the tiles that it ships for the shape and device."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    def layer(weights: DenseExperts) -> Layer:
        def prepared(d: Draw) -> Callable[[], Tensor]:
            w, index = d.weights.float(), d.index.int()  # what its router hands over
            return lambda: fused_experts(d.x, weights.gate_up, weights.down, w, index)

        return prepared

    return [layer(weights) for weights in copies]


def _sonicmoe_missing(shape: Shape) -> str | None:
    if not shape.gated:
        return "it serves gated experts only"
    try:
        from transformers.integrations.sonicmoe import is_sonicmoe_loadable

        is_sonicmoe_loadable(raise_error=True)
    except ImportError as error:
        return " ".join(str(error).split())
    return None


PEERS: tuple[Peer, ...] = (
    Peer("torch grouped_mm", lambda shape: None, torch_grouped_mm),
    Peer("transformers eager", lambda shape: None, transformers_layers("eager"), captures=False),
    Peer("transformers batched_mm", lambda shape: None, transformers_layers("batched_mm")),
    Peer("transformers grouped_mm", lambda shape: None, transformers_layers("grouped_mm")),
    Peer("vllm fused_moe", _vllm_missing, _vllm),
    Peer("sonicmoe", _sonicmoe_missing, transformers_layers("sonicmoe")),
)
