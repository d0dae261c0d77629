"""Classification datasets of every format but shards: their content, its order, and what is rejected."""

import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import native, need_name, truncate
from PIL import Image
from torchvision.transforms.functional import to_tensor

from dualtoken_vit.data import classification
from dualtoken_vit.data.classification import build_datasets, build_val_dataset
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, ClassificationData
from dualtoken_vit.tasks.registry import get_task


@pytest.fixture
def data(photos):
    return ClassificationData(root=str(photos))


def save(path, colour, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# Folders


def test_folder(data, photos):
    train, val = build_datasets(data, 3)
    assert train.class_names == val.class_names == ("blue", "green", "red")
    assert train.targets == [0] * 12 + [1] * 12 + [2] * 12
    assert val.targets == [0] * 6 + [1] * 6 + [2] * 6
    assert train.image_names[:3] == [str(photos / "train/blue" / name) for name in ("0.jpg", "1.jpg", "2.jpg")]
    assert train.image_names[11] == str(photos / "train/blue/11.jpg")  # after 9, not after 1
    image, target = train[30]
    assert target == 2
    np.testing.assert_array_equal(image, Image.open(photos / "train/red/6.jpg"))
    train.transform = to_tensor
    assert torch.equal(train[30][0], to_tensor(image))


def test_grey_images(data):
    assert build_datasets(data, 1)[0][0][0].mode == "L"
    with pytest.raises(InputError, match=r"--model\.in-chans 4"):
        build_datasets(data, 4)


def test_folders_in_class_folders_odd_names_and_what_is_hidden(tmp_path):
    for split in ("train", "val"):
        for name in ("class 10", "class 2", "Żaba 🐸", "[b]"):
            save(tmp_path / split / name / "deep" / "er" / "ä [1].PNG", "red")
    save(tmp_path / "train" / ".ipynb_checkpoints" / "a.png", "red")
    save(tmp_path / "train" / "class 2" / "._a.png", "red")
    (tmp_path / "train" / "class 2" / "notes.txt").write_text("")
    train, val = build_datasets(ClassificationData(root=str(tmp_path)), 3)
    assert train.class_names == val.class_names == ("[b]", "class 2", "class 10", "Żaba 🐸")
    assert train.targets == val.targets == [0, 1, 2, 3]


def test_splits_by_other_names(photos):
    (photos / "val").rename(photos / "test")
    _, val = build_datasets(ClassificationData(root=str(photos), val_split="test"), 3)
    assert len(val) == 18


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: shutil.rmtree(root),
            r"photos: no such folder; give the one that contains train/CLASS/\*\.jpg and val/CLASS/\*\.jpg$",
        ),
        (
            lambda root: shutil.rmtree(root / "train"),
            r"photos/train: no such folder; expected .*without splits give --data\.holdout",
        ),
        (lambda root: shutil.rmtree(root / "val"), r"photos/val: no such folder.*give --data\.holdout 0\.1"),
        (
            lambda root: [(root / "train").rename(root / "Training"), (root / "val").rename(root / "Testing")],
            r"photos/train: no such folder, but Testing, Training in .*photos; give --data\.train-split NAME, and",
        ),
        (
            lambda root: (root / "val").rename(root / "test"),
            r"photos/val: no such folder; expected .*without a val folder give --data\.holdout 0\.1",
        ),
        (lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], r"photos/train: has no class folders"),
        (
            lambda root: (root / "train/grey").mkdir(),
            r"photos/train: no images in class 'grey'; add some, .* \(check-data lists all problems\)$",
        ),
        (lambda root: [p.unlink() for p in (root / "val").rglob("*.jpg")], r"photos/val: no images$"),
        (
            lambda root: save(root / "val/pink/0.png", "pink"),
            r"photos/val: class 'pink' is not among the 3 trained classes: 'blue', 'green', 'red'; rename",
        ),
        (lambda root: (root / "val/red").rename(root / "val/rot"), r"photos/val: class 'rot' is not among the 3 "),
        (
            lambda root: (root / "val/green").rename(root / "val/Green"),
            r"photos/val: class 'Green' is not .* or leave it out by --data\.exclude \(did you mean 'green'\?\)$",
        ),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(data, photos, spoil, message):
    spoil(photos)
    with pytest.raises(InputError, match=native(message)) as caught:
        build_datasets(data, 3)
    assert "\n" not in str(caught.value)


