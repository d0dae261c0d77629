"""Pictures with masks: what is read, what is refused, what training sees, and the report of check-data."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from dualtoken_vit.data.check_masks import check_segmentation_data
from dualtoken_vit.data.masks import (
    IGNORE,
    CappedCrop,
    ShapeScenes,
    build_datasets,
    build_val_dataset,
    save_scenes,
    train_transform,
)
from dualtoken_vit.data.sampling import seeded
from dualtoken_vit.data.shapes import CLASSES, scene
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Segmentation, SegmentationAugment, SegmentationData


@pytest.fixture
def tree(tmp_path):
    """Two training pictures and one for validation, 20x12 with labels 0 to 2 and 255; classes sky, road, car."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (12, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}.jpg")
            labels = rng.integers(0, 3, (12, 20)).astype(np.uint8)
            labels[0, :5] = 255
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{index}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\n")
    return tmp_path


def data(tree, **args):
    return SegmentationData(root=str(tree), **args)


def labels_of(tree, name="0"):
    return np.asarray(Image.open(tree / "annotations" / "train" / f"{name}.png"))


def spoil(tree, change, name="0", mode=None):
    labels = change(labels_of(tree, name).copy())
    Image.fromarray(labels, mode).save(tree / "annotations" / "train" / f"{name}.png")


# Reading


