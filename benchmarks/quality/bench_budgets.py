"""Budgets that follow the error beside a uniform one, at the same bytes: errors, what is kept where, perplexity.

    python -m benchmarks.quality.bench_budgets MODEL --calibration wikitext2-valid.txt \
        --text wikitext2-test.txt heldout.txt --csv FILE.csv --plot FILE.png

Every row is made from the same dense checkpoint by resmoe, compressed in memory; ``usage`` alone sees the calibration.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from benchmarks.tables import read_rows, write_rows
from resmoe_kernels.factored import MATRICES
from resmoe_kernels.python_ops.cli import inspect_layers
from resmoe_kernels.python_ops.models.layouts import expert_nbytes

FORMS = {
    "lowrank": {"residual": "lowrank"},
    "bitmap": {"residual": "sparse", "sparse_layout": "bitmap"},
    "block": {"residual": "sparse", "sparse_layout": "block"},
}
CASES = [
    ("lowrank", 0.10),
    ("lowrank", 0.25),
    ("lowrank", 0.50),
    ("bitmap", 0.10),
    ("bitmap", 0.25),
    ("block", 0.25),
    ("block", 0.375),
]
# Okabe and Ito's palette, which stays apart without colour vision too.
BUDGETS = {"uniform": "#999999", "error": "#0072B2", "usage": "#E69F00"}
MARKERS = {"lowrank": "o", "bitmap": "s", "block": "^"}


def plot(source: Path, target: Path) -> None:
    """For every text perplexity against bytes, one colour a budget, and the dense model's as a line.

    source: CSV of this script; target: a picture of any kind that matplotlib writes
    """
    from matplotlib import pyplot as plt

    dense, *rows = read_rows(source)
    texts = [column for column in dense if column.startswith("perplexity_")]
    figure, panels = plt.subplots(1, len(texts), figsize=(5.2 * len(texts), 3.8), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for form, marker in MARKERS.items():
            for budget, color in BUDGETS.items():
                own = [row for row in rows if (row["form"], row["budget"]) == (form, budget)]
                places = [float(row["of_dense"]) for row in own], [float(row[text]) for row in own]
                panel.plot(*places, marker=marker, color=color, linewidth=1, label=f"{form}, {budget}")
        panel.axhline(float(dense[text]), color="#000000", linewidth=1, linestyle="--", label="dense")
        panel.set_title(f"{dense['model']}, {text.removeprefix('perplexity_')}", fontsize=10, loc="left")
        panel.set_xlabel("bytes of the experts, of dense")
        panel.set_ylabel("perplexity")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=12_288, help="tokens of each text to score")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    statistics = rk.calibrate(model, tokenizer, arguments.calibration, tokens=arguments.calibration_tokens)
    dense_bytes = expert_nbytes(model)
    cases = [("dense", 1.0, ""), *((*case, budget) for case in CASES for budget in BUDGETS)]
    rows = []
    for form, retain, budget in tqdm(cases, desc="rows"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
        layers, start = [], time.perf_counter()
        if form != "dense":
            known = statistics if budget == "usage" else None
            settings = {"retain": retain, "budget": budget, **FORMS[form]}
            rk.swap_experts(model, statistics=known, progress=False, **settings)
            layers = inspect_layers(model.config.quantization_config.layers)
        seconds = time.perf_counter() - start
        results = {
            f"perplexity_{text.stem}": rk.evaluate(
                model, tokenizer, text=text, stride=256, limit=arguments.limit, progress=False
            )["perplexity"]
            for text in arguments.text
        }
        errors = [layer["relative_error"] for layer in layers]
        row = {
            "model": arguments.model.name,
            "form": form,
            "retain": f"{retain:g}",
            "budget": budget,
            "expert_bytes": f"{expert_nbytes(model)}",
            "of_dense": f"{expert_nbytes(model) / dense_bytes:.4f}",
            "relative_error": f"{sum(errors) / max(len(errors), 1):.4f}",
            "relative_error_per_layer": " ".join(f"{error:.4f}" for error in errors),
            **{f"kept_{m}_per_layer": " ".join(f"{layer['kept'][m]:.4f}" for layer in layers) for m in MATRICES},
            **{text: f"{perplexity:.3f}" for text, perplexity in results.items()},
            "compress_seconds": f"{seconds:.1f}",
        }
        rows.append(row)
        tqdm.write(str(row))
        write_rows(arguments.csv, rows, list(row))
    if arguments.plot is not None:
        plot(arguments.csv, arguments.plot)


if __name__ == "__main__":
    main()
