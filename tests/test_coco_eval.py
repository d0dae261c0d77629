"""COCO's metrics are equal to those of pycocotools on the same files."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import SERVER
from pycocotools import mask as reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dualtoken_vit.data.coco import clip, decode_masks, read_coco
from dualtoken_vit.data.detection import DetectionDataset, save_scenes
from dualtoken_vit.results import Objects
from dualtoken_vit.runtime import report
from dualtoken_vit.tasks.coco_eval import CURVES, FIGURES, Score, evaluate, save_results
from dualtoken_vit.tasks.detection import precision_recall
from dualtoken_vit.tasks.distributed import gather

SERVER.set_forkserver_preload(["test_coco_eval"])


def perturbed(data):
    """Detections that are near the truth of the images, some twice, some of a wrong class, with scores at random."""
    found = {}
    for index in range(len(data)):
        generator = torch.Generator().manual_seed(index)
        image, objects = data.images[index], [one for some in data.objects(index) for one in some]
        objects = [objects[i] for i in torch.randint(max(1, len(objects)), (2 * len(objects),), generator=generator)]
        boxes = torch.tensor([clip(one, image) for one in objects]).reshape(-1, 4)
        boxes = boxes + 0.05 * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) * torch.randn(
            boxes.shape, generator=generator
        )
        labels = torch.tensor([data.category_ids.index(one["category_id"]) for one in objects], dtype=torch.int64)
        wrong = torch.rand(labels.shape, generator=generator) < 0.1
        labels = torch.where(wrong, labels.roll(1), labels)
        scores = torch.rand(labels.shape, generator=generator).mul(20).round() / 20  # equal ones too
        detections = {"boxes": boxes, "labels": labels, "scores": scores}
        if data.masks:
            shift = torch.randint(3, (), generator=generator).item()
            detections["masks"] = decode_masks(objects, image).roll((shift, 1), (1, 2)).bool()[:, None]
        found[image["id"]] = to_results(image["id"], detections, data.category_ids)
    return found


def to_results(image_id, detections, category_ids):
    arrays = {key: value.numpy() for key, value in detections.items()}
    if "masks" in arrays:
        arrays["masks"] = arrays["masks"][:, 0]
    return report.to_results(image_id, Objects(names=(), **arrays), category_ids)


def pycocotools(truth, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        there = COCO(str(truth))
        evaluation = COCOeval(there, there.loadRes(str(results)), {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal(data, path, folder):
    """Both programs agree in all figures, and those are not trivial."""
    found = perturbed(data)
    scores = evaluate(data.truth, found, data.masks)
    paths = save_results(folder, found, data.masks)
    assert list(scores) == (["box", "mask"] if data.masks else ["box"])
    for (kind, score), results in zip(scores.items(), paths, strict=True):
        other = pycocotools(path, results, kind)
        assert list(score.figures) == list(FIGURES)
        np.testing.assert_allclose(list(score.figures.values()), other.stats, rtol=0, atol=1e-6)
        assert 0.05 < score.figures["AP"] < score.figures["AP50"] < 1
        precision = other.eval["precision"][:, :, :, 0, -1]
        iou50, iou75 = (precision[other.params.iouThrs.round(2) == iou][0] for iou in CURVES)
        np.testing.assert_allclose(score.precision, np.stack([iou50.T, iou75.T]), atol=1e-6)
        for index, name in enumerate(data.class_names):
            assert score.per_class[name] == pytest.approx(precision[:, :, index].mean(), abs=1e-6)
    return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 scenes; some objects are made crowds or polygons, and the categories are 5, 15, ..., 65, the last unused."""
    folder = tmp_path_factory.mktemp("scenes")
    save_scenes(folder, 96, train=0, val=20)
    path = folder / "annotations/instances_val.json"
    coco = json.loads(path.read_text())
    coco["categories"] = [one | {"id": 10 * one["id"] - 5} for one in coco["categories"]] + [{"id": 65, "name": "none"}]
    for number, one in enumerate(coco["annotations"]):
        left, top, width, height = one["bbox"]
        one["category_id"] = 10 * one["category_id"] - 5
        if number % 5 == 0:
            flat = reference.decode(one["segmentation"]).ravel(order="F").astype(int)
            ends = np.flatnonzero(np.diff(flat)) + 1
            one["segmentation"]["counts"] = np.diff([0, *ends, flat.size]).tolist()
            one["iscrowd"] = 1
        elif number % 5 == 1:
            right, bottom = left + width, top + height
            one["segmentation"] = [[left, top, right, top, right, bottom], [left, top, left, bottom, right, bottom]]
    path.write_text(json.dumps(coco))
    return folder


