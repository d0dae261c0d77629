"""Values, type hints and docstrings of fields."""

import ast
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type, given as a type hint without `Annotated`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)  # True == 1
    if origin is tuple:
        hints = args[:1] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(fits, value, hints))
    if hint in (int, float):  # an int serves as a float; a bool is no number
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


def type_name(hint: Any) -> str:
    """A type hint in words, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType, Literal):
        return " or ".join(repr(arg) if origin is Literal else type_name(arg) for arg in args)
    return "None" if hint is NoneType else str(hint) if args else hint.__name__


def field_texts(path: str | Path, name: str) -> dict[str, str]:
    """The docstrings of a class's own fields, read from its source file, which need not be importable."""
    module = ast.parse(Path(path).read_text(encoding="utf-8"))
    (found,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(found.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
