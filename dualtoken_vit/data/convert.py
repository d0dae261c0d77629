"""Images with objects from one label format to another."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dualtoken_vit.data.coco import AnnotatedImages, entry_name, segmentation_fault, size_fault
from dualtoken_vit.data.formats import FORMATS, detect
from dualtoken_vit.data.formats.base import polygons_of, sizes
from dualtoken_vit.data.splits import ALL, inside
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_folder, printable, relative
from dualtoken_vit.show.console import wide_console

COUNTS = ("images", "objects", "crowds", "polygons", "masks")


Counts = dict[str, tuple[Counter[str], Counter[str]]]


def convert(source: str | Path, target: str | Path, to: str, format: str = "auto") -> Counts:
    """Write a folder of images and labels into a new folder in another format, and print what it holds.

    All of TARGET is written, or nothing. The counts are those of the files read and of the files written, read again.
    A split without a name becomes "train".

    Args:
        source: folder of images and labels
        target: the new folder; an empty one may exist
        to: coco, yolo or voc
        format: of `source`; auto: detect it

    Returns:
        `COUNTS` of each split, before and after.

    Raises:
        InputError: for labels that cannot be read or are broken, a split without a name beside "train", and for a
            `target` that is not empty.
    """
    name, found = detect(source, format, "--format")
    notes = []
    if {"train", "val"} <= found.keys() and found.pop("trainval", None):
        notes.append("trainval left out: train and val have its images")
    if {"train", ALL} <= found.keys():
        both = f"has the split train, and {ALL} (CVAT's default), which would be train, too"
        raise InputError(f"{printable(source)}: {both}; rename one to val or test, or remove it")
    write = FORMATS[to].write
    assert write is not None
    splits = {}
    for each, part in found.items():
        try:
            splits["train" if each == ALL else each] = _valid(FORMATS[name].read(Path(source), part), each)
        except InputError as error:
            if each != "test" or len(found) == 1 or FORMATS[name].usable(Path(source), part):
                raise
            notes.append(f"test left out: {error}")  # Roboflow names one that it did not export
    before = {each: _count(split) for each, split in splits.items()}
    with atomic_folder(target) as folder:
        notes += write(splits, folder)
        written = FORMATS[to].detect(folder)
        again = {each: FORMATS[to].read(folder, written[each]) for each in splits}
        for each, split in again.items():
            if split.problems:
                raise InputError(f"{printable(source)}, {each}: cannot be written as {to}: {split.problems[0]}")
        after = {each: _count(split) for each, split in again.items()}
    counts = {each: (before[each], after[each]) for each in splits}
    _print({"before": f"{name}, {printable(source)}", "after": f"{to}, {printable(target)}"}, counts, notes)
    return counts


def _valid(split: AnnotatedImages, title: str) -> AnnotatedImages:
    """The split of this title, its images named relative to its folder; an InputError for what is broken in it."""
    coco, problems = split.sift(masks=False)
    images = {image["id"]: image for image in coco["images"]}
    for one in coco["annotations"]:
        if one.get("segmentation") and (fault := segmentation_fault(one["segmentation"], images[one["image_id"]])):
            problems.append(f"{entry_name('annotations', one)}: {fault}")
    name = printable(split.name)
    paths = [Path(split.path(image)) for image in coco["images"]]
    for image, path, size in zip(coco["images"], paths, sizes(paths, f"checking {printable(title)}"), strict=True):
        fault = size if isinstance(size, str) else size_fault(str(path), size, image, split.name)
        if inside(split.folder, path):
            image["file_name"] = relative(path, split.folder)
        else:
            fault = f"{printable(path)} is not in {printable(split.folder)}"
        if fault:
            problems.append(fault)
    if problems:
        more = f" (and {len(problems) - 1} more: check-data lists all)" if len(problems) > 1 else ""
        raise InputError(f"{name}: {problems[0]}{more}")
    return split._replace(coco=coco)


def _count(split: AnnotatedImages) -> Counter[str]:
    annotations = split.coco["annotations"]
    objects = [one for one in annotations if not one.get("iscrowd")]
    polygons = sum(bool(polygons_of(one)) for one in objects)
    masks = sum(bool(one.get("segmentation")) for one in objects) - polygons
    found = len(split.coco["images"]), len(objects), len(annotations) - len(objects), polygons, masks
    return Counter(dict(zip(COUNTS, found, strict=True)))


def _print(titles: Mapping[str, str], counts: Counts, notes: Sequence[str]) -> None:
    table = Table("split", "", *COUNTS)
    for name, pair in counts.items():
        for title, count in zip(titles, pair, strict=True):
            table.add_row(Text(printable(name)), title, *(str(count[key]) for key in COUNTS))
    console = wide_console()
    console.print(table)
    for line in (*(f"{key}: {title}" for key, title in titles.items()), *(f"note: {line}" for line in notes)):
        console.print(Text(line), soft_wrap=True)
