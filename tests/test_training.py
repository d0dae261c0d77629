"""Training and evaluation end to end on tiny pictures, and what stops them."""

import csv
import errno
import json
import math
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualtoken_vit.checkpoint import load_model, read_checkpoint
from dualtoken_vit.data.images import eval_transform
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import RECIPES, Classification, Model, to_dict
from dualtoken_vit.tasks.base import create_model
from dualtoken_vit.tasks.classification import ClassificationTask, evaluate
from dualtoken_vit.tasks.fit import fit

ARGS = ("dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32")


def recipe(root, **sections) -> Classification:
    """The folder recipe, tiny; sections are dictionaries of fields."""
    small = {
        "model": {"args": ARGS},
        "data": {"root": str(root), "image_size": 32, "workers": 0},
        "optim": {"batch_size": 12, "epochs": 2},
        "run": {"accelerator": "cpu"},
    }
    changes = {name: small.get(name, {}) | sections.get(name, {}) for name in small.keys() | sections.keys()}
    base = RECIPES["folder"]
    return replace(base, **{name: replace(getattr(base, name), **fields) for name, fields in changes.items()})


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(_photos, tmp_path_factory):
    """(the photos, the folder of a run that learnt to tell them apart)"""
    out = tmp_path_factory.mktemp("trained") / "run"
    fit(recipe(_photos, optim={"epochs": 6, "lr": 0.01}, data={"crop_pct": 0.9}), out)
    return _photos, out


def test_the_run_folder(trained):
    photos, out = trained
    made = recipe(photos, optim={"epochs": 6, "lr": 0.01}, data={"crop_pct": 0.9})
    assert {path.name for path in out.iterdir()} == {
        "recipe.json",
        "metrics.csv",
        "curves.png",
        "confusion.png",
        "confusion.csv",
        "last.ckpt",
        "best.safetensors",
        "tensorboard",
    }
    assert json.loads((out / "recipe.json").read_text()) == json.loads(json.dumps(to_dict(made)))
    history = rows(out / "metrics.csv")
    assert [int(row["epoch"]) for row in history] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in history] == [3, 6, 9, 12, 15, 18]
    assert float(history[-1]["lr"]) == pytest.approx(made.optim.min_lr)
    assert float(history[-1]["train_loss"]) < float(history[0]["train_loss"])

    checkpoint = read_checkpoint(out / "best.safetensors")
    assert checkpoint.class_names == ("blue", "green", "red")
    assert checkpoint.model_args == {
        "num_classes": 3,
        "in_chans": 3,
        "dims": [16, 32, 32],
        "depths": [1, 1, 1],
        "head_hidden_size": 32,
    }
    assert checkpoint.preprocessing["input_size"] == [3, 32, 32]
    assert checkpoint.preprocessing["mean"] == list(timm.data.IMAGENET_DEFAULT_MEAN)
    best = max(history, key=lambda row: float(row["val_top1"]))  # the first of equals
    assert checkpoint.metrics == {key: pytest.approx(float(value)) for key, value in best.items()}
    matrix = np.array([row[1:] for row in csv.reader(open(out / "confusion.csv"))][1:], dtype=int)  # noqa: SIM115
    assert matrix.sum(1).tolist() == [6, 6, 6]
    assert matrix.trace() / 18 == pytest.approx(checkpoint.metrics["val_top1"], abs=1e-6)
    assert checkpoint.metrics["val_top1"] > 0.8  # red, green and blue

    for name in ("curves.png", "confusion.png"):
        picture = np.asarray(Image.open(out / name).convert("L"))
        assert min(picture.shape) > 300
        assert picture.std() > 10  # not blank
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    logged = events.Scalars("epoch/val_loss")
    assert [event.step for event in logged] == [3, 6, 9, 12, 15, 18]
    assert [event.value for event in logged] == pytest.approx([float(row["val_loss"]) for row in history])


