"""Object detection and instance segmentation: losses, COCO's average precision, prediction."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torchvision.ops import box_area
from torchvision.transforms.v2.functional import pil_to_tensor

from dualtoken_vit.checkpoint import Checkpoint, load_weights
from dualtoken_vit.data.check import detection as data_check
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.detection import MIN_SIDE, DetectionDataset, build_datasets, build_val_dataset, collate
from dualtoken_vit.data.transforms import detection_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.models.backbone import pretrained_cfg, statistics
from dualtoken_vit.models.detectors import SCORE_THRESHOLD, MaskRCNN, RetinaNet, build_detector, create_detector
from dualtoken_vit.recipes import Detection, DetectionInput, Model, model_kwargs
from dualtoken_vit.results import Objects
from dualtoken_vit.show import plots
from dualtoken_vit.show.drawing import draw_objects
from dualtoken_vit.tasks.base import Setup, Task, TaskModule
from dualtoken_vit.tasks.coco_eval import CURVES, FIGURES, Score, evaluate, save_results, to_results
from dualtoken_vit.tasks.distributed import gather
from dualtoken_vit.tasks.networks import create_network
from dualtoken_vit.tasks.predictor import Predictor, Report


@dataclass(frozen=True)
class DetectionOptions(DetectionInput):
    """How a detector predicts."""

    score: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Lowest score of a reported object."""


class DetectionPredictor(Predictor[Objects]):
    """A detector: returns the objects of each image whose score is above `score`."""

    Options = DetectionOptions
    batch_size = 4
    ahead = 16
    memory_hint = "use smaller images, a smaller image_size or a higher score"

    def __init__(self, model: RetinaNet | MaskRCNN, class_names: Any, preprocessing: dict[str, Any], options: Any):
        super().__init__(model, class_names, preprocessing, options)
        model.score_thresh = options.score  # applied before masks are pasted, which takes memory
        model.transform.min_size = (options.image_size,)
        model.transform.max_size = max(options.max_size, options.image_size)

    def preprocess(self, image: Image.Image) -> Tensor:  # -> (C, H, W) uint8
        return pil_to_tensor(image)

    @torch.inference_mode()
    def forward(self, batch: list[Tensor]) -> list[dict[str, Tensor]]:  # (C, H, W) uint8 each -> detections
        return self.model([image.to(self.device) / 255 for image in batch])

    def postprocess(self, outputs: list[dict[str, Tensor]]) -> list[Objects]:
        results = []
        for one in outputs:
            found = {key: value.cpu().numpy() for key, value in one.items()}
            names = tuple(self.class_names[label] for label in found["labels"].tolist())
            masks = found["masks"][:, 0] if "masks" in found else None
            results.append(Objects(names, found["labels"], found["boxes"], found["scores"], masks))
        return results


def _detections(result: Objects) -> dict[str, Tensor]:
    """A result as `detectors` returns it."""
    arrays = {"boxes": result.boxes, "labels": result.labels, "scores": result.scores}
    if result.masks is not None:
        arrays["masks"] = result.masks[:, None]
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


