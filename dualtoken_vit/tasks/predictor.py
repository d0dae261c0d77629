"""A trained network as a function of images: what every task's predictor shares, and how its results are shown."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import printable
from dualtoken_vit.runtime.base import BasePredictor

Result = TypeVar("Result")
Caption = tuple[str, float | None]  # text and share


class Predictor(BasePredictor[Result]):
    """A trained network in PyTorch; see `BasePredictor`.

    Args:
        model: the network, on its device; `load_predictor` puts it into evaluation mode
        others: see `BasePredictor`
    """

    def __init__(self, model: nn.Module, class_names: Sequence[str], preprocessing: dict[str, Any], options: Any):
        super().__init__(class_names, preprocessing, options)
        self.model = model

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
        options = super().make_options(**given)
        check_bounds(options)
        return options

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters(), torch.empty(0)).device

    @torch.inference_mode()
    def _run(self, inputs: list[Tensor]) -> list[Result | InputError]:
        """The result of each image, or what went wrong with it: where a batch does not fit in memory, one at a time."""
        if not inputs:
            return []
        try:
            with naming_memory(self.memory_hint):
                return list(super()._run(inputs))
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
