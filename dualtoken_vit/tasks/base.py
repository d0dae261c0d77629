"""What a task is: one object with everything that the program needs to know about it."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import timm
import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from rich.text import Text
from torch import nn

from dualtoken_vit.checkpoint import Checkpoint
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.sampling import Prepare, mix
from dualtoken_vit.errors import InputError, OutOfMemory, first_line, lacks_memory, naming_memory
from dualtoken_vit.files import printable, write_json
from dualtoken_vit.recipes import Model, Recipe
from dualtoken_vit.tasks.optim import build_optimizer, schedule_factor
from dualtoken_vit.tasks.predictor import Predictor

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a network on a validation set; shares are between 0 and 1."""

    scores: dict[str, float]
    """Columns of metrics.csv, where their names start with val_."""
    metrics: dict[str, Any]
    """For JSON, with the number of images as "images", and the metrics of each class as "per_class"."""
    headline: str
    """The main metrics in a few words."""
    more: str = ""
    """Further ones, which the lines of training leave out."""
    columns: Sequence[str] = ()
    """Headings of the table."""
    classes: Sequence[Sequence[str]] = ()
    """A row of the table for each class, which starts with its name."""
    totals: Sequence[Sequence[str]] = ()
    """The rows below them."""
    notes: Sequence[str] = ()
    """Lines below the table."""
    fault: str = ""
    """Why its files could not be written, if they could not."""

    def table(self) -> Table:
        """The metrics for the terminal."""
        table = Table(*self.columns)
        for name, *cells in self.classes:
            table.add_row(Text(printable(name)), *cells)
        table.add_section()
        for row in self.totals:
            table.add_row(*row)
        return table


def rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics by name, to the six digits that files and JSON have."""
    return {name: round(value, 6) for name, value in metrics.items()}


def percent(share: float | None) -> str:
    """A metric in a table; "-" for one that is not defined: None, or negative."""
    return "-" if share is None or share < 0 else f"{share:.1%}"


class TaskModule(LightningModule):
    """A network in training and validation.

    `predictor` runs the network in validation, as it does after training. A subclass adds `training_step`,
    `validation_step`, the abstract methods and the attributes without a value here.
    """

    score: str  # the validation metric that selects the best epoch; higher is better
    panels: dict[str, dict[str, str]]  # what `plots.save_curves` draws
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of samples; None: tensors are stacked
    prepare_epoch: Prepare | None = None  # adapts the training data, in each process that reads them: picklable
    steps_per_epoch = 1  # optimiser steps; set by `Loaders`

    def __init__(self, predictor: Predictor[Any], recipe: Any):
        super().__init__()
        self.predictor = predictor
        self.model: nn.Module = predictor.model
        self.recipe = recipe

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.recipe.optim)
        factor = schedule_factor(self.recipe.optim, self.steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.weigh(self.trainer.datamodule.train)  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout, drop path and mixup by the position in the run alone, so that a resumed run repeats them."""
        seed = mix(self.recipe.run.seed, self.current_epoch, batch_idx, self.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  timm's Mixup draws from the global generator
        torch.manual_seed(seed)

    @property
    def check(self) -> bool:
        """Whether NaN is an error here: in training it stops the run elsewhere, naming the last good state."""
        return self.trainer.state.fn != TrainerFn.FITTING

    @property
    def forward_options(self) -> dict[str, Any]:
        """Of the predictor's `forward` in validation."""
        return {}

    def predict(self, images: Any, batch_idx: int) -> Any:
        """The predictor's outputs for a validation batch; an InputError names images that do not fit in memory."""
        try:
            with naming_memory(f"{self.predictor.memory_hint} (--data.*)"):
                return self.predictor.forward(images, **self.forward_options)
        except OutOfMemory as error:
            loader: Any = self.trainer.val_dataloaders
            if loader is None:  # before the first validation
                loader = self.trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            every = loader.dataset.image_names  # none of a stream
            names = [every[index] for index in loader.batch_sampler[batch_idx]] if every else ["validation images"]
            raise InputError(f"{', '.join(map(printable, names))}: {error}") from error

    def weigh(self, train: ImageData) -> None:
        """Set the weights of images and classes that the recipe asks for, after `verify`; or an InputError."""

    def cost(self, progress: float) -> float:
        """The time of a training step at that completed share of the run, relative to the first step's."""
        return 1.0

    def uncertainty(self, images: int) -> str:
        """How far the metrics of so few validation images can be trusted."""
        return "the metrics are uncertain"

    def evaluate(self) -> Evaluation:
        """The metrics of the validation just done, over all processes; called once on each of them."""
        raise NotImplementedError

    def save_details(self, out: Path, evaluation: Evaluation) -> None:
        """Write evaluation.json, and whatever else a task adds, of the validation just evaluated into a folder."""
        write_json(evaluation.metrics, out / "evaluation.json")


@dataclass(frozen=True)
class Setup:
    """Everything that training needs from a task."""

    title: str  # display name of the network
    module: TaskModule
    train: ImageData
    val: ImageData
    model_args: dict[str, Any]  # `save_checkpoint`'s


class Task(ABC, Generic[R]):
    """One kind of task, for example classification: the commands know nothing else about it."""

    name: ClassVar[str]  # as stored in recipes and checkpoints
    recipe: ClassVar[type[Recipe]]
    predictor: ClassVar[type[Predictor[Any]]]
    data_flags: ClassVar[str] = "--data.root DIR [--data.val-split NAME]"  # that name a dataset, for messages
    calibrates: ClassVar[bool] = False  # whether its probabilities have a temperature
    evaluation_options: ClassVar[dict[str, Any]] = {}  # of the predictor, where they differ from those of prediction

    @abstractmethod
    def prepare(self, recipe: R, start: Model) -> Setup:
        """Datasets and network, built from `start`, whose checkpoint the caller loads; or an InputError."""

    def rebuild(self, checkpoint: Checkpoint) -> nn.Module:
        """The network of a checkpoint, without its weights; by default timm's."""
        return timm.create_model(checkpoint.model, **checkpoint.model_args)

    def restore(self, checkpoint: Checkpoint, path: str | Path) -> nn.Module:
        """The trained network of a checkpoint in evaluation mode; an InputError with its path if it does not fit."""
        try:
            model = self.rebuild(checkpoint)
            model.load_state_dict(checkpoint.state_dict)
        except InputError:
            raise
        except Exception as error:  # its arguments may be anything
            if lacks_memory(error):
                raise
            reason = first_line(error)
            raise InputError(f"{path} does not fit timm {timm.__version__}'s {checkpoint.model}: {reason}") from error
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise InputError(f"{path} has weights that are NaN or Inf; use another checkpoint")
        return model.eval()

    @abstractmethod
    def evaluation(self, predictor: Any, recipe: R) -> tuple[TaskModule, ImageData]:
        """A network as a module, and the validation images, prepared by it; an InputError if they do not fit."""

    @abstractmethod
    def check_data(self, recipe: R, out: Path, augmented: bool = False) -> bool:
        """Read all data of a recipe, print a report and draw into `out`; returns whether there are no problems.

        `augmented`: draw the images as training sees them.
        """

    def relocate(self, recipe: R, given: dict[str, Any]) -> dict[str, Any]:
        """Fields of the data section that follow from `given`, fields that name other data than the stored recipe."""
        return {}

    def share_fault(self, recipe: R, share: int) -> str:
        """Why batches of `share` images per process cannot be trained on; "" if they can."""
        return ""
