"""The report on images with any number of labels."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from dualtoken_vit.data.check import report
from dualtoken_vit.data.multilabel import read_split
from dualtoken_vit.files import counted
from dualtoken_vit.recipes import MultiLabel


def check(recipe: MultiLabel, out: Path, augmented: bool = False) -> bool:
    """Read every image once, print a report, and draw some images as OUT/labels.png.

    Returns whether there is no problem. Problems are: unreadable images, classes without images, classes of one split
    only, images in both splits, and equal images with different labels. An InputError for data that cannot be read.
    """
    transform = report.augmentation(recipe) if augmented else None  # before all images are read
    datasets = {role: read_split(recipe.data, role, recipe.model.in_chans) for role in ("train", "val")}
    facts = {role: report.read_all(d, role, partial(_named, d.class_names)) for role, d in datasets.items()}
    class_names = {role: dataset.class_names for role, dataset in datasets.items()}
    counts = {
        role: Counter(dataset.class_names[label] for labels in dataset.targets for label in labels)
        for role, dataset in datasets.items()
    }
    lines = []
    for role, dataset in datasets.items():
        none, most = sum(not labels for labels in dataset.targets), max(map(len, dataset.targets))
        mean = sum(map(len, dataset.targets)) / len(dataset)
        images = counted(len(dataset), "image")
        lines.append(f"{role}: {images}, {none} without labels; {mean:.2f} labels per image, up to {most}")
    lines.append(report.labelled_sheet(datasets["train"], facts["train"], recipe, out / "labels.png", transform))
    mixed = [f"equal images with different labels: {one}" for one in report.copies(facts, lambda _, fact: fact.label)]
    table = report.count_table(class_names, counts)
    notes = [note for dataset in datasets.values() for note in dataset.notes]
    return report.print_report(table, facts, lines, notes, [*report.class_problems(class_names, counts)], [mixed])


def _named(class_names: Sequence[str], labels: Collection[int]) -> str:
    return ", ".join(class_names[label] for label in sorted(labels))
