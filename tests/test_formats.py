"""Label formats: each file here has the form in which a public tool writes it, and boxes are computed by hand.

The common content: a.png of 40x20 pixels with a cat (left 4, top 2, right 24, bottom 12) and a dog (10, 5, 30, 15);
b.png of 20x20 without objects.
"""

import base64
import json
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO

from dualtoken_vit.cli import run
from dualtoken_vit.data.check.detection import check as check_data
from dualtoken_vit.data.convert import convert
from dualtoken_vit.data.detection import build_datasets, build_val_dataset, save_scenes
from dualtoken_vit.data.formats import FORMATS, detect, read
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Detection, DetectionData
from dualtoken_vit.tasks.detection import TASK

CAT, DOG = [4, 2, 20, 10], [10, 5, 20, 10]  # left, top, width, height
LINES = "0 0.35 0.35 0.5 0.5\n1 0.5 0.5 0.5 0.5\n"  # the same for YOLO: centres (14, 7) and (20, 10), sizes 20x10
A, B = (40, 20), (20, 20)
TRIANGLE = [4, 2, 24, 2, 24, 12]


def save(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        Image.fromarray(np.random.default_rng(content[0]).integers(0, 256, (*content[::-1], 3), np.uint8)).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def objects(split):
    """{file name: [(class, box), ...]} of a split."""
    names = {one["id"]: one["name"] for one in split.coco["categories"]}
    found = {one["id"]: (one["file_name"], []) for one in split.coco["images"]}
    for one in split.coco["annotations"]:
        found[one["image_id"]][1].append((names[one["category_id"]], one["bbox"]))
    return dict(found.values())


COMMON = {"a.png": [("cat", CAT), ("dog", DOG)], "b.png": []}


def voc(name="a.png", size=(40, 20), boxes=(("cat", CAT), ("dog", DOG)), extra=""):
    """As LabelImg writes it."""
    found = "".join(
        f"\t<object>\n\t\t<name>{label}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
        f"\t\t<difficult>0</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{x}</xmin>\n\t\t\t<ymin>{y}</ymin>\n"
        f"\t\t\t<xmax>{x + w}</xmax>\n\t\t\t<ymax>{y + h}</ymax>\n\t\t</bndbox>{extra}\n\t</object>\n"
        for label, (x, y, w, h) in boxes
    )
    return (
        f"<annotation>\n\t<folder>images</folder>\n\t<filename>{name}</filename>\n\t<path>C:\\Users\\me\\{name}</path>\n"
        "\t<source>\n\t\t<database>Unknown</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{size[0]}</width>\n\t\t<height>{size[1]}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{found}</annotation>\n"
    )


def labelme(name="a.png", size=A, shapes=None):
    """As LabelMe writes it; rectangles by default."""
    corners = {"cat": [[4, 2], [24, 12]], "dog": [[30.0, 15.0], [10.0, 5.0]]}
    shapes = [shape(label, points, "rectangle") for label, points in corners.items()] if shapes is None else shapes
    image = {"imagePath": name, "imageData": None, "imageHeight": size[1], "imageWidth": size[0]}
    return json.dumps({"version": "5.4.1", "flags": {}, "shapes": shapes, **image}, indent=2)


def shape(label, points, kind="polygon", group=None, mask=None):
    common = {"group_id": group, "description": "", "shape_type": kind, "flags": {}, "mask": mask}
    return {"label": label, "points": points, **common}


def roboflow_coco():
    """With the category that it puts above the others."""
    box = {"iscrowd": 0, "segmentation": [], "area": 200}
    return {
        "info": {"year": "2024", "description": "Exported from roboflow.com"},
        "licenses": [{"id": 1, "url": "", "name": "CC BY 4.0"}],
        "categories": [
            {"id": 0, "name": "cat", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "cat"},
            {"id": 2, "name": "dog", "supercategory": "cat"},
        ],
        "images": [
            {"id": 0, "license": 1, "file_name": "a.png", "height": 20, "width": 40, "date_captured": "2024"},
            {"id": 1, "license": 1, "file_name": "b.png", "height": 20, "width": 20, "date_captured": "2024"},
        ],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 1, "bbox": CAT, **box},
            {"id": 1, "image_id": 0, "category_id": 2, "bbox": DOG, **box},
        ],
    }