def test_samples(tree):
    train, val = build_datasets(data(tree), 3)
    assert train.class_names == val.class_names == ("sky", "road", "car")
    assert (len(train), len(val)) == (2, 1)
    picture, mask = train[1]
    assert torch.equal(mask, torch.from_numpy(labels_of(tree, "1").copy()))
    pixels = np.asarray(Image.open(tree / "images" / "train" / "1.jpg"))
    assert torch.equal(picture, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert build_datasets(data(tree), 1)[0][0][0].shape == (1, 12, 20)
    assert len(build_datasets(data(tree, limit=1), 3)[0]) == 1
    assert train.verify(progress=False) == []


@pytest.mark.parametrize("kind", ["palette", "16 bits", "1 bit"])
def test_kinds_of_masks(tree, kind):
    labels = labels_of(tree) % 2
    if kind == "palette":
        image = Image.fromarray(labels)
        image.putpalette([200, 0, 0, 0, 200, 0])
    else:
        image = Image.fromarray(labels.astype(np.uint16 if kind == "16 bits" else bool))
    image.save(tree / "annotations" / "train" / "0.png")
    mask = build_datasets(data(tree), 3)[0][0][1]
    assert torch.equal(mask, torch.from_numpy(labels))


def test_labels_are_shifted_and_ignored(tree):
    table = {0: IGNORE, 1: 0, 2: 1, 255: IGNORE}
    (tree / "classes.txt").write_text("road\ncar\n")
    mask = build_datasets(data(tree, reduce_zero_label=True), 3)[0][0][1]
    assert mask.tolist() == [[table[label] for label in row] for row in labels_of(tree).tolist()]
    spoil(tree, lambda labels: np.where(labels == 255, 2, labels))
    mask = build_datasets(data(tree, ignore_index=2), 3)[0][0][1]
    assert mask.tolist() == [[{0: 0, 1: 1, 2: IGNORE}[label] for label in row] for row in labels_of(tree).tolist()]


def test_classes_without_a_file_are_counted(tree):
    (tree / "classes.txt").unlink()
    assert build_datasets(data(tree), 3)[0].class_names == ("0", "1", "2")
    assert build_datasets(data(tree, reduce_zero_label=True), 3)[0].class_names == ("0", "1")


def test_ade20k_s_layout(tree):
    for kind in ("images", "annotations"):
        for split, name in (("train", "training"), ("val", "validation")):
            (tree / kind / split).rename(tree / kind / name)
    (tree / "classes.txt").unlink()
    rows = (
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall\n2\t0.1\t6046\t612\t1\tbuilding, edifice\n"
    )
    (tree / "objectInfo150.txt").write_text(rows)
    splits = dict(train_split="training", val_split="validation", reduce_zero_label=True)
    train, val = build_datasets(data(tree, **splits), 3)
    assert train.class_names == ("wall", "building, edifice")
    assert set(val[0][1].unique().tolist()) == {0, 1, IGNORE}


def test_classes_with_their_numbers(tree):
    (tree / "classes.txt").write_text("0\tsky\n1\ta road\n2\tcar\n255\tnothing\n")
    assert build_datasets(data(tree), 3)[0].class_names == ("sky", "a road", "car")
    with pytest.raises(
        InputError, match=r"classes\.txt: label 0 is the class number 0: labels must count up from 0, or"
    ):
        build_datasets(data(tree, reduce_zero_label=True), 3)


# Mistakes


def mean_label(labels):
    labels[3, 4:7] = 7
    labels[5, 5] = 9
    return labels


def change(tree, what):
    annotations, images = tree / "annotations" / "train", tree / "images" / "train"
    if what == "beyond":
        spoil(tree, mean_label)
    elif what == "beyond in 16 bits":
        spoil(tree, lambda labels: np.where(labels == 2, 700, labels.astype(np.uint16)))
    elif what == "size":
        spoil(tree, lambda labels: labels[:-2])
    elif what == "colours":
        spoil(tree, lambda labels: np.stack([labels] * 3, -1))
    elif what == "no mask":
        (annotations / "0.png").unlink()
    elif what == "damaged":
        (annotations / "0.png").write_bytes((annotations / "0.png").read_bytes()[:50])
    elif what == "twins":
        Image.new("RGB", (20, 12)).save(images / "0.png")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("beyond", r"train/0\.png: label 7 in 3 pixels \(and 1 more such labels\), but there are 3 classes: mend it"),
        ("beyond in 16 bits", r"train/0\.png: label 700 in \d+ pixels, but there are 3 classes"),
        ("size", r"annotations/train/0\.png: 20x10 pixels, but .*images/train/0\.jpg is 20x12 .* make them equal"),
        ("colours", r"train/0\.png: a mask of mode RGB, but one number a pixel is meant: .*fromarray"),
        ("no mask", r"images/train/0\.jpg: a picture without a mask in .*annotations/train"),
        ("damaged", r"annotations/train/0\.png: cannot be read as a picture"),
        ("twins", r"images/train/0\.jpg and .*0\.png have one name"),
    ],
)
def test_mistakes_are_named(tree, what, message):
    change(tree, what)
    with pytest.raises(InputError, match=message) as error:
        build_datasets(data(tree), 3)[0].verify(progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"root": ""}, "--data.root is missing"),
        ({"val_split": "test"}, r"images/test: no such folder; expected .*NAME\.jpg"),
        ({"classes": "nowhere.txt"}, r"--data\.classes nowhere\.txt: no such file"),
    ],
)
def test_missing_things_are_named(tree, args, message):
    with pytest.raises(InputError, match=message):
        build_datasets(replace(data(tree), **args), 3)


def test_the_classes_must_be_the_checkpoint_s(tree):
    with pytest.raises(InputError, match=r"3 classes, but the checkpoint has 2"):
        build_val_dataset(data(tree), 3, ("sky", "road"))
    with pytest.raises(InputError, match=r"class 1 is 'road', but 'car' in the checkpoint; the order counts"):
        build_val_dataset(data(tree), 3, ("sky", "car", "road"))
    (tree / "classes.txt").write_text("sky\nroad\nsky\n")
    with pytest.raises(InputError, match=r"classes\.txt: the class 'sky' is there twice"):
        build_datasets(data(tree), 3)


# Training


