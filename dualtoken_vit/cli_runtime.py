"""`dualtoken-vit predict FILE.onnx` where only the runtime extra is installed."""

import sys
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

import dualtoken_vit
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable
from dualtoken_vit.predict import predict
from dualtoken_vit.runtime.predictor import default_options
from dualtoken_vit.runtime.session import RUNTIMES, is_exported

USAGE = """usage: dualtoken-vit predict FILE.onnx IMAGES [--option VALUE ...]
       dualtoken-vit predict FILE.onnx --help      all options, which depend on the file's task
       dualtoken-vit env                           versions and hardware

The other commands need the train extra: pip install 'dualtoken-vit[train]'"""


def main(args: list[str], hint: str) -> NoReturn:
    """Run the command and exit; `hint` is the message for every other command."""
    command, *others = args or ["--help"]
    if command in ("-h", "--help") or (command == "predict" and (others or ["-h"])[0] in ("-h", "--help")):
        print(USAGE)
        sys.exit()
    if command == "--version":
        print(dualtoken_vit.__version__)
        sys.exit()
    try:
        if command != "predict":
            raise InputError(f"{command}: without the train extra there are predict and env; {hint}")
        if not is_exported(others[0]):
            raise InputError(f"{others[0]}: without PyTorch, predict takes a FILE.onnx of dualtoken-vit export; {hint}")
        sys.exit(0 if predict(Path(others[0]), **parse(Path(others[0]), others[1:])) else 1)
    except InputError as error:
        print(f"dualtoken-vit: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(path: Path, args: list[str]) -> dict[str, Any]:
    """The arguments of `predict` for an exported file, whose options depend on its task."""
    parser = ArgumentParser(
        prog=f"dualtoken-vit predict {path}",
        description="Print and draw the predictions of an exported file for images.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders of them")
    parser.add_argument(
        "--out", type=Path, help="folder for a drawing of each image, scaled to be legible, and predictions.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch-size", type=int, help="images in a forward pass")
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    stored = default_options(path)
    for field in fields(stored):
        default = getattr(stored, field.name)
        how: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            how = {"action": "store_true"}
        elif isinstance(default, tuple):
            how = {"type": float, "nargs": "+"}
        elif default is None:
            how = {"type": get_args(field.type)[0]}  # of TYPE | None
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=f"default: {default}", **how)
    return vars(parser.parse_args(args))
