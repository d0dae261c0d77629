"""What a run's folder accepts: one training at a time, of one recipe, on the same classes."""

import subprocess
import sys

import pytest
from filelock import FileLock
from PIL import Image

from dualtoken_vit import cli
from dualtoken_vit.errors import InputError

SMALL = ("--model.args", "depths=(1,1,1)", "dims=(8,16,32)", "num_heads=(1,2,4)", "head_hidden_size=64")
SETTINGS = (*SMALL, "--data.image-size", "32", "--data.workers", "0", "--optim.batch-size", "12", "--run.device", "cpu")


def call(*args) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture
def run(photos, tmp_path):
    """A run of two epochs, of which the first is done."""
    out = tmp_path / "run"
    assert call("train", "folder", "--data.root", photos, *SETTINGS, "--optim.epochs", 1, "--out", out) == 0
    return photos, out


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
    with pytest.raises(InputError, match=f"the classes changed since the run in {out} began: {message}; restore them"):
        call("train", "folder", "--resume", "--out", out)


def test_unverified_data(photos, tmp_path, capsys):
    """Nothing is read before the first step; what cannot be read stops the run where it is met."""
    (photos / "val" / "red" / "0.jpg").write_bytes(b"no image")
    args = ("train", "folder", "--data.root", photos, *SETTINGS, "--optim.epochs", 1)
    for switch in (("--data.no-verify",), ("--data.verify", "false")):
        with pytest.raises(InputError, match=r"val/red/0\.jpg: cannot be read as an image"):
            call(*args, *switch, "--out", tmp_path / switch[-1])
        assert "reading every image" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"val/red/0\.jpg: cannot be read as an image"):
        call(*args, "--out", tmp_path / "verified")
    assert not (tmp_path / "verified").exists()
