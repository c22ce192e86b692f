"""The timer on a GPU: a CUDA graph of many calls, replayed between two events; the limits of the device; its clocks."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.measure import Draw, Layer, Machine
from resmoe_kernels import FactoredExperts
from resmoe_kernels.costs import Routing, layer_costs

CALLS = 16  # of a layer in a graph, at least: what starting a graph takes, some 10 us, is shared by them


def elapsed_seconds(run: Callable[[], object]) -> float:
    """Between two events on the current stream around ``run``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Graphed:
    """A candidate whose calls, one on each copy of the layer after another, are captured in a CUDA graph.

    The graph is captured once per number of tokens and reads its input from fixed memory, which every draw is copied to
    before a replay. What a layer prepares for a draw (int32 ids, say) is captured in another graph, which is not timed.
    captures: false for a layer that waits for the device within a call; it is called as often, and timed, without one
    """

    device = "cuda"

    def __init__(self, name: str, layers: Sequence[Layer], turn: Iterator[int], captures: bool = True) -> None:
        self.name, self.layers, self.captures = name, layers, captures
        self.calls = -(-CALLS // len(layers)) * len(layers)
        self._tokens = 0
        self._input: Draw
        self._prepare: Callable[[], object]
        self._run: Callable[[], object]

    def seconds(self, calls: Sequence[Draw]) -> float:
        for d in calls:
            if len(d.x) != self._tokens:
                self._build(d)
            for mine, theirs in zip(self._tensors(self._input), self._tensors(d), strict=True):
                mine.copy_(theirs)
            self._prepare()
            elapsed = elapsed_seconds(self._run)
        return elapsed / self.calls

    @staticmethod
    def _tensors(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
        return d.x, d.index, d.weights

    def _build(self, d: Draw) -> None:
        self._tokens, self._input = 0, d.to(self.device)  # 0 until it is there: an attempt that fails is made again
        prepared: list[Callable[[], Tensor]] = []

        def prepare() -> None:
            given = Draw(*(t.clone() for t in self._tensors(self._input)))
            prepared[:] = [layer(given) for layer in self.layers]

        def run() -> None:
            for i in range(self.calls):
                prepared[i % len(prepared)]()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, tunes and allocates before the capture
            prepare()
            run()
        torch.cuda.current_stream().wait_stream(side)
        self._prepare, self._run = prepare, run
        if self.captures:
            first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(first):
                prepare()
            with torch.cuda.graph(second):
                run()
            self._prepare, self._run = first.replay, second.replay
            self._alive = prepared  # memory of the first graph that the second reads
        self._tokens = len(d.x)


class GpuMemoryRead:
    """Reads 1 GiB by torch's sum: as a candidate among others, the bandwidth that they had."""

    name = "memory"
    nbytes, repeats = 1 << 30, 4

    def __init__(self) -> None:
        self._memory = torch.ones(self.nbytes // 4, device="cuda")

    def seconds(self, calls: Sequence[object]) -> float:
        for _ in calls:
            elapsed = elapsed_seconds(lambda: [self._memory.sum() for _ in range(self.repeats)])
        return elapsed / self.repeats

    def gb_per_s(self, seconds: Sequence[float]) -> float:
        return self.nbytes / statistics.median(seconds) / 1e9


def measure_gpu(memory: GpuMemoryRead) -> Machine:
    """The limits of the device: read_gb_per_s of ``memory``, the bfloat16 peak of torch's matmul (8192 each side), and
    in place of a last-level cache its L2."""
    side = 8192
    a = torch.ones(side, side, dtype=torch.bfloat16, device="cuda")
    times = [elapsed_seconds(lambda: [a @ a for _ in range(10)]) / 10 for _ in range(4)]
    read = memory.gb_per_s([memory.seconds([None]) for _ in range(12)])
    properties = torch.cuda.get_device_properties(0)
    return Machine(0, read, 2 * side**3 / min(times) / 1e9, properties.L2_cache_size)


def clocks() -> str:
    """What nvidia-smi says of the first GPU's clocks and power, at this moment."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,clocks_event_reasons.active"
    unknown = "clocks unknown: there is no nvidia-smi"
    if shutil.which("nvidia-smi") is None:
        return unknown
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return f"clocks unknown: nvidia-smi ended with {result.returncode}"
    sm, most, memory, power, reasons = (value.strip() for value in result.stdout.strip().split(","))
    return f"SM clock {sm} of at most {most}, memory clock {memory}, power {power}, throttle reasons {reasons}"


class LaunchCosts:
    """What the launches of a call move and multiply, from the real routing: ``costs.layer_costs``, summed."""

    def __init__(self, weights: FactoredExperts, target: str) -> None:
        self.weights, self.target = weights, target

    def bytes(self, index: Tensor) -> float:
        return sum(cost.nbytes for cost in self.launches(index))

    def flops(self, index: Tensor) -> float:
        return sum(cost.flops for cost in self.launches(index))

    def launches(self, index: Tensor) -> list:
        from resmoe_kernels.triton_kernels.experts import (
            problem_of,  # needs triton, which machines without a GPU may lack
        )

        dtype = next(t.dtype for t in self.weights.tensors().values() if t.is_floating_point())
        x = torch.empty(len(index), self.weights.hidden_size, dtype=dtype, device="meta")
        problem = problem_of(x, index, self.weights)
        return layer_costs(self.weights, Routing.of(index, self.weights), problem, self.target)
