"""Tables as text, for the terminal and for Markdown files, and warnings."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import printable


def table_text(columns: Sequence[str], groups: Iterable[Iterable[Sequence[str]]], markdown: bool = False) -> str:
    """Format a table, with a line between groups of rows, or as GitHub Markdown.

    Columns whose heading starts with < are left-aligned, without that sign.
    """
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, pad_edge=markdown, collapse_padding=not markdown)
    for column in columns:
        table.add_column(column.removeprefix("<"), justify="left" if column.startswith("<") else "right", no_wrap=True)
    for group in groups:
        for cells in group:
            table.add_row(*(Text(printable(cell)) for cell in cells))  # Text: [x] in a name is not markup
        if not markdown:
            table.add_section()
    # A long line is better than a cell that is cut.
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(map(str.rstrip, captured.get().splitlines())).strip("\n")


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
