"""Images with objects: boxes, and masks where there are any, from COCO json files or drawn by the program."""

import json
import math
import os
import pickle
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dualtoken_vit.data.images import load_image, reason
from dualtoken_vit.data.shapes import CLASSES, SCENES, scene
from dualtoken_vit.data.threads import verify_each
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.recipes import DetectionData

MIN_SIDE = 1.0  # pixels; objects that are narrower or lower, within the image, are not trained on

_FIELDS = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}
_ONE = {"images": "image", "categories": "category", "annotations": "annotation"}
_TYPES = {int: "an integer", str: "a text", list: "a list"}


def read_coco(path: str | Path) -> dict[str, list]:
    """The images, categories and annotations of a COCO json, not yet looked at one by one.

    Raises:
        InputError: for a file that is missing, not JSON, or no COCO file.
    """
    try:
        coco = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({reason(error)})") from None
    for key in _FIELDS:
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise InputError(f"{path} is no COCO file: no list {key!r}; it must have {', '.join(_FIELDS)}")
    return {key: coco[key] for key in _FIELDS}


def sift(coco: dict[str, list], masks: bool) -> tuple[dict[str, list[dict]], list[str]]:
    """Part the sound entries of a COCO file from the broken ones.

    Args:
        coco: As from `read_coco`.
        masks: Whether each annotation must have a segmentation.

    Returns:
        The file with its sound entries only, and a line on each other one.
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
                fault = "its id is that of another"
            elif not fault and kind == "images" and min(entry["width"], entry["height"]) < 1:
                fault = f"a size of {entry['width']}x{entry['height']}"
            elif not fault and kind == "categories" and entry["name"] in names:
                fault = f"its name {entry['name']!r} is that of another"
            elif not fault and kind == "annotations":
                if entry["image_id"] in broken["images"] or entry["category_id"] in broken["categories"]:
                    continue  # of what has been told already
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
    """The first so many images of the sound entries of a COCO file, with their annotations."""
    images = coco["images"][:limit]
    kept = {image["id"] for image in images}
    return coco | {"images": images, "annotations": [one for one in coco["annotations"] if one["image_id"] in kept]}


def _field_fault(entry: Any, fields: dict[str, type]) -> str:
    if not isinstance(entry, dict):
        return f"{entry!r:.50} is not an entry with fields"
    wrong = (key for key, kind in fields.items() if type(entry.get(key)) is not kind)
    return next((f"{key} must be {_TYPES[fields[key]]}, not {entry.get(key)!r:.50}" for key in wrong), "")


def _annotation_fault(annotation: dict, images: dict[int, dict], categories: dict[int, dict], masks: bool) -> str:
    for kind, there in (("image", images), ("category", categories)):
        if annotation[f"{kind}_id"] not in there:
            return f"names {kind} {annotation[f'{kind}_id']}, which the file does not have"
    if len(annotation["bbox"]) != 4 or not _finite(annotation["bbox"]):
        return f"bbox must be 4 numbers, left, top, width, height, not {annotation['bbox']!r:.50}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd must be 0 or 1, not {annotation['iscrowd']!r:.50}"
    if annotation.get("area") is not None and not _finite([annotation["area"]]):
        return f"area must be a number, not {annotation['area']!r:.50}"
    if masks and not annotation.get("segmentation"):
        return "has no segmentation, which Mask R-CNN needs and RetinaNet does not"
    return segmentation_fault(annotation["segmentation"], images[annotation["image_id"]]) if masks else ""


def segmentation_fault(segmentation: Any, image: dict) -> str:
    """What is wrong with a segmentation of this image of the json: polygons, or an RLE, compressed or not."""
    width, height = image["width"], image["height"]
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not _finite(polygon):
                return "its segmentation has a polygon that is not 3 or more pairs of numbers"
            if max(map(abs, polygon)) > 10 * max(width, height):  # drawing it would take for ever
                return "its segmentation has a polygon far outside the image"
        return ""
    if not isinstance(segmentation, dict) or type(segmentation.get("counts")) not in (str, list):
        return "its segmentation is neither polygons nor an RLE"
    if segmentation.get("size") != [height, width]:
        return f"its segmentation is of size {segmentation.get('size')!r:.50}, not [{height}, {width}] as the image"
    try:
        coded = rle.segmToRle(segmentation, width, height)
        filled = rle.merge([coded, coded])["counts"]  # fills the image; to decode every mask would be slow
        if coded["counts"] not in (filled, filled.decode("ascii")):
            rle.decode(coded)
    except (ValueError, RuntimeError, TypeError):
        return "its segmentation has run lengths that do not fill the image"
    return ""


def _finite(numbers: list) -> bool:
    try:
        return all(map(math.isfinite, numbers))
    except (TypeError, OverflowError):  # no number, or one that no float holds
        return False


def size_fault(path: str, size: tuple[int, int], image: dict, name: str) -> str:
    """What to say of an image whose size (width, height) is not the one in the json `name`."""
    said = (image["width"], image["height"])
    if size == said:
        return ""
    return (
        f"{path} is {size[0]}x{size[1]} pixels as it is shown (after any EXIF rotation), but {said[0]}x{said[1]} in "
        f"{name}: save the image, or mend the json and its boxes"
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
    """(N, H, W) uint8: the segmentations of sound annotations, 1 inside."""
    width, height = image["width"], image["height"]
    if not annotations:
        return torch.zeros((0, height, width), dtype=torch.uint8)
    masks = rle.decode([rle.segmToRle(annotation["segmentation"], width, height) for annotation in annotations])
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's compressed RLE of each mask of (N, H, W) bool: {"size": [H, W], "counts": text}."""
    columns = masks.cpu().numpy().astype(np.uint8).transpose(0, 2, 1)  # the runs go down the columns
    found = [rle.encode(np.ascontiguousarray(one).T) for one in columns]
    return [{"size": list(one["size"]), "counts": one["counts"].decode("ascii")} for one in found]


