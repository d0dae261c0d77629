"""Image classification: loss, mixing of images, metrics, prediction."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from annotated_types import Interval
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from dualtoken_vit.checkpoint import Checkpoint, load_weights
from dualtoken_vit.data.check import classification as data_check
from dualtoken_vit.data.classification import build_datasets, build_val_dataset
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.transforms import classification_eval, classification_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.models.backbone import check_size, pretrained_cfg, statistics
from dualtoken_vit.recipes import Classification, ClassificationInput, Model
from dualtoken_vit.results import Classes
from dualtoken_vit.show import plots
from dualtoken_vit.show.drawing import SIDE, draw_card, fit
from dualtoken_vit.tasks.base import Setup, Task, TaskModule
from dualtoken_vit.tasks.networks import create_model
from dualtoken_vit.tasks.predictor import Predictor, Report


@dataclass(frozen=True)
class ClassificationOptions(ClassificationInput):
    """How a classifier predicts."""

    top_k: Annotated[int, Interval(ge=1)] = 5
    """Classes to report for each image (all of them, if there are fewer)."""


class ClassificationPredictor(Predictor[Classes]):
    """A classifier: returns the `top_k` most likely classes of each image."""

    Options = ClassificationOptions

    def __init__(self, model: nn.Module, class_names: Any, preprocessing: dict[str, Any], options: Any):
        super().__init__(model, class_names, preprocessing, options)
        if options.image_size != preprocessing["input_size"][-1]:
            check_size(model, self.channels, options.image_size)
        self.transform = classification_eval(options, tuple(preprocessing["mean"]), tuple(preprocessing["std"]))

    @classmethod
    def stored_options(cls, data: Any, preprocessing: dict[str, Any]) -> dict[str, Any]:
        given = {key: preprocessing[key] for key in ("crop_pct", "interpolation")}
        return given | {"image_size": preprocessing["input_size"][-1]}

    def preprocess(self, image: Image.Image) -> Tensor:  # -> (C, S, S), normalised
        return self.transform(image)

    def collate(self, inputs: list[Tensor]) -> Tensor:  # -> (B, C, S, S)
        return torch.stack(inputs)

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> Tensor:  # (B, C, S, S) -> logits (B, classes)
        return self.model(batch.to(self.device).contiguous(memory_format=torch.channels_last)).float()

    def postprocess(self, outputs: Tensor) -> list[Classes]:
        probabilities = outputs.softmax(-1).cpu()
        if probabilities.isnan().any():
            raise InputError("the network produced NaN or Inf; use another checkpoint")
        top, labels = probabilities.topk(min(self.options.top_k, len(self.class_names)))
        return [
            Classes(tuple(self.class_names[label] for label in row.tolist()), row.numpy(), shares.numpy())
            for row, shares in zip(labels, top, strict=True)
        ]


class ClassificationReport(Report[Classes]):
    """The classes of each image with their probabilities."""

    def __init__(self, predictor: ClassificationPredictor):
        super().__init__(predictor)
        self.predictions: list[dict[str, Any]] = []

    def add(self, path: Path, image: Image.Image, result: Classes) -> None:
        pairs = zip(result.names, result.probabilities.tolist(), strict=True)
        classes = [{"class": name, "probability": probability} for name, probability in pairs]
        self.predictions.append({"image": str(path), "classes": classes})

    def draw(
        self, title: str, image: Image.Image, result: Classes
    ) -> tuple[Image.Image, Image.Image, tuple[str, float | None]]:
        small = fit(image, SIDE)
        top = list(zip(result.names, result.probabilities.tolist(), strict=True))
        return draw_card(small, title, top), small, top[0]

    def record(self) -> dict[str, Any]:
        return {"predictions": self.predictions}

    def table(self) -> Table:
        table = Table("image", "class", "", box=box.SIMPLE_HEAD)
        table.columns[0].overflow = "fold"
        for prediction in self.predictions:
            name = printable(prediction["image"])
            for rank, one in enumerate(prediction["classes"]):
                style = "dim" if rank else "bold"
                share = Text(f"{one['probability']:.1%}", style, justify="right")
                table.add_row(Text("" if rank else name), Text(printable(one["class"]), style), share)
            table.add_section()
        return table


class ClassificationModule(TaskModule):
    """Cross-entropy over (images (B, C, S, S), targets (B,)), with the recipe's Mixup and CutMix."""

    score = "top1"

    def __init__(
        self,
        predictor: ClassificationPredictor,
        recipe: Classification,
        steps_per_epoch: int = 1,
        train_transform: Callable[[float], Callable] | None = None,
    ):
        super().__init__(predictor, recipe, steps_per_epoch)
        self.panels = {
            "loss": {"train_loss": "training", "val_loss": "validation"},
            "accuracy (%)": {"val_top1": "top-1", "val_top5": "top-5"},
        }
        self.class_names = predictor.class_names
        self.train_transform = train_transform
        """The transform of training images at a completed share of the run."""
        num_classes = len(self.class_names)
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
        """(classes, classes): images by true class (row) and predicted class (column), of the last validation."""
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
        logits = self.predictor.forward(x)
        self.metrics.update(logits, target)
        self.loss.update(F.cross_entropy(logits, target), len(x))

    def prepare_epoch(self, train: ImageData, progress: float) -> None:
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
    """Metrics of a classifier on a validation set; shares are between 0 and 1."""

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
        for name, (accuracy, count) in self.per_class.items():
            table.add_row(Text(printable(name)), str(count) if count else "absent", f"{accuracy:.1%}" if count else "-")
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


