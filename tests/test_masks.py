"""Images with masks: what is read, and what is rejected."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import native, need_name, save_scenes, save_tiff
from mask_files import data, drawn, labels_of, mean_label, spoil
from PIL import Image

from dualtoken_vit.data.balance import class_weights
from dualtoken_vit.data.masks import IGNORE, read_mask
from dualtoken_vit.data.segmentation import FORMATS, MaskedImages, build_dataset, build_datasets
from dualtoken_vit.data.shapes import CLASSES, scene
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import SegmentationData

# Reading


def test_samples(tree):
    train, val = build_datasets(data(tree), 3)
    assert train.class_names == val.class_names == ("sky", "road", "car")
    assert (len(train), len(val)) == (2, 1)
    image, mask = train[1]
    assert torch.equal(mask, torch.from_numpy(labels_of(tree, "1").copy()))
    pixels = np.asarray(Image.open(tree / "images" / "train" / "1.jpg"))
    assert torch.equal(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert build_datasets(data(tree), 1)[0][0][0].shape == (1, 12, 20)
    assert len(build_datasets(data(tree, limit=1), 3)[0]) == 1
    assert train.verify() == []


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
    (tree / "classes.txt").write_text("road\ncar\n")
    mask = build_datasets(data(tree, ignore_index=2), 3)[0][0][1]
    assert mask.tolist() == [[{0: 0, 1: 1, 2: IGNORE}[label] for label in row] for row in labels_of(tree).tolist()]


def test_classes_without_a_file_are_counted(tree):
    (tree / "classes.txt").unlink()
    assert build_datasets(data(tree), 3)[0].class_names == ("0", "1", "2")
    assert build_datasets(data(tree, reduce_zero_label=True), 3)[0].class_names == ("0", "1")
    spoil(tree, lambda labels: labels % 2, "0")
    assert build_datasets(data(tree, limit=1), 3)[0].class_names == ("0", "1", "2")  # of all the masks


def test_without_a_file_no_label_of_a_class_is_ignored(tree):
    (tree / "classes.txt").unlink()
    for name in ("0", "1"):
        spoil(tree, lambda labels: np.where(labels == 255, 0, labels), name)
    with pytest.raises(InputError, match=r"--data.ignore-index 1: is among the labels .*; give it a higher number"):
        build_datasets(data(tree, ignore_index=1), 3)


@pytest.mark.parametrize("names", [True, False])
def test_the_first_class_is_not_ignored(tree, names):
    if not names:
        (tree / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"--data.ignore-index 0: .* give --data.reduce-zero-label instead"):
        build_datasets(data(tree, ignore_index=0), 3)


def test_masks_are_not_jpeg(tree):
    path = tree / "annotations" / "train" / "0.png"
    Image.fromarray(labels_of(tree)).save(path, format="jpeg")
    with pytest.raises(InputError, match=native(r"train/0\.png: a JPEG mask, .* save masks as PNG")):
        read_mask(path)


@pytest.mark.parametrize("kind", ["median-frequency", "log"])
def test_classes_are_weighted_by_their_pixels(tree, kind):
    """By their definitions, pixel by pixel; "car" is in one image, "sign" in none."""
    (tree / "classes.txt").write_text("sky\nroad\ncar\nsign\n")
    spoil(tree, lambda labels: np.where(labels == 2, 0, labels), name="1")
    train, _ = build_datasets(data(tree), 3)
    assert train.verify() == []
    masks = [[label for label in labels_of(tree, name).ravel() if label != 255] for name in ("0", "1")]
    if kind == "log":
        pixels = [label for mask in masks for label in mask]
        expected = [1 / np.log(1.02 + pixels.count(k) / len(pixels)) for k in range(3)]
    else:
        shares = []
        for k in range(3):
            having = [label for mask in masks if k in mask for label in mask]
            shares.append(having.count(k) / len(having))
        expected = [np.median(shares) / share for share in shares]
    assert class_weights(kind, *train.pixels).tolist() == pytest.approx([*expected, 0], rel=1e-5)


def test_the_median_of_two_frequencies_lies_between_them():
    pixels = torch.tensor([[30, 10, 0], [40, 40, 0]])
    assert class_weights("median-frequency", *pixels).tolist() == pytest.approx([0.5 / 0.75, 0.5 / 0.25, 0])


def test_drawn_scenes_are_counted_by_their_masks():
    scenes = drawn(32, limit=3)[0]
    scenes.verify()
    masks = [scenes.load(index)[1] for index in range(3)]
    assert scenes.pixels.tolist() == [
        [sum(int((mask == k).sum()) for mask in masks) for k in range(len(scenes.class_names))],
        [sum(mask.size for mask in masks if k in mask) for k in range(len(scenes.class_names))],
    ]


def test_masks_in_which_nothing_counts(tree):
    for name in ("0", "1"):
        spoil(tree, lambda labels: np.full_like(labels, 255), name=name)
    train, _ = build_datasets(data(tree), 3)
    with pytest.raises(InputError, match=r"0\.jpg and all others: no pixel has a class; see --data.ignore-index"):
        train.verify()


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
    with pytest.raises(InputError, match=r"line 1: label 0, but labels must count up from 1 \(--data\.reduce-zero"):
        build_datasets(data(tree, reduce_zero_label=True), 3)


def test_a_file_of_the_classes_from_another_editor(tree):
    (tree / "classes.txt").write_bytes("\ufeff0\tsky\r\n1\troad\r\n2\tcar\r\n".encode())
    assert build_datasets(data(tree), 3)[0].class_names == ("sky", "road", "car")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{'9' * 5000}\tsky\nroad\n", r"classes\.txt, line 1: '999.* is neither NAME nor NUMBER<TAB>"),
        ("sky\nroad\ncar\tvehicle\nperson\n", r"classes\.txt, line 3: 'car\\tvehicle' is neither NAME nor NUMBER<TAB>"),
        ("0\tsky\n2\troad\n", r"classes\.txt, line 2: label 2, but labels must count up from 0"),
        ("sky\n", r"classes\.txt: 1 class, but 2 to 254 are supported"),
    ],
)
def test_a_file_of_the_classes_that_cannot_be_meant(tree, text, message):
    (tree / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        build_datasets(data(tree), 3)


def test_a_class_cannot_be_ignored(tree):
    with pytest.raises(InputError, match=r"--data\.ignore-index 1 is the label of 'road' in .*classes\.txt"):
        build_datasets(data(tree, ignore_index=1), 3)
    with pytest.raises(InputError, match=r"--data\.ignore-index 1 is the label of 'sky'"):
        build_datasets(data(tree, ignore_index=1, reduce_zero_label=True), 3)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_keep_their_labels(tree, bits):
    """PIL writes no grey of 2 or 4 bits: here by the format's own rules."""
    labels = labels_of(tree) % 3

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = labels.shape
    bit_rows = (labels[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # (H, W, bits), the highest first
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in bit_rows)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tree / "annotations" / "train" / "0.png").write_bytes(png)
    assert torch.equal(build_datasets(data(tree), 3)[0][0][1], torch.from_numpy(labels))