class Packed(Sequence):
    """Plain data in one array, pickled: processes that read share it, where each would copy Python's own objects."""

    def __init__(self, items: Sequence[Any]) -> None:
        parts = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return pickle.loads(self.bytes[self.bounds[index] : self.bounds[index + 1]])


class DetectionDataset(Dataset):
    """Images with objects, of which some may be crowds, and some images may have none.

    Sample i is (image, target): the image a tv_tensors.Image (C, H, W) uint8, and the target a dict of

    - boxes: tv_tensors.BoundingBoxes (N, 4) XYXY float32 in pixels, clipped to the image
    - labels: (N,) int64, indices into class_names
    - masks: tv_tensors.Mask (N, H, W) uint8, if they are asked for
    - crowd: tv_tensors.BoundingBoxes (K, 4): regions in which single objects are not told apart
    - image_id: int, the json's

    Both went through `transform`, if there is one. Objects and crowds of which less than `MIN_SIDE` pixels of width or
    height are in the image are left out of the targets, though not of `truth`; `dropped` says how many, and `trained`
    how many single objects there are beside them.

    Args:
        coco: The sound entries of a COCO file (see `sift`).
        sources: What `load_image` takes, one an image of `coco`.
        paths: Display name of each image.
        name: What the json is called in errors.
        masks: Whether targets have masks; then each annotation must have a segmentation.
        channels: 3 (RGB) or 1 (grey).
        class_names: The order of the classes; by default that of the category ids.
    """

    def __init__(
        self,
        coco: dict[str, list[dict]],
        sources: Sequence[Any],
        paths: Sequence[str],
        name: str,
        masks: bool,
        channels: int = 3,
        class_names: Sequence[str] | None = None,
    ) -> None:
        ids = {category["name"]: category["id"] for category in sorted(coco["categories"], key=lambda one: one["id"])}
        self.class_names = tuple(ids if class_names is None else class_names)
        missing = [each for each in self.class_names if each not in ids]
        unknown = [each for each in ids if each not in self.class_names]
        if missing or unknown:
            lists = [("no", missing), ("an unknown", unknown)]
            differences = " and ".join(f"{what} {', '.join(map(repr, some[:5]))}" for what, some in lists if some)
            raise InputError(f"{name}: other categories than the {len(self.class_names)} trained ones: {differences}")
        self.category_ids = [ids[each] for each in self.class_names]  # class index: the json's id
        self.images, self.sources, self.paths, self.name = coco["images"], sources, list(paths), name
        self.masks, self.channels = masks, channels
        self.image_ids = [image["id"] for image in self.images]
        self.sizes = [(image["width"], image["height"]) for image in self.images]
        self.groups = [int(height > width) for width, height in self.sizes]  # portrait or not: alike ones share a batch
        self.transform: Callable | None = None
        places = {image_id: index for index, image_id in enumerate(self.image_ids)}
        of_image: list[list[dict]] = [[] for _ in self.images]
        keys = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", *["segmentation"] * masks]
        self.dropped = self.trained = 0
        for annotation in coco["annotations"]:
            index = places[annotation["image_id"]]
            of_image[index].append({key: annotation[key] for key in keys if key in annotation})
            if degenerate(annotation, self.images[index]):
                self.dropped += 1
            else:
                self.trained += not annotation.get("iscrowd")
        self.annotations = Packed(of_image)
        self._labels = {category: label for label, category in enumerate(self.category_ids)}

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
        """The annotations of image `index` that are trained on: single objects, and crowds."""
        sound = [one for one in self.annotations[index] if not degenerate(one, self.images[index])]
        return [one for one in sound if not one.get("iscrowd")], [one for one in sound if one.get("iscrowd")]

    def image(self, index: int) -> Image.Image:
        """Image `index`, whose size is as the json says.

        Raises:
            InputError: where it is not, or there is no image that can be read.
        """
        image = load_image(self.sources[index], self.channels, self.paths[index])
        fault = size_fault(self.paths[index], image.size, self.images[index], self.name)
        if fault:
            raise InputError(fault)
        return image

    def verify(self, skip: bool = False, progress: bool = True) -> list[str]:
        """Read every image once, as `classification.ImageDataset.verify`; none is left out.

        Raises:
            InputError: names the first that cannot be read or has another size, and says how many there are.
        """
        verify_each(self.image, len(self), "reading every image" if progress else "")
        return []

    @cached_property
    def truth(self) -> dict[str, list[dict]]:
        """All that the json says, as evaluation needs it: annotations numbered from 1, with iscrowd and area."""
        sizes = dict(zip(self.image_ids, self.sizes, strict=True))
        annotations = []
        # COCO's evaluation takes 0 for "no match".
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


