"""Which derivatives the ops have: the first, backwards. The others are refused here.

PyTorch takes an op without a rule for a constant: tangents and second derivatives through one would be zero, silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_INSTEAD = "run the layer on resmoe_kernels.experts_reference.experts, which is plain PyTorch"


def refuse_forward_mode(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises ValueError if one of them carries a tangent (forward-mode automatic differentiation, torch.func.jvp)."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{op}: has no forward-mode derivative (jvp); {_INSTEAD}")


def only_first(op: str, gradients: Sequence[Tensor], of: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The gradients; differentiated once more (``create_graph``), they raise ValueError.

    of: what they were computed from, and so depend on
    """
    return _OnlyFirst.apply(op, len(gradients), *gradients, *of)


class _OnlyFirst(torch.autograd.Function):
    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise ValueError(f"{ctx.op}: has no second derivative (create_graph); {_INSTEAD}")