ROBOFLOW_YAML = """train: ../train/images
val: ../valid/images
test: ../test/images

nc: 2
names: ['cat', 'dog']

roboflow:
  workspace: me
  project: animals
"""
ULTRALYTICS_YAML = """# Ultralytics
path: coco8 # dataset root dir
train: images/train # train images (relative to 'path') 4 images
val: images/val
test: # test images (optional)

names:
  0: cat
  1: dog
"""
CVAT_YAML = "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n"
CSV = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
ROWS = "a.png,40,20,cat,4,2,24,12\na.png,40,20,dog,10,5,30,15\n"
EXPORTS = {
    "yolo-roboflow": {
        "data.yaml": ROBOFLOW_YAML,
        "train/images/a.png": A,
        "train/images/b.png": B,
        "train/labels/a.txt": LINES,
        "train/labels/b.txt": "",
        "valid/images/a.png": A,
        "valid/labels/a.txt": LINES,
    },
    "yolo-ultralytics": {
        "coco8.yaml": ULTRALYTICS_YAML,
        "images/train/a.png": A,
        "images/train/b.png": B,
        "labels/train/a.txt": LINES.replace("\n", "\r\n"),
        "images/val/a.png": A,
        "labels/val/a.txt": LINES,
    },
    "yolo-cvat": {
        "data.yaml": CVAT_YAML,
        "train.txt": "images/train/a.png\nimages/train/b.png\n",
        "images/train/a.png": A,
        "images/train/b.png": B,
        "labels/train/a.txt": LINES,
    },
    "yolo-label-studio": {
        "classes.txt": "cat\ndog\n",
        "notes.json": {"categories": [{"id": 0, "name": "cat"}]},
        "images/a.png": A,
        "images/b.png": B,
        "labels/a.txt": LINES,
    },
    "yolo-labelimg": {"classes.txt": "cat\ndog\n", "a.png": A, "b.png": B, "a.txt": LINES},
    "voc-devkit": {
        "Annotations/a.xml": voc(),
        "Annotations/b.xml": voc("b.png", B, ()),
        "JPEGImages/a.png": A,
        "JPEGImages/b.png": B,
        "ImageSets/Main/train.txt": "a\nb\n",
        "ImageSets/Main/val.txt": "a\n",
        "ImageSets/Main/trainval.txt": "a\nb\n",
        "ImageSets/Main/cat_train.txt": "a  1\nb -1\n",
    },
    "voc-roboflow": {
        "train/a.xml": voc(),
        "train/a.png": A,
        "train/b.xml": voc("b.png", B, ()),
        "train/b.png": B,
        "valid/a.xml": voc(),
        "valid/a.png": A,
    },
    "voc-labelimg": {
        "images/a.png": A,
        "images/b.png": B,
        "annotations/a.xml": voc(),
        "annotations/b.xml": voc("b.png", (0, 0), ()),
    },
    "coco-roboflow": {
        "train/_annotations.coco.json": roboflow_coco(),
        "train/a.png": A,
        "train/b.png": B,
        "valid/_annotations.coco.json": roboflow_coco(),
        "valid/a.png": A,
        "valid/b.png": B,
    },
    "coco-2017": {
        "annotations/instances_train2017.json": roboflow_coco(),
        "annotations/captions_train2017.json": {},
        "train2017/a.png": A,
        "train2017/b.png": B,
    },
    "coco-cvat": {
        "annotations/instances_default.json": roboflow_coco(),
        "images/default/a.png": A,
        "images/default/b.png": B,
    },
    "csv-roboflow": {
        "train/_annotations.csv": CSV + ROWS + "b.png,20,20,,,,,\n",
        "train/a.png": A,
        "train/b.png": B,
        "valid/_annotations.csv": CSV + ROWS,
        "valid/a.png": A,
    },
    "csv-retinanet": {
        "_annotations.csv": "a.png,4,2,24,12,cat\na.png,10,5,30,15,dog\nb.png,,,,,\n",
        "a.png": A,
        "b.png": B,
    },
    "labelme": {"a.json": labelme(), "a.png": A, "b.json": labelme("..\\me\\b.png", B, []), "b.png": B},
    "labelme-splits": {
        "train/a.json": labelme(),
        "train/a.png": A,
        "train/b.json": labelme("b.png", (None, None), []),
        "train/b.png": B,
        "val/a.json": labelme(),
        "val/a.png": A,
    },
    "csv-split": {
        "labels.csv": "image_path,split,x1,y1,x2,y2,label\nimages/a.png,train,4,2,24,12,cat\n"
        "images/a.png,train,10,5,30,15,dog\nimages/b.png,train,,,,,\nimages/c.png,valid,1,2,3.5,4,cat\n",
        "images/a.png": A,
        "images/b.png": B,
        "images/c.png": B,
    },
}


