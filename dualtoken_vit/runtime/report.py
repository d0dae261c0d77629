"""How predictions are recorded, tabulated and drawn for the command line."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from PIL import Image

from dualtoken_vit.data.rle import encode_mask
from dualtoken_vit.files import Spool, counted
from dualtoken_vit.results import Classes, LabelMap, Labels, Objects
from dualtoken_vit.show.drawing import SIDE, Text, draw_card, draw_objects, draw_scene, fit, palette

Result = TypeVar("Result")
Caption = tuple[Text, float | None]  # and share


class Report(ABC, Generic[Result]):
    """Collects predictions for the command line: a record for JSON, a table, drawings; in little memory."""

    columns: ClassVar[tuple[str, ...]]
    """Headings of the table, after "image"."""
    suffixes: ClassVar[tuple[str, ...]] = (".png",)  # of the files for an image: the drawing, and those of `files`

    def __init__(self, predictor: Any):
        self.predictor = predictor
        self.predictions = Spool()
        self.table = Spool()  # of each image its file and rows: the cells of `columns`

    def add(self, path: Path, image: Image.Image, result: Result) -> None:
        """Add the prediction for an image file to the record and the table."""
        self.predictions.append({"image": str(path), **self.entry(result)})
        self.table.append((str(path), list(self.rows(result))))

    def record(self) -> dict[str, Any]:
        """All predictions, for `json.dump`."""
        return {"predictions": self.predictions}

    @abstractmethod
    def entry(self, result: Result) -> dict[str, Any]:
        """The prediction for an image or a frame, for JSON."""

    @abstractmethod
    def rows(self, result: Result) -> Iterable[Sequence[str]]:
        """An image's rows in the table, one or more: the cells of `columns`."""

    @abstractmethod
    def draw(self, title: str, image: Image.Image, result: Result) -> tuple[Image.Image, Image.Image, Caption]:
        """A drawing of a prediction, a smaller one for the contact sheet, and its caption there."""

    def files(self, result: Result) -> dict[str, Image.Image]:
        """Other images to keep beside the drawing, by suffix."""
        return {}


class ClassesReport(Report[Classes]):
    """The classes of each image with their probabilities."""

    columns = "class", "probability"

    def entry(self, result: Classes) -> dict[str, Any]:
        names, labels = self.predictor.class_names, result.labels.tolist()
        return {
            "classes": [
                {"class": title, "name": names[label], "index": label, "probability": share}
                for (title, share), label in zip(_pairs(result), labels, strict=True)
            ]
        }

    def rows(self, result: Classes) -> Iterator[tuple[str, str]]:
        return ((name, f"{share:.1%}") for name, share in _pairs(result))

    def draw(self, title: str, image: Image.Image, result: Classes) -> tuple[Image.Image, Image.Image, Caption]:
        small, top = fit(image, SIDE), _pairs(result)
        return draw_card(small, title, top), small, top[0]


class LabelsReport(Report[Labels]):
    """The labels of each image with their probabilities."""

    columns = "label", "probability"

    def entry(self, result: Labels) -> dict[str, Any]:
        return {
            "labels": [
                {"label": name, "index": label, "probability": share}
                for (name, share), label in zip(_pairs(result), result.labels.tolist(), strict=True)
            ]
        }

    def rows(self, result: Labels) -> Iterator[tuple[str, str]]:
        yield from ((name, f"{share:.1%}") for name, share in _pairs(result))
        if not result.names:
            yield "nothing", ""

    def draw(self, title: str, image: Image.Image, result: Labels) -> tuple[Image.Image, Image.Image, Caption]:
        small = fit(image, SIDE)
        return draw_card(small, title, _pairs(result)), small, (result.names or "nothing", None)


def _pairs(result: Classes | Labels) -> list[tuple[str, float]]:
    return list(zip(result.names, result.probabilities.tolist(), strict=True))


