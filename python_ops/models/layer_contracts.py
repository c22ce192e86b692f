"""FactoredExpertsLayer behind the contracts of single families: what a block hands over, and what it expects back."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer


class FlatteningExpertsLayer(FactoredExpertsLayer):
    """DBRX: tokens come as (B, L, H), and so they go."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (..., H), top_k_index and top_k_weights (T, top_k) -> (..., H)."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, top_k_index, top_k_weights).view_as(hidden_states)


class IdentityExpertsLayer(FactoredExpertsLayer):
    """LongCat-Flash: slots from ``first_identity`` on are experts that give back what they take.

    y = sum of w_e f_e(x) over chosen e < first_identity, + (sum of the other w) x
    """

    first_identity: int
    no_threshold = "some of its experts are the identity, which costs nothing"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, top_k) int, top_k_weights (T, top_k) -> (T, H)."""
        identity = top_k_index >= self.first_identity
        kept = top_k_weights.where(identity, 0).sum(-1, keepdim=True)
        slots = top_k_index.where(~identity, -1)
        return super().forward(hidden_states, slots, top_k_weights) + (kept * hidden_states).to(hidden_states.dtype)


class InputWeightedExpertsLayer(FactoredExpertsLayer):
    """Llama 4: weights are on the experts' input, y = sum of f_e(w_e x), and a token comes once for every expert."""

    num_slots: int
    top_k: int
    no_threshold = "its weights are on the input of experts"

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (E T, H), expert by expert, 0 where an expert was not chosen -> the same shape, 0 there too."""
        rows, slots = chosen_rows(hidden_states, self.num_slots, self.top_k)
        outputs = super().forward(rows, slots, torch.ones_like(slots, dtype=rows.dtype))
        tokens = torch.arange(len(rows), device=slots.device) // self.top_k
        count = len(hidden_states) // self.num_slots
        made = torch.zeros_like(hidden_states)
        # A slot of -1 has an output of 0, and may be added anywhere.
        return made.index_add_(0, slots.squeeze(1).clamp(min=0) * count + tokens, outputs)


def chosen_rows(hidden_states: Tensor, num_slots: int, top_k: int) -> tuple[Tensor, Tensor]:
    """hidden_states (E T, H) -> the rows (T top_k, H) of the experts that a token chose, and their ids (T top_k, 1).

    Chosen are those whose row is not 0, of which there are at most ``top_k``; -1 where there are fewer.
    """
    rows = hidden_states.view(num_slots, -1, hidden_states.shape[-1])
    used = (rows != 0).any(-1).T  # (T, E)
    slots = used.to(torch.uint8).topk(top_k, dim=-1).indices  # static shapes: nothing waits for the device
    tokens = torch.arange(len(used), device=slots.device).unsqueeze(-1)
    ids = slots.where(used.gather(-1, slots), -1)
    return rows[slots, tokens].flatten(0, 1), ids.view(-1, 1)
