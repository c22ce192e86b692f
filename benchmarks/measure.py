"""One timer for everything that is compared, what a call reads and computes by formula, and the machine's limits."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.shapes import DTYPE, Shape
from resmoe_kernels import FactoredExperts
from resmoe_kernels.factored import MATRICES
from resmoe_kernels.python_ops.jobs.memory import gib

# ---- the machine


@dataclass(frozen=True)
class Machine:
    """The limits a time is compared with, measured with the threads that are timed.

    read_gb_per_s: DRAM read by machine.cpp: four streams a thread, prefetched, on huge pages. On 4 KiB pages it is less
        (28 against 34 GB/s on a Zen 4 server with two threads)
    peak_gflop_per_s: bfloat16, the better of machine.cpp's loop over registers and ``torch`` matmul (oneDNN). On that
        server 463 and 430; where there is AMX, only the matmul knows it
    l3_bytes: of the last-level cache;  threads: 0 where the machine is a GPU
    """

    threads: int
    read_gb_per_s: float
    peak_gflop_per_s: float
    l3_bytes: int

    def seconds(self, nbytes: float, flops: float) -> float:
        """The shortest time there is for a call: the roofline."""
        return max(nbytes / self.read_gb_per_s, flops / self.peak_gflop_per_s) / 1e9


class MemoryRead:
    """Reads 128 MiB as fast as this machine can, on ``threads`` threads. As a candidate among others it tells the
    bandwidth that they had: that of a virtual machine changes within seconds."""

    name = "memory"
    burst, bursts, page = 1 << 27, 4, 4096

    def __init__(self, threads: int) -> None:
        self._probe = _machine_probe()
        self._pool = ThreadPoolExecutor(threads)
        self._memory = mmap.mmap(-1, self.bursts * self.burst)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._start = torch.frombuffer(self._memory, dtype=torch.uint8).fill_(1).data_ptr()
        self._share = self.burst // (threads * self.page) * self.page
        self._threads = threads
        self._turn = itertools.count()

    def seconds(self, calls: Sequence[object]) -> float:
        for _ in calls:
            begin = self._start + next(self._turn) % self.bursts * self.burst
            parts = [begin + k * self._share for k in range(self._threads)]
            start = time.perf_counter()
            list(self._pool.map(self._probe.read_memory, parts, [self._share] * self._threads))
            elapsed = time.perf_counter() - start
        return elapsed

    def gb_per_s(self, seconds: Sequence[float]) -> float:
        """The median rate of reads that took these times."""
        return self._share * self._threads / statistics.median(seconds) / 1e9

    def product_gflop_per_s(self) -> float:
        """Of machine.cpp's loop over registers on all threads; 0 where the processor has no such instruction."""
        rounds = 5_000_000
        operations = self._probe.multiply_bfloat16(rounds) * self._threads
        return _median_rate(
            operations, lambda _: list(self._pool.map(self._probe.multiply_bfloat16, [rounds] * self._threads)), 5
        )


def measure_machine(memory: MemoryRead, threads: int) -> Machine:
    torch.set_num_threads(threads)
    read = memory.gb_per_s([memory.seconds([None]) for _ in range(24)])
    return Machine(threads, read, max(memory.product_gflop_per_s(), _matmul_rate()), l3_bytes())


