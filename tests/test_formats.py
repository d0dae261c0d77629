"""Label formats: each file here has the form in which a public tool writes it, see `label_files`."""

import json
from pathlib import Path

import pytest
import torch
from label_files import (
    COMMON,
    CSV,
    DOG,
    EXPORTS,
    LINES,
    ROWS,
    TRIANGLE,
    YOLO,
    A,
    B,
    assert_one_error,
    labelme,
    objects,
    roboflow_coco,
    voc,
)

from dualtoken_vit.data.check.detection import check as check_data
from dualtoken_vit.data.check.segmentation import check as check_masks
from dualtoken_vit.data.coco import read_coco
from dualtoken_vit.data.convert import convert
from dualtoken_vit.data.detection import build_datasets, build_val_dataset
from dualtoken_vit.data.formats import detect, read
from dualtoken_vit.data.segmentation import build_datasets as build_masks
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Detection, DetectionData, Segmentation, SegmentationData
from dualtoken_vit.tasks.detection import TASK


@pytest.mark.parametrize("kind", EXPORTS)
def test_exports_of_the_public_tools(export, kind):
    root = export(kind)
    name, splits = detect(root)
    assert name == kind.partition("-")[0]
    split = read(str(root), "auto", "train")
    assert split.problems == ()
    assert objects(split) == COMMON
    assert [one["name"] for one in split.coco["categories"]] == ["cat", "dog"]
    assert [(one["width"], one["height"]) for one in split.coco["images"]] == [A, B]
    assert objects(read(str(root), name, "train")) == COMMON
    if "val" in splits and kind != "csv-split":
        assert objects(read(str(root), "auto", "val"))["a.png"] == COMMON["a.png"]
    data = DetectionData(root=str(root), holdout=0.5)
    train, val = build_datasets(data, masks=False, channels=3)
    assert sorted(train.image_names + val.image_names) == sorted(map(split.path, split.coco["images"]))
    for part in (train, val):
        part.verify()
    image, target = next(part[0] for part in (train, val) if "a.png" in part.image_names[0])
    assert image.shape == (3, 20, 40)
    assert target["boxes"].tolist() == [[4, 2, 24, 12], [10, 5, 30, 15]]
    assert target["labels"].tolist() == [0, 1]


def test_training_reads_any_format(export):
    """The sample of every format is the same, to the pixel."""
    samples = []
    for kind in ("yolo-roboflow", "voc-roboflow", "coco-roboflow", "csv-roboflow"):
        train, _ = build_datasets(DetectionData(root=str(export(kind))), masks=False, channels=3)
        samples.append(train[0])
        assert [len(objects) for objects, _ in map(train.objects, range(2))] == [2, 0]
    for image, target in samples[1:]:
        assert torch.equal(image, samples[0][0])
        assert torch.equal(target["boxes"], samples[0][1]["boxes"])
        assert torch.equal(target["labels"], samples[0][1]["labels"])


def test_two_folders_of_one_split(export):
    root = export("labelme-splits", files={"valid/a.json": labelme(), "val/b.json": labelme()})
    with pytest.raises(InputError, match=r"val and valid are both the val split: rename one"):
        read(str(root), "auto", "val")


