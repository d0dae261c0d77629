"""Runs that end at a time, or when nothing improves. The clock is the test's own."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from test_resume import assert_same_run

from dualtoken_vit import RECIPES, cli, train
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ClassificationData, Optim
from dualtoken_vit.tasks import budget, run_folder
from dualtoken_vit.tasks.budget import with_epochs
from dualtoken_vit.tasks.classification import ClassificationModule, ClassificationPredictor
from dualtoken_vit.tasks.detection import DetectionModule
from dualtoken_vit.tasks.segmentation import SegmentationModule

SMALL = ("--model.args", "depths=(1,1,1)", "dims=(8,16,32)", "num_heads=(1,2,4)", "head_hidden_size=64")
SETTINGS = (*SMALL, "--data.image-size", "32", "--data.workers", "0", "--optim.batch-size", "4", "--run.device", "cpu")


def call(*args) -> int:
    return cli.run(["train", "folder", *map(str, args)])


@pytest.fixture
def clock(monkeypatch):
    """A clock that starts at 100 seconds and goes on by 2 seconds with each training batch."""
    now = [100.0]
    step = ClassificationModule.training_step

    def training_step(self, *args):
        now[0] += 2
        assert self.model.training
        return step(self, *args)

    monkeypatch.setattr(budget, "monotonic", lambda: now[0])
    monkeypatch.setattr(ClassificationModule, "training_step", training_step)
    return now


def rows(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


# 36 images in batches of 4: 9 steps of 2 s; 18 in validation: 4.5 batches of 1 s
@pytest.mark.parametrize(("minutes", "epochs"), [(1.1, 2), (1.2, 3)])
def test_as_many_epochs_as_fit(photos, tmp_path, clock, capsys, minutes, epochs):
    out, cosine = tmp_path / "run", ("--optim.schedule", "cosine", "--optim.optimizer", "adamw", "--optim.lr", "1e-3")
    assert call("--data.root", photos, *SETTINGS, *cosine, "--run.max-minutes", minutes, "--out", out) == 0
    assert epochs == int(60 * minutes // 22.5)
    assert [row["epoch"] for row in rows(out)] == [str(n) for n in range(1, epochs + 1)]
    assert f"an epoch takes about 22.5 s: {epochs} of them in {minutes:g} minutes" in capsys.readouterr().out
    stored = json.loads((out / "recipe.json").read_text())
    assert stored["optim"]["epochs"] == epochs
    assert stored["recipe"] == "folder"
    assert float(rows(out)[-1]["lr"]) < 1e-5  # the schedule ends with the run


def test_the_optimiser_s_part_of_accumulated_batches(photos, tmp_path, clock, monkeypatch, capsys):
    """Three steps of 9 s, 3 of them the optimiser's, in three batches each; a validation of 4.5 batches of 1.5 s."""
    step = ClassificationModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        clock[0] += 3

    monkeypatch.setattr(ClassificationModule, "optimizer_step", optimizer_step)
    settings = *SETTINGS, "--optim.batch-size", 12, "--optim.accumulate", 3, "--run.max-minutes", 0.6
    assert call("--data.root", photos, *settings, "--out", tmp_path / "run") == 0
    assert "an epoch takes about 33.8 s: 1 of them in 0.6 minutes\n" in capsys.readouterr().out


@pytest.mark.parametrize(("minutes", "epochs"), [(1.55, 1), (1.6, 2)])
def test_the_part_of_a_slow_validation(photos, tmp_path, clock, monkeypatch, capsys, minutes, epochs):
    """The network takes 10 s for the first validation batch, then 5: an epoch is 9 steps of 2 s and 4.5 such batches.

    Two epochs are 81 s, and with the 15 s for timing validation, 96.
    """
    forward, taken = ClassificationPredictor.forward, [10, 5]

    def slow(self, batch):
        clock[0] += taken.pop(0) if taken else 0
        assert not self.model.training
        return forward(self, batch)

    monkeypatch.setattr(ClassificationPredictor, "forward", slow)
    settings = *SETTINGS, "--run.max-minutes", minutes
    assert call("--data.root", photos, *settings, "--out", tmp_path / "run") == 0
    assert f"an epoch takes about 40.5 s: {epochs} of them in {minutes} minutes\n" in capsys.readouterr().out


def test_the_part_of_less_than_a_batch(photos, tmp_path, clock, monkeypatch, capsys):
    """18 images for validation in a batch of 36 take 5 s, as measured, and the step before 2 s."""
    forward = ClassificationPredictor.forward

    def slow(self, batch):
        clock[0] += 5
        return forward(self, batch)

    monkeypatch.setattr(ClassificationPredictor, "forward", slow)
    settings = *SETTINGS, "--optim.batch-size", 36, "--run.max-minutes", 0.3
    assert call("--data.root", photos, *settings, "--out", tmp_path / "run") == 0
    assert "an epoch takes about 7 s: " in capsys.readouterr().out


