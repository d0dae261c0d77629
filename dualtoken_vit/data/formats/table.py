"""CSV or Parquet files with a row for each object, as Roboflow exports them for TensorFlow and RetinaNet."""

from collections.abc import Iterator
from pathlib import Path

from dualtoken_vit.data.coco import AnnotatedImages
from dualtoken_vit.data.formats.base import Format, Labels, number, stated_size
from dualtoken_vit.data.images import image_size
from dualtoken_vit.data.splits import find
from dualtoken_vit.data.tables import CLASS, FILE, SPLIT, Part, cells, column, split_tables
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable

COLUMNS = {  # what a column may be called, in lower case
    "file": FILE,
    "class": CLASS,
    "left": ("xmin", "x_min", "x1", "left"),
    "top": ("ymin", "y_min", "y1", "top"),
    "right": ("xmax", "x_max", "x2", "right"),
    "bottom": ("ymax", "y_max", "y2", "bottom"),
}
OPTIONAL = {"width": ("width", "image_width"), "height": ("height", "image_height"), "split": SPLIT}
KERAS = ("file", "left", "top", "right", "bottom", "class")  # keras-retinanet's columns, without a header
BOX = ("left", "top", "right", "bottom")


def _detect(root: Path) -> dict[str, Part]:
    return split_tables(root, lambda path: bool(_columns(path)))


def _columns(path: Path) -> list[str] | None:
    """What each column is ("" for others), with "+" in front if the first line is no header; None for other files."""
    header = next(iter(cells(path)), [])
    known = {column(header, synonyms): key for key, synonyms in (COLUMNS | OPTIONAL).items()}
    found = [known.get(place, "") for place in range(len(header))]
    if set(COLUMNS) <= set(found):
        return found
    names = [str(name).strip() for name in header]
    bare = len(names) == len(KERAS) and (all(map(_is_number, names[1:5])) or not any(names[1:]))
    return ["+", *KERAS] if bare else None


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row with its number in the file, by what its columns are."""
    columns = _columns(path) or []
    bare = columns[:1] == ["+"]
    for line, row in enumerate(cells(path), start=1):
        if any(row) and (bare or line > 1):
            pairs = zip(columns[bare:], row, strict=False)
            yield line, {column: "" if value is None else str(value).strip() for column, value in pairs if column}


def _read(root: Path, part: Part) -> AnnotatedImages:
    if not _columns(part.path):
        names = ", ".join(synonyms[0] for synonyms in COLUMNS.values())
        raise InputError(f"{printable(part.path)}: its first line does not name the columns {names}, as others here do")
    labels = Labels(root)
    labels.notes += part.notes
    of_image: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in _rows(part.path):
        if part.has(row.get("split", "")):
            of_image.setdefault(row.get("file", ""), []).append((line, row))
    folders = [part.path.parent, root, part.path.parent / "images", root / "images"]
    for name, rows in of_image.items():
        line, row = rows[0]
        try:
            path = find(root, name, folders) if name else None
            if path is None:
                raise InputError(f"image {name!r:.200} is not in {folders[0].name} or images")
            size = stated_size(row.get(key, "") for key in ("width", "height"))
            labels.add_image(path, size or image_size(path))
        except (ValueError, InputError) as error:
            labels.problems.append(f"{labels.place(part.path, f'line {line}')}: {error}")
            continue
        for line, row in rows:
            box = [row.get(key, "") for key in BOX]
            if not any(box) and not row.get("class"):  # an image without objects
                continue
            where = labels.place(part.path, f"line {line}")
            try:
                if not row.get("class"):
                    raise ValueError("has no class")
                labels.add(row["class"], list(map(number, box)), where)
            except ValueError as error:
                labels.problems.append(f"{where}: {error}")
    return labels.collect()


FORMAT = Format(_detect, _read, usable=lambda root, part: bool(_columns(part.path)))