def test_one_folder_is_split_the_same_way_every_time(export):
    files = {f"{name}.png": B for name in "cdefghij"}
    root = export("yolo-labelimg", files=files)
    data = DetectionData(root=str(root), holdout=0.3)
    train, val = build_datasets(data, masks=False, channels=3)
    assert (len(train), len(val)) == (7, 3)
    assert not set(train.image_names) & set(val.image_names)
    assert build_val_dataset(data, False, 3, train.class_names).image_names == val.image_names
    with pytest.raises(InputError, match=r"no split 'val' of the format yolo; there is all: give --data\.holdout 0\.1"):
        build_datasets(DetectionData(root=str(root)), masks=False, channels=3)


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("csv-roboflow", {"train/_annotations.csv": CSV + "a.png,40,20,cat,4,2,x,12"}, "line 2: 'x' is not a number"),
        ("csv-roboflow", {"train/_annotations.csv": CSV + "a.png,40,20,,4,2,3,12"}, "line 2: has no class"),
        (
            "csv-roboflow",
            {"train/_annotations.csv": CSV + f"a.png,{'9' * 5000},20,cat,4,2,3,12"},
            "line 2: its size of 99999999999999999999 x 20 is that of no image",
        ),
        (
            "csv-roboflow",
            {"train/_annotations.csv": CSV + "z.png,40,20,cat,4,2,3,12"},
            "line 2: image 'z.png' is not in",
        ),
        (
            "csv-roboflow",
            {"train/_annotations.csv": CSV + "../../../z,4,2,cat,4,2,3,1"},
            "line 2: the file name '../../../z'",
        ),
        (
            "coco-roboflow",
            {"train/_annotations.coco.json": json.dumps(roboflow_coco()).replace("a.png", "../../a.png")},
            "the file name '../../a.png' leads out of",
        ),
        (
            "coco-roboflow",
            {"train/_annotations.coco.json": json.dumps(roboflow_coco()).replace("a.png", "a" * 5000)},
            "aaaaaaaa: no such file",
        ),
        (
            "csv-roboflow",
            {"train/_annotations.csv": CSV + ROWS.replace("a.png", "a" * 5000)},
            "_annotations.csv, line 2: image 'aaaa",
        ),
        (
            "csv-roboflow",
            {"train/_annotations.csv": CSV.replace("xmax", "xmaz") + ROWS, "valid/_annotations.csv": CSV + ROWS},
            f"{Path('train/_annotations.csv')}: its first line does not name the columns filename, class, xmin, ymin, "
            "xmax, ymax",
        ),
        (YOLO, {"_annotations.csv": CSV}, "has labels in several formats: yolo, csv; choose one with --data.format"),
        (
            YOLO,
            {"coco8.yaml": None},
            "no labels of the format COCO json, YOLO data.yaml, Pascal VOC XML, CSV or LabelMe",
        ),
    ],
)
def test_one_clear_error(export, kind, files, message):
    assert_one_error(export(kind, files=files), message)


@pytest.mark.parametrize("name", ["data.yaml", "a.xml", "a.json"])
@pytest.mark.parametrize("kind", ["yolo-labelimg", "coco-roboflow"])
def test_links_to_nothing_and_folders_do_not_hide_the_labels(export, kind, name):
    root = export(kind)
    (root / name).symlink_to("nowhere")
    (root / "other.yaml").mkdir()
    assert detect(root)[0] == kind.partition("-")[0]
    assert objects(read(str(root), "auto", "train")) == COMMON


def test_wrong_flags(export):
    root = export(YOLO)
    with pytest.raises(
        InputError, match=r"--data\.format xml: unknown format; choose from auto, coco, yolo, voc, csv, labelme$"
    ):
        read(str(root), "xml", "train")
    with pytest.raises(InputError, match=r"no labels of the format voc found"):
        read(str(root), "voc", "train")
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        read(str(root / "nowhere"), "auto", "train")
    for field in ({"format": "yolo"}, {"val_split": "test"}):
        with pytest.raises(
            InputError, match=r"--data\.format, --data\.train-split and --data\.val-split need --data\.root"
        ):
            build_datasets(DetectionData(images="a", train_json="b", val_json="c", **field), False, 3)


def test_all_problems_are_reported(export, tmp_path, capsys):
    lines = LINES + "0 0.5 0.5 0.5\n0 0.9 0.5 0.5 0.5\n"
    root = export(YOLO, files={"labels/train/a.txt": lines, "images/train/b.png": "no image"})
    recipe = Detection(data=DetectionData(root=str(root), val_split="train"))
    assert not check_data(recipe, tmp_path / "out")
    found = capsys.readouterr().out
    place = f"{root} (train): "
    assert f"{place}labels/train/a.txt, line 3: 3 numbers after the class" in found
    assert f"{place}{root / 'images/train/b.png'}: cannot be read as an image" in found
    assert f"box outside the image: {place}labels/train/a.txt, line 4 is 20x10 at (26, 5) in an image of 40x20" in found
    assert (tmp_path / "out" / "labels.png").is_file()


