"""Object detection and instance segmentation: losses, COCO's average precision; what training and evaluation need."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from dualtoken_vit.checkpoint import Checkpoint, load_weights
from dualtoken_vit.data.coco import MIN_SIDE, DetectionDataset, build_datasets, build_val_dataset, collate
from dualtoken_vit.data.transforms import detection_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.models.backbone import statistics
from dualtoken_vit.models.detectors import build_detector
from dualtoken_vit.recipes import Detection, Model, model_kwargs
from dualtoken_vit.show import plots
from dualtoken_vit.tasks.base import Setup, Task
from dualtoken_vit.tasks.coco_eval import CURVES, FIGURES, Score, evaluate, save_results, to_results
from dualtoken_vit.tasks.distributed import gather
from dualtoken_vit.tasks.networks import create_network

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionTask(Task):
    """The detector's own losses over (images, targets) as `data.coco` gives them; COCO's figures in validation.

    Args:
        model: of `build_detector`
        recipe: the experiment
        val: the validation images, whose objects are what is compared with
        steps_per_epoch: optimiser steps
    """

    collate = staticmethod(collate)

    def __init__(self, model: nn.Module, recipe: Detection, val: DetectionDataset, steps_per_epoch: int = 1):
        super().__init__(model, recipe, steps_per_epoch)
        self.val = val
        self.masks = recipe.detector == "mask-rcnn"
        self.kinds = ("box", "mask") if self.masks else ("box",)
        self.score = f"{self.kinds[-1]}_AP"
        self.panels = {"loss": {"train_loss": "training"}} | {
            f"{kind} AP (%)": {f"val_{kind}_{name}": name for name in ("AP", "AP50", "AP75")} for kind in self.kinds
        }
        self.found: dict[int, list[dict[str, Any]]] = {}
        """Image id: COCO results, of the validation that is under way."""
        self.results: dict[int, list[dict[str, Any]]] = {}
        """The same of the last validation, over all processes."""
        self.scores: dict[str, Score] = {}
        """Of the last validation."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model([image / 255 for image in images], targets)
        loss = sum(losses.values())
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(images))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        for target, found in zip(targets, self.model([image / 255 for image in images]), strict=True):
            self.found[target["image_id"]] = to_results(target["image_id"], found, self.val.category_ids)

    def compute_metrics(self) -> dict[str, float]:
        self.results, self.found = gather(self.found), {}
        self.scores = evaluate(self.val.truth, self.results, self.masks)
        return {
            f"val_{kind}_{name}": round(score.figures[name], 6)
            for kind, score in self.scores.items()
            for name in FIGURES
        }

    def headline(self, row: dict[str, Any]) -> str:
        return "  ".join(
            f"{kind} AP {_percent(row[f'val_{kind}_AP'])} AP50 {_percent(row[f'val_{kind}_AP50'])}"
            for kind in self.kinds
        )

    def save_details(self, out: Path) -> None:
        """evaluation.json, COCO's result files and the precision-recall curves of the last validation."""
        per_class = {kind: score.per_class for kind, score in self.scores.items()}
        with atomic_write(out / "evaluation.json", "w") as file:
            json.dump(self.evaluation().to_json() | {"per_class": per_class}, file, indent=2)
        save_results(out, self.results, self.masks)
        for kind, score in self.scores.items():
            plots.save_precision_recall(
                precision_recall(score, self.val.class_names),
                f"{kind}: precision against recall",
                out / f"pr-{kind}.png",
            )

    def evaluation(self) -> "DetectionEvaluation":
        return DetectionEvaluation(self.scores, len(self.results))


def precision_recall(score: Score, class_names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{label: (recall, precision)}: the mean over the classes at the IoUs of `CURVES`; at 0.5 each class, if few."""
    recall = np.linspace(0, 1, 101)
    there = (score.precision[0] > -1).any(1)  # classes of which there are objects
    curves = {
        f"all classes, IoU {iou}": (recall, precision[there].mean(0))
        for iou, precision in zip(CURVES, score.precision, strict=True)
        if there.any()
    }
    if 1 < len(class_names) <= 10:
        curves |= {
            f"{name}, IoU {CURVES[0]}": (recall, score.precision[0, label])
            for label, name in enumerate(class_names)
            if there[label]
        }
    return curves


@dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector does on a validation set; shares are between 0 and 1, -1 where there is no true object."""

    scores: dict[str, Score]
    """By kind, "box" and "mask"."""
    images: int

    def to_json(self) -> dict[str, Any]:
        return {kind: score.figures for kind, score in self.scores.items()} | {"images": self.images}

    def table(self) -> Table:
        table = Table("class", *(f"{kind} AP" for kind in self.scores))
        for name in self.scores["box"].per_class:
            table.add_row(Text(name), *(_percent(score.per_class[name]) for score in self.scores.values()))
        table.add_section()
        for figure in FIGURES:
            table.add_row(figure, *(_percent(score.figures[figure]) for score in self.scores.values()))
        return table

    def headline(self) -> str:
        shares = ", ".join(f"{kind} AP {_percent(score.figures['AP'])}" for kind, score in self.scores.items())
        return f"{shares}, {self.images} images"


def _percent(share: float) -> str:
    return "-" if share < 0 else f"{share:.1%}"


def prepare(recipe: Detection, start: Model) -> Setup:
    """The recipe's data and detector, whose backbone or whole starts as `start` says.

    Raises:
        InputError: for whatever is wrong with them.
    """
    masks = recipe.detector == "mask-rcnn"
    train, val = build_datasets(recipe.data, masks, start.in_chans)
    train.transform = detection_train(recipe.augment.hflip, recipe.augment.photometric)
    if not train.trained:
        raise InputError(f"{train.name}: no object to train on; see check-data")
    notes: tuple[str, ...] = ()
    if train.dropped:
        notes += (f"{train.dropped} objects with less than {MIN_SIDE:g} pixel in the image are not trained on",)
    if not (recipe.model.checkpoint or recipe.model.pretrained):
        notes += (
            "the backbone starts from random weights, and its batch normalisation, which a detector keeps as it is, "
            "normalises nothing: give --model.checkpoint or --model.pretrained if you can",
        )
    args = model_kwargs(start)
    network = create_network(start, 0, **args)
    made = dict(
        detector=recipe.detector,
        image_size=recipe.data.image_size,
        max_size=recipe.data.max_size,
        roi_samples=recipe.roi_samples,
        **statistics(network.pretrained_cfg, start.in_chans),
    )
    model = build_detector(
        model=network, num_classes=len(train.class_names), multi_scale=recipe.augment.multi_scale, **made
    )
    size = recipe.data.image_size
    return Setup(
        model=model,
        train=train,
        val=val,
        class_names=train.class_names,
        preprocessing=dict(input_size=(start.in_chans, size, size), mean=made["mean"], std=made["std"]),
        model_args={**args, **made},
        report=load_weights(model, start.checkpoint, train.class_names) if start.checkpoint else None,
        category_ids=tuple(train.category_ids),
        notes=notes,
        build_task=lambda model, steps: DetectionTask(model, recipe, val, steps),
    )


def prepare_evaluation(
    model: nn.Module, stored: Checkpoint, recipe: Detection
) -> tuple[DetectionTask, DetectionDataset]:
    """A trained detector as a task, and the recipe's validation images."""
    val = build_val_dataset(
        recipe.data, recipe.detector == "mask-rcnn", stored.preprocessing["input_size"][0], stored.class_names
    )
    model.transform.min_size, model.transform.max_size = (recipe.data.image_size,), recipe.data.max_size
    return DetectionTask(model, recipe, val), val
