"""What the reports of all tasks share: reading images, finding copies, tables of classes, printing."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2.functional import to_pil_image

from dualtoken_vit.data.classification import ImageDataset
from dualtoken_vit.data.images import load_image, naming, open_image, orientation
from dualtoken_vit.data.sampling import seeded
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import classification_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, guard, printable
from dualtoken_vit.show.console import wide_console
from dualtoken_vit.show.drawing import draw_labelled, draw_scene, save_image, spread

_SHOWN = 20  # lines of each kind of problem that may be frequent; unreadable images are all listed


class Facts(NamedTuple):
    """What is known about an image after reading it."""

    name: str
    label: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)  # width, height
    mode: str = ""
    digest: bytes = b""  # of the size and the 8-bit RGB pixels
    rotated: bool = False  # by its EXIF orientation


Splits = Mapping[str, Sequence[Facts]]  # by the name of the split


def read_facts(name: str, source: Any, label: str = "") -> Facts:
    """Read one image from what `load_image` takes."""
    try:
        with naming(name):
            image = source if isinstance(source, Image.Image) else open_image(source)
        with nullcontext(image) if image is source else image:
            pixels = load_image(image, name=name)
            rotated = orientation(image) != 1  # not before: a failed attempt at a PNG's EXIF hides damaged pixels
    except InputError as error:
        return Facts(name, label, str(error))
    digest = blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).digest()
    return Facts(name, label, "", pixels.size, image.mode, digest, rotated)


def read_all(dataset: Any, split: str, label: Callable[[Any], str]) -> list[Facts]:
    """Read every image of a split, with a progress bar; `label` names a target."""
    images = ((name, source, label(target)) for name, source, target in dataset.records())
    return list(in_threads(lambda image: read_facts(*image), images, len(dataset), f"reading {split}"))


def print_report(
    table: Table,
    splits: Splits,
    lines: Sequence[str],
    notes: Sequence[str],
    problems: Sequence[str],
    many: Sequence[Sequence[str]],
    labels: str = "",
) -> bool:
    """Print a table, the properties and problems of the images of each split, and what the task found.

    Unreadable images and those in more than one split are problems; other copies are notes. Returns whether there is no
    problem.

    Args:
        lines, notes: facts, and those to consider
        problems, many: those that are all printed, and kinds of which only the first are
        labels: what must have been drawn on images as EXIF rotates them, for a note on these
    """
    lines = [*_properties(splits), *lines]
    lines += [f"note: {note}" for note in dict.fromkeys((*notes, *_notes(splits, labels)))]
    problems = [*problems, *(fact.problem for facts in splits.values() for fact in facts if fact.problem)]
    # With --data.holdout, both splits have the notes and problems of the files that they share.
    both = [f"in both splits: {names}" for names in copies(splits, lambda split, _: split)]
    many = [[*dict.fromkeys(kind)] for kind in (*many, both)]
    console = wide_console()
    console.print(table)
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    for line in (*problems, *(line for kind in many for line in first(kind))):
        console.print(Text(printable(line), style="red"), soft_wrap=True)
    count = len(problems) + sum(map(len, many))
    verdict = Text(f"problems: {count}", "bold red") if count else Text("no problems", "bold green")
    console.print(verdict, soft_wrap=True)
    return not count


def first(lines: Sequence[str]) -> list[str]:
    """The first lines, and the number of the others."""
    if len(lines) <= _SHOWN:
        return list(lines)
    kinds = {line.partition(": ")[0] for line in lines}  # or files, if the lines begin with one
    kind = f": {kinds.pop()}" if len(kinds) == 1 else ""
    return [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more{kind}"]


def class_table(splits: Sequence[str], rows: Mapping[str, Sequence[tuple[str, bool]]]) -> Table:
    """A table with one row per class and one cell (text, whether it is a problem) per split."""
    table = Table("class")
    for split in splits:
        table.add_column(Text(printable(split)), justify="right")
    for name, cells in rows.items():
        table.add_row(Text(printable(name)), *(Text(text, style="red" if bad else "") for text, bad in cells))
    return table


def count_table(class_names: Mapping[str, Sequence[str]], counts: Mapping[str, Counter[str]]) -> Table:
    """The number of images or objects of each class in each split; "-" for classes that a split does not have."""
    rows = {}
    for name in dict.fromkeys(name for names in class_names.values() for name in names):
        cells = [str(counts[split][name]) if name in class_names[split] else "-" for split in counts]
        rows[name] = [(cell, cell in ("0", "-")) for cell in cells]
    table = class_table(list(counts), rows)
    table.add_section()
    table.add_row("all", *(str(count.total()) for count in counts.values()))
    return table


def class_problems(class_names: Mapping[str, Sequence[str]], counts: Mapping[str, Counter[str]]) -> Iterator[str]:
    """The classes without images, and those that only other splits have."""
    for split, names in class_names.items():
        yield from (f"empty class: {split}/{name}" for name in names if not counts[split][name])
    for split, names in class_names.items():
        others = {name for other in class_names.values() for name in other} - set(names)
        yield from (f"class missing: {split}/{name}" for name in sorted(others))


def copies(splits: Splits, differing: Callable[[str, Facts], str]) -> Iterator[str]:
    """The names of images with the same pixels for which `differing` (of the split and the image) differs."""
    groups = defaultdict(list)
    for split, facts in splits.items():
        for fact in facts:
            if not fact.problem:
                groups[fact.digest].append((split, fact))
    for group in groups.values():
        if len({differing(split, fact) for split, fact in group}) > 1:
            yield " = ".join(fact.name for _, fact in group)


def sample(dataset: Any, index: int, seed: int) -> Any:
    """Sample `index` as in the first epoch of a run."""
    with seeded(seed, 0, index):
        return dataset[index]


def augmentation(recipe: Any) -> Callable[[Image.Image], Image.Image]:
    """A classifier's training transform, to an image; an InputError for one that timm rejects."""
    # Most networks normalise by these; what a rotation leaves empty is filled with the mean.
    values = (torch.tensor(each) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    mean, std = (each if recipe.model.in_chans == 3 else each.mean(0, True) for each in values)
    prepare = classification_train(recipe.data, recipe.augment, tuple(mean.tolist()), tuple(std.tolist()))
    shift, scale = mean[:, None, None], std[:, None, None]
    return lambda image: to_pil_image((prepare(image) * scale + shift).clamp(0, 1))


def labelled_sheet(
    train: ImageDataset, facts: Sequence[Facts], recipe: Any, path: Path, transform: Callable | None
) -> str:
    """`contact_sheet` of training images with the labels of their `facts`; `transform`: `augmentation`, if wanted."""
    if transform is not None:
        train.transform = transform
        if recipe.augment.hflip == "alternate":
            train.alternate_flips(recipe.run.seed, 0)
    sound = spread([i for i, fact in enumerate(facts) if not fact.problem])
    samples = ((facts[i].label or "no label", sample(train, i, recipe.run.seed)[0]) for i in sound)
    return contact_sheet(
        (draw_scene([(label, image, None)], ()) for label, image in samples), path, transform is not None
    )


def contact_sheet(drawings: Iterable[Image.Image], path: Path, augmented: bool = False) -> str:
    """Draw a sheet of training images with their labels; returns a line for the report, which says if `augmented`."""
    with guard(path):
        if not (drawn := list(drawings)):
            return "no image of train has labels to draw"
        if save_image(partial(draw_labelled, drawn), path):
            images = counted(len(drawn), "image")
            return f"{images} {'as training sees them' if augmented else 'with their labels'}: {path}"
    return "no sheet of images was drawn"


def _properties(splits: Splits) -> Iterator[str]:
    """The sizes and modes of the readable images of each split."""
    for split, facts in splits.items():
        sizes = [fact.size for fact in facts if not fact.problem]
        for side, values in zip(("width", "height"), zip(*sizes, strict=True), strict=False):
            yield f"{split}: {side} {min(values)} to {max(values)} px, median {median(values):g}"
        modes = Counter(fact.mode for fact in facts if not fact.problem).most_common()
        if modes:
            yield f"{split}: modes {', '.join(f'{mode} {count}' for mode, count in modes)}"


def _notes(splits: Splits, labels: str) -> Iterator[str]:
    """The number of copies within each split, and with `labels`, the images that EXIF rotates."""
    for split, facts in splits.items():
        digests = [fact.digest for fact in facts if not fact.problem]
        if number := len(digests) - len(set(digests)):
            yield f"images of {split} that are exact copies of others in it: {number}"
        names = [fact.name for fact in facts if fact.rotated]
        if names and labels:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            images = counted(len(names), "image")
            yield f"rotated by EXIF in {split}: {images}; {labels} must fit the rotated image: {listed}"
