"""Every experiment as plain data: a recipe says all that a run depends on, and is stored with its results.

    dualtoken-vit train NAME [--section.field value ...]

A recipe is a frozen dataclass; the paper's ablations differ from its main rows by `dataclasses.replace` alone.
This file needs the standard library only. `RECIPES` at the end maps names to recipes.
"""

from ast import literal_eval
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

from dualtoken_vit.errors import InputError


@dataclass(frozen=True)
class Model:
    """The network."""

    name: str = "dualtoken_vit_tiny"
    """Any timm model name; DualToken-ViT: dualtoken_vit_{tiny,tiny_mix,small,small_mix}."""
    args: tuple[str, ...] = ()
    """Further arguments of timm.create_model, NAME=VALUE each, for example: token_grid=5 token_mlp=mix."""
    in_chans: Literal[1, 3] = 3
    """Channels of the images the network takes: 3 (RGB) or 1 (grey)."""
    checkpoint: str | None = None
    """Weights to start from: a best.safetensors of this project or any timm checkpoint file."""
    pretrained: bool = False
    """Start from timm's published weights for this name (needs a network, or a filled cache)."""
    drop_path_rate: float = 0.0
    """Stochastic depth: the rate of the last block; the first block has 0, those between lie on a line."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True)
class Data:
    """The images."""

    dataset: str = "folder"
    """folder: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; shapes: drawn by the program; imagenette: fetched by
    torchvision; or a timm data spec: wds/..., hfds/..., tfds/... (with the package that reads it installed)."""
    root: str = ""
    """Folder of the dataset."""
    train_split: str = "train"
    """Name of the training split or folder."""
    val_split: str = "val"
    """Name of the validation split or folder."""
    holdout: float = 0.0
    """Share of each class's training images to validate on instead of the validation split, 0 to 0.5. For tuning
    without a look at the validation images, or where there are none."""
    image_size: int = 224
    """Side of the square that images are resized and cropped to, in pixels."""
    start_size: int | None = None
    """Progressive resizing: side of the training images in the first half of the run; it then grows to image_size,
    which it reaches for the last fifth. None: image_size throughout."""
    crop_pct: float = 0.875
    """In evaluation the short side is resized to image_size / crop_pct and the centre is cropped."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized."""
    unreadable: Literal["stop", "skip"] = "stop"
    """What to do with an image that cannot be read: stop before the first step, or skip and count it."""
    workers: int = 2
    """Processes that read images; 0: read them in the training process."""


@dataclass(frozen=True)
class Augment:
    """What training does to the images (timm's transforms)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the share of the image's area that the random crop keeps."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the random crop's aspect ratio."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; only without auto_augment."""
    auto_augment: str | None = None
    """timm's AutoAugment policy: rand-m9-n2-mstd0.5 is RandAugment (2, 9)."""
    random_erasing: float = 0.0
    """Probability of erasing a random rectangle."""
    mixup: float = 0.0
    """Mixup's alpha; 0: none."""
    cutmix: float = 0.0
    """CutMix's alpha; 0: none. With both, each batch takes one of them."""
    label_smoothing: float = 0.1
    """Share of the target spread over all the classes."""


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule, stepped every batch: linear warm-up, then a cosine, steps or a polynomial."""

    optimizer: str = "adamw"
    """Any of timm's optimisers."""
    lr: float = 1e-3
    """Peak learning rate for batch_size as given (it is not rescaled)."""
    schedule: Literal["cosine", "step", "poly"] = "cosine"
    """From the peak: half a cosine down to min_lr; a tenth after each of the milestones; or (1 - progress) ** 0.9."""
    milestones: tuple[int, ...] = ()
    """Epochs after which schedule step divides the learning rate by ten."""
    min_lr: float = 1e-6
    """Learning rate at the end of a cosine or polynomial."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, in place of warmup_epochs."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all the processes and accumulated batches together."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step; each has batch_size / accumulate images."""
    weight_decay: float = 0.05
    """On weights; not on biases, norms and global tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    clip_grad: float | None = None
    """Largest gradient norm."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one below it, for fine-tuning: 0.65 to 0.9."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights; if given, it is what is validated and kept."""


@dataclass(frozen=True)
class Run:
    """Where and how it runs."""

    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu, mps."""
    devices: int | Literal["auto"] = "auto"
    """Processes on this machine: one a GPU; on the CPU auto is 1."""
    nodes: int = 1
    """Machines; started by torchrun or SLURM."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of the forward and backward pass."""
    compile: bool = False
    """torch.compile the network: faster steps after a slow start."""
    validate_every: int = 1
    """Epochs from one validation to the next; it must divide optim.epochs."""
    save_every: int = 200
    """Steps between two saves of last.ckpt, beside the one at the end of every epoch."""


