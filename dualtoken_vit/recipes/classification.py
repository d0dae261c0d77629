"""Recipes of image classification, the paper's Tables 2 and 6 to 9 among them."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from dualtoken_vit.bounds import ASCENDING
from dualtoken_vit.recipes.base import FREE, Count, Model, Optim, Range, Recipe, Run, Share, Side, SplitData, register


@dataclass(frozen=True)
class ClassificationInput:
    """How images are prepared in evaluation and prediction."""

    image_size: Annotated[int, Side] = 224
    """Side of the square input, in pixels."""
    crop_pct: Annotated[float, Interval(ge=0.01, le=1)] = 0.875
    """Evaluation resizes the short side to image_size / crop_pct and crops the centre."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of resizing."""


@dataclass(frozen=True)
class ClassificationData(ClassificationInput, SplitData):
    """The images."""

    contents: ClassVar[str] = "train/CLASS/*.jpg and val/CLASS/*.jpg"
    contents_without_splits: ClassVar[str] = "CLASS/*.jpg or train/CLASS/*.jpg"
    one_table: ClassVar[bool] = True
    dataset: str = "folder"
    """folder: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, with holdout also ROOT/CLASS/*.jpg, or a CSV or Parquet
    table of files and classes in ROOT; shapes: generated images; imagenette: downloaded by torchvision; or a timm
    dataset: wds/..., hfds/..., tfds/... (install the package that reads it)."""
    root: Annotated[str, FREE] = ""
    """Dataset folder, or one table."""
    holdout: Annotated[float, Interval(ge=0, le=0.5)] = 0.0
    """Fraction of each class's training images to validate on instead of the validation split. Use it for tuning, or
    where there is no validation split."""
    fold: Annotated[int, Interval(ge=0, le=1000)] = 0
    """Which share to hold out, from 0 to 1 / holdout - 1: together they are all training images (cross-validation)."""
    per_class: Annotated[int | None, Count] = None
    """Use at most this many training images of each class, the same in every run: shows how many are needed."""
    balanced: Share = 0.0
    """Class-balanced sampling: an epoch draws as many images as there are, n ** (1 - balanced) of a class of n images,
    up to a common factor. 0: every image once; 1: all classes equally often."""
    exclude: tuple[str, ...] = ()
    """Classes to leave out of training and validation."""
    start_size: Annotated[int | None, Side] = None
    """Progressive resizing: side of the training images in the first half of the run. It then grows, and reaches
    image_size for the last fifth of the run, or its last epoch. None: always image_size."""
    unreadable: Literal["stop", "skip"] = "stop"
    """Unreadable images: stop before the first step, or skip and report them."""

    @property
    def skip(self) -> bool:
        return self.unreadable == "skip"


@dataclass(frozen=True)
class ImageAugment:
    """What classification and multi-label classification share."""

    scale: Annotated[Range, Interval(gt=0, le=1), ASCENDING] = (0.08, 1.0)
    """Area of the random crop, as a fraction of the image: lowest and highest."""
    ratio: Annotated[Range, Interval(ge=0.01, le=100), ASCENDING] = (0.75, 4 / 3)
    """Aspect ratio of the random crop: lowest and highest."""
    vflip: Share = 0.0
    """Probability of a vertical flip."""
    color_jitter: Annotated[float, Interval(ge=0, le=10)] = 0.0
    """Strength of brightness, contrast and saturation jitter; not used with auto_augment."""
    auto_augment: str | None = None
    """timm's AutoAugment policy, for example rand-m9-n2-mstd0.5, which is RandAugment (2, 9)."""
    random_erasing: Share = 0.0
    """Probability of erasing a random rectangle."""


