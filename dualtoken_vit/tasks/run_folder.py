"""The folder of a run: its files, what they hold, and the callbacks that write them.

recipe.json, metrics.csv, curves.png, the logs of a tracker, last.ckpt (to resume), best.safetensors (to use), and the
details that the task writes for the best epoch.
"""

import csv
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint

from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.data.contract import some
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, counted, guard, write_json
from dualtoken_vit.header import Entry, faults
from dualtoken_vit.recipes import RECIPES, Recipe, flatten, free_on_resume, from_dict, to_dict
from dualtoken_vit.show import plots
from dualtoken_vit.tasks.loggers import Tracker
from dualtoken_vit.tasks.registry import get_task

RUN = RECIPE, LAST, BEST = "recipe.json", "last.ckpt", "best.safetensors"  # files that mark a folder as a run's
NAME = "recipe"  # key in recipe.json: the recipe's name

# Lightning's hooks declare its base classes, which lack the attributes used here.
Trainer = Any  # lightning.Trainer with `Loaders` as its datamodule
Module = Any  # TaskModule

STATE = {  # of a run, in last.ckpt
    "images": Entry(tuple[int, int]),
    "class_names": Entry(tuple[str, ...]),
    "history": Entry(tuple[dict, ...]),
    "loss_sum": Entry(float),
    "batches": Entry(int),
}
FEW = 100  # validation images: the 95 % interval of an accuracy may be 20 percentage points wide
LOOK_EVERY = 50  # steps between two checks of the loss on a GPU or over processes, each of which waits for them


def stored_recipe(out: Path, name: str = "") -> Recipe | None:
    """The recipe of the run in a folder, if any; an InputError if it is unreadable, or not of that `name` ("": any)."""
    path = out / RECIPE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        started = values.pop(NAME, "")  # "": from Python, or by an early version
        if "task" in values:
            get_task(values["task"])
        recipe = from_dict(values)
    except (TypeError, ValueError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"{path}: not a recipe of this version ({error}); give another --out") from error
    if name and (name != started if started else type(RECIPES.get(name, recipe)) is not type(recipe)):
        of = f"the recipe {started}" if started else recipe.task
        raise InputError(f"{out} holds a run of {of}, not {name}; give another --out")
    return recipe


def write_recipe(out: Path, recipe: Recipe, name: str = "") -> None:
    """Write recipe.json."""
    write_json(({NAME: name} if name else {}) | to_dict(recipe), out / RECIPE)


def write_history(history: Sequence[dict[str, Any]], out: Path) -> None:
    """Write metrics.csv, a row for each validation, unless it has them."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, history[-1], extrasaction="ignore")  # rows of an older version may have more
    writer.writeheader()
    writer.writerows(history)
    path, content = out / "metrics.csv", text.getvalue().encode()
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)


def check_resume(stored: Recipe, asked: Recipe, out: Path) -> None:
    """Reject settings that would make the resumed run another one; the InputError names the first of them."""
    if type(asked) is not type(stored):
        raise InputError(f"{out} holds a run of {stored.task}, not {asked.task}; give another --out")
    before, free = flatten(stored), free_on_resume(type(stored))
    for key, value in flatten(asked).items():
        if value != before[key] and key not in free:
            raise InputError(
                f"--{key.replace('_', '-')} is {before[key]} in the run in {out}, not {value}: a resumed run keeps "
                "its settings; leave it out, or start another with --out"
                + (f" and --model.checkpoint {out / BEST}" if (out / BEST).exists() else "")
            )


def read_history(last: Path, names: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    """The history in last.ckpt, a row for each validation.

    Raises:
        InputError: for data of other classes, `names`, than the run's: it names the added and missing ones.
    """
    run = AtomicCheckpointIO().load_checkpoint(last, "cpu", weights_only=True).get("run", {})
    if fault := next(faults("its state", run, STATE), ""):
        raise InputError(f"{last} is of an older version and cannot be resumed ({fault}); start another run with --out")
    before = tuple(run["class_names"])
    if before == names:
        return run["history"]
    added, missing = [n for n in names if n not in before], [n for n in before if n not in names]
    changes = [f"{what} {some(found)}" for what, found in (("added", added), ("missing", missing)) if found]
    raise InputError(
        f"the classes changed since the run in {out} began: {' and '.join(changes) or 'another order'}; "
        "restore them, or start another run with --out"
    )


@contextmanager
def in_use(out: Path) -> Iterator[None]:
    """Inside, no other training may use the folder; an InputError where another one does."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{out} is in use by another training; wait for it, or give another --out") from error
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if os.name == "nt":  # which keeps a file that is open
            lock.release()
        with suppress(OSError):  # another training may be in the folder
            (out / ".lock").unlink(missing_ok=True)
            if not existed:  # and nothing was begun
                out.rmdir()
        lock.release()  # not before: whoever takes it then takes a file that is gone


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves to a temporary file that takes the place of the old checkpoint once it is whole; loads what was saved."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            with ZipFile(path) as archive:  # PyTorch does not compare the checksums of its archive
                if archive.testzip():
                    raise ValueError("checksum")
            found = super().load_checkpoint(path, *args, **kwargs)
            if not isinstance(found, dict):
                raise ValueError("no dictionary")
            return found
        except Exception as error:  # a damaged file raises any
            raise InputError(f"{path} is damaged and cannot be resumed from; start another run with --out") from error


