"""Semantic segmentation: losses, metrics of one confusion matrix, prediction."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.v2.functional import pil_to_tensor

from dualtoken_vit.checkpoint import Checkpoint
from dualtoken_vit.data import segmentation as data
from dualtoken_vit.data.balance import class_weights
from dualtoken_vit.data.check import segmentation as data_check
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.masks import IGNORE
from dualtoken_vit.data.sampling import collate
from dualtoken_vit.data.transforms import segmentation_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import guard, printable
from dualtoken_vit.models import segmenters
from dualtoken_vit.recipes import Model, Segmentation, SegmentationInput, model_kwargs
from dualtoken_vit.results import LabelMap
from dualtoken_vit.runtime.report import LabelMapReport
from dualtoken_vit.show import plots
from dualtoken_vit.show.drawing import draw_scene, save_image
from dualtoken_vit.tasks.base import Evaluation, Setup, Task, TaskModule, percent
from dualtoken_vit.tasks.distributed import gather, mean_over_processes
from dualtoken_vit.tasks.networks import create_network
from dualtoken_vit.tasks.predictor import Predictor


class SegmentationPredictor(Predictor[LabelMap]):
    """A segmenter: returns the class of every pixel of each image."""

    model: segmenters.Segmenter
    Options = SegmentationInput
    report = LabelMapReport
    batch_size = 4
    ahead = 16
    memory_hint = "use mode slide, or a smaller image_size"

    def __init__(self, model: nn.Module, class_names: Any, preprocessing: dict[str, Any], options: Any):
        super().__init__(model, class_names, preprocessing, options)
        segmenters.check_windows(options)

    def preprocess(self, image: Image.Image) -> Tensor:  # -> (C, H, W) uint8
        return pil_to_tensor(image)

    def forward(self, batch: list[Tensor], check: bool = True) -> list[Tensor]:  # (C, H, W) uint8 each -> (H, W) int64
        return segmenters.segment(self.model, [image.to(self.device) / 255 for image in batch], self.options, check)

    def postprocess(self, outputs: list[Tensor]) -> list[LabelMap]:
        return [LabelMap(self.class_names, labels.byte().cpu().numpy()) for labels in outputs]


AUX_WEIGHT = 0.4
WORST = 8  # images to draw
FIGURES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}

Batch = tuple[list[Tensor], list[Tensor]]


def cross_entropy(logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over the pixels that are not ignored, weighted by class with `weights` (classes,); 0 if all are ignored.

    Each process divides by the mean of all processes' sums, so that averaged gradients equal those of one process.
    """
    loss = F.cross_entropy(logits, mask, weights, ignore_index=IGNORE, reduction="sum")
    counts = mask != IGNORE
    if weights is not None:
        counts = weights[mask * counts] * counts
    return loss / mean_over_processes(counts.sum()).clamp(min=1e-6)


