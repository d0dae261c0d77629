"""The command line, `dualtoken-vit`: reads arguments and calls the rest."""

import errno
import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import dualtoken_vit
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import printable

INSTALL = "install the train extra, in the project's folder: pip install -e '.[train]'"
try:
    import tyro
    from rich.console import Console
    from rich.table import Table

    from dualtoken_vit.recipes import ABOUT, RECIPES, Device, Recipe, flatten
except ModuleNotFoundError as error:  # without the train extra, exported files can predict
    hint = f"{error.name} is not installed; {INSTALL}"
    try:
        from dualtoken_vit.cli_runtime import main as predict_exported
    except ModuleNotFoundError:
        sys.exit(f"dualtoken-vit: error: {hint}")
    predict_exported(sys.argv[1:], hint)

DEFAULT = "demo"
PRETRAINED = "--model.pretrained"  # true, false or auto: no switch for tyro, which wants True, False or auto
R = TypeVar("R", bound=Recipe)
Runtime = Literal["onnxruntime", "openvino"] | None

# Commands import what they need themselves: `--help` is quick, and works without another command's dependencies.


@dataclass(frozen=True)
class Train(Generic[R]):
    recipe: Annotated[R, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    resume: bool = False
    """Continue the run in that folder where it was interrupted, with its settings."""


@dataclass(frozen=True)
class CheckData(Generic[R]):
    recipe: Annotated[R, tyro.conf.arg(name="")]
    out: Path = Path("runs", "check-data")
    """Folder for labels.png, a contact sheet of images with their labels."""
    augmented: bool = False
    """Draw the images as training sees them, after augmentation."""
    suspects: tuple[Path, ...] = ()
    """Classification: rank probably wrong labels by the networks of these runs, among the images that each of them held
    out or validated on. Several runs with --data.holdout 0.2 and --data.fold 0, 1, 2, 3, 4 cover all images."""


D = TypeVar("D")  # the data section of a recipe
O = TypeVar("O")  # noqa: E741  the options of a predictor


@dataclass(frozen=True)
class Evaluate(Generic[D]):
    data: D
    batch_size: int | None = None
    """Images in a batch; by default as in training."""
    device: Device = "auto"
    """auto: an accelerator if there is one, else the CPU."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the forward pass."""
    runtime: Runtime = None
    """Of an exported file; by default onnxruntime."""
    calibrate: bool = False
    """Classification: fit the temperature of the probabilities on these images, and store it in the checkpoint."""
    out: Path | None = None
    """Folder for evaluation.json, plots, and in detection the results in COCO's format."""
    json: bool = False
    """Print one JSON object, and nothing else. Classification: top1, top5, loss, ece, images; detection: box, mask,
    images; segmentation: miou, pixel_accuracy, mean_accuracy, per_class, images. Shares are between 0 and 1."""


@dataclass(frozen=True)
class Predict(Generic[O]):
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders to search for them, subfolders included; or one video, or the number of a camera."""
    options: Annotated[O, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder for a drawing of each image (segmentation: and its label map as a palette PNG), contact sheets of all
    images, and predictions.json. Of a video: the annotated video, with a .jsonl beside it."""
    json: bool = False
    """Print one JSON object on stdout instead of the table, and nothing else there; of a video, one for each frame."""
    batch_size: int | None = None
    """Images in a forward pass; by default 32, in detection and segmentation 4."""
    device: Device = "auto"
    """auto: an accelerator if there is one, else the CPU."""
    runtime: Runtime = None
    """Of an exported file; by default onnxruntime."""


@dataclass(frozen=True)
class Export(Generic[D]):
    data: D
    out: Path | None = None
    """The file; by default beside the checkpoint."""
    format: Literal["onnx", "litert", "coreml"] = "onnx"
    """onnx: for ONNX Runtime and OpenVINO. litert (.tflite), coreml (.mlpackage, not verified): one image of one size,
    classifiers and segmenters."""
    size: str | None = None
    """SIDE or WIDTHxHEIGHT of the images in pixels; by default as in training. Detectors take this size only, rounded
    up to multiples of 32; other files take any size."""
    raw: bool = False
    """RetinaNet, FCOS, SSDLite: boxes (B, A, 4) and scores (B, A, classes) of all anchors, for images of any size; the
    predictor of the file chooses among them."""
    attention: bool = False
    """DualToken-ViT classifiers: also the attention maps of the last block, for the command attention."""
    int8: Literal["dynamic", "static"] | None = None
    """Weights of linear layers as int8. dynamic (also without a value) needs no data; static fixes the range of the
    activations from --images."""
    fp16: bool = False
    """Weights as float16: half the size, not faster on a CPU."""
    images: Path | None = None
    """Folder of images to verify and calibrate with; by default noise."""
    evaluate: bool = False
    """Also evaluate checkpoint and file on the validation images (--data.*)."""


@dataclass(frozen=True)
class Convert:
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of images and labels in COCO, YOLO, Pascal VOC, CSV or LabelMe form."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The new folder. Images are copied into it."""
    to: Literal["coco", "yolo", "voc"]
    """Format of the new folder."""
    format: str = "auto"
    """Format of the source: coco, yolo, voc, csv or labelme; auto: detect it."""


def _runtime(chosen: Any) -> dict[str, Any]:
    """The option of an exported file, if it is given; a checkpoint rejects it."""
    return {} if chosen.runtime is None else {"runtime": chosen.runtime}


def _recipe_name(args: list[str], command: str, about: str | None) -> tuple[str, list[str]]:
    """The recipe that the arguments start with ("" without one), and the other arguments.

    The recipe's own arguments are then parsed alone, so that messages do not mention other recipes.
    """
    if _help(
        args,
        f"{command} [RECIPE] [--section.field VALUE ...]",
        f"{about}\n\nRecipes (default: {DEFAULT}):",
        ABOUT,
        f"\nEvery field with type, default and meaning: dualtoken-vit {command} RECIPE --help",
    ):
        sys.exit()
    if not args or args[0].startswith("-"):
        return "", args
    return _known("recipe", args[0], RECIPES), args[1:]


def _checkpoint(args: list[str], command: str, about: str | None, more: str) -> tuple[Path, list[str]]:
    """The checkpoint that the arguments start with, and the other arguments, whose defaults depend on it."""
    usage = f"{command} CHECKPOINT {more}"
    about = (
        f"{about} CHECKPOINT is the best.safetensors of a run, a file that export wrote, or the name of a network "
        "whose weights come with the package.\n"
    )
    if _help(
        args, usage, about, f"The options of its task and their defaults: dualtoken-vit {command} CHECKPOINT --help"
    ):
        sys.exit()
    if not args or args[0].startswith("-"):
        raise InputError(f"name the checkpoint first: dualtoken-vit {usage}")
    return Path(args[0]), args[1:]


def _flags(args: list[str], values: dict[str, Any]) -> list[str]:
    """The arguments with `--section.field true` and `false` as tyro's `--section.field` and `--section.no-field`."""
    switches = {f"--{key.replace('_', '-')}" for key, value in values.items() if isinstance(value, bool)} | {PRETRAINED}
    found: list[str] = []
    for arg in (part for each in args for part in (each.split("=") if each.partition("=")[0] in switches else [each])):
        if found and found[-1] == PRETRAINED:
            if arg.startswith("--"):
                found.append("True")
            found.append(arg.capitalize() if arg.lower() in ("true", "false") else arg)
        elif found and found[-1] in switches and arg.lower() in ("true", "false"):
            if arg.lower() == "false":
                section, _, field = found[-1].removeprefix("--").rpartition(".")
                found[-1] = f"--{section}{'.' * bool(section)}no-{field}"
        else:
            found.append(arg)
    return [*found, "True"] if found[-1:] == [PRETRAINED] else found


def _parse(default: Any, part: Any, args: list[str], values: dict[str, Any], prog: str, about: str | None) -> Any:
    """Parse arguments into a command's dataclass, `default`.

    Its field `part` is of the generic type: the class of `part` decides which options there are, and `values` has their
    defaults by name, see `_flags`.
    """
    kind = type(default)[type(part)]
    return tyro.cli(kind, default=default, args=_flags(args, values), prog=f"dualtoken-vit {prog}", description=about)


def _with_data(default: Any, stored: Any, args: list[str], prog: str, about: str | None) -> tuple[Any, dict[str, Any]]:
    """`_parse` with the fields of a stored recipe's data section, and those of them that the arguments change."""
    short = {"--data.split": "--data.val-split", "--tile": "--data.tile", "--overlap": "--data.overlap"}
    args = [short.get(arg, arg) for arg in args]
    before = asdict(stored)
    flags = {f"data.{key}": value for key, value in before.items()}
    given = {arg.partition("=")[0].removeprefix("--data.").removeprefix("no-").replace("-", "_") for arg in args}
    chosen = _parse(default, stored, args, flags, prog, about)
    found = {key: value for key, value in asdict(chosen.data).items() if key in given or value != before[key]}
    _check_overlap(chosen.data, args)
    return chosen, found


def _check_overlap(options: Any, args: list[str]) -> None:
    """An InputError for an overlap of tiles without tiles."""
    flags = [arg for arg in args if arg.partition("=")[0] in ("--overlap", "--data.overlap")]
    if flags and options.tile is None:
        raise InputError("--overlap is that of tiles: give --tile too, the side of a tile in pixels")


def _known(kind: str, name: str, names: Iterable[str]) -> str:
    """The name, if it is one of `names`; else an error with similar ones."""
    if name in names:
        return name
    near = get_close_matches(name, names)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    raise InputError(f"{kind} {name!r} is unknown; {hint}")


def _help(args: list[str], usage: str, *parts: str | Mapping[str, str | None]) -> bool:
    """Print a help page, of paragraphs and tables of names with their descriptions, if the arguments ask for it."""
    if not args or args[0] not in ("-h", "--help"):
        return False
    console = Console()
    console.print(f"usage: dualtoken-vit {usage}\n", markup=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part)
            continue
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        for name, about in part.items():
            table.add_row(name, about)
        console.print(table)
    return True


def train(args: list[str]) -> None:
    """Train a network with a recipe; writes its weights, metrics and curves into a folder."""
    named, args = _recipe_name(args, "train", train.__doc__)
    name = named or DEFAULT

    def parse(recipe: Recipe) -> Train:
        return _parse(Train(recipe), recipe, args, flatten(recipe), f"train {name}", ABOUT[name])

    chosen = parse(RECIPES[name])
    out = chosen.out or Path("runs", name)
    from dualtoken_vit.tasks.run_folder import stored_recipe
    from dualtoken_vit.tasks.trainer import train as run

    stored = stored_recipe(out, named) if chosen.resume else None
    if stored is not None:
        chosen = parse(stored)
    epochs = chosen.recipe.optim.epochs
    if chosen.recipe.run.max_minutes is not None and epochs != (stored or RECIPES[name]).optim.epochs:
        raise InputError(f"--optim.epochs {epochs}: --run.max-minutes sets the epochs; leave out one of the two")
    run(chosen.recipe, out, chosen.resume, named if stored is not None else name)


def evaluate(args: list[str]) -> None:
    """Evaluate a trained network on validation images."""
    checkpoint, args = _checkpoint(args, "evaluate", evaluate.__doc__, "[--data.field VALUE ...] [OPTIONS]")
    from dualtoken_vit.evaluation import evaluate as run
    from dualtoken_vit.predictors import read_header, stored_recipe

    stored = stored_recipe(checkpoint, read_header(checkpoint)).data
    chosen, data = _with_data(Evaluate(stored), stored, args, f"evaluate {checkpoint}", evaluate.__doc__)
    result = run(
        checkpoint,
        data=data,
        batch_size=chosen.batch_size,
        device=chosen.device,
        precision=chosen.precision,
        out=chosen.out,
        calibrate=chosen.calibrate,
        **_runtime(chosen),
    )
    if chosen.json:
        print(json.dumps(result.metrics))
    else:
        console = Console()
        console.print(result.table())
        console.print(f"{result.headline}  {result.metrics['images']} images")


def predict(args: list[str]) -> bool:
    """Print and draw the predictions of a trained network for images."""
    checkpoint, args = _checkpoint(args, "predict", predict.__doc__, "IMAGE|FOLDER|VIDEO ... [--out PATH] [OPTIONS]")
    from dualtoken_vit.predict import predict as run
    from dualtoken_vit.predictors import default_options

    options = default_options(checkpoint)
    chosen = _parse(Predict((), options), options, args, asdict(options), f"predict {checkpoint}", predict.__doc__)
    _check_overlap(chosen.options, args)
    options = {"device": chosen.device, **_runtime(chosen), **asdict(chosen.options)}
    return run(checkpoint, chosen.images, chosen.out, chosen.json, chosen.batch_size, **options)


def export(args: list[str]) -> None:
    """Write a trained network as one file for ONNX Runtime or OpenVINO, verified against PyTorch."""
    checkpoint, args = _checkpoint(args, "export", export.__doc__, "[--out FILE] [--int8 [static]] [OPTIONS]")
    from dualtoken_vit.checkpoint import read_checkpoint
    from dualtoken_vit.deploy.export import export as run
    from dualtoken_vit.evaluation import evaluate as measure
    from dualtoken_vit.predictors import stored_recipe

    if "--int8" in args and args[args.index("--int8") + 1 :][:1] not in (["dynamic"], ["static"]):
        args.insert(args.index("--int8") + 1, "dynamic")
    recipe = stored_recipe(checkpoint, read_checkpoint(checkpoint, weights=False))
    chosen, data = _with_data(Export(recipe.data), recipe.data, args, f"export {checkpoint}", export.__doc__)
    options = {key: value for key, value in vars(chosen).items() if key not in ("data", "evaluate")}
    file = run(checkpoint, **options)
    if chosen.evaluate and chosen.format == "onnx":
        for path in (checkpoint, file):
            print(f"{path}: {measure(path, data=data, recipe=recipe).headline}")  # the file has no paths


def study(args: list[str]) -> None:
    """Train the networks of one of the paper's comparisons with an equal budget and several seeds."""
    from dualtoken_vit.paper.study import PRESETS, STUDIES, Study, networks
    from dualtoken_vit.paper.study import study as run

    sizes = {name: len(networks(name, "small")) for name in STUDIES}
    if _help(
        args,
        "study STUDY [--preset NAME] [OPTIONS]",
        f"{study.__doc__}\n\nStudies:",
        {name: f"{table} of the paper, {sizes[name]} networks" for name, (table, _) in STUDIES.items()},
        "\nPresets:",
        {name: about for name, (about, _) in PRESETS.items()},
        "\nEvery option with type, default and meaning: dualtoken-vit study STUDY --help",
    ):
        return
    if not args or args[0].startswith("-"):
        raise InputError(f"name the study first: dualtoken-vit study {'|'.join(STUDIES)}")
    name, args = _known("study", args[0], STUDIES), args[1:]
    finder = ArgumentParser(add_help=False, allow_abbrev=False)  # the defaults of all that follows depend on it
    finder.add_argument("--preset", nargs="?", default="cpu")
    _, default = PRESETS.get(finder.parse_known_args(args)[0].preset, PRESETS["cpu"])
    given, prog = _flags(args, flatten(default.recipe)), f"dualtoken-vit study {name}"
    run(name, tyro.cli(Study, default=default, args=given, prog=prog, description=study.__doc__))


def check_data(args: list[str]) -> bool:
    """Read all data of a recipe once, report what it holds and what is wrong."""
    name, args = _recipe_name(args, "check-data", check_data.__doc__)
    name = name or DEFAULT
    recipe, about = RECIPES[name], f"{check_data.__doc__} {ABOUT[name]}"
    chosen = _parse(CheckData(recipe), recipe, args, flatten(recipe), f"check-data {name}", about)
    from dualtoken_vit.bounds import check_bounds
    from dualtoken_vit.tasks.registry import get_task

    check_bounds(chosen.recipe)
    if chosen.suspects or "--suspects" in args:  # before all images are read
        from dualtoken_vit import suspects

        if not suspects.open_runs(chosen.recipe, chosen.suspects):
            raise InputError("--suspects: name the folders of one or more training runs")
    more = {"augmented": True} if chosen.augmented else {}
    sound = get_task(chosen.recipe.task).check_data(chosen.recipe, chosen.out, **more)
    if chosen.suspects:
        suspects.report(suspects.rank(chosen.recipe, chosen.suspects), chosen.out)
    return sound


def convert(args: list[str]) -> None:
    """Write images with boxes or polygons in another label format."""
    chosen = tyro.cli(Convert, args=args, prog="dualtoken-vit convert", description=convert.__doc__)
    from dualtoken_vit.data.convert import convert as run

    run(chosen.source, chosen.target, chosen.to, chosen.format)


def _forward(command: str, about: str) -> Callable[[list[str]], Any]:
    """A command whose options are the parameters of the function of that name in `paper`."""

    def call(args: list[str]) -> Any:
        function = getattr(import_module(f"dualtoken_vit.paper.{command}"), command)
        config = (tyro.conf.PositionalRequiredArgs,)
        return tyro.cli(function, args=args, prog=f"dualtoken-vit {command}", config=config)

    call.__doc__ = about
    return call


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "attention": _forward("attention", "Draw the attention maps of a trained classifier."),
    "localise": _forward("localise", "Measure how well the attention maps of trained classifiers localise objects."),
    "benchmark": _forward("benchmark", "Measure speed, memory and size of timm models side by side."),
    "study": study,
    "tables": _forward("tables", "Print the paper's tables next to the figures of this implementation."),
    "check-data": check_data,
    "convert": convert,
}


