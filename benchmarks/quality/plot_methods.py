"""Draws what bench_methods.py measured: perplexity against bytes, and against the experts a token uses.

python -m benchmarks.quality.plot_methods FILE.csv [FILE.csv ...] PICTURE.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.tables import read_rows

# Okabe and Ito's palette, which stays apart without colour vision too.
COLORS = {"resmoe": "#0072B2", "mc-smoe": "#E69F00", "moe-i2": "#009E73", "xmoe": "#CC79A7"}


def plot(sources: list[Path], target: Path) -> None:
    """One row of panels per file: for every text perplexity against bytes, and for xmoe against experts per token.

    sources: CSVs of bench_methods.py; target: a picture of any kind that matplotlib writes
    """
    from matplotlib import pyplot as plt

    tables = [read_rows(source) for source in sources]
    texts = [column for column in tables[0][0] if column.startswith("perplexity_")]
    figure, panels = plt.subplots(
        len(tables), len(texts) + 1, figsize=(4.6 * (len(texts) + 1), 3.4 * len(tables)), squeeze=False
    )
    for line, rows in zip(panels, tables, strict=True):
        for panel, text in zip(line, texts, strict=False):
            _scatter(panel, rows, "of_dense", text, ("resmoe", "mc-smoe", "moe-i2"))
            panel.set_xlabel("bytes of the experts, of dense")
        _scatter(line[-1], rows, "experts_per_token", texts[-1], ("xmoe",))
        line[-1].set_xlabel("experts computed per token")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _scatter(panel, rows: list[dict[str, str]], x: str, y: str, methods: tuple[str, ...]) -> None:
    for method in methods:
        for purpose, marker in (("", "o"), ("hybrid", "s"), ("parts", "^")):
            own = [r for r in rows if r["method"] == method and r["row"] == (purpose or r["row"])]
            own = [r for r in own if purpose or r["row"] not in ("hybrid", "parts")]
            label = f"{method}, {purpose}" if purpose else method
            if own:
                places = [float(r[x]) for r in own], [float(r[y]) for r in own]
                panel.scatter(*places, s=22, marker=marker, alpha=0.8, color=COLORS[method], label=label)
    dense = next(float(row[y]) for row in rows if row["method"] == "dense")
    panel.axhline(dense, color="#999999", linewidth=1, linestyle="--", label="dense")
    panel.set_title(f"{rows[0]['model']}, {y.removeprefix('perplexity_')}", fontsize=10, loc="left")
    panel.set_ylabel("perplexity")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    *files, picture = map(Path, sys.argv[1:])
    plot(files, picture)
