"""Recipes of object detection and instance segmentation, the paper's Tables 3 and 4 among them."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from dualtoken_vit.bounds import ASCENDING
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes.base import FREE, Count, Model, Optim, Range, Recipe, Share, Side, SplitData, register


@dataclass(frozen=True)
class DetectionInput:
    """How images are prepared in evaluation and prediction."""

    image_size: Annotated[int, Side] = 800
    """Short side of the resized images, in pixels."""
    max_size: Annotated[int, Side] = 1333
    """Maximum long side, in pixels; it takes precedence over image_size."""
    tile: Annotated[int | None, Interval(ge=32, le=16384)] = None
    """Large images: evaluate and predict in overlapping square tiles of this side in pixels, each resized as an image
    would be, and merge their objects. None: whole images."""
    overlap: Annotated[float, Interval(ge=0, le=0.9)] = 0.2
    """Overlap of neighbouring tiles, as a share of their side; it should exceed most objects."""


@dataclass(frozen=True)
class DetectionData(DetectionInput, SplitData):
    """The images and their objects."""

    contents: ClassVar[str] = "images and labels"
    dataset: str = "coco"
    """coco: images and labels in files; shapes: generated images with boxes and masks."""
    root: Annotated[str, FREE] = ""
    """Folder of images with labels in any of the formats. It takes precedence over images and the json files."""
    format: str = "auto"
    """Label format in root: coco (also as exported by Roboflow), yolo, voc, csv or labelme; auto: detect it."""
    images: Annotated[str, FREE] = ""
    """Folder of the images that the json files name."""
    val_images: Annotated[str | None, FREE] = None
    """Folder of the validation images, if it is not images."""
    train_json: Annotated[str, FREE] = ""
    """COCO json file of the training images; category ids may be any integers."""
    val_json: Annotated[str, FREE] = ""
    """COCO json file of the validation images."""
    balanced: Share = 0.0
    """Class-balanced sampling: an epoch draws as many images as there are, each in proportion to f ** -balanced, where
    f is the share of the images that contain its rarest class. 0: every image once; 0.5: as LVIS's repeat factors."""
    limit: Annotated[int | None, Count] = None
    """Use only the first images of each split, for a quick test or to overfit on purpose."""

    def check_place(self) -> None:
        if self.root:
            super().check_place()
        elif self.dataset.lower() == "coco":
            self.files("train")

    def files(self, split: str) -> tuple[str, str]:
        """The COCO json of train or val and the folder of its images; an InputError for a field that is missing."""
        images = self.val_images if split == "val" and self.val_images else self.images
        path = {"train": self.train_json, "val": self.val_json}[split]
        for flag, value, what in (
            ("--data.images", images, "the folder of the images, or --data.root DIR with images and labels"),
            (f"--data.{split}-json", path, "the COCO json with their objects"),
        ):
            if not value:
                raise InputError(f"{flag} is missing: give {what}")
        return path, images


@dataclass(frozen=True)
class DetectionAugment:
    """Training augmentation of images, boxes and masks."""

    preset: Literal["custom", "light", "medium", "strong"] = "custom"
    """custom: the fields below; otherwise their values for a dataset of thousands, hundreds or tens of images."""
    hflip: Share = 0.5
    """Probability of a horizontal flip."""
    multi_scale: Annotated[tuple[int, ...], Side] = ()
    """Short sides to choose from at random for each training image; empty: always image_size."""
    photometric: Share = 0.0
    """Probability of each of the changes in brightness, contrast, saturation and hue."""
    zoom_out: Share = 0.0
    """Probability of a black frame around the image, of up to twice its sides (SSD)."""
    iou_crop: Share = 0.0
    """Probability of trying a random crop around objects (SSD); a seventh or more of these leave the image whole."""
    scale: Annotated[Range, Interval(ge=0.05, le=10), ASCENDING] = (1.0, 1.0)
    """Scale jitter within an image of the same size: lowest and highest factor."""
    copy_paste: Share = 0.0
    """Probability of objects pasted from another image, for Mask R-CNN (arXiv 2012.07177)."""

    def values(self) -> "DetectionAugment":
        """The fields that the preset stands for; an InputError for one that is given another value."""
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) not in (getattr(DetectionAugment, name), value):
                flag = f"--augment.{name.replace('_', '-')}"
                raise InputError(f"{flag}: --augment.preset {self.preset} sets it to {value}; leave out one of the two")
        return replace(self, **PRESETS[self.preset])


