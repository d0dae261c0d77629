"""The one error for bad input, and what is read in the errors of others."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

MEMORY = re.compile(  # of PyTorch, C++, Python, oneDNN, the dynamic linker, C++'s threads, cuBLAS and cuDNN, MPS
    r"out of memory|allocate memory(?! in static TLS)|bad_alloc|start new thread|create a primitive(?! desc)"
    r"|failed to map segment|Resource temporarily unavailable|STATUS_ALLOC_FAILED|Invalid buffer size"
)


class InputError(Exception):
    """Bad input: the message names the file, key or argument and what to do.

    The command line prints it as one line and exits with status 2.
    """


def pip_install(extra: str) -> str:
    """How to install one of the package's extras."""
    return f'pip install -e ".[{extra}]" in a clone, else pip install "dualtoken-vit[{extra}]"'


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or its type."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def reason(error: BaseException) -> str:
    """An error's message on one line of at most 300 characters, or its type."""
    return shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is for lack of memory, or of threads, which need some: each library has its own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        not isinstance(error, InputError) and MEMORY.search(str(error)) is not None
    )


class OutOfMemory(InputError):
    """A computation did not fit into memory."""


@contextmanager
def naming_memory(hint: str) -> Iterator[None]:
    """A failed allocation inside becomes an `OutOfMemory` with a hint what to do."""
    try:
        yield
    except Exception as error:
        if lacks_memory(error):
            raise OutOfMemory(f"out of memory ({first_line(error)[:80]}): {hint}") from error
        raise