class ObjectsReport(Report[Objects]):
    """The objects of each image; the record is a COCO file with scores."""

    columns = "class", "objects", "best"

    def __init__(self, predictor: Any):
        super().__init__(predictor)
        self.category_ids = predictor.category_ids or tuple(range(1, len(predictor.class_names) + 1))
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, predictor.class_names, strict=True)]
        self.coco: dict[str, list[dict[str, Any]]] = {
            "images": Spool(),
            "categories": categories,
            "annotations": Spool(),
        }

    def add(self, path: Path, image: Image.Image, result: Objects) -> None:
        self.table.append((str(path), list(self.rows(result))))
        images, annotations = self.coco["images"], self.coco["annotations"]
        width, height = image.size
        images.append({"id": len(images) + 1, "file_name": str(path), "width": width, "height": height})
        areas = result.masks.sum((1, 2)) if result.masks is not None else _sides(result.boxes).prod(1)
        for one, area in zip(to_results(len(images), result, self.category_ids), areas.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, **one, "area": area, "iscrowd": 0})

    def record(self) -> dict[str, Any]:
        return self.coco

    def entry(self, result: Objects) -> dict[str, Any]:
        found = to_results(0, result, self.category_ids)
        for one, name in zip(found, result.names, strict=True):
            del one["image_id"]
            one["class"] = name
        return {"objects": found}

    def rows(self, result: Objects) -> Iterator[tuple[str, str, str]]:
        scores: dict[str, list[float]] = {}
        for name, score in zip(result.names, result.scores.tolist(), strict=True):
            scores.setdefault(name, []).append(score)
        for name, found in scores.items():
            yield name, str(len(found)), f"{max(found):.1%}"
        if not scores:
            yield "nothing", "", ""

    def draw(self, title: str, image: Image.Image, result: Objects) -> tuple[Image.Image, Image.Image, Caption]:
        objects = {key: value for key, value in vars(result).items() if value is not None}
        drawing = draw_objects(image, objects, self.predictor.class_names)
        return drawing, drawing, (counted(len(result), "object"), None)


def to_results(image_id: int, found: Objects, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The objects in one image as COCO results; `category_ids` has the json's id of each class index."""
    boxes = np.concatenate((found.boxes[:, :2], _sides(found.boxes)), 1, dtype=np.float64).tolist()
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, label, score in zip(boxes, found.labels.tolist(), found.scores.tolist(), strict=True)
    ]
    if found.masks is not None:
        for result, mask in zip(results, found.masks, strict=True):
            result["segmentation"] = encode_mask(mask)
    return results


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Width and height (N, 2) of boxes (N, 4), in double precision."""
    return np.subtract(boxes[:, 2:], boxes[:, :2], dtype=np.float64)


class LabelMapReport(Report[LabelMap]):
    """The classes of each image with their share of its pixels; label maps as palette PNGs."""

    columns = "class", "share of the pixels"
    suffixes = ".png", ".labels.png"

    def entry(self, result: LabelMap) -> dict[str, Any]:
        return {
            "classes": [
                {"class": name, "index": result.class_names.index(name), "share": share}
                for name, share in result.shares().items()
            ]
        }

    def rows(self, result: LabelMap) -> Iterator[tuple[str, str]]:
        return ((name, f"{share:.1%}") for name, share in result.shares().items())

    def draw(self, title: str, image: Image.Image, result: LabelMap) -> tuple[Image.Image, Image.Image, Caption]:
        drawing = draw_scene([("", image, result.labels)], result.class_names)
        return drawing, drawing, (title, None)

    def files(self, result: LabelMap) -> dict[str, Image.Image]:
        labels = Image.fromarray(result.labels)
        labels.putpalette(palette(len(result.class_names)))
        return {self.suffixes[1]: labels}

    def record(self) -> dict[str, Any]:
        return {"classes": list(self.predictor.class_names), **super().record()}