PRESETS: dict[str, dict[str, Any]] = {
    "custom": {},
    "light": dict(photometric=0.3, zoom_out=0.0, iou_crop=0.0, scale=(0.8, 1.25), copy_paste=0.0),
    "medium": dict(photometric=0.5, zoom_out=0.25, iou_crop=0.5, scale=(1.0, 1.0), copy_paste=0.0),
    "strong": dict(photometric=0.5, zoom_out=0.5, iou_crop=0.8, scale=(1.0, 1.5), copy_paste=0.5),
}
"""Presets of `DetectionAugment`; copy-paste is left out without masks."""


@dataclass(frozen=True)
class Detection(Recipe):
    """An object detection or instance segmentation run."""

    task: ClassVar[str] = "detection"
    detector: Literal["retinanet", "mask-rcnn", "fcos", "ssdlite"] = "retinanet"
    """retinanet, fcos (lighter), ssdlite (lightest): boxes; mask-rcnn: boxes and masks."""
    roi_samples: Annotated[int, Interval(ge=4, le=100_000)] = 512
    """Mask R-CNN: proposals sampled per image to train its heads; fewer need less time and memory."""
    class_weights: Literal["equal", "inverse", "effective"] = "equal"
    """Weight of a class of n training objects in the classification loss, up to a common factor. equal: 1; inverse:
    1 / n; effective: 1 / (1 - 0.999 ** n) (arXiv 1901.05555). Background has 1; the logged loss is not weighted. An
    alternative to data.balanced: not with it."""
    data: DetectionData = DetectionData()
    augment: DetectionAugment = DetectionAugment()


# The paper's settings on COCO (section 4.2). It does not state clipping: none, as in MMDetection's configs.
COCO = Detection(
    model=Model(name="dualtoken_vit_small", drop_path_rate=0.1),
    optim=Optim(
        lr=1e-4, batch_size=16, weight_decay=1e-4, schedule="step", epochs=12, milestones=(8, 11), warmup_steps=500
    ),
    data=DetectionData(
        images="coco/train2017",
        val_images="coco/val2017",
        train_json="coco/annotations/instances_train2017.json",
        val_json="coco/annotations/instances_val2017.json",
        workers=8,
    ),
)
COCO_MASK = replace(
    COCO,
    detector="mask-rcnn",
    model=replace(COCO.model, name="dualtoken_vit_small_mix"),
    optim=replace(COCO.optim, weight_decay=0.05),
)

register(
    Detection,
    {
        "demo-detect": (
            "Detect generated shapes, with boxes and masks: no files.",
            Detection(
                detector="mask-rcnn",
                roi_samples=32,
                model=Model(name="dualtoken_vit_tiny_mix", args=("depths=(1,2,1)",)),
                data=DetectionData(dataset="shapes", image_size=128, max_size=128),
                optim=Optim(lr=5e-4, batch_size=8, epochs=6, warmup_epochs=0.5, clip_grad=10.0),
            ),
        ),
        "coco": (
            "Detect your own objects: COCO, YOLO, VOC, ... in ROOT.",
            Detection(
                model=Model(name="dualtoken_vit_tiny_mix", pretrained="auto"),
                optim=Optim(lr=2e-4, batch_size=8, epochs=36, clip_grad=10.0),
            ),
        ),
        "coco-lite": (
            "The same, light: SSDLite over T (mix) at 320 pixels.",
            Detection(
                detector="ssdlite",
                model=Model(name="dualtoken_vit_tiny_mix", pretrained="auto"),
                data=DetectionData(image_size=320, max_size=512),
                optim=Optim(lr=1e-3, batch_size=8, epochs=60, clip_grad=10.0),
            ),
        ),
        "coco-retinanet-1x": ("Table 4, RetinaNet 1x with a pretrained S: 40.3 AP.", COCO),
        "coco-mask-rcnn-1x": ("Table 3, Mask R-CNN 1x, S (mix): 41.1 box, 38.1 mask AP.", COCO_MASK),
        "coco-mask-rcnn-3x": (
            "Table 3, the same 3x, multi-scale: 43.7 box, 39.9 mask AP.",
            replace(
                COCO_MASK,
                augment=DetectionAugment(multi_scale=tuple(range(480, 801, 32))),
                optim=replace(COCO_MASK.optim, epochs=36, milestones=(27, 33)),
            ),
        ),
    },
)
