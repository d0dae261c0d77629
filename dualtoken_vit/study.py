"""The paper's comparisons at one equal budget: networks that differ in one thing, trained alike with several seeds.

    dualtoken-vit study token-count --data.root photos

Every run is `dualtoken-vit train` in a process of its own, in a folder of its own, which a second call goes on from.
Studies that share networks share their runs. What counts is the accuracy after the last epoch: none is selected.
"""

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dualtoken_vit import machine
from dualtoken_vit.checkpoint import atomic_write
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.errors import InputError
from dualtoken_vit.plots import save_figure
from dualtoken_vit.recipes import RECIPES, Augment, Classification, Model, Optim, Run, to_dict
from dualtoken_vit.tables import PUBLISHED, Published, counts_of, model_of, print_table
from dualtoken_vit.tasks.base import check_ranges, flatten, quiet
from dualtoken_vit.tasks.fit import LAST, RECIPE, check_resume, stored_recipe

__all__ = ["PRESETS", "STUDIES", "Preset", "Result", "study", "verdict"]

Base = Literal["small", "tiny"]

# name: (the paper's table, its rows; none: all that can be trained)
STUDIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "global-tokens": ("Table 6", ()),
    "token-count": ("Table 7", ()),
    "local-attention": ("Table 8", ()),
    "downsampling": ("Table 9", ()),
    "mlp": ("Table 2", ("in1k-small-mix", "in1k-small")),
    "peers": (
        "Table 2",
        (
            "mobilenetv2_140",
            "mobilevit_xxs",
            "mobilevitv2_050",
            "pvt_v2_b0",
            "in1k-tiny-mix",
            "regnety_008",
            "deit_tiny_patch16_224",
            "mobilevit_xs",
            "xcit_tiny_12_p16_224",
            "lightvit_tiny",
            "in1k-small",
        ),
    ),
}


@dataclass(frozen=True)
class Preset:
    """A budget: the recipe that every network is trained by, and how often."""

    about: str
    recipe: Classification
    base: Base
    """Which DualToken-ViT the ablations change: small as in the paper, or tiny. The peers are what they are."""
    seeds: int
    jobs: int
    """Runs at a time."""


_FOLDER = RECIPES["folder"]
PRESETS = {
    "cpu": Preset(
        "one epoch at 64 pixels: for ten thousand pictures on two cores 30 minutes at most a study",
        replace(
            _FOLDER,
            data=replace(_FOLDER.data, image_size=64, workers=1),
            optim=replace(_FOLDER.optim, epochs=1, warmup_epochs=0.2),
            run=Run(accelerator="cpu"),
        ),
        base="tiny",
        seeds=2,
        jobs=2,
    ),
    "gpu": Preset(
        "30 epochs at 112 pixels with RandAugment, Mixup and CutMix: one GPU",
        replace(
            _FOLDER,
            data=replace(_FOLDER.data, image_size=112, workers=4),
            augment=replace(Augment(), scale=(0.35, 1.0), auto_augment="rand-m9-n2-mstd0.5", mixup=0.2, cutmix=1.0),
            optim=Optim(epochs=30, batch_size=128, warmup_epochs=2),
            run=Run(precision="bf16-mixed", validate_every=5),
        ),
        base="small",
        seeds=3,
        jobs=3,
    ),
}


