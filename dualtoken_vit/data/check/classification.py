"""The report on a classification dataset."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dualtoken_vit.data.check.report import (
    Facts,
    Splits,
    copies,
    copy_notes,
    count_table,
    image_lines,
    in_both,
    missing_classes,
    print_report,
    read_facts,
)
from dualtoken_vit.data.classification import Images, Record, read_split, split_name
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.recipes import Classification


def check(recipe: Classification, out: Path) -> bool:
    """Read every image of a recipe's dataset once and print a report.

    Problems are unreadable images, empty classes, classes of one split only, images in both splits, and equal images in
    different classes. Sizes, modes, imbalance and the like are only reported.

    Args:
        recipe: the experiment
        out: not used: nothing is drawn

    Returns:
        Whether there is no problem.

    Raises:
        InputError: for a dataset that does not exist.
    """
    data = recipe.data
    roles = ("train",) if data.holdout else ("train", "val")
    datasets = {split_name(data, role): read_split(data, role, recipe.model.in_chans) for role in roles}
    found = {split: _read(dataset, split) for split, dataset in datasets.items()}
    class_names = {split: dataset.class_names for split, dataset in datasets.items()}
    table = count_table(class_names, {split: Counter(fact.label for fact in facts) for split, facts in found.items()})
    lines = list(image_lines(found))
    if data.holdout:
        lines.append(f"validation: {data.holdout:.0%} of each class of {data.train_split}")
    notes = [*_balance(found[data.train_split]), *copy_notes(found)]
    lines += [f"note: {note}" for note in (*notes, *(note for dataset in datasets.values() for note in dataset.notes))]
    unreadable = [fact.problem for facts in found.values() for fact in facts if fact.problem]
    mixed = [f"equal images in different classes: {names}" for names in copies(found, lambda _, fact: fact.label)]
    problems = [*_empty_classes(datasets, found), *missing_classes(class_names), *unreadable]
    return print_report(table, lines, problems, [in_both(found), mixed])


def _read(dataset: Images, split: str) -> list[Facts]:
    """Read every image of a split, with a progress bar."""

    def look(record: Record) -> Facts:
        name, source, target = record
        return read_facts(name, source, dataset.class_names[target])

    return list(in_threads(look, dataset.records(), len(dataset), f"reading {split}"))


def _empty_classes(datasets: dict[str, Images], found: Splits) -> Iterator[str]:
    for split, dataset in datasets.items():
        filled = {fact.label for fact in found[split]}
        yield from (f"empty class: {split}/{name}" for name in dataset.class_names if name not in filled)


def _balance(facts: list[Facts]) -> Iterator[str]:
    counts = Counter(fact.label for fact in facts).most_common()
    if counts:
        (most, many), (least, few) = counts[0], counts[-1]
        yield f"largest class {most} ({many}), smallest {least} ({few}): {many / few:.1f} to 1"
