"""A drawing or report that fails is a warning."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import printable


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