class SegmentationModule(TaskModule):
    """Cross-entropy of both heads over (images, masks) of `data.segmentation`; draws the worst images of `val`."""

    predictor: SegmentationPredictor
    score = "miou"
    collate = staticmethod(collate)

    panels = {  # noqa: RUF012
        "loss": {"train_loss": "training"},
        "validation (%)": {"val_miou": "mIoU", "val_pixel_accuracy": "pixels", "val_mean_accuracy": "mean of classes"},
    }

    def __init__(self, predictor: SegmentationPredictor, recipe: Segmentation, val: data.SegmentationDataset):
        super().__init__(predictor, recipe)
        self.weights: Tensor | None = None  # (classes,) in the loss, where the recipe does not weight them equally
        self.val = val
        self.metric = MulticlassConfusionMatrix(len(val.class_names), ignore_index=IGNORE, validate_args=False)
        self.found: dict[int, tuple[float, np.ndarray]] = {}  # pixel accuracy and labels of the worst so far, by index
        self.seen = 0  # images of this process in that validation
        self.worst: list[tuple[int, np.ndarray]] = []  # index and labels, the worst first, of the last validation
        self.confusion = np.zeros((len(val.class_names),) * 2, dtype=np.int64)  # pixels by true, predicted class

    def weigh(self, train: ImageData) -> None:
        """Weight the classes by their share of the training pixels, of which two or more classes must have some."""
        pixels, names = train.state_dict().get("pixels"), self.val.class_names
        if pixels is None:  # --data.verify false
            return
        missing = [name for name, count in zip(names, pixels[0].tolist(), strict=True) if not count]
        if missing and self.trainer.is_global_zero:
            print(f"in no training mask: {', '.join(map(printable, missing))}")
        if len(names) - len(missing) < 2:
            raise InputError(
                f"the training masks have only one class, besides ignored pixels ({self.recipe.data.ignore_index}, "
                "--data.ignore-index); look at them with check-data"
            )
        self.weights = class_weights(self.recipe.class_weights, *pixels)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = (torch.stack(each) for each in batch)
        masks = masks.long()
        if self.weights is not None:
            self.weights = self.weights.to(masks.device)
        found = self.model(images / 255)
        losses = {name: cross_entropy(logits, masks, self.weights) for name, logits in found.items()}
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(images))
        loss = losses["out"] + AUX_WEIGHT * losses["aux"]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def on_validation_start(self) -> None:
        """Count on the CPU for MPS, where torchmetrics has a tensor of pixels x classes ** 2."""
        if self.device.type == "mps":
            self.metric.cpu()

    @property
    def forward_options(self) -> dict[str, Any]:
        return {"check": self.check}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, masks = batch
        labels = self.predict(images, batch_idx)
        for found, mask in zip(labels, masks, strict=True):
            place = self.metric.device
            confusion = self.metric(found.to(place), mask.long().to(place))  # of this image
            index = self.trainer.global_rank + self.seen * self.trainer.world_size  # as `sampling.loader` deals them
            self.seen += 1
            right = (confusion.trace() / confusion.sum()).nan_to_num(1.0).item()  # all pixels ignored
            self.found[index] = right, found.byte().cpu().numpy()
            if len(self.found) > WORST:
                del self.found[max(self.found, key=lambda index: self.found[index][0])]

    def evaluate(self) -> Evaluation:
        self.confusion = self.metric.compute().cpu().numpy()
        self.metric.reset()
        by_share = sorted(gather(self.found).items(), key=lambda item: item[1][0])
        self.worst = [(index, labels) for index, (_, labels) in by_share[:WORST]]
        self.found, self.seen = {}, 0
        return evaluation(self.confusion, self.val.class_names, len(self.val))

    def save_details(self, out: Path, evaluation: Evaluation) -> None:
        """evaluation.json, the confusion matrix as confusion.{csv,png}, and the worst images beside their truth."""
        super().save_details(out, evaluation)
        names = self.val.class_names
        plots.save_confusion_csv(self.confusion, names, out / "confusion.csv")
        plots.save_confusion(self.confusion, names, out / "confusion.png", percent=True)
        for number, (index, labels) in enumerate(self.worst, start=1):
            with guard(path := out / "worst" / f"{number}.png"):
                image, truth = self.val.load(index)
                title = Path(self.val.image_names[index]).name
                panels = [(title, image, None), ("ground truth", image, truth), ("prediction", image, labels)]
                save_image(draw_scene(panels, names), path)


