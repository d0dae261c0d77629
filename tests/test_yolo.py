"""YOLO's labels: polygons, rotated images, and what is wrong in a file."""

from pathlib import Path

import numpy as np
import pytest
from label_files import COMMON, LINES, TRIANGLE, YOLO, assert_one_error, objects
from PIL import Image
from pycocotools import mask as reference

from dualtoken_vit.data.detection import build_datasets, build_val_dataset
from dualtoken_vit.data.formats import detect, read
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import DetectionData

BOMB = "train: images/train\nb: &b [x, x, x, x]\na: &a [*b, *b, *b, *b]\n"  # with more of it, the value has gigabytes


def test_yolo_polygons_as_pycocotools_draws_them(export):
    """Segments of Ultralytics: fractions of the image; beside a box in another line, which has no mask."""
    line = "1 0.1 0.1 0.6 0.1 0.6 0.6\n"
    root = export("yolo-ultralytics", files={"labels/train/a.txt": line, "labels/val/a.txt": line + LINES})
    train, val = build_datasets(DetectionData(root=str(root)), masks=False, channels=3)
    assert train[0][1]["boxes"].tolist() == [[4, 2, 24, 12]]
    assert len(val[0][1]["labels"]) == 3
    mask = build_datasets(DetectionData(root=str(root), val_split="train"), masks=True, channels=3)[1][0][1]["masks"]
    coded = reference.merge(reference.frPyObjects([list(map(float, TRIANGLE))], 20, 40))
    assert np.array_equal(mask[0].numpy(), reference.decode(coded))
    with pytest.raises(InputError, match=r"\(val\): labels/val/a\.txt, line 2: has no segmentation, which Mask R-CNN"):
        build_val_dataset(DetectionData(root=str(root)), True, 3, ["cat", "dog"])


def test_yolo_fractions_are_of_the_rotated_image(export):
    root = export("yolo-labelimg")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.open(root / "a.png").save(root / "a.jpg", exif=exif)
    (root / "a.png").unlink()
    split = read(str(root), "auto", "train")
    assert split.coco["images"][0] == {"id": 1, "file_name": "a.jpg", "width": 20, "height": 40}
    assert objects(split)["a.jpg"][0] == ("cat", [2, 4, 10, 20])


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        (YOLO, {"labels/train/a.txt": "0 0.5 0.5 0.5\n"}, "labels/train/a.txt, line 1: 3 numbers after the class"),
        (YOLO, {"labels/train/a.txt": LINES + "0 1 1 1 1 1\n"}, "labels/train/a.txt, line 3: 5 numbers after the"),
        (YOLO, {"labels/train/a.txt": "2 0.5 0.5 0.5 0.5"}, "line 1: class '2' must be a number from 0 to 1"),
        (YOLO, {"labels/train/a.txt": "cat 0.5 0.5 0.5 0.5"}, "line 1: class 'cat' must be a number from 0 to 1"),
        (YOLO, {"labels/train/a.txt": "0 14 7 20 10"}, "line 1: 20 must be a fraction of the image's width or height"),
        (YOLO, {"labels/train/a.txt": f"{'9' * 5000} 0.5 0.5 0.1 0.1"}, "9 must be a number from 0 to 1"),
        (YOLO, {"labels/train/a.txt": f"0 {'9' * 5000} 0.5 0.1 0.1"}, "9 is not a finite number"),
        (YOLO, {"labels/train/a.txt": "0 x 7 20 10"}, "line 1: 'x' is not a number"),
        (YOLO, {"labels/train/a.txt": "0 nan 0.5 0.1 0.1"}, "line 1: 'nan' is not a finite number"),
        (YOLO, {"images/train/a.png": "no image"}, f"{Path('images/train/a.png')}: cannot be read as an image"),
        (YOLO, {"labels/train/a.txt": None}, "no image has a label file; expected"),
        (YOLO, {"coco8.yaml": "names: ["}, "coco8.yaml: cannot be read as YAML"),
        (
            YOLO,
            {"coco8.yaml": "names: [cat]\ndate: 2024-13-01"},
            "cannot be read as YAML (month must be in",
        ),
        (YOLO, {"coco8.yaml": "names: !!int ''"}, "coco8.yaml: cannot be read as YAML"),
        (YOLO, {"coco8.yaml": "names: !!timestamp x"}, "coco8.yaml: cannot be read as YAML"),
        (YOLO, {"coco8.yaml": "names: !!bool x"}, "coco8.yaml: cannot be read as YAML"),
        (YOLO, {"coco8.yaml": "names: !!python/object/apply:os.getcwd []"}, "coco8.yaml: cannot be read as YAML"),
        (YOLO, {"coco8.yaml": "train: images/train\nnames: {1: cat, 2: dog}"}, "its keys must be the numbers from 0"),
        (YOLO, {"coco8.yaml": "train: images/train\nnames: [cat, no]"}, "names: class 1 is of type bool; put the na"),
        (YOLO, {"coco8.yaml": f"{BOMB}names: [cat, *a]"}, "names: class 1 is of type list; put the name in quotes"),
        (YOLO, {"coco8.yaml": f"{BOMB}names: [cat]\nnc: *a"}, "coco8.yaml: nc must be 1, the number of names; correct"),
        (YOLO, {"coco8.yaml": "train: images/train\nnames: [cat, cat]"}, "names: a class is listed twice"),
        (YOLO, {"coco8.yaml": "train: images/train\nnc: 3\nnames: [cat, dog]"}, "nc must be 2, the number of names"),
        (YOLO, {"coco8.yaml": "train: images/train\nkpt_shape: [1, 2]\nnames: [cat]"}, "keypoints are not supported"),
        (YOLO, {"coco8.yaml": "train: images/no\nnames: [cat, dog]"}, "coco8.yaml: images/no: is not in"),
        (YOLO, {"coco8.yaml": "train: ../../x\nnames: [cat, dog]"}, "coco8.yaml: ../../x: is not in"),
        ("yolo-cvat", {"train.txt": "images/train/z.png\n"}, "train.txt, line 1: images/train/z.png: no such file in"),
        ("yolo-cvat", {"train.txt": "a\n../../etc/x.png\n"}, "train.txt, line 1: a: no such file"),
        (
            "yolo-cvat",
            {"train.txt": "../../../x.png\n"},
            "train.txt, line 1: the file name '../../../x.png' leads out of",
        ),
    ],
)
def test_one_clear_error(export, kind, files, message):
    assert_one_error(export(kind, files=files), message)


