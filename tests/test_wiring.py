"""The settings of a recipe reach the training step: sizes, epochs, losses, clipping, averages and augmentation."""

import io
import math
from collections import Counter
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from tiny_files import description, save_segmenter
from tiny_runs import recipe, rows
from torch import nn

from dualtoken_vit import load_predictor
from dualtoken_vit.data.classification import ImageDataset
from dualtoken_vit.recipes import RECIPES
from dualtoken_vit.tasks.classification import ClassificationModule
from dualtoken_vit.tasks.registry import get_task
from dualtoken_vit.tasks.trainer import train


def prepared(recipe):
    """What a task makes of a recipe."""
    return get_task(recipe.task).prepare(recipe, recipe.model)


def setup(name, augment=None, **fields):
    """The same of a recipe with four drawn scenes."""
    made = RECIPES[name]
    augment = replace(made.augment, **(augment or {}))
    return prepared(replace(made, data=replace(made.data, limit=4), augment=augment, **fields))


class Sending(ForkingPickler):
    """Pickles what is sent to a data loading process that is not a fork (macOS, Windows, Python 3.14)."""

    def reducer_override(self, thing):
        assert not isinstance(thing, nn.Parameter), "the network is sent"
        return NotImplemented


@pytest.mark.parametrize("name", ["demo", "demo-detect", "demo-multilabel", "demo-segment"])
def test_data_loading_processes_do_not_get_the_network(name, tmp_path):
    """They would need a copy each, with a context of CUDA; a fork server takes 256 tensors at most.

    That of an exported file cannot be sent at all.
    """
    made, recipe = prepared(RECIPES[name]), RECIPES[name]
    for images in (made.train, made.val):
        Sending(io.BytesIO()).dump((images, made.module.collate, made.module.prepare_epoch))

    names = made.train.class_names
    ids = range(len(names)) if recipe.task == "detection" else ()
    about = description(recipe.task, score_threshold=0.05) | {"class_names": names, "category_ids": [*ids]}
    exported = load_predictor(save_segmenter(tmp_path / "exported.onnx", **about))
    module, images = get_task(recipe.task).evaluation(exported, recipe)
    Sending(io.BytesIO()).dump((images, module.collate))


class Seen(nn.Module):
    """A network that keeps its images; its logits are 0."""

    def __init__(self, classes=0):
        super().__init__()
        self.classes, self.images = classes, []

    def forward(self, images, targets=None):
        self.images = images
        if targets is not None:
            return {"loss": images[0].mean()}
        logits = torch.zeros(len(images), self.classes, *images.shape[2:])
        return {"out": logits, "aux": logits}


@pytest.mark.parametrize("name", ["demo-detect", "demo-segment"])
def test_images_are_scaled_as_in_prediction(name):
    """White is 1. The loss of a uniform prediction is log(classes), with the auxiliary head 1.4 times that (PSPNet)."""
    made = setup(name)
    module, (image, target) = made.module, made.train[0]
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.model = Seen(len(made.train.class_names))
    white = torch.full_like(image, 255)
    loss = module.training_step(([white, white], [target, target]), 0)
    assert all((image == 1).all() for image in module.model.images)
    expected = 1.0 if name == "demo-detect" else 1.4 * math.log(len(made.train.class_names))
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # sums in float32


@pytest.mark.parametrize("name", ["demo-detect", "demo-segment"])
def test_a_recipe_augments_its_images(name):
    still = {"photometric": 0.0, "hflip": 0.0}
    if name == "demo-segment":
        still |= {"scale": (1.0, 1.0), "class_cap": 1.0}
    plain, flipped = (setup(name, augment=still | {"hflip": share}).train for share in (0.0, 1.0))
    for index in range(4):
        assert torch.equal(flipped[index][0], plain[index][0].flip(2))
        assert not torch.equal(flipped[index][0], plain[index][0])


def test_detectors_train_at_several_sizes():
    made = setup("demo-detect", augment={"multi_scale": (48, 56)})
    assert made.module.model.transform.multi_scale == (48, 56)


def test_a_preset_of_augmentation_has_all_its_steps():
    """`strong`, with masks: objects are pasted before the image is cropped and flipped."""
    steps = setup("demo-detect", augment={"preset": "strong"}, detector="mask-rcnn").train.transform.transforms
    names = ["CopyPaste", "Geometric", "RandomHorizontalFlip", "PhotometricDistort"]
    assert [type(step).__name__ for step in steps] == names
    assert (steps[1].zoom_out, steps[1].iou_crop, steps[1].scale) == (0.5, 0.8, (1.0, 1.5))


