"""The report on images with masks."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from rich.table import Table
from torchvision.transforms.v2.functional import to_pil_image

from dualtoken_vit.data import masks, segmentation
from dualtoken_vit.data.check import report
from dualtoken_vit.data.contract import some, split_name
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import segmentation_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, printable
from dualtoken_vit.recipes import Segmentation, SegmentationData
from dualtoken_vit.show.drawing import draw_scene, spread


class _Pair(NamedTuple):
    """An image and its mask after reading them."""

    facts: report.Facts  # of the image
    problem: str  # of the mask
    pixels: np.ndarray = np.zeros(256, np.int64)  # of each class, `IGNORE` and `BEYOND`


def check(recipe: Segmentation, out: Path, augmented: bool = False) -> bool:
    """Read every image and mask once, print a report, and draw some images with their labels as OUT/labels.png.

    Returns whether there is no problem. Problems are: everything that stops training (missing or unreadable masks,
    sizes that differ, labels outside the classes), masks without an image, classes that are in no training mask (a note
    with --data.limit and where masks are drawn from labels of objects), and images in both splits. The share of each
    class and copies are only reported. An InputError for a dataset that does not exist, or has no usable mask.
    """
    data = recipe.data
    roles = {role if data.holdout else split_name(data, role): role for role in ("train", "val")}
    splits = {name: segmentation.read_split(data, role) for name, role in roles.items()}
    first = next(iter(splits))
    limited = data.limit is not None and data.limit < len(splits[first].pairs)
    names = splits[first].class_names or segmentation.number_classes([mask for _, mask in splits[first].pairs], data)
    own = {name: split.class_names or names for name, split in splits.items()}
    untrained = [f"class missing: {first}/{each}" for each in sorted(set().union(*own.values()) - set(names))]
    splits = {name: split._replace(pairs=split.pairs[: data.limit]) for name, split in splits.items()}
    train, tables = splits[first], {name: _table(names, own[name], data) for name in splits}
    found = {name: _read(name, split, tables[name]) for name, split in splits.items()}
    facts = {name: [pair.facts for pair in pairs] for name, pairs in found.items()}
    counts = {name: sum((pair.pixels for pair in pairs), np.zeros(256)) for name, pairs in found.items()}
    lines = []
    for name, count in counts.items():
        ignored = count[masks.IGNORE] / max(count.sum(), 1)
        images = counted(len(facts[name]), "image")
        lines.append(f"{name}: {images} with a mask; {ignored:.1%} of the pixels are ignored")
    sound = [i for i, pair in enumerate(found[first]) if not (pair.problem or pair.facts.problem)]
    shown = segmentation.SegmentationDataset(train, names, tables[first], recipe.model.in_chans)
    if augmented:
        shown.transform = segmentation_train(data, recipe.augment)
    samples = (report.sample(shown, i, recipe.run.seed) for i in spread(sound))
    drawings = (draw_scene([("", to_pil_image(image), labels.numpy())], names) for image, labels in samples)
    lines.append(report.contact_sheet(drawings, out / "labels.png", augmented))
    notes = [note for split in splits.values() for note in split.notes]
    sides = [min(fact.size) for fact in facts[first] if not fact.problem]
    if data.image_size is None and sides and median(sides) > 2 * max(data.crop_size):
        notes.append("most images are more than twice the crop: --data.image-size makes training faster")
    seen = counts[first][: len(names)]
    unseen = [name for name, n in zip(names, seen, strict=True) if not n]
    expected = limited or train.of_objects  # whose lists of classes are often those of a larger dataset
    missing = [] if expected else [f"class in no mask: {first}/{name}" for name in unseen]
    if expected and unseen:
        classes = f"{counted(len(unseen), 'class')} in no mask of {first}: {some(unseen)}"
        notes.append(f"--data.limit {data.limit}: {classes}" if limited else classes)
    alone = [f"without a mask: {path}" for split in splits.values() for path in split.alone[0]]
    orphans = [f"mask without an image: {path}" for split in splits.values() for path in split.alone[1]]
    broken = [f"{data.root}: {line}" for split in splits.values() for line in split.problems]
    unusable = [pair.problem for pairs in found.values() for pair in pairs if pair.problem]
    many = [broken, alone, orphans, unusable]
    return report.print_report(_shares(names, counts), facts, lines, notes, untrained + missing, many, "masks")


def _table(trained: Sequence[str], own: Sequence[str], data: SegmentationData) -> np.ndarray:
    """The `label_table` of a split with classes of its own: those that are not trained are ignored here."""
    classes = [trained.index(name) if name in trained else masks.IGNORE for name in own]
    return masks.label_table(classes, data.ignore_index, data.reduce_zero_label)


def _read(name: str, split: segmentation.MaskedImages, table: np.ndarray) -> list[_Pair]:
    """Read every image and mask of a split, with a progress bar."""

    def look(index: int) -> _Pair:
        image, mask = split.pairs[index]
        try:
            source, labels = split.sources(index)
        except InputError as error:
            return _Pair(report.read_facts(image, image), str(error))
        facts, classes = report.read_facts(image, source), masks.to_classes(labels, table)
        size = labels.shape[::-1] if facts.problem else facts.size
        fault = masks.mask_fault(image, size, labels, classes, table)
        return _Pair(facts, fault and f"{printable(mask)}: {fault}", np.bincount(classes.ravel(), minlength=256))

    return list(in_threads(look, range(len(split.pairs)), len(split.pairs), f"reading {name}"))


def _shares(names: Sequence[str], counts: dict[str, np.ndarray]) -> Table:
    """The share of each class of the pixels that are not ignored, in each split."""
    sums = {split: max(count[: masks.BEYOND].sum(), 1) for split, count in counts.items()}
    rows = {
        name: [(f"{count[label] / sums[split]:.2%}", not count[label]) for split, count in counts.items()]
        for label, name in enumerate(names)
    }
    return report.class_table(list(counts), rows)