def _median_rate(work: float, call: Callable[[int], object], repeats: int) -> float:
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    return work / sorted(seconds[1:])[repeats // 2] / 1e9


def _machine_probe() -> ctypes.CDLL:
    """machine.cpp, compiled for this machine."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "machine.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        try:
            subprocess.run([*command, str(Path(__file__).with_name("machine.cpp"))], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"the machine's limits are measured by a C++ program; set CXX ({error})") from None
        probe = ctypes.CDLL(str(library))
    probe.read_memory.argtypes, probe.read_memory.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    probe.multiply_bfloat16.argtypes, probe.multiply_bfloat16.restype = [ctypes.c_int64], ctypes.c_double
    return probe


def _matmul_rate() -> float:
    best = 0.0
    for M, N, K in ((512, 4096, 2048), (2048, 2048, 2048)):
        x, w = torch.ones(M, K, dtype=DTYPE), torch.ones(N, K, dtype=DTYPE)
        rate = _median_rate(2 * M * N * K, lambda i, x=x, w=w: torch.nn.functional.linear(x, w), 6)
        best = max(best, rate)
    return best


def l3_bytes() -> int:
    """Bytes of the last-level cache; where the system does not say, 128 MiB, which is more than most have."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) << 10 if path.exists() else 128 << 20


# ---- one call, and what it costs


@dataclass(frozen=True)
class Draw:
    """The input of one call: x (T, H) bfloat16, index (T, top_k) int64, weights (T, top_k) bfloat16."""

    x: Tensor
    index: Tensor
    weights: Tensor

    def to(self, device: str) -> Draw:
        return Draw(self.x.to(device), self.index.to(device), self.weights.to(device))


def draw(shape: Shape, tokens: int, generator: torch.Generator) -> Draw:
    """Uniform routing to distinct experts, weights that sum to one."""
    scores = torch.rand(tokens, shape.num_experts, generator=generator)
    index = scores.argsort(1)[:, : shape.top_k].contiguous()
    weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(1)
    return Draw(torch.randn(tokens, shape.hidden_size, generator=generator).to(DTYPE), index, weights.to(DTYPE))


@dataclass(frozen=True)
class Cost:
    """Bytes of weights that a call reads and operations that it needs, by formula, from the real routing.

        bytes = index + sum over groups hit of group_bytes + sum over experts hit of expert_bytes[e]
        flops = base_flops * (distinct (token, group) pairs) + sum over (token, expert) pairs of pair_flops[e]

    A low-rank residual costs 2 r (N + K) per pair. A sparse one is multiplied as dense, 2 N K per pair, and its base
    with it at no cost: the least there is. Kernels that multiply the base on its own, as those here do where few tokens
    meet many experts, do 1 / top_k more. Activations are not counted: at most 2 % of the bytes at the shapes measured.

    group: (E,) int64, -1 for none;  expert_bytes, pair_flops: (E,) float64
    """

    group: Tensor
    group_bytes: int
    base_flops: int
    expert_bytes: Tensor
    pair_flops: Tensor
    index_bytes: int = 0

    @classmethod
    def dense(cls, shape: Shape) -> Cost:
        """Of plain matrices, as peers hold them."""
        E, parameters = shape.num_experts, shape.expert_parameters
        none = torch.full((E,), -1)
        bytes_, flops = (torch.full((E,), 2 * parameters, dtype=torch.float64) for _ in range(2))
        return cls(none, 0, 0, bytes_, flops)

    @classmethod
    def of(cls, weights: FactoredExperts) -> Cost:
        E = weights.num_experts
        expert_bytes, pair_flops = torch.zeros(2, E, dtype=torch.float64)
        group_bytes = base_flops = index_bytes = 0
        if weights.group is not None:
            index_bytes += weights.group.nbytes
        for matrix in MATRICES:
            N, K = weights.rows_columns(matrix)
            base, v, offsets, mask, values, row_offsets = (
                getattr(weights, f"{name}_{matrix}")
                for name in ("base", "v", "rank_offsets", "mask", "values", "row_offsets")
            )
            stored = {n: stored_bytes(weights, f"{n}_{matrix}") for n in ("base", "u", "v", "values")}
            if base is not None:
                group_bytes += stored["base"] // len(base)
            if base is not None and mask is None:
                base_flops += 2 * N * K
            if v is not None:
                ranks = offsets.diff().double()
                expert_bytes += ranks * ((stored["u"] + stored["v"]) / max(len(v), 1))
                pair_flops += ranks * 2 * (N + K)
                index_bytes += offsets.nbytes
            if weights.has_full(matrix):
                pair_flops += 2 * N * K
                expert_bytes += stored["values"] // E
            if mask is not None:
                pair_flops += 2 * N * K
                expert_bytes += mask[0].nbytes
                if row_offsets is None:
                    expert_bytes += values[0].nbytes
                else:
                    expert_bytes += row_offsets[::N].diff() * values.element_size() + N * row_offsets.element_size()
                    index_bytes += row_offsets.element_size()
        group = torch.full((E,), -1) if weights.group is None else weights.group.long()
        return cls(group, group_bytes, base_flops, expert_bytes, pair_flops, index_bytes)

    def bytes(self, index: Tensor) -> float:
        hit = index.unique()
        groups = self.group[hit].unique()
        return self.index_bytes + int((groups >= 0).sum()) * self.group_bytes + float(self.expert_bytes[hit].sum())

    def flops(self, index: Tensor) -> float:
        groups = self.group[index].sort(1).values
        distinct = (groups[:, :1] >= 0).sum() + ((groups[:, 1:] != groups[:, :-1]) & (groups[:, 1:] >= 0)).sum()
        return int(distinct) * self.base_flops + float(self.pair_flops[index].sum())


def stored_bytes(weights: FactoredExperts, name: str) -> int:
    """Of a tensor of floats, or of its codes and scales."""
    tensors = weights.tensors()
    return sum(tensors[n].nbytes for n in (name, f"scales_{name}") if n in tensors)


def copies_beyond_cache(touched: float, cache: int) -> int:
    """Copies of a layer to rotate over so that what lies between two uses of one is at least twice the cache."""
    return max(1, -(-2 * cache // int(touched)))


# Of all copies of one candidate: a cache of 480 MiB asks for 10 GB of a layer whose calls touch a tenth of it.
MOST_BYTES = 2 << 30


class NoRoom(Exception):
    """What is to be timed does not fit into memory."""


class Rotation(NamedTuple):
    """copies: of a layer, one call on each in turn;  flush: bytes to write between calls, 0 where copies suffice"""

    copies: int
    flush: int

    def describe(self, nbytes: int) -> str:
        """For layers of so many bytes."""
        taken = f"{self.copies} cop{'ies' if self.copies > 1 else 'y'} ({gib(self.copies * nbytes)})"
        return taken + (f", cache flushed between calls ({gib(self.flush)})" if self.flush else "")


def rotation(touched: float, nbytes: int, cache: int, available: int | None) -> Rotation:
    """How to find a layer's weights outside of the cache in every call: enough copies, or where those are more than
    MOST_BYTES or half of the memory there is, one copy and a flush between calls.

    touched: bytes that a call reads;  nbytes: of the layer;  available: bytes, None where the system does not say
    Raises NoRoom where one copy and what flushes do not fit.
    """
    copies = copies_beyond_cache(touched, cache)
    most = MOST_BYTES if available is None else min(MOST_BYTES, available // 2)
    chosen = Rotation(copies, 0) if copies == 1 or copies * nbytes <= most else Rotation(1, 2 * cache)
    needed = chosen.copies * nbytes + chosen.flush
    if available is not None and needed > available:
        raise NoRoom(f"memory: one layer takes {gib(needed)} here, and {gib(available)} are available")
    return chosen


# ---- the timer

Layer = Callable[[Draw], Callable[[], Tensor]]  # prepares a call outside of the timing, then makes it


class Candidate(Protocol):
    name: str

    def seconds(self, calls: Sequence[Draw]) -> float:
        """Makes the calls one after another, each on the next copy of the layer; the time of the last."""


class InProcess:
    """A candidate that runs here. Candidates with layers on the same memory share ``turn``, so that each call moves
    on to memory that no one has touched for a while.

    flush: bytes to write between calls, where there are not enough layers for that; see ``rotation``
    """

    def __init__(self, name: str, layers: Sequence[Layer], turn: Iterator[int], flush: int = 0) -> None:
        self.name, self.layers, self.turn = name, layers, turn
        self._other = torch.zeros(flush // 4, dtype=torch.int32)

    def seconds(self, calls: Sequence[Draw]) -> float:
        for d in calls:
            call = self.layers[next(self.turn) % len(self.layers)](d)
            self._other.add_(1)
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
        return elapsed


class OwnProcess:
    """A candidate in a process of its own, which is stopped between its turns: libraries that bring threads of their
    own let them spin after a call, and would slow down whoever is next.

    make: () -> (one layer per copy, anything to tell), called over there; it can be pickled
    Raises ValueError with the reason if ``make`` fails or the process dies.
    """

    def __init__(self, name: str, make: Callable[[], tuple[list[Layer], object]], threads: int, flush: int = 0) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, threads, flush), daemon=True)
        self._process.start()
        theirs.close()
        self.told = self._receive()
        self._stop()

    def seconds(self, calls: Sequence[Draw]) -> float:
        os.kill(self._process.pid, signal.SIGCONT)
        self._connection.send(
            [(d.x.view(torch.int16).numpy(), d.index.numpy(), d.weights.view(torch.int16).numpy()) for d in calls]
        )
        elapsed = self._receive()
        self._stop()
        assert isinstance(elapsed, float)
        return elapsed

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it takes its time

    def _receive(self) -> object:
        try:
            ok, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise ValueError(f"its process ended with exit code {self._process.exitcode}") from None
        if not ok:
            self.close()
            raise ValueError(value)
        return value


def _serve(connection: Connection, make: Callable[[], tuple[list[Layer], object]], threads: int, flush: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some greet on every object they make
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process would outlive its parent
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    try:
        layers, told = make()
        connection.send((True, told))
        here = InProcess("", layers, itertools.count(), flush)
        while True:
            calls = [[torch.from_numpy(a) for a in arrays] for arrays in connection.recv()]
            draws = [Draw(x.view(DTYPE), index, w.view(DTYPE)) for x, index, w in calls]
            connection.send((True, here.seconds(draws)))
    except EOFError:
        return
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))


# A call below this many seconds is preceded by an untimed one: threads are awake and code is in cache then, as within
# a model. For longer ones that is no matter, and it would double the time of a run.
SHORT = 0.1


def interleave(
    candidates: Sequence[Candidate],
    first: Mapping[str, float],
    next_draw: Callable[[], Draw],
    seconds: float,
    min_rounds: int = 3,
) -> tuple[dict[str, list[float]], list[Draw]]:
    """Times the candidates in turn, each once a round on the same draw, starting with another one each round.

    first: how long a call of each took before, by name
    Stops after the round in which ``seconds`` have passed. Returns the times of each, and the draw of each round.
    """
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    draws: list[Draw] = []
    start = time.perf_counter()
    while len(draws) < min_rounds or time.perf_counter() - start < seconds:
        untimed, timed = next_draw(), next_draw()
        shift = len(draws) % len(candidates)
        for c in (*candidates[shift:], *candidates[:shift]):
            times[c.name].append(c.seconds([timed] if first[c.name] > SHORT else [untimed, timed]))
        draws.append(timed)
    return times, draws


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, interpolated."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]
