"""Conversion between label formats, there and back, and what a format lacks."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import need_name
from label_files import COMMON, EXPORTS, LINES, VOC, YOLO, A, B, objects, roboflow_coco, save
from pycocotools import mask as reference
from pycocotools.coco import COCO

from dualtoken_vit.cli import run
from dualtoken_vit.data.convert import convert
from dualtoken_vit.data.detection import save_scenes
from dualtoken_vit.data.formats import FORMATS, detect, read
from dualtoken_vit.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """COCO: two splits with images of one name, polygons with fractions, an image without objects.

    The names have a space and another folder `images`, as Label Studio writes it.
    """
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        images, annotations = [], []
        for index in range(count):
            width, height = rng.integers(50, 700, 2).tolist()
            images.append({"id": 10 * index, "file_name": f"images/no {index}.png", "width": width, "height": height})
            save(root, f"images/{split}/images/no {index}.png", (width, height))
            for _ in range(3 * (index != 1)):
                parts = rng.uniform(0, 1, (1, 5, 2)) * (width, height)
                polygons = [[round(value, 3) for value in part.ravel().tolist()] for part in parts]
                points = np.concatenate([np.reshape(part, (-1, 2)) for part in polygons])
                (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
                box = [left, top, right - left, bottom - top]
                number, category = len(annotations) + 1, int(rng.integers(2)) * 5 + 2
                entry = {"id": number, "image_id": 10 * index, "category_id": category, "bbox": box}
                annotations.append(entry | {"segmentation": polygons, "iscrowd": 0})
        categories = [{"id": 7, "name": "yes"}, {"id": 2, "name": "größer als"}]
        coco = {"images": images, "categories": categories, "annotations": annotations}
        save(root, f"annotations/instances_{split}.json", coco)
    return root


def contents(root):
    """Every object of every split: (split, end of the file name, size, class, crowd) to boxes and polygons."""
    name, splits = detect(root)
    found = {}
    for split, part in splits.items():
        coco = FORMATS[name].read(root, part).coco
        classes = {one["id"]: one["name"] for one in coco["categories"]}
        images = {one["id"]: one for one in coco["images"]}
        for one in coco["images"]:
            found[split, one["file_name"][-5:], one["width"], one["height"]] = []
        for one in coco["annotations"]:
            image = images[one["image_id"]]
            key = split, image["file_name"][-5:], image["width"], image["height"]
            fields = classes[one["category_id"]], one.get("iscrowd", 0), one["bbox"], one.get("segmentation")
            found[key].append(fields)
    return found


def same(first, second):
    assert first.keys() == second.keys()
    for key, ones in first.items():
        assert len(ones) == len(second[key])
        for (name, crowd, box, shape), (name2, crowd2, box2, shape2) in zip(ones, second[key], strict=True):
            assert (name, crowd) == (name2, crowd2)
            assert np.abs(np.subtract(box, box2)).max() < 1e-3
            assert shape == shape2


@pytest.mark.parametrize("via", [("yolo",), ("voc",), ("coco",), ("voc", "yolo"), ("yolo", "voc")])
def test_round_trips_are_exact(source, tmp_path, via):
    """Boxes to 1e-3 pixels, polygons to the point, images to the byte; pycocotools reads the result."""
    last = source
    for step, to in enumerate((*via, "coco")):
        target = tmp_path / f"{step}-{to}"
        counts = convert(last, target, to)
        assert all(before == after for before, after in counts.values())
        assert {split: before["images"] for split, (before, _) in counts.items()} == {"train": 4, "val": 2}
        same(contents(source), contents(target))
        last = target
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for split in ("train", "val"):
        api = COCO(str(last / f"annotations/instances_{split}.json"))
        original = COCO(str(source / f"annotations/instances_{split}.json"))
        names = {image["file_name"][-5:]: image["id"] for image in api.imgs.values()}
        for image in original.imgs.values():
            twin = names[image["file_name"][-5:]]
            ours, theirs = (
                each.loadAnns(each.getAnnIds(number)) for each, number in ((api, twin), (original, image["id"]))
            )
            for one, other in zip(ours, theirs, strict=True):
                assert np.array_equal(api.annToMask(one), original.annToMask(other))
                assert one["area"] == reference.area(original.annToRLE(other))
            copied = next((last / "images" / split).rglob(image["file_name"].rpartition("/")[2]))
            assert copied.read_bytes() == (source / "images" / split / image["file_name"]).read_bytes()


def test_an_object_in_parts_keeps_its_mask_in_yolo(tmp_path, capsys):
    parts = [[2.0, 2, 12, 2, 12, 12], [20.0, 5, 30, 5, 30, 15, 20, 15], [5.0, 15, 9, 15, 9, 19]]
    coco = roboflow_coco()
    coco["annotations"] = [coco["annotations"][0] | {"segmentation": parts, "bbox": [2, 2, 28.01, 17]}]  # rounded
    for name, content in {"train/a.png": A, "train/b.png": B, "train/_annotations.coco.json": coco}.items():
        save(tmp_path, name, content)
    convert(tmp_path, tmp_path / "yolo", "yolo")
    (one,) = read(str(tmp_path / "yolo"), "yolo", "train").coco["annotations"]
    masks = [
        reference.decode(reference.merge(reference.frPyObjects(each, 20, 40))) for each in (one["segmentation"], parts)
    ]
    assert np.array_equal(*masks)
    assert one["bbox"] == [2, 2, 28, 17]
    joined = "note: 1 object of several polygons written as one polygon with the same mask"
    assert capsys.readouterr().out.splitlines()[-1] == joined
    coco["annotations"][0]["bbox"] = [2, 2, 28, 17.5]
    save(tmp_path, "train/_annotations.coco.json", coco)
    convert(tmp_path, tmp_path / "other", "yolo")
    moved = "note: 1 box other than those of their polygons left out: YOLO derives them"
    assert capsys.readouterr().out.splitlines()[-2:] == [joined, moved]


def test_what_a_format_lacks_is_counted(tmp_path, capsys):
    """Masks as RLE, crowds, and boxes without polygons."""
    save_scenes(tmp_path / "scenes", 48, train=3, val=2)
    path = tmp_path / "scenes/annotations/instances_train.json"
    coco = json.loads(path.read_text())
    total = Counter(one["image_id"] for one in coco["annotations"]).total()
    coco["annotations"][0].update(iscrowd=1)
    coco["annotations"][1].update(segmentation=[[0, 0, 9, 0, 9, 9]], bbox=[-2, 0, 11, 9])
    path.write_text(json.dumps(coco))
    before, after = convert(tmp_path / "scenes", tmp_path / "yolo", "yolo")["train"]
    assert before == {"images": 3, "objects": total - 1, "crowds": 1, "polygons": 1, "masks": total - 2}
    assert after == {"images": 3, "objects": total - 1, "crowds": 0, "polygons": 0, "masks": 0}
    lines = capsys.readouterr().out.splitlines()
    assert "note: 1 crowd region left out: YOLO has none" in lines
    assert any(line.startswith("note: 1 polygon left out: ") for line in lines)
    assert "note: 1 box clipped to the image" in lines
    before, after = convert(tmp_path / "scenes", tmp_path / "voc", "voc")["train"]
    assert after == before | {"masks": 0}
    val = json.loads((tmp_path / "scenes/annotations/instances_val.json").read_text())["annotations"]
    assert f"note: {total - 2 + len(val)} masks left out: YOLO has none" in lines
    count = total - 1 + len(val)
    assert f"note: {count} masks left out: VOC's XML files have polygons only" in capsys.readouterr().out.splitlines()
    convert(tmp_path / "scenes", tmp_path / "coco", "coco")
    same(contents(tmp_path / "scenes"), contents(tmp_path / "coco"))


def test_trainval_is_a_split_to_train_on_but_not_to_write(export, tmp_path, capsys):
    root = export(VOC)
    assert objects(read(str(root), "auto", "trainval")) == COMMON
    assert convert(root, tmp_path / "new", "voc").keys() == {"train", "val"}
    assert "note: trainval left out: train and val have its images" in capsys.readouterr().out.splitlines()
    assert not list((tmp_path / "new").rglob("trainval*"))


def test_conversion_writes_all_or_nothing(export, tmp_path, capsys):
    root = export(YOLO, files={"labels/val/a.txt": "0 0.5 0.5 0.5\n"})
    target = tmp_path / "new"
    with pytest.raises(InputError, match=r"labels/val/a\.txt, line 1: 3 numbers"):
        convert(root, target, "voc")
    assert not target.exists()
    save(root, "labels/val/a.txt", LINES)
    save(root, "images/train/a.jpg", A)
    with pytest.raises(InputError, match=r"a\.\w+: another image differs only in the extension"):
        convert(root, target, "yolo")
    assert sorted(path.name for path in tmp_path.iterdir()) == [YOLO]
    (root / "images/train/a.jpg").unlink()
    target.mkdir()
    assert run(["convert", str(root), str(target), "--to", "voc"]) == 0
    assert "│ train │ after  │ 2      │ 2       │ 0" in capsys.readouterr().out
    kept = sorted(target.rglob("*"))
    with pytest.raises(InputError, match=r"new: is not empty; name a new folder"):
        run(["convert", str(root), str(target), "--to", "coco"])
    assert sorted(target.rglob("*")) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", YOLO]


def test_the_current_folder_is_not_replaced(export, tmp_path, monkeypatch):
    root = export(YOLO)
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    for target in (".", here, "../here"):
        with pytest.raises(InputError, match=r"(\.|here): is the current folder; name a new folder in it, or"):
            convert(root, target, "coco")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here", YOLO]


@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_a_disk_that_takes_capitals_for_small_letters(export, tmp_path, monkeypatch, to):
    """There, the second of two images would replace the first."""

    def exists(path):
        return path.name.lower() in {each.name.lower() for each in path.parent.glob("*")}

    root = export(YOLO, files={"images/train/A.png": B})
    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(InputError, match=r"images/train/[aA]\.png: another image differs only in .*capitals"):
        convert(root, tmp_path / "new", to)
    assert [each.name for each in tmp_path.iterdir()] == [YOLO]


def test_overlapping_parts_are_not_called_the_same_mask(tmp_path, capsys):
    """A polygon that is filled where an odd number of its parts overlap."""
    parts = [[2.0, 2, 22, 2, 22, 12, 2, 12], [12.0, 2, 32, 2, 32, 12, 12, 12]]
    coco = roboflow_coco()
    coco["annotations"] = [coco["annotations"][0] | {"segmentation": parts, "bbox": [2, 2, 30, 10]}]
    for name, content in {"train/a.png": A, "train/b.png": B, "train/_annotations.coco.json": coco}.items():
        save(tmp_path, name, content)
    convert(tmp_path, tmp_path / "yolo", "yolo")
    assert "same mask" not in (out := capsys.readouterr().out)
    assert "1 object of several polygons that overlap written as one" in out


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    coco = roboflow_coco()
    coco["annotations"] = [coco["annotations"][0] | {"segmentation": [[2.0, 2, 120, 2, 12, 12]]}]  # 3 times the width
    for name, content in {"train/a.png": A, "train/b.png": B, "train/_annotations.coco.json": coco}.items():
        save(tmp_path, name, content)
    with pytest.raises(InputError, match=r"train: cannot be written as yolo: .*must be a fraction"):
        convert(tmp_path, tmp_path / "yolo", "yolo")
    assert not (tmp_path / "yolo").exists()


@pytest.mark.parametrize("name", ["a\udce9.png", "a\x01.png", " a.png"])
def test_names_that_xml_cannot_hold(tmp_path, name):
    need_name(tmp_path, name)
    coco = roboflow_coco()
    coco["images"][0]["file_name"] = name
    for file, content in {f"train/{name}": A, "train/b.png": B, "train/_annotations.coco.json": coco}.items():
        save(tmp_path, file, content)
    convert(tmp_path, tmp_path / "coco", "coco")
    with pytest.raises(InputError, match="XML cannot hold this name"):
        convert(tmp_path, tmp_path / "voc", "voc")
    assert not (tmp_path / "voc").exists()


def test_a_test_split_that_was_not_exported(tmp_path, capsys):
    for name, content in EXPORTS["yolo-roboflow"].items():
        save(tmp_path, name, content)
    assert set(convert(tmp_path, tmp_path / "coco", "coco")) == {"train", "val"}
    assert "note: test left out: " in capsys.readouterr().out


PARTS = {
    "coco-2017": {
        "annotations/instances_Train.json": roboflow_coco(),
        "annotations/instances_default.json": roboflow_coco(),
        "annotations/instances_train2017.json": None,
        **{f"images/{name}": EXPORTS["coco-2017"][f"train2017/{name}"] for name in ("a.png", "b.png")},
    },
    "voc-devkit": {
        "ImageSets/Main/Train.txt": "a\n",
        "ImageSets/Main/default.txt": "b\n",
        **{f"ImageSets/Main/{each}.txt": None for each in ("train", "val", "trainval", "cat_train")},
    },
}


@pytest.mark.parametrize("kind", PARTS)
def test_cvat_s_tasks_without_a_subset_do_not_replace_the_training_images(export, tmp_path, kind):
    root, target = export(kind, files=PARTS[kind]), tmp_path / "new"
    with pytest.raises(InputError, match=r"has the split train, and all \(CVAT's default\), .*; rename one to val or"):
        convert(root, target, "yolo")
    assert not target.exists()
    split = read(str(root), "auto", "train")
    note = f"{root}: the split all (CVAT's default) is not read, because train is; rename it to val or test, or give "
    assert split.notes == (f"{note}--data.train-split all",)
    assert read(str(root), "auto", "all").notes == ()
    train = next(path for path in root.rglob("*Train*"))
    train.rename(train.with_name(train.name.replace("Train", "Test")))
    assert convert(root, target, "yolo").keys() == {"test", "train"}  # the latter is the only one without a name
    assert read(str(target), "yolo", "train").notes == ()
