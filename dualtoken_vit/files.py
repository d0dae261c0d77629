"""Writing files whole or not at all, and their names for people."""

import errno
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dualtoken_vit.errors import InputError, first_line


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind `error`: torch.save hides it behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write into, which takes the place of `path` only when it is whole and on the disk.

    Folders are created as needed. A process killed in between leaves `path` as it was, and a hidden temporary file
    that the next write replaces.

    Raises:
        InputError: where the system refuses (full disk, no permission); `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        reason = "the disk is full; free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else cause.strerror
        kept = "; the file that was there is kept" if path.is_file() else ""
        raise InputError(f"cannot write {path}: {reason}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `path` only when all of it is written; nothing is left otherwise.

    Raises:
        InputError: if `path` exists and is not an empty folder, or where the system refuses.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{printable(path)}: is not empty; name a new folder")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {printable(path)}: {error.strerror}; nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(value: Any, path: str | Path) -> None:
    """Write plain data as a JSON file; see `atomic_write`."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)


@contextmanager
def guard(path: Path) -> Iterator[None]:
    """A context to make and write a drawing or report in: an error becomes one line on stderr and never ends a run."""
    try:
        yield
    except InputError as error:  # names the file
        print(f"warning: {printable(str(error))}", file=sys.stderr)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {first_line(error)}")
        print(f"warning: cannot save {printable(path)}: {reason}", file=sys.stderr)


def printable(name: str | os.PathLike[str]) -> str:
    """The name of a file or class in one line: invalid UTF-8 is replaced, control characters are escaped."""

    def shown(char: str) -> str:
        category = unicodedata.category(char)
        if category == "Cs":  # an undecodable byte, or half of a surrogate pair
            return "\N{REPLACEMENT CHARACTER}"
        return char.encode("unicode_escape").decode() if category in ("Cc", "Zl", "Zp") else char

    return "".join(map(shown, str(name)))
