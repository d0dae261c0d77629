"""A network as a function of images, whatever computes it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import IOBase
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import load_image, prefixed
from dualtoken_vit.errors import InputError, naming_memory
from dualtoken_vit.files import printable
from dualtoken_vit.hints import fits, type_name
from dualtoken_vit.runtime.report import Report

Result = TypeVar("Result")
ImageLike = Any
"""str | PathLike[str] | PIL.Image.Image | numpy.ndarray | torch.Tensor"""


@dataclass(frozen=True)
class Prediction(Generic[Result]):
    """An image, and what was predicted for it or why that failed."""

    image: Image.Image | None  # as loaded; None where it cannot be read
    result: Result | None
    error: InputError | None = None


class BasePredictor(ABC, Generic[Result]):
    """Runs a trained network on images: `preprocess` each, `forward` a batch, `postprocess` its outputs.

    A call accepts

    - a path, a PIL image, a numpy array (H, W) or (H, W, C), or a torch tensor (C, H, W): returns one result;
    - a folder (all images in and below it, in natural order), a list of the above, or a tensor (B, C, H, W): returns a
      list of results.

    Arrays and tensors are RGB or grey: uint8, or floating point between 0 and 1.

    Args:
        class_names: in the order of the network's outputs
        preprocessing: of the checkpoint: input_size (C, H, W), mean, std, and what else turns outputs into results
        options: of `Options`, checked
    """

    Options: ClassVar[type]  # dataclass of what a call of `load_predictor`, or the command line, may choose
    report: ClassVar[type[Report[Any]]]  # records, tabulates and draws results for the command line
    batch_size: ClassVar[int] = 32  # images in a batch unless a call chooses it
    ahead: ClassVar[int] = 32  # images, or a batch of them, that may wait in memory
    memory_hint: ClassVar[str] = "use a smaller image_size"  # what helps where an image does not fit into memory

    category_ids: tuple[int, ...] = ()  # detection: the number of each class in the COCO json

    def __init__(self, class_names: Sequence[str], preprocessing: dict[str, Any], options: Any):
        self.class_names, self.preprocessing, self.options = tuple(class_names), preprocessing, options
        self.channels: int = preprocessing["input_size"][0]

    @property
    def titles(self) -> tuple[str, ...]:
        """What to call the classes in results: timm's descriptions where the names are WordNet ids."""
        return tuple(self.preprocessing.get("label_descriptions") or self.class_names)

    @classmethod
    def make_options(cls, **given: Any) -> Any:
        """The options; an InputError for one that does not exist, or an out-of-range value."""
        hints = get_type_hints(cls.Options)
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        for name, value in options.items():
            if name not in hints:
                raise InputError(f"{name}: not an option of this predictor; there are {', '.join(hints)}")
            if not fits(value, hints[name]):
                raise InputError(f"--{name.replace('_', '-')} {value!s:.60}: must be {type_name(hints[name])}")
        return cls.Options(**options)

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Any:
        """What the network takes of a PIL image, on the CPU."""

    def collate(self, inputs: list[Any]) -> Any:
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
        single, sources = self._expand(images)
        results = []
        for prediction in self.stream(sources, batch_size):
            if prediction.error is not None:
                raise prediction.error
            results.append(prediction.result)
        return results[0] if single else results

    def _expand(self, images: Any) -> tuple[bool, list[Any]]:
        """Whether one result is meant, and the single images."""
        if isinstance(images, str | PathLike) and os.path.isdir(images):
            found: list[Any] = list(image_files(Path(images)))
            if not found:
                raise InputError(f"{printable(images)}: no images in this folder")
            return False, found
        if is_tensor(images) and images.ndim == 4:
            return False, list(images)
        if is_tensor(images) or isinstance(images, str | PathLike | Image.Image | np.ndarray):
            return True, [self._own(images, set())]
        if isinstance(images, bytes | IOBase) or not isinstance(images, Iterable):
            raise InputError(
                f"cannot predict for an object of type {type(images).__name__}: give a path, a folder, a PIL image, an "
                "array, a tensor, or a list of these"
            )
        return False, [one for each in images for one in self._expand(each)[1]]

    def stream(
        self, images: Iterable[ImageLike], batch_size: int | None = None, title: str = ""
    ) -> Generator[Prediction[Result]]:
        """Yield one `Prediction` per image, in order; an image that fails does not stop the others.

        Args:
            images: paths, PIL images, arrays or tensors of one image each
            batch_size: images in a forward pass
            title: of a progress bar on stderr; none without one
        """
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise InputError(f"batch_size={size}: must be at least 1")
        seen = set[int]()
        images = [self._own(image, seen) for image in images]
        # Closing ends the bar, which a traceback would keep alive.
        with closing(self._load_all(images, size, title)) as all_loaded:
            loaded = zip(images, all_loaded, strict=True)
            while chunk := list(islice(loaded, size)):
                results = iter(self._run([inputs for _, (_, inputs, _) in chunk if inputs is not None]))
                for source, (image, _, error) in chunk:
                    result = error or next(results)
                    if not isinstance(result, InputError):
                        yield Prediction(image, result)
                    else:
                        yield Prediction(image, None, error or InputError(f"{_name(source)}: {result}"))

    def load(self, source: ImageLike) -> tuple[Image.Image | None, Any, InputError | None]:
        """An image as loaded, as preprocessed, and the error where it cannot be read."""
        try:
            image = to_image(source, self.channels)
            with prefixed(_name(source)), naming_memory(self.memory_hint):
                return image, self.preprocess(image), None
        except InputError as error:
            return None, None, error

    def _own(self, source: ImageLike, seen: set[int]) -> ImageLike:
        """A PIL image of a file, decoded now if it is of an animation, which goes on, or in `seen`, the ids of others.

        Threads cannot share its file.
        """
        with suppress(Exception):  # which comes again where it is loaded
            if isinstance(source, ImageFile) and (id(source) in seen or getattr(source, "is_animated", False)):
                return load_image(source, self.channels)
        seen.add(id(source))
        return source

    def _load_all(
        self, images: list[ImageLike], size: int, title: str
    ) -> Generator[tuple[Image.Image | None, Any, Any]]:
        """`load` of each image, in threads where the train extra is installed."""
        try:
            from dualtoken_vit.data.threads import in_threads
        except ModuleNotFoundError:
            yield from map(self.load, images)
        else:
            yield from in_threads(self.load, images, len(images), title, max(self.ahead, size))

    def _run(self, inputs: list[Any]) -> Sequence[Result | InputError]:
        """The result of each image, or what went wrong with it."""
        return self.postprocess(self.forward(self.collate(inputs))) if inputs else []


def _name(source: ImageLike) -> str:
    """What errors call an image."""
    return printable(source) if isinstance(source, str | PathLike) else "the image"


def is_tensor(source: Any) -> bool:
    """Whether this is a torch tensor, without torch."""
    return hasattr(source, "detach") and hasattr(source, "ndim")  # files have a method detach, too


def to_image(source: ImageLike, channels: int) -> Image.Image:
    """A path, PIL image, array or tensor as an 8-bit PIL image; an InputError for one that cannot be used."""
    if isinstance(source, str | PathLike):
        return load_image(Path(source), channels, printable(source))
    if isinstance(source, Image.Image):
        return load_image(source, channels)
    form = f"an image of shape {tuple(source.shape)} and type {source.dtype}"
    if is_tensor(source):
        source = source.detach().cpu()
        array = source.float().numpy() if source.is_floating_point() else source.numpy()
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
