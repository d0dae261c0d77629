"""Object detection and instance segmentation: losses, COCO's average precision, prediction."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from dualtoken_vit.checkpoint import Checkpoint
from dualtoken_vit.data.balance import class_weights, image_weights
from dualtoken_vit.data.check import detection as data_check
from dualtoken_vit.data.coco import MIN_SIDE
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.detection import DetectionDataset, build_datasets, build_val_dataset
from dualtoken_vit.data.sampling import collate
from dualtoken_vit.data.transforms import detection_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, printable
from dualtoken_vit.models.backbone import pretrained_cfg, statistics
from dualtoken_vit.models.detectors import build_detector, create_detector, refusing_nan
from dualtoken_vit.models.one_stage import DETECTIONS, SCORE_THRESHOLD
from dualtoken_vit.recipes import Detection, DetectionInput, Model, model_kwargs
from dualtoken_vit.results import Objects
from dualtoken_vit.runtime.detection import to_objects
from dualtoken_vit.runtime.report import ObjectsReport, to_results
from dualtoken_vit.runtime.session import Arrays
from dualtoken_vit.runtime.tiles import detect_in_tiles
from dualtoken_vit.show import plots
from dualtoken_vit.tasks.base import Evaluation, Setup, Task, TaskModule, percent, rounded
from dualtoken_vit.tasks.coco_eval import CURVES, FIGURES, Score, evaluate, save_results
from dualtoken_vit.tasks.distributed import gather
from dualtoken_vit.tasks.networks import create_network
from dualtoken_vit.tasks.predictor import Predictor


@dataclass(frozen=True)
class DetectionOptions(DetectionInput):
    """How a detector predicts."""

    score: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Lowest score of a reported object."""


class DetectionPredictor(Predictor[Objects]):
    """A detector: returns the objects of each image whose score is above `score`."""

    Options = DetectionOptions
    report = ObjectsReport
    batch_size = 4
    ahead = 16
    model: Any
    memory_hint = "use smaller images or tiles, a smaller image_size or a higher score"

    def preprocess(self, image: Image.Image) -> Tensor:  # -> (C, H, W) uint8
        return pil_to_tensor(image)

    @torch.inference_mode()
    def forward(self, batch: list[Tensor], check: bool = True) -> list[Arrays]:
        """(C, H, W) uint8 each -> detections; with `check`, an InputError where the network produced NaN or Inf."""
        # Set here: predictors with other options may share the network. Before masks are pasted, which takes memory.
        self.model.score_thresh = self.options.score
        self.model.transform.min_size = (self.options.image_size,)
        self.model.transform.max_size = self.options.max_size
        tile, overlap = self.options.tile, self.options.overlap
        images = (image.to(self.device) / 255 for image in batch)
        with refusing_nan(self.model) if check else nullcontext():
            if tile is None:
                return self._detect(list(images))
            return [detect_in_tiles(self._detect, image, tile, overlap, self.batch_size) for image in images]

    def _detect(self, images: list[Tensor]) -> list[Arrays]:
        return [{key: value.cpu().numpy() for key, value in found.items()} for found in self.model(images)]

    def postprocess(self, outputs: list[Arrays]) -> list[Objects]:
        return [to_objects(found, self.class_names) for found in outputs]


Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionModule(TaskModule):
    """The detector's own losses over (images, targets) of `data.detection`; COCO's metrics on `val` in validation."""

    collate = staticmethod(collate)

    def __init__(self, predictor: DetectionPredictor, recipe: Detection, val: DetectionDataset):
        super().__init__(predictor, recipe)
        self.val = val
        self.masks = recipe.detector == "mask-rcnn"
        kinds = ("box", "mask") if self.masks else ("box",)
        self.score = f"{kinds[-1]}_AP"
        self.panels = {"loss": {"train_loss": "training"}} | {
            f"{kind} AP (%)": {f"val_{kind}_{name}": name for name in ("AP", "AP50", "AP75")} for kind in kinds
        }
        self.found: dict[int, list[dict[str, Any]]] = {}  # COCO results by image id, of the validation in progress
        self.results: dict[int, list[dict[str, Any]]] = {}  # the same of the last validation, over all processes
        self.scores: dict[str, Score] = {}  # of the last validation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        if not torch.cat([target["boxes"] for target in targets]).isfinite().all():
            train: Any = self.trainer.datamodule.train  # type: ignore[attr-defined]
            bad = next(target["image_id"] for target in targets if not target["boxes"].isfinite().all())
            raise InputError(
                f"{printable(train.image_names[train.image_ids.index(bad)])}: a box is NaN or Inf at step "
                f"{self.global_step + 1}, after augmentation; correct its labels, or leave out augmentations "
                "(--augment.*)"
            )
        losses = self.model([image / 255 for image in images], targets)
        loss = sum(losses.values())
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(images))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    @property
    def forward_options(self) -> dict[str, Any]:
        return {"check": self.check}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        outputs = self.predict(images, batch_idx)
        for target, found in zip(targets, self.predictor.postprocess(outputs), strict=True):
            self.found[target["image_id"]] = to_results(target["image_id"], found, self.val.category_ids)

    def evaluate(self) -> Evaluation:
        self.results, self.found = gather(self.found), {}
        self.scores = scores = evaluate(self.val.truth, self.results, self.masks)
        figures = {kind: rounded(score.figures) for kind, score in scores.items()}
        per_class = {kind: rounded(score.per_class) for kind, score in scores.items()}
        counts = Counter(one["category_id"] for one in self.val.truth["annotations"] if not one["iscrowd"])
        ids = zip(self.val.class_names, self.val.category_ids, strict=True)
        objects = {name: counts[category] for name, category in ids}
        best = (f"{kind} AP {percent(found['AP'])} AP50 {percent(found['AP50'])}" for kind, found in figures.items())
        return Evaluation(
            scores={f"{kind}_{name}": found[name] for kind, found in figures.items() for name in FIGURES},
            metrics=figures | {"images": len(self.results), "per_class": per_class, "objects": objects},
            headline="  ".join(best),
            columns=("class", "objects", *(f"{kind} AP" for kind in scores)),
            classes=[
                (name, str(count), *(percent(aps[name]) for aps in per_class.values()))
                for name, count in objects.items()
            ],
            totals=[(name, "", *(percent(found[name]) for found in figures.values())) for name in FIGURES],
        )

    def save_details(self, out: Path, evaluation: Evaluation) -> None:
        """evaluation.json, COCO's result files and the precision-recall curves of the last validation."""
        super().save_details(out, evaluation)
        save_results(out, self.results, self.masks)
        for kind, score in self.scores.items():
            curves = precision_recall(score, self.val.class_names)
            plots.save_precision_recall(curves, f"{kind}: precision against recall", out / f"pr-{kind}.png")


