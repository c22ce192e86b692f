"""The search for experts to prune: what it costs with all experts' outputs cached, against running the layer for every
candidate, and what it finds.

    python -m benchmarks.compression.bench_genetic examples/tiny-mixtral --text FILE --csv FILE
    python -m benchmarks.compression.bench_genetic --shape dsv2lite --csv FILE

A row for every layer of experts. Of a shape, one layer of random weights: times only mean anything there. Errors are
||F(X) - F(X; without C)|| / ||F(X)|| on the sample; ``random`` asks as often as ``genetic`` did, ``exhaustive`` about
all sets where there are no more than --exhaustive.
"""

from __future__ import annotations

import argparse
import csv
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from benchmarks.shapes import SHAPES
from resmoe_kernels.python_ops.calibration.calibrate import collect, windows
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.routing import select
from resmoe_kernels.python_ops.solvers.expert_outputs import ExpertOutputs, expert_outputs
from resmoe_kernels.python_ops.solvers.genetic import Sets, search

BATCH = 100  # candidates at a time: the search's population
RUNS = 5  # candidates for which the layer is run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text; 4,096 of them are the sample")
    parser.add_argument("--shape-tokens", type=int, default=1024, help="the sample for a shape")
    parser.add_argument("--prune", type=float, default=0.25)
    parser.add_argument("--exhaustive", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.models and arguments.text is None:
        parser.error("--text is needed to calibrate a model")
    torch.set_num_threads(arguments.threads)

    rows: list[dict[str, Any]] = []
    for folder in arguments.models:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokens = windows(model.config, AutoTokenizer.from_pretrained(folder), arguments.text, arguments.tokens)
        rows += measure(folder.name, model, tokens, arguments)
    for name in arguments.shape:
        tokens = torch.randint(0, 64, (1, arguments.shape_tokens), generator=torch.Generator().manual_seed(0))
        rows += measure(name, one_layer(name), tokens, arguments)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def one_layer(name: str) -> MixtralForCausalLM:
    """A layer of a named shape, random, under the smallest decoder that has one."""
    shape = SHAPES[name]
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=64,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def measure(name: str, model: Any, tokens: torch.Tensor, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    dense = DenseModel(model)
    statistics = collect(dense, tokens, progress=False)
    rows = []
    for i, found in enumerate(tqdm(dense.experts, desc=name)):
        sample = statistics.layers[found.path]
        experts, scoring = dense.read(i), dense.scoring(i)
        outputs, fill = timed(
            lambda e=experts, s=sample, r=scoring, a=found.activation: expert_outputs(
                e, s.sample_x, s.sample_logits, partial(select, scoring=r), activation=a
            )
        )
        sets = Sets(experts.num_experts, round(arguments.prune * experts.num_experts))
        generator = torch.Generator().manual_seed(0)
        candidates = sets.draw(BATCH, generator)
        changes, cached = timed(lambda o=outputs, c=candidates: o.change(c))
        run, running = timed(lambda m=found.module, o=outputs, s=sample, c=candidates: run_layer(m, o, s.sample_x, c))
        assert torch.allclose(run, changes[:RUNS], rtol=0.03), (run, changes[:RUNS])  # the layer runs in bfloat16
        norm = outputs.norm()

        def best(kind: str, o: ExpertOutputs = outputs, s: Sets = sets, n: float = norm, **given: int) -> Any:
            found, seconds = timed(
                lambda: search(kind, o.change, s, generator=torch.Generator().manual_seed(0), **given)
            )
            return float(found.errors[0]) / n, found.evaluations, seconds

        error, evaluations, seconds = best("genetic")
        row = {
            "model": name,
            "layer": i,
            "experts": experts.num_experts,
            "pruned": sets.size,
            "sets": sets.count,
            "sample": len(sample.sample_x),
            "threads": arguments.threads,
            "cache_mbytes": f"{outputs.gram.nbytes / 1e6:.2f}",
            "outputs_mbytes": f"{4 * len(sample.sample_x) * experts.num_experts * experts.hidden_size / 1e6:.2f}",
            "fill_seconds": f"{fill:.3f}",
            "candidate_ms_cached": f"{cached / BATCH * 1e3:.3f}",
            "candidate_ms_run": f"{running / RUNS * 1e3:.3f}",
            "evaluations": evaluations,
            "search_seconds": f"{seconds:.2f}",
            "search_seconds_by_running": f"{evaluations * running / RUNS:.1f}",
            "error_genetic": f"{error:.5f}",
        }
        row["error_greedy"] = f"{best('greedy', population=4)[0]:.5f}"
        row["error_random"] = f"{best('random', population=evaluations, generations=1)[0]:.5f}"
        row["error_exhaustive"] = ""
        if sets.count <= arguments.exhaustive:
            row["error_exhaustive"] = f"{best('random', population=arguments.exhaustive)[0]:.5f}"
        rows.append(row)
        tqdm.write(str(row))
    return rows


def run_layer(module: Any, outputs: ExpertOutputs, x: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The same errors for the first candidates, by running the model's own experts module for each."""

    def run(pruned: torch.Tensor | None) -> torch.Tensor:
        left = None if pruned is None else int((~pruned).sum())
        weights, slots = outputs.route(outputs.logits, pruned=pruned, left=left)
        return module(x, slots, weights.to(x.dtype)).float()

    dense = run(None)
    return torch.stack([(run(pruned) - dense).norm().double() for pruned in candidates[:RUNS]])


def timed(call: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