def test_the_label_to_ignore_may_need_16_bits(tree):
    spoil(tree, lambda labels: np.where(labels == 255, 65535, labels.astype(np.uint16)).astype(np.uint16))
    mask = build_datasets(data(tree, ignore_index=65535), 3)[0][0][1]
    assert mask[0, :5].tolist() == [IGNORE] * 5
    assert (mask != IGNORE).sum() == mask.numel() - 5
    with pytest.raises(InputError, match=r"label 65535 in 5 pixels"):
        build_datasets(data(tree), 3)[0][0]


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
        (
            "beyond",
            r"train/0\.png: label 7 in 3 pixels \(and 1 more such labels\), but there are 3 classes: correct it",
        ),
        ("beyond in 16 bits", r"train/0\.png: label 700 in \d+ pixels, but there are 3 classes"),
        ("size", r"annotations/train/0\.png: 20x10 pixels, but .*images/train/0\.jpg is 20x12 .* make them equal"),
        ("colours", r"train/0\.png: a mask of mode RGB, but masks need one label per pixel, or .* NAME,R,G,B"),
        ("no mask", r"images/train/0\.jpg: no mask for this image; see check-data"),
        ("damaged", r"annotations/train/0\.png: cannot be read as an image"),
        ("twins", r"images/train/0\.jpg and .*0\.png have the same name"),
    ],
)
def test_mistakes_are_named(tree, what, message):
    change(tree, what)
    with pytest.raises(InputError, match=native(message)) as error:
        build_datasets(data(tree), 3)[0].verify()
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
    with pytest.raises(InputError, match=native(message)):
        build_datasets(replace(data(tree), **args), 3)


def test_targets_follow_the_trained_classes(tree):
    with pytest.raises(
        InputError, match=r"class file in .*: class 'car' is not among the 2 trained classes: 'sky', 'r"
    ):
        build_dataset(data(tree), "val", 3, ("sky", "road"))
    trained = ("boat", "sky", "car", "road")
    val = build_dataset(data(tree), "val", 3, trained)
    assert val.class_names == trained
    assert val.notes == (f"{tree}: no class 'boat'",)
    labels = np.asarray(Image.open(tree / "annotations" / "val" / "0.png"))
    index = {0: 1, 1: 3, 2: 2, 255: IGNORE}  # sky, road, car
    assert val[0][1].tolist() == [[index[label] for label in row] for row in labels.tolist()]
    (tree / "classes.txt").write_text("sky\nroad\nsky\n")
    with pytest.raises(InputError, match=r"classes\.txt: the class 'sky' is listed twice"):
        build_datasets(data(tree), 3)


