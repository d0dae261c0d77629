"""What the installed command imports before it does anything: each package that it does not need costs a second."""

import json
import os
import subprocess
import sys

import pytest

import dualtoken_vit

HEAVY = {"torch", "torchvision", "timm", "lightning", "torchmetrics", "matplotlib", "scipy", "tensorboard", "wandb"}
QUICK = ["--help", "--version", "train --help", "train folder --help", "train coco --help all", "check-data --help"]
QUICK += ["check-data masks --help", "evaluate --help", "predict --help", "export --help", "convert --help"]


def imported(*commands: str) -> dict[str, list[str]]:
    """The heavy modules that a new process has imported after each of the commands, one after the other."""
    code = (
        "import sys, json, dualtoken_vit_command\n"
        "from contextlib import suppress, redirect_stdout\n"
        "found = {}\n"
        f"for command in {commands!r}:\n"
        "    sys.argv = ['dualtoken-vit', *command.split()]\n"
        "    with suppress(SystemExit), redirect_stdout(sys.stderr):\n"
        "        dualtoken_vit_command.main()\n"
        f"    found[command] = sorted({HEAVY!r} & sys.modules.keys())\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_help_and_version_import_neither_torch_nor_anything_heavy():
    assert imported(*QUICK) == {command: [] for command in QUICK}


@pytest.fixture
def mistakes(tmp_path):
    """Commands, and what they end with."""
    run, other = tmp_path / "run", tmp_path / "last.ckpt"
    run.mkdir()
    (run / "best.safetensors").touch()
    other.write_bytes(b"PK another format")
    folder = f"{run} is a folder, not a checkpoint; give {run / 'best.safetensors'}"
    truncated = f"{run / 'best.safetensors'} cannot be read as a checkpoint: it is truncated or damaged"
    foreign = f"{other} cannot be read as a checkpoint: it is for resuming, or of another program"
    missing = tmp_path / "nothing.onnx"
    (tmp_path / "empty").mkdir()
    one = "give the one that contains"
    return {
        "evaluate nothing.safetensors": "nothing.safetensors: no such checkpoint",
        f"evaluate {missing}": f"{missing}: no such file",
        f"predict {run} photo.jpg": folder,
        f"export {run}": folder,
        f"predict {run / 'best.safetensors'} photo.jpg": truncated,
        f"attention {other} photo.jpg": foreign,
        f"localise {run}": folder,
        "train foldr": "recipe 'foldr' is unknown",
        "train folder --optim.epoch 3": "Unrecognized options: --optim.epoch",
        "train folder --data.image-size 64": "--data.root is missing: give the folder that contains train/CLASS/*.jpg",
        f"train folder --data.root {other}": f"{other}: a file, not a folder; {one} train/CLASS/*.jpg and val/CLASS",
        f"train folder --data.holdout 0.1 --data.root {missing}": f"{missing}: no such folder; {one} CLASS/*.jpg or ",
        f"train multilabel --data.root {missing}": f"{missing}: no such folder; {one} a CSV or Parquet table",
        f"check-data coco --data.root {other}": f"{other}: a file, not a folder; {one} images and labels",
        "train coco-lite --optim.epochs 9": "--data.images is missing: give the folder of the images, or --data.root",
        f"train masks --data.root {tmp_path / 'empty'}": f"empty: an empty folder; {one} images/train, ",
        "train folder --data.root photos --optim.epochs 0": "--optim.epochs 0: must be at least 1",
        f"train folder --data.root {run} --model.checkpoint a/b.pth": "b.pth: no such checkpoint",
        "check-data folder --data.image-size 0": "--data.image-size 0: must be at least",
        "predcit": "command 'predcit' is unknown",
    }


def test_mistakes_are_found_before_torch_is_imported(mistakes, capfd):
    assert imported(*mistakes) == {command: [] for command in mistakes}
    told = " ".join(capfd.readouterr().err.replace("│", " ").split())
    for message in mistakes.values():
        assert message in told


def test_python_m_is_the_command():
    args = [sys.executable, "-X", "importtime", "-m", "dualtoken_vit", "--version"]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert done.stdout == f"{dualtoken_vit.__version__}\n"
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dualtoken_vit_command" in names
    assert not names & HEAVY


def test_a_package_run_by_m_has_the_models(tmp_path):
    """Python imports the package while the name of the program is "-m"."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import dualtoken_vit")
    (package / "__main__.py").write_text("import timm; print(timm.is_model('dualtoken_vit_tiny'))")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    args = [sys.executable, "-m", "mine", "dualtoken_vit"]
    assert subprocess.run(args, capture_output=True, text=True, check=True, cwd=tmp_path, env=env).stdout == "True\n"


def unread(args, unbuffered=""):
    """Run Python with arguments, its stdout a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, *args], stdout=writer, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writer)
    return done


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows end with another error")
@pytest.mark.parametrize(("command", "unbuffered"), [("--version", ""), ("--help", "1"), ("train masks --help", "1")])
def test_output_that_is_not_read_ends_the_command_quietly(command, unbuffered):
    """As after `| head -1`: when it is written at exit, or at once."""
    done = unread(["-m", "dualtoken_vit", *command.split()], unbuffered)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows end with another error")
