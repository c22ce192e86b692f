"""One expert layer: every compressed form beside the fastest dense layers there are, in the same run.

    python -m benchmarks.experts.bench_experts --shape olmoe mixtral --tokens 1 4 16 64 512 \\
        --form dense lowrank lowrank@4 base4+full2 --retain 0.25 --backend cpu --peers auto --csv FILE --plot FILE
    python -m benchmarks.experts.bench_experts --backend triton --csv FILE    # on a GPU; or cuda, up to 16 tokens
    python -m benchmarks.experts.bench_experts --model H100              # a projection; needs no GPU, measures nothing

What is timed, and how, is in benchmarks/experts/README.md. Weights are random: speed is measured here, never quality.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import resmoe_kernels as rk
from benchmarks.experts.peers import CHECK_TOKENS, GET, PEERS, TOLERANCE, Peer, check, on_device, relative_error
from benchmarks.gpu import projection
from benchmarks.gpu.measure_gpu import GpuMemoryRead, Graphed, LaunchCosts, clocks, measure_gpu
from benchmarks.measure import (
    Candidate,
    Cost,
    Draw,
    InProcess,
    Layer,
    Machine,
    MemoryRead,
    NoRoom,
    OwnProcess,
    Rotation,
    copies_beyond_cache,
    draw,
    interleave,
    measure_machine,
    quantiles,
    rotation,
)
from benchmarks.shapes import CHECK, CHECK_UNGATED, CODE_FORMS, FORMS, SHAPES, Shape, dense_layer, factored_layer
from resmoe_kernels import FactoredExperts
from resmoe_kernels.experts_cuda import declines_layer, limits
from resmoe_kernels.python_ops.jobs.memory import available_bytes

TOKENS = (1, 4, 16, 64, 512, 2048)
ON_A_GPU = ("triton", "cuda")
COLUMNS = (
    "shape", "tokens", "implementation", "form", "backend", "isa", "retain", "threads", "copies", "rounds",
    "experts_hit", "p20_ms", "p50_ms", "p80_ms", "mbytes", "gflop", "gb_per_s", "gflop_per_s", "fastest_peer",
    "speedup", "ideal_speedup", "bandwidth_share", "peak_share", "read_gb_per_s", "peak_gflop_per_s",
)  # fmt: skip
FAILURES = (ValueError, RuntimeError, OSError)  # of a peer; of ours they end the run


class NotServed(ValueError):
    """A form that the backend asked for has no kernels for."""


console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--form", nargs="+", choices=(*FORMS, *CODE_FORMS), default=list(FORMS))
    parser.add_argument("--retain", type=float, default=0.25)
    parser.add_argument("--backend", choices=("auto", "reference", "cpu", *ON_A_GPU), default="auto")
    parser.add_argument("--peers", choices=("auto", "none"), default="auto", help="auto: every one that runs here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20, help="time for one shape and number of tokens")
    parser.add_argument("--csv", type=Path, help="where the measurements go")
    parser.add_argument("--plot", type=Path, help="a picture of the CSV; needs peers and matplotlib")
    parser.add_argument("--model", choices=projection.MODELS, help="print what the data sheet of a GPU allows; no run")
    arguments = parser.parse_args()
    if (arguments.csv is None) != (arguments.model is not None):
        parser.error("give --csv FILE for measurements or --model for a projection, which is never written beside them")
    if arguments.plot and arguments.peers == "none":
        parser.error("--plot shows speed-ups over the fastest peer; it needs --peers auto")
    if not 0 < arguments.retain <= 1:
        parser.error(f"--retain must be in (0, 1], got {arguments.retain}")
    if min(arguments.tokens) < 1:
        parser.error(f"--tokens must be at least 1, got {min(arguments.tokens)}")
    if arguments.model and (coded := [form for form in arguments.form if form in CODE_FORMS]):
        parser.error(f"--model projects the kernels of GPUs, which serve no codes; leave out {coded[0]}")
    if arguments.model:
        shapes = [SHAPES[name] for name in arguments.shape]
        projection.show(console, arguments.model, shapes, arguments.form, arguments.tokens, arguments.retain)
        return
    if arguments.backend in ON_A_GPU and not torch.cuda.is_available():
        sentence = "times a GPU, and torch finds none; --model H100 prints a projection without one"
        parser.error(f"--backend {arguments.backend} {sentence}")
    if arguments.backend not in ("auto", *rk.backends()):
        parser.error(f"--backend {arguments.backend} is not there; there are {', '.join(rk.backends())}")

    torch.set_grad_enabled(False)
    place = this_gpu() if arguments.backend in ON_A_GPU else this_cpu(arguments.threads)
    machine = place.machine
    console.print(
        f"{place.name}, DRAM read {machine.read_gb_per_s:.1f} GB/s, bfloat16 peak "
        f"{machine.peak_gflop_per_s:.0f} GFLOP/s, last-level cache {machine.l3_bytes >> 20} MiB"
    )
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with arguments.csv.open("w", newline="") as file, rk.backend(arguments.backend):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in arguments.shape:
            try:
                for row in bench_shape(SHAPES[name], arguments, place):
                    writer.writerow(row)
                    file.flush()
                    rows.append(row)
            except NoRoom as exception:
                raise SystemExit(f"{name}: {exception}") from None
    show(rows)
    if arguments.plot:
        from benchmarks.experts.plot import plot

        plot(arguments.csv, arguments.plot)


# ---- where it runs


@dataclass(frozen=True)
class Place:
    """What differs between a CPU and a GPU.

    name: for people;  device: torch's;  target: of the Triton kernels, empty on a CPU
    candidate: (name, layers, turn, captures) -> the timer of one candidate
    cost: weights -> what calls move and multiply;  rotation: bytes touched and bytes of a layer -> see rotation
    at_end: printed after each number of tokens
    """

    name: str
    device: str
    target: str
    machine: Machine
    memory: MemoryRead | GpuMemoryRead
    peers: Sequence[Peer]
    get_peers: str
    candidate: Callable[..., Candidate]
    cost: Callable[[FactoredExperts], Cost | LaunchCosts]
    rotation: Callable[[float, int], Rotation]
    at_end: Callable[[], str]


def this_cpu(threads: int) -> Place:
    memory = MemoryRead(threads)

    def candidate(
        name: str, layers: Sequence[Layer], turn: Iterator[int], captures: bool = True, flush: int = 0
    ) -> Candidate:
        return InProcess(name, layers, turn, flush)

    def rotate(touched: float, nbytes: int) -> Rotation:
        return rotation(touched, nbytes, machine.l3_bytes, available_bytes())

    machine = measure_machine(memory, threads)
    return Place(f"{threads} threads", "cpu", "", machine, memory, PEERS, GET, candidate, Cost.of, rotate, lambda: "")


def this_gpu() -> Place:
    from benchmarks.experts import peers_gpu
    from resmoe_kernels.triton_kernels.launch import target_of

    memory, name, target = GpuMemoryRead(), torch.cuda.get_device_name(), target_of(torch.device("cuda"))
    machine = measure_gpu(memory)

    def candidate(
        name: str, layers: Sequence[Layer], turn: Iterator[int], captures: bool = True, flush: int = 0
    ) -> Candidate:
        assert flush == 0
        return Graphed(name, layers, turn, captures)

    def rotate(touched: float, nbytes: int) -> Rotation:
        # Some tens of MiB of cache beside as many GB of memory: copies always fit.
        return Rotation(copies_beyond_cache(touched, machine.l3_bytes), 0)

    return Place(
        f"{name} ({target}), {clocks()}", "cuda", target, machine, memory, peers_gpu.PEERS, peers_gpu.GET,
        candidate, partial(LaunchCosts, target=target), rotate, clocks,
    )  # fmt: skip


# ---- one shape


class Measured:
    """A candidate and what its calls cost."""

    def __init__(self, candidate: Candidate, cost: Cost | LaunchCosts, copies: int, form: str, backend: str) -> None:
        self.candidate, self.cost, self.copies, self.form, self.backend = candidate, cost, copies, form, backend

    @property
    def is_peer(self) -> bool:
        return self.backend == "peer"


def bench_shape(shape: Shape, arguments: argparse.Namespace, place: Place) -> Iterable[dict]:
    """The rows of one shape, peers first."""
    fewest = draw(shape, min(arguments.tokens), torch.Generator().manual_seed(0))
    measured: list[Measured] = []
    try:
        for form in arguments.form:
            try:
                measured.append(ours(shape, form, arguments, fewest, place))
            except NotServed as exception:
                console.print(f"{shape.name}: resmoe {form} is left out: {exception}", markup=False)
        if arguments.peers == "auto":
            measured += peers(shape, fewest, place)
        memory = place.memory
        for tokens in arguments.tokens:
            generator = torch.Generator().manual_seed(tokens)
            first = first_calls(measured, draw(shape, tokens, generator), shape)
            first[memory.name] = memory.seconds([None])
            candidates = [memory, *(m.candidate for m in measured)]
            times, draws = interleave(candidates, first, partial(draw, shape, tokens, generator), arguments.seconds)
            limits = replace(place.machine, read_gb_per_s=memory.gb_per_s(times[memory.name]))
            rows = [row_of(m, shape, times[m.candidate.name], draws, limits, arguments, place) for m in measured]
            yield from compare(rows, measured, draws, limits)
            if place.at_end():
                console.print(f"  {place.at_end()}", markup=False)
    finally:
        for m in measured:
            if isinstance(m.candidate, OwnProcess):
                m.candidate.close()
        measured.clear()
        gc.collect()


def first_calls(measured: list[Measured], d: Draw, shape: Shape) -> dict[str, float]:
    """Seconds of one call of each; a peer that fails at this number of tokens is told and taken out."""
    seconds = {}
    for m in list(measured):
        try:
            seconds[m.candidate.name] = m.candidate.seconds([d])
        except FAILURES as exception:
            if not m.is_peer and m.backend != "cuda":  # which serves few tokens, and forces no other backend
                raise
            console.print(f"{shape.name}: {m.candidate.name} fails at T={len(d.x)}: {exception}", markup=False)
            measured.remove(m)
    return seconds


def ours(shape: Shape, form: str, arguments: argparse.Namespace, fewest: Draw, place: Place) -> Measured:
    """One form on the product's kernels, packed where the backend packs."""
    backend, device = chosen_backend(arguments.backend), place.device
    small = CHECK if shape.gated else CHECK_UNGATED
    weights = factored_layer(small, form, arguments.retain, seed=1)
    if backend == "cuda" and (reason := declines_layer(weights, torch.bfloat16, small.activation)) is not None:
        raise NotServed(f"the cuda kernels do not serve {reason}")
    tokens = (1, limits()[0]) if backend == "cuda" else CHECK_TOKENS
    error = relative_error(layer_of(small, weights.to(device), backend), weights.materialize(), small, device, tokens)
    if not error < TOLERANCE:
        raise SystemExit(f"resmoe {form} on {backend}: the result is wrong, relative error {error:.3g} against float32")
    layers, cost, turns = [], None, Rotation(1, 0)
    while len(layers) < turns.copies:
        weights = factored_layer(shape, form, arguments.retain, seed=len(layers))
        if cost is None:
            cost = place.cost(weights)
            turns = place.rotation(cost.bytes(fewest.index), weights.nbytes())
            taken = turns.describe(weights.nbytes())
        layers.append(layer_of(shape, weights.to(device), backend))
        del weights
    assert cost is not None
    console.print(f"{shape.name}: resmoe {form} on {backend}, {taken}, relative error {error:.2g}")
    candidate = place.candidate(f"resmoe {form}", layers, itertools.count(), flush=turns.flush)
    return Measured(candidate, cost, turns.copies, form, backend)


