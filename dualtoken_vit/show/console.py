"""Tables for people: on the terminal, as Markdown, in a file."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def table_text(columns: Sequence[str], groups: Iterable[Iterable[Sequence[str]]], markdown: bool = False) -> str:
    """A table, a line between its groups of rows; `columns` that start with < are left-aligned.

    Args:
        columns: headings.
        groups: of rows of cells.
        markdown: as GitHub's Markdown, else drawn.
    """
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, pad_edge=markdown, collapse_padding=not markdown)
    for column in columns:
        table.add_column(column.removeprefix("<"), justify="left" if column.startswith("<") else "right", no_wrap=True)
    for group in groups:
        for cells in group:
            table.add_row(*map(Text, cells))  # [x] in a name is no markup
        if not markdown:
            table.add_section()
    # As wide as it is: rather a long line than a cell that is cut.
    console = Console(file=StringIO(), width=10_000, highlight=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")
