"""Drawings of a run: curves, the confusion matrix, precision against recall. Drawn without a display."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from dualtoken_vit.files import atomic_write


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a drawing as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def save_curves(
    history: Sequence[dict[str, Any]],
    panels: dict[str, dict[str, str]],
    score: str,
    best: dict[str, Any],
    path: Path,
) -> None:
    """Metrics against epochs, the `score` of the best epoch marked.

    Args:
        history: Rows with epoch and the columns that are drawn.
        panels: Title of each panel: {column: label}; those in % show shares as such.
        score: The column that decides which epoch is the best.
        best: The row of that epoch.
        path: The PNG.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (title, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        scale = 100 if "%" in title else 1
        for column, label in columns.items():
            style = ".-" if len(epochs) < 30 else "-"
            axes.plot(epochs, [scale * row[column] for row in history], style, label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        if score in columns:
            place = (best["epoch"], scale * best[score])
            shift = dict(xytext=(0, -14), textcoords="offset points", ha="center")
            axes.annotate(f"{best[score]:.1%}", place, **shift)
    save_figure(figure, path)


def save_precision_recall(curves: dict[str, tuple[Sequence[float], Sequence[float]]], title: str, path: Path) -> None:
    """Precision against recall: {label: (recall, precision)}."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (recall, precision) in curves.items():
        axes.plot(recall, precision, label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
    save_figure(figure, path)


def save_confusion_csv(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Confusion matrix (classes, classes) as a table with names."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *class_names])
        writer.writerows([name, *counts] for name, counts in zip(class_names, matrix.tolist(), strict=True))


def save_confusion(matrix: np.ndarray, class_names: Sequence[str], path: Path, percent: bool = False) -> None:
    """Confusion matrix (classes, classes): a row a true class, a column a predicted one, shaded by share of the row.

    With `percent` that share is written into the cells, not the count.
    """
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
            text = f"{100 * share[row, column]:.0f}" if percent else matrix[row, column]
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, path)


def save_growth(results: Sequence[Any], path: Path) -> None:
    """Latency against the pixels of the images, a line a model, from `benchmark.Result`s."""
    cells = list(dict.fromkeys((r.mode, r.batch_size) for r in results))
    figure = Figure(figsize=(6.5 * len(cells), 4.5), layout="constrained")
    for axes, (mode, batch_size) in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        rows = [r for r in results if (r.mode, r.batch_size) == (mode, batch_size)]
        for model in dict.fromkeys(r.model for r in rows):
            points = sorted(
                (math.prod(map(int, r.input_size.split("x"))), r.latency_ms) for r in rows if r.model == model
            )
            axes.plot(*zip(*points, strict=True), ".-", label=model)
        sizes = {math.prod(map(int, r.input_size.split("x"))): r.input_size for r in rows}
        axes.set(xscale="log", yscale="log", title=f"{mode}, batch {batch_size}", ylabel="latency (ms)")
        axes.set_xticks(list(sizes), list(sizes.values()), rotation=45, ha="right")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("size of the images (log scale of their pixels)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
