"""What a run's folder accepts: one training at a time, of one recipe, on the same classes."""

import json
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from helpers import edit, native
from PIL import Image

from dualtoken_vit import RECIPES, cli, train
from dualtoken_vit.data.detection import save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.tasks import run_folder
from dualtoken_vit.tasks.base import TaskModule

SMALL = ("--model.args", "depths=(1,1,1)", "dims=(8,16,32)", "num_heads=(1,2,4)", "head_hidden_size=64")
SETTINGS = (*SMALL, "--data.image-size", "32", "--data.workers", "0", "--optim.batch-size", "12", "--run.device", "cpu")


def call(*args) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture
def run(photos, tmp_path):
    """A run of two epochs, of which the first is done."""
    out = tmp_path / "run"
    assert call("train", "folder", "--data.root", photos, *SETTINGS, "--optim.epochs", 1, "--out", out) == 0
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["optim"]["epochs"] = 2
    (out / "recipe.json").write_text(json.dumps(recipe))
    return photos, out


@pytest.mark.parametrize(
    ("images", "line"), [(99, "only 99 validation images: the metrics are uncertain\n"), (100, "")]
)
def test_few_validation_images_are_noted(tmp_path, monkeypatch, capsys, images, line):
    monkeypatch.setattr(run_folder, "Tracker", lambda *_: SimpleNamespace(log_hyperparams=lambda values: None))
    folder = run_folder.RunFolder(tmp_path, RECIPES["masks"], "masks", {}, begun=True)
    data = SimpleNamespace(images=[9, images])
    task = SimpleNamespace(steps_per_epoch=1, uncertainty=partial(TaskModule.uncertainty, None))
    folder.on_train_start(SimpleNamespace(global_step=0, is_global_zero=True, datamodule=data), task)
    assert capsys.readouterr().out == f"9 training and {images} validation images, 1 step an epoch\n{line}"


def test_another_recipe_is_rejected(run):
    _, out = run
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for other in ("imagenette", "coco-mask-rcnn-1x"):
        with pytest.raises(InputError, match=rf"holds a run of the recipe folder, not {other}; give another --out"):
            call("train", other, "--resume", "--out", out)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert call("train", "--resume", "--out", out) == 0  # of whatever recipe it is


def test_a_folder_in_use_is_rejected(photos, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for more in ((), ("--resume",)):
        with FileLock(out / ".lock"), pytest.raises(InputError, match="is in use by another training"):
            call("train", "folder", "--data.root", photos, *SETTINGS, "--out", out, *more)
    assert [path.name for path in out.iterdir()] in ([], [".lock"])


def test_a_killed_run_leaves_its_folder_free(photos, tmp_path):
    """The lock is the system's: it ends with the process."""
    out = tmp_path / "run"
    code = (
        "import sys, os, signal\nfrom pathlib import Path\nfrom dualtoken_vit.tasks.run_folder import in_use\n"
        "with in_use(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == -9
    assert (out / ".lock").exists()
    assert call("train", "folder", "--data.root", photos, *SETTINGS, "--optim.epochs", 1, "--out", out) == 0
    assert not (out / ".lock").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("white", None), "added 'white'"),
        ((None, "red"), "missing 'red'"),
        (("pink", "red"), "added 'pink' and missing 'red'"),
    ],
)
def test_changed_classes_are_named(run, change, message):
    photos, out = run
    added, removed = change
    for split in ("train", "val"):
        if removed:
            (photos / split / removed).rename(photos.parent / f"{split}-{removed}")
        if added:
            (photos / split / added).mkdir()
            Image.new("RGB", (32, 32)).save(photos / split / added / "0.png")
    with pytest.raises(
        InputError, match=re.escape(f"the classes changed since the run in {out} began: {message}; restore them")
    ):
        call("train", "folder", "--resume", "--out", out)


