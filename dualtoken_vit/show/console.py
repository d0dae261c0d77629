"""Tables as text, for the terminal and for Markdown files."""

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualtoken_vit.files import printable

WIDTH = 10_000  # columns, more than any table has


def wide_console() -> Console:
    """On stdout; in a file or a pipe without a limit: a long line is better than a cell that is cut."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


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
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(map(str.rstrip, captured.get().splitlines())).strip("\n")
