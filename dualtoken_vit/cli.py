"""The command line, `dualtoken-vit`: reads arguments and calls the rest."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any

import dualtoken_vit
from dualtoken_vit.errors import InputError, pip_install
from dualtoken_vit.files import counted, similar
from dualtoken_vit.header import check_file, check_path
from dualtoken_vit.machine import print_environment
from dualtoken_vit.show.ending import end, end_by

INSTALL = f"install the train extra: {pip_install('train')}"
try:
    import tyro

    from dualtoken_vit.arguments import CheckData, Convert, Evaluate, Export, Nothing, Predict, Train, parse_arguments
    from dualtoken_vit.bounds import check_bounds
    from dualtoken_vit.cli_help import EXAMPLES, describe, fill, help_page, only, recipe_rows, section_help, sections
    from dualtoken_vit.recipes import ABOUT, RECIPES, Recipe, flatten
    from dualtoken_vit.show.console import wide_console
except ModuleNotFoundError as error:  # without the train extra, exported files can predict
    if sys.argv[1:] == ["env"]:
        print_environment()
        sys.exit()
    try:
        from dualtoken_vit.cli_runtime import main as predict_exported
    except ModuleNotFoundError:
        print(f"dualtoken-vit: error: {error.name} is not installed; {INSTALL}", file=sys.stderr)
        sys.exit(2)
    predict_exported(sys.argv[1:], INSTALL)

NO_RECIPE = (
    "name the recipe first: folder, multilabel, coco or masks for images of your own, demo for generated ones; "
    "dualtoken-vit {} --help lists all"
)
PRETRAINED = "--model.pretrained"  # true, false or auto: no switch for tyro, which wants True, False or auto

# Commands import what they need themselves: `--help` is quick, and works without another command's dependencies. What
# can be checked before PyTorch is imported, which takes seconds, is checked before.


def _recipe_name(args: list[str], command: str, about: str | None) -> tuple[str, list[str]]:
    """The recipe that the arguments start with ("" where --resume finds it in a folder), and the other arguments.

    The recipe's own arguments are then parsed alone, so that messages do not mention other recipes.
    """
    if help_page(
        args,
        f"{command} RECIPE [--section.field VALUE ...]",
        f"{describe(about, command)}\n\nRecipes (ROOT: the folder of --data.root):",
        recipe_rows(ABOUT),
        f"\nTheir fields with type, default and meaning: dualtoken-vit {command} RECIPE --help",
    ):
        sys.exit()
    if not args or args[0].startswith("-"):
        if command == "train" and "--resume" in args:
            return "", args
        raise InputError(NO_RECIPE.format(command))
    return _known("recipe", args[0], RECIPES), args[1:]


def _checkpoint(args: list[str], command: str, about: str | None, rest: str) -> tuple[Path, list[str]]:
    """The checkpoint that the arguments start with, and the other arguments, whose defaults depend on it."""
    usage = f"{command} CHECKPOINT {rest}"
    exported = "" if command == "export" else "a file that export wrote, "
    about = (
        f"{about} CHECKPOINT is the best.safetensors of a run, {exported}or the name of a network whose weights come "
        "with the package."
    )
    more = f"The options of its task and their defaults: dualtoken-vit {command} CHECKPOINT --help"
    if help_page(args, usage, describe(about, command, more)):
        sys.exit()
    if not args or args[0].startswith("-"):
        raise InputError(f"name the checkpoint first: dualtoken-vit {usage}")
    check_file(Path(args[0]))
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


def _parse(
    default: Any, part: Any, args: list[str], values: dict[str, Any], prog: str, about: str, hint: str = ""
) -> Any:
    """Parse arguments into a command's dataclass, `default`.

    Its field `part` is of the generic type: the class of `part` decides which options there are, and `values` has their
    defaults by name, see `_flags`. `hint` is printed above the error for unknown options.
    """
    kind = type(default)
    kind = kind[type(part)] if hasattr(kind, "__class_getitem__") else kind  # not generic: a study
    return parse_arguments(kind, default, _flags(args, values), f"dualtoken-vit {prog}", about, hint)


def _with_recipe(
    make: Callable[[Any], Any],
    recipe: Any,
    args: list[str],
    prog: str,
    examples: str,
    about: str | None,
    hidden: Sequence[str] = (),
) -> Any:
    """Parse arguments into the dataclass of a command that has the fields of a recipe: `make(recipe)`, its default.

    Sections that are `hidden` have no effect, and so no help.
    """

    def parse(recipe: Any, args: list[str], about: str = "") -> Any:
        return _parse(make(recipe), recipe, args, flatten(recipe), prog, about)

    found = {name: section for name, section in sections(recipe).items() if name not in hidden}
    section_help(args, examples, about, found, lambda shown, args, about: parse(only(recipe, shown), args, about))
    return parse(recipe, args)


def _with_data(
    default: Any, stored: Any, args: list[str], checkpoint: Path, command: str, about: str | None
) -> tuple[Any, dict[str, Any]]:
    """`_parse` with the fields of a stored recipe's data section, and those of them that the arguments change."""
    from dualtoken_vit.runtime.tiles import check_overlap

    prog = f"{command} {checkpoint}"

    def show(shown: Sequence[str], args: list[str], about: str) -> None:
        part = stored if shown else Nothing()
        _parse(replace(default, data=part), part, args, {}, prog, about)

    section_help(args, command, about, {"data": stored}, show)
    short = {"--data.split": "--data.val-split", "--tile": "--data.tile", "--overlap": "--data.overlap"}
    args = [short.get(flag, flag) + equals + value for flag, equals, value in (arg.partition("=") for arg in args)]
    before = asdict(stored)
    flags = {f"data.{key}": value for key, value in before.items()}
    names = (arg.partition("=")[0].removeprefix("--data.") for arg in args if arg.startswith("--data."))
    given = {name.removeprefix("no-").replace("-", "_") for name in names}
    chosen = _parse(default, stored, args, flags, prog, "")
    found = {key: value for key, value in asdict(chosen.data).items() if key in given or value != before[key]}
    check_overlap(chosen.data, args)
    return chosen, found


