"""Measures tile sizes of the Triton kernels on this GPU, and writes the table that heuristics read before defaults.

    python -m benchmarks.gpu.tune --shape olmoe qwen3 --tokens 1 4 16 64 512 2048 --form lowrank block

One kernel after another, and of each one number of its tile after another, is doubled while that makes the whole layer
faster, or else halved; the others stay at the best known. Every tile's result is compared with that of the defaults
first. What is timed is the graph of ``measure_gpu``: whole layers, on copies beyond L2, the same draws for every tile.
The table, resmoe_kernels/tuned/<target>.json, is written anew after every shape, form and number of tokens; entries of
other problems stay.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.measure_gpu import Graphed, LaunchCosts, clocks
from benchmarks.measure import copies_beyond_cache, draw
from benchmarks.shapes import SHAPES, Shape, factored_layer
from resmoe_kernels import heuristics
from resmoe_kernels.heuristics import DECODE_KERNELS, PREFILL_KERNELS, Problem, Tile, tile_of

TOKENS = (1, 4, 16, 64, 512, 2048)
FORMS = ("lowrank", "block", "bitmap")
# In the order of what they change; tokens of decode follow from the call.
# Tiles of 256 x 256 take a minute each to compile, and as many registers as spill.
RANGES = {
    "rows": (16, 128),
    "depth": (16, 512),
    "splits": (1, 256),
    "tokens": (16, 128),
    "warps": (4, 8),
    "stages": (2, 6),
}
GAIN = 0.01  # less is noise: a tile is taken only if the layer is faster by as much
TOLERANCE = 0.02  # of results in bfloat16, relative: sums are made in another order
Tiles = dict[str, Tile]
Measure = Callable[[Tiles], float | None]  # seconds of the layer with these tiles; None where they do not work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["mixtral", "dsv2lite", "qwen3", "olmoe"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--form", nargs="+", choices=FORMS, default=["lowrank", "block"])
    parser.add_argument("--retain", type=float, default=0.25)
    parser.add_argument("--out", type=Path, help="the table (default: where the package looks for this device's)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py measures on a GPU, and torch finds none; the defaults of heuristics.py stay")

    import triton

    from resmoe_kernels.triton_kernels.launch import target_of

    torch.set_grad_enabled(False)
    target = target_of(torch.device("cuda"))
    path = arguments.out or heuristics.table_of(target)
    about = {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "clocks": clocks()}
    for name, form in itertools.product(arguments.shape, arguments.form):
        layers = Layers(SHAPES[name], form, arguments.retain, min(arguments.tokens), target)
        for tokens in arguments.tokens:
            problem = layers.problem(tokens)
            defaults = {kernel: tile_of(kernel, problem, target) for kernel in kernels_of(problem, target)}
            measure = layers.timer(tokens)
            best = search(problem, target, defaults, measure)
            add_to_table(path, problem, best, **about)
            for kernel, tile in best.items():
                print(
                    f"{name} {form} T={tokens} {kernel}: {'default' if tile == defaults[kernel] else tile}", flush=True
                )


# ---- the search: no GPU is needed for it


def kernels_of(problem: Problem, target: str) -> tuple[str, ...]:
    return DECODE_KERNELS if heuristics.decodes(problem, target) else PREFILL_KERNELS


def search(problem: Problem, target: str, start: Tiles, measure: Measure) -> Tiles:
    """The tiles found from ``start``, which must work."""
    tiles, fastest = dict(start), measure(start)
    if fastest is None:
        raise ValueError(f"tune: the default tiles do not work for {problem}")
    for kernel, field in itertools.product(start, RANGES):
        for factor in (2, 0.5):
            improved = False
            while (tile := resized(kernel, tiles[kernel], field, factor, problem, target)) is not None:
                seconds = measure({**tiles, kernel: tile})
                if seconds is None or seconds > (1 - GAIN) * fastest:
                    break
                tiles[kernel], fastest, improved = tile, seconds, True
            if improved:
                break
    return tiles


def resized(kernel: str, tile: Tile, field: str, factor: float, problem: Problem, target: str) -> Tile | None:
    """The tile with one number doubled or halved, stages one more or less; None where that cannot be tried."""
    if field == "tokens" and kernel in DECODE_KERNELS:
        return None
    if field == "splits" and kernel not in ("decode_gate_up", "decode_h", "decode_down"):
        return None
    if kernel == "prefill_sum" and field in ("depth", "stages"):
        return None  # it has no products
    value = getattr(tile, field)
    value = value + (1 if factor > 1 else -1) if field == "stages" else int(value * factor)
    least, most = RANGES[field]
    if problem.sparse and field == "depth":
        least = 32
    tile = replace(tile, **{field: value})
    fits = heuristics.shared_bytes(kernel, problem, tile) <= heuristics.gpu_of(target).shared
    return tile if least <= value <= most and fits else None


def add_to_table(path: Path, problem: Problem, tiles: Tiles, **about: str) -> None:
    """Puts a problem's tiles into the table at ``path``, in place of what it had for that problem."""
    kept = [entry for entry in heuristics.read_table(path) if entry[1] != problem]
    heuristics.write_table(path, [*kept, *((kernel, problem, tile) for kernel, tile in tiles.items())], **about)