@pytest.fixture
def export(tmp_path):
    """Writes an export, with some files changed or (None) left out, into a folder."""

    def write(kind, **changes):
        for name, content in (EXPORTS[kind] | changes.pop("files", {})).items():
            if content is not None:
                save(tmp_path / kind, name, content)
        return tmp_path / kind

    return write


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
        part.verify(progress=False)
    image, target = next(part[0] for part in (train, val) if "a.png" in part.image_names[0])
    assert image.shape == (3, 20, 40)
    assert target["boxes"].tolist() == [[4, 2, 24, 12], [10, 5, 30, 15]]
    assert target["labels"].tolist() == [0, 1]


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


def test_voc_polygons_and_difficult_objects(export):
    points = "".join(
        f"<{'xy'[i % 2]}{i // 2 + 1}>{value}</{'xy'[i % 2]}{i // 2 + 1}>" for i, value in enumerate(TRIANGLE)
    )
    polygon = voc(boxes=[("cat", CAT)], extra=f"<polygon>{points}</polygon>")
    difficult = voc(boxes=[("cat", CAT)]).replace("<difficult>0", "<difficult>1")
    root = export("voc-roboflow", files={"train/a.xml": polygon, "valid/a.xml": difficult})
    train, val = build_datasets(DetectionData(root=str(root)), masks=False, channels=3)
    split = read(str(root), "voc", "train")
    assert split.coco["annotations"][0]["segmentation"] == [TRIANGLE]
    assert train[0][1]["boxes"].tolist() == [[4, 2, 24, 12]]
    assert val[0][1]["crowd"].tolist() == [[4, 2, 24, 12]]
    assert len(val[0][1]["boxes"]) == 0


def test_labelme_shapes(export):
    """A polygon, a circle, two parts of one object, and a mask, whose box ends with its last pixel."""
    pixels = np.zeros((5, 6), np.uint8)
    pixels[1:, 2:] = 1
    file = BytesIO()
    Image.fromarray(pixels.astype(bool)).save(file, format="png")
    shapes = [
        shape("cat", [[4, 2], [24, 2], [24, 12]]),
        shape("dog", [[20, 10], [20, 15]], "circle"),
        shape("cat", [[0, 0], [2, 0], [2, 2]], group=1),
        shape("cat", [[30, 10], [35, 10], [35, 15]], group=1),
        shape("dog", [[10, 3], [15, 7]], "mask", mask=base64.b64encode(file.getvalue()).decode()),
    ]
    root = export("labelme-splits", files={"train/a.json": labelme(shapes=shapes), "train/b.json": None})
    polygon, circle, parts, mask = read(str(root), "auto", "train").coco["annotations"]
    assert polygon["segmentation"] == [TRIANGLE]
    assert polygon["bbox"] == CAT
    assert parts["segmentation"] == [[0, 0, 2, 0, 2, 2], [30, 10, 35, 10, 35, 15]]
    assert parts["bbox"] == [0, 0, 35, 15]
    assert circle["bbox"] == [15, 5, 10, 10]
    corners = np.reshape(circle["segmentation"], (-1, 2))
    assert np.allclose(np.hypot(*(corners - [20, 10]).T), 5)
    assert mask["bbox"] == [10, 3, 6, 5]
    whole = np.zeros((20, 40), np.uint8)
    whole[3:8, 10:16] = pixels
    assert np.array_equal(reference.decode(mask["segmentation"]), whole)


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


