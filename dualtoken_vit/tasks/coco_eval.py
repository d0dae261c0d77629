"""COCO's average precision of detections, computed by faster-coco-eval.

Detections are collected as COCO results, one list per image, in the form of the result files.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from dualtoken_vit.files import atomic_write

KINDS = {"box": "bbox", "mask": "segmentation"}  # what is compared: its key in a result
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # in COCO's order
CURVES = (0.5, 0.75)  # IoUs


@dataclass(frozen=True)
class Score:
    """COCO's metrics of boxes or masks; -1 means that there is no ground truth."""

    figures: dict[str, float]  # FIGURES, 0 to 1: AP over IoU 0.5 to 0.95, by size of object; AR with N detections
    per_class: dict[str, float]  # AP of each class
    precision: np.ndarray  # (IoUs of CURVES, classes, 101): the best precision at recall 0, 0.01, ..., 1 or above


def evaluate(truth: dict[str, list[dict]], found: dict[int, list[dict]], masks: bool) -> dict[str, Score]:
    """The score of "box", and with `masks` of "mask", in all images of `truth`, a `DetectionDataset.truth`.

    `found` has the results, as `to_results` makes them, by image id; images may be missing.
    """
    # COCO's programs hold ids as floating-point numbers, which are exact up to 2^53, and take id 0 for "no match".
    images = {image_id: i for i, image_id in enumerate(sorted(one["id"] for one in truth["images"]), 1)}
    categories = {one["id"]: i for i, one in enumerate(truth["categories"], 1)}

    def renumbered(entry: dict) -> dict:
        return entry | {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}

    truth = {
        "images": [one | {"id": images[one["id"]]} for one in truth["images"]],
        "categories": [one | {"id": categories[one["id"]]} for one in truth["categories"]],
        "annotations": [renumbered(one) | {"id": i} for i, one in enumerate(truth["annotations"], 1)],
    }
    results = [renumbered(result) for one in found.values() for result in one]
    return {kind: _score(truth, results, kind) for kind in KINDS if kind == "box" or masks}


def of_kind(results: Iterable[dict], kind: str) -> list[dict]:
    """The results with boxes only, or masks only.

    Given both, COCO's programs take the area of the box for that of the mask when they sort objects by size.
    """
    other = KINDS["mask" if kind == "box" else "box"]
    return [{key: value for key, value in result.items() if key != other} for result in results]


def _score(truth: dict[str, list[dict]], results: list[dict], kind: str) -> Score:
    # The library writes into the annotations.
    there = COCO(truth | {"annotations": [annotation.copy() for annotation in truth["annotations"]]})
    evaluation = COCOeval_faster(there, there.loadRes(of_kind(results, kind)), {"box": "bbox", "mask": "segm"}[kind])
    evaluation.run()
    # (IoUs, recalls, classes), for objects of any size and 100 detections; the classes are in the order of their ids
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = [category["name"] for category in truth["categories"]]
    ious = [int(np.isclose(evaluation.params.iouThrs, iou).argmax()) for iou in CURVES]
    return Score(
        figures=dict(zip(FIGURES, map(float, evaluation.stats), strict=True)),
        per_class=dict(zip(names, precision.mean((0, 1)).tolist(), strict=True)),  # -1 everywhere or nowhere
        precision=precision[ious].transpose(0, 2, 1),
    )


def save_results(folder: str | Path, found: dict[int, list[dict]], masks: bool) -> list[Path]:
    """Write FOLDER/detections-box.json and, with `masks`, detections-mask.json, which pycocotools reads."""
    paths = {kind: Path(folder, f"detections-{kind}.json") for kind in KINDS if kind == "box" or masks}
    for kind, path in paths.items():
        with atomic_write(path, "w") as file:
            json.dump(of_kind((result for one in found.values() for result in one), kind), file)
    return [*paths.values()]
