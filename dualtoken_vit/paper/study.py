"""The paper's comparisons at one equal budget: networks that differ in one part, trained alike with several seeds.

    dualtoken-vit study token-count --data.root images

Each run is one `dualtoken-vit train` in its own process and folder. Repeating the command resumes the study. Studies
that share networks share their runs. Networks are compared by their accuracy after the last epoch, so none is selected
on the validation images.

Below the paper's 224 pixels the grid of X_ga is smaller than 7x7 (4x4 at 112, 2x2 at 64) and is resized to the global
tokens, and the last feature maps are smaller than a 7x7 window. Such runs compare the paper's networks only in part.
"""

import asyncio
import csv
import hashlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dualtoken_vit import machine
from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.data.classification import Images, build_datasets
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, counted, relative, write_json
from dualtoken_vit.paper.comparison import Result, chance, draw, label, table_of, verdict
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.paper.tables import PUBLISHED, Published, bare, model_of
from dualtoken_vit.recipes import (
    Classification,
    ClassificationAugment,
    ClassificationData,
    Model,
    Optim,
    Run,
    flatten,
    free_on_resume,
)
from dualtoken_vit.show.plots import save_figure
from dualtoken_vit.tasks.networks import create_model
from dualtoken_vit.tasks.optim import build_optimizer
from dualtoken_vit.tasks.progress import quiet
from dualtoken_vit.tasks.run_folder import LAST, in_use, stored_recipe, write_recipe
from dualtoken_vit.tasks.trainer import check_balance

Base = Literal["small", "tiny"]

MACHINE = "machine.json"
LOG = "train.log"
OWN = "name", "args", "checkpoint", "pretrained"  # of the section model: not of the budget, as a study sets them

# name: (the paper's table, keys that select rows of it; none: all rows that can be trained)
STUDIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "global-tokens": ("Table 6", ()),
    "token-count": ("Table 7", ()),
    "local-attention": ("Table 8", ()),
    "downsampling": ("Table 9", ()),
    "mlp": ("Table 2", ("in1k-small-mix", "in1k-small")),
    "peers": ("Table 2", ()),
}


