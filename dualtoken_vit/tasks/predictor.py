"""A trained network as a function of images: what every task's predictor shares, and how its results are shown."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import printable

Result = TypeVar("Result")
Caption = tuple[str, float | None]  # text and share
ImageLike = str | PathLike[str] | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Prediction(Generic[Result]):
    """An image, and what was predicted for it or why that failed."""

    image: Image.Image | None  # as loaded; None where it cannot be read
    result: Result | None
    error: InputError | None = None


class Predictor(ABC, Generic[Result]):
    """Runs a trained network on images: `preprocess` each, `forward` a batch, `postprocess` its outputs.

    A call accepts

    - a path, a PIL image, a numpy array (H, W) or (H, W, C), or a tensor (C, H, W): returns one result;
    - a folder (all images in and below it, in natural order), a list of the above, or a tensor (B, C, H, W): returns a
      list of results.

    Arrays and tensors are RGB or grey: uint8, or floating point between 0 and 1.

    Args:
        model: the network, on its device; `load_predictor` puts it into evaluation mode
        class_names: in the order of the network's outputs
        preprocessing: of the checkpoint: input_size (C, H, W), mean, std, ...
        options: of `Options`, checked
    """

    Options: ClassVar[type]  # dataclass of what a call of `load_predictor`, or the command line, may choose
    batch_size: ClassVar[int] = 32  # images in a batch unless a call chooses it
    ahead: ClassVar[int] = 256  # images that may wait in memory
    memory_hint: ClassVar[str] = "use a smaller image_size"  # what helps where an image does not fit into memory

    category_ids: tuple[int, ...] = ()  # detection: the number of each class in the COCO json

    def __init__(self, model: nn.Module, class_names: Sequence[str], preprocessing: dict[str, Any], options: Any):
        self.model, self.class_names, self.preprocessing = model, tuple(class_names), preprocessing
        self.options = options
        self.channels: int = preprocessing["input_size"][0]

    @classmethod
    def create(
        cls, model: nn.Module, class_names: Sequence[str], preprocessing: dict[str, Any], data: Any, **options: Any
    ) -> Self:
        """A predictor with the options of a recipe's data section, except the given ones; see `make_options`."""
        chosen = cls.make_options(**cls.stored_options(data, preprocessing) | options)
        return cls(model, class_names, preprocessing, chosen)

    @classmethod
    def stored_options(cls, data: Any, preprocessing: dict[str, Any]) -> dict[str, Any]:
        """The options that a network was validated with: of its recipe's data section and its preprocessing."""
        return {field.name: getattr(data, field.name) for field in fields(cls.Options) if hasattr(data, field.name)}

    @classmethod
    def make_options(cls, **given: Any) -> Any:
        """The options; an InputError for one that does not exist, or an out-of-range value."""
        known = [field.name for field in fields(cls.Options)]
        for name in given:
            if name not in known:
                raise InputError(f"{name}: not an option of this predictor; there are {', '.join(known)}")
        options = cls.Options(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        )
        check_bounds(options)
        return options

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters(), torch.empty(0)).device

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """What the network takes of a PIL image, on the CPU."""

    def collate(self, inputs: list[Tensor]) -> Any:
        """A batch of what `preprocess` returned."""
        return inputs

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """The network's outputs for a batch; its inputs may be on any device."""

    @abstractmethod
    def postprocess(self, outputs: Any) -> list[Result]:
        """The result of each image of a batch; an InputError where the outputs are NaN or Inf."""

    def __call__(self, images: Any, batch_size: int | None = None) -> Any:
        """One result, or a list of them; an InputError names an image that cannot be read, or an empty folder."""
        single, sources = self._sources(images)
        results = []
        for prediction in self.stream(sources, batch_size):
            if prediction.error is not None:
                raise prediction.error
            results.append(prediction.result)
        return results[0] if single else results

    def _sources(self, images: Any) -> tuple[bool, list[ImageLike]]:
        """Whether one result is meant, and the single images."""
        if isinstance(images, str | PathLike) and Path(images).is_dir():
            found: list[ImageLike] = list(image_files(Path(images)))
            if not found:
                raise InputError(f"{printable(images)}: no images in this folder")
            return False, found
        if isinstance(images, Tensor) and images.ndim == 4:
            return False, list(images)
        if isinstance(images, str | PathLike | Image.Image | np.ndarray | Tensor):
            return True, [images]
        if isinstance(images, bytes) or not isinstance(images, Iterable):
            raise InputError(
                f"cannot predict for an object of type {type(images).__name__}: give a path, a folder, a PIL image, an "
                "array, a tensor, or a list of these"
            )
        return False, [one for each in images for one in self._sources(each)[1]]

    def stream(
        self, images: Iterable[ImageLike], batch_size: int | None = None, title: str = ""
    ) -> Iterator[Prediction[Result]]:
        """Yield one `Prediction` per image, in order; an image that fails does not stop the others.

        Args:
            images: paths, PIL images, arrays or tensors of one image each
            batch_size: images in a forward pass
            title: of a progress bar on stderr; none without one
        """
        size = batch_size or self.batch_size
        if size < 1:
            raise InputError(f"batch_size={size}: must be at least 1")
        images = list(images)
        loaded = zip(images, in_threads(self.load, images, len(images), title, self.ahead), strict=True)
        while chunk := list(islice(loaded, size)):
            results = iter(self._run([inputs for _, (_, inputs, _) in chunk if inputs is not None]))
            for source, (image, _, error) in chunk:
                result = error or next(results)
                if not isinstance(result, InputError):
                    yield Prediction(image, result)
                else:
                    name = printable(source) if isinstance(source, str | PathLike) else "the image"
                    yield Prediction(image, None, error or InputError(f"{name}: {result}"))

    def load(self, source: ImageLike) -> tuple[Image.Image | None, Tensor | None, InputError | None]:
        """An image as loaded, as preprocessed, and the error where it cannot be read."""
        try:
            image = to_image(source, self.channels)
            return image, self.preprocess(image), None
        except InputError as error:
            return None, None, error

    @torch.inference_mode()
    def _run(self, inputs: list[Tensor]) -> list[Result | InputError]:
        """The result of each image, or what went wrong with it: where a batch does not fit in memory, one at a time."""
        if not inputs:
            return []
        try:
            with naming_memory(self.memory_hint):
                return list(self.postprocess(self.forward(self.collate(inputs))))
        except OutOfMemory as error:
            problem = str(error)  # the error itself would keep the batch in memory
        if len(inputs) > 1:
            return [result for one in inputs for result in self._run([one])]
        height, width = inputs[0].shape[-2:]
        return [InputError(f"{width}x{height} pixels: {problem}")]


