"""The tasks. To add one: a module in this package and a line here, or `register` from outside the package."""

from importlib import import_module
from typing import Any

from dualtoken_vit import recipes
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Recipe
from dualtoken_vit.tasks.base import Task

BUILT_IN = "classification", "multilabel", "detection", "segmentation"
"""Modules of this package, each with a `TASK`; imported when needed, so that the command line starts quickly."""
_REGISTERED: dict[str, Task[Any]] = {}


def register(task: Task[Any], named: dict[str, tuple[str, Recipe]] | None = None) -> None:
    """Add a task, its kind of recipe, and named recipes for the command line: {name: (description, recipe)}."""
    recipes.register(task.recipe, named or {})  # first, as it may raise
    _REGISTERED[task.name] = task


def get_task(name: str) -> Task[Any]:
    """The task of that name; an InputError for an unknown one."""
    if name not in _REGISTERED and name in BUILT_IN:
        _REGISTERED[name] = import_module(f"dualtoken_vit.tasks.{name}").TASK
    if name not in _REGISTERED:
        raise InputError(f"task {name!r} is unknown; there are {', '.join(dict.fromkeys((*BUILT_IN, *_REGISTERED)))}")
    return _REGISTERED[name]
