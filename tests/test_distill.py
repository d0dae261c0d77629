"""Distillation: the loss against numpy, what the teacher sees, which teachers are refused, and resuming."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from tiny_runs import interrupted, module, recipe, train
from torch import nn

from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.predictors import load_model
from dualtoken_vit.recipes import RECIPES, ClassificationData, to_dict
from dualtoken_vit.tasks.classification import ClassificationTask
from dualtoken_vit.tasks.distill import Teacher, distillation_loss, load_teacher

NAMES = ("blue", "green", "red")
SAME = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_and_its_gradient(temperature):
    """Against numpy; by the logits the gradient is T (softmax(logits / T) - softmax(teacher / T)) / images."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 3, (2, 5, 7))
    p, q = softmax(theirs / temperature), softmax(ours / temperature)
    logits = torch.tensor(ours, dtype=torch.float32, requires_grad=True)
    loss = distillation_loss(logits, torch.tensor(theirs), temperature)
    assert loss.item() == pytest.approx(temperature**2 * (p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(logits.grad.numpy(), temperature * (q - p) / 5, atol=1e-6)


def make_teacher(rows=(0, 1, 2), own=SAME):
    """A teacher with dropout and batch normalisation, which would show another mode than that of evaluation."""
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 5))
    network[1].running_mean.normal_()
    return Teacher(network, rows, own, SAME)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_the_training_loss(mixup):
    """The weighted sum by hand; the teacher sees the mixed images, and stays as it is."""
    made = recipe("", augment={"mixup": mixup, "label_smoothing": 0.0}, distill={"weight": 0.7, "temperature": 2.0})
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = module(network, made, NAMES)
    task.teacher = make_teacher(rows=(4, 0, 2))
    task.log = lambda *args, **kwargs: None
    names = set(task.state_dict())
    x, targets = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    share, one_hot = 1.0, torch.eye(3)[targets]
    if mixup:
        np.random.seed(3)  # noqa: NPY002
        np.random.rand()  # noqa: NPY002  whether to mix
        share = np.random.beta(1.0, 1.0)  # noqa: NPY002
    mixed, soft = (share * each + (1 - share) * each.flip(0) for each in (x, one_hot))
    before = {key: value.clone() for key, value in task.teacher.model.state_dict().items()}
    with torch.no_grad():
        teacher, ours = task.teacher.model(mixed)[:, [4, 0, 2]].double().numpy(), network(mixed).double().numpy()
    p, q = softmax(teacher / 2), softmax(ours / 2)
    cross_entropy = -(soft.numpy() * np.log(softmax(ours))).sum(1).mean()
    expected = 0.7 * 4 * (p * np.log(p / q)).sum(1).mean() + 0.3 * cross_entropy
    np.random.seed(3)  # noqa: NPY002
    loss = task.train().training_step((x.clone(), targets), 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert network[1].weight.grad is not None
    assert names == {f"model.{key}" for key in network.state_dict()}
    assert all(parameter.grad is None for parameter in task.teacher.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.model.state_dict().items())


def test_the_teacher_sees_images_by_its_own_statistics():
    own, given = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}
    teacher = Teacher(nn.Flatten(), range(12), own, given)
    image = torch.rand(2, 3, 2, 2)
    mean, std = (torch.tensor(given[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (image - torch.tensor(own["mean"]).view(3, 1, 1)) / torch.tensor(own["std"]).view(3, 1, 1)
    torch.testing.assert_close(teacher((image - mean) / std), expected.flatten(1))


def save(path, names, task="classification", in_chans=3, model=None):
    """A best.safetensors of a small network with these classes."""
    torch.manual_seed(2)
    model = model or timm.create_model("test_resnet", num_classes=len(names), in_chans=in_chans)
    preprocessing = dict(input_size=(in_chans, 32, 32), mean=[0.3] * in_chans, std=[0.2] * in_chans)
    more = dict(preprocessing=preprocessing, recipe=to_dict(RECIPES["folder"]), metrics={})
    save_checkpoint(path, model, task=task, class_names=names, **more)
    return model.eval()


def student(channels=3, names=NAMES):
    preprocessing = {"input_size": (channels, 32, 32), "mean": [0.5] * channels, "std": [0.25] * channels}
    task = ClassificationTask()
    return task.predictor.create(
        nn.Identity(), names, preprocessing | {"crop_pct": 1.0, "interpolation": "bicubic"}, ClassificationData()
    )


def teach(name, **changes):
    made = recipe("", distill={"teacher": str(name)}, **changes)
    return load_teacher(ClassificationTask(), made, student(made.model.in_chans))


def test_classes_of_a_file_are_matched_by_name(tmp_path):
    model = save(tmp_path / "best.safetensors", ("red", "grey", "blue", "green"))
    x = torch.randn(2, 3, 32, 32)
    expected = model((x * 0.25 + 0.5 - 0.3) / 0.2)[:, [2, 3, 0]]
    torch.testing.assert_close(teach(tmp_path / "best.safetensors")(x), expected)


def test_classes_of_a_timm_model_are_matched_by_name(tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    save_for_hf(model, tmp_path / "named", model_config=dict(label_names=["red", "grey", "blue", "green"]))
    x = torch.randn(2, 3, 32, 32)
    images = (x * 0.25 + 0.5 - torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(
        model.pretrained_cfg["std"]
    ).view(3, 1, 1)
    torch.testing.assert_close(teach(f"local-dir:{tmp_path / 'named'}")(x), model(images)[:, [2, 3, 0]])

    ids = ("n02979186", "n01440764", "n03888257")  # cassette player, tench, parachute: 482, 0, 701 of ImageNet-1k
    save_for_hf(timm.create_model("test_resnet", num_classes=1000), tmp_path / "imagenet")
    made = recipe("", distill={"teacher": f"local-dir:{tmp_path / 'imagenet'}"})
    assert load_teacher(ClassificationTask(), made, student(names=ids)).rows.tolist() == [482, 0, 701]
    assert [ImageNetInfo().label_name_to_description(each).split(",")[0] for each in ids] == [
        "cassette player",
        "tench",
        "parachute",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.safetensors", "nowhere.safetensors: no such checkpoint"),
        (".", ". is a folder, not a checkpoint"),
        ("resnet19", "--distill.teacher resnet19: timm has no such model; did you mean "),
        ("dualtoken_vit_tiny", "--distill.teacher dualtoken_vit_tiny: No pretrained weights"),
        ("local-dir:nowhere", "--distill.teacher local-dir:nowhere: "),
        (
            "pink.safetensors",
            "--distill.teacher pink.safetensors does not predict class 'red' of the data; its classes",
        ),
        ("grey.safetensors", "--distill.teacher grey.safetensors needs --model.in-chans 1"),
        ("boxes.safetensors", "--distill.teacher boxes.safetensors is trained for detection, not for classification"),
        ("local-dir:unnamed", "--distill.teacher local-dir:unnamed does not predict class 'blue', 'green', 'red' of "),
        ("vit.safetensors", "--data.image-size 40 is not a size that test_vit takes"),
    ],
)
def test_teachers_that_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    save("pink.safetensors", ("blue", "green", "pink"))
    save("grey.safetensors", NAMES, in_chans=1)
    save("boxes.safetensors", NAMES, task="detection")
    save("vit.safetensors", NAMES, model=timm.create_model("test_vit", num_classes=3))
    save_for_hf(timm.create_model("test_resnet", num_classes=3), "unnamed")
    with pytest.raises(InputError) as caught:
        teach(name, data={"image_size": 40})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_taught_run_is_resumed_bit_by_bit(photos, tmp_path, monkeypatch):
    """With averaged weights, in bfloat16; the teacher's file may move, but not be replaced or left out."""
    save(tmp_path / "teacher.safetensors", ("red", "green", "blue"))
    made = recipe(
        photos,
        distill={"teacher": str(tmp_path / "teacher.safetensors"), "weight": 0.5},
        optim={"ema_decay": 0.5},
        run={"save_every": 1, "precision": "bf16-mixed"},
    )
    train(made, tmp_path / "whole")
    whole = load_model(tmp_path / "whole" / "best.safetensors")[0].state_dict()  # rejects tensors of another network
    interrupted(made, tmp_path / "run", monkeypatch)
    save(
        tmp_path / "other.safetensors", ("green", "blue", "red"), model=timm.create_model("test_resnet", num_classes=3)
    )
    for teacher, message in (
        (None, "--distill.weight and --distill.temperature need --distill.teacher"),
        (tmp_path / "other.safetensors", f"--distill.teacher {tmp_path / 'other.safetensors'} is not the teacher that"),
    ):
        other = replace(made, distill=replace(made.distill, teacher=teacher and str(teacher)))
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            train(other, tmp_path / "run", resume=True)
    moved = shutil.move(tmp_path / "teacher.safetensors", tmp_path / "moved.safetensors")
    train(replace(made, distill=replace(made.distill, teacher=str(moved))), tmp_path / "run", resume=True)
    for key, value in load_file(tmp_path / "run" / "best.safetensors").items():
        assert torch.equal(value, whole[key]), key
    states = (torch.load(tmp_path / name / "last.ckpt")["current_model_state"] for name in ("whole", "run"))
    for value, resumed in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(value, resumed)
