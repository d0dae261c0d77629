"""Tiny trainings that several tests share."""

import csv
from dataclasses import replace

import pytest

from dualtoken_vit.data import classification as data_module
from dualtoken_vit.recipes import RECIPES, Classification
from dualtoken_vit.tasks.classification import ClassificationModule, ClassificationPredictor
from dualtoken_vit.tasks.run_folder import RunFolder
from dualtoken_vit.tasks.trainer import train

ARGS = ("dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32")


def recipe(root, **sections) -> Classification:
    """The folder recipe, tiny; sections are dictionaries of fields."""
    small = {
        "model": {"name": "dualtoken_vit_tiny", "args": ARGS, "pretrained": False},
        "data": {"root": str(root), "image_size": 32, "workers": 0},
        "optim": {"optimizer": "adamw", "lr": 1e-3, "schedule": "cosine", "batch_size": 12, "epochs": 2},
        "run": {"device": "cpu"},
    }
    changes = {name: small.get(name, {}) | sections.get(name, {}) for name in small.keys() | sections.keys()}
    base = RECIPES["folder"]
    return replace(base, **{name: replace(getattr(base, name), **fields) for name, fields in changes.items()})


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def module(model, made, names):
    preprocessing = dict(input_size=(3, made.data.image_size, made.data.image_size), mean=(0.0,) * 3, std=(1.0,) * 3)
    options = ClassificationPredictor.make_options(image_size=made.data.image_size)
    predictor = ClassificationPredictor(model, names, preprocessing, options)
    return ClassificationModule(predictor, made)


def interrupted(made, out, monkeypatch) -> None:
    """A run that ends in its first validation."""

    def stop(folder, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(RunFolder, "on_validation_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(made, out)


def count_reading(monkeypatch) -> list[str]:
    """Names of the images that `verify` will have read."""
    read = []
    real = data_module.unreadable

    def unreadable(dataset, skip):
        read.extend(dataset.image_names)
        return real(dataset, skip)

    monkeypatch.setattr(data_module, "unreadable", unreadable)
    return read