def chosen_backend(name: str) -> str:
    """What ``auto`` stands for on this device."""
    return name if name != "auto" else "cpu" if "cpu" in rk.backends() else "reference"


def layer_of(shape: Shape, weights: FactoredExperts, backend: str) -> Layer:
    if backend == "cpu":
        from resmoe_kernels.packed import PackedExperts

        weights = PackedExperts.pack(weights)
    return lambda d: lambda: rk.experts(d.x, d.index, d.weights, weights, shape.activation)


def peers(shape: Shape, fewest: Draw, place: Place) -> list[Measured]:
    """Every peer that runs here, checked. One that does not is reported in a line."""
    cost, threads = Cost.dense(shape), place.machine.threads
    nbytes = 2 * shape.num_experts * shape.expert_parameters
    turns = place.rotation(cost.bytes(fewest.index), nbytes)
    copies, flush = turns
    shared, turn = [on_device(dense_layer(shape, seed), place.device) for seed in range(copies)], itertools.count()
    found = []
    for peer in place.peers:
        reason = peer.missing(shape)
        try:
            if reason is not None:
                raise ValueError(reason)
            if peer.own_process:
                make = partial(in_own_process, PEERS.index(peer), shape, copies, threads)
                candidate = OwnProcess(peer.name, make, threads, flush)
                error = candidate.told
            else:
                error = check(peer, shape, threads, place.device)
                layers = peer.prepare(shared, shape, threads, False)
                candidate = place.candidate(peer.name, layers, turn, captures=peer.captures, flush=flush)
        except FAILURES as exception:
            hint = f". To get it: {place.get_peers}" if "not installed" in str(exception) else ""
            console.print(f"{shape.name}: {peer.name} is left out: {exception}{hint}", soft_wrap=True, markup=False)
            continue
        console.print(f"{shape.name}: {peer.name}, {turns.describe(nbytes)}, relative error {error:.2g}")
        found.append(Measured(candidate, cost, copies, "dense", "peer"))
    return found


