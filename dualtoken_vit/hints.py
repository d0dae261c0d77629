"""Values and type hints."""

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