def evaluation(confusion: np.ndarray, class_names: tuple[str, ...], images: int) -> Evaluation:
    """Metrics of a confusion matrix in pixels (row: true class, column: predicted class).

    miou is the mean over the classes in the ground truth or the predictions, mean_accuracy over those in the ground
    truth. per_class has the intersection over union and the accuracy of each class, None for one that is left out.
    """
    right, true = confusion.diagonal(), confusion.sum(1)
    union = true + confusion.sum(0) - right
    iou, accuracy = right / np.maximum(union, 1), right / np.maximum(true, 1)
    means = (
        iou[union > 0].mean() if union.any() else 0.0,
        right.sum() / max(true.sum(), 1),
        accuracy[true > 0].mean() if true.any() else 0.0,
    )
    scores = {name: round(float(mean), 6) for name, mean in zip(FIGURES, means, strict=True)}
    shares = (
        [round(float(share), 6) if there else None for share, there in zip(found, pixels, strict=True)]
        for found, pixels in ((iou, union), (accuracy, true))
    )
    rows = zip(class_names, *shares, strict=True)
    per_class = {name: {"iou": overlap, "accuracy": recall} for name, overlap, recall in rows}
    return Evaluation(
        scores=scores,
        metrics=scores | {"images": images, "per_class": per_class},
        headline="  ".join(f"{about} {scores[name]:.2%}" for name, about in FIGURES.items()),
        columns=("class", "IoU", "accuracy"),
        classes=[(name, *map(percent, one.values())) for name, one in per_class.items()],
        totals=[
            ("all pixels", "", percent(scores["pixel_accuracy"])),
            ("mean of classes", percent(scores["miou"]), percent(scores["mean_accuracy"])),
        ],
    )


class SegmentationTask(Task[Segmentation]):
    name = "segmentation"
    recipe = Segmentation
    predictor = SegmentationPredictor
    check_data = staticmethod(data_check.check)

    def prepare(self, recipe: Segmentation, start: Model) -> Setup:
        if recipe.class_weights != "equal" and not recipe.data.verify:
            raise InputError(
                f"--class-weights {recipe.class_weights} counts the pixels of each class in the training masks: leave "
                "--data.verify at true"
            )
        train, val = data.build_datasets(recipe.data, start.in_chans)
        train.transform = segmentation_train(recipe.data, recipe.augment)
        args = model_kwargs(start)
        network = segmenters.dilated(lambda **made: create_network(start, 0, **{**args, **made}), recipe.output_stride)
        head: dict[str, Any] = dict(output_stride=recipe.output_stride, width=recipe.width, dropout=recipe.dropout)
        num_classes = len(train.class_names)
        model = segmenters.Segmenter(recipe.segmenter, network, num_classes, in_chans=start.in_chans, **head)
        statistics = {name: getattr(model, name).flatten().tolist() for name in ("mean", "std")}
        preprocessing = dict(input_size=(start.in_chans, *recipe.data.crop_size), **statistics)
        predictor = SegmentationPredictor.create(model, train.class_names, preprocessing, recipe.data)
        module = SegmentationModule(predictor, recipe, val)
        model_args = {**args, "segmenter": recipe.segmenter, **head}
        return Setup(f"{recipe.segmenter} over {recipe.model.name}", module, train, val, model_args)

    def rebuild(self, checkpoint: Checkpoint) -> nn.Module:
        return segmenters.create_segmenter(name=checkpoint.model, **checkpoint.model_args)

    def evaluation(self, predictor: SegmentationPredictor, recipe: Segmentation) -> tuple[TaskModule, ImageData]:
        val = data.build_dataset(recipe.data, "val", predictor.channels, predictor.class_names)
        return SegmentationModule(predictor, recipe, val), val

    def relocate(self, recipe: Segmentation, given: dict[str, Any]) -> dict[str, Any]:
        if "root" not in given:
            return {"holdout": 0.0} if "val_split" in given else {}
        follows: dict[str, Any] = {"dataset": "masks", "format": "auto", "limit": None, "holdout": 0.0}
        if recipe.data.classes and not Path(recipe.data.classes).is_file():
            follows["classes"] = None  # it stayed with the training images; the checkpoint has the names
        return follows

    def share_fault(self, recipe: Segmentation, share: int) -> str:
        if recipe.segmenter != "lraspp" and share < 2 and recipe.optim.batch_size // recipe.optim.accumulate < 2:
            return "the head's batch normalisation after global pooling needs two or more images"
        return ""


TASK = SegmentationTask()
