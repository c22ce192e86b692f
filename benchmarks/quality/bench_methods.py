"""All methods and their ablations on one model, at a few byte budgets: what they store, lose, use and take.

    python -m benchmarks.quality.bench_methods MODEL --calibration wikitext2-valid.txt \\
        --text wikitext2-test.txt --csv FILE

Every row is made from the same dense checkpoint, compressed in memory, calibrated on one text and measured on others:
bytes of the experts; relative output error of each layer of experts, ||y' - y|| / ||y|| over held-out tokens, given the
dense model's input of that layer; perplexity of each text; experts computed per token on the first of them; seconds to
compress (planning included).
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.calibration.calibrate import windows
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.layouts import expert_nbytes, find_experts

HELD_OUT_TOKENS = 4096


class HeldOut:
    """What the dense model's blocks of experts take and their experts give for held-out tokens."""

    def __init__(self, model, token_ids: torch.Tensor) -> None:
        self.taken: dict[str, torch.Tensor] = {}
        self.given: dict[str, torch.Tensor] = {}
        paths = [experts.path for experts in find_experts(model)]
        hooks = []
        for path in paths:
            block = model.get_submodule(path.rpartition(".")[0])
            hooks.append(block.register_forward_pre_hook(lambda m, a, path=path: self.taken.update({path: a[0]})))
            hooks.append(self._watch(model, path, self.given))
        with torch.inference_mode():
            model(token_ids)
        for hook in hooks:
            hook.remove()

    def _watch(self, model, path: str, into: dict[str, torch.Tensor]):
        return model.get_submodule(path).register_forward_hook(lambda m, a, y: into.update({path: y}))

    def errors(self, model) -> list[float]:
        """||y' - y|| / ||y|| of each layer."""
        made: dict[str, torch.Tensor] = {}
        for path, x in self.taken.items():
            hook = self._watch(model, path, made)
            with torch.inference_mode():
                model.get_submodule(path.rpartition(".")[0])(x)
            hook.remove()
        return [float((made[p].float() - y.float()).norm() / y.float().norm()) for p, y in self.given.items()]


def cases(experts: int, top_k: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what the row is for, method, settings)."""
    for retain in (0.10, 0.25, 0.50):
        yield "budget", "resmoe", {"residual": "lowrank", "retain": retain}
        yield "budget", "resmoe", {"residual": "sparse", "retain": retain}
    for share in (0.25, 0.5, 0.75):
        groups = int(share * experts)
        yield "budget", "mc-smoe", {"stage": "merge", "groups": groups}
        yield "budget", "mc-smoe", {"stage": "compress", "groups": groups}
        yield "alignment off", "mc-smoe", {"stage": "merge", "groups": groups, "align": False}
        yield "uniform groups", "mc-smoe", {"stage": "merge", "groups": groups, "budget": "uniform"}
        for similarity in ("weights", "outputs"):
            yield "similarity", "mc-smoe", {"stage": "merge", "groups": groups, "similarity": similarity}
    for groups in (1, max(2, experts // 4)):
        for retain in (0.10, 0.25):
            yield "hybrid", "mc-smoe", {"stage": "hybrid", "density": 0.0, "groups": groups, "retain": retain}
    for prune, retain in ((0.25, 0.3), (0.25, 0.5), (0.25, 0.83), (0.0, 0.375)):
        yield "budget", "moe-i2", {"prune": prune, "retain": retain}
    for settings in (
        {"allocation": "uniform"},
        {"alpha": 0.0},
        {"search": "greedy", "block": 1},
        {"search": "random"},
        {"block": 1},
    ):
        yield "ablation", "moe-i2", {"prune": 0.25, "retain": 0.83, **settings}
    for share in (0.5, 0.75, 0.9, 1.0):
        yield "threshold", "xmoe", {"experts_per_token": share * top_k}
    for split, rows in (("activations", "activations"), ("contiguous", "activations"), ("activations", "weights")):
        for share in (0.5, 0.75):
            wanted = {"parts": 4, "split": split, "part_router": rows, "parts_per_token": share * 4 * top_k}
            yield "parts", "xmoe", wanted
    yield "then resmoe", "xmoe+resmoe", {"experts_per_token": 0.75 * top_k, "retain": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=None, help="tokens of each text to score")
    parser.add_argument("--only", nargs="+", default=None, help="methods, or what rows are for, e.g. threshold")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    start = time.perf_counter()
    statistics = rk.calibrate(model, tokenizer, arguments.calibration, tokens=arguments.calibration_tokens)
    print(f"calibration: {time.perf_counter() - start:.1f} s")
    held_out = HeldOut(model, windows(model.config, tokenizer, arguments.text[0], HELD_OUT_TOKENS))
    dense_bytes = expert_nbytes(model)
    found = find_experts(model)
    top_k = found[0].scoring(model).top_k
    wanted = list(cases(found[0].num_experts, top_k))
    if arguments.only:
        wanted = [case for case in wanted if {case[0], case[1]} & set(arguments.only)]

    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = None
        for purpose, method, settings in tqdm([("dense", "dense", {}), *wanted], desc="rows"):
            model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
            start = time.perf_counter()
            if method != "dense":
                needed = statistics if method_named(method, settings).needs_statistics else None
                rk.swap_experts(model, method=method, statistics=needed, progress=False, **settings)
            seconds = time.perf_counter() - start
            errors = held_out.errors(model)
            results = [
                rk.evaluate(model, tokenizer, text=text, stride=256, limit=arguments.limit, progress=False)
                for text in arguments.text
            ]
            layers = [] if method == "dense" else list(model.config.quantization_config.layers.values())
            row = {
                "model": arguments.model.name,
                "row": purpose,
                "method": method,
                "settings": " ".join(f"{name}={value}" for name, value in settings.items()),
                "expert_bytes": expert_nbytes(model),
                "of_dense": f"{expert_nbytes(model) / dense_bytes:.4f}",
                "weight_error": f"{sum(x['report']['relative_error'] for x in layers) / max(len(layers), 1):.4f}",
                "output_error": f"{sum(errors) / len(errors):.4f}",
                "output_error_per_layer": " ".join(f"{error:.4f}" for error in errors),
                **{
                    f"perplexity_{t.stem}": f"{r['perplexity']:.3f}"
                    for t, r in zip(arguments.text, results, strict=True)
                },
                "tokens": results[0]["tokens"],
                "experts_per_token": f"{results[0].get('experts_per_token', top_k):.3f}",
                "compress_seconds": f"{seconds:.1f}",
            }
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            tqdm.write(str(row))


if __name__ == "__main__":
    main()
