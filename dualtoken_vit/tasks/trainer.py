"""Training by Lightning's Trainer: the run's folder, saving and resuming, what stops a run.

A resumed run repeats an uninterrupted one bit by bit on the CPU. Data and step-level randomness depend on the seed and
the place in the run alone; last.ckpt holds the rest (weights, averages, optimiser, schedule, progress, history).
"""

import csv
import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.data.images import reason
from dualtoken_vit.data.sampling import full_batches, loader
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.machine import tune_cpu
from dualtoken_vit.recipes import Classification, Recipe, Run, from_dict, to_dict
from dualtoken_vit.show import plots
from dualtoken_vit.tasks import classification, detection, segmentation
from dualtoken_vit.tasks.base import ProgressBar, Task, check_ranges, flatten, quiet
from dualtoken_vit.tasks.distributed import synchronise_batchnorm
from dualtoken_vit.tasks.evaluation import RUN
from dualtoken_vit.tasks.optim import build_optimizer

PREPARE = {
    "classification": classification.prepare,
    "detection": detection.prepare,
    "segmentation": segmentation.prepare,
}

RECIPE, LAST, BEST = RUN

# A resumed run may read its data elsewhere and run on other machines; anything else would make it another run.
FREE_ON_RESUME = (
    "data.root",
    "data.images",
    "data.val_images",
    "data.train_json",
    "data.val_json",
    "data.classes",
    "data.workers",
    "run.accelerator",
    "run.devices",
    "run.nodes",
    "run.save_every",
)

LOOK_EVERY = 50  # steps between two looks at the loss on a GPU, each of which makes it wait


def stored_recipe(out: Path) -> Recipe | None:
    """The recipe of the run in a folder; none: no run there.

    Raises:
        InputError: for a recipe that this version cannot read.
    """
    path = out / RECIPE
    if not path.is_file():
        return None
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a recipe of this version ({error}); give another --out") from error


def check_resume(stored: Recipe, asked: Recipe, out: Path) -> None:
    """Refuse settings that would make the resumed run another one.

    Raises:
        InputError: names the first of them.
    """
    before = flatten(stored)
    for key, value in flatten(asked).items():
        if value != before[key] and key not in FREE_ON_RESUME:
            raise InputError(
                f"--{key.replace('_', '-')} is {before[key]} in the run in {out}, not {value}: a resumed run keeps its "
                f"settings; leave it out, or start another with --out and --model.checkpoint {out / BEST}"
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves to a temporary file that takes the place of the old checkpoint once it is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} is damaged and cannot be resumed from; start another run with --out") from error


