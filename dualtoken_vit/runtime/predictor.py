"""Predictors of exported files, without PyTorch: what `load_predictor` returns for them.

predictor = load_predictor("model.onnx")
result = predictor("image.jpg")             # or a PIL image, an array, a folder, a list of these
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from math import ceil, floor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from dualtoken_vit.data.images import fitting
from dualtoken_vit.errors import InputError, OutOfMemory, naming_memory
from dualtoken_vit.header import MOST_SIDE
from dualtoken_vit.results import Classes, LabelMap, Labels, Objects
from dualtoken_vit.runtime.base import BasePredictor, Result
from dualtoken_vit.runtime.boxes import clip, suppress
from dualtoken_vit.runtime.report import ClassesReport, LabelMapReport, LabelsReport, ObjectsReport
from dualtoken_vit.runtime.session import Arrays, ExportedModel, InputFailed, read_description
from dualtoken_vit.runtime.tiles import detect_in_tiles, starts

LEAST_SIDE = 32  # of images, in pixels
SIDES = f"from {LEAST_SIDE} to {MOST_SIDE}"


def load_predictor(
    path: str | Path, runtime: str = "onnxruntime", threads: int | None = None, device: str = "auto", **options: Any
) -> "ExportedPredictor[Any]":
    """An exported file as a function of images, ready to call; see `BasePredictor` for what it accepts.

    It returns `results.Classes`, `Labels`, `Objects` or `LabelMap`, depending on the task.

    Args:
        path: a file written by `dualtoken-vit export`
        runtime: onnxruntime or openvino
        threads: CPU threads; None: the runtime's default
        device: auto or cpu, where exported files run
        options: how to predict; by default as in the validation of the training run. Classification: image_size,
            crop_pct, interpolation, top_k (5); multilabel: threshold instead of top_k. Detection: score (0.5), tile,
            overlap, and for files of any size image_size, max_size. Segmentation: image_size, mode, window,
            window_stride, scales, flip

    Raises:
        InputError: for a file, runtime or option that cannot be used.
    """
    if str(path).endswith(".safetensors"):  # with PyTorch, `load_predictor` takes checkpoints too
        raise InputError(f"{path}: a checkpoint needs PyTorch; dualtoken-vit export writes a file that does not")
    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: exported files run on the CPU; leave it out")
    model = ExportedModel(path, runtime, threads)
    kind = predictor_class(model.description)
    return kind(model, kind.make_options(**kind.stored_options(model.description) | options))


def default_options(path: str | Path) -> Any:
    """The options of `load_predictor` for an exported file, with the values of the validation of its training run."""
    found = read_description(path)
    kind = predictor_class(found)
    return kind.make_options(**kind.stored_options(found))


def predictor_class(description: dict[str, Any]) -> type["ExportedPredictor[Any]"]:
    """The class of predictor for a file of this description."""
    task = description["task"]
    if task == "detection":
        return AnySizeDetector if description["export"]["raw"] else Detector
    if task == "segmentation":
        return Segmenter
    return Labeller if task == "multilabel" else Classifier


def to_array(image: Image.Image) -> np.ndarray:
    """An 8-bit PIL image as (C, H, W) uint8."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def shrink(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (C, H, W) float32 bilinearly with antialiasing, as torch's interpolate, which follows Pillow."""
    if image.shape[1:] == tuple(size):
        return image
    box = size[1], size[0]
    return np.stack([np.asarray(Image.fromarray(each).resize(box, Image.Resampling.BILINEAR)) for each in image])


def sample(x: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Linear interpolation of x along an axis at `places`, in units of its elements, constant outside."""
    places = places.clip(0, x.shape[axis] - 1)
    low = np.floor(places).astype(int)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (places - low).astype(np.float32).reshape(shape)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    return x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight


def resize(x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (..., H, W) bilinearly without antialiasing, as torch's interpolate does by default."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = x.shape[axis]
        if old != new:
            x = sample(x, axis, (np.arange(new) + 0.5) * old / new - 0.5)
    return x


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def check_finite(outputs: np.ndarray) -> np.ndarray:
    if not np.isfinite(outputs).all():
        raise InputError("the network produced NaN or Inf; use another checkpoint")
    return outputs


def require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be {what}")


class ExportedPredictor(BasePredictor[Result]):
    """The predictor of an exported file.

    Args:
        model: the network
        options: of `Options`, checked
    """

    def __init__(self, model: ExportedModel, options: Any):
        about = model.description
        super().__init__(about["class_names"], about["preprocessing"], options)
        self.model, self.export = model, about["export"]
        self.category_ids = tuple(about["category_ids"])

    @classmethod
    def stored_options(cls, description: dict[str, Any]) -> dict[str, Any]:
        """The options that the network was validated with."""
        known = cls.Options.__dataclass_fields__  # type: ignore[attr-defined]
        given = description["recipe"].get("data", {}) | description["preprocessing"]
        return {name: given[name] for name in known if name in given}

    def preprocess(self, image: Image.Image) -> np.ndarray:  # -> (C, H, W) uint8
        return to_array(image)

    def _run(self, inputs: list[np.ndarray]) -> Sequence[Result | InputError]:
        """The result of each image, or what went wrong with it: where a batch fails, one at a time."""
        try:
            with naming_memory(self.memory_hint):
                return super()._run(inputs)
        except (InputFailed, OutOfMemory) as error:
            problem = str(error)  # the error itself would keep the batch in memory
        if len(inputs) > 1:
            return [result for one in inputs for result in self._run([one])]
        return [InputError(problem)]


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