def test_evaluation_on_other_data_forgets_where_the_training_data_was():
    data = DetectionData(images="a", train_json="b", val_json="c", limit=3, holdout=0.1, format="yolo")
    assert TASK.relocate(Detection(data=data), {"root": "x"}) == {
        "dataset": "coco",
        "limit": None,
        "holdout": 0.0,
        "format": "auto",
    }
    given = {"images": "x", "val_json": "y"}
    follows = {"dataset": "coco", "format": "auto", "limit": None, "holdout": 0.0, "root": "", "val_images": None}
    follows |= {"train_split": "train", "val_split": "val"}
    assert TASK.relocate(Detection(data=data), given) == follows
    assert TASK.relocate(Detection(data=data), {"val_split": "test"}) == {"holdout": 0.0}


def test_two_files_of_a_split(export):
    root = export("coco-2017")
    (root / "annotations/instances_train2014.json").write_text(json.dumps(roboflow_coco()))
    with pytest.raises(
        InputError, match=r"instances_train2014\.json and .*instances_train2017\.json are both the train"
    ):
        detect(root)


def test_an_image_that_is_listed_twice(export):
    root, coco = export("coco-2017"), roboflow_coco()
    coco["images"][1]["file_name"] = "./a.png"
    (root / "annotations/instances_train2017.json").write_text(json.dumps(coco))
    assert_one_error(root, "image 1: its file_name './a.png' is that of image 0, too")


def test_retinanet_s_rows_beyond_the_image(tmp_path, export):
    root = export("csv-retinanet")
    (root / "_annotations.csv").write_text("a.png,-3,2,24,12,cat\na.png,10,5,30,15,dog\n")
    assert objects(read(str(root), "csv", "train"))["a.png"][0] == ("cat", [-3, 2, 27, 10])


def test_a_reversed_box_is_reported(export, capsys):
    root, coco = export("coco-2017"), roboflow_coco()
    coco["annotations"][0]["bbox"] = [24, 2, -20, 10]
    (root / "annotations/instances_train2017.json").write_text(json.dumps(coco))
    assert not check_data(Detection(data=DetectionData(root=str(root), holdout=0.5)), root / "out")
    found = capsys.readouterr().out
    assert found.count("box without area") == 1
    coco["annotations"][0]["category_id"] = 99
    (root / "annotations/instances_train2017.json").write_text(json.dumps(coco))
    assert not check_data(Detection(data=DetectionData(root=str(root), holdout=0.5)), root / "out")
    assert capsys.readouterr().out.count("category 99") == 1  # both splits read one file


@pytest.mark.parametrize(
    ("rotation", "box"),
    [
        (90.0, [19, -6, 2, 30]),
        (-45, [20 - 16 / 2**0.5, 9 - 16 / 2**0.5, 32 / 2**0.5, 32 / 2**0.5]),
        (180, [5, 8, 30, 2]),
        (0.0, [5, 8, 30, 2]),
        ("left", [5, 8, 30, 2]),
        (float("nan"), [5, 8, 30, 2]),
    ],
)
def test_cvat_s_rotated_boxes_are_enclosed(export, rotation, box):
    """Annotations have the box as it was before it was turned about its centre, (20, 9)."""
    turned = roboflow_coco()
    turned["annotations"][0] |= {"bbox": [5, 8, 30, 2], "attributes": {"occluded": False, "rotation": rotation}}
    drawn = turned["annotations"][0] | {"id": 7, "segmentation": [TRIANGLE]}  # has no other box
    turned["annotations"].append(drawn)
    root = export("coco-2017", files={"annotations/instances_train2017.json": turned})
    found = objects(read(str(root), "coco", "train"))["a.png"]
    assert found[0] == ("cat", pytest.approx(box, abs=1e-6))
    assert found[1:] == [("dog", DOG), ("cat", [5, 8, 30, 2])]
    assert objects(read_coco(root / "annotations/instances_train2017.json"))["a.png"] == found
    convert(root, root / "new", "coco")
    assert objects(read(str(root / "new"), "coco", "train"))["a.png"] == found
    attribute = f"<attributes><attribute><name>rotation</name><value>{rotation}</value></attribute></attributes>"
    files = {"Annotations/a.xml": voc(boxes=[("cat", [5, 8, 30, 2])], extra=attribute)}
    assert objects(read(str(export("voc-devkit", files=files)), "voc", "train"))["a.png"] == found[:1]


