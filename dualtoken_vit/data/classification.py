"""Images with one class each, in the formats of `FORMATS`."""

import importlib.util
import os
import random
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from io import BytesIO
from numbers import Integral
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_reader
from torch.utils.data import Dataset, Subset
from torchvision.datasets import Imagenette

from dualtoken_vit.data.contract import (
    Formats,
    ImageData,
    check_drawn,
    check_splits,
    check_trained,
    other_splits,
    some,
    split_name,
)
from dualtoken_vit.data.folders import is_folder, natural, read_class_names, scan, skipped_note
from dualtoken_vit.data.images import MODES, load_image, prefixed
from dualtoken_vit.data.sampling import mix
from dualtoken_vit.data.shapes import CLASSES, ShapeImages
from dualtoken_vit.data.splits import split_of
from dualtoken_vit.data.streams import ImageStream, Record, Shards, TensorFlowDataset, unreadable
from dualtoken_vit.data.tables import Labelled, read_labels, unfit, unread_note
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import printable, relative
from dualtoken_vit.recipes import ClassificationData

IMAGENETTE_COUNTS = {"train": 9469, "val": 3925}


class ImageDataset(Dataset, ImageData):
    """Images that can be read in any order.

    Sample i is (image, class index); the image is `transform` of the PIL image, or the PIL image without one.

    Args:
        sources, targets, image_names: what `load_image` takes, target and display name of each image
        class_names: name of each class
        channels: 3 (RGB) or 1 (greyscale)
        root: folder of the image files, which may differ when a run is resumed; each class must have training images
    """

    def __init__(
        self,
        sources: Sequence[Any],
        targets: list[Any],
        class_names: tuple[str, ...],
        image_names: list[str],
        channels: int = 3,
        root: str = "",
    ) -> None:
        self.sources, self.targets, self.class_names, self.image_names = sources, targets, class_names, image_names
        self.channels, self.root = channels, root
        self.left_out: list[str] = []  # names of the images left out, relative to `root`
        self.drawn = False  # whether the images are generated, so that none can be unreadable
        self.complete = False  # whether each class must keep a readable image: in training data
        self.flipped: Sequence[bool] = ()  # whether to flip each image horizontally before `transform`; empty: none
        self.shared: list[tuple[str, str]] = []  # names of files that are in more than one class

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.image(index)
        if len(self.flipped) and self.flipped[index]:
            image = ImageOps.mirror(image)
        with prefixed(self.image_names[index]):
            return (self.transform(image) if self.transform else image), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """Image `index`; an InputError if it cannot be read."""
        return load_image(self.sources[index], self.channels, self.image_names[index])

    def alternate_flips(self, seed: int, epoch: int) -> None:
        """Flip a random half of the images in even epochs, and the other half in odd ones (arXiv 2404.00498)."""
        first = np.random.default_rng(mix(seed)).random(len(self)) < 0.5
        self.flipped = (first ^ (epoch % 2 == 1)).tolist()

    def keep(self, indices: Sequence[int]) -> Self:
        """The dataset of these images only."""
        kept = copy(self)
        kept.sources = Subset(self.sources, indices)  # type: ignore[arg-type, assignment]  # any sequence will do
        kept.targets, kept.image_names = [self.targets[i] for i in indices], [self.image_names[i] for i in indices]
        return kept

    def relabel(self, class_names: tuple[str, ...], labels: Sequence[int]) -> None:
        """Rename and reorder the classes: class i becomes class labels[i]."""
        self.class_names, self.targets = class_names, [labels[target] for target in self.targets]

    def records(self) -> Iterator[Record]:
        """Every image, still encoded where it is stored so."""
        return ((self.image_names[i], self.sources[i], self.targets[i]) for i in range(len(self)))

    def verify(self, skip: bool = False) -> list[str]:
        names = [] if self.drawn else unreadable(self, skip)
        self._leave_out(names)
        self.left_out += map(self._relative, names)
        return names

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left_out = state.get("left_out", [])  # multi-label runs of earlier versions lack it
        if left := set(self.left_out):
            self._leave_out([name for name in self.image_names if self._relative(name) in left])

    def _relative(self, name: str) -> str:
        """The name of an image in `left_out`, the same wherever the data are."""
        return relative(name, self.root) if self.root else name

    def _leave_out(self, names: Collection[str]) -> None:
        """Drop the images of these names. If a class loses all its images: a note, or an InputError if `complete`."""
        names = set(names)
        kept = self.keep([i for i, name in enumerate(self.image_names) if name not in names])
        lost = set(self.targets) - set(kept.targets)
        if lost:
            example = next(name for name, label in zip(self.image_names, self.targets, strict=True) if label in lost)
            classes = some([self.class_names[label] for label in sorted(lost)])
            message = f"no readable images in class {classes}, for example {printable(example)}"
            if self.complete or not len(kept):
                raise InputError(message)
            self.notes += (message,)
        if names:
            self.sources, self.targets, self.image_names = kept.sources, kept.targets, kept.image_names


