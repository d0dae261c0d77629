"""Class imbalance: weights and sampling, compared with hand counts and torch's weighted loss."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import interrupted, module, recipe, rows

from dualtoken_vit.data.balance import class_weights, image_weights
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.detection import save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import build_detector
from dualtoken_vit.recipes import RECIPES, Model
from dualtoken_vit.tasks import detection, trainer
from dualtoken_vit.tasks.registry import get_task
from dualtoken_vit.tasks.trainer import check_balance, train


@pytest.fixture
def rare(photos):
    """12 images of blue, 6 of green and 3 of red."""
    for name, count in (("green", 6), ("red", 9)):
        for path in sorted((photos / "train" / name).iterdir())[:count]:
            path.unlink()
    return photos


def test_weights_by_their_definitions():
    counts = [12, 0, 6, 3]
    found = class_weights("inverse", torch.tensor(counts))
    assert found.tolist() == pytest.approx([21 / (3 * 12), 0, 21 / (3 * 6), 21 / (3 * 3)])  # scikit-learn's "balanced"
    # Cui et al., equation 2: the effective number of n samples is 1 + beta + ... + beta ** (n - 1).
    effective = [sum(0.999**power for power in range(count)) for count in counts]
    inverse = np.array([1 / number if number else 0 for number in effective])
    expected = inverse * 21 / (inverse @ counts)
    assert class_weights("effective", torch.tensor(counts)).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["inverse", "effective"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_weighted_loss_is_torch_s(rare, kind, smoothing, precision):
    """torch's CrossEntropyLoss, whose mean is over the weights of the batch in place of its images."""
    made = replace(recipe(rare, augment={"label_smoothing": smoothing}), class_weights=kind)
    task = module(torch.nn.Flatten(), made, ("blue", "green", "red"))
    task.log = lambda *args, **kwargs: None
    train, _ = build_datasets(made.data, 3)
    task.weigh(train)
    weights = class_weights(kind, torch.tensor([12, 6, 3]))
    logits, targets = torch.randn(5, 3).to(precision), torch.tensor([0, 1, 2, 2, 0])
    expected = torch.nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits.float(), targets)
    with torch.autocast("cpu", enabled=precision is torch.bfloat16):
        loss = task.training_step((logits[:, :, None, None], targets), 0)
    torch.testing.assert_close(loss, expected * weights[targets].sum() / 5, rtol=1e-5, atol=0)


def test_mixed_images_are_weighted_by_their_shares(rare):
    made = replace(recipe(rare, augment={"mixup": 1.0, "label_smoothing": 0.0}), class_weights="inverse")
    task = module(torch.nn.Flatten(), made, ("blue", "green", "red"))
    task.log = lambda *args, **kwargs: None
    train, _ = build_datasets(made.data, 3)
    task.weigh(train)
    x, targets = torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 2, 1])
    np.random.seed(3)  # noqa: NPY002
    np.random.rand()  # noqa: NPY002  whether to mix
    share = np.random.beta(1.0, 1.0)  # noqa: NPY002
    logits, soft = (share * each + (1 - share) * each.flip(0) for each in (x.flatten(1), torch.eye(3)[targets]))
    expected = -(soft * logits.log_softmax(1) * torch.tensor([7 / 12, 7 / 6, 7 / 3])).sum(1).mean()
    np.random.seed(3)  # noqa: NPY002
    torch.testing.assert_close(task.training_step((x, targets), 0), expected)


