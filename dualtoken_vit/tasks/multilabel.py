"""Multi-label classification: losses, average precision, a threshold for each class, prediction."""

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_precision_recall_curve,
    multilabel_f1_score,
)

from dualtoken_vit.data.balance import class_weights, image_weights
from dualtoken_vit.data.check import multilabel as data_check
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.multilabel import build_datasets, build_val_dataset
from dualtoken_vit.data.transforms import train_size
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import check_finite
from dualtoken_vit.recipes import ClassificationInput, Model, MultiLabel
from dualtoken_vit.results import Labels
from dualtoken_vit.runtime.report import LabelsReport
from dualtoken_vit.tasks.base import Evaluation, Setup, Task, TaskModule, percent, rounded
from dualtoken_vit.tasks.classification import ImagePredictor, data_config, prepare_epoch
from dualtoken_vit.tasks.networks import create_model


@dataclass(frozen=True)
class MultiLabelOptions(ClassificationInput):
    """How a multi-label classifier predicts."""

    threshold: Annotated[float | None, Interval(ge=0, le=1)] = None
    """Lowest probability of a reported label. None: for each class, the one with the best F1 in validation."""


class MultiLabelPredictor(ImagePredictor[Labels]):
    """A multi-label classifier: returns the labels of each image whose probability reaches their threshold."""

    Options = MultiLabelOptions
    report = LabelsReport

    @property
    def thresholds(self) -> Tensor:
        """(classes,): of the options, or those chosen in validation."""
        stored = self.preprocessing.get("thresholds") or [0.5] * len(self.class_names)
        return torch.tensor(stored if self.options.threshold is None else [self.options.threshold] * len(stored))

    def postprocess(self, outputs: Tensor) -> list[Labels]:
        check_finite(outputs)  # not the probabilities: the sigmoid of Inf is 1
        probabilities = outputs.sigmoid().cpu()
        results = []
        for shares, found in zip(probabilities, probabilities >= self.thresholds, strict=True):
            labels = shares.argsort(descending=True, stable=True)
            labels = labels[found[labels]]
            names = tuple(self.class_names[label] for label in labels.tolist())
            results.append(Labels(names, labels.numpy(), shares[labels].numpy(), shares.numpy()))
        return results


class MultiLabelModule(TaskModule):
    """The recipe's loss over (images (B, C, S, S), targets (B, classes)), and average precision and F1 in validation.

    `choose`: validation chooses the thresholds, as in training; otherwise it uses the predictor's.
    """

    score = "map"
    panels = {  # noqa: RUF012
        "loss": {"train_loss": "training", "val_loss": "validation"},
        "%": {"val_map": "mAP", "val_f1": "macro F1", "val_micro_f1": "micro F1"},
    }

    def __init__(self, predictor: MultiLabelPredictor, recipe: MultiLabel, choose: bool):
        super().__init__(predictor, recipe)
        self.choose = choose
        self.class_weights: Tensor | None = None
        """(classes,) in the loss of the labels that images have, with a mean of 1 over them; None: all are 1."""
        bce = partial(F.binary_cross_entropy_with_logits, reduction="none")
        self.criterion: Any = bce if recipe.loss == "bce" else AsymmetricLossMultiLabel(reduction="none")
        # Of all images of the validation, which thresholds and average precision need together.
        self.shares, self.targets = CatMetric(nan_strategy="disable"), CatMetric(nan_strategy="disable")
        self.loss = MeanMetric(nan_strategy="disable")  # NaN must stop the run

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        loss = self.criterion(self.model(x.contiguous(memory_format=torch.channels_last)), target)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(target)
            loss = loss * torch.where(target > 0, self.class_weights, 1.0)
        loss = loss.mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, target = batch
        logits = self.predict(x, batch_idx)
        self.shares.update(logits.sigmoid())
        self.targets.update(target)
        self.loss.update(self.criterion(logits, target).mean(1))

    def cost(self, progress: float) -> float:
        return (train_size(self.recipe.data, progress) / train_size(self.recipe.data, 0.0)) ** 2

    def evaluate(self) -> Evaluation:
        metrics = self.shares, self.targets, self.loss
        shares, targets, loss = (metric.compute().cpu() for metric in metrics)
        targets = targets.int()
        for metric in metrics:
            metric.reset()
        names, counts = self.predictor.class_names, targets.sum(0)
        there = counts.nonzero().flatten().tolist()  # the classes with images: others have neither AP nor F1
        if self.choose:
            curves = {k: binary_precision_recall_curve(shares[:, k], targets[:, k]) for k in there}
            chosen = [best_threshold(*curves[k]) if k in curves else 0.5 for k in range(len(names))]
            self.predictor.preprocessing["thresholds"] = chosen
        thresholds = torch.as_tensor(self.predictor.thresholds)  # type: ignore[attr-defined]
        found = (shares >= thresholds).int()
        micro = multilabel_f1_score(found, targets, len(names), average="micro")
        f1, aps = torch.full((2, len(names)), -1.0)
        f1[there] = multilabel_f1_score(found, targets, len(names), average="none")[there]
        aps[there] = torch.stack([binary_average_precision(shares[:, k], targets[:, k]) for k in there])
        scores = {"map": aps[there].mean(), "f1": f1[there].mean(), "micro_f1": micro, "loss": loss}
        means = rounded({name: value.item() for name, value in scores.items()})
        rows = zip(names, counts.tolist(), aps.tolist(), f1.tolist(), thresholds.tolist(), strict=True)
        keys = ("images", "ap", "f1", "threshold")
        per_class = {name: rounded(dict(zip(keys, values, strict=True))) for name, *values in rows}
        return Evaluation(
            scores=means,
            metrics=means | {"images": len(targets), "per_class": per_class},
            headline=f"val loss {loss:.4f}  mAP {scores['map']:.2%}  F1 {scores['f1']:.2%} (micro {micro:.2%})",
            columns=("class", "images", "AP", "F1", "threshold"),
            classes=[
                (name, str(one["images"]), percent(one["ap"]), percent(one["f1"]), f"{one['threshold']:.3f}")
                for name, one in per_class.items()
            ],
            totals=[
                ("all", str(len(targets)), "", percent(means["micro_f1"]), ""),
                ("mean of classes", "", percent(means["map"]), percent(means["f1"]), ""),
            ],
        )


