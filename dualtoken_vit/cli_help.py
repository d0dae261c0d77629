"""Help pages of the command line, each within about one screen, with examples first."""

import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import RECIPES, Recipe

EXAMPLES = {
    "": (
        "train folder --data.root photos --out runs/photos",
        "predict runs/photos/best.safetensors new-photos --out drawings",
        "export runs/photos/best.safetensors --images photos/val",
    ),
    "train": (
        "train folder --data.root photos --data.image-size 112 --out runs/photos",
        "train coco-lite --data.root cells --run.max-minutes 15 --out runs/objects",
        "train folder --data.root photos --out runs/photos --resume",
    ),
    "train classification": (
        "train folder --data.root photos --data.image-size 112 --out runs/photos",
        "train folder --data.root photos --data.holdout 0.1 --model.pretrained false",
        "train folder --data.root photos --model.checkpoint runs/photos/best.safetensors --optim.lr 3e-4",
    ),
    "train multilabel": ("train multilabel --data.root labelled --loss asymmetric --out runs/labels",),
    "train detection": (
        "train coco-lite --data.root cells --run.max-minutes 15 --out runs/objects",
        "train coco --data.root cells --detector mask-rcnn --model.checkpoint runs/photos/best.safetensors",
    ),
    "train segmentation": (
        "train masks-lite --data.root scenes --run.max-minutes 15 --out runs/masks",
        "train masks --data.root scenes --segmenter pspnet --model.checkpoint runs/photos/best.safetensors",
    ),
    "check-data": (
        "check-data folder --data.root photos",
        "check-data folder --data.root photos --suspects runs/photos",
        "check-data coco-lite --data.root cells --augmented",
    ),
    "evaluate": (
        "evaluate runs/photos/best.safetensors",
        "evaluate runs/photos/best.safetensors --data.root photos --calibrate",
        "evaluate runs/photos/best.safetensors --json",
    ),
    "predict": (
        "predict runs/photos/best.safetensors new-photos --out drawings",
        "predict runs/photos/best.safetensors new-photos --top-k 1 --json",
    ),
    "export": (
        "export runs/photos/best.safetensors --images photos/val",
        "export runs/photos/best.safetensors --int8 --evaluate --out int8.onnx",
    ),
    "convert": ("convert cells cells-yolo --to yolo",),
    "attention": (
        "attention runs/photos/best.safetensors new-photos --out runs/photos/attention",
        "attention runs/photos/best.safetensors new-photos --block 0 --token 0,0",
    ),
    "localise": ("localise runs/position/best.safetensors runs/normal/best.safetensors --plot localisation.png",),
    "benchmark": (
        "benchmark dualtoken_vit_tiny_mix mobilevit_xs --modes eager",
        "benchmark dualtoken_vit_small --train --precision float32 bfloat16",
    ),
    "study": ("study mlp --data.root photos --seeds 2 --out runs/study",),
    "tables": ("tables", "tables --modern --markdown"),
    "completion": ("completion bash > ~/.local/share/bash-completion/completions/dualtoken-vit",),
}
"""Arguments that each help page begins with; a task's recipes have their own, and so have the paper's on ImageNet."""


SERIES = {
    "table6-": "Table 6, global tokens",
    "table7-grid-": "Table 7, side of their grid",
    "table8-": "Table 8, local attention",
    "table9-": "Table 9, downsampling",
}
"""The paper's comparisons by the beginning of their recipes' names."""

EXAMPLES |= {
    f"train {name}": (f"train {name} --data.root imagenet", f"train {name} --data.root imagenet --run.devices 8")
    for name in RECIPES
    if name.startswith(("in1k-", *SERIES))
}


def recipe_rows(about: Mapping[str, str]) -> dict[str, str]:
    """The recipes and one line about each; those of a comparison in one line."""
    rows: dict[str, str] = {}
    for name, text in about.items():
        start = next(filter(name.startswith, SERIES), None)
        if start is None:
            rows[name] = text
        else:
            before = rows.get(f"{start}*", f"{SERIES[start]}:").replace(".", ",")
            rows[f"{start}*"] = f"{before} {name.removeprefix(start)}."
    return rows


def width() -> int:
    """Columns of text that fit into the terminal and are easy to read."""
    return min(shutil.get_terminal_size().columns, 120) - 1


def fill(text: str) -> str:
    """The text in lines that fit into the terminal."""
    return textwrap.fill(" ".join(text.split()), width(), break_on_hyphens=False)


def describe(about: str | None, command: str, *more: str) -> str:
    """What a command does, its examples, and more paragraphs."""
    lines = [f"  dualtoken-vit {example}" for example in EXAMPLES.get(command, ())]
    return "\n\n".join([fill(about or ""), *(["\n".join(["Examples:", *lines])] if lines else []), *more])


def help_page(args: Sequence[str], usage: str, *parts: str | Mapping[str, str | None]) -> bool:
    """Print a help page, of paragraphs and tables of names with their descriptions, if the arguments ask for it."""
    if not args or args[0] not in ("-h", "--help"):
        return False
    console = Console(highlight=False)
    console.print(f"usage: dualtoken-vit {usage}\n", markup=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)  # commands in it can be copied
            continue
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        table.add_column(no_wrap=True)
        for name, about in part.items():
            table.add_row(name, Text(about or ""))  # no markup
        console.print(table)
    return True


def sections(recipe: Recipe) -> dict[str, Any]:
    """The sections of a recipe by name, data first."""
    found = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return dict(sorted(((k, v) for k, v in found.items() if is_dataclass(v)), key=lambda item: item[0] != "data"))


def only(recipe: Recipe, shown: Sequence[str]) -> Any:
    """The recipe as an instance of a class whose other sections have no help."""
    hidden: list[Any] = [
        (name, Annotated[type(section), tyro.conf.Suppress], section)
        for name, section in sections(recipe).items()
        if name not in shown
    ]
    kind = make_dataclass("Shown", hidden, bases=(type(recipe),), frozen=True)
    return kind(**{field.name: getattr(recipe, field.name) for field in fields(recipe)})


def section_help(
    args: list[str],
    examples: str,
    about: str | None,
    found: Mapping[str, Any],
    parse: Callable[[Sequence[str], list[str], str], object],
) -> list[str]:
    """Print the help of a command that has sections of options, if the arguments ask for it, and exit.

    `--help` prints the options without a section, and the names of the others; `--help SECTION` those of one section,
    `--help all` everything.

    Args:
        args: returned unchanged if they do not ask for help
        examples: key of `EXAMPLES`
        about: what the command does
        found: the sections by name
        parse: the parser, which is called with the names of the sections to describe, arguments and description

    Raises:
        InputError: for an unknown section.
    """
    place = next((place for place, arg in enumerate(args) if arg in ("-h", "--help")), None)
    if place is None:
        return args
    asked = [arg for arg in args[place + 1 : place + 2] if not arg.startswith("-")]
    if not {*asked} <= {*found, "all"}:
        raise InputError(f"--help {asked[0]}: there are {', '.join(found)}, and all")
    rows = []
    if not asked:
        rows = [f"Fields (--help {next(iter(found))} describes a section, --help all everything):"]
        for name, section in found.items():
            row = f"  --{name + '.*':<11}" + " ".join(field.name.replace("_", "-") for field in fields(section))
            rows.append(textwrap.fill(row, width(), subsequent_indent=" " * 15, break_on_hyphens=False))
    shown = list(found) if asked == ["all"] else asked
    parse(shown, ["--help"], describe(about, examples, *(["\n".join(rows)] if rows else [])))
    raise AssertionError("the parser exits after its help")
