"""A whole model: tokens per second and resident memory of greedy generation, dense beside compressed.

    python -m benchmarks.experts.bench_model --model bundled olmoe --form dense lowrank block \\
        --retain 0.25 --batch 1 8 --prompt 128 --new 64 --backend cpu --csv FILE

Models: ``bundled`` is examples/tiny-mixtral, compressed here; ``olmoe`` has the shape of OLMoE-1B-7B and random weights
in bfloat16 (13.8 GB dense), whose compressed forms are made directly, never from the dense one. Dense is transformers
with each of its experts implementations that has a fast path on CPUs; the speed-up is over the faster of the two.

Every model runs in a process of its own. Resident memory counts all of that process, Python and torch included, and
its peak is that of generation alone, without loading.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import resmoe_kernels as rk
from benchmarks.shapes import BUNDLED, DTYPE, FORMS, SHAPES, dense_layer, factored_layer
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import expert_nbytes, find_experts

MODELS = ("bundled", "olmoe")
IMPLEMENTATIONS = {"dense": ("eager", "grouped_mm")}  # of transformers; every other form has its backend
SETTINGS = {
    "lowrank": {"residual": "lowrank"},
    "block": {"residual": "sparse", "sparse_layout": "block"},
    "bitmap": {"residual": "sparse", "sparse_layout": "bitmap"},
}
COLUMNS = (
    "model", "form", "implementation", "retain", "threads", "batch", "prompt", "new", "prompt_tokens_per_s",
    "tokens_per_s", "step_p50_ms", "expert_mbytes", "resident_mib", "peak_resident_mib", "speedup", "memory_ratio",
)  # fmt: skip
NO_ROOM = 3  # exit code of a process whose model would not fit
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--retain", type=float, default=0.25)
    parser.add_argument("--backend", choices=("auto", *rk.backends()), default="auto")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated for every prompt, at least 2")
    parser.add_argument("--repeats", type=int, default=3, help="generations timed; the median is reported")
    parser.add_argument("--layers", type=int, default=16, help="layers of olmoe; fewer fit a smaller machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="required, but for --alone")
    parser.add_argument("--alone", help="one implementation, in this process; prints its rows as JSON")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure_model(arguments)))
        return
    if arguments.csv is None or arguments.new < 2:
        parser.error("--csv FILE is required" if arguments.csv is None else "--new must be at least 2")

    rows = []
    for model in arguments.model:
        measured = [row for form in arguments.form for name in implementations(form, arguments)
                    for row in in_own_process(model, form, name)]  # fmt: skip
        rows += compare(measured)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(
        "model", "form", "implementation", "batch", "prompt tok/s", "new tok/s", "peak MiB", "speed-up", "memory"
    )
    for row in rows:
        table.add_row(*(str(row[key]) for key in (
            "model", "form", "implementation", "batch", "prompt_tokens_per_s", "tokens_per_s", "peak_resident_mib",
            "speedup", "memory_ratio",
        )))  # fmt: skip
    console.print(table)


def implementations(form: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    return IMPLEMENTATIONS.get(form, (arguments.backend,))


def in_own_process(model: str, form: str, implementation: str) -> list[dict]:
    """The rows of one model; none, and a line that says why, where it does not fit."""
    chosen = ["--model", model, "--form", form, "--alone", implementation]  # of options given twice the last counts
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.experts.bench_model", *sys.argv[1:], *chosen],
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode in (NO_ROOM, -signal.SIGKILL):
        reason = result.stdout.strip() or "the system killed it, most likely for memory"
        console.print(f"{model} {form} {implementation} is left out: {reason}", markup=False)
        return []
    if result.returncode:
        sys.exit(result.returncode)
    rows = json.loads(result.stdout.splitlines()[-1])
    for row in rows:
        console.print(
            f"{model} {form} {implementation}, batch {row['batch']}: {row['tokens_per_s']} tokens/s, "
            f"prompt {row['prompt_tokens_per_s']} tokens/s, peak {row['peak_resident_mib']} MiB", markup=False
        )  # fmt: skip
    return rows


def compare(rows: list[dict]) -> list[dict]:
    """Ratios to the fastest dense row of the same batch; empty where no dense model ran."""
    for row in rows:
        dense = [r for r in rows if r["form"] == "dense" and r["batch"] == row["batch"]]
        fastest = max(dense, key=lambda r: r["tokens_per_s"], default=None)
        row["speedup"] = round(row["tokens_per_s"] / fastest["tokens_per_s"], 3) if fastest else ""
        row["memory_ratio"] = round(row["peak_resident_mib"] / fastest["peak_resident_mib"], 3) if fastest else ""
    return rows


# ---- in the process of one model


def measure_model(arguments: argparse.Namespace) -> list[dict]:
    disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    (model_name,), (form,), implementation = arguments.model, arguments.form, arguments.alone
    if model_name == "bundled":
        model = bundled(form, arguments.retain, implementation)
    else:
        model = olmoe(form, arguments.retain, implementation, arguments.layers)
    backend = "auto" if form == "dense" else implementation
    rows = []
    with rk.backend(backend):
        for batch in arguments.batch:
            prompt = torch.randint(2, model.config.vocab_size, (batch, arguments.prompt),
                                   generator=torch.Generator().manual_seed(0))  # fmt: skip
            generate(model, prompt[:, :8], 2)  # threads start, buffers appear
            resident = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            runs = [generate(model, prompt, arguments.new) for _ in range(arguments.repeats)]
            steps = [seconds for _, of_run in runs for seconds in of_run]
            rows.append({
                "model": model_name,
                "form": form,
                "implementation": implementation,
                "retain": 1.0 if form == "dense" else arguments.retain,
                "threads": arguments.threads,
                "batch": batch,
                "prompt": arguments.prompt,
                "new": arguments.new,
                "prompt_tokens_per_s": round(prompt.numel() / statistics.median(s for s, _ in runs), 2),
                "tokens_per_s": round(batch * (arguments.new - 1) / statistics.median(sum(s) for _, s in runs), 3),
                "step_p50_ms": round(statistics.median(steps) * 1e3, 3),
                "expert_mbytes": round(expert_nbytes(model) / 1e6, 3),
                "resident_mib": resident,
                "peak_resident_mib": memory("VmHWM"),
            })  # fmt: skip
    return rows


def generate(model: PreTrainedModel, prompt: Tensor, new: int) -> tuple[float, list[float]]:
    """Greedy generation: seconds for the prompt and its first new token, and for each of the others."""
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    prompt_seconds, steps = time.perf_counter() - start, []
    for _ in range(new - 1):
        start = time.perf_counter()
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        steps.append(time.perf_counter() - start)
    return prompt_seconds, steps


def bundled(form: str, retain: float, implementation: str) -> PreTrainedModel:
    if form == "dense":
        return AutoModelForCausalLM.from_pretrained(BUNDLED, experts_implementation=implementation).eval()
    model = AutoModelForCausalLM.from_pretrained(BUNDLED).eval()
    rk.swap_experts(model, method="resmoe", retain=retain, progress=False, **SETTINGS[form])
    return model


def olmoe(form: str, retain: float, implementation: str, layers: int) -> PreTrainedModel:
    """OLMoE-1B-7B with random weights. Built with experts of one neuron, which are then replaced: nothing but what
    the form needs is ever in memory."""
    shape = SHAPES["olmoe"]
    needed, free = layers * 2 * shape.num_experts * shape.expert_parameters + (2 << 30), available_bytes()
    if form == "dense" and needed > free:
        print(f"it needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        sys.exit(NO_ROOM)
    config = OlmoeConfig(  # config.json of allenai/OLMoE-1B-7B-0924
        hidden_size=shape.hidden_size,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        vocab_size=50304,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    for seed, experts in enumerate(find_experts(model)):
        if form == "dense":
            weights, module = dense_layer(shape, seed), experts.module
            module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
            module.down_proj = nn.Parameter(weights.down, requires_grad=False)
            module.intermediate_dim = shape.intermediate_size
            module.config._experts_implementation = implementation
        else:
            layer = experts.install(model, factored_layer(shape, form, retain, seed))
            assert isinstance(layer, FactoredExpertsLayer)
            layer.pack()
    model.config.intermediate_size = shape.intermediate_size
    return model


def memory(key: str) -> int:
    """A line of /proc/self/status in MiB: VmRSS now, VmHWM the peak."""
    return kibibytes("/proc/self/status", key) >> 10


def available_bytes() -> int:
    return kibibytes("/proc/meminfo", "MemAvailable") << 10


def kibibytes(path: str, key: str) -> int:
    return int(dict(line.split(":", 1) for line in Path(path).read_text().splitlines())[key].split()[0])


if __name__ == "__main__":
    main()
