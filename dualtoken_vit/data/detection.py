"""Images with objects, as boxes and masks, in the formats of `FORMATS`."""

import json
import math
import os
import pickle
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dualtoken_vit.data.contract import Formats, ImageData, check_trained, some
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.rle import encode_mask
from dualtoken_vit.data.shapes import CLASSES, SCENES, scene
from dualtoken_vit.data.threads import verify_each
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.recipes import DetectionData

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

    name: str  # of the annotations, for messages: the json file
    coco: dict[str, list]  # images, categories and annotations as in a COCO json, not yet checked
    folder: str = ""  # of the images
    draw: Callable[[dict], Image.Image] | None = None  # makes an image from its entry; None: it is a file in `folder`

    def path(self, image: dict) -> str:
        """The display name of an image, which is its file if it has one."""
        return os.path.join(self.folder, image["file_name"])

    def source(self, image: dict) -> str | Image.Image:
        """What `load_image` takes."""
        return self.draw(image) if self.draw else self.path(image)


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
    return AnnotatedImages(str(path), {key: coco[key] for key in _FIELDS}, str(images))


def sift(coco: dict[str, list], masks: bool) -> tuple[dict[str, list[dict]], list[str]]:
    """The valid entries of a COCO file, and one line on each other entry.

    With `masks`, each annotation must have a segmentation.
    """
    problems: list[str] = []
    sound: dict[str, dict[int, dict]] = {}  # by id
    broken: dict[str, set] = {kind: set() for kind in _FIELDS}  # ids
    for kind, fields in _FIELDS.items():
        sound[kind], names = {}, set()
        for number, entry in enumerate(coco[kind]):
            fault = _field_fault(entry, fields)
            name = f"{kind}[{number}]" if fault else f"{_ONE[kind]} {entry['id']}"
            if not fault and entry["id"] in sound[kind]:
                fault = "its id is used twice"
            elif not fault and kind == "images" and min(entry["width"], entry["height"]) < 1:
                fault = f"its size is {entry['width']}x{entry['height']}"
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
                names.add(entry.get("name"))
    return {kind: list(entries.values()) for kind, entries in sound.items()}, problems


def first_images(coco: dict[str, list[dict]], limit: int | None) -> dict[str, list[dict]]:
    """The first `limit` images of a COCO file's valid entries, with their annotations."""
    images = coco["images"][:limit]
    kept = {image["id"] for image in images}
    return coco | {"images": images, "annotations": [one for one in coco["annotations"] if one["image_id"] in kept]}


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
        return "has no segmentation: Mask R-CNN needs one, RetinaNet does not"
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
        f"in {printable(name)}: correct the image, or the json and its boxes"
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