class _Batches:
    """A loader that says how long the whole epoch is, as Lightning counts, even where its start is skipped.

    Its worker processes start with the first batch, not with `iter`, which Lightning calls twice an epoch.
    """

    def __init__(self, batches: Any, length: int):
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Loaders(lightning.LightningDataModule):
    """The batches of each process and epoch; `batch_size` is per process and accumulated batch.

    Before a run the first process reads every image. What it leaves out all processes leave out, and later those of
    a resumed run, which does not read everything again.
    """

    def __init__(self, train: Dataset, val: Dataset, recipe: Recipe, batch_size: int, resumed: bool):
        super().__init__()
        self.train, self.val = train, val
        self.recipe = recipe
        self.batch_size = batch_size
        self.resumed = resumed
        self.skipped: tuple[list[str], ...] = [], []
        """Names of unreadable training and validation images, below data.root: it may move."""
        self.root = str(Path(getattr(recipe.data, "root", "")))
        self.pixels: torch.Tensor | None = None
        """Segmentation: `SegmentationDataset.pixels` of the training images, when the run began."""
        self.problem = ""
        self.prepare_data_per_node = False

    @property
    def images(self) -> list[int]:
        """Numbers of training and validation images."""
        return [len(self.train), len(self.val)]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps.

        Raises:
            InputError: where the images do not suffice for one.
        """
        return full_batches(len(self.train), self.recipe.optim.batch_size)

    def prepare_data(self) -> None:
        """Read every image; called on the first process only, the others wait for it however long it takes."""
        if self.resumed:
            return
        skip = getattr(self.recipe.data, "unreadable", "stop") == "skip"
        try:
            for title, dataset, names in zip(
                ("training", "validation"), (self.train, self.val), self.skipped, strict=True
            ):
                names += [name.removeprefix(self.root) for name in dataset.verify(skip=skip)]
                if names:
                    print(f"skipped {len(names)} unreadable {title} images")
            self.pixels = getattr(self.train, "pixels", None)
        except InputError as error:
            self.problem = str(error)

    def setup(self, stage: str) -> None:
        """Hand what `prepare_data` found to every process.

        Raises:
            InputError: on all of them, so that none waits for another that has stopped.
        """
        self.problem, found = self.trainer.strategy.broadcast((self.problem, self.state_dict()))
        if self.problem:
            raise InputError(self.problem)
        self.load_state_dict(found)
        count, world = len(self.val), self.trainer.world_size
        if count < world:
            raise InputError(
                f"{count} validation images cannot be shared by {world} processes; use fewer --run.devices"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "pixels": self.pixels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.pixels = state_dict["skipped"], state_dict.get("pixels")
        for dataset, names in zip((self.train, self.val), self.skipped, strict=True):
            if names:
                dataset.leave_out(names, self.root)
        self.trainer.lightning_module.steps_per_epoch = self.steps_per_epoch

    def _arguments(self) -> dict[str, Any]:
        trainer, recipe = self.trainer, self.recipe
        place = dict(rank=trainer.global_rank, world=trainer.world_size)
        collate = trainer.lightning_module.collate
        work = dict(batch_size=self.batch_size, workers=recipe.data.workers, collate_fn=collate)
        return dict(seed=recipe.run.seed, **work, **place)

    def train_dataloader(self) -> _Batches:
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.processed if loop.restarting else 0
        place = dict(epoch=self.trainer.current_epoch, skip=done)
        progress = self.trainer.current_epoch / self.recipe.optim.epochs
        self.trainer.lightning_module.prepare_epoch(self.train, progress)
        batches = loader(
            self.train, train=True, groups=getattr(self.train, "groups", None), **place, **self._arguments()
        )
        return _Batches(batches, min(done + len(batches), self.steps_per_epoch * self.recipe.optim.accumulate))

    def val_dataloader(self) -> Any:
        return loader(self.val, train=False, **self._arguments())


class RunFolder(Callback):
    """Watches the loss, and keeps the recipe, the history and the best weights in the run's folder.

    Must stand before weight averaging: it saves the averaged weights while those are in the model.
    """

    def __init__(self, out: Path, save_every: int, **saved: Any):
        self.out = out
        self.save_every = save_every
        self.saved = saved
        """Arguments of `save_checkpoint`."""
        self.history: list[dict[str, Any]] = []
        self.loss_sum: Any = 0.0  # over the epoch's batches, stays on the device
        self.batches = 0
        self.bad_step: Any = 0  # the first whose loss was not finite

    def best(self, score: str) -> dict[str, Any] | None:
        """The history's row with the highest validation metric `score`; of equals that with the lowest loss."""
        return max(self.history, key=lambda row: (row[f"val_{score}"], -row.get("val_loss", 0)), default=None)

    def on_save_checkpoint(self, trainer: lightning.Trainer, task: Task, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {
            "history": self.history,
            "loss_sum": trainer.strategy.reduce(torch.as_tensor(self.loss_sum)).item(),  # mean over the processes
            "batches": self.batches,
            "images": trainer.datamodule.images,
            "class_names": list(self.saved["class_names"]),
        }

    def on_load_checkpoint(self, trainer: lightning.Trainer, task: Task, checkpoint: dict[str, Any]) -> None:
        run = checkpoint["run"]
        self.history, self.loss_sum, self.batches = run["history"], run["loss_sum"], run["batches"]
        images, names = trainer.datamodule.images, list(self.saved["class_names"])
        if run["images"] != images or run["class_names"] != names:
            raise InputError(
                f"the data changed since the run in {self.out} began: {run['images']} training and validation "
                f"images of {len(run['class_names'])} classes then, {images} of {len(names)} now; "
                "restore them, or start another run with --out"
            )

    def on_train_start(self, trainer: lightning.Trainer, task: Task) -> None:
        """Begin to write, now that nothing is wrong with the data."""
        if trainer.is_global_zero:
            if not (self.out / RECIPE).exists():
                with atomic_write(self.out / RECIPE, "w") as file:
                    json.dump(self.saved["recipe"], file, indent=2)
            train, val = trainer.datamodule.images
            print(f"{train} training and {val} validation images, {task.steps_per_epoch} steps an epoch", flush=True)
        trainer.log_every_n_steps = min(LOOK_EVERY, task.steps_per_epoch)
        # TensorBoard forgets what a run that was stopped had logged from this step on: it comes again.
        trainer.logger = TensorBoardLogger(self.out, name="", version="tensorboard", purge_step=trainer.global_step)
        for row in self.history:
            if row["step"] == trainer.global_step:
                self._log(trainer, row)

    def _log(self, trainer: lightning.Trainer, row: dict[str, Any]) -> None:
        trainer.logger.log_metrics({f"epoch/{key}": value for key, value in row.items()}, step=row["step"])
        trainer.logger.save()

    def on_train_epoch_start(self, trainer: lightning.Trainer, task: Task) -> None:
        self.loss_sum, self.batches = 0.0, 0

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Task, outputs: Any, batch: Any, index: int) -> None:
        loss = outputs["loss"].detach().float() * trainer.accumulate_grad_batches
        self.loss_sum = self.loss_sum + loss
        self.batches += 1
        step = trainer.current_epoch * task.steps_per_epoch + index // trainer.accumulate_grad_batches + 1
        bad = torch.as_tensor(self.bad_step, device=loss.device)
        self.bad_step = torch.where((bad > 0) | loss.isfinite(), bad, step)
        every = 1 if task.device.type == "cpu" else LOOK_EVERY
        if step % every == 0 or step % self.save_every == 0 or trainer.is_last_batch:
            bad = trainer.strategy.reduce(self.bad_step, reduce_op="max")
            if bad > 0:
                self.stop(trainer, f"the training loss is not a finite number at step {int(bad)}")

    def stop(self, trainer: lightning.Trainer, reason: str) -> None:
        last, best = self.out / LAST, self.out / BEST
        kept = [f"the last good state is {last}"] * last.exists() + [f"the best weights are {best}"] * best.exists()
        raise InputError(
            f"{reason} (epoch {trainer.current_epoch + 1}), so it stopped; {', '.join(kept) or 'nothing was saved'}; "
            "try a lower --optim.lr, --optim.clip-grad 1 or --run.precision 32-true"
        )

    def on_validation_epoch_end(self, trainer: lightning.Trainer, task: Task) -> None:
        train_loss = trainer.strategy.reduce(torch.as_tensor(self.loss_sum / self.batches)).item()
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "train_loss": train_loss,
            **task.compute_metrics(),
        }
        for name, value in row.items():
            if not math.isfinite(value):
                what = name.replace("val_", "validation ")
                self.stop(trainer, f"the {what} is not a finite number at step {trainer.global_step}")
        self.history.append(row)
        better = self.best(task.score) is row
        if trainer.is_global_zero:
            if better:
                save_checkpoint(self.out / BEST, task.model, metrics=row, **self.saved)
                task.save_details(self.out)
            self._write_history(task)
            self._log(trainer, row)
            progress = f"epoch {row['epoch']}/{trainer.max_epochs}  train loss {row['train_loss']:.3f}"
            print(f"{progress}  {task.headline(row)}{'  best' if better else ''}", flush=True)

    def _write_history(self, task: Task) -> None:
        with atomic_write(self.out / "metrics.csv", "w") as file:
            writer = csv.DictWriter(file, self.history[0])
            writer.writeheader()
            writer.writerows(self.history)
        best = self.best(task.score)
        plots.save_curves(self.history, task.panels, f"val_{task.score}", best, self.out / "curves.png")


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt every few steps and after each epoch; Lightning calls it after all other callbacks."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Task, outputs: Any, batch: Any, index: int) -> None:
        stepped = (index + 1) % trainer.accumulate_grad_batches == 0
        # From a state saved after an epoch's last batch Lightning would resume without validating: not here, but below.
        if stepped and trainer.global_step % self.folder.save_every == 0 and not trainer.is_last_batch:
            self._save(trainer, task)

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: Task) -> None:
        self._save(trainer, task)

    def _save(self, trainer: lightning.Trainer, task: Task) -> None:
        # The loss was finite before the step; what the step made of the weights it has not seen yet.
        finite = torch.stack([p.isfinite().all() for p in task.parameters()]).all()
        if trainer.strategy.reduce((~finite).float(), reduce_op="max") > 0:
            self.folder.stop(trainer, f"a weight is not a finite number after step {trainer.global_step}")
        trainer.save_checkpoint(self.folder.out / LAST)