def best_threshold(precision: Tensor, recall: Tensor, thresholds: Tensor) -> float:
    """The threshold of a class with the best F1, from its precision-recall curve.

    It is halfway between the lowest probability that it accepts and the next lower one.
    """
    f1 = 2 * precision * recall / (precision + recall)
    best = int(f1[:-1].nan_to_num(-1.0).argmax())  # the last point of the curve has no threshold
    lower = thresholds[best - 1] if best else torch.zeros(())
    return float((thresholds[best] + lower) / 2)


class MultiLabelTask(Task[MultiLabel]):
    name = "multilabel"
    recipe = MultiLabel
    predictor = MultiLabelPredictor
    check_data = staticmethod(data_check.check)

    def prepare(self, recipe: MultiLabel, start: Model) -> Setup:
        train, val = build_datasets(recipe.data, start.in_chans)
        names = train.class_names
        if len(names) < 2:
            raise InputError(f"there is only one label, {names[0]!r}; train a classifier of images with and without it")
        model, model_args = create_model(start, len(names), recipe.data.image_size, recipe.data.start_size)
        preprocessing = data_config(model, recipe.data, start.in_chans)
        predictor = MultiLabelPredictor.create(model, names, preprocessing, recipe.data)
        module = MultiLabelModule(predictor, recipe, choose=True)
        module.prepare_epoch = partial(prepare_epoch, recipe, dict(preprocessing))
        module.prepare_epoch(train, 0, 0.0)  # rejects a wrong policy now
        if recipe.data.balanced:
            train.weights = image_weights(train.targets, recipe.data.balanced)
        counts = torch.bincount(torch.tensor([*chain(*train.targets)]), minlength=len(names))
        module.class_weights = class_weights(recipe.class_weights, counts)
        val.transform = predictor.transform
        return Setup(recipe.model.name, module, train, val, model_args)

    def evaluation(self, predictor: MultiLabelPredictor, recipe: MultiLabel) -> tuple[MultiLabelModule, ImageData]:
        val = build_val_dataset(recipe.data, predictor.channels, predictor.class_names)
        val.transform = predictor.transform
        return MultiLabelModule(predictor, recipe, choose=False), val

    def relocate(self, recipe: MultiLabel, given: dict[str, Any]) -> dict[str, Any]:
        follows: dict[str, Any] = {"dataset": "table"} if "root" in given else {}
        return follows | ({"holdout": 0.0} if given.keys() & {"root", "val_split"} else {})


TASK = MultiLabelTask()
