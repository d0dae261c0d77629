"""Images with any number of labels each, in the formats of `FORMATS`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dualtoken_vit.data.classification import ImageDataset
from dualtoken_vit.data.contract import Formats, check_drawn, check_trained, hold_out, some, split_name
from dualtoken_vit.data.shapes import CLASSES, SCENES, scene
from dualtoken_vit.data.tables import read_labels, unknown_columns
from dualtoken_vit.data.threads import verify_each
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable
from dualtoken_vit.recipes import MultiLabelData


class MultiLabelDataset(ImageDataset):
    """Images with their labels: `targets[i]` are indices into class_names.

    Sample i is (image, targets): the image as in `ImageDataset`, and targets (classes,) float32, 1 for each label.
    """

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        image, labels = super().__getitem__(index)
        targets = torch.zeros(len(self.class_names))
        targets[list(labels)] = 1
        return image, targets

    def relabel(self, class_names: tuple[str, ...], labels: Sequence[int]) -> None:
        self.class_names = class_names
        self.targets = [tuple(labels[label] for label in target) for target in self.targets]

    def verify(self, skip: bool = False) -> list[str]:
        verify_each(self.image, range(len(self)), len(self), "reading every image")
        return []


def _table(data: MultiLabelData, split: str, channels: int) -> MultiLabelDataset:
    data.check_place()
    if not data.separator:
        raise InputError("--data.separator is empty; give what stands between labels, for example a comma")
    found = read_labels(Path(data.root), split_name(data, split), data.separator)
    if found is None:
        wanted = "a column of files (filename, image, ...), and one of labels, or one of 0 and 1 for each class"
        there = unknown_columns(Path(data.root))
        raise InputError(f"{printable(data.root)}: no CSV or Parquet table with {wanted}{there and f'; {there}'}")
    dataset = MultiLabelDataset(found.files, found.labels, found.class_names, found.files, channels)
    dataset.splits, dataset.notes = found.splits, found.notes
    return dataset


def _shapes(data: MultiLabelData, split: str, channels: int) -> MultiLabelDataset:
    check_drawn(data, "table")
    scenes = [scene(split, index, data.image_size) for index in range(SCENES[split])]
    labels = [tuple(sorted({shape.label for shape in shapes})) for _, shapes in scenes]
    names = [f"{split}-{index:04d}" for index in range(len(scenes))]
    return MultiLabelDataset([image for image, _ in scenes], labels, CLASSES, names, channels)


FORMATS: Formats[MultiLabelDataset] = Formats(table=_table, shapes=_shapes)


def read_split(data: MultiLabelData, split: str, channels: int) -> MultiLabelDataset:
    """The train or val split as it is stored."""
    found = FORMATS.read(data, "train" if data.holdout else split, channels)
    if data.holdout:
        found = found.keep(hold_out(found.image_names, data.holdout, split == "val"))
    if not any(found.targets):
        raise InputError(f"{printable(data.root)}: no image of the split {split_name(data, split)!r} has a label")
    return found


def build_datasets(data: MultiLabelData, channels: int) -> tuple[MultiLabelDataset, MultiLabelDataset]:
    """The training and the validation images; set `transform` before use. An InputError for data that does not fit."""
    train = read_split(data, "train", channels)
    if absent := _absent(train):
        raise InputError(f"{printable(data.root)}: no training image of class {some(absent)}; add some or remove it")
    return train, build_val_dataset(data, channels, train.class_names)


def build_val_dataset(data: MultiLabelData, channels: int, class_names: Sequence[str]) -> MultiLabelDataset:
    """The validation images alone, with `class_names` in their order; `notes` name absent classes, and
    those of every image."""
    val = read_split(data, "val", channels)
    check_trained(val.class_names, class_names, f"{printable(data.root)}: class")
    places = [list(class_names).index(name) for name in val.class_names]
    val.relabel(tuple(class_names), places)
    if absent := _absent(val):
        val.notes += (f"{printable(data.root)}: no validation image of class {some(absent)}",)
    if everywhere := set(range(len(class_names))).intersection(*val.targets):
        names = some([class_names[label] for label in sorted(everywhere)])
        val.notes += (f"{printable(data.root)}: every validation image has class {names}: AP is 100 % for any network",)
    return val


def _absent(dataset: MultiLabelDataset) -> list[str]:
    present = {label for labels in dataset.targets for label in labels}
    return [name for label, name in enumerate(dataset.class_names) if label not in present]