def test_unverified_data(photos, tmp_path, capsys):
    """Nothing is read before the first step; what cannot be read stops the run where it is met."""
    (photos / "val" / "red" / "0.jpg").write_bytes(b"no image")
    args = ("train", "folder", "--data.root", photos, *SETTINGS, "--optim.epochs", 1)
    for switch in (("--data.no-verify",), ("--data.verify", "false")):
        with pytest.raises(InputError, match=native(r"val/red/0\.jpg: cannot be read as an image")):
            call(*args, *switch, "--out", tmp_path / switch[-1])
        assert "reading every image" not in capsys.readouterr().err
    with pytest.raises(InputError, match=native(r"val/red/0\.jpg: cannot be read as an image")):
        call(*args, "--out", tmp_path / "verified")
    assert not (tmp_path / "verified").exists()


def test_a_run_without_a_recorded_recipe(run):
    """Of an early version or from Python: its task must be the named recipe's, and its state this version's."""
    _, out = run
    stored = json.loads((out / "recipe.json").read_text())
    assert stored.pop("recipe") == "folder"
    (out / "recipe.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="holds a run of classification, not coco; give another --out"):
        call("train", "coco", "--resume", "--out", out)
    with pytest.raises(InputError, match="holds a run of classification, not detection; give another --out"):
        train(RECIPES["coco"], out, resume=True)
    assert run_folder.stored_recipe(out, "a name of its own") == run_folder.stored_recipe(out, "")
    assert call("train", "folder", "--resume", "--out", out) == 0
    last = torch.load(out / "last.ckpt")
    last["run"]["pictures"] = last["run"].pop("images")  # as the first version wrote it
    torch.save(last, out / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt is of an older version and cannot be resumed"):
        call("train", "folder", "--resume", "--out", out)


def test_a_checkpoint_of_the_first_version(run, capsys):
    """Its recipe names the device otherwise and has fewer fields; it is evaluated all the same."""
    _, out = run
    path = out / "best.safetensors"
    assert call("evaluate", path, "--json", "--device", "cpu") == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])

    def older(metadata):
        recipe = json.loads(metadata["recipe"])
        recipe["run"]["accelerator"] = recipe["run"].pop("device")
        for key in ("verify", "start_size"):
            del recipe["data"][key]
        return metadata | {"recipe": json.dumps(recipe)}

    edit(path, path, metadata=older)
    assert call("evaluate", path, "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == expected


def test_evaluation_flags_that_repeat_the_stored_value(photos, tmp_path, capsys):
    """A flag that is given counts, even if its value is the stored one; what it replaces is dropped."""
    scenes, out = tmp_path / "scenes", tmp_path / "run"
    save_scenes(scenes, size=64, train=8, val=6)
    json_of = "{}/annotations/instances_{}.json".format
    data = ("--data.images", scenes / "images", "--data.train-json", json_of(scenes, "train"))
    data += ("--data.val-json", json_of(scenes, "val"), "--data.limit", 4)
    small = ("--model.name", "dualtoken_vit_tiny", *SMALL, "--data.image-size", 64, "--data.max-size", 64)
    run = ("--optim.batch-size", 4, "--optim.epochs", 1, "--data.workers", 0, "--run.device", "cpu")
    assert call("train", "coco", *data, *small, *run, "--out", out) == 0
    for more, images in (((), 4), (("--data.val-json", json_of(scenes, "val")), 6)):
        both = (*more, "--data.limit", 4)
        for given, count in ((more, images), (both, 4)):
            capsys.readouterr()
            assert call("evaluate", out / "best.safetensors", *given, "--json", "--device", "cpu") == 0
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == count


def test_a_run_without_its_recipe(tmp_path):
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(InputError, match=r"has no recipe\.json, without which no run is resumed"):
        train(RECIPES["demo"], tmp_path, resume=True)


def test_the_lock_of_a_folder_is_gone_before_it_is_free(tmp_path, monkeypatch):
    """Else another training could take a file that is removed then, and a third one a new one."""
    there = []
    release = FileLock.release

    def look(lock, **args):
        there.append((tmp_path / ".lock").exists())
        release(lock, **args)

    monkeypatch.setattr(FileLock, "release", look)
    with run_folder.in_use(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert there[0] is False