@dataclass(frozen=True)
class ClassificationAugment(ImageAugment):
    """Training augmentation (timm's transforms)."""

    hflip: Annotated[float | Literal["alternate"], Interval(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip. alternate: half of the images, chosen at random, in the first epoch, the others
    in the second, and so on (arXiv 2404.00498); useful in short runs."""
    mixup: Annotated[float, Interval(ge=0, le=100)] = 0.0
    """Mixup alpha; 0: off."""
    cutmix: Annotated[float, Interval(ge=0, le=100)] = 0.0
    """CutMix alpha; 0: off. With both, each batch uses one of them at random."""
    label_smoothing: Share = 0.1
    """Label smoothing."""


@dataclass(frozen=True)
class Distill:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531): the network imitates the logits of a trained teacher.

    The loss is weight * temperature ** 2 * KL(teacher || network) + (1 - weight) * cross-entropy, where the KL
    divergence is between the softmax outputs of logits / temperature.
    """

    teacher: Annotated[str | None, FREE] = None
    """A best.safetensors, or a timm model name with pretrained weights (ImageNet teachers: classes are named by WordNet
    ID, n01440764). It must know all classes of the data, and sees the augmented images. None: no distillation."""
    weight: Share = 0.9
    """Weight of the teacher in the loss."""
    temperature: Annotated[float, Interval(ge=0.01, le=1000)] = 4.0
    """Temperature of both softmax outputs."""


@dataclass(frozen=True)
class Classification(Recipe):
    """An image classification run."""

    task: ClassVar[str] = "classification"
    class_weights: Literal["equal", "inverse", "effective"] = "equal"
    """Loss weight of a class of n images, up to a factor: 1, 1 / n or 1 / (1 - 0.999 ** n) (arXiv 1901.05555).
    Not with data.balanced."""
    data: ClassificationData = ClassificationData()
    augment: ClassificationAugment = ClassificationAugment()
    distill: Distill = Distill()


# The paper's settings on ImageNet-1k (section 4.1) equal those of LightViT's published training config,
# configs/strategies/lightvit/config.yaml of hunto/image_classification_sota. It supplies what the paper leaves open:
# min_lr 1e-6, label smoothing 0.1, no clipping, and for "RandAug (2, 9)" the policy rand-m9-mstd0.5, of two operations.
# Unlike DeiT's policy it has no -inc1, so this one has none: some operations, such as Solarize, get weaker as the
# magnitude grows. Distort, Zoom, Blur and Skew, which that config also draws from, are not in timm.
PAPER = Classification(
    model=Model(name="dualtoken_vit_small", drop_path_rate=0.1),
    augment=ClassificationAugment(auto_augment="rand-m9-n2-mstd0.5", random_erasing=0.25, mixup=0.2, cutmix=1.0),
    optim=Optim(lr=1e-3, warmup_epochs=20, epochs=300, batch_size=1024, weight_decay=0.04),
    data=ClassificationData(workers=8),
)


def _paper(name: str = "dualtoken_vit_small", **args: Any) -> Classification:
    """The paper's settings with one of its networks."""
    return replace(PAPER, model=replace(PAPER.model, name=name, args=tuple(f"{k}={v}" for k, v in args.items())))


SMALL_MIX = "dualtoken_vit_small_mix"

# Tuned on a held-out tenth of Imagenette's training images (REPRODUCTION.md).
FOLDER = Classification(
    model=Model(name="dualtoken_vit_tiny_mix", pretrained="auto"),
    data=ClassificationData(crop_pct=1.0),
    augment=ClassificationAugment(scale=(0.35, 1.0)),
    optim=Optim(optimizer="muon", lr=2e-3, schedule="flat-cosine", batch_size=32, warmup_epochs=0.5),
)
ADAMW = Optim(batch_size=32, warmup_epochs=0.5)  # from scratch, in one or two minutes

# Tiny-ImageNet-200 without ten everyday classes, which are new to the trained network. Optimiser and schedule are those
# that were best on a held-out tenth of Imagenette; 64 pixels are the size of the images.
TIN190 = Classification(
    model=Model(name="dualtoken_vit_tiny_mix", drop_path_rate=0.05),
    data=ClassificationData(
        root="tiny-imagenet-200",
        image_size=96,
        start_size=64,
        crop_pct=1.0,
        exclude=(
            *("n01443537", "n02056570", "n02123045", "n02165456", "n02279972"),
            *("n02504458", "n02814860", "n04146614", "n04285008", "n07753592"),
        ),
    ),
    augment=ClassificationAugment(scale=(0.35, 1.0), hflip="alternate"),
    optim=Optim(optimizer="muon", lr=4e-3, schedule="flat-cosine", epochs=20, batch_size=128, clip_grad=1.0),
    run=Run(precision="bf16-mixed"),
)

register(
    Classification,
    {
        "demo": (
            "Classify generated shapes: under two minutes, no files.",
            replace(
                FOLDER,
                model=Model(args=("depths=(1,2,1)",)),  # shallow, to be fast
                data=replace(FOLDER.data, dataset="shapes", image_size=64),
                augment=replace(FOLDER.augment, scale=(0.7, 1.0)),
                optim=replace(ADAMW, epochs=6),
            ),
        ),
        "folder": ("Classify your own images: ROOT/{train,val}/CLASS/*.jpg.", FOLDER),
        "imagenette": (
            "Imagenette (10 classes of ImageNet), downloaded.",
            replace(FOLDER, data=replace(FOLDER.data, dataset="imagenette", root="data", image_size=128)),
        ),
        "tin190": ("Tiny-ImageNet, 190 classes: ROOT/{train,val}/WNID/*.JPEG.", TIN190),
        "in1k-tiny-mix": ("Table 2, DualToken-ViT-T (mix): 75.4 % on ImageNet-1k.", _paper("dualtoken_vit_tiny_mix")),
        "in1k-small-mix": ("Table 2, DualToken-ViT-S (mix): 79.4 % on ImageNet-1k.", _paper(SMALL_MIX)),
        "in1k-small": ("Table 2, DualToken-ViT-S: 79.5 % on ImageNet-1k.", _paper()),
        "table6-normal": ("Table 6, normal global tokens: 79.2 %.", _paper(global_tokens="normal")),
        "table6-normal-star": ("Table 6, normal* global tokens: 79.0 %.", _paper(global_tokens="normal_star")),
        "table6-position": ("Table 6, position-aware global tokens: 79.5 %.", _paper()),
        "table7-grid-0": ("Table 7, no global tokens: 79.2 %.", _paper(token_grid=0)),
        "table7-grid-3": ("Table 7, 3x3 global tokens: 79.1 %.", _paper(token_grid=3)),
        "table7-grid-4": ("Table 7, 4x4 global tokens: 79.2 %.", _paper(token_grid=4)),
        "table7-grid-5": ("Table 7, 5x5 global tokens: 79.4 %.", _paper(token_grid=5)),
        "table7-grid-6": ("Table 7, 6x6 global tokens: 79.3 %.", _paper(token_grid=6)),
        "table7-grid-7": ("Table 7, 7x7 global tokens: 79.5 %.", _paper()),
        "table7-grid-8": ("Table 7, 8x8 global tokens: 79.3 %.", _paper(token_grid=8)),
        "table8-window": ("Table 8, window self-attention: 78.6 %.", _paper(SMALL_MIX, local_attention="window")),
        "table8-conv": ("Table 8, Conv Encoder: 79.4 %.", _paper(SMALL_MIX)),
        "table9-onestep": ("Table 9, one-step downsampling: 79.2 %.", _paper(SMALL_MIX, downsampling="onestep")),
        "table9-stepwise": ("Table 9, step-wise downsampling: 79.4 %.", _paper(SMALL_MIX)),
    },
)