def test_no_root_and_an_unknown_kind():
    with pytest.raises(InputError, match=r"--data\.root is missing"):
        build_datasets(ClassificationData(), 3)
    with pytest.raises(
        InputError, match=r"--data\.dataset shape: unknown format; choose from folder, shapes, imagenette"
    ):
        build_datasets(ClassificationData(dataset="shape"), 3)


# The part that is held out


def test_holdout_is_a_fixed_share_of_each_class_and_leaves_val_alone(data, photos):
    shutil.rmtree(photos / "val")
    data = replace(data, holdout=0.25)
    train, val = build_datasets(data, 3)
    assert Counter(val.targets) == {0: 3, 1: 3, 2: 3}
    assert Counter(train.targets) == {0: 9, 1: 9, 2: 9}
    everything = sorted(str(path) for path in photos.rglob("*.jpg"))
    assert sorted(train.image_names + val.image_names) == everything
    for dataset in (train, val):
        for index, (path, target) in enumerate(zip(dataset.image_names, dataset.targets, strict=True)):
            assert dataset.class_names[target] in path
            np.testing.assert_array_equal(dataset[index][0], Image.open(path))
    torch.manual_seed(1)
    again, _ = build_datasets(data, 3)
    assert again.image_names == train.image_names
    assert build_val_dataset(data, 3).image_names == val.image_names


def test_holdout_takes_at_least_one_of_a_class(data):
    _, val = build_datasets(replace(data, holdout=0.01), 3)
    assert Counter(val.targets) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("share", [-0.1, 0.51, 1.0])
def test_holdout_out_of_range(data, share):
    with pytest.raises(InputError, match=r"--data\.holdout .*between 0 and 0\.5"):
        build_datasets(replace(data, holdout=share), 3)


def test_one_image_cannot_be_held_out(data, photos):
    save(photos / "train/pink/0.png", "pink")
    with pytest.raises(InputError, match=r"--data\.holdout 0\.1: class 'pink' has only one image"):
        build_datasets(replace(data, holdout=0.1), 3)


# Evaluation by a checkpoint's classes


def test_a_stored_holdout_does_not_hide_the_data_given(data):
    def images(**given):
        follows = get_task("classification").relocate(Classification(data=stored), given)
        return sorted(build_val_dataset(replace(stored, **follows | given), 3).image_names)

    stored = replace(data, holdout=0.25)
    val = sorted(build_val_dataset(data, 3).image_names)
    held = sorted(build_val_dataset(stored, 3).image_names)
    assert images(root=data.root) == images(val_split="val") == val
    assert images(workers=0) == images(root=data.root, holdout=0.25) == held
    stored = replace(data, holdout=0.25, fold=2)
    held = sorted(build_val_dataset(stored, 3).image_names)
    assert images(workers=0) == images(root=data.root, holdout=0.25) == held
    assert images(root=data.root) == val
    assert images(root=data.root, holdout=0.25, fold=0) != held
    assert len(val) == 18
    assert len(held) == 9


def test_splits_are_no_classes(photos):
    for split, name in (("train", "Training"), ("val", "Testing")):
        (photos / split).rename(photos / name)
    (photos / "__MACOSX").mkdir()
    with pytest.raises(InputError, match="but Testing, Training in"):
        build_datasets(ClassificationData(root=str(photos), holdout=0.1), 3)
    train, val = build_datasets(ClassificationData(root=str(photos), train_split="Training", val_split="Testing"), 3)
    assert (train.class_names, len(val)) == (("blue", "green", "red"), 18)


def test_targets_follow_the_order_of_the_checkpoint(data):
    val = build_val_dataset(data, 3, ["red", "blue", "green"])
    assert val.class_names == ("red", "blue", "green")
    for path, target in zip(val.image_names, val.targets, strict=True):
        assert val.class_names[target] in path
    with pytest.raises(InputError, match=r"class 'blue', 'green' is not among the 2 trained classes: 'red', 'rot'"):
        build_val_dataset(data, 3, ["red", "rot"])


def test_classes_left_out(data, photos):
    data = replace(data, exclude=("green",))
    for images, count in zip(build_datasets(data, 3), (12, 6), strict=True):
        assert images.class_names == ("blue", "red")
        assert images.targets == [0] * count + [1] * count
        assert [path.split("/")[-2] for path in images.image_names] == ["blue"] * count + ["red"] * count
    shutil.rmtree(photos / "val/green")  # which the validation images may lack
    val = build_val_dataset(data, 3, ["red", "blue"])
    assert Counter(val.targets) == {0: 6, 1: 6}
    train, val = build_datasets(replace(data, holdout=0.25), 3)
    assert (Counter(train.targets), Counter(val.targets)) == ({0: 9, 1: 9}, {0: 3, 1: 3})
    with pytest.raises(
        InputError, match=r"^--data\.exclude grean: no such class; the classes are 'blue', 'green', 'red'"
    ):
        build_datasets(replace(data, exclude=("green", "grean")), 3)


