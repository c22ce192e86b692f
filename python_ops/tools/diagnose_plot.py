"""A picture of a diagnosis: spectra beside chance, error against bytes, the experts' cosines before and after."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resmoe_kernels.factored import MATRICES
from resmoe_kernels.python_ops.solvers.byte_budgets import RESIDUALS
from resmoe_kernels.python_ops.tools.diagnose import LayerDiagnosis, model_errors, verdict

# Okabe and Ito's palette, which stays apart without colour vision too.
FORMS = {"low rank": "#0072B2", "block": "#E69F00", "bitmap": "#009E73"}
INTEGERS = {"int8": "s", "int4": "D"}
CURVES = {"weight": "#000000", "residual": "#D55E00", "random": "#999999"}
MOST_MATRICES = 4  # layers whose cosines are drawn, evenly spaced


def check_plot(target: str | os.PathLike[str]) -> None:
    """Raises ValueError before the work starts where a picture could not be written after it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise ValueError(
            'matplotlib: --plot needs it, it is not installed; run: pip install "resmoe_kernels[plot]"'
        ) from error
    path, known = Path(target), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"{path}: a picture's name must end in one of .{', .'.join(known)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder to make {path.name} in; make it first")


def plot(layers: Sequence[LayerDiagnosis], target: str | os.PathLike[str], title: str = "") -> None:
    """Draws layers that ``diagnose`` measured. Raises as ``check_plot`` does."""
    check_plot(target)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = top.subplots(1, 3)
    for matrix, panel in zip(MATRICES, panels, strict=False):
        _spectra(panel, layers, matrix)
    _errors(panels[2], layers)
    _cosines(bottom, layers)
    figure.suptitle(f"{title}: {verdict(layers)[0]}" if title else verdict(layers)[0], fontsize=12)
    figure.savefig(target, dpi=120)


def _spectra(panel: Any, layers: Sequence[LayerDiagnosis], matrix: str) -> None:
    for kind, color in CURVES.items():
        curves = torch.tensor([d.spectra[matrix][kind] for d in layers], dtype=torch.float64)
        share = torch.linspace(0, 1, curves.shape[1]).tolist()
        for curve in curves.tolist():
            panel.plot(share, curve, color=color, linewidth=0.6, alpha=0.35)
        panel.plot(
            share,
            curves.mean(0).tolist(),
            color=color,
            linewidth=1.8,
            label="random matrix" if kind == "random" else kind,
        )
    panel.set_title(f"{matrix}: energy that the leading part of the rank keeps", fontsize=10, loc="left")
    panel.set_xlabel("part of the rank")
    panel.set_ylabel("part of the energy")
    panel.legend(loc="lower right", frameon=False, fontsize=9, title="mean of layers; thin: each layer")
    panel.set(xlim=(0, 1), ylim=(0, 1.02))
    panel.grid(alpha=0.25)


def _errors(panel: Any, layers: Sequence[LayerDiagnosis]) -> None:
    totals = model_errors(layers)
    for residual in RESIDUALS:
        for form, line in ((f"base + {residual}", "-"), (residual, "--")):
            points = [(t.size, t.error) for t in totals if t.form == form]
            if points:
                panel.plot(
                    *zip(*points, strict=True), line, color=FORMS[residual], marker="o", markersize=4, label=form
                )
    for t in totals:
        if t.form in INTEGERS:
            panel.plot([t.size], [t.error], INTEGERS[t.form], color="#CC79A7", label=f"{t.form} of the dense experts")
    panel.set_title("Relative error of the weights against bytes", fontsize=10, loc="left")
    panel.set_xlabel("part of the dense bytes, base and indices counted")
    panel.set_ylabel("relative error")
    panel.set_ylim(0, 1.3 * max(t.error for t in totals) + 1e-3)
    panel.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    panel.grid(alpha=0.25)


def _cosines(figure: Any, layers: Sequence[LayerDiagnosis]) -> None:
    """One matrix a layer: below the diagonal before alignment, above it after."""
    chosen = torch.linspace(0, len(layers) - 1, min(len(layers), MOST_MATRICES)).round().long().tolist()
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    matrices = []
    for i in chosen:
        before, after = (torch.tensor(m).double() for m in (layers[i].cosines_before, layers[i].cosines_after))
        both = before.tril(-1) + after.triu(1)
        matrices.append(both.masked_fill(torch.eye(len(both), dtype=torch.bool), torch.nan))
    largest = max([float(m.nan_to_num().abs().max()) for m in matrices] + [1e-3])
    for panel, i, matrix in zip(panels, chosen, matrices, strict=True):
        image = panel.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        layer = layers[i]
        panel.set_title(
            f"{layer.path}\nmean {layer.cosine_before:.3f} before, {layer.cosine_after:.3f} after", fontsize=9
        )
        panel.set_xticks(range(len(matrix)), layer.measured, fontsize=8)
        panel.set_yticks(range(len(matrix)), layer.measured, fontsize=8)
        panel.set_xlabel("expert", fontsize=8)
    figure.colorbar(image, ax=panels.tolist(), shrink=0.8, label="cosine")
    figure.suptitle("Cosine between experts: below the diagonal before alignment, above it after", fontsize=10)
