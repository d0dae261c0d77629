"""CSV and Parquet files with a row per label: where they are, their columns, and the labels of whole images in them."""

import csv
import importlib.util
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dualtoken_vit.data.contract import some
from dualtoken_vit.data.folders import read_lines
from dualtoken_vit.data.splits import ALL, SPLITS, find, split_folders, split_of
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import counted, printable

FILE = ("filename", "file_name", "file", "image", "image_path", "path", "image_name", "filepath")
CLASS = ("class", "class_name", "label", "name", "category", "labels", "tags", "classes")
SPLIT = ("split", "subset", "set")
NEEDED = f"a column of files ({', '.join(FILE)}) and one of classes ({', '.join(CLASS)}), or of 0 and 1 for each"
SEPARATORS = ("|", ";", ",", " ")  # that may stand between the labels in a cell
HEADER = 2**16  # characters of a first line that `_header` reads at most


class Part(NamedTuple):
    """A split: a table, or its rows with this split in the column `SPLIT`."""

    path: Path
    split: str | None = None
    notes: tuple[str, ...] = ()  # on rows that are in no split

    def has(self, cell: Any) -> bool:
        """Whether a row with this cell in the column `SPLIT` belongs to the split."""
        return self.split is None or split_of(str(cell).strip()) == self.split


def cells(path: Path) -> list[list[Any]]:
    """The rows of a table, the first one its header; an InputError for a file that cannot be read."""
    if path.suffix.lower() != ".parquet":
        try:
            return _numbered(csv.reader(f"{line}\n" for line in read_lines(path)))
        except csv.Error as error:  # for example an open quote, which makes one cell of the rest of the file
            raise InputError(f"{printable(path)}: cannot be read as CSV ({reason(error)})") from None
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{printable(path)}: Parquet files need the package pyarrow: pip install pyarrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except (ArrowException, OSError) as error:
        raise InputError(f"{printable(path)}: cannot be read as Parquet ({reason(error)})") from None
    columns = (["" if each is None else each for each in column.to_pylist()] for column in table.columns)  # as in CSV
    return [table.column_names, *map(list, zip(*columns, strict=True))]


def _numbered(reader: Any) -> list[list[Any]]:
    """The rows, with empty ones after those of several lines: the place of a row is then that of its first line."""
    rows: list[list[Any]] = []
    for row in reader:
        rows += [row, *([] for _ in range(reader.line_num - len(rows) - 1))]
    return rows


def column(header: Sequence[Any], names: Sequence[str]) -> int | None:
    """The place of the column with the first of these names that there is."""
    lower = [str(name).strip().lower() for name in header]
    return next((lower.index(name) for name in names if name in lower), None)


def split_tables(root: Path, fits: Callable[[Path], bool]) -> dict[str, Part]:
    """The splits of a folder whose tables are those that `fits` accepts; or those of one table, `root`.

    They are ROOT/SPLIT/*, ROOT/SPLIT[_labels].*, or the values of a column `SPLIT`; else all of the first table. Beside
    a split whose table fits, one whose tables do not is a split, too: it is damaged, and whoever reads it says so.
    """
    folders = split_folders(root) if root.is_dir() else {}
    found = _fitting({split: _tables(path) for split, path in folders.items()}, fits)
    tables = [] if found else list(filter(fits, _tables(root)))
    if tables and root.is_dir():
        named: dict[str, list[Path]] = {}
        for path in _tables(root):
            if split := split_of(path.stem.removesuffix("labels").removesuffix("annotations")):
                named.setdefault(split, []).insert(0, path)
        found = _fitting(named, fits)
        if found:
            first, *_ = found
            others = [path for path in tables if not any(path in paths for paths in named.values())]
            found[first] = found[first]._replace(notes=(*found[first].notes, *_unread(others, found[first].path)))
    if tables and not found:
        header, *rows = cells(tables[0])
        place = column(header, SPLIT)
        values = [str(row[place]).strip() if len(row) > place else "" for row in rows] if place is not None else []
        splits = list(dict.fromkeys(filter(None, map(split_of, values)))) or [ALL]
        notes = (*_outside(tables[0], values, whole=splits == [ALL]), *_unread(tables[1:], tables[0]))
        found = {split: Part(tables[0], None if splits == [ALL] else split) for split in splits}
        read = "train" if "train" in found else splits[0]
        found[read] = found[read]._replace(notes=notes)
    return found