@pytest.mark.parametrize(
    ("kind", "label", "where"),
    [
        ("yolo-ultralytics", "labels/train/lost.txt", "in images/train"),
        ("yolo-roboflow", "train/labels/lost.txt", "in train/images"),
        ("yolo-label-studio", "labels/deep/lost.txt", "in images"),
        ("yolo-labelimg", "lost.txt", "beside it"),
    ],
)
def test_labels_without_an_image_are_an_error(export, kind, label, where):
    """Otherwise the image that they were for is trained on as one without objects. Other text files are not labels."""
    folder = label.rpartition("/")[0] or "."
    others = {f"{folder}/classes.txt": "cat\ndog\n", f"{folder}/README.txt": "2024 1 2 3 4 a\n", f"{folder}/c.txt": ""}
    root = export(kind, files=others)
    assert read(str(root), "yolo", "train").problems == ()
    root = export(kind, files={**others, label: "\n" + LINES})
    assert read(str(root), "yolo", "train").problems == (f"{label}: no image of this name {where}",)
    assert_one_error(root, f"{label}: no image of this name {where}")


def test_a_list_of_images_may_leave_some_out(export):
    root = export("yolo-cvat", files={"images/train/c.png": (40, 20), "labels/train/c.txt": LINES})
    assert read(str(root), "yolo", "train").problems == ()


def test_a_flat_folder_called_images(tmp_path):
    (root := tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20)).save(root / "a.png")
    (root / "a.txt").write_text(LINES)
    (root / "classes.txt").write_text("cat\ndog\n")
    assert len(objects(read(str(root), "auto", "train"))["a.png"]) == 2


def test_absolute_and_relative_folders_of_a_relative_root(export, monkeypatch):
    root = export(YOLO)
    monkeypatch.chdir(root.parent)
    entries = [str(root.resolve() / "images/train"), "images/val"]
    (root / "coco8.yaml").write_text(f"train: {entries}\nval: images/val\nnames: [cat, dog]\n")
    found = objects(read(root.name, "auto", "train"))
    assert found == objects(read(str(root), "auto", "train"))
    assert found.keys() == {"train/a.png", "train/b.png", "val/a.png"}


def test_keys_that_are_no_split(export):
    root = export(YOLO)
    path = root / "coco8.yaml"
    path.write_text(path.read_text() + "training: {epochs: 3}\nvalidation:\n")
    assert set(detect(root)[1]) == {"train", "val"}
    path.write_text(path.read_text() + "valid: images/train\n")
    with pytest.raises(InputError, match="valid: is the val split, as another key"):
        detect(root)


@pytest.mark.parametrize("kind", ["yolo-labelimg", "yolo-label-studio"])
def test_lines_of_classes(export, kind):
    """A class has the number of its line, also for LabelImg."""
    root = export(kind, files={"classes.txt": "cat \r\ndog\n\n\n"})
    assert objects(read(str(root), "auto", "train")) == COMMON
    for content, fault in (("cat\n\ndog\n", "line 2: a class without a name"), ("cat\ncat \n", "line 2: the class")):
        assert_one_error(export(kind, files={"classes.txt": content}), f"classes.txt, {fault}")


def test_label_files_in_capitals_are_an_error(export):
    """Otherwise the image is trained on as one without objects."""
    root = export(YOLO, files={"labels/train/b.TXT": "0 0.5 0.5 0.5 0.5\n"})
    assert_one_error(root, "labels/train/b.TXT: not read; rename it to b.txt")
    (root / "labels/train/b.TXT").unlink()
    assert_one_error(export(YOLO, files={"labels/train/c.TXT": LINES}), "c.TXT: no image of this name in images/train")