def test_a_validation_that_does_not_fit_into_memory(photos, tmp_path, clock, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ClassificationPredictor, "forward", full)
    settings = *SETTINGS, "--run.max-minutes", 1
    with pytest.raises(InputError, match=r"\.jpg, .*use a smaller image_size \(--data"):
        call("--data.root", photos, *settings, "--out", tmp_path / "run")


@pytest.mark.parametrize(("minutes", "epoch", "epochs"), [(2, 36, 1), (3.5, 49.5, 4)])
def test_the_epochs_of_growing_images(photos, tmp_path, clock, capsys, minutes, epoch, epochs):
    """Epochs take 18 s at the first side and 72 s at twice that, a validation 18 s: two need 126 s, four 198 s."""
    sides = "--data.image-size", 64, "--data.start-size", 32
    args = "--data.root", photos, *SETTINGS, *sides, "--run.max-minutes", minutes, "--out", tmp_path / "run"
    assert call(*args) == 0
    said = capsys.readouterr().out
    assert f"an epoch takes about {epoch} s: {epochs} of them in {minutes} minutes\n" in said
    assert len(rows(tmp_path / "run")) == epochs
    note = "the only epoch has begun at --data.start-size, and --data.image-size is not reached: give more minutes"
    assert (note in said) == (epochs == 1)


@pytest.mark.parametrize(
    ("every", "said"),
    [  # epochs of 18 s for training, and 4.5 s for each validation
        (1, "22.5 s: 1 of them need 0.375 minutes, not 0.01"),
        (3, "19.5 s: 3 of them need 0.975 minutes, not 0.01, and --run.validate-every 3 allows no fewer"),
    ],
)
def test_a_budget_that_is_too_small_is_said(photos, tmp_path, clock, capsys, every, said):
    settings = *SETTINGS, "--run.validate-every", every, "--run.max-minutes", 0.01
    assert call("--data.root", photos, *settings, "--out", tmp_path / "run") == 0
    assert f"an epoch takes about {said}\n" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [str(every)]


def test_a_fitted_run_is_resumed_bit_by_bit(photos, tmp_path, clock, monkeypatch):
    args = "--data.root", photos, *SETTINGS, "--run.max-minutes", 1.2, "--run.save-every", 1
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert call(*args, "--out", whole) == 0

    clock[0] = 100.0
    save = run_folder.LastCheckpoint._save
    steps = []

    def save_and_die(self, trainer, task):
        save(self, trainer, task)
        steps.append(trainer.global_step)
        if steps[-1] == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.LastCheckpoint, "_save", save_and_die)
    with pytest.raises((SystemExit, KeyboardInterrupt, InputError)):
        call(*args, "--out", out)
    assert steps[0] == 3  # nothing is saved before the number of epochs is known
    monkeypatch.setattr(run_folder.LastCheckpoint, "_save", save)
    clock[0] = 5e6
    assert call(*args[2:], "--out", out, "--resume") == 0
    assert_same_run(out, whole, kinds=("state_dict", "optimizer_states"))


def test_from_python(photos, tmp_path, clock):
    recipe = RECIPES["folder"]
    args = ("depths=(1,1,1)", "dims=(8,16,32)", "num_heads=(1,2,4)", "head_hidden_size=64")
    recipe = replace(
        recipe,
        model=replace(recipe.model, args=args),
        data=replace(recipe.data, root=str(photos), image_size=32, workers=0),
        optim=replace(recipe.optim, batch_size=4),
        run=replace(recipe.run, device="cpu", max_minutes=0.8, validate_every=2),
    )
    train(recipe, tmp_path / "run")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["2"]  # 38.7 s for two, and one validation
    train(recipe, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"--run\.max-minutes is 0\.8 in the run"):
        train(replace(recipe, run=replace(recipe.run, max_minutes=1.0)), tmp_path / "run", resume=True)