class ClassificationTask(Task[Classification]):
    name = "classification"
    recipe = Classification
    predictor = ClassificationPredictor
    report = ClassificationReport
    data_flags = "--data.root DIR [--data.val-split NAME]"

    def prepare(self, recipe: Classification, start: Model) -> Setup:
        train, val = build_datasets(recipe.data, recipe.model.in_chans)
        names = tuple(train.class_names)
        if len(names) < 2:
            raise InputError(f"there is only one class, {names[0]!r}; classification needs two or more")
        model, model_args = create_model(start, len(names), recipe.data.image_size)
        preprocessing = _preprocessing(recipe, pretrained_cfg(model))
        at = partial(classification_train, recipe.data, recipe.augment, preprocessing["mean"], preprocessing["std"])
        train.transform = at(0.0)  # rejects a wrong policy now
        options = ClassificationPredictor.make_options(**self.predictor.stored_options(recipe.data, preprocessing))
        predictor = ClassificationPredictor(model, names, preprocessing, options)
        val.transform = predictor.preprocess
        return Setup(
            title=recipe.model.name,
            model=model,
            train=train,
            val=val,
            class_names=names,
            preprocessing=preprocessing,
            model_args=model_args,
            report=load_weights(model, start.checkpoint, names) if start.checkpoint else None,
            build_module=lambda steps: ClassificationModule(predictor, recipe, steps, at),
        )

    def rebuild(self, checkpoint: Checkpoint) -> nn.Module:
        return timm.create_model(checkpoint.model, **checkpoint.model_args)

    def evaluation(
        self, predictor: ClassificationPredictor, recipe: Classification
    ) -> tuple[ClassificationModule, ImageData]:
        val = build_val_dataset(recipe.data, predictor.channels, predictor.class_names)
        val.transform = predictor.preprocess
        if recipe.data.unreadable == "skip":
            val.verify(skip=True)
        return ClassificationModule(predictor, recipe), val

    def check_data(self, recipe: Classification, out: Path) -> bool:
        return data_check.check(recipe, out)

    def share_fault(self, recipe: Classification, share: int) -> str:
        if share % 2 and (recipe.augment.mixup > 0 or recipe.augment.cutmix > 0):
            return "--augment.mixup and --augment.cutmix mix pairs"
        return ""


TASK = ClassificationTask()