def _peek(args: list[str], flag: str) -> str | None:
    """The value of a flag on which the defaults of all others depend."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(flag, nargs="?", dest="value")
    return finder.parse_known_args(args)[0].value


def _known(kind: str, name: str, names: Iterable[str]) -> str:
    """The name, if it is one of `names`; else an error with similar ones."""
    if name in names:
        return name
    hint = similar(name, names) or f"there are {', '.join(names)}"
    raise InputError(f"{kind} {name!r} is unknown; {hint}")


def _check(recipe: Recipe) -> None:
    """Raise an InputError for what is wrong with a recipe without a look into its files."""
    check_bounds(recipe)
    recipe.data.check_place()


def train(args: list[str]) -> None:
    """Train a network with a recipe; writes its weights, metrics and curves into a folder."""
    name, args = _recipe_name(args, "train", train.__doc__)

    def parse(recipe: Recipe) -> Train:
        command = f"train {name}".rstrip()
        examples = command if name and command in EXAMPLES else f"train {recipe.task}"
        return _with_recipe(Train, recipe, args, command, examples, ABOUT.get(name))

    if name:
        chosen = parse(RECIPES[name])
        out, resume = chosen.out or Path("runs", name), chosen.resume
    else:
        out, resume = Path(_peek(args, "--out") or "."), True
    if not resume:
        _check(chosen.recipe)
        if chosen.recipe.model.checkpoint:
            check_path(Path(chosen.recipe.model.checkpoint))
    from dualtoken_vit.tasks.run_folder import stored_recipe
    from dualtoken_vit.tasks.trainer import train as run

    stored = stored_recipe(out, name) if resume else None
    if stored is not None:
        chosen = parse(stored)
    elif not name:
        raise InputError(f"--out {out}: no run to resume there; {NO_RECIPE.format('train')}")
    epochs = chosen.recipe.optim.epochs
    if chosen.recipe.run.max_minutes is not None and epochs != (stored or RECIPES[name]).optim.epochs:
        remedy = "it is that of the run" if stored else "leave out one of the two"
        raise InputError(f"--optim.epochs {epochs}: --run.max-minutes sets the epochs; {remedy}")
    run(chosen.recipe, out, chosen.resume, name)


def evaluate(args: list[str]) -> None:
    """Evaluate a trained network on validation images."""
    checkpoint, args = _checkpoint(args, "evaluate", evaluate.__doc__, "[--data.field VALUE ...] [OPTIONS]")
    from dualtoken_vit.evaluation import evaluate as run
    from dualtoken_vit.predictors import read_header, stored_recipe

    stored = stored_recipe(checkpoint, read_header(checkpoint)).data
    chosen, data = _with_data(Evaluate(stored), stored, args, checkpoint, "evaluate", evaluate.__doc__)
    options = {key: value for key, value in vars(chosen).items() if key not in ("data", "json")}
    result = run(checkpoint, data=data, **options)
    if chosen.json:
        print(json.dumps(result.metrics))
    else:
        console = wide_console()
        console.print(result.table())
        images = counted(result.metrics["images"], "image")
        console.print("  ".join(filter(None, (result.headline, result.more, images))), soft_wrap=True)
        for note in result.notes:
            print(note)
    if result.fault:
        raise InputError(result.fault)


def predict(args: list[str]) -> bool:
    """Print and draw the predictions of a trained network for images."""
    checkpoint, args = _checkpoint(args, "predict", predict.__doc__, "IMAGE|FOLDER|VIDEO ... [--out PATH] [OPTIONS]")
    from dualtoken_vit.predict import predict as run
    from dualtoken_vit.runtime.session import is_exported
    from dualtoken_vit.runtime.tiles import check_overlap

    if is_exported(checkpoint):  # needs no PyTorch, and starts in a tenth of the time
        from dualtoken_vit.runtime.predictor import default_options
    else:
        from dualtoken_vit.machine import tune_cpu
        from dualtoken_vit.predictors import default_options

        tune_cpu()
    options = default_options(checkpoint)
    about = describe(predict.__doc__, "predict")
    values = asdict(options)
    flags = (f"--{name.replace('_', '-')}" for name in values)
    hint = f"options for this network: {', '.join(flags)}"
    chosen = _parse(Predict((), options), options, args, values, f"predict {checkpoint}", about, hint)
    check_overlap(chosen.options, args)
    given = {} if chosen.runtime is None else {"runtime": chosen.runtime}  # a checkpoint rejects it
    options = {"device": chosen.device, **given, **asdict(chosen.options)}
    return run(checkpoint, chosen.images, chosen.out, chosen.json, chosen.batch_size, **options)


def export(args: list[str]) -> None:
    """Write a trained network as one file for ONNX Runtime or OpenVINO, verified against PyTorch."""
    checkpoint, args = _checkpoint(args, "export", export.__doc__, "[--out FILE] [--int8 [static]] [OPTIONS]")
    from dualtoken_vit.checkpoint import read_checkpoint
    from dualtoken_vit.deploy.export import export as run
    from dualtoken_vit.evaluation import evaluate as measure
    from dualtoken_vit.predictors import default_options, stored_recipe

    if "--int8" in args and args[args.index("--int8") + 1 :][:1] not in (["dynamic"], ["static"]):
        args.insert(args.index("--int8") + 1, "dynamic")
    recipe = stored_recipe(checkpoint, read_checkpoint(checkpoint, weights=False))
    chosen, data = _with_data(Export(recipe.data), recipe.data, args, checkpoint, "export", export.__doc__)
    if chosen.evaluate and chosen.format != "onnx":
        raise InputError(f"--evaluate: not available for --format {chosen.format}; leave it out")
    if data and not chosen.evaluate:
        raise InputError(f"--data.{next(iter(data)).replace('_', '-')}: for --evaluate; give both, or neither")
    options = {key: value for key, value in vars(chosen).items() if key not in ("data", "evaluate")}
    file = run(checkpoint, **options)
    if chosen.evaluate:
        size = getattr(default_options(file), "image_size", None)  # None: of a detector of a fixed size
        data = data if size is None else {"image_size": size} | data
        for path in (checkpoint, file):
            print(f"{path}: {measure(path, data=data, recipe=recipe).headline}")  # the file has no paths


def study(args: list[str]) -> None:
    """Train the networks of one of the paper's comparisons with an equal budget and several seeds."""
    from dualtoken_vit.paper.study import PRESETS, STUDIES, TRAINING, Study, networks
    from dualtoken_vit.paper.study import study as run

    sizes = {name: len(networks(name, "small")) for name in STUDIES}
    if help_page(
        args,
        "study STUDY [--preset NAME] [OPTIONS]",
        f"{describe(study.__doc__, 'study')}\n\nStudies:",
        {name: f"{table} of the paper, {sizes[name]} networks" for name, (table, _) in STUDIES.items()},
        f"\nPresets (all with {TRAINING.optim.optimizer} and a {TRAINING.optim.schedule} schedule for every network):",
        {name: about for name, (about, _) in PRESETS.items()},
        "\nEvery option with type, default and meaning: dualtoken-vit study STUDY --help",
    ):
        return
    if not args or args[0].startswith("-"):
        raise InputError(f"name the study first: dualtoken-vit study {'|'.join(STUDIES)}")
    name, args = _known("study", args[0], STUDIES), args[1:]
    _, default = PRESETS.get(_peek(args, "--preset") or "cpu", PRESETS["cpu"])

    def make(recipe: Any) -> Study:
        return replace(default, recipe=recipe)

    run(name, _with_recipe(make, default.recipe, args, f"study {name}", "study", study.__doc__))