def test_a_class_without_an_object_is_no_problem(export, tmp_path, capsys):
    """As in `check-data coco`: lists of classes are often those of a larger dataset."""
    coco = roboflow_coco()
    for one in coco["annotations"]:
        one["segmentation"] = [TRIANGLE]  # the dog hides the cat
    coco["categories"][0]["name"] = "fox"
    root = export("coco-2017", files={"annotations/instances_train2017.json": coco})
    assert check_masks(Segmentation(data=SegmentationData(root=str(root), val_split="train")), tmp_path / "out")
    out = capsys.readouterr().out
    assert "note: 2 classes in no mask of train: 'fox', 'cat'" in out
    assert "class in no mask: " not in out


def test_cvat_s_masks_that_are_crowds_are_noted(export):
    """COCO's own annotations have no attributes: their crowds are meant."""
    path, coco = "annotations/instances_train2017.json", roboflow_coco()
    mask = {"size": [20, 40], "counts": [100, 200, 500]}
    coco["annotations"][1] |= {"iscrowd": 1, "segmentation": mask}
    coco["annotations"][0] |= {"segmentation": [TRIANGLE]}
    assert read(str(export("coco-2017", files={path: coco})), "coco", "train").notes == ()
    coco["annotations"][1] |= {"attributes": {"occluded": False}}
    root = export("coco-2017", files={path: coco})
    note = f"{root / path}: 1 of 2 annotations have iscrowd 1 and are not trained on; CVAT writes it for every mask"
    detection = build_datasets(DetectionData(root=str(root), val_split="train"), masks=False, channels=3)
    masks = build_masks(SegmentationData(root=str(root), val_split="train"), 3)
    for train, _ in (detection, masks):
        assert train.notes[0] == f"{note} and ellipse: set it to 0 if they are single objects"
    coco["annotations"][1]["iscrowd"] = 0
    assert read(str(export("coco-2017", files={path: coco})), "coco", "train").notes == ()


@pytest.mark.parametrize(
    "name", ["images\\a.png", "C:\\me\\a.png", "/ROOT/images/a.png", "a.png", "elsewhere/a.png", "/content/a.png"]
)
def test_names_of_images_of_another_machine(export, name):
    """As Label Studio writes them on Windows, and absolute ones."""
    root = export("coco-cvat", files={"images/a.png": A, "images/b.png": B, "images/default/a.png": None})
    (root / "images/default/b.png").unlink()
    coco = roboflow_coco()
    for image in coco["images"]:
        image["file_name"] = name.replace("/ROOT", str(root)).replace("a.png", image["file_name"])
    (root / "annotations/instances_default.json").write_text(json.dumps(coco))
    split = read(str(root), "coco", "train")
    assert split.folder == str(root / "images")
    assert objects(split) == COMMON
    train, _ = build_datasets(DetectionData(root=str(root), val_split="all", train_split="all"), False, 3)
    assert [len(train), train.verify()] == [2, []]


@pytest.mark.parametrize("name", ["../../../z.png", "..\\..\\..\\z.png", "/etc/z.png"])
def test_names_of_images_that_lead_elsewhere(export, name):
    coco = roboflow_coco()
    for image in coco["images"]:
        image["file_name"] = name
    root = export("coco-roboflow", files={"train/_annotations.coco.json": coco})
    assert_one_error(root, "z.png' leads out of ")


def test_two_columns_of_classes(export):
    """The first that the documentation lists counts, as in tables of classes."""
    header, rows = CSV.replace("\n", ",category\n"), ROWS.replace("\n", ",animal\n")
    root = export("csv-roboflow", files={"train/_annotations.csv": header + rows + "b.png,20,20,,,,,,\n"})
    assert objects(read(str(root), "csv", "train")) == COMMON


def test_a_table_that_is_no_table_of_objects_is_named(tmp_path):
    (tmp_path / "labels.csv").write_text((CSV + ROWS).replace(",", ";"))
    columns = "'filename;width;height;class;xmin;ymin;xmax;ymax', which are not separated by commas"
    with pytest.raises(InputError, match=rf"found in this folder; .*labels\.csv has the columns {columns}$"):
        read(str(tmp_path), "auto", "train")


@pytest.mark.parametrize("kind", ["yolo-label-studio", "csv-retinanet"])
def test_the_hidden_files_of_macos_are_no_labels(export, kind):
    root = export(kind)
    for name in ("._labels.csv", "._data.yaml"):
        (root / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X: names")
    assert objects(read(str(root), "auto", "train")) == COMMON
