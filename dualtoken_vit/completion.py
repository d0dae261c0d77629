"""Completion of commands, recipes, flags and their values in the shell; tyro writes the script."""

from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import tyro

from dualtoken_vit.arguments import CheckData, Convert, Evaluate, Export, Nothing, Predict, Train
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import RECIPES

SHELLS = ("bash", "zsh", "fish")


def _subcommands(kinds: Mapping[str, Any]) -> Any:
    """A union of dataclasses and functions, each as a subcommand."""
    return reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()))


def _recipes(kind: Any) -> Any:
    """The recipes as subcommands of a command that takes their fields."""
    chosen: Any = _subcommands({name: kind[type(recipe)] for name, recipe in RECIPES.items()})
    return make_dataclass(kind.__name__, [("recipe", Annotated[chosen, tyro.conf.OmitSubcommandPrefixes])])


def _checkpoint(kind: Any) -> Any:
    options: Any = Annotated[kind[Nothing], tyro.conf.arg(name="")]
    fields = [("checkpoint", tyro.conf.Positional[Path]), ("options", options)]
    return make_dataclass(kind.__name__, fields, frozen=True)


def completion(args: list[str], functions: Mapping[str, Callable[..., Any]]) -> None:
    """Print the script that completes `dualtoken-vit` in the shell that is the only argument.

    `functions` are the commands whose options are the parameters of a function.

    Raises:
        InputError: for anything but one of `SHELLS`.
    """
    if len(args) != 1 or args[0] not in SHELLS:
        raise InputError(f"name the shell: dualtoken-vit completion {'|'.join(SHELLS)}")
    commands = _subcommands(
        {"train": _recipes(Train), "check-data": _recipes(CheckData)}
        | {"evaluate": _checkpoint(Evaluate), "predict": _checkpoint(Predict), "export": _checkpoint(Export)}
        | {"convert": Convert, "study": Nothing, "env": Nothing, "completion": Nothing, **functions}
    )
    tyro.cli(commands, args=["--tyro-write-completion", args[0], "-"], prog="dualtoken-vit")
