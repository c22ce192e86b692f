"""Bytes, weight error and perplexity of every form of a model's experts, dense beside them.

    python -m benchmarks.quality.bench_quality examples/tiny-mixtral --text FILE --csv FILE

Every row is made from the same dense checkpoint, compressed in memory; perplexity is over the same tokens.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.layouts import expert_nbytes

FORMS = {
    **{f: {"residual": "lowrank", "factorization": f} for f in ("stacked", "separate", "joint")},
    **{f: {"residual": "sparse", "sparse_layout": f} for f in ("block", "bitmap")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--retain", type=float, nargs="+", default=[0.10, 0.25, 0.50])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--limit", type=int, default=None, help="tokens of the text to score")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    cases = [("dense", 1.0), *((form, retain) for retain in arguments.retain for form in arguments.form)]
    rows = []
    for form, retain in tqdm(cases, desc="forms"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
        dense_bytes = expert_nbytes(model)
        start = time.perf_counter()
        if form != "dense":
            rk.swap_experts(model, method="resmoe", retain=retain, progress=False, **FORMS[form])
        seconds = time.perf_counter() - start
        layers = [] if form == "dense" else list(model.config.quantization_config.layers.values())
        reports = [layer["report"] for layer in layers]

        def per_layer(key: str, reports: list[dict] = reports) -> str:
            return " ".join(f"{report[key]:.4f}" for report in reports)

        result = rk.evaluate(model, tokenizer, text=arguments.text, stride=256, limit=arguments.limit, progress=False)
        size = expert_nbytes(model)
        rows.append({
            "model": arguments.model.name,
            "form": form,
            "retain": retain,
            "expert_bytes": size,
            "of_dense": f"{size / dense_bytes:.4f}",
            "relative_error": f"{sum(r['relative_error'] for r in reports) / max(len(reports), 1):.4f}",
            "perplexity": f"{result['perplexity']:.3f}",
            "tokens": result["tokens"],
            "compress_seconds": f"{seconds:.1f}",
            "cosine_before": per_layer("cosine_before"),
            "cosine_after": per_layer("cosine_after"),
        })  # fmt: skip
        tqdm.write(str(rows[-1]))

    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