class CocoDataset(DetectionDataset):
    """The images of a COCO json; see `DetectionDataset`.

    Args:
        images: The folder that the json's file names are relative to.
        path: The json.
        masks: Whether targets have masks.
        channels: 3 (RGB) or 1 (grey).
        class_names: Those that a network was trained on, in its order; the json must have the same.
        limit: Only the first so many images.

    Raises:
        InputError: for a file that is missing or no COCO file, its first broken entry, a missing image, or other
            categories than `class_names`.
    """

    def __init__(
        self,
        images: str | Path,
        path: str | Path,
        masks: bool,
        channels: int = 3,
        class_names: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        coco, problems = sift(read_coco(path), masks)
        if problems:
            more = f" (and {len(problems) - 1} more: check-data names all)" if len(problems) > 1 else ""
            raise InputError(f"{path}: {problems[0]}{more}")
        for kind in ("images", "categories"):
            if not coco[kind]:
                raise InputError(f"{path}: no {kind}")
        coco = first_images(coco, limit)
        if not Path(images).is_dir():
            raise InputError(f"{images}: no such folder; give the one that the images of {path} are in")
        paths = [os.path.join(images, image["file_name"]) for image in coco["images"]]
        missing = [img for img in paths if not os.path.isfile(img)]
        if missing:
            more = f", and {len(missing) - 1} more of its images are missing" if len(missing) > 1 else ""
            raise InputError(f"{missing[0]}: no such file, but {path} names it{more}")
        super().__init__(coco, paths, paths, str(path), masks, channels, class_names)


class _Drawn(Sequence):
    """The images of the scenes of a split, drawn when they are asked for."""

    def __init__(self, split: str, size: int, count: int) -> None:
        self.split, self.size, self.count = split, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        return scene(self.split, index, self.size)[0]


class ShapeScenes(DetectionDataset):
    """Scenes of up to five drawn shapes; see `DetectionDataset`. They need no file.

    Args:
        split: train or val.
        size: Side of the images in pixels.
        masks: Whether targets have masks.
        channels: 3 (RGB) or 1 (grey).
        count: How many; by default all of the split.
    """

    def __init__(self, split: str, size: int, masks: bool = True, channels: int = 3, count: int | None = None) -> None:
        count = SCENES[split] if count is None else count
        paths = [f"{split}-{index:04d}.png" for index in range(count)]
        images = [{"id": i + 1, "file_name": path, "width": size, "height": size} for i, path in enumerate(paths)]
        annotations: list[dict] = []
        for image in images:
            for shape in scene(split, image["id"] - 1, size)[1]:
                left, top, right, bottom = shape.box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": shape.label + 1,
                        "bbox": [left, top, right - left, bottom - top],
                        "area": int(shape.mask.sum()),
                        "iscrowd": 0,
                        "segmentation": encode_masks(torch.from_numpy(shape.mask)[None])[0],
                    }
                )
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        coco = {"images": images, "categories": categories, "annotations": annotations}
        super().__init__(coco, _Drawn(split, size, count), paths, f"shapes {split}", masks, channels)

    def verify(self, skip: bool = False, progress: bool = True) -> list[str]:
        """Nothing to do: they are drawn, not read."""
        return []