def _outside(path: Path, values: Sequence[str], whole: bool) -> tuple[str, ...]:
    """A line on the rows whose split is unknown. They are left out, but used if there is no other split (`whole`)."""
    unknown = {line: value for line, value in enumerate(values, start=2) if value and not split_of(value)}
    if not unknown:
        return ()
    (line, value), rows = next(iter(unknown.items())), counted(len(unknown), "row")
    what = "its column of splits is not used" if whole else f"{rows} left out"
    return (f"{printable(path)}: {what}: {value!r:.50} in line {line} is none of train, val and test",)


def _tables(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    paths = [path for path in sorted(place.glob("*")) if path.name[0] != "."]
    return [path for kind in (".csv", ".parquet") for path in paths if path.suffix.lower() == kind]


def _fitting(tables: Mapping[str, list[Path]], fits: Callable[[Path], bool]) -> dict[str, Part]:
    """The first table of each split that fits, or the first; none where no table of any split fits."""
    fitting = {split: list(filter(fits, paths)) for split, paths in tables.items()}
    found = {}
    for split, paths in tables.items():
        if paths:
            read, *others = fitting[split] or paths[:1]
            found[split] = Part(read, notes=_unread(others, read))
    return found if any(fitting.values()) else {}


def _unread(tables: Sequence[Path], read: Path) -> tuple[str, ...]:
    """Lines on tables that could be read, but are not, because `read` is."""
    why = f"not read, because {printable(read)} is; put the rows into one table, or name one as --data.root"
    return tuple(f"{printable(path)}: {why}" for path in tables)


class Labelled(NamedTuple):
    """The images of a split with their classes."""

    table: Path
    files: list[str]
    labels: list[tuple[int, ...]]  # of each image: indices into class_names
    class_names: tuple[str, ...]  # in the order of their columns, or sorted
    splits: tuple[str, ...]  # those with labels
    notes: tuple[str, ...] = ()


def has_labels(path: Path) -> bool:
    """Whether a table has the columns of `read_labels`."""
    rows = cells(path)
    if not rows or column(rows[0], FILE) is None:
        return False
    return column(rows[0], CLASS) is not None or bool(_one_hot(rows))


def unread_note(root: Path, folder: Path) -> tuple[str, ...]:
    """A line on a table in `root` that could be meant instead of the class folders in `folder`.

    Its header names files and classes, or `folder` is `root`, where the folders may be no classes. Only headers are
    read, as the table may be large and have nothing to do with the images.
    """
    for path in _tables(root):
        header = _header(path)
        if column(header, FILE) is not None and column(header, CLASS) is not None:
            name = printable(path)
            return (f"{name}: not read, because {printable(folder)} has class folders; --data.root {name} reads it",)
    return tuple(filter(None, [unfit(root)])) if folder == root else ()


def unfit(root: Path) -> str:
    """What the first table in `root` lacks for `read_labels`; "" without a table."""
    there = unknown_columns(root)
    return there and f"{there}, but is read only with {NEEDED}"


def unknown_columns(root: Path) -> str:
    """The columns of a table in `root`, for messages where none fits; "" without a table.

    It is that of the train split, or the first.
    """
    headers = {path: header for path in _tables(root) if (header := _header(path))}
    path = min(headers, key=lambda path: split_of(path.stem) != "train", default=None)
    if path is None:
        return ""
    header = headers[path]
    commas = ", which are not separated by commas" if len(header) == 1 and ";" in header[0] else ""
    return f"{printable(path)} has the columns {some(header)}{commas}"


def _header(path: Path) -> list[str]:
    """The names of the columns of a table; none for a file that cannot be read."""
    with suppress(Exception):  # of a note only
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import read_schema

            return read_schema(path).names
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            return next(csv.reader([file.readline(HEADER)]))
    return []


def _one_hot(rows: list[list[Any]]) -> list[int]:
    """The columns of classes, of 0 and 1; none if any other column has other values."""
    header, *body = rows
    places = [place for place in range(len(header)) if place not in (column(header, FILE), column(header, SPLIT))]
    values = {str(row[place]).strip() for row in body for place in places if len(row) > place}
    return places if values and values <= {"0", "1", "0.0", "1.0", "True", "False"} else []


def read_labels(root: Path, split: str, separator: str | None) -> Labelled | None:
    """The images of a split and their classes, from a table in `root`; None if there is none.

    A table has a column of file names, and one of class names or one of 0 and 1 for each class. `separator` stands
    between the names in one cell; None: a cell has one name. Rows of the same file add up.

    Raises:
        InputError: for a split that is not there, a missing image, a file name that leads out of the folder, ...
    """
    parts = split_tables(root, has_labels) or ({ALL: Part(root)} if root.is_file() else {})
    if not parts:
        return None
    wanted = SPLITS.get(split.lower(), split)
    wanted = ALL if wanted == "train" and set(parts) == {ALL} else wanted
    if wanted not in parts:
        there = f"there is {', '.join(parts)}: give --data.holdout 0.1"
        raise InputError(f"{printable(root)}: no table for the split {split!r}; {there}")
    path = parts[wanted].path
    if not has_labels(path):
        what = "a column of files and one of classes, or columns of 0 and 1"
        raise InputError(f"{printable(path)}: its first line does not name {what}")
    rows = cells(path)
    header, *body = rows
    file, label, part = (column(header, names) for names in (FILE, CLASS, SPLIT))
    hot = [] if label is not None else _one_hot(rows)
    found: dict[str, list[str]] = {}
    texts = set[str]()  # cells that may hold several labels
    folders = [path.parent, path.parent / "images", path.parent / split, path.parent / "images" / split]
    for line, row in enumerate(body, start=2):
        if not any(str(cell).strip() for cell in row):
            continue
        where = f"{printable(path)}, line {line}"
        if len(row) != len(header):
            raise InputError(f"{where}: {len(row)} cells, but the header has {len(header)}")
        if not parts[wanted].has(row[part or 0]):
            continue
        file_name = row[file or 0]
        if isinstance(file_name, dict | bytes):  # as Hugging Face stores them
            place = f"give --data.dataset hfds/{printable(path.parent)} in place of --data.root"
            remedy = "write the names of their files" if separator is not None else place
            raise InputError(f"{printable(path)}: the column {header[file or 0]!r} has the images themselves; {remedy}")
        try:
            image = find(path.parent, str(file_name).strip(), folders)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if image is None:
            raise InputError(f"{where}: {printable(str(file_name)):.200}: no such image beside the table or in images")
        names = [str(header[place]).strip() for place in hot if str(row[place]).strip()[:1] in ("1", "T")]
        if label is not None:
            cell = row[label]
            if separator is not None and isinstance(cell, str):
                if _is_list(cell.strip()):
                    raise InputError(
                        f"{where}: {cell!r:.50} is a list; write only its labels, with {separator!r} between"
                    )
                texts.add(cell)
            several = cell if isinstance(cell, list) else [cell] if separator is None else str(cell).split(separator)
            names = [name for each in several if each is not None and (name := str(each).strip())]
        found.setdefault(str(image), []).extend(names)
    named = [str(header[place]).strip() for place in hot] or sorted(set[str]().union(*found.values()))
    numbers = {name: label for label, name in enumerate(named)}
    labels = [tuple(dict.fromkeys(numbers[name] for name in names)) for names in found.values()]
    splits = tuple(name for name, each in parts.items() if each.path == path or has_labels(each.path))
    notes = (*parts[wanted].notes, *_separated(path, texts, separator))
    return Labelled(path, list(found), labels, tuple(named), splits, notes)


def _is_list(cell: str) -> bool:
    """Whether a cell is a list as Python or JSON writes it."""
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # the latter two for very long ones
        return cell.startswith("[") and isinstance(literal_eval(cell), list)
    return False


def _separated(path: Path, texts: Collection[str], separator: str | None) -> tuple[str, ...]:
    """A line on a cell that seems to have another separator.

    Its parts are in other cells, too. Commas and spaces are also in names: there, all parts must be.
    """
    if separator is None or any(separator in text for text in texts):
        return ()
    for other in SEPARATORS:
        parts = {text: list(filter(None, map(str.strip, text.split(other)))) for text in sorted(texts)}
        counts = Counter(part for each in parts.values() for part in set(each))
        for text, each in parts.items():
            enough = all if other in (",", " ") else any
            if len(each) > 1 and enough(counts[part] > 1 for part in each):
                what = f"{printable(path)}: {text!r:.50} is taken as one label"
                return (f"{what}; if it is {counted(len(each), 'label')}, give --data.separator {other!r}",)
    return ()