@dataclass(frozen=True)
class Result:
    """One network of a study."""

    published: Published
    name: str
    """What it is called: as in the paper, or after the smaller network that stands in."""
    model: Model
    top1: tuple[float, ...]
    """After the last epoch, one a seed; a share of 1."""

    @property
    def mean(self) -> float:
        return mean(self.top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return stdev(self.top1) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class _Work:
    """One run: a network with a seed."""

    row: Published
    recipe: Classification
    folder: Path

    def history(self) -> list[dict[str, str]]:
        """Its epochs so far."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def epochs(self) -> int:
        """That are done."""
        rows = self.history()
        return int(rows[-1]["epoch"]) if rows else 0

    @property
    def top1(self) -> float:
        """After the last epoch that is done."""
        return float(self.history()[-1]["val_top1"])

    @property
    def done(self) -> bool:
        return self.epochs == self.recipe.optim.epochs


def networks(name: str, base: Base) -> list[tuple[Published, Model]]:
    """The networks of a study, in the paper's order, with `base` in place of DualToken-ViT-S in an ablation.

    Raises:
        InputError: for a study that does not exist.
    """
    if name not in STUDIES:
        raise InputError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    table, keys = STUDIES[name]
    rows = [row for row in PUBLISHED if row.table == table and row.key and (not keys or row.key in keys)]
    chosen = []
    for row in rows:
        model = model_of(row.key)
        size = base if name != "peers" else "small"
        chosen.append((row, Model(name=model.name.replace("_small", f"_{size}"), args=model.args)))
    return chosen


def _plan(name: str, recipe: Classification, base: Base, seeds: int, out: Path) -> list[_Work]:
    """Every run of a study: all networks with the first seed, then with the next.

    Raises:
        InputError: for a run that is there with another budget.
    """
    works = []
    for seed in range(recipe.run.seed, recipe.run.seed + seeds):
        for row, model in networks(name, base):
            own = replace(
                recipe,
                model=replace(recipe.model, name=model.name, args=model.args),
                run=replace(recipe.run, seed=seed),
            )
            works.append(_Work(row, own, out / "runs" / "-".join((model.name, *model.args)) / f"seed-{seed}"))
    for work in works:
        stored = stored_recipe(work.folder)
        if stored is not None:
            check_resume(stored, work.recipe, work.folder)
    return works


def _begin(work: _Work, threads: int) -> subprocess.Popen:
    """Start a run, or go on with it; what it says goes to train.log."""
    if not (work.folder / RECIPE).exists():
        with atomic_write(work.folder / RECIPE, "w") as file:
            json.dump(to_dict(work.recipe), file, indent=2)
    command = [sys.executable, "-m", "dualtoken_vit.cli", "train", "folder", "--out", str(work.folder), "--resume"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (work.folder / "train.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)


def _end(work: _Work, status: int) -> None:
    """Look whether a run came to its end; what only resuming needs is deleted.

    Raises:
        InputError: where it did not, with its last line.
    """
    log = work.folder / "train.log"
    if status or not work.done:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"]
        reason = lines[-1].removeprefix("dualtoken-vit: error: ")
        raise InputError(f"{work.folder}: {reason}; see {log}; the same command goes on from here")
    (work.folder / LAST).unlink(missing_ok=True)


def _run(works: Sequence[_Work], jobs: int) -> None:
    """Carry out what is not done yet, `jobs` at a time."""
    waiting = [work for work in works if not work.done]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: dict[subprocess.Popen, _Work] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.description}"), console=console, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=sum(work.recipe.optim.epochs for work in waiting))
        before = sum(work.epochs for work in waiting)
        todo = list(waiting)
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    work = todo.pop(0)
                    running[_begin(work, threads)] = work
                for process in [process for process in running if process.poll() is not None]:
                    work = running.pop(process)
                    _end(work, process.returncode)
                    if not console.is_terminal:
                        print(
                            f"{work.folder}: {float(work.history()[-1]['val_top1']):.1%}", file=sys.stderr, flush=True
                        )
                names = ", ".join("/".join(work.folder.parts[-2:]) for work in running.values())
                progress.update(task, completed=sum(work.epochs for work in waiting) - before, description=names)
                time.sleep(0.5)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def pooled(results: Sequence[Result]) -> float | None:
    """Standard deviation within networks over their seeds, all networks together; None with one seed each."""
    squares = [(top1 - result.mean) ** 2 for result in results for top1 in result.top1]
    freedom = len(squares) - len(results)
    return math.sqrt(sum(squares) / freedom) if freedom else None


def verdict(results: Sequence[Result]) -> list[str]:
    """Whether the paper's order holds, in words.

    Two networks differ clearly where their means are more than two standard errors apart: the seeds' standard
    deviation, pooled over all networks, times the root of 1/n + 1/m.
    """
    spread = pooled(results)
    same, clear, reverse, against = [], [], [], []
    for first, left in enumerate(results):
        for right in results[first + 1 :]:
            expected = float(left.published.score) - float(right.published.score)
            found = left.mean - right.mean
            if expected == 0:
                continue
            high, low = (left, right) if expected > 0 else (right, left)
            words = f"{high.name} over {low.name} ({high.mean - low.mean:+.1%})"
            error = spread and spread * math.sqrt(1 / len(left.top1) + 1 / len(right.top1))
            beyond = error is not None and abs(found) > 2 * error
            holds = found * expected > 0
            (same if holds else reverse).append(words)
            if beyond:
                (clear if holds else against).append(words)
    pairs = len(same) + len(reverse)
    best, theirs = max(results, key=lambda r: r.mean), max(results, key=lambda r: float(r.published.score))
    lines = [
        f"Best here: {best.name}, {best.mean:.1%}; in the paper: {theirs.name}, {theirs.published.score} %.",
        f"Of {pairs} pairs of networks {len(same)} come out in the paper's order, {len(reverse)} the other way round.",
    ]
    if spread is None:
        lines.append("One seed: what is chance cannot be told.")
    else:
        lines.append(
            f"Clearly (by more than two standard errors; the seeds' standard deviation is {spread:.2%}): {len(clear)} "
            f"in the paper's order, {len(against)} the other way round."
        )
        lines += [f"Clearly against it: {', '.join(against)}."] * bool(against)
        if clear and not reverse:
            lines.append("The paper's order holds.")
        elif against:
            lines.append("The paper's order does not hold at this budget.")
        else:
            lines.append("This budget does not decide about the paper's order.")
    return lines


def _text(recipe: Classification, base: Base, seeds: int, pictures: tuple[int, int], peers: bool) -> str:
    """The budget in a line."""
    data, optim = recipe.data, recipe.optim
    where = Path(data.root).name or data.dataset
    epochs = f"{optim.epochs} epoch{'s' * (optim.epochs > 1)} of {pictures[0]:,} pictures"
    over = "" if peers or base == "small" else ", over T in place of S"
    return (
        f"{where}, {data.image_size} pixels, {epochs}, {seeds} seed{'s' * (seeds > 1)}, AdamW {optim.lr:g}, "
        f"batch {optim.batch_size}, {pictures[1]:,} validation pictures, last epoch{over}"
    )


def draw(results: Sequence[Result], title: str) -> Figure:
    """Every seed's accuracy and the means, beside what the paper prints, a row a network."""
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(results)), layout="constrained")
    here, paper = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = range(len(results))[::-1]
    for row, result in zip(rows, results, strict=True):
        here.plot([100 * top1 for top1 in result.top1], [row] * len(result.top1), "o", color="tab:blue", alpha=0.4)
        here.plot(100 * result.mean, row, "|", color="tab:blue", markersize=16, markeredgewidth=2.5)
        paper.plot(float(result.published.score), row, "o", color="tab:orange")
    here.set_yticks(rows, [result.name for result in results])
    here.set(xlabel="top-1 (%): each seed, and the mean", title="here")
    paper.set(xlabel="top-1 (%)", title="paper, ImageNet-1k")
    for axes in (here, paper):
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.6, len(results) - 0.4)
    figure.suptitle(title, fontsize=10)
    return figure


