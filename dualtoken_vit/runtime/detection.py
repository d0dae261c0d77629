"""Exported detectors, with or without masks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, ClassVar

import numpy as np

from dualtoken_vit.errors import InputError
from dualtoken_vit.header import MOST_SIDE
from dualtoken_vit.results import Objects
from dualtoken_vit.runtime.arrays import check_finite, sample, shrink, to_float
from dualtoken_vit.runtime.boxes import clip, suppress
from dualtoken_vit.runtime.exported import LEAST_SIDE, SIDES, ExportedPredictor, require
from dualtoken_vit.runtime.report import ObjectsReport
from dualtoken_vit.runtime.session import Arrays, ExportedModel
from dualtoken_vit.runtime.tiles import detect_in_tiles


@dataclass(frozen=True)
class DetectorOptions:
    """How an exported detector predicts."""

    score: float = 0.5
    """Lowest score of a reported object."""
    tile: int | None = None
    """Large images: predict in overlapping square tiles of this side in pixels, each resized as an image would be, and
    merge their objects. None: whole images."""
    overlap: float = 0.2
    """Overlap of neighbouring tiles, as a share of their side; it should exceed most objects."""

    def __post_init__(self) -> None:
        require(0 <= self.score <= 1, "score", self.score, "from 0 to 1")
        require(self.tile is None or LEAST_SIDE <= self.tile <= MOST_SIDE, "tile", self.tile, SIDES)
        require(0 <= self.overlap <= 0.9, "overlap", self.overlap, "from 0 to 0.9")


class Detector(ExportedPredictor[Objects]):
    """A detector of fixed size: the image is resized to fit, and padded at the right and bottom."""

    Options: ClassVar[type] = DetectorOptions
    report = ObjectsReport
    batch_size = 4
    ahead = 16

    def __init__(self, model: ExportedModel, options: Any):
        super().__init__(model, options)
        least = self.export["score_threshold"]
        if options.score < least:
            raise InputError(f"--score {options.score}: the file has the objects above {least} only")
        self.border = np.array(self.preprocessing["mean"], np.float32)[:, None, None]  # 0 after normalisation

    def forward(self, batch: Sequence[np.ndarray], check: bool = True) -> list[Arrays]:
        """(C, H, W) uint8 each -> boxes, labels, scores and masks (N, 1, H, W) in the image's pixels."""
        images, tile, overlap = map(to_float, batch), self.options.tile, self.options.overlap
        if tile is None:
            return self._detect(images)
        return [detect_in_tiles(self._detect, image, tile, overlap) for image in images]

    def _detect(self, images: Iterable[np.ndarray]) -> list[Arrays]:
        return [self._objects(image) for image in images]

    def _objects(self, image: np.ndarray) -> Arrays:
        old, (new, frame) = image.shape[1:], self.fit(image.shape[1:])
        x = np.broadcast_to(self.border, (len(image), *frame)).copy()
        x[:, : new[0], : new[1]] = shrink(image, new)
        outputs = self.model(x[None])
        for values in outputs.values():
            check_finite(values)
        found = self.choose(outputs, new, frame)
        boxes = clip(found["boxes"], new)
        # The padding, which is wider than in training where the shape differs, may hold boxes: nothing is left of them.
        keep = (found["scores"] > self.options.score) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        found = {key: value[keep] for key, value in found.items()}
        ratio = np.array([old[1] / new[1], old[0] / new[0]] * 2, np.float32)
        if "masks" in found:
            # torchvision crops target masks half a pixel too far right and down, see `models.resizing.Transform`
            found["masks"] = paste(found["masks"][:, 0], (found["boxes"] + 0.5) * ratio, old)[:, None]
        found["boxes"] = boxes[keep] * ratio
        return found

    def fit(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of an image of this size after resizing, and of the padded input."""
        frame = tuple(self.export["size"])
        scale = min(frame[0] / size[0], frame[1] / size[1])
        return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), frame

    def choose(self, outputs: Arrays, size: Sequence[int], frame: Sequence[int]) -> Arrays:
        """The objects among the network's outputs."""
        return {key: value[outputs["labels"] >= 0] for key, value in outputs.items()}

    def postprocess(self, outputs: list[Arrays]) -> list[Objects]:
        return [to_objects(found, self.class_names) for found in outputs]


@dataclass(frozen=True)
class AnySizeDetectorOptions(DetectorOptions):
    """How an exported detector of any size predicts."""

    image_size: int = 800
    """Short side of the resized images, in pixels."""
    max_size: int = 1333
    """Maximum long side, in pixels; it takes precedence over image_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(LEAST_SIDE <= self.image_size <= MOST_SIDE, "image_size", self.image_size, SIDES)
        require(LEAST_SIDE <= self.max_size <= MOST_SIDE, "max_size", self.max_size, SIDES)


class AnySizeDetector(Detector):
    """A detector of any size, whose non-maximum suppression is done here."""

    Options = AnySizeDetectorOptions

    def fit(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        options, multiple = self.options, self.export["multiple"]
        scale = min(options.image_size / min(size), options.max_size / max(size))
        height, width = (max(1, round(side * scale)) for side in size)
        return (height, width), (ceil(height / multiple) * multiple, ceil(width / multiple) * multiple)

    def choose(self, outputs: Arrays, size: Sequence[int], frame: Sequence[int]) -> Arrays:
        boxes, scores = clip(outputs["boxes"][0], size), outputs["scores"][0]
        areas = [ceil(frame[0] / stride) * ceil(frame[1] / stride) for stride in self.export["strides"]]
        ends = self.export["anchors"] * np.cumsum(areas)
        best = []
        for level in np.split(np.arange(len(scores)), ends[:-1]):
            flat = scores[level].ravel()
            above = np.flatnonzero(flat > self.options.score)
            above = above[np.argsort(-flat[above], kind="stable")[: self.export["candidates"]]]
            best.append(level[0] * scores.shape[1] + above)
        index = np.concatenate(best)
        anchors, labels = np.divmod(index, scores.shape[1])
        found = {"boxes": boxes[anchors], "scores": scores[anchors, labels], "labels": labels}
        keep = suppress(found["boxes"], found["scores"], labels, self.export["nms_threshold"])
        return {key: value[keep[: self.export["detections"]]] for key, value in found.items()}


def to_objects(found: Arrays, class_names: Sequence[str]) -> Objects:
    """The result of an image with these boxes, labels, scores and perhaps masks (N, 1, H, W)."""
    names = tuple(class_names[label] for label in found["labels"])
    masks = found["masks"][:, 0] if "masks" in found else None
    return Objects(names, found["labels"], found["boxes"], found["scores"], masks)


def paste(masks: np.ndarray, boxes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The masks (N, M, M) of boxes (N, 4) in an image of (height, width), by `models.resizing.paste_mask`."""
    height, width = size
    canvas = np.zeros((len(masks), height, width), dtype=bool)
    side = masks.shape[-1]
    for place, mask, (x1, y1, x2, y2) in zip(canvas, np.pad(masks, ((0, 0), (1, 1), (1, 1))), boxes, strict=True):
        left, right = max(floor(x1), 0), min(ceil(x2), width)
        top, bottom = max(floor(y1), 0), min(ceil(y2), height)
        if left < right and top < bottom:
            rows = (np.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * side + 0.5  # in the padded mask
            columns = (np.arange(left, right) + 0.5 - x1) / (x2 - x1) * side + 0.5
            place[top:bottom, left:right] = sample(sample(mask, 0, rows), 1, columns) >= 0.5
    return canvas
