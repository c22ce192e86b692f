"""A library of which every product, decomposition and long sum depends on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN.mv, ATEN.dot}
DECOMPOSITIONS = {
    ATEN.linalg_eigh, ATEN._linalg_eigh, ATEN._linalg_eigvals, ATEN._linalg_svd, ATEN.linalg_cholesky_ex,
    ATEN.linalg_solve_triangular, ATEN.linalg_qr, ATEN._linalg_solve_ex, ATEN.linalg_lstsq,
    ATEN.cholesky_solve, ATEN.cholesky_inverse,
}  # fmt: skip
FUNCTIONS = {ATEN.silu, ATEN.gelu, ATEN.sigmoid, ATEN.exp, ATEN.log, ATEN.tanh, ATEN.erf, ATEN.pow}
SUMS = {ATEN.sum, ATEN.mean, ATEN.linalg_vector_norm, ATEN.norm, ATEN.var, ATEN.std}
LARGE = 1 << 15  # elements that torch shares out among threads


class LibraryWithThreads(TorchDispatchMode):
    """Torch on a library that computes a little differently with every number of threads: products, decompositions,
    functions of many elements, sums of many to one number. It knows the calling thread alone: what others compute, on
    one thread each, is as it is.

    noise: by how much a result differs for each thread, or 4 ulp. What is stored is float32 at most: of a few ulp of
    float64 on the way little would be seen there."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        threads, packet = torch.get_num_threads(), function.overloadpacket
        if threads == 1:
            return result
        outputs = result if isinstance(result, tuple) else (result,)
        shared_out = isinstance(arguments[0], Tensor) and arguments[0].numel() >= LARGE
        one_by_one = shared_out and (packet in FUNCTIONS or (packet in SUMS and outputs[0].numel() == 1))
        if packet in PRODUCTS or packet in DECOMPOSITIONS or one_by_one:
            for tensor in outputs:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.mul_(1 + threads * max(self.noise, 4 * torch.finfo(tensor.dtype).eps))
        return result


@contextmanager
def threads(count: int, noise: float = 0.0) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with LibraryWithThreads(noise):
            yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
