r"""Starts and descents of the barycenter: what each explains, costs and is worth, on trained and on planted experts.

    python -m benchmarks.compression.bench_barycenter --model MODEL ... --text wikitext2-test.txt heldout.txt \
        --csv benchmarks/results/barycenter.csv --plot benchmarks/results/barycenter.png

``explained`` is ||M||^2 over the mean ||W_e||^2, M the mean of the aligned experts: what a shared base takes off the
residual. Experts of pure noise have an explained energy too, 1/E and what alignment fits: the Gaussian rows, of the
shape of the trained ones, say how much. Planted experts are sqrt(rho) C + sqrt(1 - rho) Z_e in random orders, C common;
``of_planted`` is over the energy that the planted orders explain (more than 1: noise explains more than the truth), and
``right`` the share of neurons on their common one's place. Trained rows are means over layers; their error and
perplexity are those of the method at --retain, low rank and block. An assignment is one expert's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from benchmarks.tables import read_rows, write_rows
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.methods import resmoe as method
from resmoe_kernels.python_ops.models.layouts import find_experts
from resmoe_kernels.python_ops.solvers.align import Barycenter, barycenter, design_matrix, split_design, squared_norm
from resmoe_kernels.python_ops.solvers.assignment import assign

Found = tuple[Tensor, int, int]  # permutations (E, I), sweeps, assignments

# E, I, H, rho
PLANTED = [
    *((8, 256, 256, rho) for rho in (0.05, 0.1, 0.2)),
    *((32, 256, 256, rho) for rho in (0.05, 0.07, 0.1)),
    (64, 256, 256, 0.05),
    *((8, 1024, 340, rho) for rho in (0.1, 0.2, 0.5)),
]
COLUMNS = (
    "experts", "count", "neurons", "rho", "way", "explained", "of_planted", "right", "cosine", "sweeps", "assignments",
    "seconds", "error_lowrank", "error_block",
)  # fmt: skip


# ---- ways to the orders


def own_order(experts: DenseExperts) -> Found:
    return torch.arange(experts.intermediate_size).repeat(experts.num_experts, 1), 0, 0


def given_orders(orders: Tensor, experts: DenseExperts) -> Found:
    return orders, 0, 0


def alternation(experts: DenseExperts) -> Found:
    """The paper's: all experts to the center, which starts as expert 0; then the mean; until nothing changes."""
    orders, _, count = own_order(experts)
    center = design_matrix(experts, 0)
    for sweep in range(1, 101):
        new = torch.stack([assign(center, design_matrix(experts, e), orders[e]) for e in range(len(orders))])
        count += len(orders)
        if sweep > 1 and torch.equal(new, orders):
            break
        orders, center = new, mean_of(experts, new)
    return orders, sweep, count


def progressive(experts: DenseExperts) -> Found:
    """The start of the default, alone."""
    orders, *_ = own_order(experts)
    total = design_matrix(experts, 0)
    for e in range(1, len(orders)):
        orders[e] = assign(total, design_matrix(experts, e))
        total += design_matrix(experts, e)[orders[e]]
    return orders, 0, len(orders) - 1


def descent(experts: DenseExperts, **settings) -> Found:
    """The package's."""
    said: list[str] = []
    found = barycenter(experts, progress=said.append, **settings)
    return found.permutations, found.iterations, len(said)


def descent_from(start: Callable[[DenseExperts], Found], experts: DenseExperts, **settings) -> Found:
    orders, _, before = start(experts)
    more, sweeps, count = descent(permuted(experts, orders), init="mean", **settings)
    return orders.gather(1, more), sweeps, before + count


def annealed(experts: DenseExperts, steps: int = 18, iterations: int = 8) -> Found:
    """Entropic couplings (Sinkhorn in the log domain) of each expert with the sum of the others' soft orders, colder
    at every sweep, then one assignment each. All soft experts are held at once: for small layers."""
    orders, *_ = progressive(experts)
    designs = [design_matrix(experts, e) for e in range(len(orders))]
    soft = [design[order] for design, order in zip(designs, orders, strict=True)]
    total = torch.stack(soft).sum(0)
    for step in range(steps):
        for e, design in enumerate(designs):
            total -= soft[e]
            score = total @ design.T
            score /= 0.85**step * score.std()
            column = torch.zeros(len(design))
            for _ in range(iterations):
                row = -torch.logsumexp(score + column, 1)
                column = -torch.logsumexp(score + row.unsqueeze(1), 0)
            soft[e] = torch.exp(score + row.unsqueeze(1) + column) @ design
            total += soft[e]
    return torch.stack([assign(total - s, d) for s, d in zip(soft, designs, strict=True)]), steps, 2 * len(orders) - 1


