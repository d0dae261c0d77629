"""Training by Lightning's Trainer: the run's folder, saving and resuming, what stops a run.

A resumed run repeats an uninterrupted one bit by bit on the CPU. Data and step-level randomness depend on the seed and
the place in the run alone; last.ckpt holds the rest (weights, averages, optimiser, schedule, progress, history).
"""

import csv
import json
import math
import pickle
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

from dualtoken_vit import plots
from dualtoken_vit.checkpoint import atomic_write, load_weights, save_checkpoint
from dualtoken_vit.cpu import tune_cpu
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.images import eval_transform, train_transform
from dualtoken_vit.data.sampling import loader
from dualtoken_vit.errors import InputError
from dualtoken_vit.optim import build_optimizer
from dualtoken_vit.recipes import Classification, from_dict, to_dict
from dualtoken_vit.tasks.base import ProgressBar, Task, check_ranges, create_model, quiet, synchronise_batchnorm
from dualtoken_vit.tasks.classification import ClassificationTask

RECIPE, LAST, BEST = "recipe.json", "last.ckpt", "best.safetensors"

# A resumed run may read its data elsewhere and run on other machines; anything else would make it another run.
FREE_ON_RESUME = ("data.root", "data.workers", "run.accelerator", "run.devices", "run.nodes", "run.save_every")

LOOK_EVERY = 50  # steps between two looks at the loss on a GPU, each of which makes it wait


def stored_recipe(out: Path) -> Classification | None:
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


def check_resume(stored: Classification, asked: Classification, out: Path) -> None:
    """Refuse settings that would make the resumed run another one.

    Raises:
        InputError: names the first of them.
    """
    sections = to_dict(stored)
    for section, fields in to_dict(asked).items():
        for key, value in fields.items():
            if value != sections[section][key] and f"{section}.{key}" not in FREE_ON_RESUME:
                flag = f"--{section}.{key}".replace("_", "-")
                raise InputError(
                    f"{flag} is {sections[section][key]} in the run in {out}, not {value}: a resumed run keeps its "
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
    """The batches of each process and epoch; `batch_size` is per process and accumulated batch."""

    def __init__(self, train: Dataset, val: Dataset, recipe: Classification, batch_size: int, steps_per_epoch: int):
        super().__init__()
        self.train, self.val = train, val
        self.recipe = recipe
        self.batch_size = batch_size
        self.batches_per_epoch = steps_per_epoch * recipe.optim.accumulate
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer validation pictures than processes

    def _arguments(self) -> dict[str, Any]:
        trainer, recipe = self.trainer, self.recipe
        place = dict(rank=trainer.global_rank, world=trainer.world_size)
        return dict(batch_size=self.batch_size, seed=recipe.run.seed, workers=recipe.data.workers, **place)

    def train_dataloader(self) -> _Batches:
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.processed if loop.restarting else 0
        batches = loader(self.train, train=True, epoch=self.trainer.current_epoch, skip=done, **self._arguments())
        return _Batches(batches, min(done + len(batches), self.batches_per_epoch))

    def val_dataloader(self) -> Any:
        return loader(self.val, train=False, **self._arguments())


class RunFolder(Callback):
    """Watches the loss, and keeps the history and the best weights in the run's folder.

    Must stand before weight averaging: it saves the averaged weights while those are in the model.
    """

    def __init__(self, out: Path, save_every: int, pictures: tuple[int, int], **saved: Any):
        self.out = out
        self.save_every = save_every
        self.pictures = pictures
        """Numbers of training and validation pictures, which a resumed run must find again."""
        self.saved = saved
        """Arguments of `save_checkpoint`."""
        self.history: list[dict[str, Any]] = []
        self.loss_sum: Any = 0.0  # over the epoch's batches, stays on the device
        self.batches = 0
        self.bad_step: Any = 0  # the first whose loss was not finite

    def best(self, score: str) -> dict[str, Any] | None:
        """The history's row with the highest validation metric `score`, the first of equals."""
        return max(self.history, key=lambda row: row[f"val_{score}"], default=None)

    def on_save_checkpoint(self, trainer: lightning.Trainer, task: Task, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {
            "history": self.history,
            "loss_sum": trainer.strategy.reduce(torch.as_tensor(self.loss_sum)).item(),  # mean over the processes
            "batches": self.batches,
            "pictures": list(self.pictures),
            "class_names": list(self.saved["class_names"]),
        }

    def on_load_checkpoint(self, trainer: lightning.Trainer, task: Task, checkpoint: dict[str, Any]) -> None:
        run = checkpoint["run"]
        self.history, self.loss_sum, self.batches = run["history"], run["loss_sum"], run["batches"]
        if run["pictures"] != list(self.pictures) or run["class_names"] != list(self.saved["class_names"]):
            raise InputError(
                f"the data changed since the run in {self.out} began: {run['pictures']} training and validation "
                f"pictures of {len(run['class_names'])} classes then, {list(self.pictures)} of "
                f"{len(self.saved['class_names'])} now; restore them, or start another run with --out"
            )

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
        if not math.isfinite(row["val_loss"]):
            self.stop(trainer, f"the validation loss is not a finite number at step {trainer.global_step}")
        score = f"val_{task.score}"
        best = self.best(task.score)
        better = best is None or row[score] > best[score]
        self.history.append(row)
        if trainer.is_global_zero:
            if better:
                self._save_best(task, row)
            self._write_history()
            trainer.logger.log_metrics({f"epoch/{key}": value for key, value in row.items()}, step=trainer.global_step)
            print(
                f"epoch {row['epoch']}/{trainer.max_epochs}  train loss {row['train_loss']:.3f}  "
                f"val loss {row['val_loss']:.3f}  top-1 {row['val_top1']:.1%}  top-5 {row['val_top5']:.1%}"
                f"{'  best' if better else ''}",
                flush=True,
            )

    def _save_best(self, task: Task, row: dict[str, Any]) -> None:
        names = self.saved["class_names"]
        save_checkpoint(self.out / BEST, task.model, metrics=row, **self.saved)
        with atomic_write(self.out / "confusion.csv", "w") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *names])
            writer.writerows([name, *counts] for name, counts in zip(names, task.confusion.tolist(), strict=True))
        plots.save_confusion(task.confusion, names, self.out / "confusion.png")

    def _write_history(self) -> None:
        with atomic_write(self.out / "metrics.csv", "w") as file:
            writer = csv.DictWriter(file, self.history[0])
            writer.writeheader()
            writer.writerows(self.history)
        plots.save_curves(self.history, self.out / "curves.png")


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