def _rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    for result in results:
        counts = counts_of("", result.model)
        spread = "" if result.spread is None else f"{100 * result.spread:.2f}"
        seeds = " ".join(f"{100 * top1:.1f}" for top1 in result.top1)
        sizes = (f"{counts.params / 1e6:.2f}", f"{counts.macs / 1e9:.3f}")
        found = (f"{100 * result.mean:.2f}", spread, seeds)
        yield (result.name, result.model.name, *sizes, *found, result.published.score)


def study(name: str, recipe: Classification, base: Base, seeds: int, jobs: int, out: Path, markdown: bool) -> None:
    """Train the networks of a study, with several seeds, at one budget; print and keep what comes of it.

    Args:
        name: of `STUDIES`
        recipe: the budget and the data; its network is replaced
        base: the DualToken-ViT that an ablation changes
        seeds: runs of each network
        jobs: runs at a time
        out: folder: runs/NETWORK/seed-N, study-NAME.json, .md and .png; the same call goes on where it was stopped
        markdown: print the table as Markdown

    Raises:
        InputError: for whatever is wrong with the study, its budget or data, or a run that fails.
    """
    quiet()
    if recipe.model.name != _FOLDER.model.name or recipe.model.args:
        raise InputError("--model.name, --model.args: the study chooses the networks; leave them out")
    for key, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise InputError(f"--{key} {value}: must be at least 1")
    check_ranges(recipe)
    works = _plan(name, recipe, base, seeds, out)
    pictures = tuple(len(dataset) for dataset in build_datasets(recipe.data, recipe.model.in_chans))
    text = _text(recipe, base, seeds, pictures, name == "peers")
    table, _ = STUDIES[name]
    print(f"{name} ({table}): {text}", flush=True)
    _run(works, jobs)

    top1: dict[str, list[float]] = {}
    for work in works:
        top1.setdefault(work.row.key, []).append(work.top1)
    results = [
        Result(row, row.network if name == "peers" else row.network.replace("ViT-S", f"ViT-{base[0].upper()}"), *rest)
        for row, *rest in ((row, model, tuple(top1[row.key])) for row, model in networks(name, base))
    ]
    lines = verdict(results)
    device = torch.accelerator.current_accelerator(check_available=True) if recipe.run.accelerator != "cpu" else None
    record: dict[str, Any] = {
        "study": name,
        "table": table,
        "budget": {"text": text, "base": base, "seeds": seeds} | flatten(recipe),
        "networks": [
            {"key": r.published.key, "network": r.name, "model": asdict(r.model)}
            | {"top1": r.top1, "mean": round(r.mean, 6), "spread": r.spread, "published": r.published.score}
            for r in results
        ],
        "verdict": lines,
        "machine": machine.describe(device or torch.device("cpu")),
    }
    stem = out / f"study-{name}"
    with atomic_write(stem.with_suffix(".json"), "w") as file:
        json.dump(record, file, indent=2)
    save_figure(draw(results, f"{name}: {text}"), stem.with_suffix(".png"), dpi=150)
    columns = ("<network", "<model", "params M", "MACs G", "top-1 %", "spread", "seeds", "published %")
    print_table(columns, [list(_rows(results))], markdown)
    print("\n".join(lines))
    print(f"all in {out}: {stem.name}.json, {stem.name}.png, runs/")
