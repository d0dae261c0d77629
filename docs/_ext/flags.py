"""Directives that list the flags of commands and recipes, taken from the command line itself at build time.

{flags} benchmark                   the flags of a command
{flags} train classification        the fields of a task's recipes, by section, with the defaults of its class
{flags} predict classification      the options of prediction of a task
{recipes} classification            the named recipes of a task, and where they differ from these defaults
"""

import re
import warnings
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from shlex import quote
from typing import Any

import tyro
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dualtoken_vit.arguments import CheckData, Convert, Evaluate, Export, Nothing, Predict, Train
from dualtoken_vit.cli import PLAIN, function
from dualtoken_vit.paper.study import PRESETS, Study
from dualtoken_vit.recipes import ABOUT, KINDS, RECIPES, flatten
from dualtoken_vit.tasks.registry import get_task

GENERAL = {"evaluate": Evaluate, "export": Export, "check-data": CheckData, "predict": Predict}
"""Commands whose other options depend on the recipe or checkpoint."""


def parser(command: str, task: str = "") -> ArgumentParser:
    """The parser of a command, or of a part of it that depends on the task."""
    config: tuple[Any, ...] = ()
    default: Any = tyro.MISSING
    if command == "train":
        kind: Any = KINDS[task]
        target: Any = Train[kind]
        default = Train(kind())
    elif command == "predict" and task:
        target = get_task(task).predictor.Options
    elif command in GENERAL:
        target = GENERAL[command][Nothing]
        default = target((), Nothing()) if command == "predict" else target(Nothing())
    elif command == "convert":
        target = Convert
    elif command == "study":
        target, default = Study, PRESETS["cpu"][1]
    else:
        target, config = function(command), PLAIN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other public description of its flags
        return tyro.extras.get_parser(target, default=default, config=config, prog=f"dualtoken-vit {command}")


def sections(found: ArgumentParser, own: bool) -> Iterator[tuple[str, str, list[Action]]]:
    """(name, description, flags) of each section; only the first ones, without a section, if `own`."""
    for group in found._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        name = (group.title or "").removesuffix(" options")
        section = "." in "".join(actions[0].option_strings[:1]) if actions else False
        if actions and not (own and section):
            yield name if section else "", group.description or "", actions


def escape(text: str) -> str:
    """Help text as Markdown."""
    return re.sub(r"([*<_`$])", r"\\\1", text)


def option(action: Action) -> str:
    """A flag as Sphinx's directive `option`."""
    metavar = re.sub(r"\{None\}\|", "", str(action.metavar or ""))
    metavar = re.sub(r"\[(\S+) \[\1 \.\.\.\]\]", r"\1 ...", metavar).strip("[]")
    text, found, default = (action.help or "").rpartition("(default: ")
    if found:
        text = f"{escape(text)}Default: `{default[:-1] or 'none'}`."
    else:  # by default as in the training run
        text = escape(default.removesuffix("(required)"))
    names = ", ".join(f"{name} {metavar}".strip() for name in action.option_strings) or metavar
    return f"::::{{option}} {names}\n{text}\n::::\n"


class Flags(SphinxDirective):
    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command, *task = self.arguments
        lines = [f":::{{program}} dualtoken-vit {' '.join(self.arguments)}\n:::\n"]
        for name, about, actions in sections(parser(command, *task), own=command == "study"):
            if name:
                lines.append(f":::{{rubric}} `--{name}.*`: {escape(about.splitlines()[0])}\n:::\n")
                lines += [escape(about.partition("\n")[2]), ""]
            lines += map(option, actions)
        return self.parse_text_to_nodes("\n".join(lines))


def differences(name: str) -> str:
    """The fields in which a recipe differs from the defaults of its class, as flags."""
    recipe = RECIPES[name]
    defaults = flatten(type(recipe)())
    changed = {key: value for key, value in flatten(recipe).items() if value != defaults[key]}
    return " ".join(f"--{key.replace('_', '-')} {_value(value)}" for key, value in changed.items())


def _value(value: Any) -> str:
    return " ".join(quote(str(each)) for each in value) if isinstance(value, tuple | list) else quote(str(value))


class Recipes(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (task,) = self.arguments
        lines = []
        for name, recipe in RECIPES.items():
            if recipe.task == task:
                lines += [f"`{name}`", f": {escape(ABOUT[name])}", "", f"  `{differences(name)}`", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("flags", Flags)
    app.add_directive("recipes", Recipes)
    return {"parallel_read_safe": True}
