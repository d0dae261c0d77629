"""A run that is killed at any point and resumed ends as one that was not, bit by bit."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SERVER
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualtoken_vit import cli
from dualtoken_vit.errors import InputError
from dualtoken_vit.tasks.base import TaskModule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EPOCHS, STEPS = 3, 9  # of 36 images in batches of 4

# Forks of a server that has imported everything: a process that is going to be killed starts at once.
SERVER.set_forkserver_preload(["dualtoken_vit.cli", "dualtoken_vit.tasks.trainer", "test_resume"])


def arguments(photos: Path, out: Path, *more: str) -> list[str]:
    network = "dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32"
    settings = {
        "data.root": photos,
        "data.image-size": 32,
        "data.workers": 0,
        "optim.batch-size": 4,
        "optim.epochs": EPOCHS,
        "optim.ema-decay": 0.9,
        "optim.clip-grad": 1,
        "augment.hflip": "alternate",
        "augment.mixup": 0.2,
        "augment.cutmix": 1,
        "augment.random-erasing": 0.5,
        "model.drop-path-rate": 0.2,
        "run.device": "cpu",
        "run.save-every": 2,
    }
    given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return ["train", "folder", "--model.args", *network, *given, "--out", str(out), *more]


@pytest.fixture(scope="module")
def uninterrupted(_photos, tmp_path_factory):
    """(the photos, the folder of the whole run)"""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert cli.run(arguments(_photos, folder / "run")) == 0
    return _photos, folder / "run"


def tensors(value, name=""):
    """(name, tensor) for each tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}.{index}")


def logged(out: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar, as TensorBoard shows them."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_run(
    found: Path,
    expected: Path,
    kinds=("state_dict", "current_model_state", "optimizer_states"),
    files=("metrics.csv", "confusion.csv", "recipe.json"),
) -> None:
    best, expected_best = load_file(found / "best.safetensors"), load_file(expected / "best.safetensors")
    assert best.keys() == expected_best.keys()
    for key, value in best.items():
        assert torch.equal(value, expected_best[key]), key
    last, expected_last = (dict(tensors(torch.load(folder / "last.ckpt"))) for folder in (found, expected))
    assert last.keys() == expected_last.keys()
    assert {name.split(".")[1] for name in last} >= set(kinds)
    for name, value in last.items():
        assert torch.equal(value, expected_last[name]), name
    for name in files:
        assert (found / name).read_text() == (expected / name).read_text(), name
    assert {"train/loss", "epoch/train_loss"} <= logged(expected).keys()
    assert logged(found) == logged(expected)
    assert not list(found.glob(".*"))  # nothing half-written


def run_until_killed(args: list[str], event: str, count: int, threads: int = 1) -> None:
    """Run the command line and die by SIGKILL at the `count`-th `event`.

    Events: "saving NAME" before the file takes its place, half of it written; "saved NAME" just after.
    """
    torch.set_num_threads(threads)
    when, name = event.split()
    seen = 0
    replace = os.replace

    def replace_or_die(source, target) -> None:
        nonlocal seen
        seen += Path(target).name == name
        dying = seen == count and Path(target).name == name
        if dying and when == "saving":
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die
    cli.run(args)


def die(*args) -> None:
    """`run_until_killed` in a process of its own."""
    process = SERVER.Process(target=run_until_killed, args=args)
    process.start()
    process.join(500)
    assert process.exitcode == -signal.SIGKILL
    time.sleep(1.1)  # TensorBoard orders files of events by the second


@pytest.mark.parametrize(
    ("event", "count", "step"),
    [
        ("saved recipe.json", 1, None),  # before anything was saved
        ("saving last.ckpt", 1, None),  # in the first save
        ("saved last.ckpt", 3, 6),  # in the middle of the first epoch
        ("saved best.safetensors", 1, 8),  # between the two files of an epoch's end
        ("saving last.ckpt", 5, 8),  # in the save at the epoch's end (after steps 2, 4, 6, 8)
        ("saved last.ckpt", 5, 9),  # between two epochs
        ("saved last.ckpt", 8, 14),  # in the middle of the second epoch
        ("saved metrics.csv", 3, 26),  # after the last validation
    ],
)
def test_killed_and_resumed(uninterrupted, tmp_path, event, count, step):
    photos, whole = uninterrupted
    out = tmp_path / "run"
    die(arguments(photos, out), event, count)
    last = out / "last.ckpt"
    assert (torch.load(last)["global_step"] if last.exists() else None) == step
    assert cli.run(arguments(photos, out, "--resume")) == 0
    assert_same_run(out, whole)