def test_milestones_and_warm_up_fit_the_run():
    recipe = replace(RECIPES["coco-retinanet-1x"], optim=Optim(epochs=12, milestones=(8, 11)))
    assert with_epochs(recipe, 36).optim == Optim(epochs=36, milestones=(24, 33))
    assert with_epochs(RECIPES["in1k-tiny-mix"], 6).optim.warmup_epochs == 3  # of 20
    assert with_epochs(with_epochs(recipe, 3), 3).optim == Optim(epochs=3, milestones=(2, 3))
    assert with_epochs(recipe, 1).optim == Optim(epochs=1, milestones=(1, 1), warmup_epochs=0.5)
    steps = replace(recipe, optim=Optim(epochs=12, warmup_steps=500))
    assert [with_epochs(steps, n).optim.warmup_steps for n in (3, 12, 36)] == [125, 500, 500]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-detect", "demo-segment"])
def test_other_tasks(tmp_path, monkeypatch, capsys, name):
    """Steps of 10 s, which no machine needs: 4 images in batches of 2, 2 steps and the validation of 4 images."""
    recipe = RECIPES[name]
    cls = {"detection": DetectionModule, "segmentation": SegmentationModule}[recipe.task]
    now, step = [0.0], cls.training_step

    def training_step(self, *args):
        now[0] += 10
        return step(self, *args)

    monkeypatch.setattr(budget, "monotonic", lambda: now[0])
    monkeypatch.setattr(cls, "training_step", training_step)
    settings = "--data.limit", 4, "--data.workers", 0, "--optim.batch-size", 2, "--run.device", "cpu"
    args = ["train", name, *settings, "--run.max-minutes", 1.4, "--out", tmp_path / "run"]
    assert cli.run(list(map(str, args))) == 0
    epoch = 10 * (2 + 2 / 2)  # a batch of validation has the images of one of training
    assert [int(row["epoch"]) for row in rows(tmp_path / "run")] == list(range(1, int(60 * 1.4 // epoch) + 1))
    assert f"an epoch takes about {epoch:g} s: 2 of them in 1.4 minutes" in capsys.readouterr().out


def test_epochs_and_minutes_exclude_each_other(photos, tmp_path, clock):
    args = "--data.root", photos, *SETTINGS, "--out", tmp_path / "run"
    with pytest.raises(InputError, match=r"--optim\.epochs 4: --run\.max-minutes sets the epochs"):
        call(*args, "--run.max-minutes", 0.4, "--optim.epochs", 4)
    assert call(*args, "--run.max-minutes", 0.4) == 0
    with pytest.raises(InputError, match=r"--optim\.epochs 2: --run\.max-minutes sets the epochs"):
        call(*args, "--resume", "--optim.epochs", 2)


def test_growing_images_cost_more():
    """Half of the run at half the side, a fifth at the full one."""
    task = object.__new__(ClassificationModule)
    task.__dict__["recipe"] = replace(RECIPES["folder"], data=ClassificationData(image_size=128, start_size=64))
    assert [task.cost(progress) for progress in (0, 0.49, 0.65, 0.8, 1)] == [1, 1, 2.25, 4, 4]


@pytest.mark.parametrize("patience", [1, 2])
def test_patience(photos, tmp_path, monkeypatch, capsys, patience):
    """Scores that rise, and fall from the third epoch on."""
    evaluate = ClassificationModule.evaluate
    scores = iter((0.2, 0.3, 0.5, 0.4, 0.3, 0.9))

    def scored(self):
        found = evaluate(self)
        return replace(found, scores=found.scores | {"top1": next(scores)})

    monkeypatch.setattr(ClassificationModule, "evaluate", scored)
    args = "--data.root", photos, *SETTINGS, "--out", tmp_path / "run"
    assert call(*args, "--optim.epochs", 6, "--run.patience", patience) == 0
    expected = [0.2, 0.3, 0.5, 0.4, 0.3][: 3 + patience]
    assert [float(row["val_top1"]) for row in rows(tmp_path / "run")] == expected
    out = capsys.readouterr().out
    assert f"no better epoch in {patience} validations: stopped" in out
    assert "best: top1 50.00%, in epoch 3 of 6" in out

    before = (tmp_path / "run" / "metrics.csv").read_text()
    assert call(*args, "--resume") == 0  # it has ended
    assert "to train on, give a higher --run.patience, or start another one" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.csv").read_text() == before
    assert call(*args, "--resume", "--run.patience", 3) == 0  # but may go on
    assert len(rows(tmp_path / "run")) > 3 + patience


def test_threads(photos, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen = []
    step = ClassificationModule.training_step
    monkeypatch.setattr(
        ClassificationModule, "training_step", lambda *args: seen.append(torch.get_num_threads()) or step(*args)
    )
    try:
        args = "--data.root", photos, *SETTINGS, "--optim.epochs", 1, "--out", tmp_path / "run"
        assert call(*args, "--run.threads", 3) == 0
        assert set(seen) == {3}
    finally:
        torch.set_num_threads(before)