@dataclass(frozen=True)
class Classification:
    """A classification run."""

    task: ClassVar[str] = "classification"
    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    run: Run = Run()


@dataclass(frozen=True)
class DetectionData:
    """The images and their objects."""

    dataset: Literal["coco", "shapes"] = "coco"
    """coco: images and COCO json files; shapes: drawn by the program, with boxes and masks."""
    images: str = ""
    """Folder of the images that the json files name."""
    val_images: str | None = None
    """Folder of the validation images, if it is another one."""
    train_json: str = ""
    """COCO json with the training images, objects and categories (any ids)."""
    val_json: str = ""
    """COCO json of the validation images."""
    limit: int | None = None
    """Use only the first so many images of each split: to try things out, or to overfit."""
    image_size: int = 800
    """Short side that images are resized to, in pixels."""
    max_size: int = 1333
    """The long side becomes no longer than this, even if the short side stays shorter for it."""
    workers: int = 2
    """Processes that read images; 0: read them in the training process."""


@dataclass(frozen=True)
class DetectionAugment:
    """What training does to the images, boxes and masks."""

    hflip: float = 0.5
    """Probability of a horizontal flip."""
    multi_scale: tuple[int, ...] = ()
    """Short sides, of which training draws one for each image; none: always image_size."""
    photometric: float = 0.0
    """Probability of each change of brightness, contrast, saturation and hue."""


@dataclass(frozen=True)
class Detection:
    """An object detection or instance segmentation run."""

    task: ClassVar[str] = "detection"
    detector: Literal["retinanet", "mask-rcnn"] = "retinanet"
    """retinanet: boxes; mask-rcnn: boxes and masks."""
    roi_samples: int = 512
    """Mask R-CNN: proposals of each image that its heads learn from; fewer take less time and memory."""
    model: Model = Model()
    data: DetectionData = DetectionData()
    augment: DetectionAugment = DetectionAugment()
    optim: Optim = Optim()
    run: Run = Run()


@dataclass(frozen=True)
class SegmentationData:
    """The images and their masks, and how images are looked at in evaluation."""

    dataset: Literal["masks", "shapes"] = "masks"
    """masks: ROOT/images/SPLIT/**/NAME.jpg and ROOT/annotations/SPLIT/**/NAME.png; shapes: drawn by the program."""
    root: str = ""
    """Folder of the dataset."""
    train_split: str = "train"
    """Name of the folders of the training split."""
    val_split: str = "val"
    """Name of the folders of the validation split."""
    classes: str | None = None
    """File with the name of a class a line, in the order of the labels, or with their numbers, NUMBER<TAB>NAME;
    none: ROOT/classes.txt or ROOT/objectInfo150.txt if there is one, else classes are numbered."""
    ignore_index: int = 255
    """Label of the pixels that count for nothing."""
    reduce_zero_label: bool = False
    """Label 0 is no class and counts for nothing; the classes begin at 1 (ADE20K)."""
    limit: int | None = None
    """Use only the first so many images of each split: to try things out, or to overfit."""
    image_size: int | None = None
    """Short side that images are resized to, in pixels; none: they keep their size."""
    crop_size: tuple[int, int] = (512, 512)
    """Height and width of the training images, cut out at random."""
    mode: Literal["whole", "slide"] = "whole"
    """In evaluation: the whole image at once, or windows over it, averaged where they overlap."""
    window: int = 512
    """Side of the windows in pixels."""
    window_stride: int = 341
    """Pixels from one window to the next."""
    scales: tuple[float, ...] = (1.0,)
    """In evaluation: sizes to look at an image in, relative to image_size; probabilities are averaged."""
    flip: bool = False
    """In evaluation: look at the mirror image too."""
    workers: int = 2
    """Processes that read images; 0: read them in the training process."""


