"""LabelMe: a JSON file per image, with its shapes as points in pixels."""

import base64
import io
import json
import math
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_vit.data.coco import AnnotatedImages, size_fault
from dualtoken_vit.data.folders import label_files
from dualtoken_vit.data.formats.base import Format, Labels, number, stated_size
from dualtoken_vit.data.images import image_size, open_image
from dualtoken_vit.data.rle import encode_mask
from dualtoken_vit.data.splits import ALL, find, split_folders
from dualtoken_vit.errors import InputError, reason

CIRCLE = 64  # corners of the polygon for a circle


def _detect(root: Path) -> dict[str, list[Path]]:
    """The JSON files in ROOT/SPLIT if LabelMe wrote the first of a split, or all of them."""
    found = {split: files for split, path in split_folders(root).items() if (files := label_files(path, ".json"))}
    if any(map(_is_labelme, found.values())):
        return found
    files = label_files(root, ".json")
    return {ALL: files} if _is_labelme(files) else {}


def _is_labelme(paths: list[Path]) -> bool:
    first = next((path for path in paths if path.is_file()), None)
    if first is None:
        return False
    with first.open("rb") as file:  # its beginning: another tool's file may be huge
        return b'"shapes"' in file.read(4096)


def _read(root: Path, files: list[Path]) -> AnnotatedImages:
    labels = Labels(root)
    for file in files:
        try:
            content = _load(file)
            path = _image(root, file, content)
            size = _size(path, content, file.name)
        except (ValueError, InputError) as error:
            labels.problems.append(f"{labels.place(file)}: {error}")
            continue
        labels.add_image(path, size)
        for first, shapes in _objects(content["shapes"]):
            where = labels.place(file, f"shape {first}")
            try:
                parts: list[Any] = [_part(shape, *size) for shape in shapes]
                name = shapes[0].get("label")
                if not isinstance(name, str) or not name.strip():
                    raise ValueError("has no label")
                if any(isinstance(part, dict) for part in parts) and len(parts) > 1:
                    raise ValueError("a group of masks is not supported; remove the group_id")
                xs, ys = zip(*(each for shape in shapes for each in _outline(shape)), strict=True)
                corners = [min(xs), min(ys), max(xs), max(ys)]
                labels.add(name.strip(), corners, where, parts[0] if isinstance(parts[0], dict) else parts)
            except (ValueError, InputError) as error:
                labels.problems.append(f"{where}: {error}")
    return labels.collect()


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON ({reason(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError("is not a file of LabelMe: no list 'shapes'")
    if not all(isinstance(shape, dict) for shape in content["shapes"]):
        raise ValueError("has a shape that is not an object with fields")
    return content


def _image(root: Path, file: Path, content: dict[str, Any]) -> Path:
    name = content.get("imagePath")
    if not isinstance(name, str) or not name:
        raise ValueError("has no imagePath")
    path = None
    with suppress(InputError):  # files that were moved name the image's folder on another machine
        path = find(root, name, [file.parent])
    path = path or find(root, Path(name.replace("\\", "/")).name, [file.parent])
    if path is None:
        raise ValueError(f"its image {name!r:.200} is not there")
    return path


def _size(path: Path, content: dict[str, Any], name: str) -> tuple[int, int]:
    """As the file states it, where only drawn shapes are; masks are made of this size: the image must have it."""
    stated = stated_size(map(content.get, ("imageWidth", "imageHeight")))
    if stated and not any(shape.get("shape_type") == "mask" for shape in content["shapes"]):
        return stated
    size = image_size(path)
    if stated and (fault := size_fault(str(path), size, dict(zip(("width", "height"), stated, strict=True)), name)):
        raise ValueError(fault)
    return size


def _objects(shapes: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """The shapes of each object, with the number of the first: those of one label and group_id are parts of one."""
    groups: dict[Any, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for index, shape in enumerate(shapes, start=1):
        group = shape.get("group_id")
        groups[index if group is None else repr((shape.get("label"), group))].append((index, shape))
    return [(members[0][0], [shape for _, shape in members]) for members in groups.values()]


def _points(shape: dict[str, Any]) -> list[tuple[float, float]]:
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError("points must be a list of pairs of numbers")
    return [(number(x), number(y)) for x, y in points]


def _outline(shape: dict[str, Any]) -> list[tuple[float, float]]:
    """The corners of a shape's area."""
    kind, points = shape.get("shape_type", "polygon"), _points(shape)
    if kind in ("rectangle", "mask") and len(points) == 2:
        (left, top), (right, bottom) = points
        beyond = int(kind == "mask")  # whose second point is the last pixel
        right, bottom = right + beyond, bottom + beyond
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        angles = [2 * math.pi * step / CIRCLE for step in range(CIRCLE)]
        radius = math.dist((x, y), edge)
        return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    if kind not in ("polygon", "rectangle") or len(points) < 3:
        raise ValueError(f"{kind} of {len(points)} points has no area; draw a polygon, rectangle, circle or mask")
    return points


def _part(shape: dict[str, Any], width: int, height: int) -> list[float] | dict[str, Any]:
    """A shape as a polygon (x, y, x, y, ...), or its mask as an RLE of the image."""
    outline = _outline(shape)
    if shape.get("shape_type") != "mask":
        return [value for point in outline for value in point]
    try:
        mask = np.asarray(open_image(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
    except Exception as error:  # of base64 and of Pillow
        raise ValueError(f"its mask cannot be read ({reason(error)})") from None
    left, top = (round(value) for value in outline[0])
    if mask.ndim != 2 or min(left, top) < 0 or top + mask.shape[0] > height or left + mask.shape[1] > width:
        raise ValueError("its mask is not within the image")
    whole = np.zeros((height, width), dtype=bool)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return encode_mask(whole)


FORMAT = Format(_detect, _read)
