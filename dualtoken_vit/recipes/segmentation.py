"""Recipes of semantic segmentation, those of the paper's section 4.3 among them."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from dualtoken_vit.bounds import ASCENDING
from dualtoken_vit.recipes.base import FREE, Count, Model, Optim, Range, Recipe, Share, Side, SplitData, register


@dataclass(frozen=True)
class SegmentationInput:
    """How images are prepared in evaluation and prediction."""

    image_size: Annotated[int | None, Side] = None
    """Short side of the resized images, in pixels. None: original size."""
    mode: Literal["whole", "slide"] = "whole"
    """Evaluation on whole images, or on overlapping windows whose predictions are averaged."""
    window: Annotated[int, Interval(ge=32, le=16384)] = 512
    """Side of the windows, in pixels."""
    window_stride: Annotated[int, Side] = 341
    """Stride of the windows, in pixels."""
    scales: Annotated[tuple[float, ...], Interval(ge=0.1, le=10)] = (1.0,)
    """Multi-scale evaluation: sizes relative to image_size, whose probabilities are averaged."""
    flip: bool = False
    """Average with the prediction for the flipped image."""


@dataclass(frozen=True)
class SegmentationData(SegmentationInput, SplitData):
    """The images and their masks."""

    contents: ClassVar[str] = "images/train, annotations/train, ..."
    dataset: str = "masks"
    """masks: images and labels in files; shapes: generated images."""
    format: str = "auto"
    """Format of the labels. masks: ROOT/images/SPLIT/**/NAME.jpg and ROOT/annotations/SPLIT/**/NAME.png, or the layout
    of Pascal VOC; coco, yolo, voc, labelme: polygons or masks of objects, drawn on a class background; auto: detect it.
    """
    classes: Annotated[str | None, FREE] = None
    """File of class names, one per line in label order, or as LABEL<TAB>NAME; for coloured masks, as NAME,R,G,B. None:
    ROOT/classes.txt, objectInfo150.txt, labelmap.txt or class_dict.csv if it exists, otherwise the label numbers."""
    ignore_index: Annotated[int, Interval(ge=0, le=65535)] = 255
    """Label of ignored pixels."""
    reduce_zero_label: bool = False
    """Ignore label 0; classes start at label 1 (ADE20K)."""
    limit: Annotated[int | None, Count] = None
    """Use only the first images of each split, for a quick test or to overfit on purpose."""
    crop_size: Annotated[tuple[int, int], Interval(ge=32, le=16384)] = (512, 512)
    """Height and width of the random training crop, in pixels."""


@dataclass(frozen=True)
class SegmentationAugment:
    """Training augmentation of images and masks."""

    scale: Annotated[Range, Interval(ge=1e-3, le=100), ASCENDING] = (0.5, 2.0)
    """Random resize before the crop, relative to image_size: lowest and highest."""
    class_cap: Annotated[float, Interval(ge=1e-3, le=1)] = 0.75
    """Maximum fraction of one class in a crop; other crops are drawn again, up to ten times."""
    hflip: Share = 0.5
    """Probability of a horizontal flip."""
    photometric: Share = 0.5
    """Probability of each of the changes in brightness, contrast, saturation and hue."""


@dataclass(frozen=True)
class Segmentation(Recipe):
    """A semantic segmentation run."""

    task: ClassVar[str] = "segmentation"
    segmenter: Literal["deeplabv3", "pspnet", "lraspp"] = "deeplabv3"
    """Head: deeplabv3 (atrous spatial pyramid pooling), pspnet (pyramid pooling) or lraspp (light)."""
    output_stride: Literal[8, 16] | None = None
    """Dilate the backbone to this stride, if it can be dilated. None: resize its last feature map to stride 8; lraspp
    takes it as it is."""
    width: Annotated[int | None, Interval(ge=1, le=65536)] = None
    """Channels of the head. None: 512, or 128 for lraspp."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Channel dropout before the classifiers."""
    class_weights: Literal["equal", "median-frequency", "log"] = "equal"
    """Loss weight of a class whose share of the training pixels is f. equal: 1; median-frequency: median of all f / f,
    with f taken over the images that contain the class (SegNet); log: 1 / ln(1.02 + f) (ENet)."""
    data: SegmentationData = SegmentationData()
    augment: SegmentationAugment = SegmentationAugment()


# The paper's settings on ADE20K (section 4.3). It does not state the schedule: this is the length of MMSegmentation's
# usual one (160,000 steps of 16 images are 127 epochs of 20,210 images), with its 1,500 warm-up steps and power 0.9.
ADE20K = Segmentation(
    model=Model(name="dualtoken_vit_small", drop_path_rate=0.1),
    data=SegmentationData(
        root="ADEChallengeData2016",
        train_split="training",
        val_split="validation",
        reduce_zero_label=True,
        image_size=512,
        workers=8,
    ),
    optim=Optim(lr=2e-4, weight_decay=1e-4, batch_size=32, schedule="poly", min_lr=0.0, epochs=127, warmup_steps=1500),
)

register(
    Segmentation,
    {
        "demo-segment": (
            "Segment images of generated shapes: no files.",
            Segmentation(
                width=64,
                model=Model(name="dualtoken_vit_tiny_mix", args=("depths=(1,2,1)",)),
                data=SegmentationData(dataset="shapes", crop_size=(128, 128)),
                augment=SegmentationAugment(scale=(0.8, 1.25), class_cap=1.0),
                optim=Optim(lr=1e-3, batch_size=16, schedule="poly", epochs=6, warmup_epochs=0.5),
            ),
        ),
        "masks": (
            "Segment your images: ROOT/{images,annotations}/{train,val}.",
            Segmentation(
                model=Model(name="dualtoken_vit_tiny_mix", pretrained="auto"),
                optim=Optim(lr=5e-4, batch_size=8, schedule="poly", epochs=100, weight_decay=1e-2),
            ),
        ),
        "masks-lite": (
            "The same, light: LR-ASPP over T (mix).",
            Segmentation(
                segmenter="lraspp",
                model=Model(name="dualtoken_vit_tiny_mix", pretrained="auto"),
                data=SegmentationData(crop_size=(320, 320)),
                optim=Optim(lr=1e-3, batch_size=8, schedule="poly", epochs=100, weight_decay=1e-2),
            ),
        ),
        "ade20k-deeplabv3": ("Section 4.3, DeepLabv3 with a pretrained S: 39.0 mIoU.", ADE20K),
        "ade20k-pspnet": ("Section 4.3, PSPNet with a pretrained S: 38.8 mIoU.", replace(ADE20K, segmenter="pspnet")),
    },
)
