"""Images with a mask each, in the formats of `FORMATS`."""

import csv
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dualtoken_vit.data import formats
from dualtoken_vit.data.coco import AnnotatedImages, Packed, decode_masks, object_area
from dualtoken_vit.data.contract import (
    Formats,
    ImageData,
    check_drawn,
    check_trained,
    hold_out,
    other_splits,
    some,
    split_name,
)
from dualtoken_vit.data.folders import read_lines, scan, skipped_note
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.masks import IGNORE, label_table, mask_fault, read_coloured, read_mask, to_classes
from dualtoken_vit.data.shapes import CLASSES, SCENES, scene
from dualtoken_vit.data.threads import in_threads, verify_each
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import counted, printable, relative
from dualtoken_vit.recipes import SegmentationData

MAX_CLASSES = 254
CLASS_FILES = ("classes.txt", "objectInfo150.txt", "labelmap.txt", "class_dict.csv")  # ADE20K's, CVAT's, CamVid's
BACKGROUND = "background"  # name of the class of pixels without an object
SCENE_CLASSES = ("ground", *CLASSES)

CVAT = re.compile(r"([^:]+):\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(?::.*)?")  # a line of its labelmap.txt
LISTS = Path("ImageSets", "Segmentation")  # of the names of the images of each split


class MaskedImages(NamedTuple):
    """A split as the reader of a format returns it."""

    pairs: list[tuple[str, str]]  # display names of each image and its mask: without `draw`, their files
    class_names: tuple[str, ...] | None  # in the order of the labels; None: they have no names
    alone: tuple[list[str], list[str]] = ([], [])  # images without a mask, masks without an image
    notes: tuple[str, ...] = ()
    draw: Callable[[int], tuple[str | Image.Image, np.ndarray]] | None = None  # makes what `sources` returns
    problems: tuple[str, ...] = ()  # lines on what the reader could not use
    of_objects: bool = False  # drawn from labels of objects
    splits: tuple[str, ...] = ()  # `ImageData.splits`

    def sources(self, index: int) -> tuple[str | Image.Image, np.ndarray]:
        """What `load_image` takes, and the labels (H, W), of pair `index`."""
        if self.draw:
            return self.draw(index)
        image, mask = self.pairs[index]
        return image, read_mask(mask)

    def keep(self, indices: Sequence[int]) -> "MaskedImages":
        """The split with these pairs only."""
        draw = partial(_picked, self.draw, indices) if self.draw else None
        return self._replace(pairs=[self.pairs[index] for index in indices], draw=draw)


def _picked(draw: Callable[[int], Any], indices: Sequence[int], index: int) -> Any:
    return draw(indices[index])


