"""One expert layer under a threshold router: time against the mean number of experts a token uses.

    python -m benchmarks.experts.bench_threshold --shape olmoe --tokens 64 512 --experts 1 2 4 8 --csv FILE

For every mean, the threshold is calibrated to it on logits of their own, and two calls are timed on the same routing:
``dropless``, as the package runs it, and ``padded``, where every token is given as many slots as the token that uses
most, the spare ones at weight 0, as a layer with a fixed number of slots would. Choosing experts is timed with both.
Weights and logits are random: the time depends on how many experts are used, not on which. What is timed, and how, is
in benchmarks/experts/README.md; candidates take turns, on fresh tokens each round.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resmoe_kernels as rk
from benchmarks.experts.bench_experts import chosen_backend
from benchmarks.shapes import DTYPE, SHAPES, factored_layer
from resmoe_kernels.packed import PackedExperts
from resmoe_kernels.python_ops.methods.xmoe import mass_for
from resmoe_kernels.python_ops.models.routing import Scoring, Threshold, select

COLUMNS = (
    "shape", "tokens", "implementation", "threads", "rounds", "threshold", "experts_per_token", "most_experts",
    "experts_hit", "pairs_used", "pairs_computed", "p50_ms", "us_per_token", "us_per_pair_used",
)  # fmt: skip
SPREAD = 2.0  # of the logits: the first of 64 experts has 0.26 of the probability on the mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--experts", nargs="+", type=float, default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=30, help="time for one number of tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    weights = factored_layer(shape, "dense", 1.0, seed=0)
    if chosen_backend("auto") == "cpu":
        weights = PackedExperts.pack(weights)
    rows = [row for tokens in arguments.tokens for row in bench(shape, weights, tokens, arguments)]
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(str(row[c]) for c in COLUMNS))
    Console(width=200).print(table)


def bench(shape, weights, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    generator = torch.Generator().manual_seed(tokens)

    def logits_of(count: int) -> Tensor:
        return torch.randn(count, shape.num_experts, generator=generator) * SPREAD

    scoring, calibration = Scoring(shape.top_k), logits_of(4096).softmax(-1)
    rules = [Threshold(mass_for(calibration, mean), "renormalised") for mean in arguments.experts]
    measured: dict[tuple[int, str], list[tuple]] = {(i, how): [] for i in range(len(rules)) for how in HOW}
    order, start = list(measured), time.perf_counter()
    while len(measured[order[0]]) < 5 or time.perf_counter() - start < arguments.seconds:
        x, logits = torch.randn(tokens, shape.hidden_size, generator=generator).to(DTYPE), logits_of(tokens)
        for key in order:
            i, how = key
            began = time.perf_counter()
            index, index_weights = HOW[how](logits, scoring, rules[i])
            rk.experts(x, index, index_weights.to(DTYPE), weights, shape.activation)
            elapsed = time.perf_counter() - began
            used = dropless(logits, scoring, rules[i])[0] >= 0
            hit = index[index >= 0].unique().numel()
            computed = int((index >= 0).sum())
            measured[key].append((elapsed, int(used.sum()), computed, int(used.sum(1).max()), hit))
        order = order[1:] + order[:1]
    rows = []
    for (i, how), values in measured.items():
        seconds, used, computed, most, hit = (statistics.median(column) for column in zip(*values[1:], strict=True))
        rows.append({
            "shape": shape.name, "tokens": tokens, "implementation": how, "threads": arguments.threads,
            "rounds": len(values) - 1, "threshold": round(rules[i].mass, 4),
            "experts_per_token": round(used / tokens, 2), "most_experts": most, "experts_hit": hit,
            "pairs_used": used, "pairs_computed": computed, "p50_ms": round(seconds * 1e3, 3),
            "us_per_token": round(seconds / tokens * 1e6, 2), "us_per_pair_used": round(seconds / used * 1e6, 2),
        })  # fmt: skip
    return rows


def dropless(logits: Tensor, scoring: Scoring, rule: Threshold) -> tuple[Tensor, Tensor]:
    weights, index = select(logits, scoring, threshold=rule)
    return index, weights


def padded(logits: Tensor, scoring: Scoring, rule: Threshold) -> tuple[Tensor, Tensor]:
    index, weights = dropless(logits, scoring, rule)
    widest = int((index >= 0).sum(1).max())
    return logits.topk(widest).indices, weights[:, :widest]


HOW = {"dropless": dropless, "padded": padded}

if __name__ == "__main__":
    main()
