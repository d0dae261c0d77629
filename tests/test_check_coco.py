"""The report finds planted problems, and none in valid data."""

import json
import re

import numpy as np
import pytest
from helpers import need_name
from PIL import ExifTags, Image

from dualtoken_vit.data.check.detection import check as check_data
from dualtoken_vit.data.detection import CLASSES, save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Detection, DetectionData

SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def _scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    save_scenes(root, 48, train=14, val=6)
    return root


@pytest.fixture
def check(_scenes, tmp_path, capsys):
    """The jsons of both splits, to be spoilt, and the check of what they then are: (verdict, lines of the report)."""
    (tmp_path / "images").mkdir()
    for path in (_scenes / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())

    def run(masks=True, limit=None):
        paths = {f"{split}_json": str(tmp_path / f"{split}.json") for split in SPLITS}
        for split in SPLITS:
            (tmp_path / f"{split}.json").write_text(json.dumps(run.coco[split]))
        data = DetectionData(images=str(tmp_path / "images"), **paths, limit=limit)
        verdict = check_data(Detection(detector="mask-rcnn" if masks else "retinanet", data=data), tmp_path)
        return verdict, capsys.readouterr().out.splitlines()

    run.coco = {s: json.loads((_scenes / f"annotations/instances_{s}.json").read_text()) for s in SPLITS}
    run.root = tmp_path
    return run


def problems(lines):
    start = next(
        index
        for index, line in reversed(list(enumerate(lines)))
        if re.match("(train|val|note): |no image|[0-9]+ images with", line)
    )
    return lines[start + 1 : -1]


def row(lines, name):
    (line,) = (line for line in lines if line.startswith("│") and line.split("│")[1].strip() == name)
    return [int(cell) for cell in line.split("│")[2:-1]]


def test_sound_data(check):
    check.coco["train"]["annotations"][0]["iscrowd"] = 1
    verdict, lines = check()
    assert verdict
    assert lines[-1] == "no problems"
    objects = {s: [one for one in check.coco[s]["annotations"] if not one["iscrowd"]] for s in SPLITS}
    for label, name in enumerate(CLASSES):
        assert row(lines, name) == [sum(one["category_id"] == label + 1 for one in objects[s]) for s in SPLITS]
    assert row(lines, "all") == [len(objects[s]) for s in SPLITS]
    filled = [one["image_id"] for one in objects["train"]]
    most = max(map(filled.count, filled))
    assert f"train: 14 images, {14 - len(set(filled))} without objects; up to {most} in one" in lines
    small = sum(one["bbox"][2] * one["bbox"][3] < 1024 for one in objects["train"])
    assert f"train: {len(filled)} objects, {small} below 32x32 px, 0 of 96x96 and more; 1 crowd" in lines
    assert "val: width 48 to 48 px, median 48" in lines
    assert "val: modes RGB 6" in lines


def test_a_class_that_val_lacks_is_no_problem(check):
    val = check.coco["val"]
    gone = val["categories"].pop()
    val["annotations"] = [one for one in val["annotations"] if one["category_id"] != gone["id"]]
    verdict, lines = check()
    assert verdict
    assert f"note: 1 of the {len(CLASSES)} categories of train are not in val: {gone['name']}" in lines