def _beyond_limit(val: DetectionDataset, tiles: bool) -> Iterator[str]:
    """A line if images have more objects than a detector returns or, of a class in all tiles, COCO's metrics count."""
    of_class, limit = (" of a class", "COCO's metrics count") if tiles else ("", "detectors return")
    many = 0
    for annotations in val.annotations:  # unpacked for each image: the whole `truth` would go to each loading process
        objects = [one["category_id"] if tiles else 0 for one in annotations if not one.get("iscrowd")]
        many += max(Counter(objects).values(), default=0) > DETECTIONS
    if many:
        limit = f"{limit} at most {DETECTIONS}, which limits recall and AP"
        yield f"{val.name}: images with more than {DETECTIONS} objects{of_class}: {many}; {limit}"


def precision_recall(score: Score, class_names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{label: (recall, precision)}: the mean over the classes at the IoUs of `CURVES`; at 0.5 each class, if few."""
    recall = np.linspace(0, 1, 101)
    there = np.flatnonzero((score.precision[0] > -1).any(1))  # classes of which there are objects
    if not there.size:
        return {}
    pairs = zip(CURVES, score.precision, strict=True)
    curves = {f"all classes, IoU {iou}": (recall, precision[there].mean(0)) for iou, precision in pairs}
    if 1 < len(class_names) <= 10:
        curves |= {f"{class_names[k]}, IoU {CURVES[0]}": (recall, score.precision[0, k]) for k in there}
    return curves


def _same_sizes(recipe: Detection, sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    """A note on sizes of --augment.multi-scale that are one for most of the images of these (width, height)."""
    elongation, most = median(max(size) / min(size) for size in sizes), recipe.data.max_size
    same = [side for side in recipe.augment.multi_scale if side * elongation >= most]
    if len(same) > 1:
        sides = " ".join(map(str, same))
        yield (
            f"--augment.multi-scale {sides}: the same for most training images, whose long side --data.max-size {most} "
            "limits; raise it, or leave out all but the first"
        )


class DetectionTask(Task[Detection]):
    name = "detection"
    recipe = Detection
    predictor = DetectionPredictor
    data_flags = "--data.root DIR [--data.val-split NAME] | --data.images DIR --data.val-json FILE"
    check_data = staticmethod(data_check.check)
    evaluation_options = {"score": SCORE_THRESHOLD}  # noqa: RUF012

    def prepare(self, recipe: Detection, start: Model) -> Setup:
        masks = recipe.detector == "mask-rcnn"
        train, val = build_datasets(recipe.data, masks, start.in_chans)
        if recipe.augment.copy_paste and not masks:
            raise InputError("--augment.copy-paste needs masks: give --detector mask-rcnn, or leave it out")
        train.transform = detection_train(recipe.augment, train if masks else None)
        val.notes = (*val.notes, *_beyond_limit(val, recipe.data.tile is not None))
        if recipe.data.balanced:
            objects = (train.objects(index)[0] for index in range(len(train)))
            train.weights = image_weights(
                [{one["category_id"] for one in each} for each in objects], recipe.data.balanced
            )
        if not any(train.counts):
            raise InputError(f"{train.name}: no object to train on; see check-data")
        if all(one.get("iscrowd") for annotations in val.annotations for one in annotations):
            raise InputError(
                f"{val.name}: no object to validate on (crowds do not count), so that no epoch could be the best; "
                "label some, or validate on others (--data.val-split, --data.val-json, --data.holdout) or on more "
                "(--data.limit); see check-data"
            )
        if train.dropped:
            note = f"not trained on: {counted(train.dropped, 'object')} with less than {MIN_SIDE:g} pixel in the image"
            train.notes = (*train.notes, note)
        if recipe.data.max_size < recipe.data.image_size:
            limit = f"--data.max-size {recipe.data.max_size}, which limits the long side, is below"
            train.notes = (*train.notes, f"{limit} --data.image-size {recipe.data.image_size}, which has no effect")
        train.notes = (*train.notes, *_same_sizes(recipe, train.sizes))
        args = model_kwargs(start)
        network = create_network(start, 0, **args)
        if not (recipe.model.checkpoint or recipe.model.pretrained):
            note = "the backbone starts from random weights"
            if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()):
                note += ", and its frozen batch normalisation normalises nothing"
            train.notes = (*train.notes, f"{note}: give --model.checkpoint or --model.pretrained if you can")
        made: dict[str, Any] = dict(
            detector=recipe.detector,
            image_size=recipe.data.image_size,
            max_size=recipe.data.max_size,
            roi_samples=recipe.roi_samples,
            **statistics(pretrained_cfg(network), start.in_chans),
        )
        names, size = train.class_names, recipe.data.image_size
        model = build_detector(
            model=network,
            num_classes=len(names),
            multi_scale=recipe.augment.multi_scale,
            class_weights=class_weights(recipe.class_weights, torch.tensor(train.counts)),
            **made,
        )
        usual = model.transform.usual(val.sizes)
        preprocessing = dict(
            input_size=(start.in_chans, size, size), mean=made["mean"], std=made["std"], usual_size=usual
        )
        predictor = DetectionPredictor.create(model, names, preprocessing, recipe.data, **self.evaluation_options)
        predictor.category_ids = tuple(train.category_ids)
        module = DetectionModule(predictor, recipe, val)
        return Setup(f"{recipe.detector} over {recipe.model.name}", module, train, val, {**args, **made})

    def rebuild(self, checkpoint: Checkpoint) -> nn.Module:
        return create_detector(name=checkpoint.model, **checkpoint.model_args)

    def evaluation(self, predictor: DetectionPredictor, recipe: Detection) -> tuple[DetectionModule, ImageData]:
        masks = recipe.detector == "mask-rcnn"
        val = build_val_dataset(recipe.data, masks, predictor.channels, predictor.class_names)
        val.notes = (*val.notes, *_beyond_limit(val, recipe.data.tile is not None))
        return DetectionModule(predictor, recipe, val), val

    def relocate(self, recipe: Detection, given: dict[str, Any]) -> dict[str, Any]:
        if not given.keys() & {"root", "images", "val_json"}:
            return {"holdout": 0.0} if "val_split" in given else {}
        follows: dict[str, Any] = {"dataset": "coco", "format": "auto", "limit": None, "holdout": 0.0}
        if "root" not in given:
            follows |= {"root": "", "train_split": "train", "val_split": "val"}
        return follows | ({"val_images": None} if "images" in given else {})


TASK = DetectionTask()