def save_scenes(folder: str | Path, size: int = 128, **counts: int) -> None:
    """Write scenes as FOLDER/images/*.png and FOLDER/annotations/instances_{train,val}.json.

    Args:
        folder: Made where it is missing.
        size: Side of the images in pixels.
        counts: How many of a split (train=100), by default all.
    """
    for split in SCENES:
        scenes = ShapeScenes(split, size, count=counts.get(split))
        for index, path in enumerate(scenes.paths):
            with atomic_write(Path(folder, "images", path)) as file:
                scenes.image(index).save(file, format="png")
        with atomic_write(Path(folder, "annotations", f"instances_{split}.json"), "w") as file:
            json.dump(scenes.truth, file)


def collate(samples: Sequence[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """A batch of images of any size: a list of images, and one of targets."""
    images, targets = map(list, zip(*samples, strict=True))
    return images, targets


def build_datasets(data: DetectionData, masks: bool, channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and the validation images; set `transform` before use.

    Raises:
        InputError: a field that is missing, a file that is no COCO file, ...
    """
    if data.dataset == "shapes":
        if data.images or data.train_json or data.val_json:
            raise InputError("--data.dataset shapes draws its own images; for files give --data.dataset coco")
        train = ShapeScenes("train", data.image_size, masks, channels, data.limit)
    else:
        train = CocoDataset(*coco_paths(data, "train"), masks, channels, limit=data.limit)
    return train, build_val_dataset(data, masks, channels, train.class_names)


def build_val_dataset(data: DetectionData, masks: bool, channels: int, class_names: Sequence[str]) -> DetectionDataset:
    """The validation images alone, of `class_names` in their order.

    Raises:
        InputError: as `build_datasets`.
    """
    if data.dataset == "shapes":
        return ShapeScenes("val", data.image_size, masks, channels, data.limit)
    return CocoDataset(*coco_paths(data, "val"), masks, channels, class_names, data.limit)


def coco_paths(data: DetectionData, split: str) -> tuple[str, str]:
    """The folder of the images and the json of a split."""
    images = data.val_images if split == "val" and data.val_images else data.images
    path = {"train": data.train_json, "val": data.val_json}[split]
    for flag, value, what in (
        ("--data.images", images, "the folder of the images"),
        (f"--data.{split}-json", path, "the COCO json with their objects"),
    ):
        if not value:
            raise InputError(f"{flag} is missing: give {what}")
    return images, path