def _trainer(recipe: Classification, folder: RunFolder, steps_per_epoch: int) -> lightning.Trainer:
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
            limit_train_batches=steps_per_epoch * optim.accumulate,
            accumulate_grad_batches=optim.accumulate,
            gradient_clip_val=optim.clip_grad,
            callbacks=[*callbacks, LastCheckpoint(folder), ProgressBar()],
            plugins=[AtomicCheckpointIO()],
            logger=TensorBoardLogger(folder.out, name="", version="tensorboard"),
            log_every_n_steps=min(LOOK_EVERY, steps_per_epoch),
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise InputError(f"--run.accelerator {run.accelerator}: {str(error).splitlines()[0]}") from error


def _share(recipe: Classification, world: int) -> int:
    """Pictures in each batch of each process.

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
    if share % 2 and (augment.mixup > 0 or augment.cutmix > 0):
        raise InputError(
            f"--augment.mixup and --augment.cutmix mix pairs, but a batch of a process has {share} pictures; "
            f"give --optim.batch-size {(share + 1) * parts}"
        )
    return share


def _preprocessing(recipe: Classification, cfg: dict[str, Any]) -> dict[str, Any]:
    """timm's data config for the recipe's pictures, with the network's own mean and deviation."""
    data, channels = recipe.data, recipe.model.in_chans
    statistics = {key: tuple(cfg[key]) for key in ("mean", "std")}
    if channels != len(statistics["mean"]):
        statistics = {key: (sum(value) / len(value),) * channels for key, value in statistics.items()}
    size = (channels, data.image_size, data.image_size)
    return dict(input_size=size, interpolation=data.interpolation, crop_pct=data.crop_pct, **statistics)


