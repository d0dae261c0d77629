"""What the label formats share."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualtoken_vit.data.coco import DIGITS, AnnotatedImages
from dualtoken_vit.data.images import image_size
from dualtoken_vit.data.threads import in_threads, track
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable, relative


class Format(NamedTuple):
    """A label format: how it is recognised, read and written."""

    detect: Callable[[Path], dict[str, Any]]
    """The splits of a folder by name, with what `read` takes; empty if the folder is in another format."""
    read: Callable[[Path, Any], AnnotatedImages]
    """A split, from the folder and what `detect` found."""
    write: Callable[[Mapping[str, AnnotatedImages], Path], list[str]] | None = None
    """Write valid splits into an empty folder, images included; returns a line on each thing that the format lacks."""
    usable: Callable[[Path, Any], bool] = lambda root, found: True
    """Whether a split, what `detect` found, is there and has labels: the test split of a competition has none."""


def number(text: Any) -> float:
    """A finite number in a label file; a ValueError that quotes other text."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{text!r:.50} is not a number") from None
    except OverflowError:  # an integer of JSON that no float can have
        value = float("inf")
    if not abs(value) < float("inf"):
        raise ValueError(f"{text!r:.50} is not a finite number")
    return value


def stated_size(sides: Iterable[Any]) -> tuple[int, int] | None:
    """Width and height as a label file states them, None where it does not; a ValueError for those of no image."""
    stated = [str(side).strip() for side in sides]
    if not all(map(str.isdecimal, stated)):
        return None
    if max(map(len, stated)) > 9:
        raise ValueError(f"its size of {' x '.join(f'{side:.20}' for side in stated)} is that of no image")
    width, height = map(int, stated)
    return (width, height) if width and height else None


def sizes(paths: Sequence[Path], title: str) -> list[tuple[int, int] | str]:
    """Width and height of each image, or what is wrong with it."""

    def look(path: Path) -> tuple[int, int] | str:
        try:
            return image_size(path)
        except InputError as error:
            return str(error)

    return list(in_threads(look, paths, len(paths), title))


class Labels:
    """Collects the images and objects of a split in COCO's form.

    Args:
        root: folder of the dataset
        names: the classes in their order; None: those that objects name, in alphabetical order
    """

    def __init__(self, root: Path, names: Sequence[str] | None = None) -> None:
        self.root, self.names = root, names
        self.paths: list[Path] = []
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def place(self, path: Path, inside: str = "") -> str:
        """A file, and a line or object in it, for messages."""
        return relative(path, self.root) + (f", {inside}" if inside else "")

    def add_image(self, path: Path, size: tuple[int, int]) -> None:
        """The image, of this width and height, to which the next objects belong."""
        self.paths.append(path)
        self.images.append({"id": len(self.images) + 1, "width": size[0], "height": size[1]})

    def add(
        self,
        name: str,
        corners: Sequence[float],
        where: str,
        shape: Sequence[Sequence[float]] | dict[str, Any] = (),
        crowd: bool = False,
    ) -> None:
        """An object of the last image: its class, its box as left, top, right, bottom, and where it stands.

        `shape` is its polygons (x, y, x, y, ...) or an RLE of its mask. Coordinates are in pixels.
        """
        left, top, right, bottom = corners
        annotation: dict[str, Any] = {
            "id": len(self.annotations) + 1,
            "image_id": len(self.images),
            "category_id": name,
            "bbox": [round(value, DIGITS) for value in (left, top, right - left, bottom - top)],
            "where": where,
        }
        if isinstance(shape, dict):
            annotation["segmentation"] = shape
        elif shape:
            annotation["segmentation"] = [[round(value, DIGITS) for value in polygon] for polygon in shape]
        if crowd:
            annotation["iscrowd"] = 1
        self.annotations.append(annotation)

    def collect(self) -> AnnotatedImages:
        """All of it. The images' folder is the lowest that contains them all."""
        folder = os.path.commonpath([path.parent for path in self.paths]) if self.paths else str(self.root)
        for image, path in zip(self.images, self.paths, strict=True):
            image["file_name"] = relative(path, folder)
        names = sorted({one["category_id"] for one in self.annotations}) if self.names is None else self.names
        ids = {name: number for number, name in enumerate(names, start=1)}
        for one in self.annotations:
            one["category_id"] = ids[one["category_id"]]
        coco = {
            "images": self.images,
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
            "annotations": self.annotations,
        }
        problems, notes = tuple(map(printable, self.problems)), tuple(map(printable, self.notes))
        return AnnotatedImages(str(self.root), coco, folder, problems=problems, notes=notes)


def class_names(splits: Mapping[str, AnnotatedImages]) -> list[str]:
    """The classes of all splits, each split's in the order of their ids."""
    ordered = (sorted(split.coco["categories"], key=lambda one: one["id"]) for split in splits.values())
    return list(dict.fromkeys(one["name"] for categories in ordered for one in categories))


def labelled(split: AnnotatedImages) -> Iterable[tuple[dict, list[tuple[str, dict]]]]:
    """Each image of a split with its annotations and their classes, as (name, annotation); a progress bar on stderr."""
    names = {one["id"]: one["name"] for one in split.coco["categories"]}
    of_image: dict[int, list[tuple[str, dict]]] = {image["id"]: [] for image in split.coco["images"]}
    for one in split.coco["annotations"]:
        of_image[one["image_id"]].append((names[one["category_id"]], one))
    images = split.coco["images"]
    return ((image, of_image[image["id"]]) for image in track(images, len(images), "writing"))


def copy_image(source: str, path: Path, label: Path | None = None) -> None:
    """Copy an image of a split to `path`, and make the folder of its label file.

    Raises:
        InputError: where another image has one of these names, also on a disk that takes capitals for small letters.
    """
    for each in filter(None, (path, label)):
        if each.exists():
            differ = "in the extension, or " if each is label else ""
            raise InputError(f"{printable(source)}: another image differs only {differ}in capitals; rename one")
        each.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)


def polygons_of(annotation: dict) -> list[list[float]]:
    """The polygons of an annotation, none for an RLE."""
    segmentation = annotation.get("segmentation") or []
    return segmentation if isinstance(segmentation, list) else []


def text(value: float) -> str:
    """A number as files have it: without a needless fraction, and with all of its digits that count."""
    return f"{value:.12g}"
