"""The weight form in the order in which the CPU kernels read it: one block of memory, see csrc/packed.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_kernels import ops
from resmoe_kernels.factored import MATRICES, FactoredExperts


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """One layer's experts as one block, which takes the place of the tensors it was made from.

    block: (bytes,) uint8 on the CPU, 64-byte aligned; its layout belongs to this version of the package, so it is
        not for files: ``unpack`` gives the tensors back bit by bit
    form: the layer on the meta device: names, shapes and dtypes of what was packed
    """

    block: Tensor
    form: FactoredExperts

    @classmethod
    def pack(cls, weights: FactoredExperts) -> PackedExperts:
        """Packs a layer on the CPU; while it runs, memory holds both forms.

        Raises ValueError if the kernels are not built or do not serve the layer, or, as ``check_values`` does, if the
        contents of its index tensors are wrong.
        """
        if not ops.has_cpu_kernel("experts_packed"):
            raise ValueError("PackedExperts: the cpu backend is not built; resmoe env says what is")
        device = next(iter(weights.tensors().values())).device
        if device.type != "cpu":
            raise ValueError(f"PackedExperts: weights must be on the CPU, got {device}")
        reason = declines(weights)
        if reason is not None:
            raise ValueError(f"PackedExperts: the CPU kernels do not serve {reason}")
        return cls(ops.pack(weights), weights.to("meta"))

    def unpack(self) -> FactoredExperts:
        """What was packed, in memory of its own."""
        return ops.unpack(self.block)

    def nbytes(self) -> int:
        """Bytes of the block; ``form.nbytes()`` are those of the checkpoint."""
        return self.block.numel()


def declines(weights: FactoredExperts, activation: str = "silu") -> str | None:
    """What of a layer the CPU kernels do not serve, None if they serve it all. Reads no contents."""
    if weights.factorization != "stacked":
        return f"factorization {weights.factorization!r}"
    for matrix in MATRICES:
        payload = weights.payload(f"values_{matrix}")
        if payload is not None and not weights.has_full(matrix):
            return f"values_{matrix} of {payload} under a mask"
    dtypes = weights.dtypes()
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if len(dtypes) > 1:
        return f"weights of several dtypes ({', '.join(names)})"
    if not dtypes <= set(ops.KERNEL_DTYPES):
        return f"weights of {names[0]}"
    return ops.declines_call(torch.float32, activation)
