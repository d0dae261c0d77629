"""What every task shares: the network made from its recipe, the optimiser, and randomness that a resume repeats."""

import logging
import math
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Table
from torch import nn
from torch.utils.data import Dataset

from dualtoken_vit.checkpoint import LoadReport
from dualtoken_vit.data.sampling import mix
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Recipe, to_dict
from dualtoken_vit.tasks.optim import build_optimizer, build_schedule

# Smallest and largest value of fields whose type does not say it already.
RANGES = {
    "roi_samples": (4, math.inf),
    "width": (1, math.inf),
    "dropout": (0, 0.99),
    "model.drop_path_rate": (0, 0.99),
    "data.image_size": (1, math.inf),
    "data.start_size": (1, math.inf),
    "data.max_size": (1, math.inf),
    "data.limit": (1, math.inf),
    "data.crop_pct": (0.01, math.inf),
    "data.workers": (0, math.inf),
    "data.ignore_index": (0, 65535),
    "data.crop_size": (32, math.inf),
    "augment.multi_scale": (1, math.inf),
    "augment.scale": (1e-3, math.inf),
    "augment.class_cap": (1e-3, 1),
    "augment.photometric": (0, 1),
    "augment.label_smoothing": (0, 1),
    "augment.hflip": (0, 1),
    "augment.vflip": (0, 1),
    "augment.random_erasing": (0, 1),
    "augment.mixup": (0, math.inf),
    "augment.cutmix": (0, math.inf),
    "optim.lr": (1e-12, math.inf),
    "optim.warmup_epochs": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "optim.milestones": (1, math.inf),
    "optim.min_lr": (0, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.accumulate": (1, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.clip_grad": (1e-12, math.inf),
    "optim.layer_decay": (1e-12, 1),
    "optim.ema_decay": (0, 1),
    "run.seed": (0, 2**32 - 1),
    "run.devices": (1, math.inf),
    "run.nodes": (1, math.inf),
    "run.validate_every": (1, math.inf),
    "run.save_every": (1, math.inf),
}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as one level of "section.field"."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(recipe).items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def check_ranges(recipe: Recipe) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        InputError: names the first of them.
    """
    values = flatten(recipe)
    for name, (least, most) in RANGES.items():
        given = values.get(name)  # not every kind of recipe has it
        for value in given if isinstance(given, tuple) else (given,):
            if value in (None, "auto") or least <= value <= most:
                continue
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {limit}")


def quiet() -> None:
    """Silence what Lightning tells about its own workings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*resuming from a checkpoint that ended before the epoch ended.*",  # those of `fit` do resume
        r".*LeafSpec.*",
        r".*in eval mode at the start of training.*",  # a detector's frozen statistics
        r".*IterableDataset. has .__len__. defined.*",  # and each worker of ours has its own share
        r".*broadcast_buffers. is deprecated.*",  # its successor is not in every version of PyTorch that we support
        r".*srun. command is available.*",
    ):
        warnings.filterwarnings("ignore", message)


class ProgressBar(RichProgressBar):
    """Lightning's bar on stderr, where there is a terminal; epochs count from 1."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10 if sys.stderr.isatty() else 0, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: Trainer, task: LightningModule) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(trainer, task).items() if key != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))


class Task(LightningModule):
    """A network in training, and what validation says of it.

    A subclass adds `training_step`, `validation_step` and the methods and attributes without a value here.

    Args:
        model: a network
        recipe: the experiment
        steps_per_epoch: optimiser steps; the data module may still change them when it leaves out images
    """

    score: str
    """The validation metric that decides which epoch is the best; more is better."""
    panels: dict[str, dict[str, str]]
    """What `plots.save_curves` draws."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples; none: tensors are stacked."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps_per_epoch: int):
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.recipe.optim)
        schedule = build_schedule(optimizer, self.recipe.optim, self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout, drop path and mixup depend on the place in the run alone, not on what was drawn before."""
        seed = mix(self.recipe.run.seed, self.current_epoch, batch_idx, self.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  timm's Mixup draws from the global generator
        torch.manual_seed(seed)

    def prepare_epoch(self, train: Dataset, progress: float) -> None:
        """Adapt the training data to the share of the run that is done; called before each epoch's first batch."""

    def compute_metrics(self) -> dict[str, float]:
        """The metrics of the validation just done, over all processes; called on each of them, and once."""
        raise NotImplementedError

    def headline(self, row: dict[str, Any]) -> str:
        """The metrics of an epoch in a few words."""
        raise NotImplementedError

    def save_details(self, out: Path) -> None:
        """Write what the last validation gave beside the metrics into a folder."""
        raise NotImplementedError

    def evaluation(self) -> "Evaluation":
        """The last validation, to be told."""
        raise NotImplementedError


class Evaluation(Protocol):
    """What a network does on a validation set."""

    def to_json(self) -> dict[str, Any]: ...

    def table(self) -> Table: ...

    def headline(self) -> str: ...


@dataclass(frozen=True)
class Setup:
    """All that `fit` needs of one kind of task."""

    model: nn.Module
    train: Dataset
    val: Dataset
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    """`save_checkpoint`'s, and so are `model_args` and `category_ids`."""
    model_args: dict[str, Any]
    report: LoadReport | None
    """What was loaded to start from."""
    build_task: Callable[[nn.Module, int], Task]
    """Makes the task of the network, perhaps synchronised, and the optimiser steps an epoch."""
    category_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines to tell before the run."""
