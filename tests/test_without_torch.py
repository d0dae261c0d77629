"""Predictors and the command of exported files where PyTorch is not installed."""

import errno
import json
import os
import shutil
import subprocess
import sys
import venv
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from PIL import Image
from tiny_files import description, save_segmenter

from dualtoken_vit import cli, cli_runtime, load_predictor
from dualtoken_vit.arguments import Predict
from dualtoken_vit.errors import InputError
from dualtoken_vit.runtime import predictor as runtime
from dualtoken_vit.show.drawing import MARGIN, SIDE


@pytest.mark.parametrize(
    ("task", "args", "options"),
    [
        ("classification", ["--top-k", "2"], {"top_k": 2, "image_size": 64}),
        ("multilabel", ["--threshold", "0.3"], {"threshold": 0.3, "image_size": 64}),
        ("multilabel", [], {"threshold": None}),
        ("segmentation", ["--image-size", "48"], {"image_size": 48}),
        ("stored", [], {"image_size": 512}),
        ("stored", ["--image-size", "48"], {"image_size": 48}),
        ("detection", ["--tile", "96"], {"tile": 96, "overlap": 0.2}),
        ("detection", ["--score", "0.2", "b.png"], {"score": 0.2, "images": [Path("a.png"), Path("b.png")]}),
        ("detection", ["--tile", "96", "--overlap", "0.5"], {"tile": 96, "overlap": 0.5}),
    ],
)
def test_arguments_without_pytorch(tmp_path, monkeypatch, task, args, options):
    about = description("segmentation" if task == "stored" else task)
    about["recipe"]["data"] |= {"image_size": 512} if task == "stored" else {}
    monkeypatch.setattr(runtime, "read_description", lambda path: about)
    found = cli_runtime.parse(tmp_path / "model.onnx", ["a.png", *args])
    assert {"images": [Path("a.png")], **options}.items() <= found.items()


def test_a_whole_number_of_a_stored_option_allows_others(tmp_path, monkeypatch):
    about = description("classification")
    about["preprocessing"]["crop_pct"] = 1
    monkeypatch.setattr(runtime, "read_description", lambda path: about)
    assert cli_runtime.parse(tmp_path / "model.onnx", ["a.png"])["crop_pct"] == 1
    assert cli_runtime.parse(tmp_path / "model.onnx", ["a.png", "--crop-pct", "0.9"])["crop_pct"] == 0.9


def test_overlap_without_tiles_and_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "read_description", lambda path: description("detection"))
    with pytest.raises(InputError, match="--overlap is that of tiles: give --tile too"):
        cli_runtime.parse(tmp_path / "model.onnx", ["a.png", "--overlap", "0.3"])


