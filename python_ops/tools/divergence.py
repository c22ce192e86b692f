"""How far a model's next-token distributions are from a reference's, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ELEMENTS = 1 << 22  # of a distribution in float64 at a time: 32 MiB for each of four tensors


class Divergence:
    """Sums up over the tokens of a text, p the reference's distribution and q the model's:

    KL = sum_v p_v (log p_v - log q_v)  in nats,  per token;    agreement: argmax p = argmax q
    """

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same = 0

    def add(self, logits: Tensor, reference: Tensor) -> None:
        """logits, reference: (n, V) of any float dtype, of the same tokens; taken in float64.

        Raises ValueError if they are not of one vocabulary.
        """
        if logits.shape != reference.shape:
            raise ValueError(
                f"against: its vocabulary has {reference.shape[-1]} entries, the model's {logits.shape[-1]}; "
                "compare models of one tokenizer"
            )
        step = max(1, _ELEMENTS // logits.shape[-1])
        for ours, theirs in zip(logits.split(step), reference.to(logits.device).split(step), strict=True):
            self._same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            log_p = theirs.double().log_softmax(-1)
            p = log_p.exp()
            # 0 log 0 = 0: an entry that a model never gives has -inf for a logarithm.
            terms = torch.where(p > 0, p * (log_p - ours.double().log_softmax(-1)), 0.0)
            self._kl.append(terms.sum(-1).cpu())

    def metrics(self) -> dict[str, float]:
        """``kl``, the mean; ``kl_99``, which 99 of 100 tokens stay within; ``same_first_choice``, a share."""
        kl = torch.cat(self._kl).sort().values
        return {
            "kl": kl.mean().item(),
            "kl_99": kl[math.ceil(0.99 * len(kl)) - 1].item(),
            "same_first_choice": self._same / len(kl),
        }
