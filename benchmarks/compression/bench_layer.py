"""What compressing one layer of a real model's shape takes: seconds of each step, and memory at its peak.

    python -m benchmarks.compression.bench_layer --csv benchmarks/results/layer.csv

Each layer is compressed by ``resmoe`` with its default settings in a process of its own. Weights are bfloat16 and
planted: sqrt(cosine) C[order] + sqrt(1 - cosine) Z_e, C common, each expert in an order of its own, all numbers
normal. ``align`` is the barycenter, ``residual`` its compression, ``other`` the errors and cosines of the report. The
peak counts the dense layer and the process itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.shapes import SHAPES, Shape
from benchmarks.tables import write_rows
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.methods.resmoe import resmoe

COLUMNS = (
    "shape", "experts", "intermediate", "hidden", "cosine", "threads", "align", "residual", "other", "seconds",
    "peak_gib", "layer_gib", "sweeps", "cosine_after", "relative_error", "of_dense",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["dsv2lite", "qwen3", "mixtral"])
    parser.add_argument("--cosine", type=float, nargs="*", default=[0.1])
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    for name in arguments.shape:
        for cosine in arguments.cosine:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(compressed, (name, cosine)))
            print(rows[-1], flush=True)
            write_rows(arguments.csv, rows, COLUMNS)


def planted(shape: Shape, cosine: float) -> DenseExperts:
    E, H, inter = shape.num_experts, shape.hidden_size, shape.intermediate_size
    generator = torch.Generator().manual_seed(0)
    common = [torch.randn(inter, H, generator=generator) for _ in range(3)]
    gate_up = torch.empty(E, 2 * inter, H, dtype=torch.bfloat16)
    down = torch.empty(E, H, inter, dtype=torch.bfloat16)
    for e in tqdm(range(E), desc="weights"):
        order = torch.randperm(inter, generator=generator)
        gate, up, out = (
            cosine**0.5 * c[order] + (1 - cosine) ** 0.5 * torch.randn(inter, H, generator=generator) for c in common
        )
        gate_up[e, :inter], gate_up[e, inter:], down[e] = gate, up, out.T
    return DenseExperts(gate_up=gate_up, down=down, gated=True)


def compressed(name: str, cosine: float) -> dict[str, str]:
    shape = SHAPES[name]
    experts = planted(shape, cosine)
    ends = {"align": 0.0, "residual": 0.0}
    bar = tqdm(desc=name)

    def progress(phrase: str) -> None:
        step = phrase.partition(":")[0]
        if step in ends:
            ends[step] = time.perf_counter()
        bar.set_postfix_str(phrase)

    start = time.perf_counter()
    factored, report = resmoe(experts, progress=progress)[:2]
    end = time.perf_counter()
    bar.close()
    return {
        "shape": name,
        "experts": str(shape.num_experts),
        "intermediate": str(shape.intermediate_size),
        "hidden": str(shape.hidden_size),
        "cosine": str(cosine),
        "threads": str(torch.get_num_threads()),
        "align": f"{ends['align'] - start:.1f}",
        "residual": f"{ends['residual'] - ends['align']:.1f}",
        "other": f"{end - ends['residual']:.1f}",
        "seconds": f"{end - start:.1f}",
        "peak_gib": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
        "layer_gib": f"{experts.nbytes() / 2**30:.2f}",
        "sweeps": str(report.iterations),
        "cosine_after": f"{report.cosine_after:.4f}",
        "relative_error": f"{report.relative_error:.4f}",
        "of_dense": f"{factored.nbytes() / experts.nbytes():.4f}",
    }


if __name__ == "__main__":
    main()
