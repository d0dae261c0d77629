"""YOLO: data.yaml and one text file per image, as Ultralytics reads them and Roboflow, CVAT and LabelImg export them.

A line is `CLASS X Y WIDTH HEIGHT`, a box by its centre, or `CLASS X Y X Y X Y ...`, a polygon, all as fractions of the
image's width and height. An image without a text file has no objects; a text file of such lines without
an image is an error.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from dualtoken_vit.data.coco import AnnotatedImages, clip, decode_masks
from dualtoken_vit.data.folders import image_files, read_class_names, read_lines, scan
from dualtoken_vit.data.formats.base import (
    Format,
    Labels,
    class_names,
    copy_image,
    labelled,
    number,
    polygons_of,
    sizes,
    text,
)
from dualtoken_vit.data.splits import ALL, as_root, find, inside, split_folders, split_of
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import counted, printable, relative

ROUNDED = 0.02  # pixels within which boxes are the same: COCO's have two decimals, as have its polygons
PIXELS = 2.0  # larger coordinates are no fractions; smaller ones, beyond the image, are for check-data to report


def _detect(root: Path) -> dict[str, list[str]]:
    """The images of the splits of data.yaml (or another YAML file with names), as it names them.

    Without one, those in ROOT/images beside ROOT/labels and ROOT/classes.txt, or in ROOT beside text files and
    classes.txt.
    """
    path = _yaml(root)
    if path:
        found: dict[str, list[str]] = {}
        for key, value in _load(path).items():
            listed = value if isinstance(value, list) else [value]
            values = [each for each in listed if each and isinstance(each, str)]
            if values and (split := split_of(str(key))):
                if split in found:
                    raise InputError(f"{printable(path)}: {key}: is the {split} split, as another key; remove one")
                found[split] = values
        return found
    if not (root / "classes.txt").is_file():
        return {}
    if (root / "labels").is_dir() and (root / "images").is_dir():
        splits = split_folders(root / "images")
        return {split: [f"images/{each.name}"] for split, each in splits.items()} or {ALL: ["images"]}
    beside = any(path.with_suffix(".txt").is_file() for path in map(Path, image_files(root)))
    return {ALL: ["."]} if beside else {}


def _yaml(root: Path) -> Path | None:
    """The YAML file with the names of the classes; data.yaml if there are several."""
    paths = sorted([*root.glob("*.yaml"), *root.glob("*.yml")], key=lambda path: (path.stem != "data", path.name))
    found = (path for path in paths if path.is_file() and path.name[0] != "." and b"names" in path.read_bytes())
    return next((path for path in found if "names" in _load(path)), None)


def _load(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except Exception as error:  # the values of tags and dates, too, raise errors of their own
        raise InputError(f"{printable(path)}: cannot be read as YAML ({reason(error)})") from None
    return content if isinstance(content, dict) else {}


def _names(root: Path) -> list[str]:
    """The classes, by number."""
    path = _yaml(root)
    if path is None:
        return [name.strip() for name in read_class_names(root / "classes.txt")]
    content, file = _load(path), printable(path)
    names = content["names"]
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise InputError(f"{file}: names: its keys must be the numbers from 0 to {len(names) - 1}")
        names = [value for _, value in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{file}: names must be the list of the classes, or NUMBER: NAME")
    for index, name in enumerate(names):
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            kind = type(name).__name__  # the value may be huge: aliases of YAML multiply it
            raise InputError(f"{file}: names: class {index} is of type {kind}; put the name in quotes")
    if len(set(map(str, names))) < len(names):
        raise InputError(f"{file}: names: a class is listed twice; name each once")
    if content.get("nc", len(names)) != len(names):
        raise InputError(f"{file}: nc must be {len(names)}, the number of names; correct one of them")
    if "kpt_shape" in content:
        raise InputError(f"{file}: kpt_shape: keypoints are not supported; export boxes or polygons")
    return list(map(str, names))


def _images(root: Path, entries: list[str]) -> list[Path]:
    """The images of a split: those in folders, and those in lists of files."""
    file, base = printable(_yaml(root) or root), _base(root)
    images: list[Path] = []
    for entry in entries:
        place = _inside(root, base, entry)
        if place is None:
            raise InputError(f"{file}: {entry}: is not in {printable(root)}; correct it, relative to this folder")
        if place.is_dir():
            images += map(Path, image_files(place))
            continue
        for line, name in enumerate(read_lines(place), start=1):
            if not name.strip():
                continue
            where = f"{printable(place)}, line {line}"
            try:
                image = find(root, name.strip(), [place.parent, base])
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if image is None:
                raise InputError(f"{where}: {printable(name.strip())}: no such file in {printable(root)}")
            images.append(image)
    return images


def _base(root: Path) -> Path:
    """The folder to which the entries of data.yaml are relative."""
    path = _yaml(root)
    if path and isinstance(stated := _load(path).get("path"), str):  # often that of the machine of the export
        return _inside(root, root, stated) or root
    return root


def _usable(root: Path, entries: list[str]) -> bool:
    """Whether any image has labels. Roboflow names a test split in every data.yaml, also where it exports none."""
    try:
        return any(_label_file(root, path).is_file() for path in _images(root, entries))
    except InputError:
        return False


def _inside(root: Path, base: Path, entry: str) -> Path | None:
    """A file or folder of data.yaml, if it is in `root`. Roboflow writes ../train/images for ROOT/train/images."""
    for name in (entry, entry.removeprefix("../")):
        path = Path(os.path.normpath(base / name))
        if os.path.exists(path) and inside(root, path):
            return as_root(root, path)
    return None


def _label_file(root: Path, image: Path) -> Path:
    """Ultralytics' rule: the last folder `images` of the path in `root` becomes `labels`, and the extension .txt."""
    parts = relative(image.with_suffix(".txt"), root).split("/")
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return root.joinpath(*parts)