def test_everything_that_can_be_wrong(check):
    train, val = check.coco["train"], check.coco["val"]
    some, images = train["annotations"], train["images"]
    folder = check.root / "images"
    some[0]["image_id"] = 99
    some[1]["category_id"] = 50
    some[2]["id"] = some[3]["id"]
    some[4]["segmentation"] = [[1, 2, 3, 4]]
    some[5]["bbox"] = [40, 40, 20, 5]
    some[6]["bbox"] = [5, 5, 0, 5]
    some[7]["area"] = 0
    some[8]["segmentation"] = [[60, 60, 70, 60, 70, 70]]
    some[9].update(bbox=[0, 0, 5, 5], segmentation=[[0, 0, 20, 0, 20, 29, 0, 29]])
    some[10].update(bbox=[5, 5, 0.5, 5], area=1)
    (folder / images[0]["file_name"]).unlink()
    (folder / images[1]["file_name"]).write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 48, 3), np.uint8)).save(folder / images[2]["file_name"])
    (folder / val["images"][0]["file_name"]).write_bytes((folder / images[3]["file_name"]).read_bytes())
    val["categories"].append({"id": 70, "name": "hexagon"})
    verdict, lines = check()
    assert not verdict
    ids = [one["id"] for one in some]
    json_name, imgs = check.root / "train.json", [folder / one["file_name"] for one in images]
    expected = [
        "class missing: train/hexagon",
        f"{imgs[0]}: no such file",
        f"{imgs[1]}: cannot be read as an image",
        f"{imgs[2]} is 48x20 pixels (after any EXIF rotation)",
        f"{json_name}: annotation {ids[0]}: refers to image 99",
        f"{json_name}: annotation {ids[1]}: refers to category 50",
        f"{json_name}: annotation {ids[3]}: its id is used twice",
        f"{json_name}: annotation {ids[4]}: its segmentation has a polygon",
        f"box outside the image: {json_name}: annotation {ids[5]} is 20x5 at (40, 40) in an image of 48x48",
        f"mask outside its box: {json_name}: annotation {ids[5]} ",
        f"box without area: {json_name}: annotation {ids[6]} is 0x5",
        f"no area: {json_name}: annotation {ids[7]} has area 0",
        f"empty mask: {json_name}: annotation {ids[8]} ",
        f"mask outside its box: {json_name}: annotation {ids[9]} has a mask of 20x29 at (0, 0), but its box is 5x5",
        f"in both splits: {imgs[3]} = {folder / val['images'][0]['file_name']}",
    ]
    found = problems(lines)
    assert len(found) == len(expected)
    for one, beginning in zip(sorted(found), sorted(expected), strict=True):
        assert one.startswith(beginning)
    assert lines[-1] == f"problems: {len(expected)}"
    tiny = sum(line.startswith("note: train: not trained on") for line in lines)
    assert tiny == 1
    assert f"note: train: not trained on, below 1 px in the image: 2 annotations ({ids[6]}, {ids[10]})" in lines


def test_segmentations_are_checked_where_they_are_not_needed(check):
    some = check.coco["val"]["annotations"]
    for one in some:
        one["segmentation"] = []
    verdict, lines = check(masks=False)
    assert verdict
    assert not any(line.startswith("val: ") and "have a segmentation" in line for line in lines)
    some[0]["segmentation"] = {"size": [48, 48], "counts": "~~"}
    verdict, lines = check(masks=False)
    assert not verdict
    assert f"val: 1 of the {len(some)} annotations has a segmentation" in lines
    assert problems(lines) == [
        f"broken segmentation: {check.root / 'val.json'}: annotation {some[0]['id']} cannot be drawn: "
        "its segmentation has run lengths that do not fill the image"
    ]
    verdict, lines = check(masks=True)
    assert lines[-1] == f"problems: {len(some)}"


def test_many_problems_of_a_kind_are_counted(check):
    some = check.coco["train"]["annotations"]
    for one in some:
        one["area"] = 0
    verdict, lines = check()
    assert not verdict
    assert sum(line.startswith("no area: ") for line in lines) == 20
    assert f"... and {len(some) - 20} more: no area" in lines
    assert lines[-1] == f"problems: {len(some)}"


def test_the_contact_sheet_shows_the_labels(check, tmp_path):
    coco = check.coco["train"]
    coco["categories"] = coco["categories"][:1]
    coco["annotations"] = [
        {
            "id": 1,
            "image_id": 3,
            "category_id": 1,
            "bbox": [8, 16, 24, 12],
            "segmentation": [[8, 16, 32, 16, 32, 28, 8, 28]],
        },
        {
            "id": 2,
            "image_id": 9,
            "category_id": 1,
            "bbox": [0, 0, 8, 8],
            "iscrowd": 1,
            "segmentation": [[0, 0, 8, 0, 8, 8]],
        },
    ]
    for name in ("train-0002.png", "train-0008.png"):
        Image.fromarray(np.full((48, 48, 3), 64, np.uint8)).save(check.root / "images" / name)
    check.coco["val"]["annotations"] = []
    path = tmp_path / "labels.png"
    _, lines = check()
    assert f"2 images with their labels: {path}" in lines
    sheet = np.asarray(Image.open(path)).astype(int)
    assert sheet.shape == (640, 3 * 640, 3)
    scale = 632 / 48
    first, second = sheet[:632, :632], sheet[:632, 640:1272]
    for cell, (left, top, right, bottom) in ((first, (8, 16, 32, 28)), (second, (0, 0, 8, 8))):
        drawn = np.ptp(cell, axis=-1) > 30  # the images are grey
        rows, columns = drawn.nonzero()
        found = columns.min(), columns.max(), rows.max()
        assert found == pytest.approx((left * scale, right * scale, bottom * scale), abs=4)
        assert top * scale - 30 < rows.min() < top * scale + 4  # its name is above the box, where there is room
        assert (cell[~drawn] == 64).mean() > 0.97
    inside = first[int(16 * scale) + 3 : int(28 * scale) - 3, int(8 * scale) + 3 : int(32 * scale) - 3]
    assert (np.ptp(inside, axis=-1) > 30).all()  # the mask


