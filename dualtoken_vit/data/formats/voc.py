"""Pascal VOC: an XML file per image, in the devkit's layout or that of LabelImg, Roboflow and CVAT.

Coordinates are taken as they are: of the edges of the box, from 0 at the left and the top, as LabelImg, CVAT and
Roboflow write them. Objects marked as difficult are regions that neither training nor evaluation counts, as in VOC's
own evaluation. `polygon` elements of x1, y1, x2, y2, ... are Roboflow's. An XML file belongs to the image that its
<filename> names, whatever the file itself is called; a note says where both images exist.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, ParseError, SubElement, indent

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from dualtoken_vit.data.coco import AnnotatedImages, enclosing
from dualtoken_vit.data.folders import image_files, label_files, read_lines
from dualtoken_vit.data.formats.base import (
    Format,
    Labels,
    copy_image,
    labelled,
    number,
    polygons_of,
    sizes,
    stated_size,
    text,
)
from dualtoken_vit.data.splits import ALL, find, find_moved, split_folders, split_of
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import counted, printable

EDGES = ("xmin", "ymin", "xmax", "ymax")
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 excludes
LISTS = Path("ImageSets", "Main")  # of the names of the images of each split


def _detect(root: Path) -> dict[str, list[Path]]:
    """The XML files of each split: in ROOT/ImageSets/Main/SPLIT.txt, in ROOT[/Annotations]/SPLIT, or all."""
    lists = {split_of(path.stem): path for path in sorted((root / LISTS).glob("*.txt"))}
    found = {split: _listed(root, path) for split, path in lists.items() if split}
    for parent in (root, root / "Annotations", root / "annotations"):
        if not found and parent.is_dir():
            folders = {split: label_files(path, ".xml") for split, path in split_folders(parent).items()}
            found = {split: files for split, files in folders.items() if files}
    if not found and (files := label_files(root, ".xml")):
        found = {ALL: files}
    first = next((path for files in found.values() for path in files if path.is_file()), None)
    return found if first and _is_voc(first) else {}


def _listed(root: Path, path: Path) -> list[Path]:
    """The XML files of a list of names."""
    names = [line.strip() for line in read_lines(path) if line.strip()]
    folders = [root / "Annotations"]
    try:  # a line is a name, which may have spaces, or a name and VOC's flag
        found = [find(root, f"{one}.xml", folders) or find(root, f"{one.split()[0]}.xml", folders) for one in names]
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{printable(path)}: {printable(missing[0])}: no such XML file in Annotations{more}")
    return [file for file in found if file]


def _is_voc(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(1000)
    return b"<annotation" in start and b"<annotations" not in start


def _read(root: Path, files: list[Path]) -> AnnotatedImages:
    labels = Labels(root)
    found: list[tuple[Path, Element, Path, tuple[int, int] | None]] = []
    for file in files:
        try:
            tree = _parse(file)
            stated = stated_size(tree.findtext(f"size/{key}") for key in ("width", "height"))
            found.append((file, tree, _image(root, file, tree), stated))
        except (ValueError, InputError) as error:
            labels.problems.append(f"{labels.place(file)}: {error}")
    unsized = [path for *_, path, stated in found if not stated]
    measured = dict(zip(unsized, sizes(unsized, "reading the sizes of the images"), strict=True))
    for file, tree, path, stated in found:
        size = stated or measured[path]
        if isinstance(size, str):
            labels.problems.append(size)
            continue
        labels.add_image(path, size)
        for index, one in enumerate(tree.findall("object"), start=1):
            where = labels.place(file, f"object {index}")
            try:
                name = (one.findtext("name") or "").strip()
                if not name:
                    raise ValueError("has no name")
                corners, crowd = _corners(one), (one.findtext("difficult") or "").strip() == "1"
                labels.add(name, corners, where, list(map(_points, one.findall("polygon"))), crowd)
            except ValueError as error:
                labels.problems.append(f"{where}: {error}")
    labels.notes += _renamed(labels, [(file, path) for file, _, path, _ in found if file.stem != path.stem])
    return labels.collect()


def _renamed(labels: Labels, pairs: list[tuple[Path, Path]]) -> Iterator[str]:
    """A line on the XML files beside whose images there is one of the XML file's own name."""
    stems = {Path(one).with_suffix("") for folder in {path.parent for _, path in pairs} for one in image_files(folder)}
    if doubtful := [(file, path) for file, path in pairs if path.with_name(file.stem) in stems]:
        (file, path), files = doubtful[0], counted(len(doubtful), "XML file")
        example = f"{labels.place(file)} is taken as that of {labels.place(path)}"
        yield f"<filename> names another image than that of the file's own name in {files}, for example {example}"


