"""The command line as a user meets it: what it says, how it ends, and one whole way from images to predictions."""

import errno
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dualtoken_vit
from dualtoken_vit import cli
from dualtoken_vit.arguments import Evaluate
from dualtoken_vit.cli_help import EXAMPLES
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ABOUT, RECIPES

TINY = (
    "--model.name",
    "dualtoken_vit_tiny",
    "--model.args",
    "dims=(16,32,32)",
    "depths=(1,1,1)",
    "head_hidden_size=32",
)
OF_RECIPES = [
    f"{command} {name}" for command in ("train", "check-data") for name in ("folder", "coco", "multilabel", "masks")
]
OF_CHECKPOINTS = [
    f"{command} dualtoken_vit_tiny_mix" for command in ("evaluate", "predict", "export")
]  # in the package


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `dualtoken-vit ARGS`; returns (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dualtoken-vit", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def words(text):
    """The text without the boxes and line breaks of the terminal."""
    return " ".join(text.replace("│", " ").split())


def test_help_names_commands_and_recipes(call):
    for args in (("train", "--help"), ("check-data", "-h")):
        status, out, _ = call(*args)
        assert status == 0
        rows = dict(line.split(maxsplit=1) for line in out.partition("Recipes")[2].splitlines()[1:-2])
        for name, about in ABOUT.items():
            if re.match(r"table\d", name):  # one row for each of the paper's tables
                row = next(row for row in rows if row[-1] == "*" and name.startswith(row[:-1]))
                assert name.removeprefix(row[:-1]) in re.split("[,:.] ?", rows[row].strip())
            else:
                assert rows[name].strip() == about
    for args in ((), ("--help",)):
        status, out, _ = call(*args)
        assert status == 0
        for name, command in cli.COMMANDS.items():
            assert f" {name} {words(command.__doc__)}" in words(out)


def test_help_of_a_recipe_names_every_field_with_its_default(call):
    status, out, _ = call("train", "in1k-tiny-mix", "--help", "all")
    assert status == 0
    out = words(out)
    assert "Table 2, DualToken-ViT-T (mix): 75.4 %" in out
    for section in ("model", "data", "augment", "optim", "run"):
        for field in fields(getattr(RECIPES["in1k-tiny-mix"], section)):
            assert f"--{section}.{field.name.replace('_', '-')}" in out
    assert "--model.name STR Any timm model name" in out
    assert "(default: dualtoken_vit_tiny_mix)" in out
    assert "--optim.epochs INT Training epochs. (default: 300)" in out
    assert "--out" in out
    assert "--resume" in out


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, *OF_RECIPES, "study mlp", *OF_CHECKPOINTS])
def test_help_begins_with_examples_and_fits_on_a_screen(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(*command.split(), "--help")
    assert status == 0
    assert out.startswith(f"usage: dualtoken-vit {command}")
    assert sum(max(1, -(-len(line.rstrip()) // 80)) for line in out.splitlines()) <= 48  # as the terminal wraps them
    if command not in ("", "env"):
        assert f"\nExamples:\n  dualtoken-vit {command.split()[0]}" in out.split("options")[0]


def test_examples_are_whole_lines_in_a_narrow_terminal(call, monkeypatch):
    """A command that is broken over lines cannot be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in cli.COMMANDS.keys() - {"env"} | {"", "train folder", "train coco"}:
        key = {"train folder": "train classification", "train coco": "train detection"}.get(command, command)
        lines = call(*command.split(), "--help")[1].splitlines()
        assert {f"  dualtoken-vit {example}" for example in EXAMPLES[key]} <= {*lines}


def test_help_of_a_section_names_its_fields_alone(call):
    flags = {"lr", "epochs", "batch-size"}
    overview, section = (call("train", "folder", "--help", *more)[1] for more in ((), ("optim",)))
    assert flags <= set(re.search(r"--optim\.\*(.*?)--run", words(overview)).group(1).split())
    assert set(re.findall(r"--(\w+)\.\w", overview.split("Fields")[1])) == set()
    assert set(re.findall(r"--(\w+)\.", section.partition("Examples:")[2].partition("\n\n")[2])) == {"optim"}
    assert all(f"--optim.{flag} " in section for flag in flags)
    assert "Peak learning rate" in section
    status, _, err = call("train", "folder", "--help", "optin")
    assert status == 2
    assert "--help optin: there are data, model, optim, run, augment, distill, and all" in err


def test_the_environment_has_versions_and_hardware(call):
    status, out, _ = call("env")
    assert status == 0
    found = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert found["dualtoken-vit"].split()[0] == dualtoken_vit.__version__
    assert {name: found[name] for name in ("torch", "timm", "numpy")} == {
        name: version(name) for name in ("torch", "timm", "numpy")
    }
    assert platform.python_version() in found["system"]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert f"{usable} cores" in found["CPU"]


def test_the_environment_needs_no_other_package():
    """As a bug report of a failed install needs it: neither torch nor any package of an extra can be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'tyro', 'rich', 'numpy', 'PIL'): sys.modules[name] = None\n"
        "sys.argv = ['dualtoken-vit', 'env']\n"
        "import dualtoken_vit_command\n"
        "dualtoken_vit_command.main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert f"dualtoken-vit        {dualtoken_vit.__version__}" in found.stdout
    assert "accelerators" not in found.stdout


@pytest.mark.slow
def test_bash_completes_commands_recipes_and_flags(call, tmp_path):
    script = tmp_path / "completion"
    script.write_text(call("completion", "bash")[1])
    ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tyro_dualtoken_vit; echo "${COMPREPLY[@]}"'

    def complete(*typed):
        done = subprocess.run(["bash", "-c", ask, script, "dualtoken-vit", *typed], capture_output=True, text=True)
        return set(done.stdout.split())

    assert complete("") >= {*cli.COMMANDS}
    assert complete("train", "folder", "--optim.ep") == {"--optim.epochs"}
    assert complete("train", "coco", "--detector", "") == {"retinanet", "mask-rcnn", "fcos", "ssdlite"}
    assert complete("convert", "--t") == {"--to"}
    assert "--modes" in complete("benchmark", "--")
    assert complete("train", "table7-grid-") == {name for name in RECIPES if name.startswith("table7-grid-")}
    assert call("completion", "csh")[0] == 2


def test_the_documented_exit_statuses_are_those_of_these_tests():
    page = (Path(__file__).parents[1] / "docs/reference/command-line.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert documented == ["0", "1", "2", "130", "141"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "command 'trian' is unknown; did you mean train?"),
        (["train", "foldr"], "recipe 'foldr' is unknown; did you mean folder?"),
        (["train", "in1k-smal"], "did you mean in1k-small"),
        (["train", "folder", "--optim.epoch", "3"], "--optim.epochs INT"),
        (["train", "folder", "--data.rot", "photos"], "--data.root STR"),
        (["train", "folder", "--optim.epochs", "many"], "invalid literal for int() with base 10: 'many'"),
        (["train", "folder", "--run.precision", "bf16"], "('32-true', 'bf16-mixed', '16-mixed')"),
        (["train", "folder"], "--data.root is missing"),
        (["train", "folder", "--data.root", "nowhere"], "nowhere: no such folder"),
        (["check-data", "folder", "--data.root", "nowhere"], "nowhere: no such folder"),
        (["check-data", "masks", "--data.limit", "0"], "--data.limit 0: must be at least 1"),
        (["evaluate", "nothing.safetensors"], "nothing.safetensors: no such checkpoint"),
        (["evaluate"], "name the checkpoint first: dualtoken-vit evaluate CHECKPOINT"),
        (["predict", "nothing.safetensors", "nothing.jpg"], "nothing"),
        (
            ["export", "dualtoken_vit_tiny_mix", "--data.root", "x"],
            "--data.root: for --evaluate; give both, or neither",
        ),
        (["export", "dualtoken_vit_tiny_mix", "--format=litert", "--evaluate"], "not available for --format litert"),
        (["benchmark", "dualtoken_vit_tinny"], "dualtoken_vit_tiny"),
        *(
            ([command, "dualtoken_vit_tiny_mix", "--device", "gpu"], "invalid choice 'gpu' for argument '--device'")
            for command in ("attention", "localise", "benchmark", "evaluate", "predict")
        ),
    ],
)
def test_mistakes_are_told_in_short(call, args, message):
    status, out, err = call(*args)
    assert status == 2
    assert message in words(out + err)
    assert "Traceback" not in err
    assert len((out + err).splitlines()) <= 14


def test_only_the_flags_of_the_data_name_other_data():
    """A folder may be called like a field."""
    stored = RECIPES["folder"].data

    def named(*args):
        return cli._with_data(Evaluate(stored), stored, list(args), Path("best.safetensors"), "evaluate", "")[1]

    assert named("--out", "root") == {}
    assert named("--data.root", "") == {"root": ""}
    assert named("--data.split=test") == named("--data.val-split", "test") == {"val_split": "test"}
    assert named("--data.no-verify") == named("--data.verify", "false") == {"verify": False}


def test_from_images_to_predictions(call, photos, tmp_path):
    run, shots = tmp_path / "run", tmp_path / "predictions"
    settings = {"data.image-size": 32, "optim.epochs": 2, "optim.batch-size": 12, "run.device": "cpu"}
    given = [text for key, value in settings.items() for text in (f"--{key}", value)]
    assert call("check-data", "folder", "--data.root", photos)[0] == 0

    status, out, _ = call("train", "folder", "--data.root", photos, *given, *TINY, "--data.workers", "0", "--out", run)
    assert status == 0
    assert "0.07 M parameters; classes: 3" in out
    few = "only 18 validation images: top-1 is uncertain by up to 23 percentage points"  # 1.96 * sqrt(0.25 / 18)
    assert f"36 training and 18 validation images, 3 steps an epoch\n{few}\n" in out
    assert "epoch 2/2" in out
    assert "top-5" not in out
    assert "calibration error" not in out
    assert f"dualtoken-vit evaluate {run / 'best.safetensors'}" in out

    status, out, _ = call("evaluate", run / "best.safetensors", "--json", "--device", "cpu")
    assert status == 0
    found = json.loads(out)
    assert list(found) == ["top1", "mean_accuracy", "precision", "f1", "loss", "ece", "images", "per_class"]
    assert found["per_class"].keys() == {"red", "green", "blue"}
    assert found["top1"] == pytest.approx(np.mean([one["top1"] for one in found["per_class"].values()]), abs=1e-6)
    assert found["images"] == 18
    assert 0 <= found["top1"] <= 1
    assert "top5" not in (run / "metrics.csv").read_text() + (run / "evaluation.json").read_text()  # of three classes

    status, out, _ = call("evaluate", run / "best.safetensors", "--device", "cpu")
    assert status == 0
    assert f"top-1 {found['top1']:.2%}  calibration error {found['ece']:.1%}  18 images\n" in out
    assert "green" in out

    status, out, _ = call("predict", run / "best.safetensors", photos / "val" / "red", "--json", "--out", shots)
    assert status == 0
    assert len(json.loads(out)["predictions"]) == 6
    assert len(list(shots.rglob("*.png"))) >= 6

    status, _, err = call("train", "folder", "--data.root", photos, *given, *TINY, "--out", run)
    assert status == 2
    assert "holds a run; continue it with --resume, or give another --out" in err


def test_a_image_that_breaks_while_it_is_read(call, photos, tmp_path):
    """In a worker process, which hands on a traceback: one line remains."""
    run = tmp_path / "run"
    args = ("--data.image-size", 32, "--optim.epochs", 1, "--optim.batch-size", 12, "--run.device", "cpu")
    assert call("train", "folder", "--data.root", photos, *args, *TINY, "--out", run)[0] == 0
    broken = photos / "val" / "red" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    status, out, err = call("evaluate", run / "best.safetensors", "--data.workers", 1, "--device", "cpu", "--json")
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("dualtoken-vit: error: ")]
    assert len(lines) == 1
    assert str(Path("red/0.jpg")) in lines[0]
    skip = ("--data.unreadable", "skip", "--device", "cpu", "--json")
    assert json.loads(call("evaluate", run / "best.safetensors", *skip)[1])["images"] == 17


TASKS = {"classification", "detection", "multilabel", "segmentation"}


@pytest.mark.parametrize(
    "args", [["train"], ["train", "--optim.epochs", "1"], ["check-data"], ["check-data", "--out", "x"]]
)
def test_without_a_recipe_nothing_starts(call, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"dualtoken-vit {args[0]} --help lists all" in err
    named = re.search("name the recipe first: (.*) for images of your own, (.*) for generated ones", err)
    assert {RECIPES[name].task for name in re.split(", | or ", named[1])} == TASKS
    assert RECIPES[named[2]].data.dataset == "shapes"
    assert list(tmp_path.iterdir()) == []


def test_resuming_without_a_recipe_needs_a_run(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (["--resume"], ["--resume", "--out", "nowhere"]):
        status, _, err = call("train", *args)
        assert status == 2
        assert f"--out {args[2] if args[2:] else '.'}: no run to resume there; name the recipe first" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, ""),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, " (rank 1)"),  # Lightning's own processes in a job of Slurm
        ({"RANK": "2", "LOCAL_RANK": "0"}, " (rank 2)"),  # torchrun on the second machine
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, " (rank 3)"),
    ],
)
def test_every_process_tells_its_errors(call, monkeypatch, env, rank):
    def broken(args):
        raise InputError("red/0.jpg: damaged")

    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(cli.COMMANDS, "tables", broken)
    assert call("tables") == (2, "", f"dualtoken-vit{rank}: error: red/0.jpg: damaged\n")


