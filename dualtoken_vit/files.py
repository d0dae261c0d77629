"""Writing files whole or not at all, and their names for people."""

import errno
import json
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from time import sleep
from typing import IO, Any

from dualtoken_vit.errors import InputError, first_line

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind `error`: torch.save hides it behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _reason(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full; free some space" if full else error.strerror or first_line(error)  # the latter: Pillow's


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write into, which takes the place of `path` only when it is whole and on the disk.

    Folders are created as needed. A process killed in between leaves `path` as it was, and a hidden temporary file
    that the next write replaces.

    Raises:
        InputError: where the system refuses (full disk, no permission), or another process is writing this file; `path`
            is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    own = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, opener=_open_locked, **text) as file:
            own = True
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                _replace(temporary, path)  # as long as it is locked
                own = False  # its name is free for the next writer
        if fcntl is None:
            _replace(temporary, path)
            own = False
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None or cause.errno == errno.EPIPE:  # no file's: stdout, which the block prints on, is not read on
            raise
        kept = "; the file that was there is kept" if path.is_file() else ""
        raise InputError(f"cannot write {path}: {_reason(cause)}{kept}") from error
    finally:
        if own:
            with suppress(OSError):
                temporary.unlink()


def _replace(temporary: Path, path: Path) -> None:
    """As `os.replace`; on Windows it waits a second for a virus scanner or viewer to close the file."""
    for _ in range(10 if fcntl is None else 0):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            sleep(0.1)
    os.replace(temporary, path)


def _open_locked(path: str, flags: int) -> int:
    """As `os.open`, an empty file that this process alone uses; see `_lock`."""
    if fcntl is None:
        return os.open(path, flags, 0o666)
    descriptor = _lock(path, flags & ~os.O_TRUNC)
    if os.fstat(descriptor).st_size:  # of a process that was killed
        os.ftruncate(descriptor, 0)
    return descriptor


def _lock(path: str | Path, flags: int) -> int:
    """Open a temporary file or folder that this process alone uses, if it can be locked, until it closes it or ends.

    Raises:
        InputError: where another process uses it.
    """
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            name = os.path.join(os.path.dirname(path), os.path.basename(path)[1:].removesuffix(".tmp"))
            raise InputError(f"{printable(name)} is being written by another process; name another one") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
                return descriptor  # a file system without locks, such as some of networks
            os.close(descriptor)
            raise
        os.close(descriptor)  # the other process has just put it into its place: once more, with a new one


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `path` only when all of it is written; nothing is left otherwise.

    Raises:
        InputError: if `path` exists and is not an empty folder, or is the current one, another process is writing it,
            or the system refuses.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{printable(path)}: is not empty; name a new folder")
    if path.exists() and path.samefile(os.curdir):  # the shell would stay in the folder that is replaced
        raise InputError(f"{printable(path)}: is the current folder; name a new folder in it, or call from another one")
    temporary = path.with_name(f".{path.name}.tmp")
    own, placed = None, False
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        own = _lock(temporary, os.O_RDONLY) if fcntl is not None else os.open(os.devnull, os.O_RDONLY)
        for left in temporary.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield temporary
        if fcntl is None and path.is_dir():
            path.rmdir()  # Windows replaces no folder, not even an empty one
        _replace(temporary, path)
        placed = True  # its name is free for the next writer
    except OSError as error:
        raise InputError(f"cannot write {printable(path)}: {_reason(error)}; nothing was written") from error
    finally:
        if own is not None:
            if not placed:
                shutil.rmtree(temporary, ignore_errors=True)
            os.close(own)


class Spool(list[Any]):
    """A list of plain data that only grows; beyond 64 kB it is in a temporary file, which ends with it.

    It can be appended to, iterated over, measured by `len` and written by `json.dump`. `json.dumps` takes the list for
    empty, because it does not iterate.
    """

    def __init__(self) -> None:
        self.length = 0
        self.file = tempfile.SpooledTemporaryFile(2**16)  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()

    def append(self, item: Any) -> None:
        """Add an item; an InputError where the system refuses."""
        try:
            self.file.seek(0, os.SEEK_END)
            self.file.write(json.dumps(item).encode() + b"\n")
        except OSError as error:
            raise InputError(f"cannot write a temporary file: {_reason(error)}") from error
        self.length += 1

    def __iter__(self) -> Iterator[Any]:
        self.file.seek(0)
        return map(json.loads, self.file)

    def __len__(self) -> int:
        return self.length


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


@contextmanager
def kept(finish: Callable[[], object], results: Sized) -> Iterator[None]:
    """Inside, an error or Ctrl-C leaves the results so far as `finish` prints and writes them.

    Progress bars inside must have ended: they redirect stdout.
    """
    try:
        yield
    except BaseException:
        if len(results):
            with suppress(InputError, OSError):  # the first error is the one to be reported
                finish()
        raise


def relative(path: str | os.PathLike[str], start: str | os.PathLike[str]) -> str:
    """The path of a file from a folder, with slashes, so that it is the same on every system.

    Raises:
        InputError: if they are on two drives (Windows).
    """
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError as error:
        raise InputError(f"{printable(path)} is on another drive than {printable(start)}; move one of them") from error


def check_folder(path: str | os.PathLike[str], contents: str) -> None:
    """Raise an InputError for a folder that is missing, empty or a file; `contents` is what it should contain."""
    if os.path.isdir(path):
        problem = ""
        with suppress(PermissionError), os.scandir(path) as entries:  # files in it may be readable nevertheless
            problem = "" if any(True for _ in entries) else "an empty folder"
    else:
        problem = "a file, not a folder" if os.path.exists(path) else "no such folder"
    if problem:
        raise InputError(f"{printable(path)}: {problem}; give the one that contains {contents}")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images, 2 classes."""
    plural = "es" if noun[-1] in "sx" else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"  # the number may be NumPy's


def printable(name: str | os.PathLike[str]) -> str:
    """The name of a file or class in one line: invalid UTF-8 is replaced, control characters are escaped."""

    def shown(char: str) -> str:
        category = unicodedata.category(char)
        if category == "Cs":  # an undecodable byte, or half of a surrogate pair
            return "\N{REPLACEMENT CHARACTER}"
        return char.encode("unicode_escape").decode() if category in ("Cc", "Zl", "Zp") else char

    return "".join(map(shown, str(name)))


def similar(name: str, names: Iterable[str], quote: str = "") -> str:
    """The question whether an unknown name is meant to be one of those that resemble it; "" if none does."""
    near = [f"{quote}{printable(each)}{quote}" for each in get_close_matches(name, list(names))]
    return f"did you mean {' or '.join(near)}?" if near else ""
