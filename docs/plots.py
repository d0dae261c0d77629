"""Draws the plots of README and site from the measurements in results/: `python docs/plots.py`."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
OURS, PEER, PAPER = "#bc4c00", "#0969da", "#8250df"
RUNS = {  # folder, column of metrics.csv: title
    ("tin190", "val_top1"): "The weights, T (mix), first part\ntop-1",
    ("tin190-small", "val_top1"): "The weights, S (mix), first part\ntop-1",
    ("imagenette112", "val_top1"): "Imagenette, T\ntop-1",
    ("imagenette112-mix", "val_top1"): "Imagenette, T (mix)\ntop-1",
    ("bccd", "val_box_AP50"): "BCCD, RetinaNet\nbox AP50",
    ("nuclei", "val_mask_AP"): "Nuclei, Mask R-CNN\nmask AP",
    ("camvid", "val_miou"): "CamVid, DeepLabv3\nmIoU",
}


def studies() -> list[dict[str, Any]]:
    """All results of `dualtoken-vit study` in results/, in the order of the paper's tables."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("results/study/study-*.json")]
    return sorted(found, key=lambda study: (study["table"], study["study"]))


def points() -> list[tuple[str, float, list[float]]]:
    """(network, latency in ms, top-1 of each seed in percent) of the study of peers with an equal search."""
    folder = ROOT / "results/study-equal"
    peers, speed = (json.loads((folder / f"{name}.json").read_text()) for name in ("study-peers", "latency"))
    latency = {one["model"]: one["latency_ms"] for one in speed["results"]}
    return [
        (one["network"], latency[one["model"]["name"]], [100 * top1 for top1 in one["top1"]])
        for one in peers["networks"]
    ]


def accuracy_against_latency() -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for network, ms, top1 in points():
        colour, spread = OURS if "DualToken" in network else PEER, stdev(top1) if len(top1) > 1 else 0
        axes.errorbar(ms, mean(top1), spread, fmt="o", color=colour, capsize=3)
        place = dict(xytext=(0, -14), textcoords="offset points", ha="center", fontsize=9)
        axes.annotate(network, (ms, mean(top1) - spread), color=colour, **place)  # below its error bar
    axes.set(
        xlabel="latency at 224x224 pixels, batch 1, float32, PyTorch on one CPU core (ms)",
        ylabel="top-1 (%)",
        title="Imagenette at 96 pixels: 5 epochs, the same recipe and search of the learning rate for all",
    )
    axes.margins(x=0.15, y=0.12)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    return figure


def paper_tables() -> Figure:
    """The comparisons of the paper with error bars, and the paper's accuracies beside them."""
    found = studies()
    figure = Figure(figsize=(10, 13), layout="constrained")
    sizes = [len(study["networks"]) + 1.5 for study in found]
    for (left, right), study in zip(
        figure.subplots(len(found), 2, width_ratios=(3, 1), height_ratios=sizes), found, strict=True
    ):
        names = [one["network"] for one in study["networks"]]
        means = [100 * one["mean"] for one in study["networks"]]
        left.errorbar(
            means, names, xerr=[100 * one["spread"] for one in study["networks"]], fmt="o", capsize=3, color=PEER
        )
        right.plot([float(one["published"]) for one in study["networks"]], names, "D", color=PAPER)
        right.set_yticklabels([])
        left.set_title(f"{study['table']}: {study['study']}", fontsize=10, loc="left")
        right.set_title("paper, ImageNet-1k", fontsize=10, loc="left")
        for axes in (left, right):
            axes.invert_yaxis()
            axes.margins(y=0.8 / len(names))
            axes.grid(alpha=0.3)
    left.set_xlabel("top-1 (%), Imagenette at 64 pixels, one epoch: mean and standard deviation of two seeds")
    right.set_xlabel("top-1 (%)")
    return figure


def learning_curves() -> Figure:
    figure = Figure(figsize=(17.5, 2.9), layout="constrained")
    for axes, ((folder, column), title) in zip(figure.subplots(1, len(RUNS)), RUNS.items(), strict=True):
        with open(ROOT / "results" / folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row[column]]
        axes.plot([int(row["epoch"]) for row in rows], [100 * float(row[column]) for row in rows], ".-", color=PEER)
        axes.set_title(f"{title} (%)", fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    return figure


FIGURES = {
    "accuracy-latency": accuracy_against_latency,
    "paper-tables": paper_tables,
    "learning-curves": learning_curves,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        draw().savefig(ROOT / "docs/images" / f"{name}.png", dpi=110, metadata={"Software": None})