@pytest.mark.parametrize("masks", [False, True])
def test_all_figures_are_those_of_pycocotools(folder, tmp_path, masks):
    path = folder / "annotations/instances_val.json"
    data = DetectionDataset(read_coco(path, folder / "images"), masks)
    objects, crowds = zip(*map(data.objects, range(len(data))), strict=True)
    assert any(crowds)
    assert not all(objects)
    scores = assert_equal(data, path, tmp_path)
    assert scores["box"].per_class["none"] == -1
    assert scores["box"].figures["APl"] == -1  # nothing that large


@pytest.mark.parametrize("reverse", [False, True])
def test_ids_that_a_float_cannot_hold(folder, tmp_path, reverse):
    """Hashes and timestamps: 2^53 and 2^53 + 1 are one floating-point number."""
    path = tmp_path / "large.json"
    coco = json.loads((folder / "annotations/instances_val.json").read_text())
    images = {one["id"]: 2**53 + one["id"] for one in coco["images"]} | {3: 2**62 + 5, 4: 2**62 + 6}
    categories = {one["id"]: 2**60 + one["id"] // 10 for one in coco["categories"]}
    for one in coco["images"]:
        one["id"] = images[one["id"]]
    for one in coco["categories"]:
        one["id"] = categories[one["id"]]
    for one in coco["annotations"]:
        one |= {"id": 2**61 + one["id"], "image_id": images[one["image_id"]]}
        one["category_id"] = categories[one["category_id"]]
    if reverse:
        coco["images"].reverse()
        coco["categories"].reverse()
    path.write_text(json.dumps(coco))
    small = DetectionDataset(read_coco(folder / "annotations/instances_val.json", folder / "images"), True)
    data = DetectionDataset(read_coco(path, folder / "images"), True, class_names=small.class_names)
    assert data.category_ids == [categories[category] for category in small.category_ids]
    found = perturbed(small)
    renamed = {
        images[image_id]: [
            one | {"image_id": images[image_id], "category_id": categories[one["category_id"]]} for one in results
        ]
        for image_id, results in found.items()
    }
    scores, expected = evaluate(data.truth, renamed, True), evaluate(small.truth, found, True)
    files = save_results(tmp_path, renamed, True)
    for kind, file in zip(scores, files, strict=True):
        assert {one["image_id"] for one in json.loads(file.read_text())} <= {*images.values()}
        other = pycocotools(path, file, kind)
        np.testing.assert_allclose(list(scores[kind].figures.values()), other.stats, rtol=0, atol=1e-6)
        assert scores[kind].per_class == pytest.approx(expected[kind].per_class)


def test_a_detection_in_another_image_of_a_large_id_is_wrong(tmp_path):
    """pycocotools gives 0; as floating-point numbers the two ids would be equal, and AP 1."""
    ids = [2**53, 2**53 + 1]
    truth = {
        "images": [{"id": i, "file_name": "", "width": 50, "height": 50} for i in ids],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": ids[0], "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
        ],
    }
    detections = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0]), "scores": torch.ones(1)}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for image_id, ap in zip(ids, (1, 0), strict=True):
        found = {image_id: to_results(image_id, detections, [1])}
        assert evaluate(truth, found, False)["box"].figures["AP"] == pytest.approx(ap)
        (file,) = save_results(tmp_path, found, False)
        assert pycocotools(tmp_path / "truth.json", file, "box").stats[0] == pytest.approx(ap)


def test_a_class_without_truth_is_absent(folder, tmp_path):
    path = folder / "annotations/instances_val.json"
    data = DetectionDataset(read_coco(path, folder / "images"), False)
    wider = DetectionDataset(read_coco(path, folder / "images"), False, class_names=("new", *data.class_names))
    found = perturbed(data)
    image_id = data.image_ids[0]
    detections = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0]), "scores": torch.ones(1)}
    more = {**found, image_id: found[image_id] + to_results(image_id, detections, wider.category_ids)}
    score, expected = evaluate(wider.truth, more, False)["box"], evaluate(data.truth, found, False)["box"]
    assert score.per_class == {"new": -1, **expected.per_class}
    assert score.figures == expected.figures


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_all_figures_on_photos(tmp_path, split):
    root = os.environ.get("DUALTOKEN_DATA")
    if not root:
        pytest.skip("DUALTOKEN_DATA names no folder of real photos")
    path = Path(root, "coco228/annotations", f"instances_{split}.json")
    data = DetectionDataset(read_coco(path, Path(root, "coco228/images")), True)
    assert_equal(data, path, tmp_path)


