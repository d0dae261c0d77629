"""Images with objects, as boxes and masks, in the formats of `FORMATS`."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dualtoken_vit.data import formats
from dualtoken_vit.data.coco import (
    AnnotatedImages,
    Packed,
    clip,
    decode_masks,
    degenerate,
    object_area,
    read_coco,
    segmentation_fault,
    size_fault,
)
from dualtoken_vit.data.contract import Formats, ImageData, check_drawn, check_trained, hold_out, some, split_name
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.rle import encode_mask
from dualtoken_vit.data.shapes import CLASSES, SCENES, scene
from dualtoken_vit.data.threads import verify_each
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.recipes import DetectionData


class DetectionDataset(Dataset, ImageData):
    """Images with objects. Some objects may be crowds, and images may have no objects.

    Sample i is (image, target): the image a tv_tensors.Image (C, H, W) uint8, and the target a dict of

    - boxes: tv_tensors.BoundingBoxes (N, 4) XYXY float32 in pixels, clipped to the image
    - labels: (N,) int64, indices into class_names
    - masks: tv_tensors.Mask (N, H, W) uint8, if `masks`
    - crowd: tv_tensors.BoundingBoxes (K, 4): regions of objects that are not annotated one by one
    - image_id: int, as in the json

    Both have been through `transform`, if there is one. Objects and crowds with less than `MIN_SIDE` pixels of width or
    height in the image are not in the targets, but they are in `truth`. `dropped` is the number of these, `counts` the
    number of other objects of each class.

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
        self.split, self.notes = split._replace(coco={}), split.notes  # its annotations are packed below
        self.splits = split.splits
        self.dropped = 0
        coco, problems = split.sift(masks, limit)
        if problems:
            more = f" (and {len(problems) - 1} more: check-data lists all)" if len(problems) > 1 else ""
            raise InputError(f"{self.name}: {problems[0]}{more}")
        for kind in ("images", "categories"):
            if not coco[kind]:
                raise InputError(f"{self.name}: no {kind}")
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
        counts = Counter[int]()
        for annotation in coco["annotations"]:
            image = images[annotation["image_id"]]
            if annotation.get("area") is None and not segmentation_fault(annotation.get("segmentation"), image):
                annotation = {**annotation, "area": object_area(annotation, image)}  # its mask may not be kept
            of_image[image["id"]].append({key: annotation[key] for key in keys if key in annotation})
            if degenerate(annotation, image):
                self.dropped += 1
            elif not annotation.get("iscrowd"):
                counts[annotation["category_id"]] += 1
        self.counts = [counts[category] for category in self.category_ids]
        self.annotations = Packed(list(of_image.values()))
        self._labels = {category: label for label, category in enumerate(self.category_ids)}
        absent = [name for name, count in zip(self.class_names, self.counts, strict=True) if not count]
        if absent:
            self.notes += (f"{self.name}: no objects of class {some(absent)}",)

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

    def verify(self, skip: bool = False) -> list[str]:
        """Read every image once; see `ImageData`. No image is left out."""
        if not self.split.draw:
            verify_each(self.image, range(len(self)), len(self), "reading every image")
        return []

    @cached_property
    def truth(self) -> dict[str, list[dict]]:
        """The COCO file that evaluation compares with: annotations numbered from 1, all with iscrowd and area."""
        images = {image["id"]: image for image in self.images}
        annotations = []
        # To COCO's evaluation, annotation id 0 means "no match".
        for number, annotation in enumerate(chain.from_iterable(self.annotations), start=1):
            area = object_area(annotation, images[annotation["image_id"]])
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
    """A folder in any of the label formats, or COCO json files and a folder of images."""
    if data.root:
        return formats.read(data.root, data.format, split_name(data, split))
    if data.format != "auto" or (data.train_split, data.val_split) != ("train", "val"):
        raise InputError("--data.format, --data.train-split and --data.val-split need --data.root; leave them out")
    return read_coco(*data.files(split))


def _shapes(data: DetectionData, split: str) -> AnnotatedImages:
    check_drawn(data, "coco", named=bool(data.images or data.train_json or data.val_json))
    return draw_scenes(split, data.image_size, data.limit)


FORMATS: Formats[AnnotatedImages] = Formats(coco=_coco, shapes=_shapes)


def read_split(data: DetectionData, split: str) -> AnnotatedImages:
    """The train or val split, not yet checked."""
    if not data.holdout:
        return FORMATS.read(data, split)
    return FORMATS.read(data, "train")._replace(choose=partial(_hold_out, data.holdout, split == "val"))


def _hold_out(share: float, held: bool, images: list[dict]) -> list[dict]:
    """`share` of the images if `held`, else the others."""
    return [images[index] for index in hold_out([image["file_name"] for image in images], share, held)]


def build_datasets(data: DetectionData, masks: bool, channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and the validation images, which need a `transform`; an InputError for data that does not fit."""
    train = DetectionDataset(read_split(data, "train"), masks, channels, limit=data.limit)
    return train, build_val_dataset(data, masks, channels, train.class_names)


def build_val_dataset(data: DetectionData, masks: bool, channels: int, class_names: Sequence[str]) -> DetectionDataset:
    """The validation images alone, with `class_names` in their order; absent classes are named in `notes`."""
    return DetectionDataset(read_split(data, "val"), masks, channels, class_names, data.limit)
