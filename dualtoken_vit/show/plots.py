"""Plots of a run: curves, the confusion matrix, precision against recall. They need no display.

A plot or table that cannot be made is a warning on stderr (see `guard`).
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike

from dualtoken_vit.files import atomic_write, counted, guard, printable
from dualtoken_vit.show.text import literal, shorten


def save_figure(figure: Figure | Callable[[], Figure], path: Path, dpi: int = 120) -> None:
    """Write a figure, or the figure that a function returns, as PNG atomically; a failure is a warning on stderr.

    All text is drawn literally: `$` does not start a formula, and each text gets a font that has its characters.
    """
    with guard(path), rc_context({"text.parse_math": False}):
        figure = figure() if callable(figure) else figure
        for text in figure.findobj(Text):
            shown, font = literal(text.get_text())
            text.set(text=shown, parse_math=False)
            text.get_fontproperties().set_file(font)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=dpi)


@contextmanager
def _axes(path: Path, width: float, height: float, columns: int = 1) -> Iterator[Sequence[Axes]]:
    """Axes side by side in a figure of so many inches, which is saved as `path` at the end."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(1, columns, squeeze=False)[0]
    save_figure(figure, path)


def _name(name: str) -> str:
    """A class name for a plot: one line of at most 40 characters."""
    return shorten(literal(printable(name))[0], 40)


def save_curves(
    history: Sequence[dict[str, Any]], panels: dict[str, dict[str, str]], score: str, best: dict[str, Any], path: Path
) -> None:
    """Plot columns of `history`, whose rows have an epoch, and mark the `score` of the `best` row.

    `panels` are {title: {column: label}}; a title with % multiplies the values by 100.
    """
    epochs = [row["epoch"] for row in history]
    with guard(path), _axes(path, 4.5 * len(panels), 3.6, len(panels)) as cells:
        for axes, (title, columns) in zip(cells, panels.items(), strict=True):
            scale = 100 if "%" in title else 1
            for column, label in columns.items():
                style = ".-" if len(epochs) < 30 else "-"
                axes.plot(epochs, [scale * row[column] for row in history], style, label=label)
            axes.set(xlabel="epoch", title=title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # also for one epoch
            axes.margins(x=0.1)  # room for the annotation of the last epoch
            axes.grid(alpha=0.3)
            axes.legend()
            if score in columns:
                place = best["epoch"], scale * best[score]
                axes.annotate(f"{best[score]:.1%}", place, (0, -14), textcoords="offset points", ha="center")


def save_precision_recall(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str, path: Path) -> None:
    """Plot precision against recall: {label: (recall, precision)}, both between 0 and 1."""
    with guard(path), _axes(path, 6.5, 4.5) as (axes,):
        lines = [axes.plot(recall, precision)[0] for recall, precision in curves.values()]
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
        axes.grid(alpha=0.3)
        if lines:  # given explicitly: matplotlib hides a line whose own label starts with "_"
            axes.legend(lines, list(map(_name, curves)), fontsize=8)


def save_reliability(images: np.ndarray, bins: int, ece: float, path: Path) -> None:
    """Plot the accuracy of the images in each bin of the predicted class's probability, and their number.

    `images` (2, N) are these probabilities, and 1 for each prediction that is right.
    """
    with guard(path), _axes(path, 9, 4, 2) as (axes, beside):
        confidence, right = images
        which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        counts = np.bincount(which, minlength=bins)
        accuracy = np.bincount(which, right, bins) / np.maximum(counts, 1)
        places = (np.arange(bins) + 0.5) / bins
        axes.bar(places, accuracy, 1 / bins, edgecolor="white", label="accuracy")
        axes.plot((0, 1), (0, 1), "--", color="0.4", label="well calibrated")
        axes.set(
            xlabel="probability of the predicted class",
            ylabel="share that is right",
            xlim=(0, 1),
            ylim=(0, 1),
            title=f"expected calibration error {ece:.1%}",
        )
        axes.legend(fontsize=8)
        beside.bar(places, counts, 1 / bins, edgecolor="white", color="0.6")
        beside.set(xlabel="probability of the predicted class", ylabel="images", xlim=(0, 1))


def save_confusion_csv(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Write a confusion matrix (classes, classes) as CSV, with the class names in the first row and column."""
    names = list(map(printable, class_names))
    with guard(path), atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *counts] for name, counts in zip(names, matrix.tolist(), strict=True))


def save_confusion(matrix: np.ndarray, class_names: Sequence[str], path: Path, percent: bool = False) -> None:
    """Plot a confusion matrix (classes, classes): rows are true classes, columns predicted ones.

    Cells are shaded by their share of the row and contain the count, or with `percent` that share.
    """
    with guard(path):
        classes = len(class_names)
        ticks = range(0, classes, math.ceil(classes / 60))  # more names are not legible
        names = [_name(class_names[tick]) for tick in ticks]
        side = min(max(2.5, 0.45 * classes), 28.0) + 1 + 0.09 * max(map(len, names))
        with _axes(path, side, side) as (axes,):
            share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
            axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
            axes.set_xticks(ticks, names, rotation=90)
            axes.set_yticks(ticks, names)
            axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(matrix)} of {matrix.sum()} correct")
            if classes <= 30:
                for row, column in zip(*matrix.nonzero(), strict=True):
                    color = "white" if share[row, column] > 0.5 else "black"
                    text = f"{100 * share[row, column]:.0f}" if percent else matrix[row, column]
                    axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)


def save_growth(results: Sequence[Any], path: Path) -> None:
    """Plot latency against image size, a line for each model, from `benchmark.Result`s."""
    key = attrgetter("mode", "precision", "threads", "processes", "batch_size")
    cells = list(dict.fromkeys(map(key, results)))
    with guard(path), _axes(path, 6.5 * len(cells), 4.5, len(cells)) as panels:
        for axes, cell in zip(panels, cells, strict=True):
            rows = [r for r in results if key(r) == cell]
            pixels = {r.input_size: math.prod(map(int, r.input_size.split("x"))) for r in rows}
            for model in dict.fromkeys(r.model for r in rows):
                points = sorted((pixels[r.input_size], r.latency_ms) for r in rows if r.model == model)
                axes.plot(*zip(*points, strict=True), ".-", label=model)
            mode, precision, threads, processes, batch_size = cell
            where = f"{processes} processes of " * (processes > 1) + counted(threads, "thread")
            title = f"{mode}, {precision}, {where}, batch {batch_size}"
            axes.set(xscale="log", yscale="log", title=title, ylabel="latency (ms)")
            axes.set_xticks(list(pixels.values()), list(pixels), rotation=45, ha="right")
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("image size (pixels, log scale)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