class SegmentationDataset(Dataset, ImageData):
    """Images with a mask each.

    Sample i is (image, mask), a tv_tensors.Image (C, H, W) uint8 and a tv_tensors.Mask (H, W) uint8 of indices into
    class_names or `IGNORE`, after `transform`, if there is one.

    Args:
        split: the images and their masks
        class_names: name of each class
        table: a `label_table`
        channels: 3 (RGB) or 1 (greyscale)
    """

    def __init__(self, split: MaskedImages, class_names: Sequence[str], table: np.ndarray, channels: int = 3) -> None:
        self.split, self.class_names, self.table, self.channels = split, tuple(class_names), table, channels
        self.image_names = [image for image, _ in split.pairs]
        self.notes, self.splits = split.notes, split.splits
        self.pixels: Tensor | None = None
        """(2, classes) int64, after `verify`: the pixels of each class, and of all the images that contain it."""

    def __len__(self) -> int:
        return len(self.image_names)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = self.load(index)
        sample = v2.functional.to_image(image), tv_tensors.Mask(torch.from_numpy(mask))
        return self.transform(*sample) if self.transform else sample

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image `index` and its mask (H, W) uint8; an InputError if one is unusable or the two do not match."""
        name, mask = self.split.pairs[index]
        source, labels = self.split.sources(index)
        image, classes = load_image(source, self.channels, name), to_classes(labels, self.table)
        fault = mask_fault(name, image.size, labels, classes, self.table)
        if fault:
            raise InputError(f"{printable(mask)}: {fault}")
        return image, classes

    def verify(self, skip: bool = False) -> list[str]:
        """Read every image and mask once, and count `pixels`; an InputError also if all are ignored."""
        total = torch.zeros(2, len(self.class_names), dtype=torch.int64)
        lock = Lock()

        def count(index: int) -> None:
            found = torch.bincount(torch.from_numpy(self.load(index)[1]).flatten(), minlength=256)[: total.shape[1]]
            with lock:
                total.add_(torch.stack([found, (found > 0) * found.sum()]))

        verify_each(count, range(len(self)), len(self), "reading every image and mask")
        if not total.any():
            name = printable(self.image_names[0])
            raise InputError(f"{name} and all others: no pixel has a class; see --data.ignore-index")
        self.pixels = total
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"pixels": self.pixels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pixels = state["pixels"]


def draw_scenes(split: str, size: int) -> MaskedImages:
    """The scenes of a split: images of `size` pixels a side with up to five shapes on the class "ground"."""
    names = [f"{split}-{index:04d}" for index in range(SCENES[split])]
    return MaskedImages([(name, name) for name in names], SCENE_CLASSES, draw=partial(_draw_scene, split, size))


def _draw_scene(split: str, size: int, index: int) -> tuple[Image.Image, np.ndarray]:
    image, shapes = scene(split, index, size)
    labels = np.zeros((size, size), dtype=np.uint8)
    for shape in shapes:
        labels[shape.mask] = shape.label + 1
    return image, labels


def _by_stem(folder: Path, repeated: bool = False) -> tuple[dict[str, str], tuple[str, ...]]:
    """What `scan` finds in a folder, by the path in it without extension; and a note on the other files."""
    found: dict[str, str] = {}
    images, others = scan(folder, repeated)
    for path in images:
        name = os.path.splitext(relative(path, folder))[0]
        if name in found:
            raise InputError(f"{printable(found[name])} and {printable(path)} have the same name; rename or remove one")
        found[name] = path
    return found, (skipped_note(others),) if others else ()


def _read_classes(data: SegmentationData) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """The names in the class file and their colours, None where it has none; an InputError for one of no use."""
    if data.ignore_index == 0 and not data.reduce_zero_label:
        fault = "0 is the label of the first class; if the classes begin at 1, give --data.reduce-zero-label instead"
        raise InputError(f"--data.ignore-index 0: {fault}")
    files = [Path(data.classes)] if data.classes else [Path(data.root, name) for name in CLASS_FILES]
    path = next((path for path in files if path.is_file()), None)
    if path is None and data.classes:
        raise InputError(f"--data.classes {printable(data.classes)}: no such file")
    if path is None:
        return None, None
    file = printable(path)
    if coloured := read_colours(path):
        return _checked(tuple(coloured), file, data), np.array(list(coloured.values()))
    names: tuple[str, ...] = ()
    for place, line in enumerate(read_lines(path), start=1):
        number, *columns = line.strip().split("\t")
        if not number or (columns and place == 1 and not number.isdecimal()):  # empty, or the header of ADE20K's table
            continue
        if columns and (not number.isdecimal() or len(number) > 9):
            raise InputError(f"{file}, line {place}: {line.strip()!r:.200} is neither NAME nor NUMBER<TAB>NAME")
        if columns:  # ADE20K has more columns, with the name in the last
            if int(number) == data.ignore_index:
                continue
            if int(number) != len(names) + data.reduce_zero_label:
                start = "1 (--data.reduce-zero-label)" if data.reduce_zero_label else "0"
                raise InputError(f"{file}, line {place}: label {number}, but labels must count up from {start}")
        names += (columns[-1].strip() if columns else number,)
    return _checked(names, file, data), None


def read_colours(path: Path) -> dict[str, tuple[int, ...]]:
    """The classes of a colour table in their order, with their colours; empty for a file of names alone.

    Its lines are NAME,R,G,B as in CamVid's class_dict.csv, or NAME:R,G,B:... as in CVAT's labelmap.txt.
    """
    file = printable(path)
    found: dict[str, tuple[int, ...]] = {}
    table = False  # whether it has a header
    for place, line in enumerate(map(str.strip, read_lines(path)), start=1):
        if not line or line.startswith("#"):
            continue
        match = CVAT.fullmatch(line)
        try:
            name, *cells = map(str.strip, match.groups() if match else next(csv.reader([line])))
        except csv.Error as error:
            raise InputError(f"{file}, line {place}: cannot be read as CSV ({reason(error)})") from None
        if place == 1 and [cell.lower() for cell in cells] in (["r", "g", "b"], ["red", "green", "blue"]):
            table = True
            continue
        if len(cells) != 3 or not all(cell.isdecimal() and len(cell) <= 3 and int(cell) < 256 for cell in cells):
            coloured = len(cells) >= 3 and all(map(str.isdecimal, cells[:3]))
            if not (found or table or coloured or (cells and path.suffix.lower() == ".csv")):
                return {}
            raise InputError(f"{file}, line {place}: {line!r:.100} is not NAME,R,G,B with colours up to 255")
        colour = tuple(map(int, cells))
        if name in found or colour in found.values():
            raise InputError(f"{file}, line {place}: the name or the colour of {name!r} is listed twice")
        found[name] = colour
    return found


def _checked(names: tuple[str, ...], source: str, data: SegmentationData) -> tuple[str, ...]:
    """The names of the classes, if they can be those of labels; else an InputError."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{source}: the class {twice!r} is listed twice")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(f"{source}: {counted(len(names), 'class')}, but 2 to {MAX_CLASSES} are supported")
    ignored = data.ignore_index - data.reduce_zero_label
    if 0 <= ignored < len(names):
        raise InputError(
            f"--data.ignore-index {data.ignore_index} is the label of {names[ignored]!r} in {source}: remove the class "
            "there, and let the other labels count up without it"
        )
    return names