def check_data(args: list[str]) -> bool:
    """Read all data of a recipe once, report what it holds and what is wrong."""
    name, args = _recipe_name(args, "check-data", check_data.__doc__)
    about = f"{check_data.__doc__} {ABOUT[name]}"
    chosen = _with_recipe(CheckData, RECIPES[name], args, f"check-data {name}", "check-data", about, ("optim",))
    _check(chosen.recipe)
    from dualtoken_vit.tasks.registry import get_task

    if chosen.suspects or "--suspects" in args:  # before all images are read
        from dualtoken_vit import suspects

        if not suspects.open_runs(chosen.recipe, chosen.suspects):
            raise InputError("--suspects: name the folders of one or more training runs")
    sound = get_task(chosen.recipe.task).check_data(chosen.recipe, chosen.out, chosen.augmented)
    if chosen.suspects:
        suspects.report(suspects.rank(chosen.recipe, chosen.suspects), chosen.out)
    return sound


def convert(args: list[str]) -> None:
    """Write images with boxes or polygons in another label format."""
    about = describe(convert.__doc__, "convert")
    chosen = tyro.cli(Convert, args=args, prog="dualtoken-vit convert", description=about)
    from dualtoken_vit.data.convert import convert as run

    run(chosen.source, chosen.target, chosen.to, chosen.format)