def in_own_process(number: int, shape: Shape, copies: int, threads: int) -> tuple[list[Layer], float]:
    peer: Peer = PEERS[number]
    error = check(peer, shape, threads)
    return peer.prepare([dense_layer(shape, seed) for seed in range(copies)], shape, threads, False), error


# ---- rows


def row_of(
    m: Measured, shape: Shape, times: list[float], draws: Sequence[Draw], machine: Machine, arguments, place: Place
) -> dict:
    p20, p50, p80 = quantiles(times)
    nbytes, flops = mean_cost(m.cost, draws)
    return {
        "shape": shape.name,
        "tokens": len(draws[0].x),
        "implementation": m.candidate.name,
        "form": m.form,
        "backend": m.backend,
        "isa": torch.ops.resmoe.cpu_isa() if m.backend == "cpu" else "" if m.is_peer else place.target,
        "retain": arguments.retain if m.form in FORMS[1:] or m.form.startswith("lowrank") else 1.0,
        "threads": machine.threads or "",
        "copies": m.copies,
        "rounds": len(times),
        "experts_hit": round(sum(d.index.unique().numel() for d in draws) / len(draws), 2),
        "p20_ms": round(p20 * 1e3, 4),
        "p50_ms": round(p50 * 1e3, 4),
        "p80_ms": round(p80 * 1e3, 4),
        "mbytes": round(nbytes / 1e6, 4),
        "gflop": round(flops / 1e9, 6),
        "gb_per_s": round(nbytes / p50 / 1e9, 3),
        "gflop_per_s": round(flops / p50 / 1e9, 3),
        "fastest_peer": "",
        "speedup": "",
        "ideal_speedup": "",
        "bandwidth_share": round(nbytes / p50 / 1e9 / machine.read_gb_per_s, 4),
        "peak_share": round(flops / p50 / 1e9 / machine.peak_gflop_per_s, 4),
        "read_gb_per_s": round(machine.read_gb_per_s, 2),
        "peak_gflop_per_s": round(machine.peak_gflop_per_s, 1),
    }