@contextmanager
def tiles_in_force(problem: Problem, target: str, tiles: Tiles) -> Iterator[None]:
    """The kernels take these tiles for the problem: by a table, which is how they will be taken for good."""
    before = heuristics.TUNED
    with tempfile.TemporaryDirectory() as folder:
        heuristics.TUNED = Path(folder)
        try:
            add_to_table(heuristics.table_of(target), problem, tiles)
            yield
        finally:
            heuristics.TUNED = before
            heuristics.forget()


# ---- on a GPU


class Layers:
    """Copies of one layer that reach beyond L2."""

    def __init__(self, shape: Shape, form: str, retain: float, fewest: int, target: str) -> None:
        self.shape, self.target, self.copies = shape, target, []
        cache, count = torch.cuda.get_device_properties(0).L2_cache_size, 1
        while len(self.copies) < count:
            weights = factored_layer(shape, form, retain, seed=len(self.copies)).to("cuda")
            if not self.copies:
                index = draw(shape, fewest, torch.Generator().manual_seed(0)).index
                count = copies_beyond_cache(LaunchCosts(weights, target).bytes(index), cache)
            self.copies.append(weights)

    def problem(self, tokens: int) -> Problem:
        from resmoe_kernels.triton_kernels.experts import problem_of

        d = draw(self.shape, tokens, torch.Generator())
        return problem_of(d.x, d.index, self.copies[0])

    def timer(self, tokens: int, rounds: int = 7) -> Measure:
        """Median over rounds of replays, each of another draw, the same ones for every tile."""
        from resmoe_kernels.triton_kernels.experts import experts

        problem, activation = self.problem(tokens), self.shape.activation
        generator = torch.Generator().manual_seed(tokens)
        draws = [draw(self.shape, tokens, generator).to("cuda") for _ in range(rounds)]
        layers = [
            lambda d, weights=weights: lambda: experts(d.x, d.index, d.weights, weights, activation)
            for weights in self.copies
        ]
        expected = layers[0](draws[0])().float()

        def measure(tiles: Tiles) -> float | None:
            with tiles_in_force(problem, self.target, tiles):
                try:
                    y = layers[0](draws[0])().float()
                    if not (y - expected).norm() <= TOLERANCE * expected.norm():
                        print(f"  wrong result, left out: {tiles}", flush=True)
                        return None
                    candidate = Graphed("", layers, itertools.count())
                    return statistics.median(candidate.seconds([draws[0], d]) for d in draws)
                except Exception as error:  # Triton's and the driver's have no common base: too much shared memory, ...
                    print(f"  {type(error).__name__}, left out: {tiles}", flush=True)
                    return None

        return measure


if __name__ == "__main__":
    main()
