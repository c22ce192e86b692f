"""The module that stands where a model's experts module stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resmoe_kernels.factored import SIZE_NAMES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.ops import experts_flat, explain


class FactoredExpertsLayer(nn.Module):
    """Factored experts behind the contract of transformers: ``forward(hidden_states, top_k_index, top_k_weights)``.

    Its parameters are the tensors of FactoredExperts under their own names, frozen. ``activation`` is a name of
    resmoe_kernels.activations; it comes from the model's class, so a checkpoint does not store it.

    ``from_pretrained`` checks the contents of the index tensors; whoever loads others into the parameters calls
    ``layer.weights.check_values()``.
    """

    def __init__(self, weights: FactoredExperts, activation: str) -> None:
        super().__init__()
        for name, value in weights.sizes().items():
            setattr(self, name, value)
        self.activation = activation
        for name in TENSOR_NAMES:
            tensor = getattr(weights, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def weights(self) -> FactoredExperts:
        """The layer's weights as a value; shares memory with the parameters."""
        tensors = {name: p.data for name in TENSOR_NAMES if (p := self._parameters[name]) is not None}
        return FactoredExperts.from_tensors(tensors, **{name: getattr(self, name) for name in SIZE_NAMES})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, top_k) int, top_k_weights (T, top_k) -> (T, H)."""
        parameters = self._parameters
        flat = [parameters[name] for name in TENSOR_NAMES] + [getattr(self, name) for name in SIZE_NAMES]
        return experts_flat(hidden_states, top_k_index, top_k_weights, flat, self.activation)

    def explain(self) -> str:
        """Which backend runs this layer, and why no faster one does."""
        return explain(self.weights)

    def extra_repr(self) -> str:
        parts = [f"E={self.num_experts}, H={self.hidden_size}, I={self.intermediate_size}", self.activation]
        parts += [n for n in ("base_gate_up", "u_gate_up", "mask_gate_up") if self._parameters[n] is not None]
        return ", ".join(parts)


class OneHotExpertsLayer(FactoredExpertsLayer):
    """The same behind the contract of Switch Transformers: a one-hot mask instead of expert ids."""

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (T, H), selected_experts (T, top_k, E) one-hot, routing_weights (T, top_k) -> (T, H).

        A row of zeros (a token over its expert's capacity) is a skipped slot.
        """
        chosen = selected_experts.argmax(-1)
        top_k_index = torch.where(selected_experts.sum(-1) > 0, chosen, -1)
        return super().forward(hidden_states, top_k_index, routing_weights)


class SelfRoutedExpertsLayer(FactoredExpertsLayer):
    """The same for a block that routes by itself and calls ``moe_infer``."""

    def moe_infer(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x (T, H); ids and weights (T, top_k), or flattened to (T top_k,) and (T top_k, 1) -> (T, H)."""
        return self(x, expert_ids.reshape(len(x), -1), expert_weights.reshape(len(x), -1))

    def __iter__(self):
        raise ValueError(
            "factored experts cannot be called one by one, as this block does in training: call model.eval()"
        )

    def __getitem__(self, index: int):
        return iter(self)
