"""Random layers on every instruction set of this CPU and on the reference, held to the errors of accuracy.py.

    .venv/bin/python -m tests.kernels.fuzz_experts                      2,000 layers; about ten minutes on one core
    .venv/bin/python -m tests.kernels.fuzz_experts --layers 50 --seed 7

Prints, for each instruction set and dtype, the largest error and the root mean square in spreads, over all layers.
Exits with 1 at the end if one was beyond the limits, and names its number: --seed NUMBER --layers 1 repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import resmoe_kernels as rk
from resmoe_kernels.factored import FactoredExperts
from tests.accuracy import LARGEST, error_in_spreads, rms_limit
from tests.oracle import ACTIVATIONS
from tests.random_layer import random_layer

ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    x: Tensor
    index: Tensor
    weights: Tensor
    layer: FactoredExperts
    activation: str


def case(seed: int) -> Case:
    """A call on a layer of any form, of sizes up to some hundred, one time in twenty up to 3,000 columns."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    E, long = draw.randint(1, 8), draw.random() < 0.05
    hidden, inner = draw.randint(1, 160), draw.randint(1, 100)
    if long:
        E, sides = 2, [draw.randint(1500, 3000), draw.randint(1, 40)]
        draw.shuffle(sides)
        hidden, inner = sides
    form: dict = {}
    if draw.random() < 0.7:
        form["group"] = [draw.randint(-1, 1) for _ in range(E)]
        form["group"][0] = 0  # groups that are not used are in order, none at all are not
    if draw.random() < 0.6 or not form:
        form["ranks"] = [draw.choice([0, 1, 4, 16, 33, 64]) for _ in range(E)]
    if draw.random() < 0.5:
        form["sparse"] = draw.choice([4, 8, 12, 16, "bitmap", "empty"])
    form["bias"], form["gated"] = draw.random() < 0.3, draw.random() < 0.8
    dtype = draw.choice(DTYPES)
    layer = random_layer(generator, num_experts=E, hidden_size=hidden, intermediate_size=inner, dtype=dtype, **form)
    tokens, slots = draw.choice([1, 2, 3, 5, 8, 17, 40]), draw.randint(1, 3)
    index = torch.randint(-1, E, (2 if long else tokens, slots), generator=generator)
    x = torch.randn((len(index), hidden), generator=generator) * draw.choice([0.1, 1, 1, 3])
    weights = torch.rand(index.shape, generator=generator)
    return Case(x.to(dtype), index, weights, layer, draw.choice(list(ACTIVATIONS)))


@contextmanager
def forced(isa: str) -> Iterator[None]:
    before = os.environ.get("RESMOE_CPU_ISA")
    os.environ["RESMOE_CPU_ISA"] = isa
    try:
        yield
    finally:
        os.environ.pop("RESMOE_CPU_ISA")
        if before is not None:
            os.environ["RESMOE_CPU_ISA"] = before


def implementations() -> dict[str, Callable[[Case], Tensor]]:
    """The reference, and the CPU kernels on every instruction set that this CPU has."""

    def run(backend: str, isa: str) -> Callable[[Case], Tensor]:
        def output(c: Case) -> Tensor:
            with forced(isa), rk.backend(backend):
                return rk.experts(c.x, c.index, c.weights, c.layer, c.activation)

        return output

    found = {"reference": run("reference", "")}
    for isa in ISAS if "cpu" in rk.backends() else ():
        try:
            run("cpu", isa)(case(0))
        except ValueError as error:
            assert "RESMOE_CPU_ISA" in str(error)
        else:
            found[isa] = run("cpu", isa)
    return found


def failures(numbers: range, report: Callable[[str, torch.dtype, float, float], None]) -> list[str]:
    """Runs the cases of these numbers everywhere; a line for each that is beyond the limits."""
    found, runs = [], implementations()
    for number in numbers:
        c = case(number)
        for name, run in runs.items():
            largest, rms, where = error_in_spreads(
                run(c), c.x, c.index, c.weights, c.layer.tensors(), c.layer.sizes(), activation=c.activation
            )
            report(name, c.x.dtype, largest, rms)
            if largest > LARGEST or rms > rms_limit(len(c.x)):
                found.append(f"case {number} on {name}: largest {largest:.2f}, rms {rms:.2f} spreads; {where}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first layer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def report(name: str, dtype: torch.dtype, largest: float, rms: float) -> None:
        seen.setdefault((name, str(dtype).removeprefix("torch.")), []).append((largest, rms))

    found = failures(range(arguments.seed, arguments.seed + arguments.layers), report)
    for (name, dtype), values in sorted(seen.items()):
        largest, rms = (sorted(column) for column in zip(*values, strict=True))
        print(
            f"{name:12} {dtype:9} {len(values):5} layers: largest {largest[-1]:.2f} spreads, "
            f"rms {rms[len(rms) // 2]:.2f} in the middle, {rms[-1]:.2f} at most"
        )
    print("\n".join(found))
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
