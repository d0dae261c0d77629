"""Classification datasets of every format: their content, its order, and what is rejected."""

import io
import json
import os
import shutil
import threading
from collections import Counter
from copy import copy
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from dualtoken_vit.data import classification, threads
from dualtoken_vit.data.classification import build_datasets, build_val_dataset
from dualtoken_vit.data.sampling import loader
from dualtoken_vit.data.shapes import CLASSES, ShapeImages, draw
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, ClassificationData, from_dict
from dualtoken_vit.tasks.registry import get_task


@pytest.fixture
def data(photos):
    return ClassificationData(root=str(photos))


def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


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
            r"photos: no such folder; expected \S+/train/CLASS/\*\.jpg in --data\.root$",
        ),
        (
            lambda root: shutil.rmtree(root / "train"),
            r"photos/train: no such folder; expected .*without splits give --data\.holdout",
        ),
        (lambda root: shutil.rmtree(root / "val"), r"photos/val: no such folder.*give --data\.holdout 0\.1"),
        (lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], r"photos/train: has no class folders"),
        (lambda root: (root / "train/grey").mkdir(), r"photos/train: no images in class 'grey'"),
        (lambda root: [p.unlink() for p in (root / "val").rglob("*.jpg")], r"photos/val: no images$"),
        (
            lambda root: save(root / "val/pink/0.png", "pink"),
            r"photos/val: class 'pink' is not among the 3 trained classes: 'blue', 'green', 'red'; rename",
        ),
        (lambda root: (root / "val/red").rename(root / "val/rot"), r"photos/val: class 'rot' is not among the 3 "),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(data, photos, spoil, message):
    spoil(photos)
    with pytest.raises(InputError, match=message) as caught:
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
    assert len(val) == 18
    assert len(held) == 9


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
    assert val.notes == (f"{photos}/val: no images of class 'green'",)
    names = ["red", "green", *(f"c{i}" for i in range(6)), "blue"]
    val = build_val_dataset(data, 3, names)
    assert Counter(val.targets) == {0: 6, 8: 6}
    assert val.notes == (f"{photos}/val: no images of class 'green', 'c0', 'c1', 'c2', 'c3' and 2 more",)