class DetectionDataset(Dataset, ImageData):
    """Images with objects. Some objects may be crowds, and images may have no objects.

    Sample i is (image, target): the image a tv_tensors.Image (C, H, W) uint8, and the target a dict of

    - boxes: tv_tensors.BoundingBoxes (N, 4) XYXY float32 in pixels, clipped to the image
    - labels: (N,) int64, indices into class_names
    - masks: tv_tensors.Mask (N, H, W) uint8, if `masks`
    - crowd: tv_tensors.BoundingBoxes (K, 4): regions of objects that are not annotated one by one
    - image_id: int, as in the json

    Both have been through `transform`, if there is one. Objects and crowds with less than `MIN_SIDE` pixels of width or
    height in the image are not in the targets, but they are in `truth`. `dropped` is the number of these, `trained` the
    number of other objects.

    Args:
        split: the images and their annotations, of which only those of the first `limit` images are used
        masks: whether targets have masks; then each annotation must have a segmentation
        channels: 3 (RGB) or 1 (greyscale)
        class_names: the trained classes in their order; default: the categories, ordered by id

    Raises:
        InputError: for the first broken entry, a missing image, no images, or categories outside `class_names`.
    """

    def __init__(
        self,
        split: AnnotatedImages,
        masks: bool,
        channels: int = 3,
        class_names: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.name, self.masks, self.channels = printable(split.name), masks, channels
        self.split = split._replace(coco={})  # its annotations are packed below
        self.dropped = 0
        coco, problems = sift(split.coco, masks)
        if problems:
            more = f" (and {len(problems) - 1} more: check-data lists all)" if len(problems) > 1 else ""
            raise InputError(f"{self.name}: {problems[0]}{more}")
        for kind in ("images", "categories"):
            if not coco[kind]:
                raise InputError(f"{self.name}: no {kind}")
        coco = first_images(coco, limit)
        self.images = coco["images"]
        self.image_names = [split.path(image) for image in self.images]
        if not split.draw:
            self._check_files()
        ids = {one["name"]: one["id"] for one in sorted(coco["categories"], key=lambda one: one["id"])}
        self.class_names = tuple(ids if class_names is None else class_names)
        check_trained(ids, self.class_names, f"{self.name}: category")
        for each in self.class_names:
            ids.setdefault(each, max(ids.values()) + 1)  # absent from this file; detections of it still need an id
        self.category_ids = [ids[each] for each in self.class_names]  # by class index
        self.image_ids = [image["id"] for image in self.images]
        self.sizes = [(image["width"], image["height"]) for image in self.images]
        self.groups = [int(height > width) for width, height in self.sizes]  # portrait or not: less padding in a batch
        images = {image["id"]: image for image in self.images}
        of_image: dict[int, list[dict]] = {image_id: [] for image_id in images}
        keys = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", *["segmentation"] * masks]
        trained = []
        for annotation in coco["annotations"]:
            of_image[annotation["image_id"]].append({key: annotation[key] for key in keys if key in annotation})
            if degenerate(annotation, images[annotation["image_id"]]):
                self.dropped += 1
            elif not annotation.get("iscrowd"):
                trained.append(annotation["category_id"])
        self.trained, present = len(trained), set(trained)
        self.annotations = Packed(list(of_image.values()))
        self._labels = {category: label for label, category in enumerate(self.category_ids)}
        absent = [name for name in self.class_names if ids[name] not in present]
        if absent:
            self.notes = (f"{self.name}: no objects of class {some(absent)}",)

    def _check_files(self) -> None:
        if not Path(self.split.folder).is_dir():
            folder = printable(self.split.folder)
            raise InputError(f"{folder}: no such folder; give the one that contains the images of {self.name}")
        missing = [path for path in self.image_names if not os.path.isfile(path)]
        if missing:
            more = f" (and {len(missing) - 1} more of its images)" if len(missing) > 1 else ""
            raise InputError(f"{printable(missing[0])}: no such file, but it is listed in {self.name}{more}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        image, (objects, crowds) = self.images[index], self.objects(index)

        def boxes(annotations: list[dict]) -> tv_tensors.BoundingBoxes:
            corners = torch.tensor([clip(one, image) for one in annotations], dtype=torch.float32).reshape(-1, 4)
            size = (image["height"], image["width"])
            return tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)

        target = {
            "boxes": boxes(objects),
            "labels": torch.tensor([self._labels[one["category_id"]] for one in objects], dtype=torch.int64),
            "crowd": boxes(crowds),
            "image_id": image["id"],
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(decode_masks(objects, image))
        sample = v2.functional.to_image(self.image(index)), target
        return self.transform(*sample) if self.transform else sample

    def objects(self, index: int) -> tuple[list[dict], list[dict]]:
        """The annotations of image `index` that training uses: objects, and crowds."""
        sound = [one for one in self.annotations[index] if not degenerate(one, self.images[index])]
        return [one for one in sound if not one.get("iscrowd")], [one for one in sound if one.get("iscrowd")]

    def image(self, index: int) -> Image.Image:
        """Image `index`; an InputError if it cannot be read, or does not have the size in the json."""
        entry, path = self.images[index], self.image_names[index]
        image = load_image(self.split.source(entry), self.channels, path)
        fault = size_fault(path, image.size, entry, self.name)
        if fault:
            raise InputError(fault)
        return image

    def verify(self, skip: bool = False, progress: bool = True) -> list[str]:
        """Read every image once; see `ImageData`. No image is left out."""
        if not self.split.draw:
            verify_each(self.image, range(len(self)), len(self), "reading every image" if progress else "")
        return []

    @cached_property
    def truth(self) -> dict[str, list[dict]]:
        """The COCO file that evaluation compares with: annotations numbered from 1, all with iscrowd and area."""
        sizes = dict(zip(self.image_ids, self.sizes, strict=True))
        annotations = []
        # To COCO's evaluation, annotation id 0 means "no match".
        for number, annotation in enumerate(chain.from_iterable(self.annotations), start=1):
            area = annotation.get("area")
            if area is None and self.masks:
                area = float(rle.area(rle.segmToRle(annotation["segmentation"], *sizes[annotation["image_id"]])))
            elif area is None:
                area = annotation["bbox"][2] * annotation["bbox"][3]
            crowd = int(annotation.get("iscrowd", 0))
            annotations.append(annotation | {"id": number, "area": area, "iscrowd": crowd})
        pairs = zip(self.category_ids, self.class_names, strict=True)
        categories = [{"id": category, "name": name} for category, name in pairs]
        return {"images": self.images, "categories": categories, "annotations": annotations}


def draw_scenes(split: str, size: int, count: int | None = None) -> AnnotatedImages:
    """The first `count` scenes of a split (default: all): images of `size` pixels a side with up to five shapes."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(SCENES[split])[:count]:
        name = f"{split}-{index:04d}.png"
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for shape in scene(split, index, size)[1]:
            left, top, right, bottom = shape.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": shape.label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(shape.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(shape.mask),
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, start=1)]
    coco = {"images": images, "categories": categories, "annotations": annotations}
    return AnnotatedImages(f"shapes {split}", coco, draw=partial(_draw_scene, split, size))


def _draw_scene(split: str, size: int, image: dict) -> Image.Image:
    return scene(split, image["id"] - 1, size)[0]


def save_scenes(folder: str | Path, size: int = 128, **counts: int) -> None:
    """Write scenes as FOLDER/images/*.png and FOLDER/annotations/instances_{train,val}.json.

    They have `size` pixels a side; `counts` (train=100) limits the number of scenes in a split.
    """
    for split, total in SCENES.items():
        count = counts.get(split, total)
        if not count:
            continue
        scenes = draw_scenes(split, size, count)
        for image in scenes.coco["images"]:
            with atomic_write(Path(folder, "images", image["file_name"])) as file:
                _draw_scene(split, size, image).save(file, format="png")
        with atomic_write(Path(folder, "annotations", f"instances_{split}.json"), "w") as file:
            json.dump(scenes.coco, file)


def _coco(data: DetectionData, split: str) -> AnnotatedImages:
    """COCO json files, and a folder of images."""
    images = data.val_images if split == "val" and data.val_images else data.images
    path = {"train": data.train_json, "val": data.val_json}[split]
    for flag, value, what in (
        ("--data.images", images, "the folder of the images"),
        (f"--data.{split}-json", path, "the COCO json with their objects"),
    ):
        if not value:
            raise InputError(f"{flag} is missing: give {what}")
    return read_coco(path, images)


def _shapes(data: DetectionData, split: str) -> AnnotatedImages:
    if data.images or data.train_json or data.val_json:
        raise InputError("--data.dataset shapes draws its own images; for files give --data.dataset coco")
    return draw_scenes(split, data.image_size, data.limit)


FORMATS: Formats[AnnotatedImages] = Formats(coco=_coco, shapes=_shapes)


def build_datasets(data: DetectionData, masks: bool, channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and the validation images, which need a `transform`; an InputError for data that does not fit."""
    train = DetectionDataset(FORMATS.read(data, "train"), masks, channels, limit=data.limit)
    return train, build_val_dataset(data, masks, channels, train.class_names)


def build_val_dataset(data: DetectionData, masks: bool, channels: int, class_names: Sequence[str]) -> DetectionDataset:
    """The validation images alone, with `class_names` in their order; absent classes are named in `notes`."""
    return DetectionDataset(FORMATS.read(data, "val"), masks, channels, class_names, data.limit)
