"""Checks of a best.safetensors or an exported file, and of the description in it: JSON that may come from anywhere."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dualtoken_vit.errors import InputError
from dualtoken_vit.hints import fits, type_name

SUFFIXES = (".safetensors", ".onnx", ".tflite", ".ckpt", ".pt", ".pth")  # of no network's name
MOST_SIDE = 16384  # pixels, as in recipes


class Entry(NamedTuple):
    """The type of an entry, and the range of its numbers."""

    hint: Any
    low: float = -math.inf
    high: float = math.inf


Numbers = tuple[float, ...]
SIDES = 1, MOST_SIDE
POSITIVE = 1e-6, 1e6
SHARE = 0, 1

FIELDS = {"task": Entry(str), "class_names": Entry(tuple[str, ...]), "preprocessing": Entry(dict)}
INPUT = {"input_size": Entry(tuple[int, int, int], *SIDES)}
NORMALISED = INPUT | {"mean": Entry(Numbers, -1e6, 1e6), "std": Entry(Numbers, *POSITIVE)}
TASKS = ("classification", "multilabel", "detection", "segmentation")  # the package's; others have their own entries
EXPORT = {"size": Entry(tuple[int, int] | None, *SIDES), "raw": Entry(bool)}
DETECTOR = EXPORT | {"score_threshold": Entry(float, *SHARE)}
RAW_DETECTOR = DETECTOR | {
    "multiple": Entry(int, *SIDES),
    "anchors": Entry(int, *POSITIVE),
    "strides": Entry(tuple[int, ...], *SIDES),
    "candidates": Entry(int, *POSITIVE),
    "nms_threshold": Entry(float, *SHARE),
    "detections": Entry(int, *POSITIVE),
}
OPTIONAL: dict[str, dict[str, Entry]] = {
    "": {
        "model": Entry(str),
        "model_args": Entry(dict),
        "recipe": Entry(dict),
        "metrics": Entry(dict),
        "category_ids": Entry(tuple[int, ...]),
        "license": Entry(str | None),
        "export": Entry(dict),
    },
    "recipe": {"data": Entry(dict), "model": Entry(dict)},
    "preprocessing": {
        "interpolation": Entry(str),
        "crop_pct": Entry(float, 0.01, 1),
        "temperature": Entry(float, *POSITIVE),
        "thresholds": Entry(Numbers | None, *SHARE),
        "label_descriptions": Entry(tuple[str, ...]),
        "held_out": Entry(str),
        "usual_size": Entry(tuple[int, int], *SIDES),
    },
}


def check_path(path: Path) -> None:
    """Raise an InputError for a folder, or nothing, in place of a file of weights.

    A name without a folder or a suffix may be that of a network whose weights come with the package.
    """
    if path.is_dir():
        hint = f"; give {path / 'best.safetensors'}" if (path / "best.safetensors").is_file() else ""
        raise InputError(f"{path} is a folder, not a checkpoint{hint}")
    if not path.exists() and (len(path.parts) > 1 or path.suffix in SUFFIXES):
        raise InputError(f"{path}: no such {'file' if path.suffix == '.onnx' else 'checkpoint'}")


def check_file(path: Path) -> None:
    """`check_path` of a best.safetensors or an exported file, and an InputError for a file of another program."""
    check_path(path)
    if path.is_file() and path.suffix.lower() != ".onnx":
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] != b"{":
            raise InputError(unreadable(path))


def unreadable(path: Path) -> str:
    """The message for a file that is no checkpoint."""
    other = "it is for resuming, or of another program; give the best.safetensors of a run"
    kind = "it is truncated or damaged" if path.suffix == ".safetensors" else other
    return f"{path} cannot be read as a checkpoint: {kind}"


def check_header(found: Mapping[str, Any], path: object) -> None:
    """Raise an InputError that names the first entry of a description which is missing or cannot be used."""
    if fault := next(_all_faults(found), ""):
        raise InputError(f"{path} has a damaged description, or one of another version of dualtoken-vit: {fault}")


def _all_faults(found: Mapping[str, Any]) -> Iterator[str]:
    yield from faults("", found, FIELDS)
    yield from faults("preprocessing", found["preprocessing"], NORMALISED if found["task"] in TASKS else INPUT)
    yield from faults("recipe", found.get("recipe", {}), {})
    if "export" in found:
        detector = RAW_DETECTOR if found["export"].get("raw") else DETECTOR
        yield from faults("export", found["export"], detector if found["task"] == "detection" else EXPORT)
    names, preprocessing = found["class_names"], found["preprocessing"]
    channels = preprocessing["input_size"][0]
    if channels not in (1, 3):
        yield f"preprocessing.input_size has {channels} channels"
    expected = {"mean": channels, "std": channels, "thresholds": len(names), "label_descriptions": len(names)}
    given = {key: preprocessing[key] for key in expected if preprocessing.get(key) is not None}
    lengths = {f"preprocessing.{key}": (len(values), expected[key]) for key, values in given.items()} | {
        "category_ids": (len(found.get("category_ids") or names), len(names)),
        "model_args.num_classes": (found.get("model_args", {}).get("num_classes", len(names)), len(names) or 1),
    }
    yield from (f"{name}: {count}, but {n} expected" for name, (count, n) in lengths.items() if count != n)


def faults(part: str, values: Any, needed: Mapping[str, Entry]) -> Iterator[str]:
    """The entries of an object that are missing, of the wrong type or out of range; or that it is no object."""
    if not isinstance(values, Mapping):
        yield f"{part} is {values!r:.60}: must be an object"
        return
    yield from (f"{part} lacks {name}".strip() for name in needed if name not in values)
    for name, (hint, low, high) in ({**needed, **OPTIONAL.get(part, {})}).items():
        value = tuple(values[name]) if isinstance(values.get(name), list) else values.get(name)
        if name in values and not fits(value, hint):
            yield f"{part}.{name} is {value!r:.60}: must be {type_name(hint)}".removeprefix(".")
        numbers = [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, int | float)]
        if not all(low <= each <= high for each in numbers):
            yield f"{part}.{name} is {value!r:.60}: out of range".removeprefix(".")