@pytest.mark.parametrize(("bits", "photometric"), [(8, 0), (8, None), (8, 1), (4, 0), (16, 0), (16, 1)])
def test_masks_of_inverted_tiff_files_are_refused(tmp_path, bits, photometric):
    """Pillow inverts pixels of up to 8 bits where 0 is white, which is also its reading of files without the tag."""
    labels = [0, 1, 2, 15]
    pixels = bytes([0x01, 0x2F]) if bits == 4 else np.array(labels, f"<u{bits // 8}").tobytes()
    save_tiff(path := tmp_path / "a.tif", pixels, 4, bits, photometric)
    if bits == 16 or photometric == 1:
        assert read_mask(path).tolist() == [labels]
    else:
        with pytest.raises(InputError, match=r"a\.tif: a TIFF mask whose 0 is white: .* save masks as PNG"):
            read_mask(path)


def test_a_negative_label_is_not_a_class(tree):
    for kind in ("train", "val"):
        for path in (tree / "annotations" / kind).iterdir():
            Image.open(path).save(path.with_suffix(".tif"))
            path.unlink()
    labels = np.zeros((12, 20), np.int32)
    labels[3, 4:7], labels[5, 5] = -1, -300
    path = tree / "annotations" / "train" / "0.tif"
    Image.fromarray(labels).save(path)
    assert read_mask(path).tolist() == labels.tolist()
    train, _ = build_datasets(data(tree), 3)
    message = r"0\.tif: label -300 in 1 pixel \(and 1 more such labels\), but there are 3 classes"
    with pytest.raises(InputError, match=message):
        train[0]
    with pytest.raises(InputError, match=message):
        build_datasets(data(tree, reduce_zero_label=True, classes=None), 3)[0].verify()


def test_what_verify_found_goes_to_other_processes(tree):
    train, _ = build_datasets(data(tree), 3)
    again, _ = build_datasets(data(tree), 3)
    assert train.state_dict() == {"pixels": None}
    train.verify()
    again.load_state_dict(train.state_dict())
    assert torch.equal(again.pixels, train.pixels)


def test_files_that_are_not_images_are_reported(tree):
    (tree / "images" / "train" / "Thumbs.db").write_bytes(b"")
    (tree / "annotations" / "train" / "0.json").write_text("{}")
    train, val = build_datasets(data(tree), 3)
    assert train.notes == tuple(
        f"skipped files that are not images: 1, for example {tree / name}"
        for name in ("images/train/Thumbs.db", "annotations/train/0.json")
    )
    assert val.notes == ()


def test_names_that_are_hard_to_print(tree):
    need_name(tree, "a\n\r.png")
    (tree / "classes.txt").write_bytes(b"$sky\nro\xff\x0bad\ncar\n")
    for kind, extension in (("images", "jpg"), ("annotations", "png")):
        folder = tree / kind / "train"
        (folder / f"0.{extension}").rename(folder / f"a\n\r.{extension}")
    train, _ = build_datasets(data(tree), 3)
    assert train.class_names == ("$sky", "ro\udcff\x0bad", "car")
    assert train.verify() == []
    (tree / "annotations" / "train" / "a\n\r.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        train.verify()
    shown = tree / "annotations" / "train" / r"a\n\r.png"
    assert str(caught.value).startswith(f"{shown}: cannot be read as an image")
    with pytest.raises(InputError, match=r"class 'ro\ufffd\\x0bad' is not among the 2 trained classes: '\$sky', 'car'"):
        build_dataset(data(tree), "val", 3, ("$sky", "car"))


def test_a_format_that_is_not_known():
    with pytest.raises(InputError, match=r"--data\.dataset voc: unknown format; choose from masks, shapes$"):
        build_datasets(SegmentationData(dataset="voc"), 3)


def test_a_new_format_is_one_reader(monkeypatch):
    def read(data, split):
        labels = np.repeat(np.uint8([[0, 1]]), 4, axis=0)
        return MaskedImages([(split, split)], ("left", "right"), draw=lambda _: (Image.new("RGB", (2, 4)), labels))

    monkeypatch.setitem(FORMATS, "halves", read)
    _, val = build_datasets(SegmentationData(dataset="halves"), 3)
    val.verify()
    assert val.image_names == ["val"]
    assert val.pixels.tolist() == [[4, 4], [8, 8]]
    assert val[0][1].tolist() == [[0, 1]] * 4


def test_drawn_scenes(tmp_path):
    scenes = drawn(48, limit=3)[1]
    assert scenes.class_names == ("ground", *CLASSES)
    for index in range(3):
        image, shapes = scene("val", index, 48)
        found, mask = scenes.load(index)
        assert np.array_equal(image, found)
        assert (mask > 0).sum() == sum(shape.mask.sum() for shape in shapes)
        for shape in shapes:
            assert (mask[shape.mask] == shape.label + 1).all()
    save_scenes(tmp_path, 48, train=2, val=3)
    _, val = build_datasets(data(tmp_path), 3)
    assert val.class_names == scenes.class_names
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(val[i], scenes[i], strict=True))


def test_masks_that_are_links_to_one_file(tree):
    """As DVC and git-annex store equal files."""
    masks = sorted((tree / "annotations" / "train").iterdir())
    for path in masks[1:]:
        path.unlink()
        path.symlink_to(masks[0].name)
    train = build_dataset(data(tree), "train", 3)
    assert len(train) == len(masks)
    assert all(torch.equal(train[0][1], train[index][1]) for index in range(len(masks)))