def test_evaluation_equals_an_independent_computation(trained):
    photos, out = trained
    result = evaluate(out / "best.safetensors", accelerator="cpu")
    model, checkpoint = load_model(out / "best.safetensors")
    transform = eval_transform(recipe(photos, data={"crop_pct": 0.9}).data, *timm_statistics())
    right, losses, per_class = [], [], {}
    for label, name in enumerate(checkpoint.class_names):
        paths = sorted((photos / "val" / name).iterdir())
        for path in paths:
            with torch.no_grad():
                logits = model(transform(Image.open(path).convert("RGB"))[None])[0].double().numpy()
            right.append(logits.argmax() == label)
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
        per_class[name] = (pytest.approx(np.mean(right[-len(paths) :])), len(paths))
    assert result.images == 18
    assert result.top1 == pytest.approx(np.mean(right), abs=1e-6)
    assert result.top5 == 1.0  # of three classes
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.per_class == per_class
    assert result.top1 == pytest.approx(checkpoint.metrics["val_top1"])
    assert result.loss == pytest.approx(checkpoint.metrics["val_loss"], rel=1e-4)


def timm_statistics():
    return timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def test_evaluation_of_other_data(trained, photos):
    _, out = trained
    best = out / "best.safetensors"
    for path in list((photos / "val" / "red").iterdir())[:4]:
        path.unlink()
    assert evaluate(best, data={"root": str(photos)}, batch_size=1, accelerator="cpu").images == 14
    (photos / "val" / "red").rename(photos / "val" / "pink")
    with pytest.raises(InputError, match=r"no 'red' and an unknown 'pink'"):
        evaluate(best, data={"root": str(photos)}, accelerator="cpu")


def test_metrics_of_known_logits():
    """Top-5 and the mean loss over unequal batches, against numpy."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(23, 9)).astype(np.float32), rng.integers(0, 9, 23)
    task = ClassificationTask(torch.nn.Flatten(), RECIPES["folder"], 9)
    for part in (slice(0, 20), slice(20, 23)):
        task.validation_step((torch.from_numpy(logits[part, :, None, None]), torch.from_numpy(targets[part])), 0)
    found = task.compute_metrics()
    ranks = (logits > logits[np.arange(23), targets][:, None]).sum(1)
    losses = np.log(np.exp(logits.astype(float)).sum(1)) - logits[np.arange(23), targets]
    assert found["val_top1"] == pytest.approx((ranks < 1).mean(), abs=1e-6)
    assert found["val_top5"] == pytest.approx((ranks < 5).mean(), abs=1e-6)
    assert found["val_loss"] == pytest.approx(losses.mean(), abs=1e-5)
    expected = np.zeros((9, 9), int)
    np.add.at(expected, (targets, logits.argmax(1)), 1)
    assert (task.confusion == expected).all()


def test_the_training_loss_is_smoothed_cross_entropy():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    task = ClassificationTask(torch.nn.Flatten(), RECIPES["folder"], 4)
    task.log = lambda *args, **kwargs: None
    smooth = torch.full((6, 4), 0.025)
    smooth[range(6), targets] = 0.925
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.training_step((logits[:, :, None, None], targets), 0), expected)


def test_mixing_follows_the_seed():
    """Mixup's share and its targets, from the same draw by hand."""
    made = recipe("", augment={"mixup": 1.0, "label_smoothing": 0.0})
    task = ClassificationTask(torch.nn.Flatten(), made, 2)
    task.log = lambda *args, **kwargs: None
    x, targets = torch.randn(4, 2, 1, 1), torch.tensor([0, 1, 1, 0])
    np.random.seed(3)  # noqa: NPY002
    np.random.rand()  # noqa: NPY002  whether to mix
    share = np.random.beta(1.0, 1.0)  # noqa: NPY002
    mixed = share * x[:, :, 0, 0] + (1 - share) * x.flip(0)[:, :, 0, 0]
    one_hot = torch.eye(2)[targets]
    expected = -((share * one_hot + (1 - share) * one_hot.flip(0)) * mixed.log_softmax(1)).sum(1).mean()
    np.random.seed(3)  # noqa: NPY002
    torch.testing.assert_close(task.training_step((x, targets), 0), expected)


