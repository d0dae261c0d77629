"""The report on pictures with masks: what is in them, and what would stop or spoil a training run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table
from rich.text import Text

from dualtoken_vit.data.check import Facts, copy_notes, in_both, look_at, picture_lines, report
from dualtoken_vit.data.classification import in_threads
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.masks import (
    BEYOND,
    IGNORE,
    count_classes,
    find_pairs,
    label_table,
    read_class_names,
    read_mask,
    size_fault,
    to_classes,
)
from dualtoken_vit.draw import draw_scene, fit, save_image
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Segmentation, SegmentationData

_CELLS, _COLUMNS, _CELL, _GAP = 12, 3, 640, 8  # of the contact sheet; the last two in pixels


class _Look(NamedTuple):
    """A picture and its mask, once they were looked at."""

    facts: Facts  # of the picture
    problem: str  # with the mask
    counts: np.ndarray  # (256,) pixels of each class, `IGNORE` and `BEYOND`


def check_segmentation_data(recipe: Segmentation, out: Path) -> bool:
    """Read every picture and mask once and print what is found; draw some with their labels as OUT/labels.png.

    Problems are whatever training would stop at (missing, unreadable or coloured masks, sizes that differ, labels
    beyond the classes), masks without a picture, classes that are in no training mask, and pictures in both splits.
    The share of each class and copies are only told.

    Returns:
        True where there is no problem.

    Raises:
        InputError: where there is no such data set.
    """
    data = recipe.data
    if data.dataset != "masks":
        raise InputError(f"--data.dataset {data.dataset}: drawn by the program; there is nothing to check")
    splits = {split: find_pairs(data.root, split) for split in (data.train_split, data.val_split)}
    names = read_class_names(data) or _count(data, [mask for _, mask in splits[data.train_split][0]])
    table = label_table(len(names), data.ignore_index, data.reduce_zero_label)
    looks = {split: _look(split, pairs, table) for split, (pairs, _, _) in splits.items()}
    facts = {split: [look.facts for look in found] for split, found in looks.items()}
    counts = {split: sum((look.counts for look in found), np.zeros(256, np.int64)) for split, found in looks.items()}
    told = [line for split, one in facts.items() for line in (*picture_lines(split, one), *_told(split, looks[split]))]
    told += [f"note: {line}" for line in copy_notes(facts)]
    sound = [
        pair
        for pair, look in zip(splits[data.train_split][0], looks[data.train_split], strict=True)
        if not (look.problem or look.facts.problem)
    ]
    told.append(_contact_sheet(sound, names, table, out / "labels.png") if sound else "nothing sound to draw")
    missing = [
        f"class in no mask: {data.train_split}/{n}"
        for n, k in zip(names, counts[data.train_split], strict=False)
        if not k
    ]
    alone = [f"without a mask: {path}" for _, without, _ in splits.values() for path in without]
    orphans = [f"mask without a picture: {path}" for _, _, without in splits.values() for path in without]
    pictures = [one.problem for found in facts.values() for one in found if one.problem]
    masks = [look.problem for found in looks.values() for look in found if look.problem]
    return report(_shares(names, counts), told, [*missing, *pictures], [alone, orphans, masks, in_both(facts)])


def _count(data: SegmentationData, masks: list[str]) -> tuple[str, ...]:
    """The classes by the masks that can be read."""

    def sound(path: str) -> bool:
        try:
            read_mask(path)
        except InputError:
            return False
        return True

    good = [path for path in masks if sound(path)]
    if not good:
        raise InputError(f"{data.root}: no training mask can be read")
    return count_classes(good, data)


def _look(split: str, pairs: list[tuple[str, str]], table: np.ndarray) -> list[_Look]:
    """Read every picture and mask of a split, under a progress bar."""

    def look(pair: tuple[str, str]) -> _Look:
        picture, mask = pair
        facts, nothing = look_at(picture, picture), np.zeros(256, np.int64)
        try:
            labels = read_mask(mask)
        except InputError as error:
            return _Look(facts, str(error), nothing)
        classes, fault = to_classes(labels, table)
        if not facts.problem:
            fault = size_fault(picture, facts.size, labels) or fault
        return _Look(facts, f"{mask}: {fault}" if fault else "", np.bincount(classes.ravel(), minlength=256))

    return list(in_threads(look, pairs, len(pairs), f"reading {split}"))


def _shares(names: tuple[str, ...], counts: dict[str, np.ndarray]) -> Table:
    """The share of each class of the pixels that count, in each split."""
    table = Table("class")
    for split in counts:
        table.add_column(Text(split), justify="right")
    sums = {split: max(int(count[:BEYOND].sum()), 1) for split, count in counts.items()}
    for label, name in enumerate(names):
        cells = [(count[label], f"{count[label] / sums[split]:.2%}") for split, count in counts.items()]
        table.add_row(Text(name), *(Text(cell, style="" if pixels else "red") for pixels, cell in cells))
    return table


def _told(split: str, looks: list[_Look]) -> Iterator[str]:
    pixels = sum(int(look.counts.sum()) for look in looks)
    ignored = sum(int(look.counts[IGNORE]) for look in looks)
    yield f"{split}: {len(looks)} pictures with a mask; {ignored / max(pixels, 1):.1%} of the pixels are ignored"


def _contact_sheet(pairs: list[tuple[str, str]], names: tuple[str, ...], table: np.ndarray, path: Path) -> str:
    """Draw pictures with labels from all over a split; returns what to tell."""
    chosen = pairs[:: max(1, len(pairs) // _CELLS)][:_CELLS]
    sheet = Image.new("RGB", (_COLUMNS * _CELL, math.ceil(len(chosen) / _COLUMNS) * _CELL), "white")
    for index, (picture, mask) in enumerate(chosen):
        drawn = draw_scene([("", load_image(picture), to_classes(read_mask(mask), table)[0])], names)
        sheet.paste(fit(drawn, _CELL - _GAP), (index % _COLUMNS * _CELL, index // _COLUMNS * _CELL))
    save_image(sheet, path)
    return f"{len(chosen)} pictures with their labels: {path}"
