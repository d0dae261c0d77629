"""Segmentation from polygons of objects and from coloured masks, against pycocotools and hand-made label maps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import native
from PIL import Image
from pycocotools import mask as reference

from dualtoken_vit.data.check.segmentation import check as check_data
from dualtoken_vit.data.masks import IGNORE, read_mask
from dualtoken_vit.data.segmentation import build_dataset, build_datasets, read_colours
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Segmentation, SegmentationData

WIDTH, HEIGHT = 40, 24
ROOM = [[2.0, 2, 38, 2, 38, 22, 2, 22]]
CHAIR = [[5.0, 5, 20, 5, 20, 18], [30.0, 10, 36, 10, 36, 20]]
CROWD = [[0.0, 0, 20, 0, 20, 10, 0, 10]]
NAMES = ("chair", "room")


def save_image(path, index=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


def drawn(polygons):
    return reference.decode(reference.merge(reference.frPyObjects(polygons, HEIGHT, WIDTH))) > 0


def expected(crowd=False, background=0):
    """Chair (label 1) over room (label 2) over crowds over the background."""
    labels = np.full((HEIGHT, WIDTH), background)
    if crowd:
        labels[drawn(CROWD)] = IGNORE
    labels[drawn(ROOM)] = 2
    labels[drawn(CHAIR)] = 1
    return labels


def coco(root):
    objects = [(2, CHAIR, 0), (5, ROOM, 0), (2, CROWD, 1)]
    for split in ("train", "valid"):
        save_image(root / split / "a.png")
        save_image(root / split / "b.png")
        annotations = [
            {"id": number, "image_id": 1, "category_id": category, "bbox": [0, 0, 9, 9], "iscrowd": crowd}
            | {"segmentation": polygons}
            for number, (category, polygons, crowd) in enumerate(objects)
        ]
        images = [{"id": i, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for i, n in ((1, "a"), (2, "b"))]
        categories = [{"id": 5, "name": "room"}, {"id": 2, "name": "chair"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))


def yolo(root):
    """One polygon a line, so that the parts of a chair are two chairs."""
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [chair, room]\n")
    sides = np.tile([WIDTH, HEIGHT], 20)
    rows = [(0, CHAIR[0]), (1, ROOM[0]), (0, CHAIR[1])]
    lines = [f"{label} " + " ".join(map(str, polygon / sides[: len(polygon)])) for label, polygon in rows]
    for split in ("train", "val"):
        for name in "ab":
            save_image(root / "images" / split / f"{name}.png")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text("\n".join(lines))


def labelme(root):
    shapes = [("chair", CHAIR[0]), ("room", ROOM[0]), ("chair", CHAIR[1])]
    for split in ("train", "val"):
        for name, found in (("a", shapes), ("b", [])):
            save_image(root / split / f"{name}.png")
            points = [{"label": label, "points": np.reshape(one, (-1, 2)).tolist()} for label, one in found]
            found = [one | {"shape_type": "polygon", "group_id": None, "flags": {}} for one in points]
            content = {"version": "5.4.1", "flags": {}, "shapes": found, "imagePath": f"{name}.png"}
            content |= {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}
            (root / split / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("write", [coco, yolo, labelme])
def test_objects_become_label_maps(tmp_path, write):
    write(tmp_path)
    train, val = build_datasets(SegmentationData(root=str(tmp_path)), 3)
    assert train.class_names == val.class_names == ("background", *NAMES)
    for part in (train, val):
        assert np.array_equal(part[0][1].numpy(), expected(crowd=write is coco))
        assert not part[1][1].any()
        assert part.verify() == []
        assert part[0][0].shape == (3, HEIGHT, WIDTH)
    labels = expected(crowd=write is coco)
    counts = [np.sum(labels == label) + (label == 0) * labels.size for label in range(3)]
    assert train.pixels[0].tolist() == counts
    held, rest = build_datasets(SegmentationData(root=str(tmp_path), holdout=0.5), 3)
    assert sorted(held.image_names + rest.image_names) == sorted(train.image_names)
    assert len(held) == 1
    for part in (held, rest):  # each with its own labels
        assert part[0][1].any() == ("a.png" in part.image_names[0])


def test_the_smaller_part_is_held_out():
    drawn = SegmentationData(dataset="shapes", crop_size=(32, 32))
    whole = len(build_datasets(drawn, 3)[0])
    parts = build_datasets(replace(drawn, holdout=0.1), 3)
    assert [*map(len, parts)] == [whole - round(whole / 10), round(whole / 10)]


def test_without_background(tmp_path):
    coco(tmp_path)
    train = build_dataset(SegmentationData(root=str(tmp_path), reduce_zero_label=True), "train", 3)
    assert train.class_names == NAMES
    labels = expected(crowd=True, background=IGNORE)
    assert np.array_equal(train[0][1].numpy(), np.where(labels == IGNORE, IGNORE, labels - 1))


def test_objects_name_their_classes(tmp_path):
    coco(tmp_path)
    (names := tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(InputError, match=r"--data\.classes .*names\.txt: these labels name their classes"):
        build_dataset(SegmentationData(root=str(tmp_path), classes=str(names)), "train", 3)


def test_problems_of_objects(tmp_path, capsys):
    labelme(tmp_path)
    path = tmp_path / "train/b.json"
    path.write_text(path.read_text().replace('"shapes": []', '"shapes": [{"label": "x", "points": [[1, 2]]}]'))
    message = r"train/b\.json, shape 1: polygon of 1 points has no area; draw a polygon, rectangle, circle or mask"
    with pytest.raises(InputError, match=message):
        build_datasets(SegmentationData(root=str(tmp_path)), 3)
    assert not check_data(Segmentation(data=SegmentationData(root=str(tmp_path))), tmp_path / "out")
    assert "train/b.json, shape 1: polygon of 1 points" in capsys.readouterr().out
    labelme(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "val/a.png")
    with pytest.raises(
        InputError, match=native(r"val\): a\.png: 40x24 pixels, but .*val/a\.png is 9x9 .*: make them equal")
    ):
        build_dataset(SegmentationData(root=str(tmp_path)), "val", 3)[0]
    with pytest.raises(InputError, match=r"no labels of the format voc found"):
        build_dataset(SegmentationData(root=str(tmp_path), format="voc"), "val", 3)


COLOURS = {"sky": (128, 128, 128), "road": (128, 64, 128), "car": (64, 0, 128)}
TABLES = {
    "class_dict.csv": "name,r,g,b\n" + "".join(f"{name},{r},{g},{b}\n" for name, (r, g, b) in COLOURS.items()),
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    + "".join(f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in COLOURS.items()),
}


def coloured(index, palette=False):
    """A mask and its labels, with a few pixels of a colour that is in no table."""
    labels = np.random.default_rng(index).integers(0, 3, (HEIGHT, WIDTH))
    pixels = np.array(list(COLOURS.values()), np.uint8)[labels]
    pixels[:2, :9], labels[:2, :9] = (224, 224, 192), IGNORE
    image = Image.fromarray(pixels)
    return image.quantize(8) if palette else image, labels


def save_coloured(root, table, palette=False):
    """In CVAT's layout for labelmap.txt, else in images and annotations."""
    voc = table == "labelmap.txt"
    root.mkdir(exist_ok=True)
    (root / table).write_text(TABLES[table])
    truth = {}
    for index, split in enumerate(("train", "train", "val")):
        name = f"{index}"
        mask, truth[split, name] = coloured(index, palette)
        image_file = root / ("JPEGImages" if voc else f"images/{split}") / f"{name}.png"
        mask_file = root / ("SegmentationClass" if voc else f"annotations/{split}") / f"{name}.png"
        save_image(image_file, index)
        mask_file.parent.mkdir(parents=True, exist_ok=True)
        mask.save(mask_file)
    if voc:
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        (root / "ImageSets/Segmentation/train.txt").write_text("0\n1\n")
        (root / "ImageSets/Segmentation/val.txt").write_text("2\n")
    return truth


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_coloured_masks(tmp_path, table, palette, capsys):
    truth = save_coloured(tmp_path, table, palette)
    train, val = build_datasets(SegmentationData(root=str(tmp_path)), 3)
    assert train.class_names == tuple(COLOURS)
    assert [len(train), len(val)] == [2, 1]
    for part, split, index, name in ((train, "train", 0, "0"), (train, "train", 1, "1"), (val, "val", 0, "2")):
        assert np.array_equal(part[index][1].numpy(), truth[split, name])
    assert check_data(Segmentation(data=SegmentationData(root=str(tmp_path))), tmp_path / "out")
    share = np.mean([truth["train", name] == IGNORE for name in "01"])
    assert f"train: 2 images with a mask; {share:.1%} of the pixels are ignored" in capsys.readouterr().out
    assert (tmp_path / "out/labels.png").is_file()


