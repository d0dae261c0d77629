"""The command line, `dualtoken-vit`: it reads arguments and calls the rest."""

import errno
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import dualtoken_vit
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ABOUT, RECIPES, Classification, Recipe

INSTALL = "install the train extra, in the project's folder: pip install -e '.[train]'"
try:
    import tyro
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:  # a bare install has the models only
    sys.exit(f"dualtoken-vit: error: {error.name} is not installed; {INSTALL}")

DEFAULT = "demo"
R = TypeVar("R", bound=Recipe)  # of any kind

# Commands import what they need themselves: `--help` is quick, and works without what only another command needs.


@dataclass(frozen=True)
class Train(Generic[R]):
    recipe: Annotated[R, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    resume: bool = False
    """Continue the run in that folder where it was interrupted, with the settings it has."""


@dataclass(frozen=True)
class CheckData(Generic[R]):
    recipe: Annotated[R, tyro.conf.arg(name="")]
    out: Path = Path("runs", "check-data")
    """Detection, segmentation: folder for labels.png, a contact sheet of images with their labels drawn."""


@dataclass(frozen=True)
class Study:
    recipe: Annotated[Classification, tyro.conf.arg(name="")]
    preset: Literal["cpu", "gpu"] = "cpu"
    """Budget that the other options start from: two cores for 30 minutes, or one GPU."""
    base: Literal["small", "tiny"] = "small"
    """The DualToken-ViT that an ablation changes: small as in the paper, or tiny. The peers are what they are."""
    seeds: int = 3
    """Runs of each network, with the seeds run.seed, run.seed + 1, ..."""
    jobs: int = 1
    """Runs at a time; they share the processor's cores, or the GPU."""
    out: Path = Path("runs", "study")
    """Folder of the runs, which studies share, and of study-NAME.json, .md, .png; the same call goes on from there."""
    markdown: bool = False
    """Print the table as Markdown."""


@dataclass(frozen=True)
class EvaluationData:
    """The images; what is not given is as in training."""

    dataset: str | None = None
    """folder, shapes, imagenette, or a timm data spec; detection: coco or shapes; segmentation: masks or shapes."""
    root: str | None = None
    """Classification, segmentation: folder of the dataset."""
    val_split: Annotated[str | None, tyro.conf.arg(aliases=("--data.split",))] = None
    """Classification, segmentation: name of the split or folder."""
    holdout: float | None = None
    """Classification: share of each class's training images that was held out; 0: the validation split."""
    images: str | None = None
    """Detection: folder of the images."""
    val_json: str | None = None
    """Detection: COCO json of the images."""
    limit: int | None = None
    """Detection, segmentation: only the first so many images."""
    classes: str | None = None
    """Segmentation: file with the name of a class a line; they must be those of the checkpoint."""
    ignore_index: int | None = None
    """Segmentation: label of the pixels that count for nothing."""
    reduce_zero_label: bool | None = None
    """Segmentation: label 0 is no class; the classes begin at 1."""
    image_size: int | None = None
    """Side of the square that images are resized and cropped to, otherwise their short side, in pixels."""
    mode: Literal["whole", "slide"] | None = None
    """Segmentation: the whole image at once, or windows over it."""
    window: int | None = None
    """Segmentation: side of the windows in pixels."""
    window_stride: int | None = None
    """Segmentation: pixels from one window to the next."""
    scales: tuple[float, ...] | None = None
    """Segmentation: sizes to look at an image in, relative to image_size."""
    flip: bool | None = None
    """Segmentation: look at the mirror image too."""
    max_size: int | None = None
    """Detection: the most that the long side becomes."""
    crop_pct: float | None = None
    """Classification: the short side is resized to image_size / crop_pct and the centre is cropped."""
    unreadable: Literal["stop", "skip"] | None = None
    """Classification: what to do with an image that cannot be read."""
    workers: int | None = None
    """Processes that read images."""


@dataclass(frozen=True)
class Evaluate:
    checkpoint: tyro.conf.Positional[Path]
    """The best.safetensors of a run."""
    data: EvaluationData = field(default_factory=EvaluationData)
    batch_size: int | None = None
    """Images at a time; by default as many as in training."""
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu, mps."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of the network."""
    out: Path | None = None
    """Folder for all that is measured: evaluation.json, plots, in detection the results in COCO's form."""
    json: bool = False
    """Print one JSON object, and nothing else. Classification: top1, top5, loss, images; detection: box, mask, images;
    segmentation: miou, pixel_accuracy, mean_accuracy, per_class, images. Shares are between 0 and 1."""


def _recipe_name(args: list[str], command: str, about: str) -> tuple[str, list[str]]:
    """The recipe that the arguments begin with, and the others.

    The recipe's own arguments are then parsed alone, so that messages speak of no other recipe.
    """
    if args and args[0] in ("-h", "--help"):
        console = Console()
        console.print(f"usage: dualtoken-vit {command} [RECIPE] [--section.field VALUE ...]\n", markup=False)
        console.print(f"{about}\n\nRecipes (without one: {DEFAULT}):")
        console.print(_listing(ABOUT))
        console.print(f"\nEvery field with type, default and meaning: dualtoken-vit {command} RECIPE --help")
        sys.exit()
    if not args or args[0].startswith("-"):
        return DEFAULT, args
    name, *args = args
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; {_nearest(name, RECIPES)}")
    return name, args


def _nearest(name: str, names: Any) -> str:
    near = get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def _listing(abouts: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True)
    for name, about in abouts.items():
        table.add_row(name, about)
    return table


def train(args: list[str]) -> bool:
    """Train a network by a recipe; leaves a folder with its weights, metrics and curves."""
    name, args = _recipe_name(args, "train", train.__doc__)

    def parse(recipe: Recipe) -> Train:
        prog = f"dualtoken-vit train {name}"
        return tyro.cli(Train[type(recipe)], default=Train(recipe), args=args, prog=prog, description=ABOUT[name])

    chosen = parse(RECIPES[name])
    out = chosen.out or Path("runs", name)
    from dualtoken_vit.tasks.trainer import fit, stored_recipe

    stored = stored_recipe(out) if chosen.resume else None
    if stored is not None:
        chosen = parse(stored)
    fit(chosen.recipe, out, chosen.resume)
    return True


def evaluate(args: list[str]) -> bool:
    """Measure a trained network on validation images."""
    chosen = tyro.cli(Evaluate, args=args, prog="dualtoken-vit evaluate", description=evaluate.__doc__)
    from dualtoken_vit.tasks.evaluation import evaluate as run

    data = {key: value for key, value in asdict(chosen.data).items() if value is not None}
    result = run(
        chosen.checkpoint,
        data=data,
        batch_size=chosen.batch_size,
        accelerator=chosen.accelerator,
        precision=chosen.precision,
        out=chosen.out,
    )
    if chosen.json:
        import json

        print(json.dumps(result.to_json()))
    else:
        console = Console()
        console.print(result.table())
        console.print(result.headline())
    return True


def predict(args: list[str]) -> bool:
    """Say and draw what a trained network sees in images."""
    from dualtoken_vit.predict import predict as run

    return _call(run, "predict", args)


def attention(args: list[str]) -> bool:
    """Draw what the image tokens of a trained classifier attend to."""
    from dualtoken_vit.paper.attention import attention as run

    return _call(run, "attention", args)


def localise(args: list[str]) -> bool:
    """Measure how well the attention maps of trained classifiers say where objects are."""
    from dualtoken_vit.paper.localise import localise as run

    _call(run, "localise", args)
    return True


def benchmark(args: list[str]) -> bool:
    """Measure speed, memory and size of timm models side by side."""
    from dualtoken_vit.paper.benchmark import benchmark as run

    _call(run, "benchmark", args)
    return True


def study(args: list[str]) -> bool:
    """Train the networks of one of the paper's comparisons at one equal budget, with several seeds."""
    from dualtoken_vit.paper.study import PRESETS, STUDIES, networks
    from dualtoken_vit.paper.study import study as run

    if args and args[0] in ("-h", "--help"):
        console = Console()
        console.print("usage: dualtoken-vit study STUDY [--preset NAME] [OPTIONS]\n", markup=False)
        console.print(f"{study.__doc__}\n\nStudies:")
        console.print(
            _listing(
                {
                    name: f"{table} of the paper, {len(networks(name, 'small'))} networks"
                    for name, (table, _) in STUDIES.items()
                }
            )
        )
        console.print("\nPresets:")
        console.print(_listing({name: preset.about for name, preset in PRESETS.items()}))
        console.print("\nEvery option with type, default and meaning: dualtoken-vit study STUDY --help")
        return True
    if not args or args[0].startswith("-"):
        raise InputError(f"name the study first: dualtoken-vit study {'|'.join(STUDIES)}")
    name, *args = args
    if name not in STUDIES:
        raise InputError(f"there is no study {name!r}; {_nearest(name, STUDIES)}")
    finder = ArgumentParser(add_help=False, allow_abbrev=False)  # the defaults of all that follows depend on it
    finder.add_argument("--preset", nargs="?", default="cpu")
    preset = PRESETS.get(finder.parse_known_args(args)[0].preset, PRESETS["cpu"])
    default = Study(preset.recipe, base=preset.base, seeds=preset.seeds, jobs=preset.jobs)
    chosen = tyro.cli(Study, default=default, args=args, prog=f"dualtoken-vit study {name}", description=study.__doc__)
    run(name, chosen.recipe, chosen.base, chosen.seeds, chosen.jobs, chosen.out, chosen.markdown)
    return True


def tables(args: list[str]) -> bool:
    """Print the paper's tables beside what is counted and measured here."""
    from dualtoken_vit.paper.tables import tables as run

    _call(run, "tables", args)
    return True


def check_data(args: list[str]) -> bool:
    """Read every image of a recipe's data once and report what is there and what is wrong."""
    name, args = _recipe_name(args, "check-data", check_data.__doc__)
    chosen = tyro.cli(
        CheckData[type(RECIPES[name])],
        default=CheckData(RECIPES[name]),
        args=args,
        prog=f"dualtoken-vit check-data {name}",
        description=f"{check_data.__doc__} {ABOUT[name]}",
    )
    from dualtoken_vit.tasks.base import check_ranges

    check_ranges(chosen.recipe)
    if chosen.recipe.task == "detection":
        from dualtoken_vit.data.check.detection import check_detection_data

        return check_detection_data(chosen.recipe, chosen.out)
    if chosen.recipe.task == "segmentation":
        from dualtoken_vit.data.check.segmentation import check_segmentation_data

        return check_segmentation_data(chosen.recipe, chosen.out)
    from dualtoken_vit.data.check.classification import check_data as run

    return run(chosen.recipe)


def _call(function: Callable, command: str, args: list[str]) -> Any:
    """Call `function` with arguments from the command line; those without a default are positional."""
    return tyro.cli(function, args=args, prog=f"dualtoken-vit {command}", config=(tyro.conf.PositionalRequiredArgs,))


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "attention": attention,
    "localise": localise,
    "benchmark": benchmark,
    "study": study,
    "tables": tables,
    "check-data": check_data,
}


