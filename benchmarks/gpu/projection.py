"""What a GPU's data sheet allows the kernels at a shape: arithmetic on ``costs`` and ``persistent``, no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import persistent
from benchmarks.gpu.cubin_report import H100_GHZ, MOST_TOKENS
from benchmarks.gpu.measure_gpu import LaunchCosts
from benchmarks.measure import Cost, Draw, Machine, draw
from benchmarks.shapes import Shape, layer_sizes
from resmoe_kernels.heuristics import GPUS

DRAWS = 32  # of routing, uniform; bytes are means over them


@dataclass(frozen=True)
class Model:
    """A GPU by its data sheet, and what is assumed of it, as nobody publishes it.

    launch_us: of one more dependent kernel in a CUDA graph
    handoff_us: until a block sees that all others have finished a phase, through flags in L2
    ghz: of the multiprocessors, under load
    """

    target: str
    limits: Machine
    launch_us: float
    handoff_us: float
    ghz: float


MODELS = {"H100": Model("sm_90", Machine(0, 3350, 990e3, 50 << 20), launch_us=2.0, handoff_us=0.7, ghz=H100_GHZ)}


@dataclass(frozen=True)
class Projection:
    """Of one call. seconds: every launch at its own roofline, one after another, and ``launch_us`` for each

    ideal, dense: rooflines of the whole call, weights alone: of this form, and of plain matrices
    """

    launches: int
    nbytes: float
    flops: float
    seconds: float
    ideal: float
    dense: float


def project(model: Model, shape: Shape, form: str, tokens: int, retain: float) -> Projection:
    """Of Triton's kernels."""
    weights, limits = layer_sizes(shape, form, retain), model.limits
    costs, ideal, dense = LaunchCosts(weights, model.target), Cost.of(weights), Cost.dense(shape)
    draws = _draws(shape, tokens)
    calls = [costs.launches(d.index) for d in draws]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return Projection(
        len(calls[0]),
        mean([sum(cost.nbytes for cost in call) for call in calls]),
        mean([sum(cost.flops for cost in call) for call in calls]),
        mean([sum(limits.seconds(c.nbytes, c.flops) + model.launch_us / 1e6 for c in call) for call in calls]),
        *(mean([limits.seconds(of.bytes(d.index), of.flops(d.index)) for d in draws]) for of in (ideal, dense)),
    )


def _draws(shape: Shape, tokens: int) -> list[Draw]:
    generator = torch.Generator().manual_seed(tokens)
    return [draw(shape, tokens, generator) for _ in range(DRAWS)]


@dataclass(frozen=True)
class PersistentProjection:
    """Of one call of a persistent kernel. phases: seconds that each resource takes, means over draws"""

    phases: dict[str, dict[str, float]]
    waiting: float  # launches and hand-offs

    @property
    def seconds(self) -> float:
        return self.waiting + sum(max(bounds.values()) for bounds in self.phases.values())


def project_persistent(
    model: Model, shape: Shape, form: str, tokens: int, retain: float
) -> PersistentProjection | None:
    """Of the CUDA kernel, where it serves such a call."""
    if form not in persistent.NAMES or tokens > max(MOST_TOKENS["scatter"]):
        return None
    weights = layer_sizes(shape, form, retain)
    limits, units = model.limits, GPUS[model.target].units
    calls = [persistent.phases(weights, d.index, model.target) for d in _draws(shape, tokens)]
    phases: dict[str, dict[str, float]] = {}
    for call in calls:
        for phase in call:
            means = phases.setdefault(phase.name, {})
            bounds = phase.bounds(units, limits.read_gb_per_s, limits.peak_gflop_per_s, model.ghz)
            for resource, seconds in bounds.items():
                means[resource] = means.get(resource, 0.0) + seconds / len(calls)
    waiting = persistent.LAUNCHES * model.launch_us + (len(phases) - 1) * model.handoff_us
    return PersistentProjection(phases, waiting / 1e6)


def show(
    console: Console, name: str, shapes: Sequence[Shape], forms: Sequence[str], tokens: Sequence[int], retain: float
) -> None:
    """Prints the projection of every shape, number of tokens and form: of Triton's kernels, and beside it of the
    persistent one where that serves a call."""
    model = MODELS[name]
    console.print(
        f"projection, not measured: {name} by its data sheet, {model.limits.read_gb_per_s:.0f} GB/s and "
        f"{model.limits.peak_gflop_per_s / 1e3:.0f} TFLOP/s in bfloat16, and {model.launch_us:g} us assumed for every "
        "launch. No kernel reaches a data sheet; what one does reach is not known before it is timed.",
    )
    table = Table("shape", "T", "form", "launches", "MB", "GFLOP", "triton us", "cuda us", "ideal us", "dense ideal us",
                  "ideal speed-up")  # fmt: skip
    by_phase = Table("shape", "T", "form", "cuda us", "launches, hand-offs", "phases: the us of what takes longest")
    table.title = by_phase.title = "projection, not measured"
    for shape in shapes:
        for count in tokens:
            for form in forms:
                p, cuda = (of(model, shape, form, count, retain) for of in (project, project_persistent))
                numbers = f"{p.nbytes / 1e6:.1f}", f"{p.flops / 1e9:.2f}", f"{p.seconds * 1e6:.1f}"
                rooflines = f"{p.ideal * 1e6:.1f}", f"{p.dense * 1e6:.1f}", f"{p.dense / p.ideal:.2f}"
                own = "" if cuda is None else f"{cuda.seconds * 1e6:.1f}"
                table.add_row(shape.name, f"{count}", form, f"{p.launches}", *numbers, own, *rooflines)
                if cuda is not None:
                    longest = {phase: max(b, key=lambda name: b[name]) for phase, b in cuda.phases.items()}
                    each = [f"{n} {b[longest[n]] * 1e6:.1f} {longest[n]}" for n, b in cuda.phases.items()]
                    by_phase.add_row(shape.name, f"{count}", form, own, f"{cuda.waiting * 1e6:.1f}", "; ".join(each))
            table.add_section()
    console.print(table)
    if by_phase.rows:
        console.print(
            f"The persistent kernels: {persistent.LAUNCHES} launches, {model.handoff_us:g} us assumed for every "
            f"hand-off between phases, {model.ghz:g} GHz, and of each phase the longest of four: its weights from "
            "memory, the instructions that its busiest scheduler issues, its clocks of shared memory, its products at "
            f"{persistent.MMA_SHARE:.0%} of the peak; from the counts of benchmarks/results/cubin.csv. Triton's are "
            "rooflines and count no instructions. benchmarks/gpu/persistent.py says what is left out."
        )
        console.print(by_phase)