def test_a_colour_in_no_mask_is_a_problem(tmp_path, capsys):
    save_coloured(tmp_path, "class_dict.csv")
    with (tmp_path / "class_dict.csv").open("a") as file:
        file.write("boat,1,2,3\n")
    assert not check_data(Segmentation(data=SegmentationData(root=str(tmp_path))), tmp_path / "out")
    assert "class in no mask: train/boat" in capsys.readouterr().out


def test_colours_count_from_one_without_label_zero(tmp_path):
    truth = save_coloured(tmp_path, "class_dict.csv")
    train = build_dataset(SegmentationData(root=str(tmp_path), reduce_zero_label=True, ignore_index=254), "train", 3)
    assert np.array_equal(train[0][1].numpy(), truth["train", "0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sky,1,2,3\nroad,1,2\n", r"class_dict\.csv, line 2: 'road,1,2' is not NAME,R,G,B with colours up to 255"),
        ("sky,1,2,3\nroad,1,2,256\n", r"class_dict\.csv, line 2: 'road,1,2,256' is not NAME,R,G,B"),
        ("sky,1,2,3\nsky,1,2,4\n", r"class_dict\.csv, line 2: the name or the colour of 'sky' is listed twice"),
        ("sky,1,2,3\nroad,1,2,3\n", r"class_dict\.csv, line 2: the name or the colour of 'road' is listed twice"),
        (f"sky,1,2,3\n{'x' * 140_000}\n", r"class_dict\.csv, line 2: cannot be read as CSV \(field larger than"),
        ("sky,1,2,3\n", r"class_dict\.csv: 1 class, but 2 to 254 are supported"),
        ("sky\nroad\ncar\n", r"a mask of mode RGB, but masks need one label per pixel, or a class file .* NAME,R,G,B"),
    ],
)
def test_colour_tables_with_faults(tmp_path, content, message):
    save_coloured(tmp_path, "class_dict.csv")
    (tmp_path / "class_dict.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        build_datasets(SegmentationData(root=str(tmp_path)), 3)[0][0]


def test_listed_images_must_be_there(tmp_path):
    save_coloured(tmp_path, "labelmap.txt")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("../../2\n")
    with pytest.raises(
        InputError, match=native(r"Segmentation/val\.txt") + r": \.\./\.\./2: no such image in .*JPEGImages"
    ):
        build_datasets(SegmentationData(root=str(tmp_path)), 3)


@pytest.mark.parametrize("header", ["class,r,g,b", "Name,Red,Green,Blue", "name, r, g, b"])
def test_headers_of_colour_tables(tmp_path, header):
    (path := tmp_path / "class_dict.csv").write_text(f'{header}\n"bg",0,0,0\n"a, b",255,0,0\n')
    assert read_colours(path) == {"bg": (0, 0, 0), "a, b": (255, 0, 0)}


@pytest.mark.parametrize("content", ["name,r,g,b,class\nbg,0,0,0,0\n", "bg,0,0,0,0\n", "id,name,r,g,b\n0,bg,0,0,0\n"])
def test_colour_tables_of_other_columns_are_refused(tmp_path, content):
    (path := tmp_path / "class_dict.csv").write_text(content)
    with pytest.raises(InputError, match=r"class_dict\.csv, line \d: .* is not NAME,R,G,B"):
        read_colours(path)


def test_lossy_masks(tmp_path):
    labels = Image.fromarray(np.zeros((8, 8), np.uint8))
    for name, options in (("a.tif", {"compression": "jpeg"}), ("a.jp2", {}), ("a.jpg", {})):
        labels.save(tmp_path / name, **options)
        with pytest.raises(InputError, match="whose compression changes labels"):
            read_mask(tmp_path / name)
    labels.save(tmp_path / "b.tif", compression="tiff_lzw")
    assert not read_mask(tmp_path / "b.tif").any()


SHADES = {"ground": (0, 0, 0), "car": (255, 0, 0), "road": (255, 255, 255)}


def save_pairs(root, *masks):
    """Training images with these masks; and the first for validation."""
    for index, (split, mask) in enumerate([*(("train", mask) for mask in masks), ("val", masks[0])]):
        save_image(root / f"images/{split}/{index}.png", index)
        (root / f"annotations/{split}").mkdir(parents=True, exist_ok=True)
        mask.save(root / f"annotations/{split}/{index}.png")


def write_table(path, colours):
    path.write_text("".join(f"{name},{r},{g},{b}\n" for name, (r, g, b) in colours.items()))


def test_greys_of_a_colour_table(tmp_path):
    """One mask of black and white, however it is stored. Greys that are no colours are labels."""
    white = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    rgb = Image.fromarray(np.where(white[..., None], np.uint8(255), np.uint8(0)).repeat(3, -1))
    indices = np.random.default_rng(1).integers(0, 3, (HEIGHT, WIDTH), np.uint8)
    save_pairs(tmp_path, rgb, rgb.convert("L"), rgb.convert("1"), rgb.quantize(2), Image.fromarray(indices))
    write_table(tmp_path / "class_dict.csv", SHADES)
    for data in (SegmentationData(root=str(tmp_path)), SegmentationData(root=str(tmp_path), ignore_index=254)):
        *masks, last = (mask.numpy() for _, mask in build_dataset(data, "train", 3))
        assert len(masks) == 4
        assert all(np.array_equal(mask, np.where(white, 2, 0)) for mask in masks)
        assert np.array_equal(last, indices)


def test_labels_that_are_colours_too_stay_labels(tmp_path):
    """A mask of the label 0 alone, where black is the colour of another class."""
    save_pairs(tmp_path, Image.new("L", (WIDTH, HEIGHT)), Image.new("L", (WIDTH, HEIGHT), 2))
    write_table(tmp_path / "class_dict.csv", {"car": (128, 0, 0), "void": (0, 0, 0), "road": (2, 2, 2)})
    zeros, twos = (mask.numpy() for _, mask in build_dataset(SegmentationData(root=str(tmp_path)), "train", 3))
    assert (zeros.max(), twos.min(), twos.max()) == (0, 2, 2)


@pytest.mark.parametrize("ignore_index", [255, 254])
def test_black_and_white_masks_need_colours(tmp_path, ignore_index):
    white = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 3 == 0
    black = Image.new("L", (WIDTH, HEIGHT))
    save_pairs(tmp_path, Image.fromarray(np.where(white, np.uint8(255), np.uint8(0))), black)
    data = SegmentationData(root=str(tmp_path), ignore_index=ignore_index)
    lines = "background,0,0,0 and NAME,255,255,255"
    with pytest.raises(
        InputError, match=native(rf"train/0\.png: is black and white: give a file with the lines {lines} as --data")
    ):
        build_datasets(data, 3)
    write_table(tmp_path / "two.csv", {"background": (0, 0, 0), "road": (255, 255, 255)})
    train, _ = build_datasets(replace(data, classes=str(tmp_path / "two.csv")), 3)
    assert np.array_equal(train[0][1].numpy(), white)


def test_other_names_of_splits_are_named(tmp_path):
    """CVAT's list of tasks without a subset, and Roboflow's folders."""
    save_coloured(tmp_path, "labelmap.txt")
    lists = tmp_path / "ImageSets/Segmentation"
    (lists / "val.txt").unlink()
    (lists / "train.txt").rename(lists / "default.txt")
    data = SegmentationData(root=str(tmp_path), holdout=0.5)
    with pytest.raises(InputError, match=r"train\.txt: no such file; there is default: give --data\.train-split NAME$"):
        build_datasets(data, 3)
    assert [*map(len, build_datasets(replace(data, train_split="default"), 3))] == [1, 1]
    save_coloured(other := tmp_path / "other", "class_dict.csv")
    for kind in ("images", "annotations"):
        (other / kind / "val").rename(other / kind / "valid")
    with pytest.raises(
        InputError, match=native(r"/val: no such folder; .*; there is train, valid: give --data\.val-split NAME$")
    ):
        build_datasets(SegmentationData(root=str(other)), 3)