def test_averaged_weights_are_what_is_kept(photos, tmp_path):
    fit(recipe(photos, optim={"epochs": 1, "ema_decay": 0.5, "lr": 0.01}), tmp_path / "run")
    best = load_file(tmp_path / "run" / "best.safetensors")
    last = torch.load(tmp_path / "run" / "last.ckpt")
    for key, value in best.items():
        assert torch.equal(value, last["state_dict"][f"model.{key}"]), key
    assert not torch.equal(best["head.weight"], last["current_model_state"]["model.head.weight"])
    assert evaluate(tmp_path / "run" / "best.safetensors", accelerator="cpu").loss == pytest.approx(
        float(rows(tmp_path / "run" / "metrics.csv")[0]["val_loss"]), rel=1e-4
    )


def test_fine_tuning(trained, photos, tmp_path, capsys):
    """Other classes, size and channels, with layer decay, in bfloat16."""
    _, source = trained
    (photos / "train" / "red").rename(photos / "train" / "pink")
    (photos / "val" / "red").rename(photos / "val" / "pink")
    for split in ("train", "val"):
        folder = photos / split / "grey"
        folder.mkdir()
        for index in range(6):
            Image.new("L", (40, 40), 40 * index).save(folder / f"{index}.png")
    made = recipe(
        photos,
        model={"checkpoint": str(source / "best.safetensors"), "in_chans": 1, "args": (*ARGS, "token_grid=4")},
        data={"image_size": 48},
        optim={"layer_decay": 0.5, "epochs": 1, "lr": 1e-6},
        run={"precision": "bf16-mixed"},
    )
    fit(made, tmp_path / "run")
    out = capsys.readouterr().out
    assert "adapted: token_embed, stem.stride2.0.conv.weight" in out
    assert "left new: head.weight, head.bias" in out
    old, new = (load_file(folder / "best.safetensors") for folder in (source, tmp_path / "run"))
    assert new["head.weight"].shape == (4, 32)
    torch.testing.assert_close(new["token_mean.fc.weight"], old["token_mean.fc.weight"], rtol=0, atol=1e-4)
    assert evaluate(tmp_path / "run" / "best.safetensors", accelerator="cpu").images == 24
    checkpoint = read_checkpoint(tmp_path / "run" / "best.safetensors")
    assert checkpoint.preprocessing["mean"] == pytest.approx([0.449], abs=1e-3)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet10t"])
def test_any_timm_model_trains_at_any_size(photos, tmp_path, name):
    made = recipe(photos, model={"name": name, "args": ()}, data={"image_size": 64}, optim={"epochs": 1})
    fit(made, tmp_path / "run")
    result = evaluate(tmp_path / "run" / "best.safetensors", accelerator="cpu")
    assert result.images == 18
    assert result.loss == pytest.approx(float(rows(tmp_path / "run" / "metrics.csv")[0]["val_loss"]), rel=1e-4)


def test_steps_depend_on_their_place_in_the_run_alone(photos):
    task = ClassificationTask(torch.nn.Identity(), recipe(photos), 3)

    def draw(batch_idx):
        task.on_train_batch_start(None, batch_idx)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    first, second = draw(0), draw(1)
    assert draw(0) == first
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path, monkeypatch):
    """In the fifth step, the second epoch's second; what was saved before is kept and named."""
    out = tmp_path / "run"
    step = ClassificationTask.training_step

    def broken(task, batch, index):
        loss = step(task, batch, index)
        return loss * math.nan if task.global_step == 4 else loss

    monkeypatch.setattr(ClassificationTask, "training_step", broken)
    with pytest.raises(InputError, match=r"not a finite number at step 5 \(epoch 2\).*last\.ckpt.*best\.safetensors"):
        fit(recipe(photos, run={"save_every": 1}), out)
    saved = torch.load(out / "last.ckpt")
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert len(rows(out / "metrics.csv")) == 1


def test_a_first_accumulated_batch_that_is_no_number(photos, tmp_path, monkeypatch):
    step = ClassificationTask.training_step
    monkeypatch.setattr(ClassificationTask, "training_step", lambda *args: step(*args) * math.inf)
    with pytest.raises(InputError, match=r"not a finite number at step 1 \(epoch 1\).*nothing was saved"):
        fit(recipe(photos, optim={"accumulate": 2}), tmp_path / "run")


def test_a_validation_loss_that_is_no_number_stops_the_run(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy_without_end)
    with pytest.raises(InputError, match=r"validation loss is not a finite number at step 3.*nothing was saved"):
        fit(recipe(photos), tmp_path / "run")


