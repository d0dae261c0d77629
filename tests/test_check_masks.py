"""The report of check-data on images with masks."""

import re

import numpy as np
import pytest
from helpers import native
from label_files import labelme, save, shape
from mask_files import data, labels_of, mean_label, spoil
from PIL import ExifTags, Image
from torchvision.transforms.v2.functional import to_pil_image

from dualtoken_vit.data.check.segmentation import check as check_data
from dualtoken_vit.data.segmentation import build_datasets
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Model, Segmentation, SegmentationData

# check-data


def test_check_of_drawn_data(tmp_path, capsys):
    recipe = Segmentation(data=SegmentationData(dataset="shapes", crop_size=(32, 32), limit=20))
    assert check_data(recipe, tmp_path)
    assert "train: 20 images with a mask; 0.0% of the pixels are ignored" in capsys.readouterr().out
    assert Image.open(tmp_path / "labels.png").width == 1920


def check(tree, capsys, **args):
    verdict = check_data(Segmentation(data=data(tree, **args)), tree / "out")
    return verdict, capsys.readouterr().out


def test_check_of_sound_data(tree, capsys):
    verdict, out = check(tree, capsys)
    assert verdict
    assert "train: 2 images with a mask; 2.1% of the pixels are ignored" in out
    labels = np.stack([labels_of(tree, name) for name in "01"])
    for label, name in enumerate(("sky", "road", "car")):
        share = (labels == label).sum() / (labels < 3).sum()
        assert re.search(rf"│ {name} +│ +{share:.2%} │", out)
    assert Image.open(tree / "out" / "labels.png").width == 1920


def test_check_reports_images_that_exif_rotates(tree, capsys):
    path = tree / "images" / "train" / "1.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down: the size is the same
    Image.open(path).save(path, exif=exif)
    verdict, out = check(tree, capsys)
    assert verdict
    assert f"note: rotated by EXIF in train: 1 image; masks must fit the rotated image: {path}" in out


def test_check_counts_classes_and_knows_large_images(tree, capsys):
    (tree / "classes.txt").unlink()
    verdict, out = check(tree, capsys, crop_size=(5, 5))
    assert verdict
    assert [re.search(rf"│ {label} +│", out) is not None for label in range(4)] == [True, True, True, False]
    assert "--data.image-size makes training faster" in out
    assert "--data.image-size makes training faster" not in check(tree, capsys)[1]
    for path in (tree / "annotations" / "train").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(
        InputError,
        match=native(r"no usable training mask; the first: .*annotations/train/\d\.png: cannot be read as an image"),
    ):
        check(tree, capsys)


def test_check_of_the_first_images(tree, capsys):
    spoil(tree, lambda labels: labels[:-2], "1")
    (tree / "classes.txt").write_text("sky\nroad\ncar\nboat\n")
    verdict, out = check(tree, capsys, limit=1)
    assert verdict
    assert "train: 1 image with a mask" in out
    assert "note: --data.limit 1: 1 class in no mask of train: 'boat'" in out
    verdict, out = check(tree, capsys, limit=2)  # which leaves out nothing
    assert not verdict
    assert "class in no mask: train/boat" in out


def test_check_names_what_was_planted(tree, capsys):
    spoil(tree, mean_label)
    spoil(tree, lambda labels: labels[:-2], "1")
    (tree / "images" / "val" / "0.jpg").rename(tree / "images" / "val" / "1.jpg")
    (tree / "classes.txt").write_text("sky\nroad\ncar\nboat\n")
    verdict, out = check(tree, capsys)
    assert not verdict
    for line in (
        "class in no mask: train/boat",
        f"without a mask: {tree / 'images/val/1.jpg'}",
        f"mask without an image: {tree / 'annotations/val/0.png'}",
        f"{tree / 'annotations/train/0.png'}: label 7 in 3 pixels",
        f"{tree / 'annotations/train/1.png'}: 20x10 pixels",
        "problems: 5",
    ):
        assert line in out


def test_check_counts_problems_of_held_out_images_once(tree, capsys):
    (tree / "annotations" / "train" / "0.png").rename(tree / "annotations" / "train" / "9.png")
    Image.open(tree / "images" / "train" / "1.jpg").save(tree / "images" / "train" / "2.jpg")
    Image.open(tree / "annotations" / "train" / "1.png").save(tree / "annotations" / "train" / "2.png")
    verdict, out = check(tree, capsys, holdout=0.5)
    assert not verdict
    assert out.count("without a mask: ") == out.count("mask without an image: ") == 1


def test_the_sheet_of_grey_training_images_is_grey(tree, monkeypatch):
    shown = []
    draw = "dualtoken_vit.data.check.segmentation.to_pil_image"
    monkeypatch.setattr(draw, lambda image: shown.append(image.shape) or to_pil_image(image))
    recipe = Segmentation(data=data(tree), model=Model(in_chans=1))
    check_data(recipe, tree / "out", augmented=True)
    assert {shape[0] for shape in shown} == {1}


def test_check_of_splits_with_classes_of_their_own(tmp_path, capsys):
    """As VOC, LabelMe and Roboflow list them: only those that a split has."""
    boxes = {"cat": [[4.0, 2.0], [24.0, 12.0]], "dog": [[30.0, 0.0], [40.0, 20.0]], "zebra": [[0.0, 0.0], [2.0, 2.0]]}
    for split, width, names in (("train", 40, ("cat", "dog")), ("val", 80, ("dog",)), ("test", 60, ("dog", "zebra"))):
        shapes = [shape(name, boxes[name], "rectangle") for name in names]
        save(tmp_path, f"{split}/a.png", (width, 20))
        save(tmp_path, f"{split}/a.json", labelme("a.png", (width, 20), shapes))
    verdict, out = check(tmp_path, capsys)
    assert verdict
    assert re.search(r"│ cat +│ +25\.00% │ +0\.00% │", out)
    assert re.search(r"│ dog +│ +25\.00% │ +12\.50% │", out)
    verdict, out = check(tmp_path, capsys, val_split="test")
    assert not verdict
    assert "class missing: train/zebra" in out
    with pytest.raises(InputError, match="class 'zebra' is not among the 3 trained classes"):
        build_datasets(data(tmp_path, val_split="test"), 3)


def test_check_counts_classes_before_the_limit(tree, capsys):
    (tree / "classes.txt").unlink()
    spoil(tree, lambda labels: labels * 0, "0")
    _, out = check(tree, capsys, limit=1)
    assert "but there are" not in out
    assert re.search(r"│ 2 +│", out)
