"""The report on a classification dataset."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dualtoken_vit.data.check import report
from dualtoken_vit.data.classification import ImageDataset, read_split
from dualtoken_vit.data.contract import split_name
from dualtoken_vit.recipes import Classification

UNEVEN = 1.5  # images of the largest class per image of the smallest, from which a note says so


def check(recipe: Classification, out: Path, augmented: bool = False) -> bool:
    """Read every image of a recipe's dataset once, print a report, and draw some images as OUT/labels.png.

    Returns whether there is no problem. Problems are: unreadable images, empty classes, classes of one split only,
    images in both splits, and equal images in different classes. Sizes, modes, imbalance and copies within a class are
    only reported. An InputError for a dataset that does not exist.
    """
    transform = report.augmentation(recipe) if augmented else None  # before all images are read
    data = recipe.data
    roles = ("train",) if data.holdout else ("train", "val")
    datasets = {split_name(data, role): read_split(data, role, recipe.model.in_chans) for role in roles}
    found = {split: report.read_all(d, split, d.class_names.__getitem__) for split, d in datasets.items()}
    class_names = {split: dataset.class_names for split, dataset in datasets.items()}
    counts = {split: Counter(fact.label for fact in facts) for split, facts in found.items()}
    lines = [f"validation: {data.holdout:.0%} of each class of {data.train_split}"] if data.holdout else []
    split = data.train_split
    notes = [*_balance(counts[split], class_names[split]), *(note for d in datasets.values() for note in d.notes)]
    mixed = [f"equal images in different classes: {one}" for one in report.copies(found, lambda _, fact: fact.label)]
    train = datasets[data.train_split]
    if isinstance(train, ImageDataset):  # a stream cannot be read at chosen places
        lines.append(report.labelled_sheet(train, found[split], recipe, out / "labels.png", transform))
    table = report.count_table(class_names, counts)
    return report.print_report(table, found, lines, notes, [*report.class_problems(class_names, counts)], [mixed])


def _balance(counts: Counter[str], names: Sequence[str]) -> Iterator[str]:
    ranked = counts.most_common()
    if ranked and len(ranked) == len(names):  # else the smallest is empty, which is a problem of its own
        (most, many), (least, few) = ranked[0], ranked[-1]
        if many / few >= UNEVEN:
            yield f"largest class {most} ({many}), smallest {least} ({few}): {many / few:.1f} to 1"
