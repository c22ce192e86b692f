"""What a GPU's data sheet allows the Triton kernels at a shape: arithmetic on ``costs``, no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from measure import Cost, Draw, Machine, draw
from measure_gpu import LaunchCosts
from rich.console import Console
from rich.table import Table
from shapes import Shape, layer_sizes

DRAWS = 32  # of routing, uniform; bytes are means over them


@dataclass(frozen=True)
class Model:
    """A GPU by its data sheet. launch_us: assumed of one more dependent kernel in a CUDA graph; nobody publishes it"""

    target: str
    limits: Machine
    launch_us: float


MODELS = {"H100": Model("sm_90", Machine(0, 3350, 990e3, 50 << 20), launch_us=2.0)}


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
    weights, limits = layer_sizes(shape, form, retain), model.limits
    costs, ideal, dense = LaunchCosts(weights, model.target), Cost.of(weights), Cost.dense(shape)
    generator = torch.Generator().manual_seed(tokens)
    draws: list[Draw] = [draw(shape, tokens, generator) for _ in range(DRAWS)]
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


def show(
    console: Console, name: str, shapes: Sequence[Shape], forms: Sequence[str], tokens: Sequence[int], retain: float
) -> None:
    """Prints the projection of every shape, number of tokens and form."""
    model = MODELS[name]
    console.print(
        f"projection, not measured: {name} by its data sheet, {model.limits.read_gb_per_s:.0f} GB/s and "
        f"{model.limits.peak_gflop_per_s / 1e3:.0f} TFLOP/s in bfloat16, and {model.launch_us:g} us assumed for every "
        "launch. No kernel reaches a data sheet; what one does reach is not known before it is timed.",
    )
    table = Table(
        "shape", "T", "form", "launches", "MB", "GFLOP", "projected us", "ideal us", "dense ideal us", "ideal speed-up"
    )
    table.title = "projection, not measured"
    for shape in shapes:
        for count in tokens:
            for form in forms:
                p = project(model, shape, form, count, retain)
                numbers = f"{p.nbytes / 1e6:.1f}", f"{p.flops / 1e9:.2f}", f"{p.seconds * 1e6:.1f}"
                rooflines = f"{p.ideal * 1e6:.1f}", f"{p.dense * 1e6:.1f}", f"{p.dense / p.ideal:.2f}"
                table.add_row(shape.name, f"{count}", form, f"{p.launches}", *numbers, *rooflines)
            table.add_section()
    console.print(table)