PLAIN = (tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff)  # a switch without its opposite


def function(command: str) -> Callable[..., Any]:
    """The function of that name in `paper`, whose parameters are the options of the command."""
    return getattr(import_module(f"dualtoken_vit.paper.{command}"), command)


def _forward(command: str, about: str) -> Callable[[list[str]], Any]:
    def call(args: list[str]) -> Any:
        if command in ("attention", "localise") and args and not args[0].startswith("-"):
            check_file(Path(args[0]))
        chosen = function(command)
        first, *more = (getdoc(chosen) or "").partition("\n\nArgs:")[0].split("\n\n")
        about = describe(first, command, *map(fill, more))
        return tyro.cli(chosen, args=args, prog=f"dualtoken-vit {command}", description=about, config=PLAIN)

    call.__doc__ = about
    return call


def env(args: list[str]) -> None:
    """Print versions and hardware, for bug reports."""
    if not help_page(args, "env", env.__doc__ or ""):
        print_environment()


def completion(args: list[str]) -> None:
    """Print the script for completion in a shell: bash, zsh or fish."""
    if help_page(args, "completion SHELL", describe(completion.__doc__, "completion")):
        return
    from dualtoken_vit.completion import completion as run

    run(args, {command: function(command) for command in FUNCTIONS})


FUNCTIONS = {
    "attention": "Draw the attention maps of a trained classifier.",
    "localise": "Measure how well the attention maps of trained classifiers localise objects.",
    "benchmark": "Measure speed, memory and size of timm models side by side.",
    "tables": "Print the paper's tables next to the figures of this implementation.",
}


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    **{command: _forward(command, about) for command, about in FUNCTIONS.items()},
    "study": study,
    "check-data": check_data,
    "convert": convert,
    "env": env,
    "completion": completion,
}


def run(args: list[str]) -> int:
    """Run one command; returns the exit status: 0, or 1 where a command found problems in images."""
    if help_page(
        args or ["--help"],
        "COMMAND ...",
        f"{describe('DualToken-ViT: train, evaluate and use the network.', '')}\n\nCommands:",
        {name: command.__doc__ for name, command in COMMANDS.items()},
        "\nMore: dualtoken-vit COMMAND --help; dualtoken-vit train --help lists the recipes.",
        "Exit status: 0; 1: problems in images; 2: wrong arguments or input; 130: interrupted.",
    ):
        return 0
    if args[0] == "--version":
        print(dualtoken_vit.__version__)
        return 0
    return 1 if COMMANDS[_known("command", args[0], COMMANDS)](args[1:]) is False else 0


def main() -> None:
    """The entry point: errors that a user can fix end with one line and status 2."""
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except ModuleNotFoundError as error:
        end(f"error: {error}; {INSTALL}")
    except Exception as error:
        end_by(error)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns the former into the latter.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        hints = {"train": "--resume continues from the last save", "study": "repeat the command to resume"}
        hint = str(error) if isinstance(error, KeyboardInterrupt) else ""
        end("; ".join(filter(None, ("interrupted", hint or hints.get(sys.argv[1])))), 130)


if __name__ == "__main__":
    main()