def best_epoch(history: list[dict[str, Any]], score: str) -> dict[str, Any] | None:
    """The row with the highest validation metric `score`; of equal ones, the lowest validation loss, or the last."""
    return max(history, key=lambda row: (_rank(row, score), row["epoch"]), default=None)


def exhausted(history: list[dict[str, Any]], score: str, patience: int | None) -> bool:
    """Whether `run.patience` validations in a row were no better than one before, whose score is not 0."""
    best = best_epoch(history, score)
    if patience is None or best is None or not best[f"val_{score}"]:
        return False
    before = best_epoch(history[:-patience], score)
    return before is not None and _rank(before, score) == _rank(best, score)


def _rank(row: dict[str, Any], score: str) -> tuple[float, float]:
    return row[f"val_{score}"], -row.get("val_loss", 0)


def best_line(history: list[dict[str, Any]], score: str, epochs: int) -> str:
    """The best epoch of a run, if it has one."""
    best = best_epoch(history, score)
    return f"best: {score} {best[f'val_{score}']:.2%}, in epoch {best['epoch']} of {epochs}" if best else ""


def finished(history: list[dict[str, Any]], score: str, recipe: Recipe, out: Path) -> str:
    """For a run that has nothing left to do: its result, and how to train on; else ""."""
    complete = bool(history) and history[-1]["epoch"] >= recipe.optim.epochs
    if not (complete or exhausted(history, score, recipe.run.patience)):
        return ""
    more = "" if complete else "give a higher --run.patience, or "
    return (
        f"the run in {out} is finished ({best_line(history, score, recipe.optim.epochs)}); to train on, {more}start "
        f"another one with --model.checkpoint {out / BEST} --out FOLDER"
    )


