"""The paper's sizes beside ours: parameters and FLOPs of every row of Tables 2 and 6 to 9, counted as you look."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from json import dumps

import timm
from rich import box
from rich.console import Console
from rich.table import Table

from dualtoken_vit.counting import Counts, count
from dualtoken_vit.recipes import ABOUT, RECIPES, Model, model_kwargs

__all__ = ["Row", "compare", "print_table", "tables"]

# recipe: (parameters in M, FLOPs in G, top-1 in %) as printed
PAPER = {
    "in1k-tiny-mix": ("5.8", "0.5", "75.4"),
    "in1k-small-mix": ("11.4", "1.0", "79.4"),
    "in1k-small": ("11.9", "1.1", "79.5"),
    "table6-normal": ("13.0", "0.99", "79.2"),
    "table6-normal-star": ("13.4", "0.98", "79.0"),
    "table6-position": ("11.9", "1.05", "79.5"),
    "table7-grid-0": ("10.8", "0.99", "79.2"),
    "table7-grid-3": ("11.9", "0.93", "79.1"),
    "table7-grid-4": ("11.9", "0.95", "79.2"),
    "table7-grid-5": ("11.9", "0.98", "79.4"),
    "table7-grid-6": ("11.9", "1.01", "79.3"),
    "table7-grid-7": ("11.9", "1.05", "79.5"),
    "table7-grid-8": ("11.9", "1.10", "79.3"),
    "table8-window": ("10.8", "0.92", "78.6"),
    "table8-conv": ("11.4", "1.04", "79.4"),
    "table9-onestep": ("11.3", "1.01", "79.2"),
    "table9-stepwise": ("11.4", "1.04", "79.4"),
}

WHAT_IS_COUNTED = """\
One image of 224x224 pixels, 1000 classes. All is counted now but what the paper prints (in1k-*: its Table 2).
MACs   multiply-accumulates of convolutions, linear layers and attention products (Q K^T, and its product with V).
FLOPs  as the paper counts them: one MAC is one FLOP, plus, by fvcore's rules, 5 an element of a LayerNorm,
       2 of a BatchNorm and 4 of a bilinear resize. Activations, softmax, pooling, additions: none.
=      rounds to what the paper prints (in Table 2 FLOPs have one decimal only).
"""


@dataclass(frozen=True)
class Row:
    """One network of the paper: counted, and as printed there."""

    recipe: str
    about: str
    params: int
    params_paper: str
    """In millions."""
    macs: int
    flops: int
    flops_paper: str
    """In billions."""
    top1_paper: str
    """In percent, on ImageNet-1k."""


def compare() -> list[Row]:
    """Count every network of the paper's Tables 2 and 6 to 9."""
    counted: dict[Model, Counts] = {}  # some networks stand in several tables
    rows = []
    for name, (params, flops, top1) in PAPER.items():
        model = RECIPES[name].model
        if model not in counted:
            counted[model] = count(timm.create_model(model.name, **model_kwargs(model)))
        found = counted[model]
        about = ABOUT[name].partition(":")[0]
        rows.append(Row(name, about, found.params, params, found.macs, found.flops, flops, top1))
    return rows


def difference(found: float, printed: str) -> str:
    """How far `found` is from the paper's print, in percent; marked = if it rounds to the print."""
    digits = len(printed.partition(".")[2])
    same = f"{found:.{digits}f}" == printed
    percent = round(100 * (found / float(printed) - 1), 1) + 0.0  # adding 0 turns -0.0 into 0.0
    return f"{percent:+.1f} {'=' if same else ' '}"


def print_table(columns: Sequence[str], groups: Iterable[Iterable[Sequence[str]]], markdown: bool = False) -> None:
    """Print a table, a line between its groups of rows; `columns` that start with < are left-aligned.

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
            table.add_row(*cells)
        if not markdown:
            table.add_section()
    console = Console(highlight=False)
    wide = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.width = max(wide, console.width)  # rather a long line than a cell that is cut
    console.print(table)


def tables(*, json: bool = False, markdown: bool = False) -> None:
    """Print the paper's parameters and FLOPs beside those of this implementation, counted now.

    Args:
        json: print one JSON object.
        markdown: print the table as Markdown.
    """
    rows = compare()
    if json:
        print(dumps({"what_is_counted": WHAT_IS_COUNTED, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    print(f"```\n{WHAT_IS_COUNTED}```\n" if markdown else WHAT_IS_COUNTED)
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        params, macs, flops = row.params / 1e6, row.macs / 1e9, row.flops / 1e9
        table, _, network = row.about.partition(", ")
        cells = (row.recipe, network, f"{params:.3f}", row.params_paper, difference(params, row.params_paper))
        cells += (f"{flops:.3f}", row.flops_paper, difference(flops, row.flops_paper), f"{macs:.3f}", row.top1_paper)
        groups.setdefault(table, []).append(cells)
    columns = ("<recipe", "<network", "params M", "paper", "diff %", "FLOPs G", "paper", "diff %", "MACs G")
    print_table((*columns, "top-1 published"), groups.values(), markdown)
