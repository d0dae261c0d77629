"""Image classification: loss, mixing of images, metrics; what training and evaluation need."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from dualtoken_vit.checkpoint import Checkpoint, load_weights
from dualtoken_vit.data.classification import build_datasets, build_val_dataset
from dualtoken_vit.data.transforms import classification_eval, classification_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.models.backbone import check_size, statistics
from dualtoken_vit.recipes import Classification, Model
from dualtoken_vit.show import plots
from dualtoken_vit.tasks.base import Setup, Task
from dualtoken_vit.tasks.networks import create_model


class ClassificationTask(Task):
    """Cross-entropy over (images (B, C, S, S), targets (B,)), with Mixup and CutMix as the recipe says."""

    score = "top1"
    panels: ClassVar = {
        "loss": {"train_loss": "training", "val_loss": "validation"},
        "accuracy (%)": {"val_top1": "top-1", "val_top5": "top-5"},
    }

    def __init__(
        self,
        model: nn.Module,
        recipe: Classification,
        class_names: tuple[str, ...],
        steps_per_epoch: int = 1,
        train_transform: Callable[[float], Callable] | None = None,
    ):
        super().__init__(model, recipe, steps_per_epoch)
        self.class_names = class_names
        self.train_transform = train_transform
        """The transform of training images at a share of the run."""
        num_classes = len(class_names)
        augment = recipe.augment
        self.mixup = None
        if augment.mixup > 0 or augment.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
        top5 = min(5, num_classes)
        self.metrics = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=top5, average="micro"),
                "confusion": MulticlassConfusionMatrix(num_classes),
            },
            compute_groups=False,
        )
        self.loss = MeanMetric()
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        """Images of each class (row) that were taken for each class (column), of the last validation."""
        self.last: dict[str, float] = {}
        """Its other metrics."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, S, S) -> (B, num_classes)
        return self.model(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        smoothing = self.recipe.augment.label_smoothing
        if self.mixup is not None:
            x, target = self.mixup(x, target)  # the targets become smoothed probabilities
            smoothing = 0.0
        loss = F.cross_entropy(self(x), target, label_smoothing=smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, target = batch
        logits = self(x).float()
        self.metrics.update(logits, target)
        self.loss.update(F.cross_entropy(logits, target), len(x))

    def prepare_epoch(self, train: Dataset, progress: float) -> None:
        if self.train_transform is not None:
            train.transform = self.train_transform(progress)

    def compute_metrics(self) -> dict[str, float]:
        metrics = self.metrics.compute()
        self.confusion = metrics.pop("confusion").cpu().numpy()
        values = {"loss": self.loss.compute(), **metrics}
        self.metrics.reset()
        self.loss.reset()
        self.last = {name: round(value.item(), 6) for name, value in values.items()}
        return {f"val_{name}": value for name, value in self.last.items()}

    def headline(self, row: dict[str, Any]) -> str:
        return f"val loss {row['val_loss']:.3f}  top-1 {row['val_top1']:.1%}  top-5 {row['val_top5']:.1%}"

    def save_details(self, out: Path) -> None:
        """evaluation.json, and the confusion matrix as confusion.csv and confusion.png."""
        result = self.evaluation()
        with atomic_write(out / "evaluation.json", "w") as file:
            json.dump(result.to_json() | {"per_class": result.per_class}, file, indent=2)
        plots.save_confusion_csv(self.confusion, self.class_names, out / "confusion.csv")
        plots.save_confusion(self.confusion, self.class_names, out / "confusion.png")

    def evaluation(self) -> "ClassificationEvaluation":
        counts = self.confusion.sum(1)
        right = self.confusion.diagonal() / np.maximum(counts, 1)
        pairs = zip(right.tolist(), counts.tolist(), strict=True)
        return ClassificationEvaluation(
            **self.last, images=int(counts.sum()), per_class=dict(zip(self.class_names, pairs, strict=True))
        )


@dataclass(frozen=True)
class ClassificationEvaluation:
    """What a classifier does on a validation set; shares are between 0 and 1."""

    top1: float
    top5: float
    loss: float
    images: int
    per_class: dict[str, tuple[float, int]]
    """Class: (top-1 accuracy, images)."""

    def to_json(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "images": self.images}

    def table(self) -> Table:
        table = Table("class", "images", "top-1")
        for name, (accuracy, imgs) in self.per_class.items():
            table.add_row(Text(name), str(imgs), f"{accuracy:.1%}" if imgs else "-")
        table.add_section()
        table.add_row("all", str(self.images), f"{self.top1:.1%}")
        return table

    def headline(self) -> str:
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f}, {self.images} images"


def _preprocessing(recipe: Classification, cfg: dict[str, Any]) -> dict[str, Any]:
    """timm's data config for the recipe's images, with the network's own mean and deviation."""
    data, channels = recipe.data, recipe.model.in_chans
    size = (channels, data.image_size, data.image_size)
    return dict(input_size=size, interpolation=data.interpolation, crop_pct=data.crop_pct, **statistics(cfg, channels))


def prepare(recipe: Classification, start: Model) -> Setup:
    """The recipe's images and network, which starts as `start` says.

    Raises:
        InputError: for whatever is wrong with them.
    """
    train, val = build_datasets(recipe.data, recipe.model.in_chans)
    names = tuple(train.class_names)
    if len(names) < 2:
        raise InputError(f"there is one class only, {names[0]!r}: nothing to tell apart")
    model, model_args = create_model(start, len(names), recipe.data.image_size)
    preprocessing = _preprocessing(recipe, model.pretrained_cfg)
    scale = preprocessing["mean"], preprocessing["std"]
    at = partial(classification_train, recipe.data, recipe.augment, *scale)
    train.transform = at(0.0)  # refuses a wrong policy now
    val.transform = classification_eval(recipe.data, *scale)
    return Setup(
        model=model,
        train=train,
        val=val,
        class_names=names,
        preprocessing=preprocessing,
        model_args=model_args,
        report=load_weights(model, start.checkpoint, names) if start.checkpoint else None,
        build_task=lambda model, steps: ClassificationTask(model, recipe, names, steps, at),
    )


def prepare_evaluation(
    model: nn.Module, stored: Checkpoint, recipe: Classification
) -> tuple[ClassificationTask, Dataset]:
    """A trained network as a task, and the recipe's validation images, prepared as the checkpoint says.

    Raises:
        InputError: for images that do not fit.
    """
    channels = stored.preprocessing["input_size"][0]
    check_size(model, channels, recipe.data.image_size)
    val = build_val_dataset(recipe.data, channels, stored.class_names)
    val.transform = classification_eval(recipe.data, stored.preprocessing["mean"], stored.preprocessing["std"])
    if recipe.data.unreadable == "skip":
        val.verify(skip=True)
    return ClassificationTask(model, recipe, stored.class_names), val
