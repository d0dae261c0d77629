"""Pascal VOC's labels: polygons, difficult objects, and what is wrong in a file."""

import pytest
from label_files import CAT, TRIANGLE, VOC, assert_one_error, voc

from dualtoken_vit.data.detection import build_datasets
from dualtoken_vit.data.formats import read
from dualtoken_vit.recipes import DetectionData


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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"Annotations/a.xml": "<annotation>"}, "Annotations/a.xml: cannot be read as XML"),
        ({"Annotations/a.xml": None}, "train.txt: a: no such XML file in Annotations"),
        (
            {"Annotations/a.xml": '<!DOCTYPE a [<!ENTITY x "y">]>\n' + voc()},
            "Annotations/a.xml: has a document type or entities",
        ),
        ({"Annotations/a.xml": voc(boxes=[("", CAT)])}, "Annotations/a.xml, object 1: has no name"),
        ({"Annotations/a.xml": voc().replace("xmax", "right")}, "Annotations/a.xml, object 1: its bndbox has no xmax"),
        ({"Annotations/a.xml": voc().replace(">24<", ">x<")}, "Annotations/a.xml, object 1: 'x' is not a number"),
        (
            {"Annotations/a.xml": voc(size=("9" * 5000, 20))},
            "a.xml: its size of 99999999999999999999 x 20 is that of no",
        ),
        ({"Annotations/a.xml": voc("../../../x.png")}, "a.xml: the file name '../../../x.png' leads out of"),
        ({"Annotations/a.xml": voc("/etc/x.png")}, "Annotations/a.xml: the file name '/etc/x.png' leads out of"),
        ({"Annotations/a.xml": voc("z.png")}, "its image 'z.png' is neither beside it nor in JPEGImages or images"),
        ({"Annotations/a.xml": voc(size=(41, 20))}, "a.png is 40x20 pixels (after any EXIF rotation), but 41x20 in"),
        ({"ImageSets/Main/train.txt": "../../x\n"}, "train.txt: the file name '../../x.xml' leads out of"),
    ],
)
def test_one_clear_error(export, files, message):
    assert_one_error(export(VOC, files=files), message)


def test_an_xml_file_named_after_another_image_is_noted(export):
    """<filename> counts, as always; that of another folder or extension is not in doubt."""
    files = {"Annotations/a.xml": voc("C:\\me\\a.jpg"), "JPEGImages/a.png": None, "JPEGImages/a.jpg": (40, 20)}
    files |= {"Annotations/c.xml": voc("b.png", (20, 20), ()), "ImageSets/Main/train.txt": "a\nc\n"}
    split = read(str(export("voc-devkit", files=files)), "voc", "train")
    assert split.notes == ()  # there is no image c
    assert [one["file_name"] for one in split.coco["images"]] == ["a.jpg", "b.png"]
    split = read(str(export("voc-devkit", files=files | {"JPEGImages/c.jpg": (40, 20)})), "voc", "train")
    assert split.problems == ()
    assert [one["file_name"] for one in split.coco["images"]] == ["a.jpg", "b.png"]
    assert split.notes == (
        "<filename> names another image than that of the file's own name in 1 XML file, for example Annotations/c.xml "
        "is taken as that of JPEGImages/b.png",
    )