def run(args: list[str]) -> int:
    """Run one command; returns the exit status: 0, or 1 where a command found problems in images."""
    if _help(
        args or ["--help"],
        "COMMAND ...",
        "DualToken-ViT: train, evaluate and use the network.\n\nCommands:",
        {name: command.__doc__ for name, command in COMMANDS.items()},
        "\nRecipes of train and check-data:",
        ABOUT,
        "\nMore: dualtoken-vit COMMAND --help, dualtoken-vit train RECIPE --help",
    ):
        return 0
    if args[0] == "--version":
        print(dualtoken_vit.__version__)
        return 0
    return 1 if COMMANDS[_known("command", args[0], COMMANDS)](args[1:]) is False else 0


def _end(message: str, status: int = 2) -> NoReturn:
    """Exit with one line on stderr; all processes except the first prefix their rank."""
    # set by torchrun, Lightning and srun, in this order where one runs inside another
    rank = next((os.environ[key] for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if key in os.environ), "0")
    print(f"dualtoken-vit{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """The entry point: errors that a user can fix end with one line and status 2."""
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        # An error in a data loading process arrives behind a traceback.
        message = str(error).rpartition(f"{InputError.__module__}.InputError: ")[2]
        _end(f"error: {printable(message.strip())}")
    except ModuleNotFoundError as error:
        _end(f"error: {error}; {INSTALL}")
    except (MemoryError, RuntimeError) as error:
        known = "allocate memory", "start new thread"  # PyTorch's and Python's other errors for lack of memory
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in known):
            raise
        _end("error: out of memory; give smaller images, batches or networks")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _end(f"error: {printable(str(error.filename))[:100]}...: {error.strerror}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        _end(f"error: cannot write{where}: {error.strerror}; what was saved is kept")
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns the former into the latter.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        hints = {"train": "--resume continues from the last save", "study": "repeat the command to resume"}
        hint = str(error) if isinstance(error, KeyboardInterrupt) else ""
        _end("; ".join(filter(None, ("interrupted", hint or hints.get(sys.argv[1])))), 130)


if __name__ == "__main__":
    main()
