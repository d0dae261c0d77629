"""The paper's comparisons at one equal budget: networks that differ in one thing, trained alike with several seeds.

    dualtoken-vit study token-count --data.root photos

Every run is `dualtoken-vit train` in a process of its own, in a folder of its own, which a second call goes on from.
Studies that share networks share their runs. What counts is the accuracy after the last epoch: none is selected.

At fewer pixels than the paper's 224 the grid of X_ga is coarser than 7x7 (4x4 at 112, 2x2 at 64) and resized to the
global tokens, and most of a 7x7 window lies outside of the last maps: other networks than the paper compares, in part.
"""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from textwrap import wrap
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import tukey_hsd

from dualtoken_vit import machine
from dualtoken_vit.data.classification import Images, build_datasets
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.paper.tables import PUBLISHED, Published, bare, model_of
from dualtoken_vit.recipes import RECIPES, Classification, Model, Run, to_dict
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure
from dualtoken_vit.tasks.base import check_ranges, flatten, quiet
from dualtoken_vit.tasks.networks import create_model
from dualtoken_vit.tasks.optim import build_optimizer
from dualtoken_vit.tasks.trainer import FREE_ON_RESUME, LAST, RECIPE, check_resume, stored_recipe

__all__ = ["PRESETS", "STUDIES", "Preset", "Result", "study", "verdict"]

Base = Literal["small", "tiny"]

MACHINE = "machine.json"
CHANCE = 0.05  # a difference is clear if chance alone would make one of any two networks in fewer studies than this

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
        "one epoch at 64 pixels: for ten thousand images on two cores 30 minutes at most a study",
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
        "20 epochs at 112 pixels, three seeds: one GPU",
        replace(
            _FOLDER,
            data=replace(_FOLDER.data, image_size=112, workers=4),
            optim=replace(_FOLDER.optim, epochs=20, batch_size=64, warmup_epochs=1),
            run=Run(precision="bf16-mixed", validate_every=5),
        ),
        base="small",
        seeds=3,
        jobs=4,
    ),
}


@dataclass(frozen=True)
class Result:
    """One network of a study."""

    published: Published
    name: str
    """What it is called: as in the paper, or after the smaller network that stands in."""
    model: Model
    counts: Counts
    """As it was trained: of the budget's images and classes."""
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
    def begun(self) -> bool:
        """Whether there is something to go on from."""
        return any((self.folder / name).exists() for name in (LAST, "metrics.csv"))

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def done(self) -> bool:
        return self.epochs == self.recipe.optim.epochs


def networks(name: str, base: Base) -> list[tuple[Published, Model]]:
    """The networks of a study, in the paper's order, with `base` in place of DualToken-ViT-S in an ablation."""
    table, keys = STUDIES[name]
    size = "small" if name == "peers" else base
    rows = [row for row in PUBLISHED if row.table == table and row.key and (not keys or row.key in keys)]
    models = [bare(model_of(row.key)) for row in rows]
    return [
        (row, replace(model, name=model.name.replace("_small", f"_{size}")))
        for row, model in zip(rows, models, strict=True)
    ]