class DetectionReport(Report[Objects]):
    """The objects of each image; the record is a COCO file with scores."""

    def __init__(self, predictor: DetectionPredictor):
        super().__init__(predictor)
        self.category_ids = predictor.category_ids or tuple(range(1, len(predictor.class_names) + 1))
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, predictor.class_names, strict=True)]
        self.coco: dict[str, list[dict[str, Any]]] = {"images": [], "categories": categories, "annotations": []}

    def add(self, path: Path, image: Image.Image, result: Objects) -> None:
        images, annotations = self.coco["images"], self.coco["annotations"]
        width, height = image.size
        images.append({"id": len(images) + 1, "file_name": str(path), "width": width, "height": height})
        found = _detections(result)
        areas = found["masks"].flatten(1).sum(1) if "masks" in found else box_area(found["boxes"])
        for one, area in zip(to_results(len(images), found, self.category_ids), areas.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, **one, "area": area, "iscrowd": 0})

    def draw(
        self, title: str, image: Image.Image, result: Objects
    ) -> tuple[Image.Image, Image.Image, tuple[str, float | None]]:
        drawing = draw_objects(image, _detections(result), self.predictor.class_names)
        return drawing, drawing, (f"{len(result)} object{'s' * (len(result) != 1)}", None)

    def record(self) -> dict[str, Any]:
        return self.coco

    def table(self) -> Table:
        table = Table("image", "class", "objects", "best", box=box.SIMPLE_HEAD)
        table.columns[0].overflow = "fold"
        names = dict(zip(self.category_ids, self.predictor.class_names, strict=True))
        scores: dict[int, dict[str, list[float]]] = {image["id"]: {} for image in self.coco["images"]}
        for one in self.coco["annotations"]:
            scores[one["image_id"]].setdefault(names[one["category_id"]], []).append(one["score"])
        for image in self.coco["images"]:
            name, rows = printable(image["file_name"]), scores[image["id"]] or {"nothing": []}
            for number, (label, found) in enumerate(rows.items()):
                cells = (str(len(found) or ""), f"{max(found):.1%}" if found else "")
                table.add_row(Text("" if number else name), Text(printable(label)), *cells)
            table.add_section()
        return table


Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionModule(TaskModule):
    """The detector's own losses over (images, targets) of `data.detection`; COCO's metrics in validation.

    Args:
        predictor: runs the detector
        recipe: the experiment
        val: the validation images, whose objects are the ground truth
        steps_per_epoch: optimiser steps
    """

    collate = staticmethod(collate)

    def __init__(
        self, predictor: DetectionPredictor, recipe: Detection, val: DetectionDataset, steps_per_epoch: int = 1
    ):
        super().__init__(predictor, recipe, steps_per_epoch)
        self.val = val
        self.masks = recipe.detector == "mask-rcnn"
        self.kinds = ("box", "mask") if self.masks else ("box",)
        self.score = f"{self.kinds[-1]}_AP"
        self.panels = {"loss": {"train_loss": "training"}} | {
            f"{kind} AP (%)": {f"val_{kind}_{name}": name for name in ("AP", "AP50", "AP75")} for kind in self.kinds
        }
        self.found: dict[int, list[dict[str, Any]]] = {}
        """COCO results by image id, of the validation in progress."""
        self.results: dict[int, list[dict[str, Any]]] = {}
        """The same of the last validation, over all processes."""
        self.scores: dict[str, Score] = {}
        """Of the last validation."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model([image / 255 for image in images], targets)
        loss = sum(losses.values())
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(images))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        for target, found in zip(targets, self.predictor.forward(images), strict=True):
            self.found[target["image_id"]] = to_results(target["image_id"], found, self.val.category_ids)

    def compute_metrics(self) -> dict[str, float]:
        self.results, self.found = gather(self.found), {}
        self.scores = evaluate(self.val.truth, self.results, self.masks)
        return {
            f"val_{kind}_{name}": round(score.figures[name], 6)
            for kind, score in self.scores.items()
            for name in FIGURES
        }

    def headline(self, row: dict[str, Any]) -> str:
        return "  ".join(
            f"{kind} AP {_percent(row[f'val_{kind}_AP'])} AP50 {_percent(row[f'val_{kind}_AP50'])}"
            for kind in self.kinds
        )

    def save_details(self, out: Path) -> None:
        """evaluation.json, COCO's result files and the precision-recall curves of the last validation."""
        per_class = {kind: score.per_class for kind, score in self.scores.items()}
        with atomic_write(out / "evaluation.json", "w") as file:
            json.dump(self.evaluation().to_json() | {"per_class": per_class}, file, indent=2)
        save_results(out, self.results, self.masks)
        for kind, score in self.scores.items():
            plots.save_precision_recall(
                precision_recall(score, self.val.class_names),
                f"{kind}: precision against recall",
                out / f"pr-{kind}.png",
            )

    def evaluation(self) -> "DetectionEvaluation":
        return DetectionEvaluation(self.scores, len(self.results))