Images = ImageDataset | ImageStream


def _where(data: ClassificationData, split: str) -> str:
    """A split, for messages."""
    return printable(os.path.join(data.root, split_name(data, split)))


def _check_no_splits(root: Path, missing: Path) -> None:
    """Raise an InputError if `root` has folders of splits, which are no classes. That of train is missing.

    They have names of several splits, or all names begin with one, as in train_images and test_images.
    """
    names = sorted(each.name for each in root.glob("*") if each.is_dir() and not each.name.startswith((".", "__")))
    begun = {split_of(re.split("[ _.-]", name)[0]) for name in names}
    if None in begun:
        names = [name for name in names if split_of(name)]
        begun = {*map(split_of, names)}
    if len(begun) > 1:
        found, table = ", ".join(map(printable, names)), unfit(root)
        raise InputError(
            f"{printable(missing)}: no such folder, but {found} in {printable(root)}; give "
            f"--data.train-split NAME, and --data.val-split NAME or --data.holdout 0.1{table and f'; {table}'}"
        )


def _folder(data: ClassificationData, split: str, channels: int) -> ImageDataset:
    """ROOT/SPLIT/CLASS/**, with classes in natural order, including empty ones; or a table of files and classes."""
    data.check_place()
    folder = Path(data.root, split_name(data, split))
    if not any(each.is_dir() and not each.name.startswith(".") for each in folder.glob("*")):
        found = read_labels(Path(data.root), folder.name, separator=None)
        if found is not None:
            return _labelled(found, channels)
        if split == "train" and not folder.is_dir():
            _check_no_splits(Path(data.root), folder)
            folder = Path(data.root) if data.holdout else folder  # one folder without splits
    if not folder.is_dir():
        named = [each.name for each in Path(data.root).glob("*") if each.is_dir() and split_of(each.name) == split]
        if named:
            raise InputError(f"{printable(folder)}: no such folder; {other_splits(split, sorted(named))}")
        without = {"val": "without a val folder", "train": "for class folders without splits"}[split]
        holdout = "" if data.holdout else f"; {without} give --data.holdout 0.1"
        expected = f"expected {printable(folder)}/CLASS/*.jpg in --data.root"
        table = unfit(Path(data.root))
        raise InputError(f"{printable(folder)}: no such folder; {expected}{holdout}{table and f'; {table}'}")
    visible = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    real = Path(os.path.realpath(folder))
    names = [each.name for each in visible if is_folder(each) and not real.is_relative_to(os.path.realpath(each.path))]
    if not names:
        table = unfit(Path(data.root))
        expected = f"expected {printable(folder)}/CLASS/*.jpg{table and f'; {table}'}"
        raise InputError(f"{printable(folder)}: has no class folders; {expected}")
    names.sort(key=natural)
    skipped = sorted(each.path for each in visible if not is_folder(each))
    targets: list[int] = []
    paths: list[str] = []
    first: dict[str, str] = {}  # real path: name of the image
    shared: list[tuple[str, str]] = []
    for label, name in enumerate(names):
        images, others = scan(folder / name)
        targets += [label] * len(images)
        paths += images
        skipped += others
        shared += [(first[target], path) for path, target in images.items() if target in first]
        first |= {target: path for path, target in images.items()}
    dataset = ImageDataset(paths, targets, tuple(names), paths, channels, str(Path(data.root)))
    dataset.splits = [
        split
        for split in sorted(os.listdir(data.root))
        if split_of(split) and any(os.path.isdir(os.path.join(data.root, split, name)) for name in names)
    ]
    if split == "train":
        dataset.notes += unread_note(Path(data.root), folder)
    dataset.shared = shared
    if skipped:
        dataset.notes += (skipped_note(skipped, "images in a class folder"),)
    return dataset