def mean_cost(cost: Cost, draws: Sequence[Draw]) -> tuple[float, float]:
    nbytes, flops = (sum(of(d.index) for d in draws) / len(draws) for of in (cost.bytes, cost.flops))
    return nbytes, flops


def compare(rows: list[dict], measured: Sequence[Measured], draws: Sequence[Draw], machine: Machine) -> list[dict]:
    """Fills in the ratios to the fastest peer; without peers they stay empty. Prints each row."""
    peer_rows = [row for row, m in zip(rows, measured, strict=True) if m.is_peer]
    fastest = min(peer_rows, key=lambda row: row["p50_ms"], default=None)
    for row, m in zip(rows, measured, strict=True):
        if fastest is not None:
            peer_cost = next(p.cost for p in measured if p.is_peer)
            ideal = machine.seconds(*mean_cost(peer_cost, draws)) / machine.seconds(*mean_cost(m.cost, draws))
            row["fastest_peer"], row["ideal_speedup"] = fastest["implementation"], round(ideal, 4)
            row["speedup"] = round(fastest["p50_ms"] / row["p50_ms"], 4)
        console.print(
            f"  {row['shape']} T={row['tokens']} {row['implementation']}: {row['p50_ms']:.3f} ms "
            f"[{row['p20_ms']:.3f}, {row['p80_ms']:.3f}], {row['gb_per_s']:.1f} GB/s, {row['gflop_per_s']:.0f} GFLOP/s"
            + (f", {row['speedup']:.2f} x (ideal {row['ideal_speedup']:.2f})" if fastest is not None else ""),
            markup=False,
        )
    return rows


def show(rows: Sequence[dict]) -> None:
    table = Table(
        "shape", "T", "implementation", "p50 ms", "GB/s", "of read", "GFLOP/s", "of peak", "speed-up", "ideal"
    )
    table.title = "against the fastest peer of the row"
    for row, following in itertools.zip_longest(rows, rows[1:]):
        ratios = [f"{row[key]:.2f}" if row[key] != "" else "" for key in ("speedup", "ideal_speedup")]
        reached = [f"{row['gb_per_s']:.1f}", f"{row['bandwidth_share']:.0%}"]
        reached += [f"{row['gflop_per_s']:.0f}", f"{row['peak_share']:.0%}"]
        name = f"{row['shape']}", f"{row['tokens']}", row["implementation"]
        last = following is not None and following["tokens"] != row["tokens"]
        table.add_row(*name, f"{row['p50_ms']:.3f}", *reached, *ratios, end_section=last)
    console.print(table)


if __name__ == "__main__":
    main()
