"""Types and bounds of the fields of frozen dataclasses, and their checker.

Bounds are an annotated-types `Interval`: `Annotated[float, Interval(ge=0, le=1)]`. In a tuple or a union they apply to
every number.
"""

import math
import operator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from annotated_types import Interval

from dualtoken_vit.errors import InputError
from dualtoken_vit.hints import fits, type_name

ASCENDING = "in ascending order"  # metadata of a (low, high) range
T = TypeVar("T")


def parse_size(text: str, flag: str, least: int = 1) -> tuple[int, int]:
    """Height and width from "224" or "640x480" (width x height); an InputError that names `flag` for anything else."""
    width, cross, height = text.partition("x")
    if not width.isdecimal() or (cross and not height.isdecimal()) or min(int(width), int(height or width)) < least:
        raise InputError(f"{flag} {text}: give pixels as 224, or WIDTHxHEIGHT as 640x480, at least {least}")
    return int(height or width), int(width)


def build(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """The dataclass that `dataclasses.asdict` converted; missing fields take their defaults, lists become tuples.

    Messages start with `path`, the name of the object.

    Raises:
        TypeError: for an unknown field or a value of the wrong type. Bounds are not checked.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{path} is {values!r}: must be an object")
    hints, names = get_type_hints(cls), {field.name for field in fields(cls)}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{name}".removeprefix(".")
        if name not in names:
            raise TypeError(f"unknown field {key}")
        if is_dataclass(hints[name]):
            value = build(hints[name], value, key)
        elif isinstance(value, list):
            value = tuple(value)
        if not fits(value, hints[name]):
            raise TypeError(f"{key} is {value!r}: must be {type_name(hints[name])}")
        found[name] = value
    return cls(**found)


def check_bounds(obj: Any, prefix: str = "") -> None:
    """Check the types and bounds of all fields of a dataclass, and of the dataclasses in it.

    Raises:
        InputError: names the flag of the first wrong value, after `prefix`. NaN and infinity are always wrong.
    """
    plain, annotated = get_type_hints(type(obj)), get_type_hints(type(obj), include_extras=True)
    for field in fields(obj):
        value, hint = getattr(obj, field.name), plain[field.name]
        if is_dataclass(value):
            check_bounds(value, f"{prefix}{field.name}.")
            continue
        flag = f"--{prefix}{field.name}".replace("_", "-")
        metadata = getattr(annotated[field.name], "__metadata__", ())
        interval = next((each for each in metadata if isinstance(each, Interval)), Interval())
        values = value if isinstance(value, tuple) else (value,)
        for each in values:
            if isinstance(each, int | float) and (problem := _problem(each, interval)):
                raise InputError(f"{flag} {each}: must be {problem}")
        if not fits(value, hint):
            raise InputError(f"{flag} {value}: must be {type_name(hint)}")
        if ASCENDING in metadata and list(values) != sorted(values):
            raise InputError(f"{flag} {' '.join(map(str, values))}: must be {ASCENDING}")


def _problem(value: float, bounds: Any) -> str:
    """What a number must be instead of one outside the `Interval`; "" if it is inside."""
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    for name, words in {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}.items():
        if (bound := getattr(bounds, name)) is not None and not getattr(operator, name)(value, bound):
            return f"{words} {bound}"
    return ""