def test_figures_that_can_be_worked_out():
    """Two objects; the better detection hits one with IoU 0.6, the other is of the wrong class."""
    truth = {
        "images": [{"id": 4, "file_name": "", "width": 200, "height": 200}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 8, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 4, "category_id": 2, "bbox": [50, 50, 100, 100], "area": 10000, "iscrowd": 0},
        ],
    }
    boxes = torch.tensor([[0.0, 0, 10, 6], [50, 50, 150, 150]])
    detections = {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.8])}
    found = {4: to_results(4, detections, [2, 8])}
    score = evaluate(truth, found, masks=False)["box"]
    area = 51 / 101  # of 101 recalls, those up to one object in two
    assert score.figures == pytest.approx(
        {
            "AP": 3 * area / 10,  # IoU 0.5, 0.55, 0.6
            "AP50": area,
            "AP75": 0,
            "APs": 0.3,
            "APm": -1,
            "APl": 0,
            "AR1": 0.15,
            "AR10": 0.15,
            "AR100": 0.15,
            "ARs": 0.3,
            "ARm": -1,
            "ARl": 0,
        }
    )
    assert score.per_class == pytest.approx({"cat": 3 * area / 10, "dog": -1})
    assert score.precision[0, 0].tolist() == [1.0] * 51 + [0.0] * 50
    assert score.precision[1, 0].tolist() == [0.0] * 101
    assert evaluate(truth, {}, masks=False)["box"].figures["AP"] == 0


def test_curves_are_means_over_the_classes_that_have_objects():
    precision = np.stack([np.full((3, 101), -1.0), np.full((3, 101), -1.0)])  # (IoUs, classes, recalls)
    precision[0, :2], precision[1, :2] = [[0.8], [0.4]], [[0.2], [0.1]]
    curves = precision_recall(Score({}, {}, precision), ("a", "b", "c"))
    means = {name: precision.tolist() for name, (_, precision) in curves.items()}
    assert all(recall.tolist() == np.linspace(0, 1, 101).tolist() for recall, _ in curves.values())
    first, second = (f"all classes, IoU {iou}" for iou in CURVES)
    expected = {first: 0.6, second: 0.15, f"a, IoU {CURVES[0]}": 0.8, f"b, IoU {CURVES[0]}": 0.4}
    assert means == {name: pytest.approx([value] * 101) for name, value in expected.items()}


def test_the_order_of_the_classes_is_the_network_s(folder):
    path = folder / "annotations/instances_val.json"
    data = DetectionDataset(read_coco(path, folder / "images"), False)
    turned = DetectionDataset(read_coco(path, folder / "images"), False, class_names=data.class_names[::-1])
    one, other = (evaluate(each.truth, perturbed(each), False)["box"] for each in (data, turned))
    assert other.per_class == one.per_class
    assert list(other.per_class) == list(turned.class_names)
    assert np.array_equal(other.precision, one.precision[:, ::-1])
    assert other.figures == pytest.approx(one.figures)


def test_results(tmp_path):
    detections = {
        "boxes": torch.tensor([[1.0, 2, 4, 8], [0, 0, 1, 1]]),
        "labels": torch.tensor([1, 0]),
        "scores": torch.tensor([0.5, 0.25]),
        "masks": torch.ones((2, 1, 9, 9), dtype=torch.bool),
    }
    found = {3: to_results(3, detections, [7, 90]), 4: []}
    first = {"image_id": 3, "category_id": 90, "score": 0.5}
    mask = {"size": [9, 9], "counts": "0a2"}
    assert found[3][0] == first | {"bbox": [1, 2, 3, 6], "segmentation": mask}
    box, mask_file = save_results(tmp_path, found, masks=True)
    assert json.loads(box.read_text())[0] == first | {"bbox": [1, 2, 3, 6]}
    assert json.loads(mask_file.read_text())[0] == first | {"segmentation": mask}
    assert save_results(tmp_path / "boxes", found, masks=False) == [tmp_path / "boxes/detections-box.json"]


def gather_part(rank, world, folder):
    dist.init_process_group("gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=world)
    found = {image_id: [{"image_id": image_id, "score": 1.0}] for image_id in ([5, 1], [2, 5])[rank]}  # 5 is in both
    Path(folder, f"{rank}.json").write_text(json.dumps(list(gather(found).items())))


@pytest.mark.slow
def test_processes_are_gathered_and_each_image_counts_once(tmp_path):
    processes = [SERVER.Process(target=gather_part, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    expected = [[image_id, [{"image_id": image_id, "score": 1.0}]] for image_id in (1, 2, 5)]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected, expected]
    assert gather({2: [], 1: []}) == {1: [], 2: []}