def test_picture_and_mask_are_changed_alike():
    """A picture whose colour is its label stays so, whatever is done to both; what is padded is ignored."""
    half = torch.arange(64) >= 32
    labels = (2 * half[:, None] + half).byte()  # quarters
    picture = (labels * 80).expand(3, -1, -1).contiguous()
    augment = SegmentationAugment(photometric=0.0, class_cap=1.0)
    transform = train_transform(SegmentationData(crop_size=(48, 80)), augment)
    sample = tv_tensors.Image(picture), tv_tensors.Mask(labels)
    flipped, padded = set(), 0
    for seed in range(12):
        with seeded(seed):
            x, y = transform(*sample)
        assert (x.shape, y.shape, y.dtype) == ((3, 48, 80), (48, 80), torch.uint8)
        there = y != IGNORE
        assert (x[0][~there] == 0).all()
        right = (x[0].float() / 80 - y).abs()[there] < 0.1
        assert right.float().mean() > 0.9  # edges are mixed in the picture, not in the mask
        assert set(y.unique().tolist()) <= {*labels.unique().tolist(), IGNORE}
        padded += (~there).any().item()
        flipped.add(x.sum().item())
    assert 0 < padded < 12
    assert len(flipped) > 6


def test_a_crop_is_capped():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 30:] = 1
    mask[:4] = IGNORE
    masks = tv_tensors.Mask(mask)

    def largest(cap):
        shares = []
        for seed in range(20):
            with seeded(seed):
                counts = torch.bincount(CappedCrop((16, 16), cap)(masks).flatten(), minlength=256)[:IGNORE]
            shares.append((counts.max() / counts.sum()).item())
        return shares

    assert sum(share == 1 for share in largest(1.0)) > 5
    assert sum(share > 0.75 for share in largest(0.75)) <= 2  # ten tries may fail


def test_pictures_come_at_a_side_before_the_scale():
    scenes = ShapeScenes("train", 64)
    scenes.transform = train_transform(
        SegmentationData(crop_size=(64, 64), image_size=32), SegmentationAugment(scale=(1.0, 1.0))
    )
    _, y = scenes[0]
    assert (y != IGNORE).sum() == 32 * 32


def test_drawn_scenes(tmp_path):
    scenes = ShapeScenes("val", 48, count=3)
    assert scenes.class_names == ("ground", *CLASSES)
    for index in range(3):
        picture, shapes = scene("val", index, 48)
        found, mask = scenes.load(index)
        assert np.array_equal(picture, found)
        assert (mask > 0).sum() == sum(shape.mask.sum() for shape in shapes)
        for shape in shapes:
            assert (mask[shape.mask] == shape.label + 1).all()
    save_scenes(tmp_path, 48, train=2, val=3)
    _, val = build_datasets(data(tmp_path), 3)
    assert val.class_names == scenes.class_names
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(val[i], scenes[i], strict=True))


# check-data


def check(tree, capsys, **args):
    verdict = check_segmentation_data(Segmentation(data=data(tree, **args)), tree / "out")
    return verdict, capsys.readouterr().out


def test_check_of_sound_data(tree, capsys):
    verdict, out = check(tree, capsys)
    assert verdict
    assert "train: 2 pictures with a mask; 2.1% of the pixels are ignored" in out
    labels = np.stack([labels_of(tree, name) for name in "01"])
    for label, name in enumerate(("sky", "road", "car")):
        share = (labels == label).sum() / (labels < 3).sum()
        assert re.search(rf"│ {name} +│ +{share:.2%} │", out)
    assert Image.open(tree / "out" / "labels.png").width == 1920


def test_check_names_what_was_planted(tree, capsys):
    spoil(tree, mean_label)
    spoil(tree, lambda labels: labels[:-2], "1")
    (tree / "images" / "val" / "0.jpg").rename(tree / "images" / "val" / "1.jpg")
    (tree / "classes.txt").write_text("sky\nroad\ncar\nboat\n")
    verdict, out = check(tree, capsys)
    assert not verdict
    for line in (
        "class in no mask: train/boat",
        f"without a mask: {tree}/images/val/1.jpg",
        f"mask without a picture: {tree}/annotations/val/0.png",
        f"{tree}/annotations/train/0.png: label 7 in 3 pixels",
        f"{tree}/annotations/train/1.png: 20x10 pixels",
        "problems: 5",
    ):
        assert line in out
