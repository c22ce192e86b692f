"""What a layer's output loses without some of its experts: all experts run once, every candidate is a weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resmoe_kernels.activations import activate
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.products import one_thread, product, total

_OUTPUT_BYTES = 1 << 30  # of the outputs alive at a time while inner products are taken
_CHANGE_ELEMENTS = 1 << 23  # of the routing weights alive at a time, several float32 tensors of this size

# logits (..., T, E), pruned=(..., 1, E) bool or None, left=experts that are not or None
#   -> weights (..., T, k) float32, slots (..., T, k) int64, -1 where unused
Route = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """Inner products of the outputs that a layer's E experts have for S sample tokens, and how these are routed.

        gram[t, i, j] = f_i(x_t) . f_j(x_t)

    The outputs themselves (S, E, H) are not kept. A change of routing weights by d changes the layer's output for
    a token by sum_e d_e f_e(x), whose square is d^T gram d: H / E times less to store and to read. With 1,024
    tokens, at DeepSeek-V2-Lite's sizes on one CPU core, a candidate takes 1.2 ms instead of 1.2 s for running the
    layer, after 13 s that all experts take once (benchmarks/compression/bench_genetic.py).

    gram: (S, E, E) float32, 4 S E^2 bytes: 1 MiB for 4,096 tokens of Mixtral, 64 MiB for 64 experts, 1 GiB for 256
    logits: (S, E) float32, the router's;  route: how it chooses among the rest
    """

    gram: Tensor
    logits: Tensor
    route: Route

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    def change(self, pruned: Tensor) -> Tensor:
        """||F(X) - F(X; without C)||_F for sets C of experts; the router chooses among the rest.

        F(x) = sum_e w_e(x) f_e(x), without what runs beside the experts: shared experts, the residual stream.

        pruned: (C, E) bool, a row for each set
        Returns (C,) float64.
        """
        count, experts = pruned.shape
        squared = torch.zeros(count, dtype=torch.float64)
        left = (~pruned).sum(-1)
        if int(left.min()) != int(left.max()):
            return self._by_size(pruned, left)
        step = max(1, _CHANGE_ELEMENTS // (count * experts))
        for gram, logits in zip(self.gram.split(step), self.logits.split(step), strict=True):
            delta = self._weights(logits.expand(count, -1, -1), pruned, int(left[0])) - self._weights(logits)
            delta = delta.transpose(0, 1)  # (tokens, sets, E): one small matrix product for each token
            squared += (product(delta, gram) * delta).sum(-1).sum(0, dtype=torch.float64)
        return squared.clamp_min(0).sqrt()

    def _by_size(self, pruned: Tensor, left: Tensor) -> Tensor:
        changes = torch.zeros(len(pruned), dtype=torch.float64)
        for size in left.unique():
            changes[left == size] = self.change(pruned[left == size])
        return changes

    def norm(self) -> float:
        """||F(X)||_F."""
        weights = self._weights(self.logits)
        return total((product(weights.unsqueeze(1), self.gram).squeeze(1) * weights).sum(1)) ** 0.5

    def importance(self) -> Tensor:
        """(E,) float64, of each expert what its absence changes: 0 where no token chose it."""
        return self.change(torch.eye(self.num_experts, dtype=torch.bool))

    def _weights(self, logits: Tensor, pruned: Tensor | None = None, left: int | None = None) -> Tensor:
        """(..., E) float32, the routing weights of all experts, 0 for those not chosen."""
        given = None if pruned is None else pruned.unsqueeze(1)
        weights, slots = self.route(logits, pruned=given, left=left)
        # An unused slot, -1, has weight 0, which is added to the first.
        return torch.zeros_like(logits).scatter_add(-1, slots.clamp_min(0), weights)


def expert_outputs(
    experts: DenseExperts,
    x: Tensor,
    logits: Tensor,
    route: Route,
    *,
    activation: str = "silu",
    file: Path | None = None,
) -> ExpertOutputs:
    """Runs every expert on all tokens, in float32.

    x: (S, H) float;  logits: (S, E) float, the router's;  route: how it chooses, see ``Route``
    activation: a name of resmoe_kernels.activations
    file: where the inner products lie, mapped into memory, instead of in memory; made here, S E^2 float32
    Memory beside them: 1 GiB of outputs, and one expert in float32.
    """
    count, size = experts.num_experts, experts.num_experts**2 * len(x)
    if file is None:
        gram = torch.empty(size)
    else:
        gram = torch.from_file(str(file), shared=True, size=size)
    gram = gram.view(len(x), count, count)
    step = max(1, _OUTPUT_BYTES // (4 * count * experts.hidden_size))
    for tokens, into in zip(x.split(step), gram.split(step), strict=True):
        there = tokens.to(experts.gate_up.device, torch.float32)
        hidden = (hidden_activations(experts, e, there, activation) for e in range(count))
        outputs = torch.stack([expert_output(experts, e, h) for e, h in enumerate(hidden)], dim=1)
        into.copy_(product(outputs, outputs.transpose(1, 2)))
    return ExpertOutputs(gram, logits.float(), route)


def hidden_activations(experts: DenseExperts, e: int, x: Tensor, activation: str) -> Tensor:
    """h_e of tokens x (T, H): (T, I), computed in the dtype of x."""
    z = product(x, experts.gate_up[e].to(x.dtype).T)
    if experts.bias_gate_up is not None:
        z = z + experts.bias_gate_up[e].to(x.dtype)
    with one_thread():
        return activate(z, activation, experts.gated)


def expert_output(experts: DenseExperts, e: int, h: Tensor) -> Tensor:
    """f_e of tokens with hidden activations h (T, I): (T, H), computed in the dtype of h."""
    y = product(h, experts.down[e].to(h.dtype).T)
    return y if experts.bias_down is None else y + experts.bias_down[e].to(h.dtype)
