"""The report on images with masks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from rich.table import Table

from dualtoken_vit.data.check.report import Facts, class_table, contact_sheet, print_report, read_facts
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.segmentation import (
    BEYOND,
    FORMATS,
    IGNORE,
    MaskedImages,
    beyond_fault,
    highest_label,
    label_table,
    number_classes,
    size_fault,
    to_classes,
)
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable
from dualtoken_vit.recipes import Segmentation
from dualtoken_vit.show.drawing import draw_scene, spread


class _Pair(NamedTuple):
    """An image and its mask after reading them."""

    facts: Facts  # of the image
    mask: str  # its display name
    problem: str = ""  # of the mask
    labels: np.ndarray = np.zeros(0, np.int64)  # the labels in the mask, sorted
    pixels: np.ndarray = np.zeros(0, np.int64)  # of each of them


def check(recipe: Segmentation, out: Path) -> bool:
    """Read every image and mask once, print a report, and draw some images with their labels as OUT/labels.png.

    Problems are: everything that stops training (missing, unreadable or coloured masks, sizes that differ, labels
    outside the classes), masks without an image, classes that are in no training mask, and images in both splits. The
    share of each class and copies are only reported.

    Returns:
        Whether there is no problem.

    Raises:
        InputError: for a dataset that does not exist, or has no usable mask.
    """
    data = recipe.data
    splits = {data.train_split: FORMATS.read(data, "train"), data.val_split: FORMATS.read(data, "val")}
    splits = {name: split._replace(pairs=split.pairs[: data.limit]) for name, split in splits.items()}
    found = {name: _read(name, split) for name, split in splits.items()}
    train, pairs = splits[data.train_split], found[data.train_split]
    names = train.class_names
    if names is None:
        highest = [(highest_label(pair.labels, data), pair.mask) for pair in pairs if pair.labels.size]
        if not highest:
            problems = [pair.problem for pair in pairs if pair.problem]
            raise InputError("; the first: ".join([f"{data.root}: no usable training mask", *problems[:1]]))
        names = number_classes(*max(highest), data)
    table = label_table(range(len(names)), data.ignore_index, data.reduce_zero_label)
    found = {name: [_judged(pair, table) for pair in pairs] for name, pairs in found.items()}
    facts = {name: [pair.facts for pair in pairs] for name, pairs in found.items()}
    counts = {name: sum((_counts(pair, table) for pair in pairs), np.zeros(256)) for name, pairs in found.items()}
    lines = []
    for name, count in counts.items():
        ignored = count[IGNORE] / max(count.sum(), 1)
        lines.append(f"{name}: {len(facts[name])} images with a mask; {ignored:.1%} of the pixels are ignored")
    sound = [i for i, pair in enumerate(found[data.train_split]) if not (pair.problem or pair.facts.problem)]
    drawings = []
    for index in spread(sound):
        image, labels = train.sources(index)
        drawings.append(draw_scene([("", load_image(image), to_classes(labels, table))], names))
    lines.append(contact_sheet(drawings, out / "labels.png") if sound else "no valid image to draw")
    notes = [*_slow(recipe, facts[data.train_split]), *(note for split in splits.values() for note in split.notes)]
    seen = counts[data.train_split][: len(names)]
    missing = [f"class in no mask: {data.train_split}/{name}" for name, n in zip(names, seen, strict=True) if not n]
    alone = [f"without a mask: {path}" for split in splits.values() for path in split.alone[0]]
    orphans = [f"mask without an image: {path}" for split in splits.values() for path in split.alone[1]]
    masks = [pair.problem for pairs in found.values() for pair in pairs if pair.problem]
    return print_report(_shares(names, counts), facts, lines, notes, missing, [alone, orphans, masks], "masks")


def _read(name: str, split: MaskedImages) -> list[_Pair]:
    """Read every image and mask of a split, with a progress bar."""

    def look(index: int) -> _Pair:
        image, mask = split.pairs[index]
        try:
            source, labels = split.sources(index)
        except InputError as error:
            return _Pair(read_facts(image, image), mask, str(error))
        facts = read_facts(image, source)
        fault = "" if facts.problem else size_fault(image, facts.size, labels)
        problem = f"{printable(mask)}: {fault}" if fault else ""
        return _Pair(facts, mask, problem, *np.unique(labels, return_counts=True))

    return list(in_threads(look, range(len(split.pairs)), len(split.pairs), f"reading {name}"))


def _judged(pair: _Pair, table: np.ndarray) -> _Pair:
    """The same, with labels outside the classes as a problem."""
    beyond = to_classes(pair.labels, table) == BEYOND
    if pair.problem or not beyond.any():
        return pair
    fault = beyond_fault(pair.labels[beyond], pair.pixels[beyond], table)
    return pair._replace(problem=f"{printable(pair.mask)}: {fault}")


def _counts(pair: _Pair, table: np.ndarray) -> np.ndarray:
    """(256,): the pixels of each class, `IGNORE` and `BEYOND`."""
    return np.bincount(to_classes(pair.labels, table), weights=pair.pixels, minlength=256)


def _slow(recipe: Segmentation, facts: Sequence[Facts]) -> Iterator[str]:
    """A note on images so large that training spends most time on shrinking them."""
    sides = [min(fact.size) for fact in facts if not fact.problem]
    if recipe.data.image_size is None and sides and median(sides) > 2 * max(recipe.data.crop_size):
        yield "most images are more than twice the crop: --data.image-size makes training faster"


def _shares(names: Sequence[str], counts: dict[str, np.ndarray]) -> Table:
    """The share of each class of the pixels that are not ignored, in each split."""
    sums = {split: max(count[:BEYOND].sum(), 1) for split, count in counts.items()}
    rows = {
        name: [(f"{count[label] / sums[split]:.2%}", not count[label]) for split, count in counts.items()]
        for label, name in enumerate(names)
    }
    return class_table(list(counts), rows)