class RunFolder(Callback):
    """Watches the loss; keeps recipe, history and best weights in the run's folder.

    Must precede weight averaging in the list of callbacks: it saves the averaged weights while they are in the model.
    """

    def __init__(self, out: Path, recipe: Recipe, name: str, model_args: dict[str, Any], begun: bool = False):
        self.out, self.recipe, self.name, self.model_args = out, recipe, name, model_args
        self.history: list[dict[str, Any]] = []
        self.loss_sum: Any = 0.0  # over the epoch's batches, stays on the device
        self.batches = 0
        self.bad_step: Any = 0  # the first whose loss was not finite
        self.lr = 0.0  # of the last step, the highest of its groups
        self.begun = begun  # whether the folder has the recipe
        self.stepped = False  # whether a batch was trained on since the start
        self.interrupted = False  # whether to stop after the step
        self.tracked: dict[str, str | None] = {}  # the run's name in each tracker
        self.license: str | None = None  # of the weights from which the run started

    def on_save_checkpoint(self, trainer: Trainer, task: Module, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {
            "history": self.history,
            "loss_sum": trainer.strategy.reduce(torch.as_tensor(self.loss_sum)).item(),  # mean over the processes
            "batches": self.batches,
            "images": trainer.datamodule.images,
            "held_out": self._held_out(task),
            "class_names": list(task.predictor.class_names),
            "tracked": self.tracked | {trainer.logger.name: trainer.logger.version},
            "license": self.license,
        }

    def _held_out(self, task: Module) -> str | None:
        """The `fingerprint` of the training images that are held out for validation; None: of another split."""
        return task.predictor.preprocessing.get("held_out") if getattr(self.recipe.data, "holdout", 0) else None

    def on_load_checkpoint(self, trainer: Trainer, task: Module, checkpoint: dict[str, Any]) -> None:
        run = checkpoint["run"]
        self.history, self.loss_sum, self.batches = run["history"], run["loss_sum"], run["batches"]
        self.tracked, self.license = run.get("tracked", {}), run.get("license")
        best_epoch(self.history, task.score)  # fails now, if it cannot be compared with what is to come
        images = trainer.datamodule.images
        if run["images"] != images:
            raise InputError(
                f"the data changed since the run in {self.out} began: {run['images']} training and validation images "
                f"then, {images} now; restore them, or start another run with --out"
            )
        held_out = self._held_out(task)
        if run.get("held_out", held_out) != held_out:  # earlier versions did not store it
            raise InputError(
                f"--data.holdout: files were added, removed or renamed since the run in {self.out} began, so that it "
                "would validate on images that it was trained on; restore them, or start another run with --out"
            )

    def on_train_start(self, trainer: Trainer, task: Module) -> None:
        """Begin to write, now that the data is known to be sound."""
        kind, before = self.recipe.run.logger, self.tracked.get(self.recipe.run.logger)
        trainer.logger = Tracker(kind, self.out, trainer.global_step, before)
        if self.begun:
            trainer.logger.log_hyperparams(flatten(self.recipe))
        elif self.recipe.run.max_minutes is None:  # otherwise `TimeBudget` begins
            self.begin(trainer, self.recipe)
        if trainer.is_global_zero:
            (train, val), steps = trainer.datamodule.images, task.steps_per_epoch
            print(f"{train} training and {val} validation images, {counted(steps, 'step')} an epoch", flush=True)
            if val < FEW:
                print(f"only {counted(val, 'validation image')}: {task.uncertainty(val)}", flush=True)
        trainer.log_every_n_steps = min(LOOK_EVERY, task.steps_per_epoch)
        for row in self.history:
            if row["step"] == trainer.global_step:
                self._log(trainer, row)

    def begin(self, trainer: Trainer, recipe: Recipe) -> None:
        """Write the recipe that the run follows from now on, also into its tracker."""
        self.recipe, self.begun = recipe, True
        trainer.logger.log_hyperparams(flatten(recipe))
        if trainer.is_global_zero:
            write_recipe(self.out, recipe, self.name)

    def on_exception(self, trainer: Trainer, task: Module, exception: BaseException) -> None:
        """After an error before anything was saved, the folder can be used again: it keeps no recipe.

        It does after Ctrl-C and SIGTERM, which --resume continues.
        """
        saved = any((self.out / each).exists() for each in (LAST, BEST))
        if trainer.is_global_zero and isinstance(exception, Exception) and not saved:
            with suppress(OSError):
                (self.out / RECIPE).unlink(missing_ok=True)

    def _log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        trainer.logger.log_metrics({f"epoch/{key}": value for key, value in row.items()}, step=row["step"])
        trainer.logger.save()

    def on_train_epoch_start(self, trainer: Trainer, task: Module) -> None:
        self.loss_sum, self.batches = 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, task: Module, batch: Any, index: int) -> None:
        self.lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(self, trainer: Trainer, task: Module, outputs: Any, batch: Any, index: int) -> None:
        self.stepped = True
        loss = outputs["loss"].detach().float() * trainer.accumulate_grad_batches
        self.loss_sum = self.loss_sum + loss
        self.batches += 1
        step = trainer.current_epoch * task.steps_per_epoch + index // trainer.accumulate_grad_batches + 1
        bad = torch.as_tensor(self.bad_step, device=loss.device)
        self.bad_step = torch.where((bad > 0) | loss.isfinite(), bad, step)
        every = 1 if task.device.type == "cpu" and trainer.world_size == 1 else LOOK_EVERY
        if step % every == 0 or step % self.recipe.run.save_every == 0 or trainer.is_last_batch:
            bad = trainer.strategy.reduce(self.bad_step, reduce_op="max")
            if bad > 0:
                self.stop(trainer, f"the training loss is NaN or Inf at step {int(bad)}")

    def kept(self) -> str:
        """What of the run is on the disk, for messages."""
        last, best = self.out / LAST, self.out / BEST
        kept = [f"the last good state is {last}"] * last.exists() + [f"the best weights are {best}"] * best.exists()
        return ", ".join(kept) or "nothing was saved"

    def stop(self, trainer: Trainer, reason: str) -> None:
        raise InputError(
            f"{reason} (epoch {trainer.current_epoch + 1}), so it stopped; {self.kept()}; "
            "try a lower --optim.lr, --optim.clip-grad 1 or --run.precision 32-true"
        )

    @contextmanager
    def stopping_between_steps(self, trainer: Trainer) -> Iterator[None]:
        """Inside, the first Ctrl-C of a process that trains alone waits for the end of the step, and for its save."""
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield  # processes that stop after different steps would wait for each other
            return

        def note(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, before)
            self.interrupted = self.stepped and self.begun
            if not self.interrupted:
                raise KeyboardInterrupt
            print("\nstopping after this step; Ctrl-C again: at once", file=sys.stderr)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_validation_epoch_end(self, trainer: Trainer, task: Module) -> None:
        evaluation = task.evaluate()
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": self.lr,
            "train_loss": trainer.strategy.reduce(torch.as_tensor(self.loss_sum / self.batches)).item(),
            **{f"val_{name}": value for name, value in evaluation.scores.items()},
        }
        for name, value in row.items():
            if not math.isfinite(value):
                what = name.replace("val_", "validation ")
                self.stop(trainer, f"the {what} is NaN or Inf at step {trainer.global_step}")
        self.history.append(row)
        best = best_epoch(self.history, task.score) or row
        if trainer.is_global_zero:
            if best is row:
                save_checkpoint(
                    self.out / BEST,
                    task.model,
                    task=self.recipe.task,
                    class_names=task.predictor.class_names,
                    preprocessing=task.predictor.preprocessing,
                    recipe=to_dict(self.recipe),
                    metrics=row,
                    model_args=self.model_args,
                    category_ids=task.predictor.category_ids,
                    license=self.license,
                )
                with guard(self.out):
                    task.save_details(self.out, evaluation)
            with guard(self.out):
                write_history(self.history, self.out)
            plots.save_curves(self.history, task.panels, f"val_{task.score}", best, self.out / "curves.png")
            self._log(trainer, row)
            progress = f"epoch {row['epoch']}/{trainer.max_epochs}  train loss {row['train_loss']:.3f}"
            print(f"{progress}  {evaluation.headline}{'  best' if best is row else ''}", flush=True)
        if exhausted(self.history, task.score, self.recipe.run.patience):
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"no better epoch in {self.recipe.run.patience} validations: stopped", flush=True)


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt every few steps and after each epoch; Lightning calls it after all other callbacks."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.terminated = False  # whether SIGTERM came in the middle of a step

    def on_train_batch_end(self, trainer: Trainer, task: Module, outputs: Any, batch: Any, index: int) -> None:
        stepped = (index + 1) % trainer.accumulate_grad_batches == 0
        if trainer.received_sigterm and trainer.world_size == 1 and not stepped:
            # Lightning would end the run now, in the middle of a step: it learns of the signal at the end of the step.
            self.terminated, trainer._signal_connector.received_sigterm = True, False
        elif self.terminated and stepped:
            trainer._signal_connector.received_sigterm = True
        # From a state saved after an epoch's last batch Lightning would resume without validating: not here, but below.
        stopping = self.folder.interrupted or (trainer.received_sigterm and trainer.world_size == 1)
        due = stopping or trainer.global_step % self.folder.recipe.run.save_every == 0
        if stepped and due and self.folder.begun and not trainer.is_last_batch:
            self._save(trainer, task)
            if self.folder.interrupted:
                raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, task: Module) -> None:
        self._save(trainer, task)
        if self.folder.interrupted:
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer, task: Module) -> None:
        # The loss was finite before the step; the step may have made the weights NaN or Inf.
        finite = torch.stack([p.isfinite().all() for p in task.parameters()]).all()
        if trainer.strategy.reduce((~finite).float(), reduce_op="max") > 0:
            self.folder.stop(trainer, f"a weight is NaN or Inf after step {trainer.global_step}")
        trainer.save_checkpoint(self.folder.out / LAST)