def synchronised(experts: DenseExperts) -> Found:
    """All pairs matched, then the orders nearest to all of them: top eigenvectors of the matrix of matchings,
    Pachauri, Kondor and Singh, NeurIPS 2013."""
    count, inter = experts.num_experts, experts.intermediate_size
    designs = [design_matrix(experts, e) for e in range(count)]
    pairs = {(i, i): torch.arange(inter) for i in range(count)}
    for i, j in torch.combinations(torch.arange(count)).tolist():
        pairs[i, j] = assign(designs[i], designs[j])
        pairs[j, i] = pairs[i, j].argsort()
    basis = torch.randn(count * inter, inter, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        blocks = torch.linalg.qr(basis)[0].view(count, inter, inter)
        basis = torch.cat([sum(blocks[j][pairs[i, j]] for j in range(count)) for i in range(count)])
    blocks = torch.linalg.qr(basis)[0].view(count, inter, inter)
    return torch.stack([assign(blocks[0], block) for block in blocks]), 0, count * (count - 1) // 2


def perturbed(experts: DenseExperts, budget: int = 40) -> Found:
    """Iterated local search: a third of the neurons of a quarter of the experts shuffled, descent, kept if better."""
    generator = torch.Generator().manual_seed(0)
    orders, sweeps, count = descent(experts, tolerance=1e-4)
    best = explained(experts, orders)
    while count < budget * len(orders):
        trial = orders.clone()
        for e in torch.randperm(len(orders), generator=generator)[: math.ceil(len(orders) / 4)]:
            some = torch.randperm(trial.shape[1], generator=generator)[: trial.shape[1] // 3]
            trial[e, some] = trial[e, some.sort().values]
        trial, more, used = descent_from(partial(given_orders, trial), experts, tolerance=1e-4)
        sweeps, count = sweeps + more, count + used
        if explained(experts, trial) > best:
            orders, best = trial, explained(experts, trial)
    return orders, sweeps, count


WAYS: dict[str, Callable[[DenseExperts], Found]] = {
    "own order": own_order,
    "alternation, from expert 0": alternation,
    "progressive": progressive,
    "progressive, 1 sweep": partial(descent, max_iter=1, tolerance=0),
    "progressive, 2 sweeps": partial(descent, max_iter=2, tolerance=0),
    "progressive, default": descent,
    "progressive, to the minimum": partial(descent, tolerance=0),
    "mean, default": partial(descent, init="mean"),
    "annealed, to the minimum": partial(descent_from, annealed, tolerance=0),
    "synchronised, to the minimum": partial(descent_from, synchronised, tolerance=0),
    "perturbed": perturbed,
}
MOST_NEURONS = {"annealed, to the minimum": 8192, "synchronised, to the minimum": 4096, "perturbed": 4096}  # of a layer
SCORED = (
    "own order",
    "alternation, from expert 0",
    "progressive, default",
    "progressive, to the minimum",
    "annealed, to the minimum",
)


# ---- what they are worth


def mean_of(experts: DenseExperts, orders: Tensor) -> Tensor:
    return sum(design_matrix(experts, e)[order] for e, order in enumerate(orders)) / len(orders)  # type: ignore[return-value]


def explained(experts: DenseExperts, orders: Tensor) -> float:
    energy = sum(squared_norm(design_matrix(experts, e)) for e in range(len(orders))) / len(orders)
    return squared_norm(mean_of(experts, orders)) / energy


def permuted(experts: DenseExperts, orders: Tensor) -> DenseExperts:
    return from_designs([design_matrix(experts, e)[order] for e, order in enumerate(orders)], experts)


def from_designs(designs: Sequence[Tensor], like: DenseExperts) -> DenseExperts:
    parts = [split_design(design, like)[:2] for design in designs]
    return DenseExperts(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]), gated=like.gated)


def measure(experts: DenseExperts, way: str) -> tuple[Tensor, dict[str, float]]:
    start = time.perf_counter()
    orders, sweeps, assignments = WAYS[way](experts)
    seconds = time.perf_counter() - start
    energy, count = explained(experts, orders), experts.num_experts
    cosine = (energy * count - 1) / (count - 1)  # of experts of equal norms
    row = {"explained": energy, "cosine": cosine, "sweeps": sweeps, "assignments": assignments, "seconds": seconds}
    return orders, row


def planted(count: int, inter: int, hidden: int, rho: float) -> tuple[DenseExperts, Tensor]:
    """The experts and the orders that put their neurons back."""
    generator = torch.Generator().manual_seed(0)
    like = DenseExperts(torch.empty(1, 2 * inter, hidden), torch.empty(1, hidden, inter))
    common = torch.randn(inter, 3 * hidden, generator=generator)
    orders = torch.stack([torch.randperm(inter, generator=generator) for _ in range(count)])
    noise = (torch.randn(common.shape, generator=generator) for _ in range(count))
    designs = [(rho**0.5 * common + (1 - rho) ** 0.5 * z)[order] for z, order in zip(noise, orders, strict=True)]
    return from_designs(designs, like), orders.argsort(1)


def right(orders: Tensor, truth: Tensor) -> float:
    """The share of neurons whose common one is the most frequent one at its place."""
    common = truth.argsort(1).gather(1, orders)
    return float((common == common.mode(0).values).float().mean())