def test_an_image_of_several_classes_is_drawn_by_its_rarest():
    """Class 1 is in three of four images, class 2 in two, class 3 in one; LVIS's repeat factors are 1 / sqrt(share)."""
    classes = [[1, 1, 2], [1], [3, 1, 2], []]
    expected = [(2 / 4) ** -0.5, (3 / 4) ** -0.5, (1 / 4) ** -0.5, 1]
    assert image_weights(classes, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_images_are_drawn_by_the_size_of_their_class(rare, power):
    made = recipe(rare, data={"balanced": power})
    train, _ = build_datasets(made.data, 3)
    module(torch.nn.Flatten(), made, ("blue", "green", "red")).weigh(train)
    assert train.targets == [0] * 12 + [1] * 6 + [2] * 3
    relative = np.array([12**-power] * 12 + [6**-power] * 6 + [3**-power] * 3)
    np.testing.assert_allclose(train.weights / np.sum(train.weights), relative / relative.sum())


@pytest.fixture
def scenes(tmp_path):
    """A detection recipe with 12 images of shapes, of which some are crowds, and their COCO file."""
    save_scenes(tmp_path, size=64, train=12, val=2)
    files = {f"{split}_json": str(tmp_path / "annotations" / f"instances_{split}.json") for split in ("train", "val")}
    base = RECIPES["coco"]
    data = replace(base.data, images=str(tmp_path / "images"), image_size=64, **files)
    coco = json.loads(Path(files["train_json"]).read_text())
    for one in coco["annotations"]:
        one["iscrowd"] = int(one["id"] % 5 == 0)
    Path(files["train_json"]).write_text(json.dumps(coco))
    return replace(base, data=data, model=Model(args=("dims=(16,32,32)", "depths=(1,1,1)"))), coco


def test_detection_draws_images_by_their_rarest_class(scenes):
    """From the COCO file by numpy."""
    made, coco = scenes
    made = replace(made, data=replace(made.data, balanced=0.5))
    present = np.zeros((12, 7), bool)
    for one in coco["annotations"]:
        if not one["iscrowd"]:
            present[[image["id"] for image in coco["images"]].index(one["image_id"]), one["category_id"]] = True
    factors = np.where(present, 1 / np.sqrt(np.maximum(present.mean(0), 1 / 12)), 1.0).max(1)
    assert get_task("detection").prepare(made, made.model).train.weights == pytest.approx(factors.tolist())
    assert len(set(factors)) > 2


@pytest.mark.parametrize("kind", ["equal", "inverse", "effective"])
def test_detection_weighs_classes_by_their_objects(scenes, monkeypatch, kind):
    """From the COCO file by numpy; a class has no object."""
    made, coco = scenes
    coco["annotations"] = [one for one in coco["annotations"] if one["category_id"] != 4]
    Path(made.data.train_json).write_text(json.dumps(coco))
    built = []
    monkeypatch.setattr(detection, "build_detector", lambda **args: built.append(args) or build_detector(**args))
    get_task("detection").prepare(replace(made, class_weights=kind), made.model)
    counts = np.bincount([one["category_id"] for one in coco["annotations"] if not one["iscrowd"]], minlength=7)[1:]
    assert counts[3] == 0
    assert len(set(counts)) > 3
    weights = np.zeros(6)
    there = counts > 0
    weights[there] = 1 / (counts[there] if kind == "inverse" else 1 - 0.999 ** counts[there])
    weights *= counts.sum() / (weights @ counts)
    found = built[0]["class_weights"]
    assert found is None if kind == "equal" else found.tolist() == pytest.approx(weights.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["folder", "multilabel", "coco"])
def test_the_imbalance_is_corrected_once(tmp_path, name):
    """Of 990 and 10 images, both together would give the rare class 99 times the weight of the other."""
    made = RECIPES[name]
    both = replace(made, class_weights="effective", data=replace(made.data, balanced=0.5))
    with pytest.raises(InputError, match=r"^--data\.balanced 0\.5, --class-weights effective: .*; give one of them$"):
        train(both, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for one in (replace(both, class_weights="equal"), replace(both, data=made.data)):
        check_balance(one)


def test_a_run_of_an_earlier_version_goes_on_with_both(photos, tmp_path, monkeypatch):
    made = replace(recipe(photos, data={"balanced": 0.5}, run={"save_every": 1}), class_weights="inverse")
    with monkeypatch.context() as before:
        before.setattr(trainer, "check_balance", lambda recipe: None)
        interrupted(made, tmp_path / "run", monkeypatch)
    train(made, tmp_path / "run", resume=True)
    assert len(rows(tmp_path / "run" / "metrics.csv")) == 2