def _labelled(found: Labelled, channels: int) -> ImageDataset:
    """The images of a table, each of one class."""
    for file, labels in zip(found.files, found.labels, strict=True):
        if len(labels) != 1:
            fault = f"has {len(labels)} classes, but classification needs one; for several, see the recipe multilabel"
            raise InputError(f"{printable(found.table)}: {printable(file)} {fault}")
    targets = [label for (label,) in found.labels]
    dataset = ImageDataset(found.files, targets, found.class_names, found.files, channels, str(found.table.parent))
    dataset.splits, dataset.notes = found.splits, found.notes
    return dataset


def _shapes(data: ClassificationData, split: str, channels: int) -> ImageDataset:
    check_drawn(data, "folder")
    images = ShapeImages(split, data.image_size)
    names = [f"{split}/{CLASSES[label]}-{index:04d}" for index, label in enumerate(images.targets)]
    dataset = ImageDataset(images, images.targets, CLASSES, names, channels)
    dataset.drawn = True
    return dataset


def _imagenette(data: ClassificationData, split: str, channels: int) -> ImageDataset:
    """torchvision's Imagenette at 160 pixels, downloaded to ROOT/imagenette2-160 if it is not there."""
    check_splits(data)
    folder = Path(data.root, "imagenette2-160")
    try:
        classes = Imagenette(data.root, split, size="160px", download=not folder.is_dir()).classes
    except Exception as error:  # network, disk, archive
        raise InputError(
            f"{printable(folder)}: Imagenette cannot be downloaded ({reason(error)}); extract imagenette2-160.tgz from "
            f"https://github.com/fastai/imagenette into {printable(data.root)}, or use the recipe folder"
        ) from error
    dataset = _folder(ClassificationData(root=str(folder)), split, channels)
    if len(dataset) != IMAGENETTE_COUNTS[split]:
        raise InputError(
            f"{printable(folder / split)}: {len(dataset)} images, not {IMAGENETTE_COUNTS[split]}: extraction was "
            f"interrupted; remove {printable(folder)} and run again"
        )
    dataset.class_names = tuple(names[0] for names in classes)
    return dataset


