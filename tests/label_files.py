"""Datasets as public tools export them, for the tests of label formats; boxes are computed by hand.

The common content: a.png of 40x20 pixels with a cat (left 4, top 2, right 24, bottom 12) and a dog (10, 5, 30, 15);
b.png of 20x20 without objects.
"""

import json

import numpy as np
import pytest
from PIL import Image

from dualtoken_vit.data.detection import build_datasets
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import DetectionData

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
YOLO, VOC = "yolo-ultralytics", "voc-devkit"


def assert_one_error(root, message):
    """The training images of a folder cannot be used, for this reason, in one line that names the folder."""
    data = DetectionData(root=str(root), val_split="train")
    with pytest.raises(InputError) as error:
        build_datasets(data, masks=False, channels=3)[0].verify()
    assert message in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)
