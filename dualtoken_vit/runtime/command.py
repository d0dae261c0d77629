"""`dualtoken-vit predict FILE.onnx` where only the runtime extra is installed: a table or JSON, without drawings."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable
from dualtoken_vit.results import Classes, LabelMap, Objects
from dualtoken_vit.runtime.predictor import load_predictor, predictor_class
from dualtoken_vit.runtime.session import RUNTIMES, is_exported, read_description


def main(args: list[str], hint: str) -> NoReturn:
    """Run the command and exit; `hint` is the message for every other command."""
    if args[:1] != ["predict"] or len(args) < 2 or not is_exported(args[1]):
        sys.exit(f"dualtoken-vit: error: {hint}")
    try:
        sys.exit(0 if predict(Path(args[1]), args[2:]) else 1)
    except InputError as error:
        print(f"dualtoken-vit: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def predict(path: Path, args: list[str]) -> bool:
    """Print the predictions of an exported file; returns whether every image could be read."""
    parser = ArgumentParser(prog=f"dualtoken-vit predict {path}", description=predict.__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch-size", type=int, help="images in a forward pass")
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    description = read_description(path)
    kind = predictor_class(description)
    stored = kind.make_options(**kind.stored_options(description))
    for field in fields(kind.Options):
        default = getattr(stored, field.name)
        how: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            how = {"action": "store_true"}
        elif isinstance(default, tuple):
            how = {"type": float, "nargs": "+"}
        elif default is None:
            how = {"type": int}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=f"default: {default}", **how)
    given = vars(parser.parse_args(args))
    images, as_json, batch_size, runtime = (given.pop(key) for key in ("images", "json", "batch_size", "runtime"))
    predictor = load_predictor(path, runtime, **given)
    sources = predictor.sources(images)
    record: dict[str, Any] = {"checkpoint": str(path), "predictions": [], "unreadable": []}
    for source, prediction in zip(sources, predictor.stream(sources, batch_size), strict=True):
        if prediction.error is not None:
            record["unreadable"].append({"image": str(source), "reason": str(prediction.error)})
            print(prediction.error, file=sys.stderr)
            continue
        found = entry(prediction.result)
        record["predictions"].append({"image": str(source), **found})
        if not as_json:
            (rows,) = found.values()
            print(printable(source))
            for row in rows or [{"class": "nothing"}]:
                print(
                    "  ", *(f"{cell:.3f}" if isinstance(cell, float) else printable(str(cell)) for cell in row.values())
                )
    if as_json:
        print(json.dumps(record))
    return not record["unreadable"]


def entry(result: Any) -> dict[str, list[dict[str, Any]]]:
    """A result as plain data."""
    match result:
        case Classes():
            pairs = zip(result.names, result.probabilities.tolist(), strict=True)
            return {"classes": [{"class": name, "probability": share} for name, share in pairs]}
        case LabelMap():
            return {"classes": [{"class": name, "share": share} for name, share in result.shares().items()]}
        case Objects():
            rows = zip(result.names, result.scores.tolist(), result.boxes.tolist(), strict=True)
            return {"objects": [{"class": name, "score": score, "box": box} for name, score, box in rows]}
    raise TypeError(type(result))
