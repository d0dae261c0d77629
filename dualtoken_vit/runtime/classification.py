"""Exported classifiers, of one label or several for each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any, Literal

import numpy as np
from PIL import Image

from dualtoken_vit.data.images import fitting
from dualtoken_vit.errors import InputError
from dualtoken_vit.header import MOST_SIDE
from dualtoken_vit.results import Classes, Labels
from dualtoken_vit.runtime.arrays import check_finite, softmax, to_array, to_float
from dualtoken_vit.runtime.base import Result
from dualtoken_vit.runtime.exported import LEAST_SIDE, SIDES, ExportedPredictor, require
from dualtoken_vit.runtime.report import ClassesReport, LabelsReport
from dualtoken_vit.runtime.session import ExportedModel


@dataclass(frozen=True)
class ImageOptions:
    """How images are prepared for an exported classifier."""

    image_size: int = 224
    """Side of the square input, in pixels."""
    crop_pct: float = 0.875
    """The short side is resized to image_size / crop_pct, and the centre is cropped."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of resizing."""

    def __post_init__(self) -> None:
        require(1 <= self.image_size <= MOST_SIDE, "image_size", self.image_size, SIDES)
        require(0.01 <= self.crop_pct <= 1, "crop_pct", self.crop_pct, "from 0.01 to 1")
        require(self.interpolation in ("bicubic", "bilinear"), "interpolation", self.interpolation, "bicubic, bilinear")


def crop(options: ImageOptions, image: Image.Image) -> np.ndarray:  # -> (C, S, S) float32
    """timm's evaluation transform, without its normalisation."""
    side, how = options.image_size, Image.Resampling[options.interpolation.upper()]
    short, (width, height) = floor(side / options.crop_pct), image.size
    fitting(image, short)
    if min(width, height) != short:  # torchvision's Resize keeps the long side's fraction off
        width, height = (int(short * each / min(image.size)) for each in (width, height))
        image = image.resize((width, height), how)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return to_float(to_array(image.crop((left, top, left + side, top + side))))


class ImageClassifier(ExportedPredictor[Result]):
    """A network that maps whole images to logits."""

    def __init__(self, model: ExportedModel, options: Any):
        super().__init__(model, options)
        self.transform = partial(crop, options)  # without the network, which data loading processes cannot get
        side, fixed = options.image_size, self.export["size"]
        trained = side == self.preprocessing["input_size"][-1]  # may be smaller than other sizes may be
        require(trained or side >= LEAST_SIDE, "image_size", side, SIDES)
        if fixed and fixed[0] != side:
            raise InputError(f"--image-size {side}: {model.path} has the fixed size {fixed[0]}")

    @classmethod
    def stored_options(cls, description: dict[str, Any]) -> dict[str, Any]:
        return super().stored_options(description) | {"image_size": description["preprocessing"]["input_size"][-1]}

    def preprocess(self, image: Image.Image) -> np.ndarray:  # -> (C, S, S) float32
        return self.transform(image)

    def forward(self, batch: Sequence[np.ndarray]) -> np.ndarray:  # (C, S, S) each -> logits (B, classes)
        # Dynamic quantisation takes one range of values for all images of an input.
        count = 1 if self.export.get("precision") == "int8-dynamic" else len(batch)
        parts = [self.model(np.stack(batch[i : i + count]))["logits"] for i in range(0, len(batch), count)]
        logits = check_finite(np.concatenate(parts))
        return logits / np.float32(self.preprocessing.get("temperature", 1.0))


@dataclass(frozen=True)
class ClassifierOptions(ImageOptions):
    """How an exported classifier predicts."""

    top_k: int = 5
    """Classes to report for each image (all of them, if there are fewer)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1, "top_k", self.top_k, "at least 1")


class Classifier(ImageClassifier[Classes]):
    """A classifier: returns the `top_k` most likely classes of each image."""

    Options = ClassifierOptions
    report = ClassesReport

    def postprocess(self, outputs: np.ndarray) -> list[Classes]:
        shares = softmax(outputs.astype(np.float32), -1)
        best = np.argsort(-shares, -1, kind="stable")[:, : self.options.top_k]
        return [
            Classes(tuple(self.titles[label] for label in row), row, each[row])
            for row, each in zip(best, shares, strict=True)
        ]


@dataclass(frozen=True)
class LabellerOptions(ImageOptions):
    """How an exported multi-label classifier predicts."""

    threshold: float | None = None
    """Lowest probability of a reported label. None: for each class, the one with the best F1 in validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold is None or 0 <= self.threshold <= 1, "threshold", self.threshold, "between 0 and 1")


class Labeller(ImageClassifier[Labels]):
    """A multi-label classifier: returns the labels of each image whose probability reaches their threshold."""

    Options = LabellerOptions
    report = LabelsReport

    @property
    def thresholds(self) -> np.ndarray:
        """(classes,): of the options, or those chosen in validation."""
        stored = self.preprocessing.get("thresholds") or [0.5] * len(self.class_names)
        given = self.options.threshold
        return np.array(stored if given is None else [given] * len(stored), np.float32)

    def postprocess(self, outputs: np.ndarray) -> list[Labels]:
        results = []
        for shares in np.exp(-np.logaddexp(0, -outputs.astype(np.float32))):  # sigmoid
            labels = np.argsort(-shares, kind="stable")
            labels = labels[shares[labels] >= self.thresholds[labels]]
            names = tuple(self.class_names[label] for label in labels)
            results.append(Labels(names, labels, shares[labels], shares))
        return results
