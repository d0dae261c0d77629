"""COCO's form of images with objects, into which the readers of all formats put their files."""

import json
import math
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor

from dualtoken_vit.data.splits import inside
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import printable

SIDES = range(1, 10**6 + 1)  # pixels of an image's width and height; masks of much larger ones cannot be computed
DIGITS = 6  # after the decimal point of coordinates in pixels: an image's side times a quotient by it is itself again
MIN_SIDE = 1.0  # pixels; training ignores objects whose width or height in the image is smaller

_FIELDS = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}
_ONE = {"images": "image", "categories": "category", "annotations": "annotation"}
_TYPES = {int: "an integer", str: "a string", list: "a list"}


class AnnotatedImages(NamedTuple):
    """A split as the reader of a format returns it."""

    name: str  # of the annotations, for messages: the json file, or the folder of the dataset
    coco: dict[str, list]  # images, categories and annotations as in a COCO json, not yet checked
    folder: str = ""  # of the images
    draw: Callable[[dict], Image.Image] | None = None  # makes an image from its entry; None: it is a file in `folder`
    problems: tuple[str, ...] = ()  # what the reader left out of `coco`, a line each, with its place
    notes: tuple[str, ...] = ()  # lines to print before training
    choose: Callable[[list[dict]], list[dict]] | None = None  # which of the valid images are in the split; None: all
    splits: tuple[str, ...] = ()  # `ImageData.splits`

    def path(self, image: dict) -> str:
        """The display name of an image, which is its file if it has one."""
        return os.path.join(self.folder, image["file_name"])

    def source(self, image: dict) -> str | Image.Image:
        """What `load_image` takes."""
        return self.draw(image) if self.draw else self.path(image)

    def sift(self, masks: bool, limit: int | None = None) -> tuple[dict[str, list[dict]], list[str]]:
        """The valid entries of the first `limit` images, and one line on each problem; see `sift`."""
        coco, problems = sift(self.coco, masks, self.folder)
        images = (self.choose(coco["images"]) if self.choose else coco["images"])[:limit]
        kept = {image["id"] for image in images}
        annotations = [one for one in coco["annotations"] if one["image_id"] in kept]
        return coco | {"images": images, "annotations": annotations}, [*self.problems, *problems]


def read_coco(path: str | Path, images: str | Path = "") -> AnnotatedImages:
    """A COCO json, its single entries unchecked, and the folder of its images; an InputError for other files."""
    name = printable(path)
    try:
        content = Path(path).read_bytes()
        # Names in another encoding are kept as the system keeps those of files.
        coco = json.loads(content.decode(json.detect_encoding(content), "surrogateescape"))
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: cannot be read as JSON ({reason(error)})") from None
    for key in _FIELDS:
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise InputError(f"{name} is not a COCO file: no list {key!r}; it needs {', '.join(_FIELDS)}")
    coco = {key: coco[key] for key in _FIELDS} | {"annotations": [*map(_upright, coco["annotations"])]}
    return AnnotatedImages(str(path), coco, str(images), notes=_crowd_note(name, coco["annotations"]))


def _upright(annotation: Any) -> Any:
    """The annotation; where its box is turned by CVAT's attribute `rotation`, with the box around that."""
    if not isinstance(annotation, dict) or annotation.get("segmentation"):
        return annotation
    attributes, box = annotation.get("attributes"), annotation.get("bbox")
    if not isinstance(attributes, dict) or not isinstance(box, list) or len(box) != 4:
        return annotation
    rotation = attributes.get("rotation")
    if not rotation or not _finite([rotation, *box]):
        return annotation
    left, top, right, bottom = enclosing((box[0], box[1], box[0] + box[2], box[1] + box[3]), rotation)
    bbox = [round(value, DIGITS) for value in (left, top, right - left, bottom - top)]
    # Without the attribute: `convert` writes the box, which is then read again.
    attributes = {key: value for key, value in attributes.items() if key != "rotation"}
    return annotation | {"bbox": bbox, "attributes": attributes}


