"""Which files are images, and the images in and below a folder: the same rules for every task."""

import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable

Image.init()  # registers all of Pillow's formats
# Pillow identifies these formats but cannot decode them; EPS needs Ghostscript, which runs programs in the file.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
DECODED = tuple(sorted(Image.OPEN.keys() - _NOT_DECODED))
"""Pillow's names of the formats that are read."""
EXTENSIONS = tuple(
    sorted(ext for ext, kind in Image.registered_extensions().items() if kind in (*DECODED, "MPO"))  # opened as JPEG
)


def is_image(path: str | Path) -> bool:
    """Whether Pillow can read files with this extension."""
    return os.fspath(path).lower().endswith(EXTENSIONS)


def scan(folder: str | Path, repeated: bool = False) -> tuple[dict[str, str], list[str]]:
    """The files in and below a folder: (images with their real paths, other files), each in natural order.

    Hidden files and folders are left out. Symbolic links are followed, but each real file and folder is listed once, by
    a name without links if it has one, and links to a folder that contains `folder` are not followed. With `repeated`,
    each link to a file is listed, too.

    Raises:
        InputError: for a folder that cannot be read.
    """
    root = os.path.realpath(folder)
    images: dict[str, str] = {}
    others: list[str] = []
    seen: set[str] = set()
    files: deque[tuple[str, str]] = deque()  # as named, real path; links are last in both queues
    folders = deque([(os.fspath(folder), root)])
    while folders:
        path, real = folders.popleft()
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{printable(path)}: cannot be read ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            queue = folders if is_folder(entry) else files
            if queue is files or not Path(root).is_relative_to(target):
                (queue.append if entry.is_symlink() else queue.appendleft)((entry.path, target))
    for path, target in files:
        if target in seen and not repeated:
            continue
        seen.add(target)
        if is_image(path):
            images[path] = target
        else:
            others.append(path)
    return {path: images[path] for path in sorted(images, key=natural)}, sorted(others, key=natural)


def natural(path: str) -> tuple[list[str | int], str]:
    """The key of natural order: 2 before 10."""
    path = path.replace(os.sep, "/")  # the order is the same on every system
    parts = re.split(r"(\d+)", path.lower())
    return [int(part) if part.isdecimal() else part for part in parts], path


def image_files(folder: str | Path) -> list[str]:
    """The images in and below a folder; see `scan`."""
    return list(scan(folder)[0])


def label_files(folder: str | Path, ending: str) -> list[Path]:
    """The other files in and below a folder whose names end so; see `scan`."""
    return [Path(path) for path in scan(folder)[1] if path.lower().endswith(ending)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. For a link to itself, `entry.is_dir` raises OSError."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def skipped_note(paths: Sequence[str], wanted: str = "images") -> str:
    """One line about files that are not `wanted`."""
    return f"skipped files that are not {wanted}: {len(paths)}, for example {printable(paths[0])}"


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8, or an InputError. A byte order mark is dropped, invalid bytes are kept."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise InputError(f"{printable(path)}: not text in UTF-8; save it with this encoding")
    return text.removesuffix("\n").split("\n")


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """The lines of a file of class names, in the order of their numbers; empty ones at its end do not count.

    Raises:
        InputError: for a name that is empty or listed twice.
    """
    names = "\n".join(read_lines(path)).rstrip().split("\n")
    seen = set[str]()
    for line, name in enumerate(names, start=1):
        if not name.strip() or name.strip() in seen:
            fault = f"the class {name!r} is listed twice" if name.strip() else "a class without a name"
            raise InputError(f"{printable(path)}, line {line}: {fault}; give each class a name of its own")
        seen.add(name.strip())
    return tuple(names)
