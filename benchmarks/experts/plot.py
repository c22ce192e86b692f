"""Draws what bench_experts.py measured: the speed-up of every form over the fastest peer, its ideal as a marker.

python -m benchmarks.experts.plot FILE.csv FILE.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

# Okabe and Ito's palette, which stays apart without colour vision too.
COLORS = {"dense": "#999999", "lowrank": "#0072B2", "block": "#E69F00", "bitmap": "#009E73"}
SHORTER = {"transformers ": "", "kt-kernel": "kt"}


def plot(source: Path, target: Path) -> None:
    """One panel per shape: for each number of tokens a bar per form, and a line where the fastest peer is.

    source: a CSV of bench_experts.py; target: a picture of any kind that matplotlib writes
    Raises ValueError if the CSV holds no speed-ups, as of a run without peers.
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    with source.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] != "peer"]
    if not rows or any(row["speedup"] == "" for row in rows):
        raise ValueError(f"{source}: holds no speed-ups over a peer; run bench_experts.py with --peers auto")
    shapes, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "form"))

    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(8 * columns, 3.4 * lines + 0.9), squeeze=False)
    for panel in panels.flat[len(shapes) :]:
        panel.remove()
    width = 0.84 / len(forms)
    for panel, shape in zip(panels.flat, shapes, strict=False):
        own = [row for row in rows if row["shape"] == shape]
        peers = {row["tokens"]: row["fastest_peer"] for row in own}
        top = 1.12 * max(1.0, *(float(row[key]) for row in own for key in ("speedup", "ideal_speedup")))
        for row in own:
            x = list(peers).index(row["tokens"]) + (forms.index(row["form"]) - (len(forms) - 1) / 2) * width
            speedup, ideal = float(row["speedup"]), float(row["ideal_speedup"])
            panel.bar(x, speedup, width * 0.92, color=COLORS[row["form"]])
            panel.plot([x - width * 0.46, x + width * 0.46], [ideal, ideal], color="black", linewidth=1.5)
            foot = ideal if 0 <= ideal - speedup < 0.06 * top else speedup  # a number is not struck through
            panel.annotate(f"{speedup:.2f}", (x, foot), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        panel.axhline(1, color="#D55E00", linewidth=1, linestyle="--", zorder=0)
        labels = [f"T = {tokens}\n{shorter(peer)}" for tokens, peer in peers.items()]
        panel.set_xticks(range(len(peers)), labels, fontsize=8)
        panel.set_title(shape, fontsize=10, loc="left")
        panel.set_ylabel("speed-up", fontsize=8)
        panel.tick_params(axis="y", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(0, top)
    keys = [Patch(color=COLORS[form], label=label(form, rows)) for form in forms]
    keys.append(Line2D([], [], color="black", linewidth=1.5, label="ideal"))
    keys.append(Line2D([], [], color="#D55E00", linestyle="--", linewidth=1, label="fastest peer (below T)"))
    where = f"{rows[0]['threads']} threads" if rows[0]["threads"] else rows[0]["isa"]
    figure.suptitle(f"Expert layer, bfloat16, {where}: speed-up over the fastest dense layer")
    figure.legend(handles=keys, ncols=len(keys), loc="lower center", fontsize=8, frameon=False, columnspacing=1.2)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def shorter(peer: str) -> str:
    for long, short in SHORTER.items():
        peer = peer.replace(long, short)
    return peer


def label(form: str, rows: list[dict]) -> str:
    retain = float(next(row["retain"] for row in rows if row["form"] == form))
    return "dense, our kernels" if form == "dense" else f"{form} at {retain:.0%}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