YOLO, VOC = "yolo-ultralytics", "voc-devkit"


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        (YOLO, {"labels/train/a.txt": "0 0.5 0.5 0.5\n"}, "labels/train/a.txt, line 1: 3 numbers after the class"),
        (YOLO, {"labels/train/a.txt": LINES + "0 1 1 1 1 1\n"}, "labels/train/a.txt, line 3: 5 numbers after the"),
        (YOLO, {"labels/train/a.txt": "2 0.5 0.5 0.5 0.5"}, "line 1: class '2' must be a number from 0 to 1"),
        (YOLO, {"labels/train/a.txt": "cat 0.5 0.5 0.5 0.5"}, "line 1: class 'cat' must be a number from 0 to 1"),
        (YOLO, {"labels/train/a.txt": "0 14 7 20 10"}, "line 1: 20 must be a fraction of the image's width or height"),
        (YOLO, {"labels/train/a.txt": "0 x 7 20 10"}, "line 1: 'x' is not a number"),
        (YOLO, {"labels/train/a.txt": "0 nan 0.5 0.1 0.1"}, "line 1: 'nan' is not a finite number"),
        (YOLO, {"images/train/a.png": "no image"}, "images/train/a.png: cannot be read as an image"),
        (YOLO, {"labels/train/a.txt": None}, "none of the 2 images has a label file; expected"),
        (YOLO, {"coco8.yaml": "names: ["}, "coco8.yaml: cannot be read as YAML"),
        (
            YOLO,
            {"coco8.yaml": "names: [cat]\ndate: 2024-13-01"},
            "cannot be read as YAML (month must be in",
        ),
        (YOLO, {"coco8.yaml": "names: !!python/object/apply:os.getcwd []"}, "coco8.yaml: cannot be read as YAML"),
        (YOLO, {"coco8.yaml": "train: images/train\nnames: {1: cat, 2: dog}"}, "its keys must be the numbers from 0"),
        (YOLO, {"coco8.yaml": "train: images/train\nnames: [cat, no]"}, "names: class 1 is False; put the name in quo"),
        (YOLO, {"coco8.yaml": "train: images/train\nnames: [cat, cat]"}, "names: a class is listed twice"),
        (YOLO, {"coco8.yaml": "train: images/train\nnc: 3\nnames: [cat, dog]"}, "nc is 3, but there are 2 names"),
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
        (VOC, {"Annotations/a.xml": "<annotation>"}, "Annotations/a.xml: cannot be read as XML"),
        (VOC, {"Annotations/a.xml": None}, "train.txt: a: no such XML file in Annotations"),
        (
            VOC,
            {"Annotations/a.xml": '<!DOCTYPE a [<!ENTITY x "y">]>\n' + voc()},
            "Annotations/a.xml: has a document type or entities",
        ),
        (VOC, {"Annotations/a.xml": voc(boxes=[("", CAT)])}, "Annotations/a.xml, object 1: has no name"),
        (
            VOC,
            {"Annotations/a.xml": voc().replace("xmax", "right")},
            "Annotations/a.xml, object 1: its bndbox has no xmax",
        ),
        (VOC, {"Annotations/a.xml": voc().replace(">24<", ">x<")}, "Annotations/a.xml, object 1: 'x' is not a number"),
        (VOC, {"Annotations/a.xml": voc("../../../x.png")}, "a.xml: the file name '../../../x.png' leads out of"),
        (VOC, {"Annotations/a.xml": voc("/etc/x.png")}, "Annotations/a.xml: the file name '/etc/x.png' leads out of"),
        (
            VOC,
            {"Annotations/a.xml": voc("z.png")},
            "its image 'z.png' is neither beside it nor in JPEGImages or images",
        ),
        (
            VOC,
            {"Annotations/a.xml": voc(size=(41, 20))},
            "a.png is 40x20 pixels (after any EXIF rotation), but 41x20 in",
        ),
        (VOC, {"ImageSets/Main/train.txt": "../../x\n"}, "train.txt: the file name '../../x.xml' leads out of"),
        ("csv-roboflow", {"train/_annotations.csv": CSV + "a.png,40,20,cat,4,2,x,12"}, "line 2: 'x' is not a number"),
        ("csv-roboflow", {"train/_annotations.csv": CSV + "a.png,40,20,,4,2,3,12"}, "line 2: has no class"),
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
        ("labelme", {"a.json": '{"shapes": '}, "a.json: cannot be read as JSON"),
        ("labelme", {"a.json": labelme("z.png")}, "a.json: its image 'z.png' is not there"),
        ("labelme", {"a.json": labelme("../../z.png")}, "a.json: its image '../../z.png' is not there"),
        ("labelme", {"a.json": labelme(shapes=[shape("", [[1, 2], [3, 4], [5, 9]])])}, "a.json, shape 1: has no label"),
        (
            "labelme",
            {"a.json": labelme(shapes=[shape("x", [[1, 2], [3, 4]], "line")])},
            "shape 1: line of 2 points",
        ),
        ("labelme", {"a.json": labelme(shapes=[shape("x", [[1, "y"], [3, 4]])])}, "shape 1: 'y' is not a number"),
        ("labelme", {"a.json": labelme(shapes=[shape("x", [1, 2, 3])])}, "shape 1: points must be a list of pairs"),
        (
            "labelme",
            {"a.json": labelme(shapes=[shape("x", [[1, 2], [3, 4]], "mask", mask="?")])},
            "a.json, shape 1: its mask cannot be read",
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
        (YOLO, {"_annotations.csv": CSV}, "has labels in several formats: yolo, csv; choose one with --data.format"),
        (
            YOLO,
            {"coco8.yaml": None},
            "no labels of the format COCO json, YOLO data.yaml, Pascal VOC XML, CSV or LabelMe",
        ),
    ],
)
def test_one_clear_error(export, kind, files, message):
    root = export(kind, files=files)
    data = DetectionData(root=str(root), val_split="train")
    with pytest.raises(InputError) as error:
        build_datasets(data, masks=False, channels=3)[0].verify(progress=False)
    assert message in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


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
    assert f"{place}{root}/images/train/b.png: cannot be read as an image" in found
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


def test_an_object_in_parts_keeps_its_mask_in_yolo(tmp_path):
    parts = [[2.0, 2, 12, 2, 12, 12], [20.0, 5, 30, 5, 30, 15, 20, 15], [5.0, 15, 9, 15, 9, 19]]
    coco = roboflow_coco()
    coco["annotations"] = [coco["annotations"][0] | {"segmentation": parts, "bbox": [2, 2, 28, 17]}]
    for name, content in {"train/a.png": A, "train/b.png": B, "train/_annotations.coco.json": coco}.items():
        save(tmp_path, name, content)
    convert(tmp_path, tmp_path / "yolo", "yolo")
    (one,) = read(str(tmp_path / "yolo"), "yolo", "train").coco["annotations"]
    masks = [
        reference.decode(reference.merge(reference.frPyObjects(each, 20, 40))) for each in (one["segmentation"], parts)
    ]
    assert np.array_equal(*masks)
    assert one["bbox"] == [2, 2, 28, 17]


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
    assert "note: 1 crowd regions left out: YOLO has none" in lines
    assert any(line.startswith("note: 1 polygons left out: ") for line in lines)
    assert "note: 1 boxes clipped to their image" in lines
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