def _read(root: Path, entries: list[str]) -> AnnotatedImages:
    names = _names(root)
    labels, paths = Labels(root, names), _images(root, entries)
    labelled = 0
    for path, size in zip(paths, sizes(paths, "reading the sizes of the images"), strict=True):
        if isinstance(size, str):
            labels.problems.append(size)
            continue
        labels.add_image(path, size)
        file = _label_file(root, path)
        if not file.is_file():
            continue
        labelled += 1
        for line, content in enumerate(read_lines(file), start=1):
            if not content.strip():
                continue
            where = labels.place(file, f"line {line}")
            try:
                label, corners, polygons = _parse(content, size, len(names))
            except ValueError as error:
                labels.problems.append(f"{where}: {error}")
            else:
                labels.add(names[label], corners, where, polygons)
    if paths and not labelled and not labels.problems:
        example = f"{printable(_label_file(root, paths[0]))} for {printable(paths[0])}"
        raise InputError(f"{printable(root)}: no image has a label file; expected {example}")
    labels.problems += _orphans(labels, entries, paths)
    return labels.collect()


def _orphans(labels: Labels, entries: list[str], images: list[Path]) -> Iterator[str]:
    """A line on each label file of the folders of a split that belongs to none of its images.

    Lists of files are left out: the other files of their folders may be of another split.
    """
    known = {_label_file(labels.root, image) for image in images}
    for entry in entries:
        place = _inside(labels.root, _base(labels.root), entry) or labels.root  # `_images` has found it
        folder = _label_file(labels.root, place / "image").parent
        for file in map(Path, scan(folder)[1] if place.is_dir() and folder.is_dir() else ()):
            if file.suffix.lower() != ".txt" or file in known or not _has_labels(file):
                continue
            if (read := file.with_suffix(".txt")) not in known:
                there = "beside it" if file.parent == place else f"in {labels.place(place)}"
                yield f"{labels.place(file)}: no image of this name {there}"
            elif not read.is_file():  # as it is on a disk that takes capitals for small letters
                yield f"{labels.place(file)}: not read; rename it to {printable(read.name)}"


def _has_labels(file: Path) -> bool:
    """Whether the first line has the numbers of a label, unlike classes.txt and other text."""
    try:
        first = next(filter(str.strip, read_lines(file)), "")
        return len(list(map(number, first.split()))) > 4
    except (ValueError, InputError):
        return False


