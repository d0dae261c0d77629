"""The report on images with masks: what is in them, and what would stop or spoil a training run."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from dualtoken_vit.data.check.classification import (
    Facts,
    copy_notes,
    image_lines,
    in_both,
    look_at,
    report,
    turned_notes,
)
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.masks import (
    BEYOND,
    beyond_fault,
    find_pairs,
    highest_label,
    label_table,
    number_classes,
    read_class_names,
    read_mask,
    size_fault,
    to_classes,
)
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import IGNORE
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Segmentation
from dualtoken_vit.show.drawing import draw_labelled, draw_scene, save_image, spread


class _Look(NamedTuple):
    """An image and its mask, once they were looked at."""

    facts: Facts  # of the image
    problem: str  # with the mask
    labels: np.ndarray  # that are in the mask, in order
    pixels: np.ndarray  # of each of them
    mask: str = ""  # its file


def check_segmentation_data(recipe: Segmentation, out: Path) -> bool:
    """Read every image and mask once and print what is found; draw some with their labels as OUT/labels.png.

    Problems are whatever training would stop at (missing, unreadable or coloured masks, sizes that differ, labels
    beyond the classes), masks without an image, classes that are in no training mask, and images in both splits.
    The share of each class and copies are only told.

    Returns:
        True where there is no problem.

    Raises:
        InputError: where there is no such dataset.
    """
    data = recipe.data
    if data.dataset != "masks":
        raise InputError(f"--data.dataset {data.dataset}: drawn by the program; there is nothing to check")
    splits = {split: find_pairs(data.root, split) for split in (data.train_split, data.val_split)}
    names = read_class_names(data)
    splits = {split: (pairs[: data.limit], alone, masks) for split, (pairs, alone, masks) in splits.items()}
    looks = {split: _look(split, pairs) for split, (pairs, _, _) in splits.items()}
    if names is None:
        highest = [(highest_label(one.labels, data), one.mask) for one in looks[data.train_split] if one.labels.size]
        if not highest:
            problems = [one.problem for one in looks[data.train_split] if one.problem]
            raise InputError("; the first: ".join([f"{data.root}: no training mask can be used", *problems[:1]]))
        names = number_classes(*max(highest), data)
    table = label_table(len(names), data.ignore_index, data.reduce_zero_label)
    looks = {split: [_judge(look, table) for look in found] for split, found in looks.items()}
    facts = {split: [look.facts for look in found] for split, found in looks.items()}
    counts = {split: sum((_counts(look, table) for look in found), np.zeros(256)) for split, found in looks.items()}
    told = [
        line
        for split, found in looks.items()
        for line in (*image_lines(split, facts[split]), *_told(split, found, counts[split]))
    ]
    told += [f"note: {line}" for line in (*copy_notes(facts), *turned_notes(facts, "masks"), *_slow(recipe, facts))]
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
    orphans = [f"mask without an image: {path}" for _, _, without in splits.values() for path in without]
    images = [one.problem for found in facts.values() for one in found if one.problem]
    masks = [look.problem for found in looks.values() for look in found if look.problem]
    return report(_shares(names, counts), told, [*missing, *images], [alone, orphans, masks, in_both(facts)])


def _look(split: str, pairs: list[tuple[str, str]]) -> list[_Look]:
    """Read every image and mask of a split, under a progress bar."""

    def look(pair: tuple[str, str]) -> _Look:
        image, mask = pair
        facts = look_at(image, image)
        try:
            labels = read_mask(mask)
        except InputError as error:
            return _Look(facts, str(error), np.zeros(0, np.int64), np.zeros(0, np.int64))
        fault = "" if facts.problem else size_fault(image, facts.size, labels)
        return _Look(facts, f"{mask}: {fault}" if fault else "", *np.unique(labels, return_counts=True), mask)

    return list(in_threads(look, pairs, len(pairs), f"reading {split}"))


def _judge(look: _Look, table: np.ndarray) -> _Look:
    """The same, with labels beyond the classes as a problem."""
    beyond = to_classes(look.labels, table) == BEYOND
    if look.problem or not beyond.any():
        return look
    fault = beyond_fault(look.labels[beyond], look.pixels[beyond], table)
    return look._replace(problem=f"{look.mask}: {fault}")


def _counts(look: _Look, table: np.ndarray) -> np.ndarray:
    """(256,): pixels of each class, `IGNORE` and `BEYOND`."""
    return np.bincount(to_classes(look.labels, table), weights=look.pixels, minlength=256)


def _slow(recipe: Segmentation, facts: dict[str, list[Facts]]) -> Iterator[str]:
    """What to say of images so large that training spends its time on making them small."""
    sides = [min(one.size) for one in facts[recipe.data.train_split] if not one.problem]
    if recipe.data.image_size is None and sides and median(sides) > 2 * max(recipe.data.crop_size):
        yield "most images are more than twice the crop: --data.image-size makes training faster"


def _shares(names: tuple[str, ...], counts: dict[str, np.ndarray]) -> Table:
    """The share of each class of the pixels that count, in each split."""
    table = Table("class")
    for split in counts:
        table.add_column(Text(split), justify="right")
    sums = {split: max(count[:BEYOND].sum(), 1) for split, count in counts.items()}
    for label, name in enumerate(names):
        cells = [(count[label], f"{count[label] / sums[split]:.2%}") for split, count in counts.items()]
        table.add_row(Text(name), *(Text(cell, style="" if pixels else "red") for pixels, cell in cells))
    return table


def _told(split: str, looks: list[_Look], counts: np.ndarray) -> Iterator[str]:
    share = counts[IGNORE] / max(counts.sum(), 1)
    yield f"{split}: {len(looks)} images with a mask; {share:.1%} of the pixels are ignored"


def _contact_sheet(pairs: list[tuple[str, str]], names: tuple[str, ...], table: np.ndarray, path: Path) -> str:
    """Draw images with labels from all over a split; returns what to tell."""
    drawings = [
        draw_scene([("", load_image(image), to_classes(read_mask(mask), table))], names)
        for image, mask in spread(pairs)
    ]
    save_image(draw_labelled(drawings), path)
    return f"{len(drawings)} images with their labels: {path}"