class _Encoded(Sequence[BytesIO]):
    """The files of one of timm's readers, as bytes in memory."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        with self.reader[index][0] as file:
            return BytesIO(file.read())


@contextmanager
def _opening(data: ClassificationData, split: str, package: str) -> Iterator[tuple[str, str]]:
    """The NAME in `--data.dataset FORMAT/NAME` and that of the split; all errors inside become InputErrors."""
    spec, name = data.dataset, split_name(data, split)
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--data.dataset {spec}: needs the package {package}: pip install {package.replace('_', '-')}")
    try:
        yield spec.partition("/")[2], name
    except InputError:
        raise
    except Exception as error:  # each package raises its own errors for missing data
        raise InputError(f"--data.dataset {spec}, root {data.root!r}, split {name!r}: {reason(error)}") from error


def _hfds(data: ClassificationData, split: str, channels: int) -> ImageDataset:
    """Hugging Face datasets, by timm: hfds/NAME or hfds/FOLDER; data.root is the download cache."""
    with _opening(data, split, "datasets") as (_, name):
        reader = create_reader(data.dataset, root=data.root or None, split=name)
    targets = list(reader.iter_targets())
    if not all(isinstance(target, Integral) for target in targets):
        fault = f"split {name!r} has labels that are not the numbers of classes, or none; cast its column to ClassLabel"
        raise InputError(f"--data.dataset {data.dataset}: {fault}")
    if not targets or min(targets) < 0:
        raise InputError(f"--data.dataset {data.dataset}: split {name!r} has no labels")
    names = [f"{name}/{index}" for index in range(len(targets))]
    return ImageDataset(_Encoded(reader), targets, tuple(reader.class_to_idx) or _numbers(targets), names, channels)


def _wds(data: ClassificationData, split: str, channels: int) -> ImageStream:
    """webdataset: wds/NAME; see `Shards`. ROOT/classnames.txt has one class name per line; default: numbers."""
    if not data.root:
        raise InputError(f"--data.root is missing: give the folder with the shards of {data.dataset}")
    with _opening(data, split, "webdataset") as (_, name):
        shards = Shards(data.root, name, channels)
    path = Path(data.root, "classnames.txt")
    class_names = read_class_names(path) if path.is_file() else ()
    if not class_names or not shards.samples:
        title = f"reading the labels of {name}"
        labels = list(in_threads(itemgetter(2), shards.read(), shards.samples or None, title))
        shards.samples = len(labels)
        class_names = class_names or _numbers(labels)
    shards.class_names, shards.labels = class_names, range(len(class_names))
    return shards


def _tfds(data: ClassificationData, split: str, channels: int) -> ImageStream:
    """TensorFlow Datasets: tfds/NAME; data.root is the folder that they are kept in."""
    with _opening(data, split, "tensorflow_datasets") as (name, part):
        return TensorFlowDataset(name, data.root, part, channels)


def _numbers(labels: Collection[int]) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))


FORMATS: Formats[Images] = Formats(
    folder=_folder, shapes=_shapes, imagenette=_imagenette, hfds=_hfds, wds=_wds, tfds=_tfds
)
"""Classes may be empty, and differ between the splits."""


def _exclude(dataset: Images, classes: Sequence[str], required: bool) -> ImageDataset:
    """The dataset without these classes, which it must have if `required`."""
    if not isinstance(dataset, ImageDataset):
        raise InputError("--data.exclude is not available for data that is read as a stream")
    unknown = [name for name in classes if name not in dataset.class_names]
    if required and unknown:
        raise InputError(f"--data.exclude {unknown[0]}: no such class; the classes are {some(dataset.class_names)}")
    names = [name for name in dataset.class_names if name not in classes]
    labels = [names.index(name) if name in names else -1 for name in dataset.class_names]
    kept = dataset.keep([i for i, target in enumerate(dataset.targets) if labels[target] >= 0])
    kept.relabel(tuple(names), labels)
    there = set(kept.image_names)
    kept.shared = [pair for pair in dataset.shared if there.issuperset(pair)]
    return kept


def _shared_note(dataset: ImageDataset) -> str:
    pair = " = ".join(map(printable, dataset.shared[0]))
    return f"files in more than one class: {len(dataset.shared)}, for example {pair}"


def read_split(data: ClassificationData, split: str, channels: int) -> Images:
    """The train or val split as it is stored."""
    if channels not in MODES:
        raise InputError(f"--model.in-chans {channels}: images have 3 channels (RGB) or 1 (greyscale)")
    dataset = FORMATS.read(data, split, channels)
    if data.exclude:
        dataset = _exclude(dataset, data.exclude, required=split == "train")
    if isinstance(dataset, ImageDataset) and dataset.shared:
        dataset.notes += (_shared_note(dataset),)
    if not len(dataset):
        raise InputError(f"{_where(data, split)}: no images")
    return dataset


def build_datasets(data: ClassificationData, channels: int) -> tuple[Images, Images]:
    """The training and the validation images; set `transform` before use.

    Raises:
        InputError: for a missing folder, a training class without images, a training image in two classes, validation
            classes that are not trained, ...
    """
    if data.skip and not data.verify:
        raise InputError("--data.unreadable skip: needs --data.verify, which finds these images; leave one of them out")
    if data.fold and not data.holdout:
        raise InputError(f"--data.fold {data.fold}: needs --data.holdout, the share of the images in a fold")
    train = read_split(data, "train", channels)
    if isinstance(train, ImageDataset):
        train.complete = True
        if train.shared:
            raise InputError(f"{_shared_note(train)}; keep each training file in one class")
        empty = _empty(train) if train.root else []
        if empty:
            where = _where(data, "train")
            where = where if os.path.isdir(where) else printable(data.root)  # one folder without splits
            remedy = "add some, or remove the class (check-data lists all problems)"
            raise InputError(f"{where}: no images in class {some(empty)}; {remedy}")
    val: Images
    if data.holdout:
        train, val = _hold_out(train, data.holdout, data.fold)
    else:
        val = build_val_dataset(data, channels, train.class_names)
    return (train if data.per_class is None else _first(train, data.per_class)), val


def build_val_dataset(data: ClassificationData, channels: int, class_names: Sequence[str] | None = None) -> Images:
    """The validation images alone, with `class_names` in their order; absent classes are named in `notes`."""
    val = read_split(data, "train" if data.holdout else "val", channels)
    if data.holdout:
        val = _hold_out(val, data.holdout, data.fold)[1]
    if class_names is not None:
        labels, named = {name: label for label, name in enumerate(class_names)}, val.class_names
        if data.dataset.startswith(("wds", "hfds")) and named == _numbers(range(len(named))):
            named = (*class_names[: len(named)], *named[len(class_names) :])
        excludable = ", or leave it out by --data.exclude" if isinstance(val, ImageDataset) else ""
        check_trained(named, class_names, f"{_where(data, 'val')}: class", f"rename or remove it{excludable}")
        val.relabel(tuple(class_names), [labels[name] for name in named])
    absent = _empty(val) if isinstance(val, ImageDataset) else []
    if absent:
        val.notes += (f"{_where(data, 'val')}: no images of class {some(absent)}",)
    return val


def _empty(dataset: ImageDataset) -> list[str]:
    """The classes that have no images."""
    return [name for name, members in zip(dataset.class_names, _members(dataset), strict=True) if not members]


def _members(dataset: ImageDataset) -> list[list[int]]:
    """The positions of the images of each class."""
    found: list[list[int]] = [[] for _ in dataset.class_names]
    for index, target in enumerate(dataset.targets):
        found[target].append(index)
    return found


def _first(dataset: Images, number: int) -> ImageDataset:
    """At most `number` images of each class: the same in every run, and among those of a larger number."""
    if isinstance(dataset, ImageStream):
        raise InputError("--data.per-class is not available for data that is read as a stream")
    kept = [index for each in _members(dataset) for index in random.Random(0).sample(each, len(each))[:number]]
    return dataset.keep(sorted(kept))


def _hold_out(dataset: Images, share: float, fold: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """(the rest, part `fold` of `share` of each class): the same images in every run, independent of its seed."""
    if not 0 < share <= 0.5:
        raise InputError(f"--data.holdout {share}: must be between 0 and 0.5")
    if isinstance(dataset, ImageStream):
        raise InputError("--data.holdout is not available for data that is read as a stream; name two splits instead")
    folds, held = round(1 / share), set[int]()
    if fold >= folds:
        raise InputError(f"--data.fold {fold}: with --data.holdout {share} there are the folds 0 to {folds - 1}")
    for name, members in zip(dataset.class_names, _members(dataset), strict=True):
        if len(members) == 1:
            raise InputError(f"--data.holdout {share}: class {name!r} has only one image")
        size = round(share * len(members)) or min(1, len(members))
        first = random.Random(0).sample(members, size)
        others = sorted(set(members) - set(first))
        shuffled = random.Random(0).sample(others, len(others))
        held.update(shuffled[fold - 1 :: folds - 1] if fold else first)
    if not held:
        raise InputError(f"--data.fold {fold}: has no image, as the classes have too few; give a larger --data.holdout")
    rest, val = dataset.keep([i for i in range(len(dataset)) if i not in held]), dataset.keep(sorted(held))
    val.notes, val.complete = (), False  # those of `rest`
    return rest, val