@dataclass(frozen=True)
class Study:
    """The options of a study: the recipe of every network, whose own network is replaced, and the runs."""

    recipe: Annotated[Classification, tyro.conf.arg(name="")]
    preset: Literal["cpu", "equal", "gpu"] = "cpu"
    """Budget that the other options start from; see dualtoken-vit study --help."""
    base: Base = "small"
    """DualToken-ViT of ablations, not of peers."""
    networks: tuple[str, ...] = ()
    """Only these networks, two or more, as the table's column "model" names them. Empty: all. More can follow later."""
    seeds: Annotated[int, Interval(ge=1, le=1000)] = 3
    """Runs of each network, from run.seed on."""
    search_lr: Annotated[tuple[float, ...], Interval(ge=1e-12, le=1000)] = ()
    """Learning rates to choose from for each network, by runs validated on a held-out tenth of the training images.
    Empty: optim.lr."""
    jobs: Annotated[int, Interval(ge=1, le=1024)] = 1
    """Parallel runs, on the same cores or GPU."""
    out: Path = Path("runs", "study")
    """Folder of the runs of all studies and of study-NAME.*; the same command resumes."""
    markdown: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the table as Markdown."""


# How every network of every preset is trained, by AdamW and a cosine, as in the paper; the presets set the budget. Not
# taken from a recipe, whose defaults may change: those of `folder` were tuned with T (mix) alone (REPRODUCTION.md).
TRAINING = Classification(
    data=ClassificationData(crop_pct=1.0),
    augment=ClassificationAugment(scale=(0.35, 1.0), hflip=0.5, label_smoothing=0.1),
    optim=Optim(optimizer="adamw", lr=1e-3, schedule="cosine", min_lr=1e-6, weight_decay=0.05),
)
_CPU = replace(
    TRAINING,
    data=replace(TRAINING.data, image_size=64, workers=1),
    optim=replace(TRAINING.optim, epochs=1, batch_size=32, warmup_epochs=0.2),
    run=Run(device="cpu"),
)
_EQUAL = replace(
    TRAINING,
    data=replace(TRAINING.data, image_size=96, workers=1),
    optim=replace(TRAINING.optim, epochs=5, batch_size=32, warmup_epochs=0.5),
    run=Run(device="cpu", precision="bf16-mixed"),
)
_GPU = replace(
    TRAINING,
    data=replace(TRAINING.data, image_size=112, workers=4),
    optim=replace(TRAINING.optim, epochs=20, batch_size=64, warmup_epochs=1),
    run=Run(devices=1, precision="bf16-mixed", validate_every=5),
)
PRESETS: dict[str, tuple[str, Study]] = {
    "cpu": (
        "one epoch at 64 pixels, two seeds: at most 30 minutes per study for 10,000 images on two CPU cores",
        Study(_CPU, "cpu", base="tiny", seeds=2, jobs=2),
    ),
    "equal": (
        "five epochs at 96 pixels in bfloat16, three seeds, the better of two learning rates for each network: an hour "
        "of a core for a network and 10,000 images",
        Study(_EQUAL, "equal", base="tiny", seeds=3, search_lr=(5e-4, 1e-3), jobs=2),
    ),
    "gpu": ("20 epochs at 112 pixels, three seeds, on one GPU", Study(_GPU, "gpu", base="small", seeds=3, jobs=4)),
}


@dataclass(frozen=True)
class _Job:
    """One run: a network and a seed."""

    key: str  # of the network's row
    recipe: Classification
    folder: Path

    @property
    def history(self) -> list[dict[str, str]]:
        """One row per validated epoch."""
        path = self.folder / "metrics.csv"
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def done(self) -> bool:
        return self.epochs == self.recipe.optim.epochs

    @property
    def top1(self) -> float:
        """Accuracy after the last completed epoch."""
        return float(self.history[-1]["val_top1"])

    @property
    def score(self) -> tuple[float, float]:
        """The accuracy, and for equal ones the loss, negated."""
        return self.top1, -float(self.history[-1]["val_loss"])


def networks(name: str, base: Base, only: Sequence[str] = ()) -> list[tuple[Published, Model]]:
    """The networks of a study in the paper's order; in ablations `base` replaces DualToken-ViT-S.

    Raises:
        InputError: if `only` names networks that the study does not have, or fewer than two.
    """
    table, keys = STUDIES[name]
    size = "small" if name == "peers" else base
    found = []
    for row in PUBLISHED:
        if row.table == table and row.key and (not keys or row.key in keys):
            model = bare(model_of(row.key))
            found.append((row, replace(model, name=model.name.replace("_small", f"_{size}"))))
    known = [label(model) for _, model in found]
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"--networks {unknown[0]!r}: not in this study; choose from {', '.join(map(repr, known))}")
    if only and len(set(only)) < 2:
        raise InputError(f"--networks {only[0]}: a study compares two or more")
    return [pair for pair in found if not only or label(pair[1]) in only]


def _check_budget(stored: dict[str, Any], budget: dict[str, Any], where: Path) -> None:
    """Reject a budget that differs from a stored one, except for more seeds and what may change on resume."""
    free = {"text", *free_on_resume(Classification)} - {"distill.teacher"}  # another teacher gives other results
    for key, value in budget.items():
        before = stored.get(key, value)
        differs = value < before if key == "seeds" else value != before
        if differs and key not in free:
            raise InputError(
                f"--{key.replace('_', '-')} is {before} in {where}, not {value}: all runs of a study share one "
                "budget; keep that value, or choose another --out"
            )


def _job(key: str, recipe: Classification, parent: Path, label: str) -> _Job:
    """A run in parent/NETWORK/label. Rejects a run of another budget there."""
    job = _Job(key, recipe, parent / "-".join((recipe.model.name, *recipe.model.args)) / label)
    stored = stored_recipe(job.folder) if job.epochs or (job.folder / LAST).exists() else None
    if stored is not None:
        _check_budget(flatten(stored), flatten(recipe), job.folder)
    return job


def _plan(recipes: dict[str, Classification], seeds: int, out: Path) -> list[_Job]:
    """All runs of a study: every network with the first seed, then with the next. Rejects runs of another budget."""
    return [
        _job(
            key,
            replace(recipe, run=replace(recipe.run, seed=recipe.run.seed + n)),
            out / "runs",
            f"seed-{recipe.run.seed + n}",
        )
        for n in range(seeds)
        for key, recipe in recipes.items()
    ]


def _search(recipes: dict[str, Classification], rates: Sequence[float], out: Path) -> list[_Job]:
    """A run of every network with each learning rate, on a held-out tenth of the training images."""
    return [
        _job(
            key,
            replace(
                recipe,
                data=replace(recipe.data, holdout=0.1),
                optim=replace(recipe.optim, lr=lr),
            ),
            out / "search",
            f"lr-{lr:g}",
        )
        for lr in rates
        for key, recipe in recipes.items()
    ]


def _check_runs(recipes: dict[str, Classification], rates: Sequence[float], seeds: int, out: Path) -> None:
    """Reject runs of a study that none of the learning rates can have made, before the search for the best one."""
    for key, recipe in recipes.items():
        faults = []
        for lr in rates:
            try:
                _plan({key: replace(recipe, optim=replace(recipe.optim, lr=lr))}, seeds, out)
            except InputError as error:
                faults.append(error)
        if faults and len(faults) == len(rates):
            raise faults[0]


def _with(recipe: Classification, model: Model) -> Classification:
    """A recipe with the name and arguments of another network."""
    return replace(recipe, model=replace(recipe.model, name=model.name, args=model.args, pretrained=False))


def _counts(recipe: Classification, classes: int) -> Counts:
    """Build a network, so that invalid settings fail before any training, and count it."""
    size = recipe.data.image_size
    network, _ = create_model(recipe.model, classes, size)
    build_optimizer(network, recipe.optim)
    return count(network, (recipe.model.in_chans, size, size))


def _fingerprint(train: Images, val: Images, root: str) -> dict[str, Any]:
    """Identifies a dataset by its numbers of images, its classes and its image names below `root`."""
    names = [name for data in (train, val) for name in data.image_names]
    if root:  # however it is written
        names = [f"/{relative(name, root)}" for name in names]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"training": len(train), "validation": len(val), "classes": list(train.class_names), "names": digest}


async def _train(job: _Job, threads: int, slots: asyncio.Semaphore, console: Console) -> str:
    """Start or resume a run in a process of its own, which logs to train.log; return its error, if any.

    Cancelling this stops the process.
    """
    path = job.folder / LOG
    async with slots:
        command = [sys.executable, "-m", "dualtoken_vit", "train", "folder", "--out", str(job.folder), "--resume"]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUTF8": "1"}  # for the log
        try:
            write_recipe(job.folder, job.recipe, "folder")  # also on resume: the data may have moved
            device = machine.pick_device(job.recipe.run.device)
            write_json(machine.describe(device, job.recipe.run.threads or threads), job.folder / MACHINE)
            with path.open("w", encoding="utf-8") as log:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=DEVNULL, stdout=log, stderr=STDOUT, env=env
                )
        except (InputError, OSError) as error:  # raised here, it would end the other runs
            console.print(problem := f"{job.folder}: {error}", markup=False, soft_wrap=True)
            return problem
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    problem = ""
    if status < 0:
        problem = f"{job.folder}: stopped by {signal.Signals(-status).name}"
    elif status or not job.done:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        problem = f"{job.folder}: {lines[-1].removeprefix('dualtoken-vit: error: ')}; see {path}"
    else:
        (job.folder / LAST).unlink(missing_ok=True)
    console.print(problem or f"{job.folder}: top-1 {job.top1:.1%}", markup=False, soft_wrap=True)
    return problem


async def _train_all(todo: Sequence[_Job], parallel: int) -> list[str]:
    """Train `parallel` of the runs at a time under a progress bar; return the errors of those that failed.

    Ctrl-C and SIGTERM cancel this and every `_train`.
    """
    (main,) = asyncio.all_tasks()  # this one: none has been created yet
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # the number of the outermost level
    threads = int(given) if given.isdecimal() and int(given) else max(1, machine.cores() // parallel)
    console, slots = Console(stderr=True), asyncio.Semaphore(parallel)
    pending = {asyncio.create_task(_train(job, threads, slots, console)) for job in todo}
    before = sum(job.epochs for job in todo)
    total = sum(job.recipe.optim.epochs for job in todo) - before
    rate = TextColumn("epochs, {task.fields[rate]:.1f}/min")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn(), TimeRemainingColumn())
    problems: list[str] = []
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        bar = progress.add_task("", total=total, rate=0.0)
        while pending:
            finished, pending = await asyncio.wait(pending, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            problems += [problem for task in finished if (problem := task.result())]
            completed = sum(job.epochs for job in todo) - before
            progress.update(bar, completed=completed, rate=60 * completed / (progress.tasks[bar].elapsed or 1))
    return problems


def _run(plan: Sequence[_Job], parallel: int) -> None:
    """Train what is not done; an InputError after all other runs have ended if some failed."""
    todo = [job for job in plan if not job.done]
    if todo:
        print(f"{counted(len(todo), 'run')}; the log of the first: {todo[0].folder / LOG}", flush=True)
    try:
        problems = asyncio.run(_train_all(todo, parallel)) if todo else []
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; fix this, then repeat the command to resume")


def _text(recipe: Classification, base: Base, seeds: int, search: Sequence[float], data: dict[str, Any]) -> str:
    """The budget in one line."""
    optim = recipe.optim
    where = Path(recipe.data.root).resolve().name if recipe.data.root else recipe.data.dataset
    epochs = f"{counted(optim.epochs, 'epoch')} of {data['training']:,} images"
    over = ", ablations of T instead of S" if base == "tiny" else ""
    rates = f"the best of {', '.join(f'{lr:g}' for lr in search)}" if search else f"{optim.lr:g}"
    return (
        f"{where}, {recipe.data.image_size} pixels, {epochs}, {counted(seeds, 'seed')}, {optim.optimizer} "
        f"{rates}, batch size {optim.batch_size}, {data['validation']:,} validation images, last epoch{over}"
    )


def _training(recipe: Classification, search: Sequence[float]) -> str:
    """How all networks are trained, in one line: every setting but those that are off."""
    settings = asdict(recipe.optim) | asdict(recipe.augment)
    settings |= {"class_weights": recipe.class_weights, "precision": recipe.run.precision}
    if search:
        settings["lr"] = " or ".join(f"{lr:g}" for lr in search)
    if recipe.distill.teacher is not None:
        settings |= {f"distill.{key}": value for key, value in asdict(recipe.distill).items()}
    used = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, 0, ()))
    return f"Every network: {used}."


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); repair or remove it") from error


def study(name: str, options: Study) -> None:
    """Train the networks of the study `name` of `STUDIES`; print and save the comparison.

    Calling it again resumes where it stopped.

    Raises:
        InputError: for invalid settings or data, another study in the same folder, and, after all other runs have
            ended, for runs that failed.
    """
    quiet()
    recipe, seeds, search, out = options.recipe, options.seeds, options.search_lr, options.out
    if len({f"{lr:g}" for lr in search}) < len(search):
        raise InputError(f"--search-lr {' '.join(f'{lr:g}' for lr in search)}: one is given twice; give each once")
    base: Base = "small" if name == "peers" else options.base  # peers are unaffected
    for key in OWN:
        if getattr(recipe.model, key) != getattr(TRAINING.model, key):
            raise InputError(f"--model.{key}: a study trains its own networks from scratch; remove this option")
    for key in ("max_minutes", "patience"):
        if getattr(recipe.run, key) is not None:
            raise InputError(f"--run.{key.replace('_', '-')}: all runs of a study have the same epochs; remove it")
    if search and recipe.optim.lr != PRESETS[options.preset][1].recipe.optim.lr:
        raise InputError("--optim.lr: --search-lr chooses it; leave it out, or give --search-lr without a value")
    if search and recipe.data.holdout:
        raise InputError(
            f"--data.holdout {recipe.data.holdout:g}: --search-lr would choose the rates on the images that the study "
            "reports; name a validation split, or give --search-lr without a value"
        )
    check_bounds(recipe)
    check_bounds(options)
    check_balance(recipe)
    chosen = networks(name, base, options.networks)
    recipes = {row.key: _with(recipe, model) for row, model in chosen}
    plan = [] if search else _plan(recipes, seeds, out)  # with a search, the learning rates are not known yet
    _check_runs(recipes, search, seeds, out)
    train, val = build_datasets(recipe.data, recipe.model.in_chans)
    data = _fingerprint(train, val, recipe.data.root)
    counts = {key: _counts(own, len(data["classes"])) for key, own in recipes.items()}
    table, _ = STUDIES[name]
    text = _text(recipe, base, seeds, search, data)
    trained = _training(recipe, search)
    settings = json.loads(json.dumps(flatten(recipe))) | {"data.root": Path(recipe.data.root).name}
    settings = {key: value for key, value in settings.items() if key.removeprefix("model.") not in OWN}
    budget = {"text": text, "base": base, "seeds": seeds, "search_lr": list(search)} | settings
    stem = out / f"study-{name}"
    if (path := stem.with_suffix(".json")).exists():
        try:
            before = dict((stored := _read(path))["budget"])
            more = [each["model"] for each in stored["networks"] if each["key"] not in recipes]
            names = ", ".join(repr(" ".join((each["name"], *each["args"]))) for each in more)
            _check_budget(before, budget, path)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not the results of a study; repair or remove it") from error
        if options.networks and more:
            raise InputError(f"--networks: {path} also has {names}: name them too, or choose another --out")
    print(f"{name} ({table}): {text}", trained, sep="\n", flush=True)
    with in_use(out):
        if (path := out / "runs" / "data.json").exists() and _read(path) != data:
            raise InputError(f"the runs in {path.parent} used other images (see {path.name}); choose another --out")
        write_json(data, path)
        if search:
            tried = _search(recipes, search, out)
            _run(tried, options.jobs)
            for key, own in recipes.items():
                best = max((job for job in tried if job.key == key), key=lambda job: job.score)
                recipes[key] = replace(own, optim=best.recipe.optim)
            plan = _plan(recipes, seeds, out)
        _run(plan, options.jobs)

    results = []
    for row, model in chosen:
        called = row.network.replace("ViT-S", "ViT-T") if base == "tiny" else row.network
        top1 = tuple(job.top1 for job in plan if job.key == row.key)
        results.append(Result(row, called, model, recipes[row.key].optim.lr, counts[row.key], top1))
    lines = verdict(results, chance(val), len(val))
    machines = dict.fromkeys((job.folder / MACHINE).read_text(encoding="utf-8") for job in plan)
    record: dict[str, Any] = {
        "study": name,
        "table": table,
        "budget": budget,
        "networks": [
            {
                "key": r.published.key,
                "network": r.name,
                "model": asdict(r.model),
                "counts": asdict(r.counts),
                "lr": r.lr,
            }
            | {"top1": r.top1, "mean": round(r.mean, 6), "spread": r.spread, "published": r.published.score}
            for r in results
        ],
        "chance": chance(val),
        "verdict": lines,
        "machines": [json.loads(each) for each in machines],
    }
    write_json(record, stem.with_suffix(".json"))
    with atomic_write(stem.with_suffix(".md"), "w") as file:
        file.write("\n\n".join([f"# {name} ({table})", text, trained, table_of(results, True), *lines, ""]))
    save_figure(partial(draw, results, f"{name}: {text}"), stem.with_suffix(".png"), dpi=150)
    print(table_of(results, options.markdown), *lines, sep="\n")
    print(f"parameters and multiply-accumulates are of the networks as trained here; results and runs are in {out}")