@pytest.mark.parametrize(("flag", "hint"), [("--ouput", "did you mean --out?"), ("--threads", "--help lists all")])
def test_unknown_options_without_pytorch(tmp_path, monkeypatch, flag, hint):
    monkeypatch.setattr(runtime, "read_description", lambda path: description("detection"))
    with pytest.raises(InputError) as error:
        cli_runtime.parse(tmp_path / "model.onnx", ["a.png", flag, "0.5"])
    assert str(error.value) == f"{flag}: no such option; {hint}"


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("task", ["classification", "multilabel", "detection", "segmentation"])
def test_help_without_pytorch_has_the_text_of_every_option(tmp_path, monkeypatch, capsys, task, raw):
    """That which tyro shows where the train extra is installed."""
    about = description(task, raw=raw)
    monkeypatch.setattr(runtime, "read_description", lambda path: about)
    with pytest.raises(SystemExit):
        cli_runtime.parse(tmp_path / "model.onnx", ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    options = runtime.default_options(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other public description of its flags
        parser = tyro.extras.get_parser(Predict[type(options)], default=Predict((), options))
    texts = {action.dest: action.help.partition(" (default")[0] for action in parser._actions}
    assert len(texts) > 7
    for name in texts.keys() - {"help", "device"}:
        assert len(texts[name]) > 20
        assert "".join(texts[name].split()) in shown
        assert f"--{name.rpartition('.')[2].replace('_', '-')}" in shown or name == "images"


BLOCK = """
import sys
for name in ("torch", "timm", "torchvision", "lightning", "rich", "tyro", "annotated_types", "matplotlib", "scipy"):
    sys.modules[name] = None
"""


def test_a_checkpoint_needs_pytorch(tmp_path):
    with pytest.raises(InputError, match=r"best\.safetensors: a checkpoint needs PyTorch; dualtoken-vit export writes"):
        runtime.load_predictor(tmp_path / "best.safetensors")


def test_without_torch(classifier, image, tmp_path, capsys):
    """In a process that cannot import torch: the same predictions and drawings, from Python and on the command line."""
    image.save(tmp_path / "image.png")
    args = ["predict", str(classifier), str(tmp_path / "image.png"), "--json"]
    code = (
        f"{BLOCK}from dualtoken_vit import load_predictor\n"
        f"result = load_predictor({str(classifier)!r})({str(tmp_path / 'image.png')!r})\n"
        "print(result.labels.tolist(), result.probabilities.tolist())\n"
        f"sys.argv = {['dualtoken-vit', *args, '--out', str(tmp_path / 'bare')]!r}\n"
        "from dualtoken_vit.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    result = load_predictor(classifier)(tmp_path / "image.png")
    assert first == f"{result.labels.tolist()} {result.probabilities.tolist()}"
    assert cli.run([*args, "--out", str(tmp_path / "full")]) == 0
    assert second == capsys.readouterr().out.strip()
    bare, full = (np.asarray(Image.open(tmp_path / name / "image.png.png")) for name in ("bare", "full"))
    assert bare.shape == full.shape
    assert np.array_equal(bare[:, : SIDE + MARGIN], full[:, : SIDE + MARGIN])  # beside it there is text, in other fonts


def test_errors_of_the_system_end_with_one_line_without_pytorch(classifier, monkeypatch, capsys):
    def ended(*args):
        with pytest.raises(SystemExit) as end:
            cli_runtime.main([*args], "")
        return end.value.code, capsys.readouterr().err

    def fill():
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **options):
        raise MemoryError

    long = f"dualtoken-vit: error: {'a' * 100}...: File name too long\n"
    assert ended("predict", str(classifier), "a" * 300) == (2, long)
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", SimpleNamespace(write=len, flush=fill))
        full = "dualtoken-vit: error: cannot write: No space left on device; what was saved is kept\n"
        assert ended("--version") == (2, full)
    monkeypatch.setattr(cli_runtime, "predict", fail)
    memory = "dualtoken-vit: error: out of memory; give smaller images, batches or networks\n"
    assert ended("predict", str(classifier), "a.png") == (2, memory)


def test_the_command_predicts_without_importing_torch(classifier, image, tmp_path):
    """Where it is installed: its import would take most of the time."""
    image.save(tmp_path / "image.png")
    args = ["predict", str(classifier), str(tmp_path / "image.png"), "--json", "--device", "cpu"]
    code = (
        "import sys, dualtoken_vit_command\n"
        f"sys.argv = {['dualtoken-vit', *args]!r}\n"
        "try: dualtoken_vit_command.main()\n"
        "finally: print([name for name in ('torch', 'timm', 'lightning') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    record, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    (entry,) = json.loads(record)["predictions"]
    result = load_predictor(classifier)(image)
    assert [one["probability"] for one in entry["classes"]] == pytest.approx(result.probabilities.tolist(), abs=1e-6)


@pytest.mark.slow
def test_the_runtime_extra_alone_is_enough(classifier, image, tmp_path):
    """A wheel of this tree in an empty environment, without torch, predicts the same."""
    image.save(tmp_path / "image.png")
    root, source = Path(__file__).parents[1], tmp_path / "source"
    shutil.copytree(root / "dualtoken_vit", source / "dualtoken_vit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "dualtoken_vit_command.py"):
        shutil.copy(root / name, source)
    venv.create(tmp_path / "env", with_pip=True)
    (programs,) = (path for path in (tmp_path / "env").iterdir() if path.name in ("bin", "Scripts"))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(program: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([programs / program, *args], capture_output=True, text=True, cwd=tmp_path, env=env)

    installed = call("pip", "install", f"{source}[runtime]")
    if "Failed to establish a new connection" in installed.stderr:
        pytest.skip("no network for pip")
    assert installed.returncode == 0, installed.stderr
    listed = {line.partition("=")[0].lower() for line in call("pip", "list", "--format=freeze").stdout.splitlines()}
    assert {"dualtoken-vit", "numpy", "onnxruntime", "pillow"} <= listed
    assert not listed & {"torch", "timm", "torchvision", "lightning", "matplotlib", "rich"}
    weights = list((root / "dualtoken_vit" / "weights").iterdir())
    packed = {path.name: path.read_bytes() for path in (tmp_path / "env").rglob("dualtoken_vit/weights/*")}
    assert packed == {path.name: path.read_bytes() for path in weights}
    done = call("dualtoken-vit", "predict", str(classifier), "image.png", "--json", "--out", "out")
    assert (done.returncode, done.stderr) == (0, "")
    (entry,) = json.loads(done.stdout)["predictions"]
    result = load_predictor(classifier)(image)
    assert [one["class"] for one in entry["classes"]] == list(result.names)
    assert [one["probability"] for one in entry["classes"]] == pytest.approx(result.probabilities.tolist(), abs=1e-6)
    assert (tmp_path / "out" / "image.png.png").is_file()
    for args in (["train"], ["predict", "best.safetensors", "image.png"]):
        refused = call("dualtoken-vit", *args)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert cli.INSTALL in refused.stderr
    helped = [call("dualtoken-vit", *args) for args in ([], ["--help"], ["predict"], ["predict", "--help"])]
    assert [(done.returncode, done.stdout) for done in helped] == [(0, f"{cli_runtime.USAGE}\n")] * 4


@pytest.mark.parametrize(("args", "expected"), [([], True), (["--no-flip"], False), (["--flip"], True)])
def test_a_stored_switch_can_be_turned_off(tmp_path, args, expected):
    path = save_segmenter(tmp_path / "segmenter.onnx", recipe={"data": {"image_size": None, "flip": True}})
    assert cli_runtime.parse(path, ["a.png", *args])["flip"] is expected
