"""The report on a classification dataset."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dualtoken_vit.data.check.report import (
    Facts,
    contact_sheet,
    copies,
    count_table,
    missing_classes,
    print_report,
    read_facts,
)
from dualtoken_vit.data.classification import ImageDataset, Images, Record, read_split
from dualtoken_vit.data.contract import split_name
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.recipes import Classification
from dualtoken_vit.show.drawing import draw_scene, spread


def check(recipe: Classification, out: Path) -> bool:
    """Read every image of a recipe's dataset once, print a report, and draw some images as OUT/labels.png.

    Returns whether there is no problem. Problems are: unreadable images, empty classes, classes of one split only,
    images in both splits, and equal images in different classes. Sizes, modes, imbalance and copies within a class are
    only reported.

    Raises:
        InputError: for a dataset that does not exist.
    """
    data = recipe.data
    roles = ("train",) if data.holdout else ("train", "val")
    datasets = {split_name(data, role): read_split(data, role, recipe.model.in_chans) for role in roles}
    found = {split: _read(dataset, split) for split, dataset in datasets.items()}
    class_names = {split: dataset.class_names for split, dataset in datasets.items()}
    counts = {split: Counter(fact.label for fact in facts) for split, facts in found.items()}
    holdout = [f"validation: {data.holdout:.0%} of each class of {data.train_split}"] if data.holdout else []
    notes = [*_balance(counts[data.train_split]), *(note for dataset in datasets.values() for note in dataset.notes)]
    empty = [
        f"empty class: {split}/{name}"
        for split, names in class_names.items()
        for name in names
        if not counts[split][name]
    ]
    mixed = [f"equal images in different classes: {names}" for names in copies(found, lambda _, fact: fact.label)]
    problems = [*empty, *missing_classes(class_names)]
    train = datasets[data.train_split]
    sound = [i for i, fact in enumerate(found[data.train_split]) if not fact.problem]
    sheet = []
    if isinstance(train, ImageDataset) and sound:  # a stream cannot be read at chosen places
        images = ((train[i][0], train.class_names[train.targets[i]]) for i in spread(sound))
        sheet = [contact_sheet([draw_scene([(name, image, None)], ()) for image, name in images], out / "labels.png")]
    return print_report(count_table(class_names, counts), found, [*holdout, *sheet], notes, problems, [mixed])


def _read(dataset: Images, split: str) -> list[Facts]:
    """Read every image of a split, with a progress bar."""

    def look(record: Record) -> Facts:
        name, source, target = record
        return read_facts(name, source, dataset.class_names[target])

    return list(in_threads(look, dataset.records(), len(dataset), f"reading {split}"))


def _balance(counts: Counter[str]) -> Iterator[str]:
    ranked = counts.most_common()
    if ranked:
        (most, many), (least, few) = ranked[0], ranked[-1]
        yield f"largest class {most} ({many}), smallest {least} ({few}): {many / few:.1f} to 1"