def _plan(name: str, recipe: Classification, base: Base, seeds: int, out: Path) -> list[_Work]:
    """Every run of a study: all networks with the first seed, then with the next.

    Raises:
        InputError: for a run that has begun with another budget.
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
        stored = stored_recipe(work.folder) if work.begun else None
        if stored is None:
            continue
        try:
            check_resume(stored, work.recipe, work.folder)
        except InputError as error:
            reason = str(error).partition(": a resumed run")[0]
            raise InputError(f"{reason}: a study is of one budget; leave it out, or give another --out") from error
    return works


def _counts(name: str, recipe: Classification, base: Base, classes: int) -> dict[str, Counts]:
    """Build every network once, so that none is refused after hours of others, and count it; by key."""
    found, size = {}, recipe.data.image_size
    for row, model in networks(name, base):
        network, _ = create_model(replace(recipe.model, name=model.name, args=model.args), classes, size)
        build_optimizer(network, recipe.optim)
        found[row.key] = count(network, (recipe.model.in_chans, size, size))
    return found


def _remember(data: dict[str, Any], path: Path) -> None:
    """Note what images the runs of a folder are trained on.

    Raises:
        InputError: where they are others.
    """
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != data:
        raise InputError(f"{path.parent} has runs on other images, as {path.name} says; give another --out")
    with atomic_write(path, "w") as file:
        json.dump(data, file, indent=2)


def _facts(train: Images, val: Images, root: str) -> dict[str, Any]:
    """What tells a dataset from another: how many images of which classes, and their names."""
    names = [str(path).removeprefix(root) for data in (train, val) for path in getattr(data, "paths", ())]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"training": len(train), "validation": len(val), "classes": list(train.class_names), "names": digest}


def _begin(work: _Work, threads: int) -> subprocess.Popen:
    """Start a run, or go on with it; what it says goes to train.log."""
    with atomic_write(work.folder / RECIPE, "w") as file:  # also of a run that goes on: its data may have moved
        json.dump(to_dict(work.recipe), file, indent=2)
    device = torch.accelerator.current_accelerator(check_available=True)
    on = device if device and work.recipe.run.accelerator != "cpu" else torch.device("cpu")
    with atomic_write(work.folder / MACHINE, "w") as file:
        json.dump(machine.describe(on, threads), file, indent=2)
    command = [sys.executable, "-m", "dualtoken_vit.cli", "train", "folder", "--out", str(work.folder), "--resume"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with work.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)


def _end(work: _Work, status: int) -> str:
    """What went wrong with a run, if anything; of one that is done, what only resuming needs is deleted."""
    if status < 0:
        return f"{work.folder}: stopped by {signal.Signals(-status).name}"
    if status or not work.done:
        lines = work.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"]
        return f"{work.folder}: {lines[-1].removeprefix('dualtoken-vit: error: ')}; see {work.log}"
    (work.folder / LAST).unlink(missing_ok=True)
    return ""


def _run(works: Sequence[_Work], jobs: int) -> None:
    """Carry out what is not done yet, `jobs` at a time.

    Raises:
        InputError: after the last one, where runs failed.
    """
    todo = [work for work in works if not work.done]
    if not todo:
        return
    waiting, failed = list(todo), []
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, machine.cores() // jobs)
    running: dict[subprocess.Popen, _Work] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.description}"), console=console, speed_estimate_period=3600) as progress:
        before = sum(work.epochs for work in waiting)
        task = progress.add_task("", total=sum(work.recipe.optim.epochs for work in waiting) - before)
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    work = todo.pop(0)
                    running[_begin(work, threads)] = work
                for process in [process for process in running if process.poll() is not None]:
                    work = running.pop(process)
                    problem = _end(work, process.returncode)
                    failed += [problem] * bool(problem)
                    console.print(problem or f"{work.folder}: {work.top1:.1%}", markup=False, soft_wrap=True)
                names = ", ".join("/".join(work.folder.parts[-2:]) for work in running.values())
                progress.update(task, completed=sum(work.epochs for work in waiting) - before, description=names)
                time.sleep(0.5)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InputError(f"{failed[0]}{more}; mend that, and the same command goes on from here")


def _stop(*_: Any) -> NoReturn:
    raise SystemExit("stopped; the same command goes on from here")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Inside, no other study works in the folder; a polite kill ends this one with the runs that it has started.

    Raises:
        InputError: where another one does.
    """
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another study works in {out}; wait for it, or give another --out") from error
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        lock.release()


def verdict(results: Sequence[Result]) -> list[str]:
    """Whether the paper's order holds, in words.

    Two networks differ clearly where Tukey's test of all pairs says so: their difference against the spread of the
    seeds within networks, which it takes to be the same for all of them.
    """
    best, theirs = max(results, key=lambda r: r.mean), max(results, key=lambda r: float(r.published.score))
    several = min(len(result.top1) for result in results) > 1
    with np.errstate(divide="ignore", invalid="ignore"):  # where all seeds agree to the last digit: nan
        chance = tukey_hsd(*(result.top1 for result in results)).pvalue if several else None
    right, wrong, clear, against = 0, 0, [], []
    for i, j in combinations(range(len(results)), 2):
        low, high = sorted((i, j), key=lambda k: float(results[k].published.score))
        found = results[high].mean - results[low].mean
        if results[low].published.score == results[high].published.score or found == 0:
            continue  # no order there, or none here
        right, wrong = right + (found > 0), wrong + (found < 0)
        if chance is not None and chance[i, j] < CHANCE:
            better, worse = (high, low) if found > 0 else (low, high)
            words = f"{results[better].name} over {results[worse].name} by {100 * abs(found):.1f}"
            (clear if found > 0 else against).append(words)
    lines = [
        f"Best here: {best.name}, {100 * best.mean:.1f} %; in the paper: {theirs.name}, {theirs.published.score} %.",
        f"Of {right + wrong} pairs of networks {right} come out in the paper's order, {wrong} the other way round.",
    ]
    if chance is None:
        return [*lines, "One seed: what is chance cannot be told."]
    lines.append(
        f"Clear of the seeds' chance (Tukey's test, {100 * CHANCE:.0f} %): {len(clear)} in the paper's order, "
        f"{len(against)} the other way round."
    )
    lines += [f"As in the paper: {', '.join(clear)}."] * bool(clear)
    lines += [f"The other way round: {', '.join(against)}."] * bool(against)
    if against:
        lines.append("The paper's order does not hold at this budget.")
    elif clear:
        lines.append("What is clear at this budget is as in the paper.")
    else:
        lines.append("This budget does not decide about the paper's order.")
    return lines


