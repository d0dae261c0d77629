"""Semantic segmentation: losses, metrics of one confusion matrix; what training and evaluation need."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from dualtoken_vit.checkpoint import Checkpoint, load_weights
from dualtoken_vit.data.masks import (
    SegmentationDataset,
    build_datasets,
    build_val_dataset,
    class_weights,
    collate,
)
from dualtoken_vit.data.transforms import IGNORE, segmentation_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.models.segmenters import View, build_segmenter, dilated, segment
from dualtoken_vit.recipes import Model, Segmentation, model_kwargs
from dualtoken_vit.show import plots
from dualtoken_vit.show.drawing import draw_scene, save_image
from dualtoken_vit.tasks.base import Setup, Task
from dualtoken_vit.tasks.distributed import gather, mean_over_processes
from dualtoken_vit.tasks.networks import create_network

AUX_WEIGHT = 0.4
WORST = 8  # images that are drawn
FIGURES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}

Batch = tuple[list[Tensor], list[Tensor]]


def cross_entropy(logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over the pixels that count, weighted by class if there are `weights` (classes,); 0 where none counts.

    Of several processes each divides by the mean of all their sums, so that their gradients' mean is that of one.
    """
    loss = F.cross_entropy(logits, mask, weights, ignore_index=IGNORE, reduction="sum")
    counts = mask != IGNORE
    if weights is not None:
        counts = weights[mask * counts] * counts
    return loss / mean_over_processes(counts.sum()).clamp(min=1e-6)


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix (row: true class, column: predicted one) in pixels comes to; shares are from 0 to 1."""

    miou: float
    """Mean over the classes that are in the truth or in a prediction."""
    pixel_accuracy: float
    mean_accuracy: float
    """Mean over the classes that are in the truth."""
    per_class: tuple[float | None, ...]
    """Intersection over union of each class; None where it is in neither."""

    @classmethod
    def of(cls, confusion: np.ndarray) -> "Scores":
        right, true = confusion.diagonal(), confusion.sum(1)
        union = true + confusion.sum(0) - right
        iou = right / np.maximum(union, 1)
        accuracy = right / np.maximum(true, 1)
        return cls(
            miou=float(iou[union > 0].mean()) if union.any() else 0.0,
            pixel_accuracy=float(right.sum() / max(true.sum(), 1)),
            mean_accuracy=float(accuracy[true > 0].mean()) if true.any() else 0.0,
            per_class=tuple(float(share) if pixels else None for share, pixels in zip(iou, union, strict=True)),
        )


class SegmentationTask(Task):
    """Cross-entropy of both heads over (images, masks) as `data.masks` gives them.

    Args:
        model: of `create_segmenter`
        recipe: the experiment
        val: the validation images, of which the worst are drawn
        steps_per_epoch: optimiser steps
    """

    score = "miou"
    panels: ClassVar = {
        "loss": {"train_loss": "training"},
        "validation (%)": {"val_miou": "mIoU", "val_pixel_accuracy": "pixels", "val_mean_accuracy": "mean of classes"},
    }
    collate = staticmethod(collate)

    def __init__(self, model: nn.Module, recipe: Segmentation, val: SegmentationDataset, steps_per_epoch: int = 1):
        super().__init__(model, recipe, steps_per_epoch)
        self.weights: Tensor | None = None
        """Of the classes in the loss, in a run of a recipe in which they are not equal."""
        self.val, self.view = val, view_of(recipe)
        self.metric = MulticlassConfusionMatrix(len(val.class_names), ignore_index=IGNORE, validate_args=False)
        self.found: dict[int, tuple[float, np.ndarray]] = {}
        """The worst images of the validation that is under way, by index: share of right pixels, labels (H, W)."""
        self.seen = 0
        """Images of this process in that validation."""
        self.worst: list[tuple[int, np.ndarray]] = []
        """Index and labels of the worst images of the last validation, the worst first."""
        self.confusion = np.zeros((len(val.class_names),) * 2, dtype=np.int64)
        """Pixels of each class (row) that were taken for each class (column), of the last validation."""

    def on_fit_start(self) -> None:
        """Look at what is in the training masks: a class that is in none cannot be learnt.

        Raises:
            InputError: where there are fewer than two classes.
        """
        pixels, names = self.trainer.datamodule.pixels, self.val.class_names
        if pixels is None and self.recipe.class_weights == "equal":  # a run that an older version began
            return
        if pixels is None:
            raise InputError(
                "an older version began this run, and did not keep the weights of the classes; start another with --out"
            )
        missing = [name for name, count in zip(names, pixels[0].tolist(), strict=True) if not count]
        if missing and self.trainer.is_global_zero:
            print(f"in no training mask: {', '.join(missing)}")
        if len(names) - len(missing) < 2:
            ignored = self.recipe.data.ignore_index
            raise InputError(
                f"the training masks hold one class only, beside {ignored}, which counts for nothing "
                "(--data.ignore-index); look at them with check-data"
            )
        if self.recipe.class_weights != "equal":
            self.weights = class_weights(self.recipe.class_weights, self.trainer.datamodule.pixels).to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = (torch.stack(each) for each in batch)
        masks = masks.long()
        found = self.model(images / 255)
        losses = {name: cross_entropy(logits, masks, self.weights) for name, logits in found.items()}
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(images))
        loss = losses["out"] + AUX_WEIGHT * losses["aux"]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, masks = batch
        # In training what is not a number stops the run elsewhere, on all processes and with the last good state named.
        check = self.trainer.state.fn != TrainerFn.FITTING
        labels = segment(self.model, [image / 255 for image in images], self.view, check=check)
        for found, mask in zip(labels, masks, strict=True):
            confusion = self.metric(found, mask.long())  # of this image
            index = self.trainer.global_rank + self.seen * self.trainer.world_size  # as `sampling.loader` deals them
            self.seen += 1
            right = (confusion.trace() / confusion.sum()).nan_to_num(1.0).item()  # nothing to be right about: no matter
            self.found[index] = right, found.byte().cpu().numpy()
            if len(self.found) > WORST:
                del self.found[max(self.found, key=lambda index: self.found[index][0])]

    def compute_metrics(self) -> dict[str, float]:
        self.confusion = self.metric.compute().cpu().numpy()
        self.metric.reset()
        by_share = sorted(gather(self.found).items(), key=lambda item: item[1][0])
        self.worst = [(index, labels) for index, (_, labels) in by_share[:WORST]]
        self.found, self.seen = {}, 0
        scores = Scores.of(self.confusion)
        return {f"val_{name}": round(getattr(scores, name), 6) for name in FIGURES}

    def headline(self, row: dict[str, Any]) -> str:
        return "  ".join(f"{about} {row[f'val_{name}']:.1%}" for name, about in FIGURES.items())

    def save_details(self, out: Path) -> None:
        """evaluation.json, the confusion matrix as confusion.{csv,png}, and the worst images beside their truth."""
        names = self.val.class_names
        with atomic_write(out / "evaluation.json", "w") as file:
            json.dump(self.evaluation().to_json(), file, indent=2)
        plots.save_confusion_csv(self.confusion, names, out / "confusion.csv")
        plots.save_confusion(self.confusion, names, out / "confusion.png", percent=True)
        for number, (index, labels) in enumerate(self.worst, start=1):
            image, truth = self.val.load(index)
            title = Path(self.val.paths[index]).name
            panels = [(title, image, None), ("truth", image, truth), ("prediction", image, labels)]
            save_image(draw_scene(panels, names), out / "worst" / f"{number}.png")

    def evaluation(self) -> "SegmentationEvaluation":
        return SegmentationEvaluation(Scores.of(self.confusion), self.val.class_names, len(self.val))


@dataclass(frozen=True)
class SegmentationEvaluation:
    """What a segmenter does on a validation set."""

    scores: Scores
    class_names: tuple[str, ...]
    images: int

    def to_json(self) -> dict[str, Any]:
        shares = zip(self.class_names, self.scores.per_class, strict=True)
        per_class = {name: None if share is None else round(share, 6) for name, share in shares}
        figures = {name: round(getattr(self.scores, name), 6) for name in FIGURES}
        return figures | {"per_class": per_class, "images": self.images}

    def table(self) -> Table:
        table = Table("class", "IoU")
        for name, share in zip(self.class_names, self.scores.per_class, strict=True):
            table.add_row(Text(name), "-" if share is None else f"{share:.1%}")
        table.add_section()
        for name, about in FIGURES.items():
            table.add_row(about, f"{getattr(self.scores, name):.1%}")
        return table

    def headline(self) -> str:
        shares = ", ".join(f"{about} {getattr(self.scores, name):.2%}" for name, about in FIGURES.items())
        return f"{shares}, {self.images} images"


def view_of(recipe: Segmentation) -> View:
    """How the recipe has images looked at in evaluation."""
    return View(**{field.name: getattr(recipe.data, field.name) for field in fields(View)})


def prepare(recipe: Segmentation, start: Model) -> Setup:
    """The recipe's data and segmenter, whose backbone or whole starts as `start` says.

    Raises:
        InputError: for whatever is wrong with them.
    """
    if recipe.optim.batch_size // recipe.optim.accumulate < 2:
        raise InputError(
            f"--optim.batch-size {recipe.optim.batch_size}: batch normalisation of what is pooled over a whole image "
            "needs 2 or more images in each accumulated batch"
        )
    view_of(recipe)  # refuses what cannot be, now
    train, val = build_datasets(recipe.data, start.in_chans)
    train.transform = segmentation_train(recipe.data, recipe.augment)
    args = model_kwargs(start)
    network = dilated(lambda **made: create_network(start, 0, **{**args, **made}), recipe.output_stride)
    head = dict(output_stride=recipe.output_stride, width=recipe.width, dropout=recipe.dropout)
    model = build_segmenter(recipe.segmenter, network, len(train.class_names), in_chans=start.in_chans, **head)
    statistics = {name: getattr(model, name).flatten().tolist() for name in ("mean", "std")}
    return Setup(
        model=model,
        train=train,
        val=val,
        class_names=train.class_names,
        preprocessing=dict(input_size=(start.in_chans, *recipe.data.crop_size), **statistics),
        model_args={**args, "segmenter": recipe.segmenter, **head},
        report=load_weights(model, start.checkpoint, train.class_names) if start.checkpoint else None,
        build_task=lambda model, steps: SegmentationTask(model, recipe, val, steps),
    )


def prepare_evaluation(
    model: nn.Module, stored: Checkpoint, recipe: Segmentation
) -> tuple[SegmentationTask, SegmentationDataset]:
    """A trained segmenter as a task, and the recipe's validation images.

    Raises:
        InputError: for data that cannot be used, or of other classes.
    """
    val = build_val_dataset(recipe.data, stored.preprocessing["input_size"][0], stored.class_names)
    return SegmentationTask(model, recipe, val), val