def test_an_interrupt_ends_with_one_line(call, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "tables", interrupted)
    assert call("tables") == (130, "", "dualtoken-vit: interrupted\n")

    def through_lightning(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setitem(cli.COMMANDS, "tables", through_lightning)
    assert call("tables") == (130, "", "dualtoken-vit: interrupted\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: out of memory; give smaller images, batches or networks"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "error: out of memory; give smaller images"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "b"), "error: out of memory; give smaller images"),
        (ImportError("b.so: failed to map segment from shared object"), "error: out of memory; give smaller images"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000), f"error: {'a' * 100}...: File name too long"),
        (OSError(errno.EROFS, "Read-only file system", "b"), "error: cannot write b: Read-only file system; what was"),
        (OSError(errno.EACCES, "Permission denied", "no\nb"), r"error: cannot read or write no\nb: Permission"),
        (OSError(errno.EACCES, "Permission denied", os.devnull), f"error: cannot write {os.devnull}: Permission"),
    ],
)
def test_errors_of_the_system_end_with_one_line(call, monkeypatch, error, line):
    def broken(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "tables", broken)
    status, out, err = call("tables")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"dualtoken-vit: {line}")


def test_what_cannot_be_read(call, monkeypatch, tmp_path):
    def broken(args):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setitem(cli.COMMANDS, "tables", broken)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # to root all is readable
    assert call("tables")[2].startswith(f"dualtoken-vit: error: cannot read {tmp_path}: Permission denied")


def test_problems_in_the_data_set_the_status(call, photos):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(photos / "train" / "red" / "twin.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(photos / "val" / "red" / "twin.png")
    status, out, _ = call("check-data", "folder", "--data.root", photos)
    assert status == 1
    assert "twin.png" in out


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("passive", "1000")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", "None")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
    ],
)
def test_threads_wait_shortly_unless_the_user_decided(given, found):
    """Set before PyTorch is imported, whose OpenMP reads it once."""
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    code = (
        "import os, sys, dualtoken_vit_command\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv = ['dualtoken-vit', 'env']\n"
        "sys.meta_path.insert(0, type('Spy', (), {'find_spec': staticmethod(\n"
        f"    lambda name, *args: print(*map(os.environ.get, {names})) if name == 'torch' else None)}}))\n"
        "dualtoken_vit_command.main()\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in names} | given
    finished = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert tuple(finished.stdout.split()[:2]) == found, finished.stderr