def fit(recipe: Classification, out: Path, resume: bool = False) -> None:
    """Train, validate after each epoch, and leave everything in `out`.

    Args:
        recipe: the experiment
        out: folder of the run: recipe.json, metrics.csv, curves.png, confusion.{png,csv}, tensorboard/, last.ckpt,
            best.safetensors
        resume: continue the run in `out` where it was interrupted

    Raises:
        InputError: for anything that the user can mend.
    """
    quiet()
    check_ranges(recipe)
    main = rank_zero_only.rank == 0  # other processes run this too, after the first has begun to write
    stored = stored_recipe(out)
    if stored is not None and resume:
        check_resume(stored, recipe, out)
    elif main and any((out / name).exists() for name in (RECIPE, LAST, BEST)):
        raise InputError(f"{out} holds a run; continue it with --resume, or give another --out")
    last = out / LAST if resume and (out / LAST).is_file() else None
    if main and resume:
        print(f"resuming from {last}" if last else f"{out} holds nothing to resume from: starting from the beginning")

    tune_cpu()
    torch.manual_seed(recipe.run.seed)
    train, val = build_datasets(recipe.data, recipe.model.in_chans)
    names = tuple(train.class_names)
    if len(names) < 2:
        raise InputError(f"there is one class only, {names[0]!r}: nothing to tell apart")
    start = replace(recipe.model, pretrained=False, checkpoint=None) if last else recipe.model  # last.ckpt has it all
    model, model_args = create_model(start, len(names), recipe.data.image_size)
    build_optimizer(model, recipe.optim)  # refuses a wrong name now, not after the pictures were read
    report = load_weights(model, start.checkpoint) if start.checkpoint else None
    preprocessing = _preprocessing(recipe, model.pretrained_cfg)
    statistics = preprocessing["mean"], preprocessing["std"]
    train.transform = train_transform(recipe.data, recipe.augment, *statistics)
    val.transform = eval_transform(recipe.data, *statistics)
    skip = recipe.data.unreadable == "skip"
    if main or skip:
        for title, dataset in (("training", train), ("validation", val)):
            skipped = dataset.verify(skip=skip, progress=main)
            if main and skipped:
                print(f"skipped {skipped} unreadable {title} pictures")

    steps_per_epoch = len(train) // recipe.optim.batch_size
    if steps_per_epoch == 0:
        raise InputError(
            f"{len(train)} training pictures do not fill one batch of {recipe.optim.batch_size}; "
            f"give --optim.batch-size {len(train)} or less"
        )

    folder = RunFolder(
        out,
        recipe.run.save_every,
        (len(train), len(val)),
        task="classification",
        class_names=names,
        preprocessing=preprocessing,
        recipe=to_dict(recipe),
        model_args=model_args,
    )
    trainer = _trainer(recipe, folder, steps_per_epoch)
    share = _share(recipe, trainer.world_size)
    if trainer.world_size > 1:
        model = synchronise_batchnorm(model, trainer.strategy.root_device)
    if recipe.run.compile:
        model.compile()
    task = ClassificationTask(model, recipe, len(names), steps_per_epoch)
    if main:
        if stored is None or not resume:
            with atomic_write(out / RECIPE, "w") as file:
                json.dump(to_dict(recipe), file, indent=2)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{recipe.model.name}: {parameters / 1e6:.2f} M parameters, {len(names)} classes")
        print(f"{len(train)} training and {len(val)} validation pictures, {steps_per_epoch} steps an epoch")
        if report is not None:
            print(report)
    trainer.fit(task, datamodule=Loaders(train, val, recipe, share, steps_per_epoch), ckpt_path=last, weights_only=True)
    if not trainer.state.finished:  # Lightning ends quietly when it is told to
        raise InputError(f"interrupted in epoch {trainer.current_epoch + 1}; continue with --resume --out {out}")
    best = folder.best(task.score)
    if main and best is not None:
        print(f"best top-1 {best['val_top1']:.1%} in epoch {best['epoch']} of {len(folder.history)}; all in {out}")
        print(f"  dualtoken-vit evaluate {out / BEST}")
        print(f"  dualtoken-vit predict {out / BEST} PICTURES --out {out / 'predictions'}")
