"""LabelMe's labels: its shapes, and what is wrong in a file."""

import base64
from io import BytesIO

import numpy as np
import pytest
from label_files import CAT, TRIANGLE, assert_one_error, labelme, shape
from PIL import Image
from pycocotools import mask as reference

from dualtoken_vit.data.formats import read

PIXELS = np.zeros((5, 6), np.uint8)
PIXELS[1:, 2:] = 1
Image.fromarray(PIXELS.astype(bool)).save(file := BytesIO(), format="png")
MASK = shape("dog", [[10, 3], [15, 7]], "mask", mask=base64.b64encode(file.getvalue()).decode())


def test_labelme_shapes(export):
    """A polygon, a circle, two parts of one object, and a mask, whose box ends with its last pixel."""
    shapes = [
        shape("cat", [[4, 2], [24, 2], [24, 12]]),
        shape("dog", [[20, 10], [20, 15]], "circle"),
        shape("cat", [[0, 0], [2, 0], [2, 2]], group=1),
        shape("cat", [[30, 10], [35, 10], [35, 15]], group=1),
        MASK,
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
    whole[3:8, 10:16] = PIXELS
    assert np.array_equal(reference.decode(mask["segmentation"]), whole)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.json": '{"shapes": '}, "a.json: cannot be read as JSON"),
        ({"train/a.json": "{}", "val/a.json": labelme(), "a.json": None}, "a.json: is not a file of LabelMe: no list"),
        ({"a.json": labelme("z.png")}, "a.json: its image 'z.png' is not there"),
        ({"a.json": labelme("../../z.png")}, "a.json: its image '../../z.png' is not there"),
        ({"a.json": labelme(shapes=[shape("", [[1, 2], [3, 4], [5, 9]])])}, "a.json, shape 1: has no label"),
        ({"a.json": labelme(shapes=[shape("x", [[1, 2], [3, 4]], "line")])}, "shape 1: line of 2 points"),
        ({"a.json": labelme(shapes=[shape("x", [[1, "y"], [3, 4]])])}, "shape 1: 'y' is not a number"),
        ({"a.json": labelme(shapes=[shape("x", [[10**400, 2], [3, 4]])])}, "shape 1: 1000000000"),
        ({"a.json": labelme(size=(10**400, 20))}, "a.json: its size of 10000000000000000000 x 20 is"),
        ({"a.json": labelme(shapes=[shape("x", [1, 2, 3])])}, "shape 1: points must be a list of pairs"),
        (
            {"a.json": labelme(size=(999_999_999, 999_999_999), shapes=[MASK])},
            "a.png is 40x20 pixels (after any EXIF rotation), but 999999999x999999999 in a.json: correct the image",
        ),
        (
            {"a.json": labelme(shapes=[shape("x", [[1, 2], [3, 4]], "mask", mask="?")])},
            "a.json, shape 1: its mask cannot be read",
        ),
    ],
)
def test_one_clear_error(export, files, message):
    assert_one_error(export("labelme", files=files), message)
