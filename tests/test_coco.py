"""COCO files of every form become samples, and every broken one gets one clear error."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import need_name
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from dualtoken_vit.data.coco import AnnotatedImages, Packed, decode_masks, read_coco, sift
from dualtoken_vit.data.detection import (
    FORMATS,
    DetectionDataset,
    build_datasets,
    draw_scenes,
    save_scenes,
)
from dualtoken_vit.data.rle import encode_mask
from dualtoken_vit.data.sampling import collate, loader
from dualtoken_vit.data.transforms import detection_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import DetectionAugment, DetectionData

SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]


def annotation(number, image=7, category=9, box=(4, 4, 8, 8), **fields):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), **fields}


@pytest.fixture
def coco():
    """Three images, the last without objects; categories 9 and 3, in this order."""
    sizes = {7: (40, 30), 2: (20, 32), 5: (24, 24)}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in sizes.items()],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            annotation(1, segmentation=SQUARE),
            annotation(2, box=(-3, 20.5, 10, 30), category=3, segmentation=[[0, 20, 7, 20, 7, 30]]),
            annotation(3, box=(10, 10, 20, 10), iscrowd=1, segmentation={"size": [30, 40], "counts": [0, 60, 1140]}),
            annotation(4, image=2, category=3, segmentation=SQUARE),
        ],
    }


@pytest.fixture
def files(coco, tmp_path):
    """Writes the images once; reads the json as it then is."""
    for image in coco["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (image["height"], image["width"], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / image["file_name"])

    def read(masks=True, **args):
        (tmp_path / "coco.json").write_text(json.dumps(coco))
        return DetectionDataset(read_coco(tmp_path / "coco.json", tmp_path), masks, **args)

    read.folder = tmp_path
    return read


def random_masks(count=6, height=23, width=31):
    """Masks of noise, a full one, an empty one, and one that starts at the first pixel."""
    masks = torch.rand((count, height, width), generator=torch.Generator().manual_seed(0)) > 0.6
    masks[0], masks[1], masks[2, 0, 0] = True, False, True
    return masks


def test_a_sample(files):
    data = files()
    assert data.class_names == ("dog", "cat")
    assert data.category_ids == [3, 9]
    assert data.image_ids == [7, 2, 5]
    assert data.sizes == [(40, 30), (20, 32), (24, 24)]
    assert data.groups == [0, 1, 0]
    image, target = data[0]
    assert isinstance(image, tv_tensors.Image)
    pixels = np.asarray(Image.open(files.folder / "7.png"))
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (30, 40)
    assert target["boxes"].tolist() == [[4, 4, 12, 12], [0, 20.5, 7, 30]]
    assert target["labels"].tolist() == [1, 0]
    assert target["crowd"].tolist() == [[10, 10, 30, 20]]
    assert target["image_id"] == 7
    assert isinstance(target["masks"], tv_tensors.Mask)
    expected = np.zeros((30, 40), dtype=np.uint8)
    expected[4:12, 4:12] = 1
    assert np.array_equal(target["masks"][0].numpy(), expected)
    assert target["masks"].shape == (2, 30, 40)


def test_a_image_without_objects(files):
    _, target = files()[2]
    assert target["boxes"].shape == target["crowd"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, 24, 24)


def test_without_masks_segmentations_are_not_looked_at(files, coco):
    coco["annotations"][0]["segmentation"] = "nonsense"
    _, target = files(masks=False)[0]
    assert "masks" not in target


def test_grey(files):
    image, _ = files(channels=1)[0]
    assert np.array_equal(image[0].numpy(), np.asarray(Image.open(files.folder / "7.png").convert("L")))


@pytest.mark.parametrize(
    "box",
    [(5, 5, 0, 5), (5, 5, 5, -1), (40, 5, 5, 5), (39.5, 5, 9, 9), (5, 29.1, 9, 9), (-20, 5, 15, 5), (5, 5, 1, 0.9)],
)
def test_what_is_not_in_the_image_is_dropped_and_counted(files, coco, box):
    coco["annotations"][0]["bbox"] = list(box)
    data = files()
    assert data.dropped == 1
    assert data[0][1]["labels"].tolist() == [0]
    assert len(data[0][1]["masks"]) == 1
    assert data.truth["annotations"][0]["bbox"] == list(box)


def test_every_form_of_a_segmentation_is_as_pycocotools_decodes_it(tmp_path):
    masks = random_masks()
    height, width = masks.shape[1:]
    compressed = [reference.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    rng = np.random.default_rng(0)
    polygons = [[(rng.random((n, 2)) * (width, height)).ravel().tolist() for n in (3, 7)] for _ in range(5)]
    uncompressed = []
    for mask in masks:
        flat = mask.numpy().ravel(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *([0] if flat[0] else []), *ends, flat.size])
        uncompressed.append({"size": [height, width], "counts": counts.tolist()})
    texts = [{"size": one["size"], "counts": one["counts"].decode()} for one in compressed]
    forms = [*texts, *uncompressed, *polygons]
    image = {"id": 1, "file_name": "", "width": width, "height": height}
    annotations = [annotation(i + 1, 1, 1, segmentation=form) for i, form in enumerate(forms)]
    coco = {"images": [image], "categories": [{"id": 1, "name": "x"}], "annotations": annotations}
    assert sift(coco, masks=True) == (coco, [])
    (tmp_path / "x.json").write_text(json.dumps(coco))
    other = COCO(str(tmp_path / "x.json"))
    decoded = decode_masks(annotations, image)
    assert decoded.dtype == torch.uint8
    for index, one in enumerate(decoded):
        assert np.array_equal(one.numpy(), other.annToMask(other.anns[index + 1]))
    assert torch.equal(decoded[:6].bool(), masks)
    assert torch.equal(decoded[6:12].bool(), masks)
    assert [encode_mask(mask.numpy()) for mask in masks] == texts


def test_flipping_moves_everything_together(files):
    data = files()
    before = data[0]
    data.transform = detection_train(DetectionAugment(hflip=1.0))
    image, target = data[0]
    assert torch.equal(image, before[0].flip(2))
    for key in ("boxes", "crowd"):
        left, top, right, bottom = before[1][key].unbind(1)
        assert torch.equal(target[key], torch.stack([40 - right, top, 40 - left, bottom], 1))
    assert torch.equal(target["masks"], before[1]["masks"].flip(2))
    assert torch.equal(target["labels"], before[1]["labels"])
    data.transform = detection_train(DetectionAugment(hflip=0.0))
    assert torch.equal(data[0][0], before[0])
    data.transform = detection_train(DetectionAugment(hflip=0.0, photometric=1.0))
    image, target = data[0]
    assert not torch.equal(image, before[0])
    assert torch.equal(target["boxes"], before[1]["boxes"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_images_of_any_size(files, workers):
    data = files()
    ((images, targets),) = loader(data, 3, train=False, seed=0, workers=workers, collate_fn=collate)
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        expected, truth = data[index]
        assert torch.equal(image, expected)
        assert target.keys() == truth.keys()
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert target["boxes"].canvas_size == truth["boxes"].canvas_size
        assert all(torch.equal(target[key], truth[key]) for key in ("boxes", "labels", "crowd", "masks"))


def test_classes_of_a_trained_network(files):
    data = files(class_names=("cat", "dog"))
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == [9, 3]
    assert data[0][1]["labels"].tolist() == [0, 1]
    with pytest.raises(
        InputError, match=r"coco\.json: category 'dog' is not among the 2 trained classes: 'cat', 'cow'; rename or rem"
    ):
        files(class_names=("cat", "cow"))
    with pytest.raises(InputError, match=r"'dog' is not .*'dogs'; rename or remove it \(did you mean 'dogs'\?\)$"):
        files(class_names=("cat", "dogs"))


def test_a_file_without_a_trained_class_has_an_id_for_it(files, coco):
    coco["annotations"] = [one for one in coco["annotations"] if one["category_id"] == 3]
    data = files(class_names=("cow", "dog", "cat"))
    assert data.category_ids == [10, 3, 9]
    assert data.notes == (f"{files.folder / 'coco.json'}: no objects of class 'cow', 'cat'",)
    assert data[0][1]["labels"].tolist() == [1]
    assert [one["name"] for one in data.truth["categories"]] == ["cow", "dog", "cat"]
    assert files().notes == (f"{files.folder / 'coco.json'}: no objects of class 'cat'",)


def test_truth_for_evaluation(files, coco):
    coco["annotations"][0].update(id=0, area=50.5)
    truth = files().truth
    assert [one["id"] for one in truth["annotations"]] == [1, 2, 3, 4]
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 0, 1, 0]
    triangle = reference.area(reference.merge(reference.frPyObjects([[0.0, 20, 7, 20, 7, 30]], 30, 40)))
    assert [one["area"] for one in truth["annotations"]] == [50.5, triangle, 60, 64]
    assert [one["area"] for one in files(masks=False).truth["annotations"]] == [50.5, triangle, 60, 64]


def change(kind, number, **fields):
    def spoil(coco):
        coco[kind][number].update(fields)

    return spoil


def copy(kind):
    return lambda coco: coco[kind].append(dict(coco[kind][0]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (copy("images"), "image 7: its id is used twice"),
        (copy("annotations"), "annotation 1: its id is used twice"),
        (copy("categories"), "category 9: its id is used twice"),
        (change("categories", 1, name="cat"), "category 3: its name 'cat' is used twice"),
        (change("images", 0, width="40"), "images[0]: width must be an integer, not '40'"),
        (change("images", 0, file_name=None), "images[0]: file_name must be a string, not None"),
        (change("images", 0, height=0), "image 7: its size is 40x0, but a side has from 1 to 1,000,000 pixels"),
        (
            change("images", 0, width=10**10, height=10**10),
            "image 7: its size is 10000000000x10000000000, but a side has from 1 to 1,000,000 pixels",
        ),
        (lambda coco: coco["images"].insert(0, 3), "images[0]: 3 is not an object with fields"),
        (lambda coco: coco["annotations"][1].pop("bbox"), "annotations[1]: bbox must be a list, not None"),
        (change("annotations", 1, image_id=77), "annotation 2: refers to image 77, which is not in the file"),
        (change("annotations", 1, category_id=4), "annotation 2: refers to category 4, which is not in the file"),
        (
            change("annotations", 1, bbox=[1, 2, 3]),
            "annotation 2: bbox must be 4 numbers (left, top, width, height), not",
        ),
        (change("annotations", 1, bbox=[1, 2, 3, float("nan")]), "annotation 2: bbox must be 4 numbers"),
        (change("annotations", 1, bbox=[1, 2, 3, "4"]), "annotation 2: bbox must be 4 numbers"),
        (change("annotations", 1, bbox=[1, 2, 3, 10**400]), "annotation 2: bbox must be 4 numbers"),
        (change("annotations", 1, iscrowd=2), "annotation 2: iscrowd must be 0 or 1, not 2"),
        (change("annotations", 1, area="big"), "annotation 2: area must be a number, not 'big'"),
        (
            change("annotations", 1, segmentation=[]),
            "annotation 2: has no segmentation, which Mask R-CNN and segmenters need",
        ),
        (lambda coco: coco["annotations"][1].pop("segmentation"), "annotation 2: has no segmentation"),
        (change("annotations", 1, segmentation="x"), "annotation 2: its segmentation is neither polygons nor an RLE"),
        (change("annotations", 1, segmentation=[[1, 2, 3, 4]]), "a polygon that is not 3 or more pairs of numbers"),
        (change("annotations", 1, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon that is not 3 or more pairs"),
        (change("annotations", 1, segmentation=[[1, 2, 3, 4, 5, 1e9]]), "a polygon far outside the image"),
        (change("annotations", 2, segmentation={"size": [40, 30], "counts": [1200]}), "of size [40, 30], not [30, 40]"),
        (change("annotations", 2, segmentation={"size": [30, 40], "counts": [1199]}), "run lengths that do not fill"),
        (change("annotations", 2, segmentation={"size": [30, 40], "counts": [1201]}), "run lengths that do not fill"),
        (
            change("annotations", 2, segmentation={"size": [30, 40], "counts": [-1, 1201]}),
            "run lengths that do not fill",
        ),
        (change("annotations", 2, segmentation={"size": [30, 40], "counts": "~~~"}), "run lengths that do not fill"),
        (lambda coco: coco.update(images=[], annotations=[]), "no images"),
        (lambda coco: coco.update(categories=[], annotations=[]), "no categories"),
    ],
)
def test_one_clear_error(files, coco, spoil, message):
    spoil(coco)
    with pytest.raises(InputError) as error:
        files()
    assert message in str(error.value)
    assert str(error.value).startswith(f"{files.folder / 'coco.json'}: ")
    assert "\n" not in str(error.value)


def test_the_first_of_several_errors(files, coco):
    for index in range(3):
        coco["annotations"][index]["image_id"] = 1
    with pytest.raises(InputError, match=r"annotation 1: refers to image 1, .* \(and 2 more: check-data lists all\)"):
        files()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[]", "is not a COCO file: no list 'images'"),
        (b'{"images": [], "annotations": []}', "is not a COCO file: no list 'categories'"),
        (b'{"images": {}, "annotations": [], "categories": []}', "is not a COCO file: no list 'images'"),
    ],
)
def test_what_is_no_coco_file(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_coco(path)
    assert str(path) in str(error.value)


def test_other_programs_entries_are_left_alone():
    image = {"id": 1, "file_name": "a.png", "width": 9, "height": 9, "name": ["x"]}
    one = annotation(1, 1, 1) | {"bbox": [1, 1, 4, 4], "name": {"y": 1}}
    coco = {"images": [image], "categories": [{"id": 1, "name": "x"}], "annotations": [one]}
    assert sift(coco, masks=False) == (coco, [])


def test_missing_images(files, tmp_path):
    files()
    with pytest.raises(
        InputError, match=r"nowhere: no such folder; give the one that contains the images of .*coco.json"
    ):
        DetectionDataset(read_coco(tmp_path / "coco.json", tmp_path / "nowhere"), True)
    (tmp_path / "2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png: no such file, but it is listed in .*coco\.json$"):
        files()
    (tmp_path / "7.png").unlink()
    with pytest.raises(
        InputError, match=r"7\.png: no such file, but it is listed in .*coco\.json \(and 1 more of its images\)$"
    ):
        files()


def test_a_rotated_image(files, coco):
    path = files.folder / "7.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.open(files.folder / "7.png").save(path, exif=exif)
    coco["images"][0]["file_name"] = "7.jpg"
    data = files(masks=False)
    message = rf"{path} is 30x40 pixels \(after any EXIF rotation\), but 40x30 in .*coco\.json"
    with pytest.raises(InputError, match=message):
        data[0]
    with pytest.raises(InputError, match=message):
        data.verify()
    coco["images"][0].update(width=30, height=40)
    data = files(masks=False)
    data.verify()
    assert data[0][0].shape == (3, 40, 30)


def test_verify_counts_what_cannot_be_read(files):
    data = files()
    data.verify()
    for name in ("7.png", "5.png"):
        (files.folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"7\.png: cannot be read as an image .* \(and 1 more: check-data lists all\)"):
        data.verify()


def test_names_that_are_hard_to_print(files, coco):
    """Latin-1 in the json is kept as the system keeps it in file names; messages have one line."""
    path, name, shown = files.folder / "coco.json", "caf\udce9\n.png", "caf\ufffd\\n.png"
    need_name(files.folder, name)
    coco["categories"][0]["name"] = "$cat\n\r"
    coco["images"][1]["file_name"] = "caf\u00e9\n.png"
    files(masks=False, limit=1)
    path.write_bytes(path.read_bytes().replace(b"\\u00e9", b"\xe9"))
    with pytest.raises(InputError) as caught:
        DetectionDataset(read_coco(path, files.folder), False)
    assert str(caught.value) == f"{files.folder / shown}: no such file, but it is listed in {path}"
    (files.folder / "2.png").rename(files.folder / name)
    data = DetectionDataset(read_coco(path, files.folder), False)
    assert data.class_names == ("dog", "$cat\n\r")
    assert data[1][0].shape == (3, 32, 20)
    (files.folder / name).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        data.verify()
    assert str(caught.value).startswith(f"{files.folder / shown}: cannot be read as an image")
    with pytest.raises(InputError, match=r"category '\$cat\\n\\r' is not among the 1 trained class"):
        DetectionDataset(read_coco(path, files.folder), False, class_names=["dog"])


def test_packed_data_is_what_was_packed():
    items = [[], [{"a": 1.5, "b": [1, 2]}], [{"ü": None}] * 3]
    packed = Packed(items)
    assert len(packed) == 3
    assert [*packed] == items
    assert pickle.loads(pickle.dumps(packed))[1] == items[1]
    with pytest.raises(IndexError):
        packed[3]


def test_scenes():
    scenes = DetectionDataset(draw_scenes("val", 48, 60), masks=True)
    assert scenes.class_names == ("circle", "cross", "ring", "square", "star", "triangle")
    assert scenes.dropped == 0
    counts = []
    for index in range(60):
        image, target = scenes[index]
        assert image.shape == (3, 48, 48)
        counts.append(len(target["labels"]))
        if counts[-1]:
            corners = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])  # its ends are the last pixels
            assert torch.equal(target["boxes"], corners)
            assert target["masks"].sum(0).max() == 1  # the upper hides the lower
    assert set(counts) == set(range(6))
    again = DetectionDataset(draw_scenes("val", 48, 3), masks=True)[2]
    assert torch.equal(again[0], scenes[2][0])
    assert not torch.equal(DetectionDataset(draw_scenes("train", 48, 3), masks=True)[2][0], scenes[2][0])


def test_scenes_as_files(tmp_path):
    save_scenes(tmp_path, 48, train=3, val=2)
    for split, count in (("train", 3), ("val", 2)):
        drawn = DetectionDataset(draw_scenes(split, 48, count), masks=True)
        read = DetectionDataset(read_coco(tmp_path / f"annotations/instances_{split}.json", tmp_path / "images"), True)
        assert len(read) == count
        assert read.truth == drawn.truth
        for (image, target), (expected, truth) in zip((read[i] for i in range(count)), drawn, strict=False):
            assert torch.equal(image, expected)
            assert all(torch.equal(target[key], truth[key]) for key in ("boxes", "labels", "masks"))


def test_the_data_of_a_recipe(files, coco, tmp_path):
    files()
    (tmp_path / "val").mkdir()
    (tmp_path / "7.png").rename(tmp_path / "val/7.png")
    (tmp_path / "7.json").write_text(json.dumps(coco | {"images": coco["images"][:1], "annotations": []}))
    coco["images"].pop(0)
    coco["annotations"] = coco["annotations"][3:]
    files()
    paths = dict(images=str(tmp_path), train_json=str(tmp_path / "coco.json"), val_json=str(tmp_path / "7.json"))
    data = DetectionData(**paths, val_images=str(tmp_path / "val"), limit=1)
    train, val = build_datasets(data, masks=True, channels=3)
    assert (train.image_ids, val.image_ids) == ([2], [7])
    assert len(train[0][1]["masks"]) == 1
    with pytest.raises(InputError, match=r"7\.png: no such file"):
        build_datasets(replace(data, val_images=""), masks=True, channels=3)
    for field, flag in (("images", "images"), ("train_json", "train-json"), ("val_json", "val-json")):
        with pytest.raises(InputError, match=f"--data.{flag} is missing"):
            build_datasets(replace(data, **{field: "", "val_images": ""}), masks=True, channels=3)


def test_a_format_that_is_not_known():
    with pytest.raises(InputError, match=r"--data\.dataset yolo: unknown format; choose from coco, shapes$"):
        build_datasets(DetectionData(dataset="yolo"), masks=False, channels=3)


def test_a_new_format_is_one_reader(monkeypatch):
    """One image of 8x8 whose left half is an object, made by the reader."""

    def read(data, split):
        image = {"id": 5, "file_name": f"{split}-5", "width": 8, "height": 8}
        coco = {"images": [image], "categories": [{"id": 1, "name": "half"}]}
        coco["annotations"] = [annotation(1, 5, 1, (0, 0, 4, 8))]
        return AnnotatedImages("halves", coco, draw=lambda image: Image.new("RGB", (8, 8), "red"))

    monkeypatch.setitem(FORMATS, "halves", read)
    train, val = build_datasets(DetectionData(dataset="halves"), masks=False, channels=3)
    assert (train.image_names, val.image_names) == (["train-5"], ["val-5"])
    assert train.verify() == []
    image, target = val[0]
    assert image[:, 0, 0].tolist() == [255, 0, 0]
    assert target["boxes"].tolist() == [[0, 0, 4, 8]]


def test_drawn_data_of_a_recipe():
    data = DetectionData(dataset="shapes", image_size=32, limit=4)
    train, val = build_datasets(data, masks=False, channels=1)
    assert len(train) == len(val) == 4
    assert train[0][0].shape == (1, 32, 32)
    assert "masks" not in train[0][1]
    assert not torch.equal(train[0][0], val[0][0])


def test_no_more_scenes_than_a_split_has():
    assert len(draw_scenes("val", 16, 201).coco["images"]) == 200
    assert len(draw_scenes("val", 16, 3).coco["images"]) == 3