def number_classes(masks: Sequence[str], data: SegmentationData) -> tuple[str, ...]:
    """Numbers as class names, up to the highest label in the readable masks; an InputError for too few or too many."""

    def highest(path: str) -> tuple[int, int, str]:
        try:
            labels = read_mask(path)
        except InputError as error:
            return -1, -1, str(error)
        return int(labels[labels != data.ignore_index].max(initial=0)), int(labels.max(initial=0)), path

    found = list(in_threads(highest, masks, len(masks), "counting classes"))
    label, _, path = max(found, default=(-1, -1, ""))
    if label < 0:
        faults = [text for *_, text in found[:1]]
        raise InputError("; the first: ".join([f"{printable(data.root)}: no usable training mask", *faults]))
    count = label + 1 - data.reduce_zero_label
    if not 2 <= count <= MAX_CLASSES:
        if np.unique(read_mask(path)).tolist() == [0, 255]:
            lines = "the lines background,0,0,0 and NAME,255,255,255"
            raise InputError(f"{printable(path)}: is black and white: give a file with {lines} as --data.classes")
        raise InputError(
            f"{printable(path)}: the highest label in the training masks is {label}, apart from the ignored label "
            f"{data.ignore_index}, but 2 to {MAX_CLASSES} classes are supported; give another --data.ignore-index, or "
            "a class file as --data.classes"
        )
    if 0 <= data.ignore_index - data.reduce_zero_label < count:
        raise InputError(
            f"--data.ignore-index {data.ignore_index}: is among the labels of the classes, which go up to {label}; "
            "give it a higher number"
        )
    return tuple(map(str, range(count)))


def _files(data: SegmentationData, split: str) -> MaskedImages:
    """Mask files, or labels of objects, which are drawn as masks."""
    data.check_place()
    root, name = Path(data.root), split_name(data, split)
    if data.format == "auto":
        masks = (root / "annotations" / name).is_dir() or (root / LISTS).is_dir() or not formats.matching(root)
    else:
        masks = data.format == "masks"
    return _masks(data, split) if masks else _objects(data, name)


def _masks(data: SegmentationData, split: str) -> MaskedImages:
    """ROOT/{images,annotations}/SPLIT/**, or the files in {JPEGImages,SegmentationClass} that a list of VOC's names.

    They are paired by name.
    """
    name = split_name(data, split)
    listed = Path(data.root, LISTS, f"{name}.txt")
    whole = listed.parent.is_dir()
    kinds = ("JPEGImages", "SegmentationClass") if whole else (f"images/{name}", f"annotations/{name}")
    folders = [Path(data.root, kind) for kind in kinds]
    if whole:
        splits = sorted(path.stem for path in listed.parent.glob("*.txt"))
    else:
        places = sorted(folders[1].parent.glob("*"))
        splits = [path.name for path in places if path.is_dir() and (folders[0].parent / path.name).is_dir()]
    for folder in folders:
        if not folder.is_dir():
            layout = f"{printable(folders[0])}/NAME.jpg and {printable(folders[1])}/NAME.png"
            remedy = "" if whole else f"; {other_splits(split, splits)}"
            raise InputError(f"{printable(folder)}: no such folder; expected {layout}{remedy}")
    if whole and not listed.is_file():
        raise InputError(f"{printable(listed)}: no such file; {other_splits(split, splits)}")
    (images, skipped), (masks, others) = _by_stem(folders[0]), _by_stem(folders[1], repeated=True)  # masks can be equal
    if whole:
        names = [line.strip() for line in read_lines(listed) if line.strip()]
        if missing := [each for each in names if each not in images]:
            raise InputError(f"{printable(listed)}: {printable(missing[0])}: no such image in {printable(folders[0])}")
        images = {each: images[each] for each in names}
        masks = {each: path for each, path in masks.items() if each in images}
    if not images:
        raise InputError(f"{printable(folders[0])}: no images in this folder")
    pairs = [(path, masks[name]) for name, path in images.items() if name in masks]
    alone = [path for name, path in images.items() if name not in masks]
    orphans = [path for name, path in masks.items() if name not in images]
    class_names, colours = _read_classes(data)
    draw = None if colours is None else partial(_decode, pairs, colours, data)
    return MaskedImages(pairs, class_names, (alone, orphans), skipped + others, draw, splits=tuple(splits))