def _help() -> None:
    console = Console()
    console.print("usage: dualtoken-vit COMMAND ...\n\nDualToken-ViT: train, evaluate and use it.\n\nCommands:")
    console.print(_listing({name: command.__doc__ for name, command in COMMANDS.items()}))
    console.print("\nRecipes of train and check-data:")
    console.print(_listing(ABOUT))
    console.print("\nMore: dualtoken-vit COMMAND --help, dualtoken-vit train RECIPE --help")


def run(args: list[str]) -> int:
    """Carry out one command; returns the exit status: 0, or 1 where a command found problems in images."""
    if not args or args[0] in ("-h", "--help"):
        _help()
        return 0
    if args[0] == "--version":
        print(dualtoken_vit.__version__)
        return 0
    if args[0] not in COMMANDS:
        raise InputError(f"there is no command {args[0]!r}; {_nearest(args[0], COMMANDS)}")
    return 0 if COMMANDS[args[0]](args[1:]) else 1


def _end(message: str, status: int = 2) -> NoReturn:
    """End with one line on stderr; of several processes, all but the first say their rank."""
    # set by torchrun, Lightning and srun, in this order where one runs inside another
    rank = next((os.environ[key] for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if key in os.environ), "0")
    print(f"dualtoken-vit{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """The entry point: errors that a user can mend end with one line and status 2."""
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        # A process that reads images hands its error on behind a traceback.
        message = str(error).rstrip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        _end(f"error: {message}")
    except ModuleNotFoundError as error:
        _end(f"error: {error}; {INSTALL}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        _end(f"error: cannot write{where}: {error.strerror}; what was saved is kept")
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns the former into the latter.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        hints = {"train": "; --resume continues from the last save", "study": "; the same command goes on from here"}
        _end(f"interrupted{hints.get(sys.argv[1], '')}", 130)


if __name__ == "__main__":
    main()
