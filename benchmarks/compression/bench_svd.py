"""The truncated SVD of experts' matrices: exact and filtered, their times and what filtering gives up.

    python -m benchmarks.compression.bench_svd --models examples/tiny-mixtral --csv FILE [--quick]

Of a shape, one gate_up or down matrix of random normal entries, whose spectrum is as flat as one can be, and one
with the spectrum of a trained residual, stretched. Of a model, the residual of every expert's matrices to its layer's
barycenter; these are smaller than filtering is meant for, so only what it captures is told, of the matrix with the
largest excess (``of`` so many, of which the bound was ``shown`` for so many).

    captured   energy of u^T v / energy of the best of that rank, 1 at most
    excess     ||W - u^T v||^2 / the least - 1;  bound: the same, as shown without the exact decomposition

Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader
from resmoe_kernels.python_ops.models.dense_model import DenseModel, build_on_meta
from resmoe_kernels.python_ops.models.layouts import find_experts
from resmoe_kernels.python_ops.solvers.align import barycenter, design_matrix, split_design
from resmoe_kernels.python_ops.solvers.spectra import spectrum
from resmoe_kernels.python_ops.solvers.svd import exact_svd, filtered_svd

# Rows, columns, ranks: what a quarter and half of a matrix's parameters buy, rounded up to 16.
SHAPES = {
    "dsv2lite gate_up": (2816, 2048, (304, 592)),
    "dsv2lite down": (2048, 1408, (208, 416)),
    "qwen3 gate_up": (1536, 2048, (224, 448)),
    "qwen3 down": (2048, 768, (144, 288)),
    "mixtral gate_up": (28672, 4096, (896, 1792)),
    "mixtral down": (4096, 14336, (800, 1600)),
}
TIMES = (
    *("threads", "seconds_exact", "seconds_filtered", "ratio"),
    *("cpu_exact", "cpu_filtered", "cpu_ratio", "load"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="no Mixtral, one repeat, one layer of a model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 1 if arguments.quick else arguments.repeats

    rows = [row for folder in arguments.models for row in of_model(folder, arguments.quick)]
    for name in arguments.shape:
        if not (arguments.quick and "mixtral" in name):
            rows += of_shape(name, repeats)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def of_shape(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    N, K, ranks = SHAPES[name]
    flat = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    for kind, matrix in {"normal": flat, "trained spectrum": with_trained_spectrum(flat)}.items():
        energy = spectrum(matrix)
        for rank in ranks:
            times: dict[str, list[tuple[float, float]]] = {"exact": [], "filtered": []}
            for _ in range(repeats):
                times["filtered"].append(timed(lambda m=matrix, r=rank: filtered_svd(m, r)))
                times["exact"].append(timed(lambda m=matrix, r=rank: exact_svd(m, r)))
            exact, filtered = ([statistics.median(t) for t in zip(*times[of], strict=True)] for of in times)
            row = {"matrix": name, "entries": kind, "rows": N, "columns": K, "rank": rank} | quality(
                matrix, rank, energy
            )
            row |= {
                "threads": torch.get_num_threads(),
                "seconds_exact": f"{exact[0]:.3f}",
                "seconds_filtered": f"{filtered[0]:.3f}",
                "ratio": f"{exact[0] / filtered[0]:.2f}",
                "cpu_exact": f"{exact[1]:.3f}",
                "cpu_filtered": f"{filtered[1]:.3f}",
                "cpu_ratio": f"{exact[1] / filtered[1]:.2f}",
                "load": f"{os.getloadavg()[0]:.1f}",
            }
            tqdm.write(str(row))
            yield row


def with_trained_spectrum(normal: Tensor) -> Tensor:
    """A matrix of that shape with the spectrum of a residual of a trained 32-expert model, stretched.

    The largest sigma^2 there is 8 times that at a fifth of the rank and 21 times that at two fifths, as here.
    """
    size = min(normal.shape)
    place = torch.arange(size) / size
    scale = (1 - place) * torch.exp(-1.35 * place**0.3)
    tall = normal if normal.shape[0] >= normal.shape[1] else normal.T
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1))).Q
    made = (torch.linalg.qr(tall).Q * scale) @ turn
    return made if normal.shape[0] >= normal.shape[1] else made.T


def of_model(folder: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each matrix and share of its parameters, of the expert of which filtering captures least."""
    source = Checkpoint(folder)
    dense = build_on_meta(source, False)
    found = find_experts(dense)
    whole = DenseModel(dense, ModuleReader(source, dense), found)
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for layer in tqdm(range(1 if quick else len(found)), desc=folder.name):
        experts = whole.read(layer)
        aligned = barycenter(experts)
        base = split_design(aligned.center, experts)[:2]
        for e in range(experts.num_experts):
            own = split_design(design_matrix(experts, e)[aligned.permutations[e]], experts)[:2]
            for matrix, weight, shared in zip(("gate_up", "down"), own, base, strict=True):
                residual = weight - shared
                energy, (N, K) = spectrum(residual), residual.shape
                for share in (0.25, 0.5):
                    rank = -(-round(share * N * K / (N + K)) // 16) * 16
                    if rank <= min(N, K) // 2:
                        row = {"matrix": f"{folder.name} {matrix}", "entries": "residual", "rows": N, "columns": K}
                        rows.setdefault((matrix, rank), []).append(
                            row | {"rank": rank} | quality(residual, rank, energy)
                        )
    empty = dict.fromkeys(TIMES, "")
    for same in rows.values():
        yield (
            min(same, key=lambda row: float(row["captured"] or 2))
            | {
                "of": len(same),
                "shown": sum(row["captured"] != "" for row in same),
            }
            | empty
        )


def quality(matrix: Tensor, rank: int, energy: Tensor) -> dict[str, Any]:
    """Of one matrix: what filtering captures of what the exact decomposition does; empty where it gave up."""
    filtered = filtered_svd(matrix, rank)
    row: dict[str, Any] = {"of": 1, "shown": int(filtered is not None)}
    if filtered is None:
        return row | {"captured": "", "excess": "", "bound": ""}
    least = float(energy[rank:].sum())
    lost = sum(
        float((rows.double() - u.double().T @ filtered.v.double()).square().sum())
        for rows, u in zip(matrix.split(4096), filtered.u.split(4096, dim=1), strict=True)
    )
    total = float(energy.sum())
    return row | {
        "captured": f"{(total - lost) / (total - least):.7f}",
        "excess": f"{lost / least - 1:.2e}",
        "bound": f"{filtered.bound * total / least:.2e}",
    }


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of the processor, which with one thread is the one to read where others use the machine."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


if __name__ == "__main__":
    main()
