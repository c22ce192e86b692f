"""Assignment and barycenter against the libraries: objective and time, on planted experts and on trained ones.

    python -m benchmarks.compression.bench_assignment --models MODEL ... --csv FILE --plot FILE

``assignment`` rows: two design matrices of n neurons, the matrix product of the scores included, which is also timed
alone (``scores``). ``value`` is over the best value found for them, and so is ``gap``, what the solver says that it may
be short of the best of all. Planted experts are sqrt(cosine) C[order] + sqrt(1 - cosine) Z, C common, each in an order
of its own, C and Z normal; trained ones are the first two of a model's first layer, the second in a random order.
``barycenter`` rows: 8 planted experts in bfloat16, or a layer; ``value`` is the objective over the smallest one.
A solver that is not installed (pip install lapx) is left out, and one whose last time, at n^3, would be over --limit s.
Medians of --repeats runs, interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.tables import read_rows, write_rows
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.solvers.align import barycenter, design_matrix
from resmoe_kernels.python_ops.solvers.assignment import solve

SIZES = (256, 512, 1024, 2048, 4096, 8192, 14336)
COSINES = (0.02, 0.1, 0.3, 0.5)
COLUMNS = ("what", "experts", "count", "n", "depth", "solver", "seconds", "value", "gap", "sweeps")
COLORS = {
    "scores": "#999999",
    "exact": "#0072B2",
    "inexact": "#56B4E9",
    "scipy": "#D55E00",
    "lapjv": "#E69F00",
    "POT emd": "#CC79A7",
    "ours": "#0072B2",
    "POT": "#CC79A7",
}

Found = tuple[float, float | None, int | None]  # value, gap, sweeps
Solver = Callable[..., Found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--cosines", type=float, nargs="*", default=COSINES)
    parser.add_argument("--barycenters", type=int, nargs="*", default=(256, 512, 1024, 2048), help="n of 8 experts")
    parser.add_argument("--depth", type=int, default=1536, help="columns of a planted design matrix")
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    rows: list[dict[str, str]] = []
    last: dict[tuple[str, str], tuple[int, float]] = {}  # of a solver on a kind of experts: n and seconds
    cases = [
        (f"cosine {c}", n, partial(planted, 2, n, arguments.depth, c))
        for n in arguments.sizes
        for c in arguments.cosines
    ]
    cases += [(f.name, 0, partial(trained_pair, f)) for f in arguments.models]
    for experts, n, make in tqdm(cases, desc="assignment"):
        target, source = make()
        found = compare(SOLVERS, (target, source), f"assignment {experts}", n, arguments, last)
        rows += described("assignment", experts, 2, target, found, max(f[1] for f in found.values()))
        write_rows(arguments.csv, rows, COLUMNS)
    layers = [
        (f"cosine {c}", n, partial(planted_layer, n, arguments.depth, c))
        for n in arguments.barycenters
        for c in arguments.cosines
    ]
    layers += [(f.name, 0, partial(trained_layer, f)) for f in arguments.models]
    for experts, n, make in tqdm(layers, desc="barycenter"):
        layer = make()
        found = compare(BARYCENTERS, (layer,), f"barycenter {experts}", n, arguments, last)
        design = design_matrix(layer, 0)
        rows += described("barycenter", experts, layer.num_experts, design, found, min(f[1] for f in found.values()))
        write_rows(arguments.csv, rows, COLUMNS)
    if arguments.plot is not None:
        plot(arguments.csv, arguments.plot)


# ---- experts


def planted(count: int, n: int, depth: int, cosine: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    common = torch.randn(n, depth, generator=generator)
    designs = []
    for _ in range(count):
        design = common[torch.randperm(n, generator=generator)].mul_(cosine**0.5)
        designs.append(design.add_(torch.randn(n, depth, generator=generator), alpha=(1 - cosine) ** 0.5))
    return designs


def planted_layer(n: int, depth: int, cosine: float) -> DenseExperts:
    thirds = [design.split(depth // 3, dim=1) for design in planted(8, n, depth // 3 * 3, cosine)]
    gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in thirds]).bfloat16()
    return DenseExperts(gate_up=gate_up, down=torch.stack([down.T for _, _, down in thirds]).bfloat16(), gated=True)


def trained_layer(folder: Path) -> DenseExperts:
    return DenseModel(AutoModelForCausalLM.from_pretrained(folder)).read(0)


def trained_pair(folder: Path) -> list[Tensor]:
    layer = trained_layer(folder)
    source = design_matrix(layer, 1)
    return [design_matrix(layer, 0), source[torch.randperm(len(source), generator=torch.Generator().manual_seed(0))]]


# ---- solvers: what they are given -> value, gap, sweeps


def scores(target: Tensor, source: Tensor) -> Found:
    return float((target @ source.T)[0, 0]), None, None


def ours(target: Tensor, source: Tensor, exact: bool) -> Found:
    found = solve(target @ source.T, exact=exact)
    return found.value, found.gap, None


def scipy_solver(target: Tensor, source: Tensor) -> Found:
    score = (target @ source.T).numpy()
    return float(score[linear_sum_assignment(score, maximize=True)].sum(dtype="float64")), None, None


def lapjv(target: Tensor, source: Tensor) -> Found:
    import lap

    score = (target @ source.T).numpy()
    _, columns, _ = lap.lapjv(-score.astype(np.float64))
    return float(score[np.arange(len(score)), columns].sum(dtype="float64")), None, None


def network_simplex(target: Tensor, source: Tensor) -> Found:
    import ot

    score = (target @ source.T).numpy()
    uniform = np.full(len(score), 1 / len(score))
    cost = ot.dist(target.double().numpy(), source.double().numpy())
    columns = ot.lp.emd(uniform, uniform, cost, numItermax=10**8).argmax(1)
    return float(score[np.arange(len(score)), columns].sum(dtype="float64")), None, None


def our_barycenter(layer: DenseExperts, solver: str) -> Found:
    found = barycenter(layer, solver=solver)
    return found.objective, None, found.iterations


SOLVERS: dict[str, Solver] = {
    "scores": scores,
    "exact": partial(ours, exact=True),
    "inexact": partial(ours, exact=False),
    "scipy": scipy_solver,
    "lapjv": lapjv,
    "POT emd": network_simplex,
}
BARYCENTERS: dict[str, Solver] = {
    "ours": partial(our_barycenter, solver="assignment"),
    "POT": partial(our_barycenter, solver="pot"),
}


def compare(
    solvers: dict[str, Solver],
    given: tuple[Any, ...],
    kind: str,
    n: int,
    arguments: argparse.Namespace,
    last: dict[tuple[str, str], tuple[int, float]],
) -> dict[str, tuple[float, float, float | None, int | None]]:
    """Solver -> median seconds, value, gap, sweeps; runs over 10 s are not repeated."""
    seconds: dict[str, list[float]] = {}
    results: dict[str, Found] = {}
    for _ in range(arguments.repeats):
        for name, solver in solvers.items():
            smaller, took = last.get((kind, name), (1, 0.0))
            if took * (n / smaller) ** 3 > arguments.limit or (name == "lapjv" and not find_spec("lap")):
                continue
            if name in seconds and seconds[name][0] > 10:
                continue
            start = time.perf_counter()
            results[name] = solver(*given)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    if n:
        last.update({(kind, name): (n, median) for name, median in medians.items()})
    return {name: (medians[name], *result) for name, result in results.items()}


def described(
    what: str,
    experts: str,
    count: int,
    design: Tensor,
    found: dict[str, tuple[float, float, float | None, int | None]],
    best: float,
) -> list[dict[str, str]]:
    return [
        {
            "what": what,
            "experts": experts,
            "count": str(count),
            "n": str(design.shape[0]),
            "depth": str(design.shape[1]),
            "solver": solver,
            "seconds": f"{seconds:.4g}",
            "value": "" if solver == "scores" else f"{value / best:.9f}",
            "gap": "" if gap is None else f"{gap / best:.2e}",
            "sweeps": "" if sweeps is None else str(sweeps),
        }
        for solver, (seconds, value, gap, sweeps) in found.items()
    ]


# ---- picture


def plot(source: Path, target: Path) -> None:
    """Seconds against n for every kind of planted experts, assignment above and barycenter below."""
    from matplotlib import pyplot as plt

    rows = [row for row in read_rows(source) if row["experts"].startswith("cosine")]
    kinds = list(dict.fromkeys(row["experts"] for row in rows))
    figure, panels = plt.subplots(2, len(kinds), figsize=(3.4 * len(kinds), 6.4), sharey="row", squeeze=False)
    for line, what in zip(panels, ("assignment", "barycenter"), strict=True):
        for panel, kind in zip(line, kinds, strict=True):
            own = [row for row in rows if (row["what"], row["experts"]) == (what, kind)]
            for solver in dict.fromkeys(row["solver"] for row in own):
                points = [(int(r["n"]), float(r["seconds"])) for r in own if r["solver"] == solver]
                panel.loglog(*zip(*points, strict=True), "o-", base=2, markersize=3, color=COLORS[solver], label=solver)
            panel.set_yscale("log", base=10)
            panel.set_title(f"{what}, {kind}", fontsize=9, loc="left")
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("seconds")
        line[0].legend(fontsize=7, frameon=False)
    for panel in panels[-1]:
        panel.set_xlabel("neurons")
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
