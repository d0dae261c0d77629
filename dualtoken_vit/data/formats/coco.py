"""COCO json files in a folder with their images: COCO's own layout, and those of Roboflow, CVAT and Label Studio."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from os.path import isabs, isfile
from pathlib import Path
from typing import Any

from dualtoken_vit.data.coco import AnnotatedImages, object_area, read_coco
from dualtoken_vit.data.formats.base import Format, class_names, copy_image, labelled
from dualtoken_vit.data.splits import ALL, find_moved, inside, split_folders, split_of
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable, relative

ROBOFLOW = "_annotations.coco.json"
WHOLE = (ROBOFLOW, "result.json", "labels.json", "annotations.json")  # of datasets without splits


def _detect(root: Path) -> dict[str, Path]:
    """ROOT/SPLIT/_annotations.coco.json, ROOT[/annotations]/[instances_]SPLIT.json, or one of `WHOLE`."""
    found = {split: path / ROBOFLOW for split, path in split_folders(root).items() if (path / ROBOFLOW).is_file()}
    for path in () if found else sorted([*root.glob("annotations/*.json"), *root.glob("*.json")]):
        if split := split_of(path.stem.removeprefix("instances_")):
            if split in found:
                both = f"{printable(found[split])} and {printable(path)}"
                raise InputError(f"{both} are both the {split} split: rename or remove one")
            found[split] = path
    whole = next((root / name for name in WHOLE if (root / name).is_file()), None)
    return {ALL: whole} if whole and not found else found


def _read(root: Path, path: Path) -> AnnotatedImages:
    split = read_coco(path)
    coco = _without_root(split.coco)
    names = list(filter(None, map(_file_name, coco["images"])))
    named = path.stem.removeprefix("instances_")
    inner = [name for name in (named, split_of(named)) if name]
    folders = [path.parent, root, *(root / "images" / name for name in inner), *(root / name for name in inner)]
    folders += [root / "images", root / "data"]
    tried = (each for each in folders if any(isfile(each / name) for name in names[:20] if not isabs(name)))
    folder = next(tried, None)
    moved: dict[str, Path] = {}
    try:
        if folder is None and any(find_moved(root, name, folders) for name in names[:20]):  # missing ones cost time
            moved = {name: place for name in names if (place := find_moved(root, name, folders))}
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    if folder is None:
        folder = Path(os.path.commonpath([place.parent for place in moved.values()])) if moved else root / "images"
    for name in names:
        if name not in moved and not inside(root, folder / name):
            raise InputError(f"{printable(path)}: the file name {name!r:.200} leads out of {printable(root)}")
    if moved:
        for one in filter(_file_name, coco["images"]):
            place = moved.get(one["file_name"])
            one["file_name"] = relative(place, folder) if place else one["file_name"]
    return split._replace(folder=str(folder), coco=coco)


def _file_name(image: Any) -> str | None:
    name = image.get("file_name") if isinstance(image, dict) else None
    return name if isinstance(name, str) else None


def _usable(root: Path, path: Path) -> bool:
    """Whether there are annotations. The file may be huge, and is not parsed."""
    with (
        suppress(OSError, ValueError),  # the latter for an empty file
        path.open("rb") as file,
        mmap(file.fileno(), 0, access=ACCESS_READ) as content,
    ):
        return re.search(rb'"annotations"\s*:\s*\[\s*\{', content) is not None
    return False


def _without_root(coco: dict[str, list]) -> dict[str, list]:
    """Without the category that Roboflow puts above the others: it has no object and is their supercategory."""
    categories = [one for one in coco["categories"] if isinstance(one, dict)]
    used = [one.get("category_id") for one in coco["annotations"] if isinstance(one, dict)]
    for one in categories:
        others = [each for each in categories if each is not one]
        above = others and all(each.get("supercategory") == one.get("name") for each in others)
        if above and one.get("supercategory") == "none" and one.get("id") not in used:
            return coco | {"categories": [each for each in coco["categories"] if each is not one]}
    return coco


def _write(splits: Mapping[str, AnnotatedImages], target: Path) -> list[str]:
    """TARGET/images/SPLIT/NAME and TARGET/annotations/instances_SPLIT.json, with one list of categories."""
    ids = {name: number for number, name in enumerate(class_names(splits), start=1)}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    (target / "annotations").mkdir()
    for name, split in splits.items():
        annotations: list[dict[str, Any]] = []
        for image, objects in labelled(split):
            copy_image(split.path(image), target / "images" / name / image["file_name"])
            for category, one in objects:
                entry = {key: value for key, value in one.items() if key != "where"}
                filled = {"category_id": ids[category], "area": object_area(one, image)}
                annotations.append({"iscrowd": 0} | entry | filled)
        coco = {"images": split.coco["images"], "categories": categories, "annotations": annotations}
        (target / "annotations" / f"instances_{name}.json").write_text(json.dumps(coco), encoding="utf-8")
    return []


FORMAT = Format(_detect, _read, _write, _usable)