def _parse(line: str, size: tuple[int, int], classes: int) -> tuple[int, list[float], list[list[float]]]:
    """Class, corners of the box and polygons in pixels of a line; a ValueError for what it must be instead."""
    first, *rest = line.split()
    if not first.isdecimal() or len(first) > 9 or int(first) >= classes:
        raise ValueError(f"class {first!r:.50} must be a number from 0 to {classes - 1}")
    values = list(map(number, rest))
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f"{len(values)} numbers after the class, but a box has 4 and a polygon 3 or more pairs")
    if max(map(abs, values)) > PIXELS:
        raise ValueError(f"{max(values, key=abs):g} must be a fraction of the image's width or height, not pixels")
    width, height = size
    if len(values) == 4:
        x, y, across, down = values
        corners = [(x - across / 2) * width, (y - down / 2) * height, (x + across / 2) * width, (y + down / 2) * height]
        return int(first), corners, []
    polygon = [value * side for value, side in zip(values, size * (len(values) // 2), strict=True)]
    return int(first), _corners(polygon), [polygon]


def _corners(polygon: Sequence[float]) -> list[float]:
    """Left, top, right and bottom of a polygon x y x y ..."""
    xs, ys = polygon[::2], polygon[1::2]
    return [min(xs), min(ys), max(xs), max(ys)]


def _write(splits: Mapping[str, AnnotatedImages], target: Path) -> list[str]:
    """TARGET/images/SPLIT/NAME, TARGET/labels/SPLIT/NAME.txt and TARGET/data.yaml.

    A dataset has boxes or polygons, not both, as Ultralytics requires: polygons if all objects have them.
    """
    names = class_names(splits)
    objects = [one for split in splits.values() for one in split.coco["annotations"] if not one.get("iscrowd")]
    drawn = sum(bool(polygons_of(one)) for one in objects)
    polygons = bool(objects) and drawn == len(objects)
    clipped = joined = altered = moved = 0
    for name, split in splits.items():
        for image, ones in labelled(split):
            path = target / "images" / name / image["file_name"]
            file = _label_file(target, path)  # not in TARGET/labels if the name has another folder `images`
            lines = []
            for category, one in ones:
                if one.get("iscrowd"):
                    continue
                values = _polygon(one) if polygons else _centre(clip(one, image))
                left, top, width, height = one["bbox"]
                corners = left, top, left + width, top + height
                if polygons:
                    if len(polygons_of(one)) > 1:
                        same = torch.equal(*decode_masks([one, {"segmentation": [values]}], image))
                        joined, altered = joined + same, altered + (not same)
                    moved += any(abs(a - b) > ROUNDED for a, b in zip(_corners(values), corners, strict=True))
                else:
                    clipped += clip(one, image) != corners
                sides = (image["width"], image["height"]) * (len(values) // 2)
                shares = [text(value / side) for value, side in zip(values, sides, strict=True)]
                lines.append(" ".join([str(names.index(category)), *shares]))
            copy_image(split.path(image), path, file)
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    folders = {name: f"images/{name}" for name in splits}
    content = {**folders, "names": dict(enumerate(names))}  # without `path`: Ultralytics then takes the file's folder
    (target / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    crowds = sum(bool(one.get("iscrowd")) for split in splits.values() for one in split.coco["annotations"])
    masks = sum(isinstance(one.get("segmentation"), dict) for one in objects)
    lost = {
        f"{counted(crowds, 'crowd region')} left out: YOLO has none": crowds,
        f"{counted(drawn, 'polygon')} left out: {counted(len(objects) - drawn, 'object')} without one, so boxes are "
        "written": drawn and not polygons,
        f"{counted(masks, 'mask')} left out: YOLO has none": masks,
        f"{counted(clipped, 'box')} clipped to the image": clipped,
        f"{counted(joined, 'object')} of several polygons written as one polygon with the same mask": joined,
        f"{counted(altered, 'object')} of several polygons that overlap written as one: its mask is empty where an "
        "even number of them overlap": altered,
        f"{counted(moved, 'box')} other than those of their polygons left out: YOLO derives them": moved,
    }
    return [line for line, count in lost.items() if count]


def _centre(corners: tuple[float, ...]) -> list[float]:
    left, top, right, bottom = corners
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _polygon(annotation: dict) -> list[float]:
    """The polygons of an annotation as one: several are joined by lines that are passed in both directions."""
    first, *others = polygons_of(annotation)
    if not others:
        return first
    closed = [polygon + polygon[:2] for polygon in (first, *others)]
    back = [value for polygon in (first, *others[:-1])[::-1] for value in polygon[:2]]
    return [value for polygon in closed for value in polygon] + back


FORMAT = Format(_detect, _read, _write, _usable)