def test_multilabel_images_are_balanced():
    """An image is drawn by its rarest label, with the power of the recipe (LVIS's repeat factors)."""
    demo = RECIPES["demo-multilabel"]
    labels = (train := prepared(replace(demo, data=replace(demo.data, balanced=0.5))).train).targets
    counts = Counter(label for each in labels for label in each)
    expected = [max((counts[label] / len(labels)) ** -0.5 for label in each) if each else 1.0 for each in labels]
    assert list(train.weights) == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_the_class_cap_is_that_of_the_recipe():
    assert setup("demo-segment", augment={"class_cap": 0.6}).train.transform.transforms[1].cap == 0.6


@pytest.fixture
def steps(monkeypatch):
    """(side of the images, loss) of each batch that a classifier trains on."""
    seen, real = [], ClassificationModule.training_step

    def training_step(self, batch, index):
        loss = real(self, batch, index)
        seen.append((batch[0].shape[-1], loss.item()))
        return loss

    monkeypatch.setattr(ClassificationModule, "training_step", training_step)
    return seen


def test_images_grow_and_flips_alternate_with_the_epochs(photos, tmp_path, monkeypatch, steps):
    """The side grows from half of the run to 80 % of it, in steps of 16 pixels."""
    epochs, real = [], ImageDataset.alternate_flips
    monkeypatch.setattr(
        ImageDataset, "alternate_flips", lambda self, seed, epoch: (epochs.append(epoch), real(self, seed, epoch))
    )
    data, optim = {"image_size": 64, "start_size": 32}, {"epochs": 5, "batch_size": 36}
    train(recipe(photos, data=data, optim=optim, augment={"hflip": "alternate"}), tmp_path / "run")
    assert [side for side, _ in steps] == [32, 32, 32, 48, 64]
    assert sorted(set(epochs)) == [0, 1, 2, 3, 4]
    assert epochs[-1] == 4


def test_the_training_loss_is_the_mean_of_its_epoch(photos, tmp_path, steps):
    train(recipe(photos, optim={"epochs": 2, "batch_size": 12, "accumulate": 2}), tmp_path / "run")
    losses = torch.tensor([loss for _, loss in steps]).view(2, 6).mean(1).tolist()
    assert [float(row["train_loss"]) for row in rows(tmp_path / "run" / "metrics.csv")] == pytest.approx(losses)


def weights(photos, tmp_path, monkeypatch, **optim):
    """The classifier's weight before the run and after each step, and at the end of the run."""
    seen, real = [], ClassificationModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        if not seen:
            seen.append(self.model.head.weight.detach().clone())
        real(self, *args, **kwargs)
        seen.append(self.model.head.weight.detach().clone())

    monkeypatch.setattr(ClassificationModule, "optimizer_step", optimizer_step)
    optim = {"optimizer": "sgd", "epochs": 1, "warmup_epochs": 0.0, "weight_decay": 0.0} | optim
    train(recipe(photos, optim=optim), tmp_path / "run")
    last = torch.load(tmp_path / "run" / "last.ckpt")
    return seen, last["state_dict"]["model.head.weight"]


def test_gradients_are_clipped(photos, tmp_path, monkeypatch):
    """At a rate of 1 the first step of SGD is 1.9 times as long as the gradient, by Nesterov's momentum of 0.9."""
    seen, _ = weights(photos, tmp_path, monkeypatch, lr=1.0, clip_grad=1e-4)
    assert len(seen) == 4
    assert 0 < (seen[1] - seen[0]).norm() <= 1.9e-4


def test_the_average_is_that_of_all_steps(photos, tmp_path, monkeypatch):
    """By hand: the first step is copied, update n has the decay min(0.4, 1 - (1 + n) ** (-2 / 3))."""
    seen, average = weights(photos, tmp_path, monkeypatch, lr=0.5, ema_decay=0.4)
    expected = seen[1]
    for n, value in enumerate(seen[2:], start=1):
        decay = min(0.4, 1 - (1 + n) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average, expected)
    assert not torch.allclose(average, seen[-1], rtol=0.01)