@pytest.mark.parametrize("how", ["no folder", "empty folder"])
def test_validation_images_may_lack_a_class_which_is_reported(data, photos, how):
    shutil.rmtree(photos / "val/green")
    if how == "empty folder":
        (photos / "val/green").mkdir()
    _, val = build_datasets(data, 3)
    assert val.class_names == ("blue", "green", "red")
    assert Counter(val.targets) == {0: 6, 2: 6}
    assert all(val.class_names[target] in path for path, target in zip(val.image_names, val.targets, strict=True))
    assert val.notes == (f"{photos / 'val'}: no images of class 'green'",)
    names = ["red", "green", *(f"c{i}" for i in range(6)), "blue"]
    val = build_val_dataset(data, 3, names)
    assert Counter(val.targets) == {0: 6, 8: 6}
    assert val.notes == (f"{photos / 'val'}: no images of class 'green', 'c0', 'c1', 'c2', 'c3' and 2 more",)


def test_names_that_are_hard_to_print(tmp_path):
    name = "$a\n\udcff\r"
    need_name(tmp_path, name)
    for split in ("train", "val"):
        for folder in (name, "other"):
            save(tmp_path / split / folder / "0.png", "red")
            (tmp_path / split / folder / "0.png").rename(tmp_path / split / folder / f"{name}.png")
    data = ClassificationData(root=str(tmp_path))
    train, val = build_datasets(data, 3)
    assert train.class_names == val.class_names == (name, "other")
    assert train.verify() == []
    (tmp_path / "val" / name).rename(tmp_path / "val" / f"{name}2")
    with pytest.raises(InputError) as caught:
        build_datasets(data, 3)
    shown = "$a\\n\ufffd\\r"
    assert f"class '{shown}2' is not among the 2 trained classes: '{shown}', 'other'" in str(caught.value)
    (tmp_path / "train" / "other" / f"{name}.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        train.verify()
    assert str(caught.value).startswith(f"{tmp_path / 'train' / 'other' / shown}.png: cannot be read as an image")


# Unreadable images


def test_an_unreadable_image_stops_with_its_name(data, photos):
    train, val = build_datasets(data, 3)
    assert train.verify() == val.verify(skip=True) == []
    truncate(photos / "train/green/7.jpg")
    (photos / "train/red/0.jpg").write_text("no image")
    with pytest.raises(
        InputError, match=native(r"green/7\.jpg: cannot be read.* \(and 1 more: .*--data\.unreadable skip")
    ):
        train.verify()


def test_unreadable_images_are_left_out_if_asked_for(data, photos):
    truncate(photos / "train/green/7.jpg")
    train, _ = build_datasets(data, 3)
    found, (again, _) = [str(photos / "train/green/7.jpg")], build_datasets(data, 3)
    assert train.verify(skip=True) == found
    again.load_state_dict(train.state_dict())  # as in a process that has not read the images
    assert train.state_dict() == again.state_dict() == {"left_out": ["train/green/7.jpg"]}
    assert (again.image_names, again.targets, list(again.sources)) == (
        train.image_names,
        train.targets,
        list(train.sources),
    )
    assert Counter(train.targets) == {0: 12, 1: 11, 2: 12}
    assert not any(str(Path("green/7")) in path for path in train.image_names)
    for path, (image, target) in zip(train.image_names, train, strict=True):
        assert train.class_names[target] in path
        np.testing.assert_array_equal(image, Image.open(path))
    assert train.verify() == []


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_a_class_without_readable_images_is_an_error_in_training_and_absent_in_validation(data, photos, holdout):
    for path in chain((photos / "train/green").iterdir(), (photos / "val/green").iterdir()):
        truncate(path)
    data = replace(data, holdout=holdout)
    train, val = build_datasets(data, 3)
    with pytest.raises(InputError, match=native(r"no readable images in class 'green', for example .*green/")):
        train.verify(skip=True)
    count = 3 if holdout else 6
    for images in (val, build_val_dataset(data, 3, train.class_names)):
        first = images.image_names[count]
        assert len(images.verify(skip=True)) == count
        assert Counter(images.targets) == {0: count, 2: count}
        assert images.notes == (f"no readable images in class 'green', for example {first}",)


def test_validation_images_of_which_none_can_be_read(data, photos):
    for path in (photos / "val").rglob("*.jpg"):
        truncate(path)
    with pytest.raises(InputError, match="no readable images in class 'blue', 'green', 'red'"):
        build_val_dataset(data, 3).verify(skip=True)


def test_unreadable_images_are_found_by_verify_only(data):
    with pytest.raises(InputError, match=r"^--data\.unreadable skip: needs --data\.verify, .*leave one of them out$"):
        build_datasets(replace(data, unreadable="skip", verify=False), 3)
    build_datasets(replace(data, unreadable="skip"), 3)
    build_datasets(replace(data, verify=False), 3)


# Imagenette


@pytest.fixture
def imagenette(tmp_path, monkeypatch):
    """Two images of each of two of its classes, unpacked."""
    monkeypatch.setattr(classification, "IMAGENETTE_COUNTS", {"train": 4, "val": 4})
    for split in ("train", "val"):
        for wnid in ("n03028079", "n01440764"):
            for index in range(2):
                save(tmp_path / "imagenette2-160" / split / wnid / f"{wnid}_{index}.JPEG", "red")
    return ClassificationData(dataset="imagenette", root=str(tmp_path))


def test_imagenette_that_is_there(imagenette):
    train, val = build_datasets(imagenette, 3)
    assert train.class_names == val.class_names == ("tench", "church")
    assert train.targets == val.targets == [0, 0, 1, 1]
    assert "n01440764" in train.image_names[0]


def test_imagenette_cut_short(imagenette, tmp_path):
    next((tmp_path / "imagenette2-160/val").rglob("*.JPEG")).unlink()
    with pytest.raises(InputError, match=native(r"imagenette2-160/val: 3 images, not 4: .* remove .* and run again")):
        build_datasets(imagenette, 3)


def test_imagenette_that_cannot_be_fetched(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"cannot be downloaded \(Name or service not known\).*imagenette2-160\.tgz"):
        build_datasets(ClassificationData(dataset="imagenette", root=str(tmp_path)), 3)


# timm's data specs


@pytest.mark.parametrize(
    ("spec", "package"),
    [("wds/x", "webdataset"), ("hfds/x", "datasets"), ("tfds/x", "tensorflow-datasets")],
)
def test_a_missing_package_is_named(spec, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        build_datasets(ClassificationData(dataset=spec, root="x"), 3)


def test_hugging_face_folder(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    data = ClassificationData(dataset=f"hfds/{photos}", root=str(tmp_path / "cache"), val_split="validation")
    train, val = build_datasets(data, 3)
    assert train.class_names == val.class_names == ("blue", "green", "red")
    assert Counter(train.targets) == {0: 12, 1: 12, 2: 12}
    assert len(val) == 18
    colours = [np.asarray(image).mean((0, 1)).argmax() for image, _ in train]  # 0 is red
    assert [2 - colour for colour in colours] == train.targets
    held = build_datasets(replace(data, holdout=0.25), 3)
    assert Counter(held[1].targets) == {0: 3, 1: 3, 2: 3}
    truncate(photos / "train/red/3.jpg")
    with pytest.raises(InputError, match=r"train/\d+: cannot be read"):
        train.verify()
    with pytest.raises(InputError, match=r"split 'none'.*validation"):
        build_datasets(replace(data, val_split="none"), 3)


@pytest.mark.parametrize("targets", [["cat", "dog"], [0, None]])
def test_labels_of_hugging_face_that_are_no_classes(targets, monkeypatch):
    pytest.importorskip("datasets")
    reader = SimpleNamespace(iter_targets=lambda: iter(targets), class_to_idx={})
    monkeypatch.setattr("dualtoken_vit.data.classification.create_reader", lambda *args, **kwargs: reader)
    with pytest.raises(
        InputError, match=r"hfds/x: split 'train' has labels that are not the numbers of classes, or none"
    ):
        build_datasets(ClassificationData(dataset="hfds/x"), 3)


def test_classes_of_a_format_that_is_not_known():
    with pytest.raises(InputError, match=r"--data\.dataset nope/x: unknown format; choose from folder, "):
        build_datasets(ClassificationData(dataset="nope/x"), 3)


def test_class_folders_of_numbers_in_circles(tmp_path):
    for split in ("train", "val"):
        for name in ("②", "①", "10", "9"):
            save(tmp_path / split / name / "a.png", "red")
    train, _ = build_datasets(ClassificationData(root=str(tmp_path)), 3)
    assert train.class_names == ("9", "10", "①", "②")


def test_a_shared_file_of_an_excluded_class(tmp_path):
    for split in ("train", "val"):
        for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
            save(tmp_path / split / name / f"{name}.png", colour)
    (tmp_path / "train/c/link.png").symlink_to(tmp_path / "train/a/a.png")
    data = ClassificationData(root=str(tmp_path))
    with pytest.raises(InputError, match="files in more than one class: 1"):
        build_datasets(data, 3)
    train, _ = build_datasets(replace(data, exclude=("c",)), 3)
    assert (len(train), train.notes) == (2, ())


# Folders and tables that are not what they seem


def test_folders_of_kaggle_are_no_classes(tmp_path):
    """train_images beside test_images and a table with unknown columns, as in APTOS 2019."""
    for name in ("train_images/1.png", "train_images/2.png", "test_images/1.png", "test_images/2.png"):
        save(tmp_path / name, "red")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "sample_submission.csv").write_text("id_code,diagnosis\n1,0\n")
    (tmp_path / "train.csv").write_text("id_code,diagnosis\n1,0\n2,1\n")
    with pytest.raises(InputError, match=r"train: no such folder, but test_images, train_images in") as caught:
        build_datasets(ClassificationData(root=str(tmp_path), holdout=0.5), 3)
    needed = (
        f"{tmp_path / 'train.csv'} has the columns 'id_code', 'diagnosis', but is read only with a column of files "
    )
    assert f"; {needed}(filename, file_name, " in str(caught.value)


@pytest.mark.parametrize("names", [("beaker", "test_tube"), ("test_strip", "test_tube"), ("train", "trainer")])
def test_classes_named_like_splits(tmp_path, names):
    for name in names:
        for index in range(2):
            save(tmp_path / name / f"{index}.png", "red")
    train, _ = build_datasets(ClassificationData(root=str(tmp_path), holdout=0.5, train_split="x"), 3)
    assert train.class_names == names


def test_a_table_that_is_not_read_is_noted(tmp_path):
    for name in ("images", "thumbs"):
        for index in range(2):
            save(tmp_path / name / f"{index}.png", "red")
    (tmp_path / "labels.csv").write_text("filename;class\n0.png;cat\n1.png;dog\n")
    data = ClassificationData(root=str(tmp_path), holdout=0.5)
    note, _ = build_datasets(data, 3)[0].notes
    columns = "'filename;class', which are not separated by commas, but is read only with a column of files (filename, "
    assert note.startswith(f"{tmp_path / 'labels.csv'} has the columns {columns}")
    (tmp_path / "labels.csv").unlink()
    assert build_datasets(data, 3)[0].notes == ()


def test_roboflow_s_folder_of_validation_images_is_named(data, photos):
    (photos / "val").rename(photos / "valid")
    with pytest.raises(
        InputError, match=native(r"photos/val: no such folder; there is valid: give --data\.val-split NAME$")
    ):
        build_datasets(data, 3)
    assert len(build_datasets(replace(data, val_split="valid"), 3)[1]) == 18


def test_images_in_a_parquet_file(tmp_path):
    """As Hugging Face stores them."""
    save(tmp_path / "a.png", "red")
    image = {"bytes": (tmp_path / "a.png").read_bytes() * 1000, "path": "a.png"}
    pyarrow.parquet.write_table(pyarrow.table({"image": [image] * 2, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(InputError) as caught:
        build_datasets(ClassificationData(root=str(tmp_path), holdout=0.5), 3)
    what = "the column 'image' has the images themselves; give --data.dataset hfds"
    assert str(caught.value) == f"{tmp_path / 'train.parquet'}: {what}/{tmp_path} in place of --data.root"


def test_a_name_of_no_image_is_cut(tmp_path):
    (tmp_path / "train.csv").write_text(f"file,class\n{'x' * 5000}.png,cat\n")
    with pytest.raises(InputError, match=r"train\.csv, line 2: x{200}: no such image beside the table"):
        build_datasets(ClassificationData(root=str(tmp_path), holdout=0.5), 3)


def test_the_hidden_tables_of_macos_are_not_read(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.png", "red")
    (tmp_path / "labels.csv").write_text("file,label\na.png,x\nb.png,x\nc.png,y\nd.png,y\n")
    (tmp_path / "._labels.csv").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    train, _ = build_datasets(ClassificationData(root=str(tmp_path), holdout=0.5), 3)
    assert train.class_names == ("x", "y")
