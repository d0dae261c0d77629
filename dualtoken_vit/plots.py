"""Drawings of a run: curves and the confusion matrix. Drawn without a display."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dualtoken_vit.checkpoint import atomic_write


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def save_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy against epochs, from rows with epoch, train_loss, val_loss, val_top1, val_top5."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, keys, title in (
        (loss, ("train_loss", "val_loss"), "loss"),
        (accuracy, ("val_top1", "val_top5"), "accuracy (%)"),
    ):
        scale = 100 if axes is accuracy else 1
        for key in keys:
            label = key.replace("_", " ").replace("val top", "top-").replace("val", "validation")
            axes.plot(epochs, [scale * row[key] for row in history], ".-" if len(epochs) < 30 else "-", label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    best = max(history, key=lambda row: row["val_top1"])
    accuracy.annotate(
        f"{best['val_top1']:.1%}",
        (best["epoch"], 100 * best["val_top1"]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
    )
    _save(figure, path)


def save_confusion(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Confusion matrix (classes, classes): a row a true class, a column a predicted one, shaded by share of the row."""
    classes = len(class_names)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.45 * classes + 2), 30.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    step = math.ceil(classes / 60)  # of a thousand names only some can be read
    ticks = range(0, classes, step)
    names = [class_names[tick] for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(matrix)} of {matrix.sum()} right")
    if classes <= 30:
        for row, column in zip(*matrix.nonzero(), strict=True):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)