def test_names_that_are_hard_to_print(tmp_path):
    name = os.fsdecode(b"$a\n\xff\r")
    for split in ("train", "val"):
        for folder in (name, "other"):
            save(tmp_path / split / folder / "0.png", "red")
            (tmp_path / split / folder / "0.png").rename(tmp_path / split / folder / f"{name}.png")
    data = ClassificationData(root=str(tmp_path))
    train, val = build_datasets(data, 3)
    assert train.class_names == val.class_names == (name, "other")
    assert train.verify(progress=False) == []
    (tmp_path / "val" / name).rename(tmp_path / "val" / f"{name}2")
    with pytest.raises(InputError) as caught:
        build_datasets(data, 3)
    shown = "$a\\n\ufffd\\r"
    assert f"class '{shown}2' is not among the 2 trained classes: '{shown}', 'other'" in str(caught.value)
    (tmp_path / "train" / "other" / f"{name}.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        train.verify(progress=False)
    assert str(caught.value).startswith(f"{tmp_path}/train/other/{shown}.png: cannot be read as an image")


# Unreadable images


def test_an_unreadable_image_stops_with_its_name(data, photos):
    train, val = build_datasets(data, 3)
    assert train.verify(progress=False) == val.verify(skip=True, progress=False) == []
    truncate(photos / "train/green/7.jpg")
    (photos / "train/red/0.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"green/7\.jpg: cannot be read.* \(and 1 more: .*--data\.unreadable skip"):
        train.verify(progress=False)


def test_unreadable_images_are_left_out_if_asked_for(data, photos):
    truncate(photos / "train/green/7.jpg")
    train, _ = build_datasets(data, 3)
    found, (again, _) = [str(photos / "train/green/7.jpg")], build_datasets(data, 3)
    assert train.verify(skip=True, progress=False) == found
    again.load_state_dict(train.state_dict())  # as in a process that has not read the images
    assert train.state_dict() == again.state_dict() == {"left_out": ["train/green/7.jpg"]}
    assert (again.image_names, again.targets, list(again.sources)) == (
        train.image_names,
        train.targets,
        list(train.sources),
    )
    assert Counter(train.targets) == {0: 12, 1: 11, 2: 12}
    assert not any("green/7" in path for path in train.image_names)
    for path, (image, target) in zip(train.image_names, train, strict=True):
        assert train.class_names[target] in path
        np.testing.assert_array_equal(image, Image.open(path))
    assert train.verify(progress=False) == []


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_a_class_without_readable_images_is_an_error_in_training_and_absent_in_validation(data, photos, holdout):
    for path in chain((photos / "train/green").iterdir(), (photos / "val/green").iterdir()):
        truncate(path)
    data = replace(data, holdout=holdout)
    train, val = build_datasets(data, 3)
    with pytest.raises(InputError, match=r"no readable images in class 'green', for example .*green/"):
        train.verify(skip=True, progress=False)
    count = 3 if holdout else 6
    for images in (val, build_val_dataset(data, 3, train.class_names)):
        first = images.image_names[count]
        assert len(images.verify(skip=True, progress=False)) == count
        assert Counter(images.targets) == {0: count, 2: count}
        assert images.notes == (f"no readable images in class 'green', for example {first}",)


def test_validation_images_of_which_none_can_be_read(data, photos):
    for path in (photos / "val").rglob("*.jpg"):
        truncate(path)
    with pytest.raises(InputError, match="no readable images in class 'blue', 'green', 'red'"):
        build_val_dataset(data, 3).verify(skip=True, progress=False)


def test_unreadable_images_are_found_by_verify_only(data):
    with pytest.raises(InputError, match=r"^--data\.unreadable skip: needs --data\.verify, .*leave one of them out$"):
        build_datasets(replace(data, unreadable="skip", verify=False), 3)
    build_datasets(replace(data, unreadable="skip"), 3)
    build_datasets(replace(data, verify=False), 3)


def test_in_threads_keeps_the_order_and_passes_errors_on(capfd):
    assert list(in_threads(lambda x: x * x, range(1000), 1000, "")) == [x * x for x in range(1000)]
    assert capfd.readouterr() == ("", "")
    assert list(in_threads(str, range(3), 3, "counting")) == ["0", "1", "2"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "counting" in err
    assert "3/3" in err
    assert "/s" not in err  # the rate is not yet known
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda x: 1 / x, range(3), 3, ""))


def test_in_threads_starts_no_more_threads_than_items(monkeypatch, capfd):
    pools = []
    monkeypatch.setattr(threads, "ThreadPool", lambda count: pools.append(count) or ThreadPool(count))
    monkeypatch.setattr(threads, "cores", lambda: 8)
    assert list(in_threads(str, range(3), 3, "")) == ["0", "1", "2"]
    assert list(in_threads(str, iter(range(20)), None, "")) == [str(x) for x in range(20)]
    assert pools == [3, 8]
    here = threading.get_ident()
    assert list(in_threads(lambda x: (x, threading.get_ident()), [7], 1, "counting")) == [(7, here)]
    assert list(in_threads(str, [], 0, "counting")) == []
    assert list(in_threads(str, range(3), 3, "", ahead=1)) == ["0", "1", "2"]
    assert pools == [3, 8]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ahead", [1, 4])
def test_in_threads_reads_few_items_ahead(ahead):
    read = []
    results = in_threads(str, (read.append(x) or x for x in range(100)), 100, "", ahead)
    for index in range(10):
        assert next(results) == str(index)
        assert len(read) <= index // ahead * ahead + ahead


@pytest.mark.parametrize("usable", [1, 3])
def test_one_thread_per_usable_core(monkeypatch, usable):
    """Not per core of the machine: a job scheduler or `taskset` may allow fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
    start = threading.Barrier(usable)  # passes once that many threads wait
    assert all(index >= 0 for index in in_threads(lambda _: start.wait(60), range(3 * usable), None, ""))
    assert len(set(in_threads(lambda _: threading.get_ident(), range(100), None, ""))) <= usable


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
    with pytest.raises(InputError, match=r"imagenette2-160/val: 3 images, not 4: .* remove .* and run again"):
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
        train.verify(progress=False)
    with pytest.raises(InputError, match=r"split 'none'.*validation"):
        build_datasets(replace(data, val_split="none"), 3)


@pytest.fixture
def shards(tmp_path):
    """webdataset: 3 shards of 5 and 2 of 5 images in 2 classes; image i of a split has the colour (i, i, i)."""
    wds = pytest.importorskip("webdataset")
    info = {}
    for split, count in (("train", 3), ("val", 2)):
        names = [f"{split}-{shard:04d}.tar" for shard in range(count)]
        for shard, name in enumerate(names):
            with wds.TarWriter(str(tmp_path / name)) as tar:
                for index in range(5 * shard, 5 * shard + 5):
                    file = io.BytesIO()
                    Image.new("RGB", (9, 7), (index,) * 3).save(file, "png")
                    tar.write({"__key__": f"{index:04d}", "png": file.getvalue(), "cls": str(index % 2).encode()})
        info[split] = dict(name=split, num_samples=5 * count, filenames=names, shard_lengths=[5] * count)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    return ClassificationData(dataset="wds/photos", root=str(tmp_path))


def stream(dataset, size, **args):
    """[(colour, class), ...] of each batch."""
    dataset.transform = to_tensor
    batches = loader(dataset, size, seed=1, **args)
    read = [list(zip((255 * x[:, 0, 0, 0]).round().int().tolist(), y.tolist(), strict=True)) for x, y in batches]
    assert len(read) == len(batches)
    return read


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_validated_exactly_once(shards, world, workers):
    _, val = build_datasets(shards, 3)
    assert (len(val), val.class_names) == (10, ("0", "1"))
    read = [stream(val, 4, train=False, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert sorted(chain(*chain(*read))) == [(index, index % 2) for index in range(10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_trained_on_by_seed_and_epoch(shards, workers):
    train, _ = build_datasets(shards, 3)
    epochs = [stream(train, 4, train=True, epoch=epoch, workers=workers) for epoch in range(2)]
    assert all(len(batch) == 4 for epoch in epochs for batch in epoch)
    assert all(colour % 2 == label for epoch in epochs for batch in epoch for colour, label in batch)
    assert len(set(chain(*epochs[0]))) >= 12
    assert epochs[0] != epochs[1]
    assert stream(train, 4, train=True, workers=workers) == epochs[0]
    assert stream(train, 4, train=True, skip=2, workers=workers) == epochs[0][2:]


def test_shards_are_dealt_out_to_processes(shards):
    train, _ = build_datasets(shards, 3)
    parts = [stream(train, 2, train=True, rank=rank, world=3, workers=4) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    seen = [{colour // 5 for batch in part for colour, _ in batch} for part in parts]
    assert sorted(map(sorted, seen)) == [[0], [1], [2]]  # a shard each
    with pytest.raises(InputError, match="3 training shards cannot be divided among 4 processes"):
        loader(train, 2, train=True, seed=0, world=4)


def test_shards_augmented_alike(shards):
    train, _ = build_datasets(shards, 3)
    train.transform = lambda image: torch.rand(2)
    for workers in (0, 1):
        these, those = ([x for x, _ in loader(train, 4, train=True, seed=5, workers=workers)] for _ in range(2))
        assert torch.equal(torch.cat(these), torch.cat(those))
        assert len(torch.cat(these).unique()) == 2 * 16


def test_class_names_of_shards(shards, tmp_path):
    assert build_val_dataset(shards, 3, ["odd", "even", "none"]).class_names == ("odd", "even", "none")
    (tmp_path / "classnames.txt").write_text("even\nodd\n")
    train, val = build_datasets(shards, 3)
    assert train.class_names == val.class_names == ("even", "odd")
    val = build_val_dataset(shards, 3, ["odd", "even"])
    assert sorted(chain(*stream(val, 4, train=False))) == [(index, 1 - index % 2) for index in range(10)]
    (tmp_path / "classnames.txt").write_text("even\n")
    with pytest.raises(InputError, match=r"train-0000\.tar/0001: class 1, but there are 1 class names"):
        build_datasets(shards, 3)[0].verify(progress=False)


def test_shards_by_their_names(shards, tmp_path):
    (tmp_path / "_info.json").unlink()
    named = replace(shards, train_split="train-{0000..0002}.tar|15", val_split="val-{0000..0001}.tar")
    train, val = build_datasets(named, 3)
    assert (len(train), len(val)) == (15, 10)
    with pytest.raises(InputError, match=r"_info\.json: split 'train' cannot be read \(.*No such file"):
        build_datasets(shards, 3)
    with pytest.raises(InputError, match=r"val-0002\.tar: cannot be read \(.*No such file"):
        build_datasets(replace(named, val_split="val-{0000..0002}.tar"), 3)
    with pytest.raises(InputError, match=r"--data\.holdout"):
        build_datasets(replace(named, holdout=0.1), 3)
    with pytest.raises(InputError, match=r"^--data\.exclude is not available for data that is read as a stream"):
        build_datasets(replace(named, exclude=("0",)), 3)


def test_options_that_need_the_number_of_an_image(shards):
    sections = {"augment": {"hflip": "alternate"}, "class_weights": "inverse"}
    recipe = from_dict({"data": vars(shards) | {"balanced": 0.5}} | sections)
    flags = "--augment.hflip alternate, --data.balanced, --class-weights"
    with pytest.raises(InputError, match=f"^{flags}: not available for data that is read as a stream"):
        get_task("classification").prepare(recipe, recipe.model)


@pytest.mark.parametrize("place", ["split", "_info.json"])
@pytest.mark.parametrize("name", ["pipe:touch PWNED; cat val-0000.tar", "scp://a/$(touch PWNED).tar", "file:x.tar"])
def test_shards_run_no_commands(shards, tmp_path, monkeypatch, name, place):
    """The names may come from a stranger's checkpoint or data set."""
    monkeypatch.chdir(tmp_path)
    if place == "split":
        shards = replace(shards, val_split=f"{name}|1")
    else:
        info = json.loads((tmp_path / "_info.json").read_text())
        info["splits"]["val"]["filenames"] = ["val-0000.tar", name]
        (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError) as caught:
        list(build_val_dataset(shards, 3))
    scheme = name.partition(":")[0]
    assert str(caught.value) == f"shard {name!r}: must be a file or an http(s) URL, not {scheme}:"
    assert not (tmp_path / "PWNED").exists()


def test_shards_from_the_web(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        val = build_val_dataset(replace(shards, val_split=f"{url}/val-{{0000..0001}}.tar"), 3)
        assert sorted(chain(*stream(val, 4, train=False))) == [(index, index % 2) for index in range(10)]
        with pytest.raises(InputError, match=r"x\.tar: cannot be read"):
            build_val_dataset(replace(shards, val_split=f"{url}/';touch PWNED;'x.tar"), 3)
        server.shutdown()
    assert not (tmp_path / "PWNED").exists()


def test_unreadable_images_in_shards(shards, tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "val-0001.tar")) as tar:
        tar.write({"__key__": "0005", "png": b"no image", "cls": b"0"})
        tar.write({"__key__": "0006", "cls": b"0"})
    val = build_val_dataset(shards, 3, ["even", "odd"])
    with pytest.raises(InputError, match=r"val-0001\.tar/0005: cannot be read as an image.*and 1 more"):
        val.verify(progress=False)
    with pytest.raises(InputError, match=r"val-0001\.tar/0005: cannot be read as an image"):
        stream(val, 4, train=False)
    val = build_val_dataset(replace(shards, val_split="val-{0000..0001}.tar|7"), 3, ["even", "odd"])
    again = copy(val)
    assert [name[-4:] for name in val.verify(skip=True, progress=False)] == ["0005", "0006"]
    again.load_state_dict(val.state_dict())
    for each in (val, again):
        parts = [stream(each, 4, train=False, rank=rank, world=2) for rank in range(2)]
        assert sorted(chain(*chain(*parts))) == [(index, index % 2) for index in range(5)]
    truncate(tmp_path / "val-0000.tar")
    with pytest.raises(InputError, match=r"val-0000\.tar: cannot be read"):
        val.verify(progress=False)


def test_shards_from_which_images_are_left_out_fill_their_batches(shards, tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "train-0002.tar")) as tar:
        tar.write({"__key__": "0010", "png": b"no image", "cls": b"0"})
    train, _ = build_datasets(replace(shards, train_split="train-{0000..0002}.tar|11"), 3)
    assert [name[-4:] for name in train.verify(skip=True, progress=False)] == ["0010"]
    assert len(train) == 10
    batches = stream(train, 4, train=True)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert set(chain(*batches)) == {(index, index % 2) for index in range(10)}
    with pytest.raises(InputError, match=r"no images for worker \d of 3; use fewer"):
        [stream(train, 2, train=True, rank=rank, world=3) for rank in range(3)]


def test_labels_in_the_json_of_a_shard(shards, tmp_path):
    wds = pytest.importorskip("webdataset")
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (3, 3, 3)).save(file, "jpeg")
    with wds.TarWriter(str(tmp_path / "val-0000.tar")) as tar:
        tar.write({"__key__": "a", "jpe": file.getvalue(), "cls": b"1", "json": {"label": 0}})
    info = json.loads((tmp_path / "_info.json").read_text())
    info["splits"]["val"] |= dict(num_samples=1, filenames=["val-0000.tar"], alt_label="label")
    (tmp_path / "_info.json").write_text(json.dumps(info))
    (tmp_path / "classnames.txt").write_bytes("zero\u2028\r\none\xff\n".encode("latin-1", "xmlcharrefreplace"))
    val = build_val_dataset(shards, 3)
    assert val.class_names == ("zero&#8232;", "one\udcff")
    assert [(image.size, label) for image, label in val] == [((9, 7), 0)]


def test_classes_of_a_format_that_is_not_known():
    with pytest.raises(InputError, match=r"--data\.dataset nope/x: unknown format; choose from folder, "):
        build_datasets(ClassificationData(dataset="nope/x"), 3)
