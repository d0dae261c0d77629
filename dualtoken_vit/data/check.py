"""The report on a data set: what is in it, and what would stop a training run or spoil its result."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import NamedTuple

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualtoken_vit.data.classification import EXTENSIONS, Pictures, Record, in_threads, read_split, split_name
from dualtoken_vit.data.images import load_image, naming
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, Data

_SHOWN = 20  # duplicates and foreign files that are named; unreadable pictures are all named


class _Facts(NamedTuple):
    """What is known of one picture once it was read."""

    name: str
    label: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)  # width, height
    mode: str = ""
    digest: bytes = b""  # of the size and the 8-bit RGB pixels


def check_data(recipe: Classification) -> bool:
    """Read every picture of a recipe's data set once and print what is found.

    Problems are unreadable pictures, empty classes, classes of one split only, pictures that are in both splits, and
    equal pictures in different classes. Sizes, modes, imbalance and the like are only told.

    Returns:
        True where there is no problem.

    Raises:
        InputError: where there is no such data set.
    """
    data, console = recipe.data, Console()
    roles = ("train",) if data.holdout else ("train", "val")
    datasets = {split_name(data, role): read_split(data, role, recipe.model.in_chans) for role in roles}
    found = {split: _read(dataset, split) for split, dataset in datasets.items()}

    def tell(line: str, style: str = "") -> None:
        console.print(Text(line, style=style), soft_wrap=True)

    console.print(_counts(datasets, found))
    for split, facts in found.items():
        for line in _pictures(split, [fact for fact in facts if not fact.problem]):
            tell(line)
    if data.holdout:
        tell(f"validation: {data.holdout:.0%} of each class of {data.train_split}")
    for line in _notes(data, found):
        tell(f"note: {line}")
    unreadable = [fact.problem for facts in found.values() for fact in facts if fact.problem]
    classes, copies = list(_class_problems(datasets, found)), _copies(found)
    for line in (*classes, *unreadable, *(line for lines in copies for line in _first(lines))):
        tell(line, "red")
    count = len(classes) + len(unreadable) + sum(map(len, copies))
    tell(f"problems: {count}" if count else "no problems", "bold red" if count else "bold green")
    return not count


def _read(dataset: Pictures, split: str) -> list[_Facts]:
    """Read every picture of a split, under a progress bar."""

    def look(record: Record) -> _Facts:
        name, source, target = record
        label = dataset.class_names[target]
        try:
            with naming(name):
                picture = source if isinstance(source, Image.Image) else Image.open(source)
            with nullcontext(picture) if picture is source else picture:
                pixels = load_image(picture, name=name)
        except InputError as error:
            return _Facts(name, label, str(error))
        digest = blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).digest()
        return _Facts(name, label, "", pixels.size, picture.mode, digest)

    return list(in_threads(look, dataset.records(), len(dataset), f"reading {split}"))


def _counts(datasets: dict[str, Pictures], found: dict[str, list[_Facts]]) -> Table:
    """Pictures a class and split."""
    table = Table("class")
    for split in found:
        table.add_column(Text(split), justify="right")
    counts = {split: Counter(fact.label for fact in facts) for split, facts in found.items()}
    for name in dict.fromkeys(name for dataset in datasets.values() for name in dataset.class_names):
        cells = [str(counts[split][name]) if name in datasets[split].class_names else "-" for split in found]
        table.add_row(Text(name), *(Text(cell, style="red" if cell in ("0", "-") else "") for cell in cells))
    table.add_section()
    table.add_row("all", *(str(len(facts)) for facts in found.values()))
    return table


def _pictures(split: str, facts: list[_Facts]) -> Iterator[str]:
    """Sizes and modes of a split."""
    if facts:
        for side, values in zip(("width", "height"), zip(*(fact.size for fact in facts), strict=True), strict=True):
            yield f"{split}: {side} {min(values)} to {max(values)} px, median {median(values):g}"
        modes = Counter(fact.mode for fact in facts).most_common()
        yield f"{split}: modes {', '.join(f'{mode} {count}' for mode, count in modes)}"


def _class_problems(datasets: dict[str, Pictures], found: dict[str, list[_Facts]]) -> Iterator[str]:
    for split, dataset in datasets.items():
        filled = {fact.label for fact in found[split]}
        yield from (f"empty class: {split}/{name}" for name in dataset.class_names if name not in filled)
        others = {name for other in datasets.values() for name in other.class_names} - set(dataset.class_names)
        yield from (f"class missing: {split}/{name}" for name in sorted(others))


def _copies(found: dict[str, list[_Facts]]) -> tuple[list[str], list[str]]:
    """Pictures that are in both splits, and pictures that are in two classes."""
    across, labels = [], []
    for group in _equal(found):
        names = " = ".join(fact.name for _, fact in group)
        if len({split for split, _ in group}) > 1:
            across.append(f"in both splits: {names}")
        if len({fact.label for _, fact in group}) > 1:
            labels.append(f"equal pictures in different classes: {names}")
    return across, labels


def _notes(data: Data, found: dict[str, list[_Facts]]) -> Iterator[str]:
    counts = Counter(fact.label for fact in found[data.train_split])
    if counts:
        (most, many), *_, (least, few) = [*counts.most_common(), counts.most_common()[-1]]
        yield f"largest class {most} ({many}), smallest {least} ({few}): {many / few:.1f} to 1"
    for split in found:
        copies = sum(len(group) - 1 for group in _equal({split: found[split]}))
        if copies:
            yield f"{copies} pictures of {split} are exact copies of others in it"
    if data.dataset == "folder":
        for split in found:
            yield from _first([f"not a picture of a class: {path}" for path in _foreign(Path(data.root, split))])


def _equal(found: dict[str, list[_Facts]]) -> list[list[tuple[str, _Facts]]]:
    """Groups of two or more pictures with the same pixels, each with its split."""
    groups = defaultdict(list)
    for split, facts in found.items():
        for fact in facts:
            if not fact.problem:
                groups[fact.digest].append((split, fact))
    return [group for group in groups.values() if len(group) > 1]


def _foreign(folder: Path) -> list[str]:
    """Files that training does not look at: of another kind, or outside the class folders."""
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
    visible = (path for path in paths if not os.path.basename(path).startswith("."))
    return sorted(p for p in visible if not p.lower().endswith(EXTENSIONS) or os.path.dirname(p) == str(folder))


def _first(lines: list[str]) -> list[str]:
    """The first lines, and how many there are beside them."""
    more = [f"... and {len(lines) - _SHOWN} more: {lines[0].partition(':')[0]}"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more
