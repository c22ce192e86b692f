"""Peak memory and time of compressing a checkpoint that is much larger than one of its layers.

    python -m benchmarks.compression.bench_memory --work FOLDER --layers 18 --intermediate 1792 \\
        --residual sparse --csv FILE

Makes a Mixtral-shaped checkpoint (hidden 4096, 8 experts, one safetensors file per layer, one matrix per expert),
compresses it in a process of its own and samples that process. The experts are permuted copies of one random expert
plus noise, so that the alignment has something to find; random weights prove memory and time here, never quality.

VmHWM, the high-water mark of resident memory, counts file pages mapped while reading; the sampled RssAnon does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import MixtralConfig

HIDDEN, EXPERTS = 4096, 8


def make_checkpoint(folder: Path, layers: int, intermediate: int) -> None:
    """Writes the dense checkpoint, one layer in memory at a time; attention is small, it is not what is measured."""
    folder.mkdir(parents=True)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_local_experts=EXPERTS,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype=torch.bfloat16,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    weight_map = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    edges = {"model.embed_tokens.weight": random(32000, HIDDEN), "lm_head.weight": random(32000, HIDDEN)}
    save("model-00000.safetensors", {**edges, "model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    for layer in tqdm(range(layers), desc="writing the dense checkpoint"):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{n}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for n in ("input", "post_attention")}
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = random(EXPERTS, HIDDEN)
        for name, rows in (("q", HIDDEN), ("k", 1024), ("v", 1024), ("o", HIDDEN)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = random(rows, HIDDEN)
        ancestor = {w: random(intermediate, HIDDEN) for w in ("w1", "w2", "w3")}  # w2 transposed
        for e in range(EXPERTS):
            order = torch.randperm(intermediate, generator=generator)
            for w, matrix in ancestor.items():
                copy = matrix[order] + 0.5 * random(intermediate, HIDDEN)
                tensors[f"{prefix}.block_sparse_moe.experts.{e}.{w}.weight"] = (
                    copy.T if w == "w2" else copy
                ).contiguous()
        save(f"model-{layer + 1:05d}.safetensors", tensors)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def memory(pid: int) -> tuple[int, int]:
    """(VmHWM, RssAnon) of a process in MiB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(fields[key].split()[0]) >> 10 if key in fields else 0 for key in ("VmHWM", "RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for both checkpoints; the dense one is kept")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True)
    parser.add_argument("--residual", choices=("lowrank", "sparse"), default="lowrank")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()

    dense = arguments.work / f"mixtral-{arguments.layers}x{arguments.intermediate}"
    if not dense.exists():
        make_checkpoint(dense, arguments.layers, arguments.intermediate)
    out = arguments.work / f"{dense.name}-{arguments.residual}"
    if out.exists():
        sys.exit(f"{out}: is there already, so there would be nothing to measure; remove it")
    command = [sys.executable, "-m", "resmoe_kernels", "compress", dense, out, "--residual", arguments.residual]
    start, peak, peak_anonymous = time.perf_counter(), 0, 0
    process = subprocess.Popen(list(map(str, command)))
    while process.poll() is None:
        high, anonymous = memory(process.pid)
        peak, peak_anonymous = max(peak, high), max(peak_anonymous, anonymous)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)

    layer = 3 * EXPERTS * HIDDEN * arguments.intermediate * 2
    row = {
        "residual": arguments.residual,
        "layers": arguments.layers,
        "intermediate": arguments.intermediate,
        "expert_gb": f"{arguments.layers * layer / 1e9:.2f}",
        "one_layer_mib": layer >> 20,
        "peak_resident_mib": peak,
        "peak_anonymous_mib": peak_anonymous,
        "peak_over_layer": f"{peak / (layer >> 20):.2f}",
        "seconds": f"{time.perf_counter() - start:.0f}",
    }
    print(row)
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
