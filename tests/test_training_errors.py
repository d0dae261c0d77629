"""What stops a training or an evaluation: NaN, a full disk, mistakes."""

import errno
import math
import os

import lightning
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import count_reading, module, recipe, rows

from dualtoken_vit.errors import InputError
from dualtoken_vit.evaluation import evaluate
from dualtoken_vit.recipes import RECIPES
from dualtoken_vit.tasks.classification import ClassificationModule
from dualtoken_vit.tasks.trainer import train


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path, monkeypatch):
    """In the fifth step, the second epoch's second; what was saved before is kept and named."""
    out = tmp_path / "run"
    step = ClassificationModule.training_step

    def broken(task, batch, index):
        loss = step(task, batch, index)
        return loss * math.nan if task.global_step == 4 else loss

    monkeypatch.setattr(ClassificationModule, "training_step", broken)
    with pytest.raises(InputError, match=r"NaN or Inf at step 5 \(epoch 2\).*last\.ckpt.*best\.safetensors"):
        train(recipe(photos, run={"save_every": 1}), out)
    saved = torch.load(out / "last.ckpt")
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert len(rows(out / "metrics.csv")) == 1


def test_a_weight_that_is_no_number_is_not_saved(photos, tmp_path, monkeypatch):
    """The fifth step's loss is finite, what the step makes of a weight is not."""
    out = tmp_path / "run"
    step = ClassificationModule.optimizer_step

    def broken(task, *args, **kwargs):
        step(task, *args, **kwargs)
        if task.global_step == 4:  # of steps that are done with
            torch.nn.init.constant_(task.model.head.bias, math.inf)

    monkeypatch.setattr(ClassificationModule, "optimizer_step", broken)
    with pytest.raises(InputError, match=r"a weight is NaN or Inf after step 5 \(epoch 2\).*last\.ckpt"):
        train(recipe(photos, run={"save_every": 1}), out)
    saved = torch.load(out / "last.ckpt")
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_first_accumulated_batch_that_is_no_number(photos, tmp_path, monkeypatch):
    step = ClassificationModule.training_step
    monkeypatch.setattr(ClassificationModule, "training_step", lambda *args: step(*args) * math.inf)
    with pytest.raises(InputError, match=r"NaN or Inf at step 1 \(epoch 1\).*nothing was saved"):
        train(recipe(photos, optim={"accumulate": 2}), tmp_path / "run")


def test_a_validation_loss_that_is_no_number_stops_the_run(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy_without_end)
    with pytest.raises(InputError, match=r"validation loss is NaN or Inf at step 3.*nothing was saved"):
        train(recipe(photos), tmp_path / "run")


def cross_entropy_without_end(logits, target, **options):
    loss = -logits.log_softmax(1)[range(len(target)), target].mean()
    return loss if logits.requires_grad else loss * math.inf


