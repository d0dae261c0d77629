"""The splits of a dataset by the names of files and folders, and the files in it that labels name."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable, relative

ALL = "all"  # name of the only split of a dataset without splits
SPLITS = {name: name for name in ("train", "val", "test", "trainval")} | {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
    "default": ALL,  # CVAT's name
    ALL: ALL,
}


def split_of(name: str) -> str | None:
    """The split that a file or folder name stands for: "valid" and "val2017" are "val"; None for other names."""
    return SPLITS.get(re.sub(r"(19|20)\d\d$", "", name.lower()).rstrip("_-"))


def split_folders(root: Path) -> dict[str, Path]:
    """The folders in `root` that are named after a split; an InputError if two of them stand for the same."""
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() and (split := split_of(path.name)):
            if split in found:
                raise InputError(f"{printable(found[split])} and {path.name} are both the {split} split: rename one")
            found[split] = path
    return found


def inside(root: str | Path, path: str | Path) -> bool:
    """Whether a path is `root` or below it, by its name: symbolic links may lead elsewhere."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def as_root(root: Path, path: Path) -> Path:
    """The path, absolute if `root` is and else relative: only names of one kind have a common folder."""
    return path if path.is_absolute() == root.is_absolute() else root / relative(path, root)


def find(root: Path, name: str, folders: Iterable[Path]) -> Path | None:
    """The file of that relative name in the first of the folders that has it, in `root`; None if there is none.

    Raises:
        InputError: for a name that leads out of `root`.
    """
    paths = [Path(os.path.normpath(folder / name.replace("\\", "/"))) for folder in folders]
    paths = [path for path in paths if inside(root, path)]
    if not paths:
        raise InputError(f"the file name {name!r:.200} leads out of {printable(root)}")
    path = next((path for path in paths if os.path.isfile(path)), None)  # Path.is_file fails on a name that is too long
    return None if path is None else as_root(root, path)


def find_moved(root: Path, name: str, folders: Sequence[Path]) -> Path | None:
    """As `find`; where no folder has a file of that name, its last part counts: the rest is of another machine."""
    last = name.replace("\\", "/").rpartition("/")[2]
    try:
        return find(root, name, folders) or find(root, last, folders)
    except InputError:
        if os.path.isabs(name) and (found := find(root, last, folders)):
            return found
        raise