def enclosing(corners: Sequence[float], degrees: float) -> list[float]:
    """The upright box around one that is turned about its centre; both as left, top, right and bottom."""
    left, top, right, bottom = corners
    cos, sin = (abs(each(math.radians(degrees))) for each in (math.cos, math.sin))
    across, down = (right - left) * cos + (bottom - top) * sin, (right - left) * sin + (bottom - top) * cos
    x, y = (left + right) / 2, (top + bottom) / 2
    return [x - across / 2, y - down / 2, x + across / 2, y + down / 2]


def _crowd_note(name: str, annotations: list) -> tuple[str, ...]:
    """A line on crowds with `attributes`, which CVAT and Datumaro write, and COCO's own files lack."""
    ones = [one for one in annotations if isinstance(one, dict) and isinstance(one.get("attributes"), dict)]
    crowds = sum(one.get("iscrowd") == 1 for one in ones)
    if not crowds:
        return ()
    why = "CVAT writes it for every mask and ellipse: set it to 0 if they are single objects"
    return (f"{name}: {crowds} of {len(annotations)} annotations have iscrowd 1 and are not trained on; {why}",)


def sift(coco: dict[str, list], masks: bool, folder: str = "") -> tuple[dict[str, list[dict]], list[str]]:
    """The valid entries of a COCO file, and one line on each other entry.

    With `masks`, each annotation must have a segmentation. Images must be in `folder`, by their names.
    """
    problems: list[str] = []
    sound: dict[str, dict[int, dict]] = {}  # by id
    broken: dict[str, set] = {kind: set() for kind in _FIELDS}  # ids
    for kind, fields in _FIELDS.items():
        sound[kind], names, files = {}, set(), dict[str, int]()
        for number, entry in enumerate(coco[kind]):
            fault = _field_fault(entry, fields)
            name = f"{kind}[{number}]" if fault else entry_name(kind, entry)
            if not fault and entry["id"] in sound[kind]:
                fault = "its id is used twice"
            elif not fault and kind == "images" and not (entry["width"] in SIDES and entry["height"] in SIDES):
                size = f"{entry['width']}x{entry['height']}"
                fault = f"its size is {size:.50}, but a side has from 1 to {SIDES[-1]:,} pixels"
            elif not fault and kind == "images" and not inside(folder, os.path.join(folder, entry["file_name"])):
                fault = f"its file_name {entry['file_name']!r:.200} leads out of the folder of the images"
            elif not fault and kind == "images" and os.path.normpath(entry["file_name"]) in files:
                other = files[os.path.normpath(entry["file_name"])]
                fault = f"its file_name {entry['file_name']!r:.200} is that of image {other}, too: give them one entry"
            elif not fault and kind == "categories" and entry["name"] in names:
                fault = f"its name {entry['name']!r} is used twice"
            elif not fault and kind == "annotations":
                if entry["image_id"] in broken["images"] or entry["category_id"] in broken["categories"]:
                    continue  # reported already
                fault = _annotation_fault(entry, sound["images"], sound["categories"], masks)
            if fault:
                problems.append(f"{name}: {fault}")
                if isinstance(entry, dict) and type(entry.get("id")) is int and entry["id"] not in sound[kind]:
                    broken[kind].add(entry["id"])
            else:
                sound[kind][entry["id"]] = entry
                if kind == "categories":
                    names.add(entry["name"])
                elif kind == "images":
                    files[os.path.normpath(entry["file_name"])] = entry["id"]
    return {kind: list(entries.values()) for kind, entries in sound.items()}, problems


def entry_name(kind: str, entry: dict) -> str:
    """How messages call an entry: where it stands in its file ("where"), or its id."""
    return str(entry.get("where") or f"{_ONE[kind]} {entry['id']}")


def _field_fault(entry: Any, fields: dict[str, type]) -> str:
    if not isinstance(entry, dict):
        return f"{entry!r:.50} is not an object with fields"
    wrong = (key for key, kind in fields.items() if type(entry.get(key)) is not kind)
    return next((f"{key} must be {_TYPES[fields[key]]}, not {entry.get(key)!r:.50}" for key in wrong), "")