def test_killed_and_resumed_with_two_threads(photos, tmp_path):
    """Of images so large that linear layers are convolved."""
    torch.set_num_threads(2)
    more = "--data.image-size", "128", "--optim.batch-size", "16", "--optim.epochs", "2", "--run.save-every", "1"
    whole, out = tmp_path / "whole", tmp_path / "run"
    cli.run(arguments(photos, whole, *more))
    args = arguments(photos, out, *more)
    die(args, "saved last.ckpt", 1, 2)
    assert torch.load(out / "last.ckpt")["global_step"] == 1
    cli.run([*args, "--resume"])
    assert_same_run(out, whole)


def test_killed_from_outside(uninterrupted, tmp_path):
    """The real command, killed as the system would, wherever it then is."""
    photos, whole = uninterrupted
    out = tmp_path / "run"
    last = out / "last.ckpt"
    command = [sys.executable, "-m", "dualtoken_vit.cli", *arguments(photos, out)]
    for _ in range(5):  # on a busy machine the run may end before this process gets to kill it
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (last.exists() and torch.load(last)["global_step"] >= 12):
                time.sleep(0.01)
            process.kill()
        if torch.load(last)["global_step"] < EPOCHS * STEPS:
            break
    assert process.returncode == -signal.SIGKILL
    assert 12 <= torch.load(last)["global_step"] < EPOCHS * STEPS
    assert cli.run(arguments(photos, out, "--resume")) == 0
    assert_same_run(out, whole)


def raise_in_batch(patch, number: int, batch: int) -> None:
    """Let the process get a signal as a batch of the first epoch begins."""
    begin = TaskModule.on_train_batch_start

    def stop(self, images, index):
        begin(self, images, index)
        if index == batch and self.current_epoch == 0:
            signal.raise_signal(number)

    patch.setattr(TaskModule, "on_train_batch_start", stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("batch", "step"), [(3, 4), (8, 9)])  # in an epoch, and at its last batch
def test_stopped_by_a_signal(uninterrupted, tmp_path, monkeypatch, number, batch, step):
    """The step is finished and saved, as is an epoch that ends with it, unless SIGTERM ends its validation."""
    photos, whole = uninterrupted
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_in_batch(patch, number, batch)
        kept = r"the last good state is .*last\.ckpt.*; continue with --resume --out .*run"
        ended_in_validation = number == signal.SIGTERM and step == STEPS
        with pytest.raises(KeyboardInterrupt, match="nothing was saved" if ended_in_validation else kept):
            cli.run(arguments(photos, out, "--run.save-every", "1000"))
    if not ended_in_validation:
        assert torch.load(out / "last.ckpt")["global_step"] == step
    time.sleep(1.1)  # TensorBoard orders files of events by the second
    assert cli.run(arguments(photos, out, "--resume")) == 0
    assert_same_run(out, whole, files=("metrics.csv", "confusion.csv"))


