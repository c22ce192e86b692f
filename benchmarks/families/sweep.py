"""Every Mixture-of-Experts family of the installed transformers, compressed without loss: is it the same model?

    python -m benchmarks.families.sweep [FAMILY ...] [--csv benchmarks/results/families.csv]

For each family a tiny random model is saved as a dense folder, and then
    disk     compressed at retain 1 and loaded, by every class that loads the dense folder whole
    memory   swapped in memory at retain 1
    again    the first is saved once more and loaded
and the outputs of each are held against those of the dense model. ``--csv`` writes the rows, and beside them, as
Markdown, the table; with names of families only their rows are printed. About a second a family.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import resmoe_kernels as rk
from benchmarks.families import tiny_models
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer

# At full rank nothing is left out: what differs is float32 rounding, through three layers, relative to the outputs.
EXACT = 1e-5
STATUSES = ("served", "refused", "wrong", "failed", "not built")


@dataclass(frozen=True)
class Row:
    """What became of a family.

    status: ``served`` in all three ways; ``refused`` with a sentence when it was to be compressed;
        ``wrong``: other outputs than the dense model's;
        ``failed``: any other exception, of a load too; ``not built``: there is no dense model to begin with
    classes: those that loaded the compressed folder;  layers: experts modules compressed
    disk, memory, again: largest difference of an output, relative to the largest output
    """

    family: str
    status: str
    transformers: str = transformers.__version__
    classes: str = ""
    layers: int = 0
    disk: str = ""
    memory: str = ""
    again: str = ""
    reason: str = ""


def sweep(family: str, folder: Path) -> Row:
    """One family, through all three ways; ``folder`` is where its models are written."""
    try:
        config = tiny_models.tiny_config(family)
        kinds = tiny_models.classes_for(type(config))
        model = tiny_models.build(config, kinds[0])
        model.save_pretrained(folder / "dense")
        expected = tiny_models.outputs(kinds[0].from_pretrained(folder / "dense").eval())
    except Exception as error:  # of any type: a model's own code and our sizes for it
        return Row(family, "not built", reason=_said(error))
    name = kinds[0].__name__
    dense, out = folder / "dense", folder / "out"
    done: dict[str, str] = {}
    layers = 0
    classes: list[str] = []
    step = "compress"
    try:
        rk.compress(dense, out, retain=1.0, progress=False)
        for kind in kinds:
            plain, info = kind.from_pretrained(dense, output_loading_info=True)
            if info["missing_keys"] or info["mismatched_keys"]:
                continue  # this class finds no whole model in the dense folder either
            step = f"disk as {kind.__name__}"
            loaded = kind.from_pretrained(out).eval()
            error = _difference(loaded, tiny_models.outputs(plain.eval()))
            classes.append(kind.__name__)
            if kind is kinds[0]:
                done["disk"], first = f"{error:.1e}", loaded
                layers = sum(isinstance(m, FactoredExpertsLayer) for m in loaded.modules())
            if not error < EXACT:
                off = f"{step}: outputs are off"
                return Row(family, "wrong", classes=kind.__name__, layers=layers, **done, reason=off)
        step = "again"
        first.save_pretrained(folder / "again")
        error = _difference(kinds[0].from_pretrained(folder / "again").eval(), expected)
        done["again"] = f"{error:.1e}"
        if error < EXACT:
            step = "memory"
            rk.swap_experts(model, retain=1.0, progress=False)
            error = _difference(model, expected)
            done["memory"] = f"{error:.1e}"
        if not error < EXACT:
            return Row(family, "wrong", classes=name, layers=layers, **done, reason=f"{step}: outputs are off")
    except Exception as error:  # of any type, and that is what the row says
        refused = step == "compress" and isinstance(error, ValueError) and _is_ours(error)
        said = f"{step}: {_said(error, folder)}".removeprefix("compress: ")
        return Row(family, "refused" if refused else "failed", classes=name, layers=layers, **done, reason=said)
    return Row(family, "served", classes=" ".join(classes), layers=layers, **done)


def _difference(model: PreTrainedModel, expected: torch.Tensor) -> float:
    if not any(isinstance(m, FactoredExpertsLayer) for m in model.modules()):
        raise RuntimeError("holds no factored layer")
    return float((tiny_models.outputs(model) - expected).abs().max() / expected.abs().max())


def _is_ours(error: ValueError) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("resmoe_kernels.")


def _said(error: Exception, folder: Path | None = None) -> str:
    text = " ".join(str(error).split())
    if folder is not None:
        text = text.replace(f"{folder}/", "")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def run(families: Iterable[str]) -> list[Row]:
    """The rows of these families, printed as they are made."""
    tiny_models.silence()
    warnings.filterwarnings("ignore")
    rows = []
    for family in families:
        folder = Path(tempfile.mkdtemp(prefix="resmoe-sweep-"))
        try:
            rows.append(sweep(family, folder))
        finally:
            shutil.rmtree(folder)
        print(*(f"{value}" for value in asdict(rows[-1]).values() if value), sep="  ", flush=True)
    return rows


# ---- the table


def write(rows: list[Row], path: Path) -> None:
    """The rows as CSV, and the table in a Markdown file beside it."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    path.with_suffix(".md").write_text(table(rows))


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row(**{**row, "layers": int(row["layers"])}) for row in csv.DictReader(file)]


def counts(rows: list[Row]) -> str:
    """One line: how many families there are, and what became of them."""
    number = Counter(row.status for row in rows)
    said = ", ".join(f"{number[status]} {status}" for status in STATUSES if number[status])
    return f"{len(rows)} families of transformers {rows[0].transformers}: {said}."


def table(rows: list[Row]) -> str:
    """Markdown: the counts, the families served in one paragraph, every other in a row with its reason."""
    served = ", ".join(f"`{row.family}`" for row in rows if row.status == "served")
    lines = ["# Families", "", counts(rows), "", f"Served: {served}.", ""]
    others = [row for row in rows if row.status != "served"]
    if others:
        lines += ["| family | | reason |", "|---|---|---|"]
        lines += [f"| `{row.family}` | {row.status} | {row.reason.replace('|', ',')} |" for row in others]
        lines += [""]
    lines += ["Made by `python -m benchmarks.families.sweep --csv benchmarks/results/families.csv`.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all by default")
    parser.add_argument("--csv", type=Path, help="where to write the rows of all families")
    arguments = parser.parse_args()
    if arguments.families and arguments.csv:
        sys.exit("--csv is for the sweep of all families: leave out their names")
    known = tiny_models.families()
    if unknown := [name for name in arguments.families if name not in known]:
        sys.exit(f"{unknown[0]}: no Mixture-of-Experts family of transformers {transformers.__version__}")
    rows = run(arguments.families or known)
    print(counts(rows))
    if arguments.csv:
        write(rows, arguments.csv)


if __name__ == "__main__":
    main()