def _annotation_fault(annotation: dict, images: dict[int, dict], categories: dict[int, dict], masks: bool) -> str:
    for kind, there in (("image", images), ("category", categories)):
        if annotation[f"{kind}_id"] not in there:
            return f"refers to {kind} {annotation[f'{kind}_id']}, which is not in the file"
    if len(annotation["bbox"]) != 4 or not _finite(annotation["bbox"]):
        return f"bbox must be 4 numbers (left, top, width, height), not {annotation['bbox']!r:.50}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd must be 0 or 1, not {annotation['iscrowd']!r:.50}"
    if annotation.get("area") is not None and not _finite([annotation["area"]]):
        return f"area must be a number, not {annotation['area']!r:.50}"
    if masks and not annotation.get("segmentation"):
        return "has no segmentation, which Mask R-CNN and segmenters need; RetinaNet does not"
    return segmentation_fault(annotation["segmentation"], images[annotation["image_id"]]) if masks else ""


def segmentation_fault(segmentation: Any, image: dict) -> str:
    """What is wrong with a segmentation (polygons, or an RLE, compressed or not) of an image entry; "" if nothing."""
    width, height = image["width"], image["height"]
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not _finite(polygon):
                return "its segmentation has a polygon that is not 3 or more pairs of numbers"
            if max(map(abs, polygon)) > 10 * max(width, height):  # rasterising it would take too long
                return "its segmentation has a polygon far outside the image"
        return ""
    if not isinstance(segmentation, dict) or type(segmentation.get("counts")) not in (str, list):
        return "its segmentation is neither polygons nor an RLE"
    if segmentation.get("size") != [height, width]:
        return f"its segmentation is of size {segmentation.get('size')!r:.50}, not [{height}, {width}] as its image"
    try:
        coded = rle.segmToRle(segmentation, width, height)
        filled = rle.merge([coded, coded])["counts"]  # covers the image; decoding every mask would be slow
        if coded["counts"] not in (filled, filled.decode("ascii")):
            rle.decode(coded)
    except (ValueError, RuntimeError, TypeError):
        return "its segmentation has run lengths that do not fill the image"
    return ""


def _finite(numbers: list) -> bool:
    try:
        return all(map(math.isfinite, numbers))
    except (TypeError, OverflowError):  # not a number, or too large for a float
        return False


def size_fault(path: str, size: tuple[int, int], image: dict, name: str) -> str:
    """What is wrong with an image of this size (width, height), by its entry in the json `name`; "" if nothing."""
    expected = (image["width"], image["height"])
    if size == expected:
        return ""
    return (
        f"{printable(path)} is {size[0]}x{size[1]} pixels (after any EXIF rotation), but {expected[0]}x{expected[1]} "
        f"in {printable(name)}: correct the image, or its size and boxes there"
    )


def clip(annotation: dict, image: dict) -> tuple[float, float, float, float]:
    """The part of an annotation's box that is in the image: left, top, right, bottom in pixels."""
    left, top, width, height = annotation["bbox"]
    left, right = (min(max(x, 0), image["width"]) for x in (left, left + width))
    top, bottom = (min(max(y, 0), image["height"]) for y in (top, top + height))
    return left, top, right, bottom


def degenerate(annotation: dict, image: dict) -> bool:
    """Whether less than `MIN_SIDE` of a box's width or height is in the image."""
    left, top, right, bottom = clip(annotation, image)
    return min(right - left, bottom - top) < MIN_SIDE


def object_area(annotation: dict, image: dict) -> float:
    """The area of a valid annotation in pixels: as it states, of its mask, or of its box."""
    if annotation.get("area") is not None:
        return annotation["area"]
    if segmentation := annotation.get("segmentation"):
        return float(rle.area(rle.segmToRle(segmentation, image["width"], image["height"])))
    return annotation["bbox"][2] * annotation["bbox"][3]


def decode_masks(annotations: Sequence[dict], image: dict) -> Tensor:
    """(N, H, W) uint8: the segmentations of valid annotations, 1 inside."""
    width, height = image["width"], image["height"]
    if not annotations:
        return torch.zeros((0, height, width), dtype=torch.uint8)
    masks = rle.decode([rle.segmToRle(annotation["segmentation"], width, height) for annotation in annotations])
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))


class Packed(Sequence):
    """Pickled items in one array, which worker processes share: each would copy a list of Python objects."""

    def __init__(self, items: Sequence[Any]) -> None:
        parts = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return pickle.loads(self.bytes[self.bounds[index] : self.bounds[index + 1]].data)