def test_nothing_to_draw(check, tmp_path):
    check.coco["train"]["annotations"] = []
    verdict, lines = check()
    assert not verdict
    assert problems(lines)[-1] == f"no objects: {check.root / 'train.json'} has none of a pixel or more"
    assert lines[-1] == "problems: 1"
    assert "no image of train has labels to draw" in lines
    assert not (tmp_path / "labels.png").exists()


def test_boxes_in_shares_of_the_image(check):
    """Normalised boxes are a common mistake."""
    some = check.coco["val"]["annotations"]
    for one in some:
        one["bbox"] = [side / 48 for side in one["bbox"]]
    verdict, lines = check()
    assert not verdict
    assert problems(lines)[0] == f"no objects: {check.root / 'val.json'} has none of a pixel or more"
    some[0]["bbox"] = [0, 0, 48, 48]
    some[0]["segmentation"] = [[0, 0, 48, 0, 48, 48]]
    assert (
        f"tiny boxes: {len(some) - 1} of the {len(some)} of val are below a pixel: bbox must be in pixels" in check()[1]
    )


def test_the_sheet_shows_images_from_all_over_a_split(check, tmp_path):
    check.coco["train"]["annotations"] = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20]} for i in range(1, 15)
    ]
    _, lines = check(masks=False)
    assert f"7 images with their labels: {tmp_path / 'labels.png'}" in lines  # every second of 14


def test_images_that_are_turned(check):
    name = check.coco["train"]["images"][0]["file_name"]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down: the size is the same
    Image.open(check.root / "images" / name).save(check.root / "images" / name, exif=exif)
    verdict, lines = check()
    assert verdict
    (line,) = (line for line in lines if "rotated by EXIF" in line)
    assert line.startswith("note: rotated by EXIF in train: 1 image; boxes and masks must fit the rotated image")


def test_the_first_images_alone(check):
    (check.root / "images" / check.coco["train"]["images"][5]["file_name"]).unlink()
    assert not check()[0]
    verdict, lines = check(limit=5)
    assert verdict
    assert any(line.startswith("train: 5 images, ") for line in lines)


def test_a_broken_entry_is_told_once(check):
    image = check.coco["train"]["images"][0]
    image["width"] = 0
    verdict, lines = check()
    assert not verdict
    fault = "its size is 0x48, but a side has from 1 to 1,000,000 pixels"
    assert problems(lines) == [f"{check.root / 'train.json'}: image {image['id']}: {fault}"]


def test_no_coco_file(check):
    check.coco["val"] = []
    with pytest.raises(InputError, match=r"val\.json is not a COCO file"):
        check()


def test_drawn_data(tmp_path, capsys):
    assert check_data(Detection(data=DetectionData(dataset="shapes", image_size=48, limit=30)), tmp_path)
    assert "train: 30 images, " in capsys.readouterr().out
    assert Image.open(tmp_path / "labels.png").width == 1920


def test_names_that_are_hard_to_print(check):
    check.coco["train"]["categories"][0]["name"] = "a\n$\udcff"
    check.coco["val"]["categories"][0]["name"] = "a\n$\udcff"
    image = check.coco["train"]["images"][0]
    image["file_name"], shown = "b\r\n.png", r"b\r\n.png"
    need_name(check.root, image["file_name"])  # a name that is impossible is another error
    _, lines = check()
    assert row(lines, "a\\n$\ufffd")
    assert problems(lines)[0] == f"{check.root / 'images' / shown}: no such file"
