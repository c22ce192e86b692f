"""Products and sums whose bits do not depend on the number of threads, whatever library multiplies.

A library may share out one product by its inner dimension (oneMKL does, where the result is small and the sums are
long), so that sums are taken in another order with another number of threads. Here a product is cut into blocks of the
result by its shape alone, each is one call of the library on one thread, and the threads take blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise, starmap

import torch
from torch import Tensor

# Of a block of the result. On two Zen 5 cores (4096, 4096) squared took as long as in one call of oneMKL, and
# (2048, 2048) by (2048, 352), which is 16 blocks, 4 % longer; a thread packs its operands anew for each.
ROWS, COLUMNS = 256, 1024
SMALL = 1 << 21  # multiplications that one thread is done with before others are awake
SYMMETRIC = 512  # rows and columns of a block in symmetric products


@contextmanager
def one_thread() -> Iterator[None]:
    """For LAPACK, whose last bits change with the number of threads: a layer's bytes must not depend on how many layers
    are compressed at a time. For exp and what is made of it, too: torch computes the ends of what each thread takes by
    another function than the rest. And for small steps: two busy threads on one free core wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """left (M, K) right (K, N) -> (M, N), or as many of them one after another: (B, M, K) (B, K, N) -> (B, M, N).

    left, right: of one dtype, any strides;  out: where the result goes, any strides
    Where a gradient is wanted it is torch's own product, and the first paragraph of this file does not hold.
    """
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return left @ right
    if out is None:
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
    if left.dim() == 3:
        return _batched(left, right, out)

    def block(rows: slice, columns: slice) -> None:
        torch.mm(left[rows], right[:, columns], out=out[rows, columns])

    M, K, N = *left.shape, right.shape[1]
    if left.device.type != "cpu":
        block(slice(None), slice(None))
    elif M * K * N <= SMALL:
        with one_thread():
            block(slice(None), slice(None))
    else:
        _run([partial(block, rows, columns) for rows in _cut(M, ROWS) for columns in _cut(N, COLUMNS)])
    return out


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """left^T right (n, n) where that is symmetric, for little more than half of the work."""
    size = left.shape[1]
    out = left.new_empty(size, size)

    def block(rows: slice, columns: slice) -> None:
        torch.mm(left[:, rows].T, right[:, columns], out=out[rows, columns])
        if rows != columns:
            out[columns, rows] = out[rows, columns].T

    if left.device.type != "cpu":
        return torch.mm(left.T, right, out=out)
    cuts = _cut(size, SYMMETRIC)
    _run([partial(block, rows, columns) for i, rows in enumerate(cuts) for columns in cuts[i:]])
    return out


def total(values: Tensor) -> float:
    """The sum of all, each as it is, in float64: of rows of 4096, then of rows of those, so in one order always."""
    sums = values.reshape(-1)
    while len(sums) > 1:
        padded = torch.nn.functional.pad(sums, (0, -len(sums) % 4096))
        sums = padded.view(-1, 4096).sum(1, dtype=torch.float64)
    return float(sums.sum())


def _batched(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    def block(part: slice) -> None:
        torch.bmm(left[part], right[part], out=out[part])

    if left.device.type != "cpu":
        block(slice(None))
    else:
        _run([partial(block, part) for part in _cut(len(left), ROWS)])
    return out


def _cut(size: int, step: int) -> list[slice]:
    """Parts of nearly equal length of at most a step: a short last one would keep others waiting."""
    count = max(1, -(-size // step))
    ends = [size * i // count for i in range(count + 1)]
    return list(starmap(slice, pairwise(ends)))


def _run(blocks: Sequence[Callable[[], None]]) -> None:
    threads, inference = min(torch.get_num_threads(), len(blocks)), torch.is_inference_mode_enabled()

    def run(block: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # each thread has modes of its own
            block()

    with one_thread():  # some libraries know one number for the whole process, others one a thread; see _pool
        if threads == 1:
            for block in blocks:
                block()
        else:
            list(_pool(threads).map(run, blocks))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "products", initializer=lambda: torch.set_num_threads(1))