def _parse(file: Path) -> Element:
    try:
        return parse(file, forbid_dtd=True).getroot()
    except DefusedXmlException:
        raise ValueError("has a document type or entities, which are not read; remove them") from None
    except (OSError, ParseError, ValueError) as error:
        raise ValueError(f"cannot be read as XML ({reason(error)})") from None


def _image(root: Path, file: Path, tree: Element) -> Path:
    """The image: its file name is relative to the XML file, to JPEGImages or to images."""
    name = (tree.findtext("filename") or "").strip()
    if not name:
        raise ValueError("has no filename")
    folders = [file.parent, root / "JPEGImages", root / "images", root]
    folders += [parent / file.parent.name for parent in folders[1:3]]
    path = find_moved(root, name, folders)
    if path is None:
        raise ValueError(f"its image {name!r:.200} is neither beside it nor in JPEGImages or images")
    return path


def _corners(one: Element) -> list[float]:
    """Left, top, right and bottom; if CVAT's attribute `rotation` turns the box, those of the box around it."""
    values = {edge: one.findtext(f"bndbox/{edge}") for edge in EDGES}
    for edge, value in values.items():
        if value is None:
            raise ValueError(f"its bndbox has no {edge}")
    corners = list(map(number, values.values()))
    attributes = {each.findtext("name"): each.findtext("value") for each in one.iterfind("attributes/attribute")}
    with suppress(ValueError):  # without a rotation
        corners = enclosing(corners, number(attributes.get("rotation")))
    return corners


def _points(polygon: Element) -> list[float]:
    """x1, y1, x2, y2, ... of an element."""
    values = {child.tag: child.text for child in polygon}
    keys = [f"{axis}{index}" for index in range(1, len(values) // 2 + 1) for axis in "xy"]
    if len(keys) < 6 or set(keys) != set(values):
        raise ValueError("its polygon must have x1, y1, x2, y2, ... of 3 or more points")
    return [number(values[key]) for key in keys]


def _write(splits: Mapping[str, AnnotatedImages], target: Path) -> list[str]:
    """TARGET/JPEGImages/NAME, TARGET/Annotations/NAME.xml and TARGET/ImageSets/Main/SPLIT.txt.

    Where two splits have an image of the same name, the images of each split are in a folder of its name.
    """
    stems = [Path(image["file_name"]).with_suffix("") for split in splits.values() for image in split.coco["images"]]
    apart = len(set(stems)) < len(stems)
    masks = 0
    (target / LISTS).mkdir(parents=True)
    for name, split in splits.items():
        written: list[str] = []
        for image, objects in labelled(split):
            relative = Path(name if apart else "", image["file_name"])
            path, file = target / "JPEGImages" / relative, target / "Annotations" / relative.with_suffix(".xml")
            for label in (image["file_name"], *(category for category, _ in objects)):
                if label != label.strip() or not label or NO_XML.search(label):  # another one when it is read again
                    fault = "XML cannot hold this name; rename it, or write another format"
                    raise InputError(f"{printable(label)!r:.200}: {fault}")
            copy_image(split.path(image), path, file)
            tree = Element("annotation")
            _fill(tree, {"folder": "JPEGImages", "filename": relative.as_posix()})
            _fill(SubElement(tree, "size"), {"width": image["width"], "height": image["height"], "depth": 3})
            _fill(tree, {"segmented": int(any(polygons_of(one) for _, one in objects))})
            for category, one in objects:
                masks += bool(one.get("segmentation")) and not polygons_of(one)
                _add_object(tree, category, one)
            indent(tree)
            ElementTree(tree).write(file, encoding="utf-8")
            written.append(relative.with_suffix("").as_posix())
        (target / LISTS / f"{name}.txt").write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    return [f"{masks} masks left out: VOC's XML files have polygons only"] if masks else []


def _add_object(tree: Element, category: str, annotation: dict) -> None:
    one, (left, top, width, height) = SubElement(tree, "object"), annotation["bbox"]
    difficult = int(annotation.get("iscrowd", 0))
    _fill(one, {"name": category, "pose": "Unspecified", "truncated": 0, "difficult": difficult})
    edges = (left, top, left + width, top + height)
    _fill(SubElement(one, "bndbox"), dict(zip(EDGES, map(text, edges), strict=True)))
    for polygon in polygons_of(annotation):
        points = {f"{'xy'[index % 2]}{index // 2 + 1}": text(value) for index, value in enumerate(polygon)}
        _fill(SubElement(one, "polygon"), points)


def _fill(parent: Element, values: Mapping[str, Any]) -> None:
    for tag, value in values.items():
        SubElement(parent, tag).text = str(value)


FORMAT = Format(_detect, _read, _write)