def _decode(pairs: list[tuple[str, str]], colours: np.ndarray, data: SegmentationData, index: int) -> Any:
    image, mask = pairs[index]
    return image, read_coloured(mask, colours, int(data.reduce_zero_label), data.ignore_index)


def _objects(data: SegmentationData, name: str) -> MaskedImages:
    """Polygons and masks of objects in any label format. Label 0 is the background, label i class i - 1.

    With `reduce_zero_label`, the background is ignored.
    """
    if data.classes:
        raise InputError(f"--data.classes {printable(data.classes)}: these labels name their classes; leave it out")
    split = formats.read(data.root, data.format, name)
    coco, problems = split.sift(masks=True)
    categories = sorted(coco["categories"], key=lambda one: one["id"])
    names = (*((BACKGROUND,) if not data.reduce_zero_label else ()), *(one["name"] for one in categories))
    names = _checked(names, printable(split.name), data)
    labels = {one["id"]: label for label, one in enumerate(categories, start=1)}
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in coco["images"]}
    for one in coco["annotations"]:
        label = data.ignore_index if one.get("iscrowd") else labels[one["category_id"]]
        of_image[one["image_id"]].append(one | {"label": label})
    pairs = [(split.path(image), f"{split.name}: {image['file_name']}") for image in coco["images"]]
    draw = partial(_render, split, coco["images"], Packed(list(of_image.values())))
    found: dict[str, Any] = dict(notes=split.notes, problems=tuple(problems), splits=split.splits)
    return MaskedImages(pairs, names, draw=draw, of_objects=True, **found)


def _render(
    split: AnnotatedImages, images: list[dict], objects: Packed, index: int
) -> tuple[str | Image.Image, np.ndarray]:
    """An image and its labels (H, W): small objects cover large ones, and all of them crowds."""
    image = images[index]
    labels = np.zeros((image["height"], image["width"]), dtype=np.int32)
    for one in sorted(objects[index], key=lambda one: (not one.get("iscrowd"), -object_area(one, image))):
        labels[decode_masks([one], image)[0].numpy() > 0] = one["label"]
    return split.source(image), labels


def _shapes(data: SegmentationData, split: str) -> MaskedImages:
    check_drawn(data, "masks", named=data.reduce_zero_label or data.ignore_index != IGNORE)
    return draw_scenes(split, max(data.crop_size))


FORMATS: Formats[MaskedImages] = Formats(masks=_files, shapes=_shapes)


def read_split(data: SegmentationData, split: str) -> MaskedImages:
    """The train or val split, not yet checked."""
    found = FORMATS.read(data, "train" if data.holdout else split)
    if data.holdout:
        found = found.keep(hold_out([image for image, _ in found.pairs], data.holdout, split == "val"))
    return found


def build_dataset(
    data: SegmentationData, split: str, channels: int, class_names: Sequence[str] | None = None
) -> SegmentationDataset:
    """The train or val split, with `class_names` in their order, if given; absent classes are named in `notes`.

    Raises:
        InputError: for a missing folder, an image without a mask, classes that are not among `class_names`, ...
    """
    found = read_split(data, split)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more: check-data lists all)" if len(found.problems) > 1 else ""
        raise InputError(f"{printable(data.root)}: {found.problems[0]}{more}")
    if found.alone[0]:
        more = f" (and {len(found.alone[0]) - 1} more images)" if len(found.alone[0]) > 1 else ""
        raise InputError(f"{printable(found.alone[0][0])}: no mask for this image{more}; see check-data")
    names = found.class_names or class_names or number_classes([mask for _, mask in found.pairs], data)
    trained = tuple(class_names or names)
    check_trained(names, trained, printable(data.classes or f"the class file in {data.root}") + ": class")
    absent = [name for name in trained if name not in names]
    if absent:
        found = found._replace(notes=(*found.notes, f"{data.root}: no class {some(absent)}"))
    found = found._replace(pairs=found.pairs[: data.limit])
    table = label_table([trained.index(name) for name in names], data.ignore_index, data.reduce_zero_label)
    return SegmentationDataset(found, trained, table, channels)


def build_datasets(data: SegmentationData, channels: int) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The training and the validation images; set `transform` before use. Raises as `build_dataset`."""
    train = build_dataset(data, "train", channels)
    return train, build_dataset(data, "val", channels, train.class_names)
