"""Image classification: loss, mixing of pictures, metrics; and the evaluation of what was trained."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from dualtoken_vit.checkpoint import load_model
from dualtoken_vit.cpu import tune_cpu
from dualtoken_vit.data.classification import build_val_dataset
from dualtoken_vit.data.images import eval_transform
from dualtoken_vit.data.sampling import loader
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, from_dict
from dualtoken_vit.tasks.base import ProgressBar, Task, check_ranges, check_size, first_line, quiet


class ClassificationTask(Task):
    """Cross-entropy over (pictures (B, C, S, S), targets (B,)), with Mixup and CutMix as the recipe says."""

    score = "top1"

    def __init__(self, model: nn.Module, recipe: Classification, num_classes: int, steps_per_epoch: int = 1):
        super().__init__(model, recipe, steps_per_epoch)
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
        """Pictures of each class (row) that were taken for each class (column), of the last validation."""

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

    def compute_metrics(self) -> dict[str, float]:
        metrics = self.metrics.compute()
        self.confusion = metrics.pop("confusion").cpu().numpy()
        values = {"val_loss": self.loss.compute(), **{f"val_{name}": value for name, value in metrics.items()}}
        self.metrics.reset()
        self.loss.reset()
        return {name: round(value.item(), 6) for name, value in values.items()}


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a validation set; shares are between 0 and 1."""

    top1: float
    top5: float
    loss: float
    images: int
    per_class: dict[str, tuple[float, int]]
    """Class: (top-1 accuracy, pictures)."""


def evaluate(
    checkpoint: Path,
    *,
    data: dict[str, Any] | None = None,
    batch_size: int | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> Evaluation:
    """Run a best.safetensors over its validation pictures, prepared as the file says.

    Args:
        checkpoint: the file
        data: fields of `recipes.Data` that are to differ from the stored ones, for example root
        batch_size: pictures at a time; by default as many as in training
        accelerator: Lightning's
        precision: Lightning's

    Raises:
        InputError: for a file or data that cannot be used.
    """
    quiet()
    tune_cpu()
    model, stored = load_model(checkpoint)
    if stored.task != "classification":
        raise InputError(f"{checkpoint} is a model for {stored.task}; evaluate takes classification")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    try:
        recipe = from_dict(stored.recipe)
    except TypeError as error:
        raise InputError(f"{checkpoint} was written by another version of dualtoken-vit: {error}") from error
    recipe = replace(recipe, data=replace(recipe.data, **(data or {})))
    check_ranges(recipe)
    channels = stored.preprocessing["input_size"][0]
    check_size(model, channels, recipe.data.image_size)
    dataset = build_val_dataset(recipe.data, channels, stored.class_names)
    dataset.transform = eval_transform(recipe.data, stored.preprocessing["mean"], stored.preprocessing["std"])
    if recipe.data.unreadable == "skip":
        dataset.verify(skip=True)
    task = ClassificationTask(model, recipe, len(stored.class_names))
    try:
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            callbacks=[ProgressBar()],
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(f"--accelerator {accelerator}, --precision {precision}: {first_line(error)}") from error
    batches = loader(
        dataset,
        batch_size or recipe.optim.batch_size // recipe.optim.accumulate,
        train=False,
        seed=recipe.run.seed,
        workers=recipe.data.workers,
    )
    trainer.validate(task, batches, verbose=False)
    metrics = task.compute_metrics()
    counts = task.confusion.sum(1)
    right = task.confusion.diagonal() / np.maximum(counts, 1)
    return Evaluation(
        top1=metrics["val_top1"],
        top5=metrics["val_top5"],
        loss=metrics["val_loss"],
        images=int(counts.sum()),
        per_class=dict(zip(stored.class_names, zip(right.tolist(), counts.tolist(), strict=True), strict=True)),
    )