def _trainer(recipe: Recipe, folder: RunFolder) -> lightning.Trainer:
    """Lightning's Trainer.

    Raises:
        InputError: for a machine that is not as the recipe says.
    """
    run, optim = recipe.run, recipe.optim
    callbacks: list[Callback] = [folder]
    gpus = torch.cuda.device_count() if run.accelerator in ("auto", "gpu", "cuda") else 0
    processes = run.nodes * (max(gpus, 1) if run.devices == "auto" else run.devices)
    if optim.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=optim.ema_decay))
    try:
        return lightning.Trainer(
            accelerator=run.accelerator,
            devices=run.devices,
            num_nodes=run.nodes,
            # Statistics of batch normalisation are equal everywhere; broadcasting them would make processes with fewer
            # validation batches hang.
            strategy=DDPStrategy(broadcast_buffers=False) if processes > 1 else "auto",
            precision=run.precision,
            max_epochs=optim.epochs,
            check_val_every_n_epoch=run.validate_every,
            accumulate_grad_batches=optim.accumulate,
            gradient_clip_val=optim.clip_grad,
            callbacks=[*callbacks, LastCheckpoint(folder), ProgressBar()],
            plugins=[AtomicCheckpointIO()],
            logger=False,  # `folder` adds one when the run begins
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        fields = "accelerator", "devices", "nodes", "precision"
        named = [name for name in fields if re.search(rf"\b(num_)?{name}\b", str(error))]
        chosen = [name for name in fields if getattr(run, name) != getattr(Run, name)]
        flags = ", ".join(f"--run.{name} {getattr(run, name)}" for name in named or chosen or fields)
        raise InputError(f"{flags}: {reason(error)}") from error


def _share(recipe: Recipe, world: int) -> int:
    """Images in each batch of each process.

    Raises:
        InputError: where the batch cannot be divided, or Mixup cannot pair it.
    """
    optim, augment = recipe.optim, recipe.augment
    parts = optim.accumulate * world
    if optim.batch_size % parts:
        raise InputError(
            f"--optim.batch-size {optim.batch_size} cannot be shared by {world} processes and {optim.accumulate} "
            f"accumulated batches; give a multiple of {parts}"
        )
    share = optim.batch_size // parts
    if share % 2 and isinstance(recipe, Classification) and (augment.mixup > 0 or augment.cutmix > 0):
        raise InputError(
            f"--augment.mixup and --augment.cutmix mix pairs, but a batch of a process has {share} images; "
            f"give --optim.batch-size {(share + 1) * parts}"
        )
    return share


def fit(recipe: Recipe, out: Path, resume: bool = False) -> None:
    """Train, validate after each epoch, and leave everything in `out`.

    Args:
        recipe: the experiment
        out: folder of the run: recipe.json, metrics.csv, curves.png, tensorboard/, last.ckpt, best.safetensors, and
            what the task says of the best epoch (confusion.{png,csv}, evaluation.json, detections, the worst images)
        resume: continue the run in `out` where it was interrupted

    Raises:
        InputError: for anything that the user can mend.
    """
    quiet()
    check_ranges(recipe)
    if recipe.optim.epochs % recipe.run.validate_every:
        raise InputError(
            f"--run.validate-every {recipe.run.validate_every}: must divide --optim.epochs {recipe.optim.epochs}, "
            "so that the last epoch is validated"
        )
    main = rank_zero_only.rank == 0  # other processes run this too, after the first has begun to write
    stored = stored_recipe(out)
    if stored is not None and resume:
        check_resume(stored, recipe, out)
    elif main and any((out / name).exists() for name in RUN):
        raise InputError(f"{out} holds a run; continue it with --resume, or give another --out")
    last = out / LAST if resume and (out / LAST).is_file() else None
    if main and resume:
        print(f"resuming from {last}" if last else f"{out} holds nothing to resume from: starting from the beginning")

    tune_cpu()
    torch.manual_seed(recipe.run.seed)
    start = replace(recipe.model, pretrained=False, checkpoint=None) if last else recipe.model  # last.ckpt has it all
    setup = PREPARE[recipe.task](recipe, start)
    model = setup.model
    build_optimizer(model, recipe.optim)  # refuses a wrong name now, not after the images were read
    folder = RunFolder(
        out,
        recipe.run.save_every,
        task=recipe.task,
        class_names=setup.class_names,
        preprocessing=setup.preprocessing,
        recipe=to_dict(recipe),
        model_args=setup.model_args,
        category_ids=setup.category_ids,
    )
    trainer = _trainer(recipe, folder)
    share = _share(recipe, trainer.world_size)
    loaders = Loaders(setup.train, setup.val, recipe, share, resumed=last is not None)
    if trainer.world_size > 1:
        model = synchronise_batchnorm(model, trainer.strategy.root_device)
    if recipe.run.compile:
        model.compile()
    task = setup.build_task(model, loaders.steps_per_epoch)
    if main:
        parameters = sum(p.numel() for p in model.parameters())
        over = getattr(recipe, "detector", getattr(recipe, "segmenter", None))
        name = f"{over} over {recipe.model.name}" if over else recipe.model.name
        print(f"{name}: {parameters / 1e6:.2f} M parameters; classes: {len(setup.class_names)}")
        for line in (*setup.notes, *([setup.report] if setup.report else [])):
            print(line)
    trainer.fit(task, datamodule=loaders, ckpt_path=last, weights_only=True)
    if not trainer.state.finished:  # Lightning ends quietly when it is told to
        raise InputError(f"interrupted in epoch {trainer.current_epoch + 1}; continue with --resume --out {out}")
    best = folder.best(task.score)
    if main and best is not None:
        print(f"best: {task.headline(best)}, in epoch {best['epoch']} of {trainer.max_epochs}; all in {out}")
        print(f"  dualtoken-vit evaluate {out / BEST}")
        print(f"  dualtoken-vit predict {out / BEST} IMAGES --out {out / 'predictions'}")