def cross_entropy_without_end(logits, target, label_smoothing=0.0):
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
        fit(recipe(photos), out)
    assert torch.load(out / "last.ckpt")["global_step"] == 3
    assert not list(out.glob(".*"))


def test_unreadable_pictures(photos, tmp_path, capsys):
    broken = photos / "train" / "red" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match=r"red/0\.jpg"):
        fit(recipe(photos), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit(recipe(photos, data={"unreadable": "skip"}, optim={"epochs": 1, "batch_size": 35}), tmp_path / "run")
    assert "skipped 1 unreadable training pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"root": "nowhere"}}, r"nowhere.*no such folder"),
        ({"optim": {"lr": 0.0}}, r"--optim\.lr 0\.0: must be at least"),
        ({"optim": {"ema_decay": 1.5}}, r"--optim\.ema-decay 1\.5: must be at most 1"),
        ({"run": {"save_every": 0}}, r"--run\.save-every 0: must be at least 1"),
        ({"augment": {"auto_augment": "rnd-m9"}}, r"--augment\.auto-augment rnd-m9"),
        ({"optim": {"batch_size": 37}}, r"36 training pictures do not fill one batch of 37.*--optim\.batch-size 36"),
        ({"optim": {"batch_size": 10, "accumulate": 3}}, r"--optim\.batch-size 10 cannot be shared.*multiple of 3"),
        ({"optim": {"batch_size": 9}, "augment": {"cutmix": 1.0}}, r"mix pairs.*--optim\.batch-size 10"),
        ({"optim": {"optimizer": "adamww"}}, r"--optim\.optimizer adamww.*did you mean"),
        ({"model": {"name": "dualtoken_vit_tinny"}}, r"--model\.name dualtoken_vit_tinny.*dualtoken_vit_tiny"),
        ({"model": {"args": ("token_grid=9",)}}, r"token_grid=9 is unknown; choose one of"),
        ({"model": {"args": ("token_gird=5",)}}, r"token_gird"),
        ({"model": {"args": ("token_grid",)}}, r"NAME=VALUE"),
        ({"model": {"name": "resnet10t", "args": ("img_size=3",)}}, r"resnet10t.*img_size"),
        ({"model": {"name": "test_vit", "args": ()}, "data": {"image_size": 50}}, r"--data\.image-size 50.*test_vit"),
        ({"model": {"checkpoint": "nowhere.safetensors"}}, r"no checkpoint nowhere\.safetensors"),
        ({"run": {"accelerator": "tpu"}}, r"--run\.accelerator tpu"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(photos, tmp_path, sections, message):
    if "data" in sections:
        sections["data"].setdefault("root", str(photos))
    with pytest.raises(InputError, match=message) as error:
        fit(recipe(photos, **sections), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_one_class_is_refused(photos, tmp_path):
    for split in ("train", "val"):
        for name in ("red", "green"):
            for path in (photos / split / name).iterdir():
                path.unlink()
            (photos / split / name).rmdir()
    with pytest.raises(InputError, match="one class only, 'blue'"):
        fit(recipe(photos), tmp_path / "run")


def test_evaluation_at_a_size_that_does_not_fit(photos, tmp_path):
    fit(recipe(photos, model={"name": "test_vit", "args": ()}, optim={"epochs": 1}), tmp_path / "run")
    with pytest.raises(InputError, match=r"--data\.image-size 50 is not a size that test_vit takes"):
        evaluate(tmp_path / "run" / "best.safetensors", data={"image_size": 50}, accelerator="cpu")


def test_settings_of_the_network():
    model, args = create_model(Model(drop_path_rate=0.3, grad_checkpointing=True, args=("token_mlp=mix",)), 5, 64)
    assert args == {"token_mlp": "mix"}
    assert model.training
    assert model.stages[-1].blocks[-1].drop_path2.drop_prob == pytest.approx(0.3)
    assert all(stage.grad_checkpointing for stage in model.stages)
    assert model.get_classifier().out_features == 5
    model, args = create_model(Model(name="test_vit"), 5, 96)
    assert args == {"img_size": 96}
    assert model.pos_embed.shape[1] == 36 + model.num_prefix_tokens