def read_layers(path: Path) -> list[DenseExperts]:
    model = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    return [found.read(dict(found.module.named_parameters())) for found in find_experts(model)]


def score(
    path: Path, texts: Sequence[Path], found: Sequence[Tensor], retain: float, limit: int | None
) -> dict[str, float]:
    """Errors and perplexities of the method with these orders of the layers' neurons."""
    tokenizer, row = AutoTokenizer.from_pretrained(path), {}
    for name, form in (("lowrank", {"residual": "lowrank"}), ("block", {"residual": "sparse"})):
        remaining = iter(found)

        def given(experts: DenseExperts, remaining=remaining, **_) -> Barycenter:
            orders = next(remaining)
            return Barycenter(mean_of(experts, orders), orders, 0, 0.0, True)

        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with mock.patch.object(method, "barycenter", given):
            rk.swap_experts(model, method="resmoe", retain=retain, progress=False, **form)
        errors = [layer["report"]["relative_error"] for layer in model.config.quantization_config.layers.values()]
        row[f"error_{name}"] = sum(errors) / len(errors)
        for text in texts:
            result = rk.evaluate(model, tokenizer, text=text, stride=256, limit=limit, progress=False)
            row[f"{text.stem}_{name}"] = result["perplexity"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="*", default=[])
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=12_288, help="tokens of each text to score")
    parser.add_argument("--retain", type=float, default=0.25)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()
    columns = [*COLUMNS, *(f"{text.stem}_{form}" for text in arguments.text for form in ("lowrank", "block"))]
    rows: list[dict[str, str]] = []

    def add(name: str, way: str, experts: DenseExperts, **row) -> None:
        shape = {"experts": name, "way": way, "count": experts.num_experts, "neurons": experts.intermediate_size}
        written = {k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in (shape | row).items() if k in columns}
        rows.append(dict.fromkeys(columns, "") | written)
        write_rows(arguments.csv, rows, columns)
        tqdm.write(" ".join(f"{k}={v}" for k, v in rows[-1].items() if v))

    for path in arguments.model:
        layers = read_layers(path)
        shape = layers[0].num_experts, layers[0].intermediate_size, layers[0].hidden_size
        scores: dict[bytes, dict[str, float]] = {}
        for name, group in ((path.name, layers), (f"Gaussian as {path.name}", [planted(*shape, 0.0)[0]])):
            for way in tqdm(WAYS, desc=name):
                found, measured = zip(*[measure(layer, way) for layer in group], strict=True)
                row = {k: sum(m[k] for m in measured) / len(group) for k in measured[0]}
                if group is layers and way in SCORED and arguments.text:
                    key = torch.stack(found).numpy().tobytes()  # ways that find the same are scored once
                    if key not in scores:
                        scores[key] = score(path, arguments.text, found, arguments.retain, arguments.limit)
                    row |= scores[key]
                add(name, way, group[0], **row)
    for count, inter, hidden, rho in PLANTED:
        experts, truth = planted(count, inter, hidden, rho)
        for way in tqdm(WAYS, desc=f"planted {count} x {inter}, {rho}"):
            if count * inter > MOST_NEURONS.get(way, math.inf):
                continue
            orders, row = measure(experts, way)
            of = {"of_planted": row["explained"] / explained(experts, truth), "right": right(orders, truth)}
            add("planted", way, experts, rho=rho, **row, **of)
    if arguments.plot is not None:
        plot(arguments.csv, arguments.plot)


COLORS = {  # Okabe and Ito's palette
    "own order": "#999999", "alternation, from expert 0": "#D55E00", "progressive": "#56B4E9",
    "progressive, default": "#0072B2", "progressive, to the minimum": "#009E73", "annealed, to the minimum": "#CC79A7",
}  # fmt: skip


def plot(source: Path, target: Path) -> None:
    """Left what each way explains of trained experts and of noise, right how much of the planted it finds."""
    from matplotlib import pyplot as plt

    rows = read_rows(source)
    figure, (left, right_) = plt.subplots(1, 2, figsize=(13, 4.4))
    for column, panel, key, own in (
        ("explained", left, "experts", [r for r in rows if r["experts"] != "planted"]),
        ("of_planted", right_, "rho", [r for r in rows if r["experts"] == "planted"]),
    ):
        names = list(dict.fromkeys((r["count"], r["neurons"], r[key]) for r in own))
        for i, (way, color) in enumerate(COLORS.items()):
            at = {(r["count"], r["neurons"], r[key]): float(r[column]) for r in own if r["way"] == way}
            panel.bar([names.index(n) + (i - 2.5) * 0.14 for n in at], list(at.values()), 0.13, color=color, label=way)
        labels = [n[2].replace(" as ", "\nas ") if key == "experts" else f"{n[0]}×{n[1]}\n{n[2]}" for n in names]
        panel.set_xticks(range(len(names)), labels, fontsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("explained energy")
    right_.set_ylabel("explained, of what the planted orders explain")
    right_.set_xlabel("planted experts × neurons, cosine")
    right_.axhline(1, color="black", linewidth=0.8, linestyle="--")
    left.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