def _text(recipe: Classification, base: Base | None, seeds: int, data: dict[str, Any]) -> str:
    """The budget in a line."""
    optim = recipe.optim
    where = Path(recipe.data.root).resolve().name if recipe.data.root else recipe.data.dataset
    epochs = f"{optim.epochs} epoch{'s' * (optim.epochs > 1)} of {data['training']:,} images"
    over = ", over T in place of S" if base == "tiny" else ""
    return (
        f"{where}, {recipe.data.image_size} pixels, {epochs}, {seeds} seed{'s' * (seeds > 1)}, {optim.optimizer} "
        f"{optim.lr:g}, batch {optim.batch_size}, {data['validation']:,} validation images, last epoch{over}"
    )


def draw(results: Sequence[Result], title: str) -> Figure:
    """Every seed's accuracy and the means, beside what the paper prints, a row a network."""
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(results)), layout="constrained")
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
    figure.suptitle("\n".join(wrap(title, 110)), fontsize=9)
    return figure


def _cells(result: Result) -> tuple[str, ...]:
    spread = "" if result.spread is None else f"{100 * result.spread:.2f}"
    seeds = " ".join(f"{100 * top1:.1f}" for top1 in result.top1)
    sizes = (f"{result.counts.params / 1e6:.2f}", f"{result.counts.macs / 1e9:.3f}")
    model = " ".join((result.model.name, *result.model.args))
    return (result.name, model, *sizes, f"{100 * result.mean:.2f}", spread, seeds, result.published.score)


def _check_result(path: Path, budget: dict[str, Any]) -> None:
    """Refuse to put a study in the place of one with another budget, or with more seeds.

    Raises:
        InputError: names the first field that differs.
    """
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["budget"]
    for key, value in budget.items():
        differs = value < before[key] if key == "seeds" else value != before[key]
        if differs and key not in ("text", *FREE_ON_RESUME):
            raise InputError(f"{path} is of {key} {before[key]}, not {value}; give another --out")


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
    for key in ("name", "args", "checkpoint", "pretrained"):
        if getattr(recipe.model, key) != getattr(_FOLDER.model, key):
            raise InputError(f"--model.{key}: a study trains networks of its own, from scratch; leave it out")
    for key, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise InputError(f"--{key} {value}: must be at least 1")
    check_ranges(recipe)
    works = _plan(name, recipe, base, seeds, out)
    data = _facts(*build_datasets(recipe.data, recipe.model.in_chans), recipe.data.root)
    counts = _counts(name, recipe, base, len(data["classes"]))
    table, _ = STUDIES[name]
    changed = None if name == "peers" else base
    text = _text(recipe, changed, seeds, data)
    settings = json.loads(json.dumps(flatten(recipe))) | {"data.root": Path(recipe.data.root).name}
    budget = {"text": text, "base": changed or "small", "seeds": seeds} | settings
    stem = out / f"study-{name}"
    _check_result(stem.with_suffix(".json"), budget)
    print(f"{name} ({table}): {text}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _remember(data, out / "runs" / "data.json")
        _run(works, jobs)

    top1: dict[str, list[float]] = {}
    machines: list[dict[str, str]] = []
    for work in works:
        top1.setdefault(work.row.key, []).append(work.top1)
        found = json.loads((work.folder / MACHINE).read_text(encoding="utf-8"))
        machines += [found] * (found not in machines)
    results = []
    for row, model in networks(name, base):
        called = row.network.replace("ViT-S", "ViT-T") if changed == "tiny" else row.network
        results.append(Result(row, called, model, counts[row.key], tuple(top1[row.key])))
    lines = verdict(results)
    record: dict[str, Any] = {
        "study": name,
        "table": table,
        "budget": budget,
        "networks": [
            {"key": r.published.key, "network": r.name, "model": asdict(r.model), "counts": asdict(r.counts)}
            | {"top1": r.top1, "mean": round(r.mean, 6), "spread": r.spread, "published": r.published.score}
            for r in results
        ],
        "verdict": lines,
        "machines": machines,
    }
    columns = ("<network", "<model", "params M", "MACs G", "top-1 %", "spread", "seeds", "published %")
    cells = [[_cells(result) for result in results]]
    with atomic_write(stem.with_suffix(".json"), "w") as file:
        json.dump(record, file, indent=2)
    with atomic_write(stem.with_suffix(".md"), "w") as file:
        file.write("\n\n".join([f"# {name} ({table})", text, table_text(columns, cells, True), *lines, ""]))
    save_figure(draw(results, f"{name}: {text}"), stem.with_suffix(".png"), dpi=150)
    print(table_text(columns, cells, markdown), *lines, sep="\n")
    print(f"parameters and multiply-accumulates of the networks as trained here; all in {out}: {stem.name}.*, runs/")
