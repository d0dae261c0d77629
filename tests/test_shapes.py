"""The generated shapes: their areas, boxes and masks, and that they are not too easy."""

from collections import Counter

import numpy as np
import pytest

from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.shapes import CLASSES, ShapeImages, draw
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ClassificationData

# Shapes


def test_shapes():
    train, val = build_datasets(ClassificationData(dataset="shapes", image_size=32), 3)
    assert train.class_names == val.class_names == CLASSES
    assert Counter(train.targets) == dict.fromkeys(range(6), 500)
    assert Counter(val.targets) == dict.fromkeys(range(6), 100)
    assert train[0][0].size == (32, 32)
    assert train.verify() == []
    again, _ = build_datasets(ClassificationData(dataset="shapes", image_size=32), 3)
    with pytest.raises(InputError, match=r"--data\.dataset shapes has the splits train and val; leave out --data"):
        build_datasets(ClassificationData(dataset="shapes", val_split="test"), 3)
    with pytest.raises(InputError, match=r"--data\.dataset shapes draws its own images; for files give .* folder"):
        build_datasets(ClassificationData(dataset="shapes", root="photos"), 3)
    assert all(train[index][0].tobytes() == again[index][0].tobytes() for index in (0, 1, 2999))
    images = {dataset[index][0].tobytes() for dataset in (train, val) for index in range(50)}
    assert len(images) == 100


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", np.pi),
        ("cross", 2 * 0.6 * 2 * np.sqrt(1 - 0.3**2) - 0.6**2),  # two bars less the square where they meet
        ("ring", np.pi * (1 - 0.55**2)),
        ("square", 2.0),
        ("star", 10 * 0.5 * 0.42 * np.sin(np.pi / 5)),
        ("triangle", 3 * np.sqrt(3) / 4),
    ],
)
def test_a_shape_has_its_area_and_box(name, area):
    for seed in range(5):
        _, (shape,) = draw(np.random.default_rng(seed), 256, [CLASSES.index(name)])
        rows, columns = np.nonzero(shape.mask)
        assert shape.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        corner = np.stack([columns, rows], 1).max(0) - np.stack([columns, rows], 1).min(0)
        radius = np.sqrt(shape.mask.sum() / area)
        assert radius * 1.02 >= 0.2 * 256
        assert radius <= 0.45 * 256 * 1.02
        assert (corner >= 1.1 * radius).all()
        assert (corner <= 2.05 * radius).all()


def test_of_several_shapes_each_mask_is_what_is_seen():
    for seed in range(5):
        image, shapes = draw(np.random.default_rng(seed), 64, [0, 3, 5])
        assert [shape.label for shape in shapes] == [0, 3, 5]
        assert sum(shape.mask.astype(int) for shape in shapes).max() == 1
        inside = np.asarray(image)[shapes[-1].mask].astype(float)
        assert np.abs(inside - np.median(inside, 0)).mean() < 20  # one colour, but for noise and strokes


def test_a_linear_classifier_does_not_tell_the_shapes():
    def pixels(split, count):
        drawn = ShapeImages(split, 16)
        flat = np.stack([np.asarray(drawn[index]).ravel() for index in range(count)]) / 128 - 1
        return np.concatenate([flat, np.ones((count, 1))], 1), np.array(drawn.targets[:count])

    (x, y), (x_val, y_val) = pixels("train", 3000), pixels("val", 600)
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ np.eye(6)[y])
    assert ((x_val @ weights).argmax(1) == y_val).mean() < 0.3  # chance is 0.17