def test_an_error_is_shown_also_where_output_is_not_read():
    code = (
        "import dualtoken_vit_command\n"
        "from dualtoken_vit import cli\n"
        "def fail():\n"
        "    print('lost')\n"
        "    raise RuntimeError('an error of its own')\n"
        "cli.main = fail\n"
        "dualtoken_vit_command.main()"
    )
    done = unread(["-c", code])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "RuntimeError: an error of its own")


@pytest.mark.parametrize(
    ("stdout", "shown"), [("sys.stdout", "caf\xe9 \\u732b\n"), ("io.StringIO()", "")], ids=["system", "python"]
)
def test_names_outside_of_the_encoding_of_stdout_are_escaped(stdout, shown):
    """And a stdout that cannot be told to do so is taken as it is."""
    code = (
        "import io, sys, dualtoken_vit_command\n"
        "from contextlib import redirect_stdout\n"
        "from dualtoken_vit import cli\n"
        "cli.main = lambda: print('caf\\xe9 \\u732b')\n"
        f"with redirect_stdout({stdout}):\n"
        "    dualtoken_vit_command.main()"
    )
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="cp1252", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_reported(unbuffered):
    args, env = [sys.executable, "-m", "dualtoken_vit", "--version"], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, env=env, text=True)
    error = "dualtoken-vit: error: cannot write: No space left on device; what was saved is kept\n"
    assert (done.returncode, done.stderr) == (2, error)


@pytest.mark.skipif(os.name != "posix", reason="for a POSIX shell")
def test_closed_output_is_discarded():
    """No other file gets its number: what is printed would be written into it."""
    code = (
        "import os, sys, dualtoken_vit_command\n"
        "sys.argv[1:] = ['--version']\n"
        "try:\n"
        "    dualtoken_vit_command.main()\n"
        "finally:\n"
        "    sys.stderr.write(str(os.path.samestat(os.fstat(1), os.stat(os.devnull))))"
    )
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"True")


def test_the_environment_imports_torch_alone():
    assert imported("env") == {"env": ["torch"]}


@pytest.mark.parametrize(
    "statement",
    [
        "from dualtoken_vit import DualTokenViT",
        "import dualtoken_vit.checkpoint",
        "import dualtoken_vit.models.backbone",
        "import dualtoken_vit.paper.modern",
    ],
)
def test_what_creates_networks_by_name_registers_them(statement):
    """In the command, where `import dualtoken_vit` alone does not."""
    code = (
        "import sys, dualtoken_vit_command, dualtoken_vit\n"
        "assert 'timm' not in sys.modules\n"
        f"{statement}\n"
        "import timm\n"
        "print(timm.is_model('dualtoken_vit_tiny'), timm.is_model('lightvit_tiny'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")
