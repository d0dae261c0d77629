"""Image classification: loss, mixing of images, metrics, prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from timm.data import ImageNetInfo, Mixup
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.functional.classification import binary_calibration_error

from dualtoken_vit.data.balance import class_weights, image_weights
from dualtoken_vit.data.check import classification as data_check
from dualtoken_vit.data.classification import ImageDataset, build_datasets, build_val_dataset
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.transforms import classification_eval, classification_train, train_size
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import check_finite, check_size, pretrained_cfg, statistics
from dualtoken_vit.recipes import Classification, ClassificationInput, Distill, Model, MultiLabel
from dualtoken_vit.results import Classes
from dualtoken_vit.runtime.report import ClassesReport
from dualtoken_vit.show import plots
from dualtoken_vit.tasks.base import Evaluation, Setup, Task, TaskModule, percent, rounded
from dualtoken_vit.tasks.calibration import BINS
from dualtoken_vit.tasks.distill import Teacher, distillation_loss, load_teacher
from dualtoken_vit.tasks.networks import create_model
from dualtoken_vit.tasks.predictor import Predictor, Result

FEW = 20  # classes: top-5 is then close to 100 %, and would flatten the curve of top-1


@dataclass(frozen=True)
class ClassificationOptions(ClassificationInput):
    """How a classifier predicts."""

    top_k: Annotated[int, Interval(ge=1)] = 5
    """Classes to report for each image (all of them, if there are fewer)."""


class ImagePredictor(Predictor[Result]):
    """A network that maps whole images to logits."""

    def __init__(self, model: nn.Module, class_names: Any, preprocessing: dict[str, Any], options: Any):
        super().__init__(model, class_names, preprocessing, options)
        if options.image_size != preprocessing["input_size"][-1]:
            check_size(model, self.channels, options.image_size, "image size")
        self.transform = classification_eval(options, tuple(preprocessing["mean"]), tuple(preprocessing["std"]))

    @classmethod
    def stored_options(cls, data: Any, preprocessing: dict[str, Any]) -> dict[str, Any]:
        given = {key: preprocessing[key] for key in ("crop_pct", "interpolation") if key in preprocessing}
        size = preprocessing["input_size"][-1]
        return super().stored_options(data, preprocessing) | given | {"image_size": size}

    def preprocess(self, image: Image.Image) -> Tensor:  # -> (C, S, S), normalised
        return self.transform(image)

    def collate(self, inputs: list[Tensor]) -> Tensor:  # -> (B, C, S, S)
        return torch.stack(inputs)

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> Tensor:  # (B, C, S, S) -> logits (B, classes)
        return self.model(batch.to(self.device).contiguous(memory_format=torch.channels_last)).float()


class ClassificationPredictor(ImagePredictor[Classes]):
    """A classifier: returns the `top_k` most likely classes of each image."""

    Options = ClassificationOptions
    report = ClassesReport

    @property
    def temperature(self) -> float:
        """What the logits are divided by, see `evaluation.evaluate`."""
        return self.preprocessing.get("temperature", 1.0)

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch) / self.temperature

    def postprocess(self, outputs: Tensor) -> list[Classes]:
        check_finite(outputs)
        probabilities = outputs.softmax(-1).cpu()
        top, labels = probabilities.topk(min(self.options.top_k, len(self.class_names)))
        return [
            Classes(tuple(self.titles[label] for label in row.tolist()), row.numpy(), shares.numpy())
            for row, shares in zip(labels, top, strict=True)
        ]


class ClassificationModule(TaskModule):
    """Cross-entropy over (images (B, C, S, S), targets (B,)), with the recipe's Mixup and CutMix, and distillation."""

    score = "top1"
    panels = {  # noqa: RUF012
        "loss": {"train_loss": "training", "val_loss": "validation"},
        "accuracy (%)": {"val_top1": "top-1", "val_top5": "top-5"},
    }

    def __init__(self, predictor: ClassificationPredictor, recipe: Classification, teacher: Teacher | None = None):
        super().__init__(predictor, recipe)
        if len(predictor.class_names) <= FEW:
            self.panels = self.panels | {"accuracy (%)": {"val_top1": "top-1"}}
        self.teacher = teacher
        self.class_weights: Tensor | None = None
        """(classes,) in the loss, with a mean of 1 over the training images; None: all are 1."""
        num_classes, augment = len(predictor.class_names), recipe.augment
        self.mixup = None
        if augment.mixup > 0 or augment.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
        self.accuracies = {f"top{k}": k for k in (1, 5) if k == 1 or k < num_classes}  # top-5 of five classes is 100 %
        metrics: dict[str, Any] = {
            name: MulticlassAccuracy(num_classes, top_k=k, average="micro") for name, k in self.accuracies.items()
        }
        metrics["confusion"] = MulticlassConfusionMatrix(num_classes)
        self.metrics = MetricCollection(metrics, compute_groups=False)
        self.loss = MeanMetric(nan_strategy="disable")  # NaN must stop the run
        self.confidence, self.right = CatMetric(nan_strategy="disable"), CatMetric(nan_strategy="disable")
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        """Logits and targets of each validation batch; None: they are not kept."""
        self.reliability = np.zeros((2, 0))
        """(2, images): probability of the predicted class, and whether it was right, of the last validation."""
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        """(classes, classes): images by true class (row) and predicted class (column), of the last validation."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, S, S) -> (B, num_classes)
        return self.model(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        smoothing = self.recipe.augment.label_smoothing
        if self.mixup is not None:
            x, target = self.mixup(x, target)  # the targets become smoothed probabilities
            smoothing = 0.0
        logits = self(x)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits.device)  # once: a copy at each step makes it wait
        # Not divided by the weights of the batch: the mean over processes is that over all their images.
        loss = F.cross_entropy(
            logits, target, weight=self.class_weights, label_smoothing=smoothing, reduction="none"
        ).mean()
        if self.teacher is not None:
            distill = self.recipe.distill
            imitation = distillation_loss(logits, self.teacher(x), distill.temperature)
            loss = distill.weight * imitation + (1 - distill.weight) * loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, target = batch
        self.add(self.predict(x, batch_idx), target)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Include a batch in the next `evaluate`."""
        self.metrics.update(logits, target)
        self.loss.update(F.cross_entropy(logits, target, reduction="none"))
        confidence, label = logits.softmax(-1).max(-1)
        self.confidence.update(confidence)
        self.right.update(label == target)
        if self.kept is not None:
            self.kept.append((logits.cpu(), target.cpu()))  # Lightning takes the metrics there, too, at the end

    def weigh(self, train: ImageData) -> None:
        if not isinstance(train, ImageDataset):
            return
        if self.recipe.data.balanced:
            train.weights = image_weights([(target,) for target in train.targets], self.recipe.data.balanced)
        counts = torch.bincount(torch.tensor(train.targets), minlength=len(train.class_names))
        self.class_weights = class_weights(self.recipe.class_weights, counts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher"] = self.teacher and self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("teacher") != (self.teacher and self.teacher.digest):
            given = f"--distill.teacher {self.recipe.distill.teacher}"
            raise InputError(f"{given} is not the teacher that the run began with; give that one, or another --out")

    def cost(self, progress: float) -> float:
        return (train_size(self.recipe.data, progress) / train_size(self.recipe.data, 0.0)) ** 2

    def uncertainty(self, images: int) -> str:
        """By half the 95 % interval of a binomial share, at its widest."""
        return f"top-1 is uncertain by up to {196 * math.sqrt(0.25 / images):.0f} percentage points"

    def evaluate(self) -> Evaluation:
        found = {**self.metrics.compute(), "loss": self.loss.compute()}
        self.confusion = found.pop("confusion").cpu().numpy()
        confidence, right = self.confidence.compute(), self.right.compute()
        self.reliability = torch.stack((confidence, right)).cpu().numpy()
        # torchmetrics has a bin of its own for 1.
        ece = binary_calibration_error(confidence.clamp(max=1 - 1e-6), right.int(), BINS).item()
        for metric in (self.metrics, self.loss, self.confidence, self.right):
            metric.reset()
        scores = {name: round(value.item(), 6) for name, value in found.items()}
        top = {name: scores[name] for name in self.accuracies}
        counts, shares = self.confusion.sum(1), class_metrics(self.confusion)
        means = shares[:, counts > 0].mean(1).round(6).tolist()
        macro = dict(zip(("mean_accuracy", "precision", "f1"), means, strict=True))
        keys = ("images", "top1", "precision", "f1")
        rows = zip(self.predictor.class_names, counts.tolist(), *shares.tolist(), strict=True)
        per_class = {name: rounded(dict(zip(keys, values, strict=True))) for name, *values in rows}
        return Evaluation(
            scores=scores,
            metrics=top
            | macro
            | {"loss": scores["loss"], "ece": round(ece, 6), "images": int(counts.sum()), "per_class": per_class},
            headline="  ".join(
                [f"val loss {scores['loss']:.4f}", *(f"top-{k} {top[name]:.2%}" for name, k in self.accuracies.items())]
            ),
            more=f"calibration error {percent(ece)}",
            columns=("class", "images", "top-1", "precision", "F1"),
            classes=[
                (name, str(one["images"] or "absent"), *(percent(one[key]) for key in keys[1:]))
                for name, one in per_class.items()
            ],
            totals=[
                ("all", str(counts.sum()), percent(top["top1"]), "", ""),  # so are their precision and F1
                ("mean of classes", "", *map(percent, means)),
            ],
        )

    def save_details(self, out: Path, evaluation: Evaluation) -> None:
        """evaluation.json, the confusion matrix as confusion.{csv,png}, and after training calibration.png."""
        super().save_details(out, evaluation)
        names = self.predictor.class_names
        plots.save_confusion_csv(self.confusion, names, out / "confusion.csv")
        plots.save_confusion(self.confusion, names, out / "confusion.png")
        if self.trainer.state.fn != TrainerFn.FITTING:  # a run has enough to draw after each epoch
            plots.save_reliability(self.reliability, BINS, evaluation.metrics["ece"], out / "calibration.png")


def class_metrics(confusion: np.ndarray) -> np.ndarray:
    """Recall (top-1), precision and F1 of each class, (3, classes); -1 for a class without images.

    The precision of a class that is never predicted is 0, as in scikit-learn and torchmetrics.

    Args:
        confusion: (classes, classes): images by true class (row) and predicted class (column)
    """
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    shares = [
        right / np.maximum(true, 1),
        right / np.maximum(predicted, 1),
        2 * right / np.maximum(true + predicted, 1),
    ]
    return np.where(true > 0, shares, -1.0)


def prepare_epoch(
    recipe: Classification | MultiLabel, preprocessing: dict[str, Any], train: ImageData, epoch: int, progress: float
) -> None:
    """Set the training transform and the flips, see `TaskModule.prepare_epoch`."""
    mean, std = preprocessing["mean"], preprocessing["std"]
    train.transform = classification_train(recipe.data, recipe.augment, mean, std, progress)
    if isinstance(train, ImageDataset) and recipe.augment.hflip == "alternate":
        train.alternate_flips(recipe.run.seed, epoch)


def data_config(model: nn.Module, data: ClassificationInput, channels: int) -> dict[str, Any]:
    """timm's data config, with the network's own mean and deviation."""
    return dict(
        input_size=(channels, data.image_size, data.image_size),
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        **statistics(pretrained_cfg(model), channels),
    )


def label_descriptions(names: Sequence[str]) -> dict[str, Any]:
    """timm's cfg entry for classes that are WordNet ids, as ImageNet's folders are; empty for other classes."""
    info = ImageNetInfo()
    try:
        return {"label_descriptions": [info.label_name_to_description(name) for name in names]}
    except KeyError:
        return {}


class ClassificationTask(Task[Classification]):
    name = "classification"
    recipe = Classification
    predictor = ClassificationPredictor
    calibrates = True
    check_data = staticmethod(data_check.check)

    def prepare(self, recipe: Classification, start: Model) -> Setup:
        if recipe.distill.teacher is None and recipe.distill != Distill():
            raise InputError("--distill.weight and --distill.temperature need --distill.teacher: give it, or neither")
        train, val = build_datasets(recipe.data, recipe.model.in_chans)
        names = train.class_names
        by_image = {
            "--augment.hflip alternate": recipe.augment.hflip == "alternate",
            "--data.balanced": recipe.data.balanced > 0,
            "--class-weights": recipe.class_weights != "equal",
        }
        if (flags := [flag for flag, given in by_image.items() if given]) and not isinstance(train, ImageDataset):
            raise InputError(f"{', '.join(flags)}: not available for data that is read as a stream")
        if len(names) < 2:
            raise InputError(f"there is only one class, {names[0]!r}; classification needs two or more")
        model, model_args = create_model(start, len(names), recipe.data.image_size, recipe.data.start_size)
        preprocessing = data_config(model, recipe.data, start.in_chans) | label_descriptions(names)
        predictor = ClassificationPredictor.create(model, names, preprocessing, recipe.data)
        teacher = load_teacher(self, recipe, predictor) if recipe.distill.teacher else None
        module = ClassificationModule(predictor, recipe, teacher)
        module.prepare_epoch = partial(prepare_epoch, recipe, preprocessing)
        module.prepare_epoch(train, 0, 0.0)  # rejects a wrong policy now
        val.transform = predictor.transform
        return Setup(recipe.model.name, module, train, val, model_args)

    def evaluation(
        self, predictor: ClassificationPredictor, recipe: Classification
    ) -> tuple[ClassificationModule, ImageData]:
        val = build_val_dataset(recipe.data, predictor.channels, predictor.class_names)
        val.transform = predictor.transform
        if recipe.data.unreadable == "skip":
            val.verify(skip=True)
        return ClassificationModule(predictor, recipe), val

    def relocate(self, recipe: Classification, given: dict[str, Any]) -> dict[str, Any]:
        moved = given.keys() & {"root", "val_split"} and "holdout" not in given
        return {"holdout": 0.0, "fold": 0} if moved else {}

    def share_fault(self, recipe: Classification, share: int) -> str:
        if share % 2 and (recipe.augment.mixup > 0 or recipe.augment.cutmix > 0):
            return "--augment.mixup and --augment.cutmix mix pairs"
        return ""


TASK = ClassificationTask()