def precision_recall(score: Score, class_names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{label: (recall, precision)}: the mean over the classes at the IoUs of `CURVES`; at 0.5 each class, if few."""
    recall = np.linspace(0, 1, 101)
    there = (score.precision[0] > -1).any(1)  # classes of which there are objects
    curves = {
        f"all classes, IoU {iou}": (recall, precision[there].mean(0))
        for iou, precision in zip(CURVES, score.precision, strict=True)
        if there.any()
    }
    if 1 < len(class_names) <= 10:
        curves |= {
            f"{name}, IoU {CURVES[0]}": (recall, score.precision[0, label])
            for label, name in enumerate(class_names)
            if there[label]
        }
    return curves


@dataclass(frozen=True)
class DetectionEvaluation:
    """Metrics of a detector on a validation set; shares are between 0 and 1, -1 where there is no ground truth."""

    scores: dict[str, Score]
    """By kind, "box" and "mask"."""
    images: int

    def to_json(self) -> dict[str, Any]:
        return {kind: score.figures for kind, score in self.scores.items()} | {"images": self.images}

    def table(self) -> Table:
        table = Table("class", *(f"{kind} AP" for kind in self.scores))
        for name in self.scores["box"].per_class:
            table.add_row(Text(printable(name)), *(_percent(score.per_class[name]) for score in self.scores.values()))
        table.add_section()
        for figure in FIGURES:
            table.add_row(figure, *(_percent(score.figures[figure]) for score in self.scores.values()))
        return table

    def headline(self) -> str:
        shares = ", ".join(f"{kind} AP {_percent(score.figures['AP'])}" for kind, score in self.scores.items())
        return f"{shares}, {self.images} images"


def _percent(share: float) -> str:
    return "-" if share < 0 else f"{share:.1%}"


class DetectionTask(Task[Detection]):
    name = "detection"
    recipe = Detection
    predictor = DetectionPredictor
    report = DetectionReport
    data_flags = "--data.images DIR --data.val-json FILE"
    evaluation_options = {"score": SCORE_THRESHOLD}  # noqa: RUF012

    def prepare(self, recipe: Detection, start: Model) -> Setup:
        masks = recipe.detector == "mask-rcnn"
        train, val = build_datasets(recipe.data, masks, start.in_chans)
        train.transform = detection_train(recipe.augment.hflip, recipe.augment.photometric)
        if not train.trained:
            raise InputError(f"{train.name}: no object to train on; see check-data")
        notes: tuple[str, ...] = ()
        if train.dropped:
            notes += (f"{train.dropped} objects with less than {MIN_SIDE:g} pixel in the image are not trained on",)
        if not (recipe.model.checkpoint or recipe.model.pretrained):
            notes += (
                "the backbone starts from random weights, and its frozen batch normalisation normalises nothing: give "
                "--model.checkpoint or --model.pretrained if you can",
            )
        args = model_kwargs(start)
        network = create_network(start, 0, **args)
        made: dict[str, Any] = dict(
            detector=recipe.detector,
            image_size=recipe.data.image_size,
            max_size=recipe.data.max_size,
            roi_samples=recipe.roi_samples,
            **statistics(pretrained_cfg(network), start.in_chans),
        )
        model = build_detector(
            model=network, num_classes=len(train.class_names), multi_scale=recipe.augment.multi_scale, **made
        )
        size = recipe.data.image_size
        preprocessing = dict(input_size=(start.in_chans, size, size), mean=made["mean"], std=made["std"])
        options = DetectionPredictor.make_options(
            **self.predictor.stored_options(recipe.data, preprocessing), **self.evaluation_options
        )
        predictor = DetectionPredictor(model, train.class_names, preprocessing, options)
        return Setup(
            title=f"{recipe.detector} over {recipe.model.name}",
            model=model,
            train=train,
            val=val,
            class_names=train.class_names,
            preprocessing=preprocessing,
            model_args={**args, **made},
            report=load_weights(model, start.checkpoint, train.class_names) if start.checkpoint else None,
            category_ids=tuple(train.category_ids),
            notes=notes,
            build_module=lambda steps: DetectionModule(predictor, recipe, val, steps),
        )

    def rebuild(self, checkpoint: Checkpoint) -> nn.Module:
        return create_detector(name=checkpoint.model, **checkpoint.model_args)

    def evaluation(self, predictor: DetectionPredictor, recipe: Detection) -> tuple[DetectionModule, ImageData]:
        masks = recipe.detector == "mask-rcnn"
        val = build_val_dataset(recipe.data, masks, predictor.channels, predictor.class_names)
        return DetectionModule(predictor, recipe, val), val

    def check_data(self, recipe: Detection, out: Path) -> bool:
        return data_check.check(recipe, out)

    def relocate(self, recipe: Detection, given: dict[str, Any]) -> dict[str, Any]:
        if not given.keys() & {"images", "val_json"}:
            return {}
        follows: dict[str, Any] = {"dataset": "coco", "limit": None}
        return follows | ({"val_images": None} if "images" in given else {})


TASK = DetectionTask()
