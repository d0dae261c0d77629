"""Exported segmenters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Literal

import numpy as np

from dualtoken_vit.header import MOST_SIDE
from dualtoken_vit.results import LabelMap
from dualtoken_vit.runtime.arrays import check_finite, resize, shrink, softmax, to_float
from dualtoken_vit.runtime.exported import LEAST_SIDE, SIDES, ExportedPredictor, require
from dualtoken_vit.runtime.report import LabelMapReport
from dualtoken_vit.runtime.tiles import starts


@dataclass(frozen=True)
class SegmenterOptions:
    """How an exported segmenter predicts."""

    image_size: int | None = None
    """Short side of the resized images, in pixels. None: original size."""
    mode: Literal["whole", "slide"] = "whole"
    """Whole images, or overlapping windows whose predictions are averaged."""
    window: int = 512
    """Side of the windows, in pixels."""
    window_stride: int = 341
    """Stride of the windows, in pixels."""
    scales: tuple[float, ...] = (1.0,)
    """Multi-scale prediction: sizes relative to image_size, whose probabilities are averaged."""
    flip: bool = False
    """Average with the prediction for the flipped image."""

    def __post_init__(self) -> None:
        size = 1 if self.image_size is None else self.image_size
        require(1 <= size <= MOST_SIDE, "image_size", self.image_size, f"from 1 to {MOST_SIDE}")
        require(self.mode in ("whole", "slide"), "mode", self.mode, "whole or slide")
        require(LEAST_SIDE <= self.window <= MOST_SIDE, "window", self.window, SIDES)
        require(1 <= self.window_stride <= self.window, "window_stride", self.window_stride, "at most the window")
        fitting = bool(self.scales) and all(0.1 <= scale <= 10 for scale in self.scales)
        require(fitting, "scales", self.scales, "one or more, from 0.1 to 10")


class Segmenter(ExportedPredictor[LabelMap]):
    """A segmenter: returns the class of every pixel of each image."""

    Options = SegmenterOptions
    report = LabelMapReport
    batch_size = 4
    ahead = 16

    def forward(self, batch: Sequence[np.ndarray], check: bool = True) -> list[np.ndarray]:
        """(C, H, W) uint8 each -> the class of every pixel (H, W) int64, as `models.segmenters.segment` does."""
        return [self._classes(to_float(image)) for image in batch]

    def _classes(self, image: np.ndarray) -> np.ndarray:
        options, size = self.options, image.shape[1:]
        base = options.image_size / min(size) if options.image_size else 1.0
        scores = []  # of each scale, at its size
        for scale in options.scales:
            x = shrink(image, [max(LEAST_SIDE, round(side * base * scale)) for side in size])
            scores.append(self._scores(x))
            if options.flip:
                scores[-1] = scores[-1] + self._scores(x[..., ::-1])[..., ::-1]
        # One class at a time: faster than argmax, and all of them at the size of a large image may not fit into memory.
        best, classes = np.full(size, -np.inf, np.float32), np.zeros(size, np.int64)
        for label in range(len(scores[0])):
            total = reduce(np.add, (resize(each[label], size) for each in scores))
            np.copyto(classes, label, where=total > best)
            np.maximum(best, total, out=best)
        return classes

    def _scores(self, x: np.ndarray) -> np.ndarray:
        """Logits (classes, H, W) at one scale and orientation; probabilities where several are averaged."""
        logits = check_finite(self._slide(x) if self.options.mode == "slide" else self._logits(x))
        return softmax(logits, 0) if self.options.flip or len(self.options.scales) > 1 else logits

    def _logits(self, x: np.ndarray) -> np.ndarray:
        return self.model(x[None])["logits"][0]

    def _slide(self, x: np.ndarray) -> np.ndarray:
        """Logits of windows, averaged where they overlap; the last windows are aligned with the image border."""
        window, stride = self.options.window, self.options.window_stride
        total = np.zeros((len(self.class_names), *x.shape[1:]), np.float32)
        count = np.zeros(x.shape[1:], np.float32)
        for top, left in product(*(starts(side, window, window - stride) for side in x.shape[1:])):
            place = ..., slice(top, top + window), slice(left, left + window)
            total[place] += self._logits(x[place])
            count[place] += 1
        return total / count

    def postprocess(self, outputs: list[np.ndarray]) -> list[LabelMap]:
        return [LabelMap(self.class_names, labels.astype(np.uint8)) for labels in outputs]