def test_a_full_disk_stops_the_run(photos, tmp_path, monkeypatch):
    """From the second epoch on: what the first left is whole."""
    out = tmp_path / "run"
    replace_file = os.replace

    def full(source, target):
        if str(target).endswith("last.ckpt") and os.path.exists(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*last\.ckpt: the disk is full.* is kept"):
        train(recipe(photos), out)
    assert torch.load(out / "last.ckpt")["global_step"] == 3
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"root": "nowhere"}}, r"nowhere.*no such folder"),
        ({"optim": {"lr": 0.0}}, r"--optim\.lr 0\.0: must be at least"),
        ({"optim": {"ema_decay": 1.5}}, r"--optim\.ema-decay 1\.5: must be at most 1"),
        ({"run": {"save_every": 0}}, r"--run\.save-every 0: must be at least 1"),
        ({"augment": {"auto_augment": "rnd-m9"}}, r"--augment\.auto-augment rnd-m9"),
        ({"optim": {"batch_size": 37}}, r"36 training images cannot fill one batch of 37.*--optim\.batch-size 36"),
        ({"optim": {"batch_size": 10, "accumulate": 3}}, r"--optim\.batch-size 10 cannot be shared.*multiple of 3"),
        ({"optim": {"batch_size": 9}, "augment": {"cutmix": 1.0}}, r"mix pairs.*--optim\.batch-size 10"),
        ({"optim": {"optimizer": "adamww"}}, r"--optim\.optimizer adamww.*did you mean"),
        ({"model": {"name": "dualtoken_vit_tinny"}}, r"--model\.name dualtoken_vit_tinny.*dualtoken_vit_tiny"),
        (
            {"model": {"args": ("token_grid=9", "alpha=0")}},
            r"^--model\.args token_grid=9 alpha=0: token_grid=9 is unknown; choose one of",
        ),
        (
            {"model": {"args": ("alpha=0", "token_gird=5")}},
            r"^--model\.args token_gird=5: dualtoken_vit_tiny has no such argument; did you mean token_grid",
        ),
        ({"model": {"args": ("token_grid",)}}, r"^--model\.args token_grid: not of the form NAME=VALUE"),
        (
            {"model": {"name": "resnet10t", "args": ("img_size=3",)}},
            r"^--model\.args img_size=3: resnet10t has no such argument; it has block, layers, num_classes",
        ),
        ({"model": {"name": "resnet10t", "args": ("act_layer=reluu",)}}, r"^--model\.args act_layer=reluu: .*reluu"),
        ({"model": {"args": ("dims=(-8,8,8)",)}}, r"^--model\.args dims=\(-8,8,8\): .*negative"),
        (
            {"model": {"args": ("token_grid=5",), "pretrained": True}},
            r"^--model\.name dualtoken_vit_tiny: No pretrained weights",
        ),
        (
            {"model": {"name": "dualtoken_vit_tiny_mix", "args": ("token_grid=5",), "pretrained": True}},
            r"^--model\.args token_grid=5: the pretrained weights of dualtoken_vit_tiny_mix do not fit; leave it out",
        ),
        (
            {"model": {"name": "dualtoken_vit_tiny_mix.in1k", "args": ()}},
            r"^--model\.name dualtoken_vit_tiny_mix\.in1k: timm has no such weights; there are dualtoken_vit_tiny",
        ),
        (
            {"model": {"name": "resnet10t", "args": (), "pretrained": True, "checkpoint": "best.safetensors"}},
            r"^--model\.checkpoint, --model\.pretrained true: a run starts from one of them; give one",
        ),
        ({"model": {"name": "local-dir:nowhere", "args": ("alpha=0",)}}, r"^--model\.name local-dir:nowhere: "),
        (
            {"model": {"name": "dla46_c", "args": (), "drop_path_rate": 0.1}},
            r"^--model\.drop-path-rate 0\.1: dla46_c has no stochastic depth",
        ),
        (
            {"model": {"name": "dla46_c", "args": (), "grad_checkpointing": True}},
            r"^--model\.grad-checkpointing: dla46_c.*not supported",
        ),
        (
            {"data": {"image_size": 31}},
            r"^--data\.image-size 31 is not a size that dualtoken_vit_tiny takes: give at least 32$",
        ),
        ({"model": {"name": "test_vit", "args": ()}, "data": {"image_size": 50}}, r"--data\.image-size 50.*test_vit"),
        (
            {"model": {"name": "test_vit", "args": ()}, "data": {"image_size": 64, "start_size": 50}},
            r"--data\.start-size 50 is not a size that test_vit takes",
        ),
        (
            {"data": {"image_size": 32, "start_size": 48}},
            r"^--data\.start-size 48: must not be above --data\.image-size 32$",
        ),
        (
            {
                "model": {"name": "test_vit", "args": ("patch_size=32", "dynamic_img_size=True")},
                "data": {"image_size": 96, "start_size": 32},
            },
            r"^--data\.start-size 32 grows in steps of 16 pixels, but 48 is not a size that test_vit takes",
        ),
        ({"optim": {"schedule": "step"}}, r"^--optim\.schedule step: needs --optim\.milestones"),
        ({"model": {"checkpoint": "nowhere.safetensors"}}, r"nowhere\.safetensors: no such checkpoint"),
        ({"run": {"device": "tpu"}}, r"^--run\.device tpu: "),
        ({"run": {"devices": 0}}, r"^--run\.devices 0: must be at least 1"),
        ({"run": {"devices": 5}}, r"--optim\.batch-size 12 cannot be shared by 5 processes.*multiple of 5"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(photos, tmp_path, monkeypatch, sections, message):
    read = count_reading(monkeypatch)
    if "data" in sections:
        sections["data"].setdefault("root", str(photos))
    with pytest.raises(InputError, match=message) as error:
        train(recipe(photos, **sections), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert not read  # refused before the images are read


@pytest.mark.parametrize(
    ("complaint", "flags"),
    [
        ("You set `devices=8` in Lightning, but the number of tasks per node does not match", "--run.devices 1: "),
        ("You set `num_nodes=2` in Lightning, but the number of nodes does not match", "--run.nodes 1: "),
        ("No supported gpu backend found!", "--run.device cpu, --run.devices 1: "),
        ("You requested gpu: [0, 1]\n But your machine only has: [0]", "--run.device cpu, --run.devices 1: "),
    ],
)
def test_the_argument_at_fault_is_named(photos, tmp_path, monkeypatch, complaint, flags):
    def refuse(**kwargs):
        raise MisconfigurationException(complaint)

    monkeypatch.setattr(lightning, "Trainer", refuse)
    with pytest.raises(InputError) as error:
        train(recipe(photos, run={"devices": 1}), tmp_path / "run")
    assert str(error.value).startswith(flags)
    assert str(error.value).endswith(" ".join(complaint.split()))


def test_a_run_without_a_step_is_none(photos, tmp_path):
    """Batch normalisation of one position of one image, in the first step: after that the folder can be used."""
    network = {"name": "test_resnet", "args": ()}
    message = r"^batch normalisation has nothing to average .*; give a larger --optim\.batch-size .* larger images"
    with pytest.raises(InputError, match=message):
        train(recipe(photos, model=network, optim={"batch_size": 1}), tmp_path / "run")
    train(recipe(photos, model=network, optim={"epochs": 1}), tmp_path / "run")
    assert len(rows(tmp_path / "run" / "metrics.csv")) == 1


def test_one_class_is_refused(photos, tmp_path):
    for split in ("train", "val"):
        for name in ("red", "green"):
            for path in (photos / split / name).iterdir():
                path.unlink()
            (photos / split / name).rmdir()
    with pytest.raises(InputError, match="only one class, 'blue'"):
        train(recipe(photos), tmp_path / "run")


def test_evaluation_at_a_size_that_does_not_fit(photos, tmp_path):
    train(recipe(photos, model={"name": "test_vit", "args": ()}, optim={"epochs": 1}), tmp_path / "run")
    with pytest.raises(InputError, match="image size 50 is not a size that test_vit takes"):
        evaluate(tmp_path / "run" / "best.safetensors", data={"image_size": 50}, device="cpu")


def test_evaluation_below_the_least_size(trained):
    with pytest.raises(InputError, match=r"image size 16 is not a size .*: give at least 32"):
        evaluate(trained[1] / "best.safetensors", data={"image_size": 16}, device="cpu")


def test_one_validation_batch_of_nan_is_not_left_out():
    task = module(torch.nn.Flatten(), RECIPES["folder"], tuple("ab"))
    for values in ([[0.0, 1.0]], [[math.nan, 1.0]]):
        task.validation_step((torch.tensor(values)[:, :, None, None], torch.tensor([0])), 0)
    assert math.isnan(task.evaluate().scores["loss"])
