"""Label formats of images with objects: a folder in any of them becomes COCO's form. A module for each, on `base`."""

from pathlib import Path
from typing import Any

from dualtoken_vit.data.coco import AnnotatedImages
from dualtoken_vit.data.formats import coco, labelme, table, voc, yolo
from dualtoken_vit.data.formats.base import Format
from dualtoken_vit.data.splits import ALL, SPLITS
from dualtoken_vit.data.tables import unknown_columns
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import check_folder, printable
from dualtoken_vit.recipes import DetectionData

FORMATS: dict[str, Format] = {
    "coco": coco.FORMAT,
    "yolo": yolo.FORMAT,
    "voc": voc.FORMAT,
    "csv": table.FORMAT,
    "labelme": labelme.FORMAT,
}


def matching(root: Path) -> dict[str, dict[str, Any]]:
    """The formats in which a folder has labels: name to splits."""
    return {name: splits for name, each in FORMATS.items() if root.is_dir() and (splits := each.detect(root))}


def detect(root: str | Path, format: str = "auto", flag: str = "--data.format") -> tuple[str, dict[str, Any]]:
    """The format of a folder, and its splits by name, with what `Format.read` takes.

    Raises:
        InputError: for a missing folder, a folder in none of the formats or in several; `flag` then names the format.
    """
    name, root = printable(root), Path(root)
    if format != "auto" and format not in FORMATS:
        raise InputError(f"{flag} {format}: unknown format; choose from auto, {', '.join(FORMATS)}")
    check_folder(root, DetectionData.contents)
    found = matching(root) if format == "auto" else {format: FORMATS[format].detect(root)}
    if len(found) > 1:
        raise InputError(f"{name}: has labels in several formats: {', '.join(found)}; choose one with {flag}")
    if not any(found.values()):
        known = "COCO json, YOLO data.yaml, Pascal VOC XML, CSV or LabelMe json" if format == "auto" else format
        there = unknown_columns(root) if format in ("auto", "csv") else ""
        raise InputError(f"{name}: no labels of the format {known} found in this folder{there and f'; {there}'}")
    return next(iter(found.items()))


def read(root: str, format: str, split: str) -> AnnotatedImages:
    """A split of a folder; "train" is also all of it, where there are no splits. An InputError for one that is not."""
    name, splits = detect(root, format)
    wanted = SPLITS.get(split.lower(), split)
    if wanted == "train" and set(splits) == {ALL}:
        wanted = ALL
    if wanted not in splits:
        there = ", ".join(splits)
        remedy = "give --data.holdout 0.1, or another --data.train-split, --data.val-split"
        raise InputError(f"{printable(root)}: no split {split!r} of the format {name}; there is {there}: {remedy}")
    found = FORMATS[name].read(Path(root), splits[wanted])
    usable = tuple(each for each, place in splits.items() if each == wanted or FORMATS[name].usable(Path(root), place))
    unread: tuple[str, ...] = ()
    if wanted == "train" and ALL in splits:
        what = f"the split {ALL} (CVAT's default) is not read, because train is"
        unread = (f"{printable(root)}: {what}; rename it to val or test, or give --data.train-split {ALL}",)
    name = f"{root} ({wanted})" if found.name == root else found.name
    return found._replace(name=name, splits=usable, notes=(*found.notes, *unread))
