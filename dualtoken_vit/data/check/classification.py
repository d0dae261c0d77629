"""The report on a dataset: what is in it, and what would stop a training run or spoil its result."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualtoken_vit.data.classification import Images, Record, read_split, split_name
from dualtoken_vit.data.folders import EXTENSIONS
from dualtoken_vit.data.images import load_image, naming
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, Data

_SHOWN = 20  # duplicates and foreign files that are named; unreadable images are all named


class Facts(NamedTuple):
    """What is known of one image once it was read."""

    name: str
    label: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)  # width, height
    mode: str = ""
    digest: bytes = b""  # of the size and the 8-bit RGB pixels
    turned: bool = False  # EXIF says that it is to be shown turned or mirrored


def check_data(recipe: Classification) -> bool:
    """Read every image of a recipe's dataset once and print what is found.

    Problems are unreadable images, empty classes, classes of one split only, images that are in both splits, and
    equal images in different classes. Sizes, modes, imbalance and the like are only told.

    Returns:
        True where there is no problem.

    Raises:
        InputError: where there is no such dataset.
    """
    data = recipe.data
    roles = ("train",) if data.holdout else ("train", "val")
    datasets = {split_name(data, role): read_split(data, role, recipe.model.in_chans) for role in roles}
    found = {split: _read(dataset, split) for split, dataset in datasets.items()}
    class_names = {split: dataset.class_names for split, dataset in datasets.items()}
    table = count_table(class_names, {split: Counter(fact.label for fact in found[split]) for split in found})
    told = [line for split, facts in found.items() for line in image_lines(split, facts)]
    if data.holdout:
        told.append(f"validation: {data.holdout:.0%} of each class of {data.train_split}")
    told += [f"note: {line}" for line in _notes(data, found)]
    unreadable = [fact.problem for facts in found.values() for fact in facts if fact.problem]
    mixed = [f"equal images in different classes: {names}" for names in copies(found, lambda _, fact: fact.label)]
    return report(table, told, [*_class_problems(datasets, found), *unreadable], [in_both(found), mixed])


def report(table: Table, told: list[str], problems: list[str], many: list[list[str]]) -> bool:
    """Print what was found.

    Args:
        table: Comes first.
        told: What is no problem.
        problems: Each is printed.
        many: Kinds of problems of which only the first few are.

    Returns:
        True where there is no problem.
    """
    console = Console()
    console.print(table)
    for line in told:
        console.print(Text(line), soft_wrap=True)
    for line in (*problems, *(line for lines in many for line in first(lines))):
        console.print(Text(line, style="red"), soft_wrap=True)
    count = len(problems) + sum(map(len, many))
    verdict = Text(f"problems: {count}", "bold red") if count else Text("no problems", "bold green")
    console.print(verdict, soft_wrap=True)
    return not count


def _read(dataset: Images, split: str) -> list[Facts]:
    """Read every image of a split, under a progress bar."""

    def look(record: Record) -> Facts:
        name, source, target = record
        return look_at(name, source, dataset.class_names[target])

    return list(in_threads(look, dataset.records(), len(dataset), f"reading {split}"))


def look_at(name: str, source: Any, label: str = "") -> Facts:
    """Read one image."""
    try:
        with naming(name):
            image = source if isinstance(source, Image.Image) else Image.open(source)
        with nullcontext(image) if image is source else image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            pixels = load_image(image, name=name)
    except InputError as error:
        return Facts(name, label, str(error))
    digest = blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).digest()
    return Facts(name, label, "", pixels.size, image.mode, digest, turned)


def count_table(class_names: dict[str, tuple[str, ...]], counts: dict[str, Counter]) -> Table:
    """How many of each class there are in each split."""
    table = Table("class")
    for split in counts:
        table.add_column(Text(split), justify="right")
    for name in dict.fromkeys(name for names in class_names.values() for name in names):
        cells = [str(counts[split][name]) if name in class_names[split] else "-" for split in counts]
        table.add_row(Text(name), *(Text(cell, style="red" if cell in ("0", "-") else "") for cell in cells))
    table.add_section()
    table.add_row("all", *(str(count.total()) for count in counts.values()))
    return table


def image_lines(split: str, facts: list[Facts]) -> Iterator[str]:
    """Sizes and modes of the images of a split that can be read."""
    facts = [fact for fact in facts if not fact.problem]
    if facts:
        for side, values in zip(("width", "height"), zip(*(fact.size for fact in facts), strict=True), strict=True):
            yield f"{split}: {side} {min(values)} to {max(values)} px, median {median(values):g}"
        modes = Counter(fact.mode for fact in facts).most_common()
        yield f"{split}: modes {', '.join(f'{mode} {count}' for mode, count in modes)}"


def _class_problems(datasets: dict[str, Images], found: dict[str, list[Facts]]) -> Iterator[str]:
    for split, dataset in datasets.items():
        filled = {fact.label for fact in found[split]}
        yield from (f"empty class: {split}/{name}" for name in dataset.class_names if name not in filled)
    yield from missing_classes({split: dataset.class_names for split, dataset in datasets.items()})


def missing_classes(class_names: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """The classes that are only in other splits."""
    for split, names in class_names.items():
        others = {name for other in class_names.values() for name in other} - set(names)
        yield from (f"class missing: {split}/{name}" for name in sorted(others))


def in_both(found: dict[str, list[Facts]]) -> list[str]:
    """The images that are in both splits."""
    return [f"in both splits: {names}" for names in copies(found, lambda split, _: split)]


def copies(found: dict[str, list[Facts]], differing: Callable[[str, Facts], str]) -> Iterator[str]:
    """The names of equal images of which something (of split and image) differs."""
    for group in _equal(found):
        if len({differing(split, fact) for split, fact in group}) > 1:
            yield " = ".join(fact.name for _, fact in group)


def copy_notes(found: dict[str, list[Facts]]) -> Iterator[str]:
    """How many images are copies within a split."""
    for split, facts in found.items():
        number = sum(len(group) - 1 for group in _equal({split: facts}))
        if number:
            yield f"{number} images of {split} are exact copies of others in it"


def turned_notes(found: dict[str, list[Facts]], labels: str) -> Iterator[str]:
    """Which images are turned by EXIF, where `labels` must have been drawn on them as they are shown."""
    for split, facts in found.items():
        names = [fact.name for fact in facts if fact.turned]
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            yield f"{len(names)} images of {split} are turned by EXIF; their {labels} must fit what is shown: {some}"


def _notes(data: Data, found: dict[str, list[Facts]]) -> Iterator[str]:
    counts = Counter(fact.label for fact in found[data.train_split])
    if counts:
        (most, many), *_, (least, few) = [*counts.most_common(), counts.most_common()[-1]]
        yield f"largest class {most} ({many}), smallest {least} ({few}): {many / few:.1f} to 1"
    yield from copy_notes(found)
    if data.dataset == "folder":
        for split in found:
            yield from first([f"not an image of a class: {path}" for path in _foreign(Path(data.root, split))])


def _equal(found: dict[str, list[Facts]]) -> list[list[tuple[str, Facts]]]:
    """Groups of two or more images with the same pixels, each with its split."""
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


def first(lines: list[str]) -> list[str]:
    """The first lines, and how many there are beside them."""
    if len(lines) <= _SHOWN:
        return lines
    kinds = {line.partition(": ")[0] for line in lines}  # or files, if the lines begin with one
    kind = f": {kinds.pop()}" if len(kinds) == 1 else ""
    return [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more{kind}"]