def test_workers_change_nothing(uninterrupted, tmp_path):
    photos, whole = uninterrupted
    out = tmp_path / "run"
    assert cli.run(arguments(photos, out, "--data.workers", "2", "--run.save-every", "1000")) == 0
    best, expected = load_file(out / "best.safetensors"), load_file(whole / "best.safetensors")
    for key, value in best.items():
        assert torch.equal(value, expected[key]), key
    assert (out / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_run_is_not_overwritten(uninterrupted):
    photos, whole = uninterrupted
    before = (whole / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"holds a run; continue it with --resume, or give another --out"):
        cli.run(arguments(photos, whole))
    assert (whole / "last.ckpt").read_bytes() == before


def test_a_finished_run_stays_as_it_is(uninterrupted, tmp_path, capsys):
    photos, whole = uninterrupted
    out = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert cli.run(arguments(photos, out, "--resume")) == 0
    found = capsys.readouterr()
    with (whole / "metrics.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    figure = f"best: top1 {float(best['val_top1']):.2%}, in epoch {best['epoch']} of {EPOCHS}"
    advice = f"start another one with --model.checkpoint {out / 'best.safetensors'} --out FOLDER"
    assert found.out == f"the run in {out} is finished ({figure}); to train on, {advice}\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_resumed_run_keeps_its_settings(uninterrupted, tmp_path):
    photos, whole = uninterrupted
    out = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(InputError, match=r"--optim\.epochs is 3 in the run .*, not 5"):
        cli.run(["train", "folder", "--out", str(out), "--resume", "--optim.epochs", "5"])
    # What is not asked for is as stored, and the data may have moved.
    moved, fewer = (shutil.copytree(photos, tmp_path / name) for name in ("moved", "fewer"))
    next((fewer / "train").rglob("*.jpg")).unlink()
    shutil.rmtree(out / "tensorboard")
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["optim"]["epochs"] += 1  # it is not finished
    (out / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=r"the data changed .*\[36, 18\].*\[35, 18\]"):
        cli.run(["train", "folder", "--out", str(out), "--resume", "--data.root", str(fewer)])
    assert cli.run(["train", "folder", "--out", str(out), "--resume", "--data.root", str(moved)]) == 0


def test_nothing_to_resume_from(photos, tmp_path, capsys):
    args = arguments(photos, tmp_path / "new", "--resume", "--optim.epochs", "1")
    assert cli.run(args) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert (tmp_path / "new" / "best.safetensors").exists()


def test_damaged_files(uninterrupted, tmp_path):
    photos, whole = uninterrupted
    out = shutil.copytree(whole, tmp_path / "run")
    content = bytearray((out / "last.ckpt").read_bytes())
    content[content.index(b"data/0") + 1000] ^= 1  # a bit of a weight
    (out / "last.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        cli.run(arguments(photos, out, "--resume"))
    (out / "last.ckpt").write_bytes((out / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        cli.run(arguments(photos, out, "--resume"))
    for state, message in ({"run": 0.5}, r"its state is 0\.5: must be an object"), ([1], r"last\.ckpt is damaged"):
        torch.save(state, out / "last.ckpt")
        with pytest.raises(InputError, match=message):
            cli.run(arguments(photos, out, "--resume"))
    for text in ('{"model": {"nmae": 1}}', 200_000 * "["):
        (out / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=r"recipe\.json: not a recipe of this version"):
            cli.run(arguments(photos, out, "--resume"))


def test_accumulated_batches_are_resumed(photos, tmp_path, monkeypatch):
    """Nine batches of 4 are four steps of 2 x 4; saved between steps only."""
    more = "--optim.batch-size", "8", "--optim.accumulate", "2", "--optim.epochs", "2", "--run.save-every", "1"
    whole, out = tmp_path / "whole", tmp_path / "run"
    cli.run(arguments(photos, whole, *more))
    assert torch.load(whole / "last.ckpt")["global_step"] == 8
    args = arguments(photos, out, *more)
    die(args, "saved last.ckpt", 3)
    assert torch.load(out / "last.ckpt")["global_step"] == 3
    cli.run([*args, "--resume"])
    assert_same_run(out, whole)

    stopped, args = tmp_path / "stopped", arguments(photos, tmp_path / "stopped", *more[:-1], "1000")
    with monkeypatch.context() as patch:
        raise_in_batch(patch, signal.SIGTERM, 2)  # the first batch of the second step
        with pytest.raises(KeyboardInterrupt, match=r"the last good state is .*last\.ckpt"):
            cli.run(args)
    assert torch.load(stopped / "last.ckpt")["global_step"] == 2
    time.sleep(1.1)  # TensorBoard orders files of events by the second
    cli.run([*args, "--resume"])
    assert_same_run(stopped, whole, files=("metrics.csv", "confusion.csv"))