@dataclass(frozen=True)
class SegmentationAugment:
    """What training does to the images and masks."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random size, relative to image_size, before the crop."""
    class_cap: float = 0.75
    """A crop of which one class covers more is drawn again, up to ten times."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: float = 0.5
    """Probability of each change of brightness, contrast, saturation and hue."""


@dataclass(frozen=True)
class Segmentation:
    """A semantic segmentation run."""

    task: ClassVar[str] = "segmentation"
    segmenter: Literal["deeplabv3", "pspnet"] = "deeplabv3"
    """The head: atrous pooling, or pyramid pooling."""
    output_stride: Literal[8, 16] | None = None
    """Make the backbone with this stride, where it can be (dilated); none: its last map is resized to stride 8."""
    width: int = 512
    """Channels of the head."""
    dropout: float = 0.1
    """Rate at which channels are left out before the classifiers, in training."""
    class_weights: Literal["equal", "median-frequency", "log"] = "equal"
    """What a pixel counts in the loss, by its class, where f is the class's share of the training pixels: 1; the median
    of all f / f, each f among the images that have the class (SegNet); or 1 / ln(1.02 + f) (ENet)."""
    model: Model = Model()
    data: SegmentationData = SegmentationData()
    augment: SegmentationAugment = SegmentationAugment()
    optim: Optim = Optim()
    run: Run = Run()


Recipe = Classification | Detection | Segmentation
KINDS: dict[str, type[Recipe]] = {kind.task: kind for kind in (Classification, Detection, Segmentation)}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain data, for JSON; `task` says of which kind it is."""
    return {"task": recipe.task, **asdict(recipe)}


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote (JSON's lists become tuples again).

    Raises:
        TypeError: for a kind, section or field that does not exist.
    """
    values = dict(values)
    task = values.pop("task", "classification")  # older files do not say
    if task not in KINDS:
        raise TypeError(f"there is no kind of recipe {task!r}")
    sections = {f.name: type(f.default) for f in fields(KINDS[task]) if is_dataclass(f.default)}
    return KINDS[task](
        **{
            name: sections[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})
            if name in sections
            else value
            for name, value in values.items()
        }
    )


def model_kwargs(model: Model) -> dict[str, Any]:
    """`model.args` as keyword arguments: `token_grid=5` gives the number 5, `token_mlp=mix` the word "mix".

    Raises:
        InputError: for an argument that is not of the form NAME=VALUE.
    """
    kwargs: dict[str, Any] = {}
    for arg in model.args:
        name, equals, value = arg.partition("=")
        if not (name.isidentifier() and equals):
            raise InputError(f"--model.args {arg}: not of the form NAME=VALUE, for example token_grid=5")
        try:
            kwargs[name] = literal_eval(value)
        except (ValueError, SyntaxError):  # a bare word
            kwargs[name] = value
    return kwargs


# The paper's setting on ImageNet-1k (section 4.1). Label smoothing, clipping and the end of the cosine are not
# stated there: smoothing 0.1 is what LightViT and timm's recipes use, the others are off or nearly so.
PAPER = Classification(
    model=Model(name="dualtoken_vit_small", drop_path_rate=0.1),
    augment=Augment(auto_augment="rand-m9-n2-mstd0.5", random_erasing=0.25, mixup=0.2, cutmix=1.0),
    optim=Optim(lr=1e-3, warmup_epochs=20, epochs=300, batch_size=1024, weight_decay=0.04),
    data=Data(workers=8),
)


def _paper(name: str = "dualtoken_vit_small", **args: Any) -> Classification:
    """The paper's setting with one of its networks."""
    return replace(PAPER, model=replace(PAPER.model, name=name, args=tuple(f"{k}={v}" for k, v in args.items())))


SMALL_MIX = "dualtoken_vit_small_mix"

# The paper's setting on COCO (section 4.2). Clipping is not stated; none, as MMDetection's RetinaNet and Mask R-CNN.
COCO = Detection(
    model=Model(name="dualtoken_vit_small", drop_path_rate=0.1),
    optim=Optim(
        lr=1e-4,
        batch_size=16,
        weight_decay=1e-4,
        schedule="step",
        epochs=12,
        milestones=(8, 11),
        warmup_steps=500,
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

# The paper's setting on ADE20K (section 4.3). The schedule is not stated there: 160,000 steps at batch 16 are the
# field's habit (MMSegmentation), which is 127 passes over the 20,210 images, with 1500 steps of warm-up and poly 0.9.
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

# The folder recipe's defaults were chosen on a tenth of Imagenette's training images (REPRODUCTION.md).
FOLDER = Classification(
    data=Data(crop_pct=1.0),
    augment=Augment(scale=(0.35, 1.0)),
    optim=Optim(batch_size=32, warmup_epochs=0.5),
)

# name: (what it is, recipe)
_ALL: dict[str, tuple[str, Recipe]] = {
    "demo": (
        "Shapes drawn by the program: no file, no network, under two minutes on two cores.",
        replace(
            FOLDER,
            model=Model(args=("depths=(1,2,1)",)),  # a shallow one, for the time's sake
            data=replace(FOLDER.data, dataset="shapes", image_size=64),
            augment=replace(FOLDER.augment, scale=(0.7, 1.0)),
            optim=replace(FOLDER.optim, epochs=6),
        ),
    ),
    "folder": ("Your own images: --data.root DIR with train/CLASS/*.jpg and val/CLASS/*.jpg.", FOLDER),
    "imagenette": (
        "Imagenette (10 classes of ImageNet, 160 pixels), fetched by torchvision.",
        replace(FOLDER, data=replace(FOLDER.data, dataset="imagenette", root="data", image_size=128)),
    ),
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
    "demo-detect": (
        "Boxes and masks of shapes drawn by the program: no file, no network.",
        Detection(
            detector="mask-rcnn",
            roi_samples=32,
            model=Model(name="dualtoken_vit_tiny_mix", args=("depths=(1,2,1)",)),
            data=DetectionData(dataset="shapes", image_size=128, max_size=128),
            optim=Optim(lr=5e-4, batch_size=8, epochs=6, warmup_epochs=0.5, clip_grad=10.0),
        ),
    ),
    "coco": (
        "Your own objects in COCO json: --data.images DIR --data.train-json FILE --data.val-json FILE.",
        Detection(
            model=Model(name="dualtoken_vit_small"),
            optim=Optim(lr=2e-4, batch_size=8, epochs=36, clip_grad=10.0),
        ),
    ),
    "coco-retinanet-1x": ("Table 4, RetinaNet 1x with S, from an ImageNet --model.checkpoint: 40.3 AP on COCO.", COCO),
    "coco-mask-rcnn-1x": ("Table 3, Mask R-CNN 1x with S (mix), likewise: 41.1 box and 38.1 mask AP.", COCO_MASK),
    "coco-mask-rcnn-3x": (
        "Table 3, Mask R-CNN 3x with S (mix), likewise, multi-scale: 43.7 box and 39.9 mask AP.",
        replace(
            COCO_MASK,
            augment=DetectionAugment(multi_scale=tuple(range(480, 801, 32))),
            optim=replace(COCO_MASK.optim, epochs=36, milestones=(27, 33)),
        ),
    ),
    "demo-segment": (
        "Every pixel of shapes drawn by the program: no file, no network.",
        Segmentation(
            width=64,
            model=Model(name="dualtoken_vit_tiny_mix", args=("depths=(1,2,1)",)),
            data=SegmentationData(dataset="shapes", crop_size=(128, 128)),
            augment=SegmentationAugment(scale=(0.8, 1.25), class_cap=1.0),
            optim=Optim(lr=1e-3, batch_size=16, schedule="poly", epochs=6, warmup_epochs=0.5),
        ),
    ),
    "masks": (
        "Your own masks: --data.root DIR with images/{train,val}/*.jpg and annotations/{train,val}/*.png.",
        Segmentation(optim=Optim(lr=5e-4, batch_size=8, schedule="poly", epochs=100, weight_decay=1e-2)),
    ),
    "ade20k-deeplabv3": (
        "Section 4.3, DeepLabv3 with S, from an ImageNet --model.checkpoint: 39.0 mIoU.",
        ADE20K,
    ),
    "ade20k-pspnet": (
        "Section 4.3, PSPNet with S, likewise: 38.8 mIoU.",
        replace(ADE20K, segmenter="pspnet"),
    ),
}
RECIPES = {name: recipe for name, (_, recipe) in _ALL.items()}
ABOUT = {name: about for name, (about, _) in _ALL.items()}