class OutOfMemory(InputError):
    """A computation did not fit into memory."""


@contextmanager
def naming_memory(hint: str) -> Iterator[None]:
    """A failed allocation inside becomes an `OutOfMemory` with a hint what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator raises a RuntimeError
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            raise OutOfMemory(f"out of memory ({first_line(error)[:80]}): {hint}") from error
        raise


def to_image(source: ImageLike, channels: int) -> Image.Image:
    """A path, PIL image, array or tensor as an 8-bit PIL image; an InputError for one that cannot be used."""
    if isinstance(source, str | PathLike):
        return load_image(Path(source), channels, printable(source))
    if isinstance(source, Image.Image):
        return load_image(source, channels)
    form = f"an image of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, Tensor):
        array = source.detach().cpu().float().numpy() if source.is_floating_point() else source.cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    else:
        array = source
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise InputError(f"{form}: give (H, W) or (H, W, C) arrays, (C, H, W) tensors, with 1, 3 or 4 channels")
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{form}: give uint8, or floating-point values between 0 and 1")
    return load_image(Image.fromarray(np.ascontiguousarray(array)), channels)


class Report(ABC, Generic[Result]):
    """Collects predictions for the command line: a record for JSON, a table, drawings."""

    columns: ClassVar[tuple[str, ...]]
    """Headings of the table, after "image"."""
    suffixes: ClassVar[tuple[str, ...]] = (".png",)  # of the files for an image: the drawing, and those of `files`

    def __init__(self, predictor: Any):
        self.predictor = predictor
        self.predictions: list[dict[str, Any]] = []
        self.table = Table("image", *self.columns, box=box.SIMPLE_HEAD)  # all predictions, for the terminal
        self.table.columns[0].overflow = "fold"

    def add(self, path: Path, image: Image.Image, result: Result) -> None:
        """Add the prediction for an image file to the record and the table."""
        self.predictions.append({"image": str(path), **self.entry(result)})
        for number, cells in enumerate(self.rows(result)):
            self.table.add_row(Text("" if number else printable(path)), *cells)
        self.table.add_section()

    def record(self) -> dict[str, Any]:
        """All predictions, for JSON."""
        return {"predictions": self.predictions}

    def entry(self, result: Result) -> dict[str, Any]:
        """An image's entry in `predictions`, besides its path."""
        return {}

    @abstractmethod
    def rows(self, result: Result) -> Iterable[Sequence[str | Text]]:
        """An image's rows in the table, one or more: the cells of `columns`."""

    @abstractmethod
    def draw(self, title: str, image: Image.Image, result: Result) -> tuple[Image.Image, Image.Image, Caption]:
        """A drawing of a prediction, a smaller one for the contact sheet, and its caption there."""

    def files(self, result: Result) -> dict[str, Image.Image]:
        """Other images to keep beside the drawing, by suffix."""
        return {}
