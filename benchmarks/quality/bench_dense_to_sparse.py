"""A dense model turned into fine-grained experts: perplexity against the mean share of parts a token uses.

    python -m benchmarks.quality.bench_dense_to_sparse MODEL --calibration wikitext2-valid.txt \\
        --text wikitext2-test.txt --parts 16 --share 1 0.9 0.75 0.5 --csv FILE

MODEL: a folder of a Llama-like model, or a GGUF file. Nothing is trained. Every way to split is calibrated once, and
for every share only the mass of each layer again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.calibration.calibrate import collect, windows
from resmoe_kernels.python_ops.methods.xmoe import find, mass_for
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.routing import part_shares

COLUMNS = ("parts", "split", "part_router", "target_share", "share", "perplexity", "seconds_to_split")
WAYS = (("activations", "activations"), ("contiguous", "activations"), ("activations", "weights"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--parts", nargs="+", type=int, default=[16])
    parser.add_argument("--share", nargs="+", type=float, default=[1, 0.9, 0.75, 0.5])
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    where = {"pretrained_model_name_or_path": arguments.model}
    if arguments.model.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": arguments.model.parent, "gguf_file": arguments.model.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    how = {"text": arguments.text, "limit": arguments.limit, "window": 1024, "stride": 1024, "progress": False}
    statistics = None
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for parts in arguments.parts:
            for split, part_router in WAYS:
                model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
                if hasattr(model.config, "quantization_config"):  # of the file: the weights are plain by now
                    del model.config.quantization_config
                if statistics is None:
                    writer.writerow(
                        {"share": 1, "perplexity": round(rk.evaluate(model, tokenizer, **how)["perplexity"], 3)}
                    )
                    ids = windows(model.config, tokenizer, arguments.calibration, arguments.calibration_tokens)
                    statistics = collect(DenseModel(model, experts=find(model)), ids)
                start = time.perf_counter()
                settings = {"parts": parts, "split": split, "part_router": part_router, "parts_per_token": parts / 2}
                paths = rk.swap_experts(model, method="xmoe", statistics=statistics, progress=False, **settings)
                seconds = time.perf_counter() - start
                for share in arguments.share:
                    for path in paths:
                        use(model.get_submodule(path), statistics.layers[path], share)
                    result = rk.evaluate(model, tokenizer, **how)
                    row = {
                        "parts": parts, "split": split, "part_router": part_router, "target_share": share,
                        "share": round(result["experts_per_token"], 4), "perplexity": round(result["perplexity"], 3),
                        "seconds_to_split": round(seconds, 1),
                    }  # fmt: skip
                    Console().print(row)
                    writer.writerow(row)
                    file.flush()
                del model
                gc.collect()


def use(layer, statistics, share: float) -> None:
    """Calibrates the mass of a layer's parts to a mean share of them."""
    change, router = layer.router_change, layer.part_router
    shares = part_shares(statistics.sample_x, statistics.sample_index, statistics.sample_weight, router, change.parts)
    layer.change_routing(dataclasses.replace(change, part_mass=mass_for(shares, share * change.parts)))


if __name__ == "__main__":
    main()
