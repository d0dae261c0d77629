"""`dualtoken-vit predict FILE.onnx` where only the runtime extra is installed."""

import sys
from argparse import ArgumentParser, BooleanOptionalAction
from dataclasses import fields, is_dataclass
from inspect import getfile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import dualtoken_vit
from dualtoken_vit.errors import InputError, pip_install
from dualtoken_vit.files import similar
from dualtoken_vit.hints import field_texts
from dualtoken_vit.predict import predict
from dualtoken_vit.runtime.predictor import default_options
from dualtoken_vit.runtime.session import RUNTIMES, is_exported
from dualtoken_vit.runtime.tiles import check_overlap
from dualtoken_vit.show.ending import end_by

USAGE = f"""usage: dualtoken-vit predict FILE.onnx IMAGES [--option VALUE ...]
       dualtoken-vit predict FILE.onnx --help      all options, which depend on the file's task
       dualtoken-vit env                           versions and hardware

The other commands need the train extra:
  {pip_install("train")}"""


def main(args: list[str], hint: str) -> NoReturn:
    """Run the command and exit; `hint` is the message for every other command."""
    try:
        status = run(args, hint)
        sys.stdout.flush()
        sys.exit(status)
    except Exception as error:
        end_by(error)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: list[str], hint: str) -> int:
    """Run the command; returns the exit status: 0, or 1 where it found problems in images."""
    command, *others = args or ["--help"]
    if command in ("-h", "--help") or (command == "predict" and (others or ["-h"])[0] in ("-h", "--help")):
        print(USAGE)
        return 0
    if command == "--version":
        print(dualtoken_vit.__version__)
        return 0
    if command != "predict":
        raise InputError(f"{command}: without the train extra there are predict and env; {hint}")
    if not is_exported(others[0]):
        what = "without PyTorch, predict takes a FILE.onnx of dualtoken-vit export; for others"
        raise InputError(f"{others[0]}: {what} {hint}")
    return 0 if predict(Path(others[0]), **parse(Path(others[0]), others[1:])) else 1


def parse(path: Path, args: list[str]) -> dict[str, Any]:
    """The arguments of `predict` for an exported file, whose options depend on its task."""
    parser = ArgumentParser(
        prog=f"dualtoken-vit predict {path}",
        description="Print and draw the predictions of an exported file for images.",
        allow_abbrev=False,
    )
    stored = default_options(path)
    texts = _texts(type(stored)) if {"-h", "--help"} & {*args} else {}

    def add(name: str, **how: Any) -> None:
        default = "" if name == "images" or how.get("action") else f" (default: {how.get('default')})"
        flag = name if name == "images" else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=f"{texts.get(name, '')}{default}".replace("%", "%%"), **how)

    add("images", nargs="+", type=Path)
    add("out", type=Path)
    add("json", action="store_true")
    add("batch_size", type=int)
    add("runtime", choices=RUNTIMES, default="onnxruntime")
    for field in fields(stored):
        default = getattr(stored, field.name)
        kinds = [kind for kind in get_args(field.type) if kind is not NoneType]  # of TYPE | None
        how: dict[str, Any] = {"type": kinds[0] if kinds else field.type}
        if isinstance(default, bool):
            how = {"action": BooleanOptionalAction}  # a stored True can be switched off
        elif isinstance(default, tuple):
            how = {"type": float, "nargs": "+"}
        elif get_origin(field.type) is Literal:
            how = {"choices": get_args(field.type)}
        add(field.name, default=default, **how)
    found, rest = parser.parse_known_args(args)
    if unknown := next((each for each in rest if each.startswith("-")), None):
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise InputError(f"{unknown}: no such option; {similar(unknown, flags) or '--help lists all'}")
    found.images += map(Path, rest)  # those after an option
    check_overlap(found, args)
    return vars(found)


def _texts(options: type) -> dict[str, str]:
    """The help of the arguments: as where the train extra is installed, whose module of arguments needs it."""
    texts = field_texts(Path(__file__).with_name("arguments.py"), "Predict")
    for kind in filter(is_dataclass, reversed(options.__mro__)):
        texts |= field_texts(getfile(kind), kind.__name__)
    return texts
