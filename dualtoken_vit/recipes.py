"""Every experiment as plain data: a recipe holds all settings of a run and is stored with its results.

    dualtoken-vit train NAME [--section.field value ...]

A recipe is a frozen dataclass; the paper's ablations differ from its main rows by `dataclasses.replace` alone. Field
docstrings are the command line's help, and bounds stand on the fields. `register` adds a kind of recipe and its named
recipes; those of this package are at the end.
"""

from ast import literal_eval
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from annotated_types import Interval

from dualtoken_vit.bounds import ASCENDING, build
from dualtoken_vit.errors import InputError

FREE = "may differ when a run is resumed"  # metadata of fields that say where a run reads its data or runs
Device = Literal["auto", "cpu", "cuda", "mps"]
Share = Annotated[float, Interval(ge=0, le=1)]
Range = tuple[float, float]
Side = Interval(ge=1, le=16384)  # pixels
Epochs = Interval(ge=1, le=100_000)
Count = Interval(ge=1, le=1_000_000_000)  # images or steps


@dataclass(frozen=True)
class Model:
    """The network."""

    name: str = "dualtoken_vit_tiny"
    """Any timm model name; DualToken-ViT: dualtoken_vit_{tiny,tiny_mix,small,small_mix}."""
    args: tuple[str, ...] = ()
    """Further arguments of timm.create_model, each NAME=VALUE, for example: token_grid=5 token_mlp=mix."""
    in_chans: Literal[1, 3] = 3
    """Input channels: 3 (RGB) or 1 (grayscale)."""
    checkpoint: str | None = None
    """Initial weights: a best.safetensors of this project or any timm checkpoint file."""
    pretrained: bool | Literal["auto"] = False
    """true: start from the pretrained weights of this name, this package's or timm's, which timm downloads; auto: from
    this package's weights, if it has them for this network."""
    drop_path_rate: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block; the rate increases linearly from 0 in the first block."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True)
class DataSection:
    """The data fields of every task."""

    dataset: str = ""
    """Format of the dataset."""
    verify: bool = True
    """Read every image before a new run. Turn it off for large datasets that are known to be intact."""
    workers: Annotated[int, Interval(ge=0, le=1024), FREE] = 2
    """Data loading processes; 0: load in the training process."""

    @property
    def skip(self) -> bool:
        """Whether unreadable images are left out."""
        return False


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
class ClassificationData(ClassificationInput, DataSection):
    """The images."""

    dataset: str = "folder"
    """folder: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; shapes: generated images; imagenette: downloaded by
    torchvision; or a timm dataset: wds/..., hfds/..., tfds/... (install the package that reads it)."""
    root: Annotated[str, FREE] = ""
    """Dataset folder."""
    train_split: str = "train"
    """Name of the training split or folder."""
    val_split: str = "val"
    """Name of the validation split or folder."""
    holdout: Annotated[float, Interval(ge=0, le=0.5)] = 0.0
    """Fraction of each class's training images to validate on instead of the validation split. Use it for tuning, or
    where there is no validation split."""
    balanced: Share = 0.0
    """Class-balanced sampling: an epoch draws as many images as there are, n ** (1 - balanced) of a class of n images,
    up to a common factor. 0: every image once; 1: all classes equally often."""
    exclude: tuple[str, ...] = ()
    """Classes to leave out of training and validation."""
    start_size: Annotated[int | None, Side] = None
    """Progressive resizing: side of the training images in the first half of the run. It then grows, and reaches
    image_size for the last fifth. None: always image_size."""
    unreadable: Literal["stop", "skip"] = "stop"
    """Unreadable images: stop before the first step, or skip and report them."""

    @property
    def skip(self) -> bool:
        return self.unreadable == "skip"


@dataclass(frozen=True)
class ClassificationAugment:
    """Training augmentation (timm's transforms)."""

    scale: Annotated[Range, Interval(gt=0, le=1), ASCENDING] = (0.08, 1.0)
    """Area of the random crop, as a fraction of the image: lowest and highest."""
    ratio: Annotated[Range, Interval(ge=0.01, le=100), ASCENDING] = (0.75, 4 / 3)
    """Aspect ratio of the random crop: lowest and highest."""
    hflip: Annotated[float | Literal["alternate"], Interval(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip. alternate: half of the images, chosen at random, in the first epoch, the others
    in the second, and so on (arXiv 2404.00498); useful in short runs."""
    vflip: Share = 0.0
    """Probability of a vertical flip."""
    color_jitter: Annotated[float, Interval(ge=0, le=10)] = 0.0
    """Strength of brightness, contrast and saturation jitter; not used with auto_augment."""
    auto_augment: str | None = None
    """timm's AutoAugment policy, for example rand-m9-n2-mstd0.5, which is RandAugment (2, 9)."""
    random_erasing: Share = 0.0
    """Probability of erasing a random rectangle."""
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
class Optim:
    """Optimiser and learning rate schedule, which is updated at every step and starts with a linear warm-up."""

    optimizer: str = "adamw"
    """Name of a timm optimiser. The muon family leaves tokens, biases, norms, first convolution and classifier to AdamW
    (nmuon and nadamuon: NAdamW)."""
    lr: Annotated[float, Interval(ge=1e-12, le=1000)] = 1e-3
    """Peak learning rate; it is not scaled with batch_size."""
    schedule: Literal["cosine", "flat-cosine", "step", "poly"] = "cosine"
    """cosine: decay to min_lr; flat-cosine: the same in the last quarter of the run, flat before; step: divide by 10 at
    each milestone; poly: decay to min_lr with power 0.9."""
    milestones: Annotated[tuple[int, ...], Epochs] = ()
    """Epochs after which schedule step divides the learning rate by 10."""
    min_lr: Annotated[float, Interval(ge=0, le=1000)] = 1e-6
    """Final learning rate of schedules cosine, flat-cosine and poly."""
    warmup_epochs: Annotated[float, Interval(ge=0, le=100_000)] = 1.0
    """Epochs of linear warm-up."""
    warmup_steps: Annotated[int | None, Interval(ge=0, le=1_000_000_000)] = None
    """Steps of linear warm-up, instead of warmup_epochs."""
    epochs: Annotated[int, Epochs] = 30
    """Training epochs."""
    batch_size: Annotated[int, Interval(ge=1, le=1_000_000)] = 64
    """Images per optimiser step, over all processes and accumulated batches."""
    accumulate: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """Gradient accumulation: batches per optimiser step, each of batch_size / accumulate images."""
    weight_decay: Annotated[float, Interval(ge=0, le=100)] = 0.05
    """Weight decay; biases, normalisation layers and global tokens have none."""
    betas: Annotated[Range, Interval(ge=0, lt=1)] = (0.9, 0.999)
    """Adam's betas."""
    clip_grad: Annotated[float | None, Interval(ge=1e-12, le=1e12)] = None
    """Maximum gradient norm. None: no clipping."""
    layer_decay: Annotated[float | None, Interval(ge=1e-12, le=1)] = None
    """Layer-wise learning rate decay for fine-tuning, typically 0.65 to 0.9."""
    ema_decay: Annotated[float | None, Interval(ge=0, le=1)] = None
    """Decay of the exponential moving average of the weights. With it, the average is validated and saved. The decay
    starts low: it reaches 0.99 after 1,000 steps and 0.999 after 31,600 at the earliest."""


@dataclass(frozen=True)
class Run:
    """Hardware, precision and frequencies."""

    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """Seed of initialisation, data order, augmentation and dropout."""
    device: Annotated[Device, FREE] = "auto"
    """auto: an accelerator if there is one, else the CPU."""
    devices: Annotated[int | Literal["auto"], Interval(ge=1, le=1024), FREE] = "auto"
    """Processes on each machine, one per GPU; auto: all GPUs, or one process on the CPU."""
    nodes: Annotated[int, Interval(ge=1, le=100_000), FREE] = 1
    """Machines, started by torchrun or SLURM."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the forward and backward pass."""
    compile: bool = False
    """Compile the network with torch.compile: a slow start, then faster steps."""
    validate_every: Annotated[int, Epochs] = 1
    """Epochs between validations; must divide optim.epochs."""
    threads: Annotated[int | None, Interval(ge=1, le=1024), FREE] = None
    """CPU threads of each process. None: OMP_NUM_THREADS if it is set, else the cores, shared by the processes. Next to
    other jobs, give 1."""
    max_minutes: Annotated[float | None, Interval(gt=0, le=1e6)] = None
    """Approximate duration of the run: times the first steps, then sets optim.epochs to the number that fits."""
    patience: Annotated[int | None, Epochs, FREE] = None
    """Stop after this many validations in a row without a better epoch."""
    save_every: Annotated[int, Count, FREE] = 200
    """Steps between saves of last.ckpt, which is also saved after every epoch."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. A kind of recipe, one per task, derives from it and narrows the type of `data`."""

    task: ClassVar[str]
    """Name of the task."""
    model: Model = Model()
    data: DataSection = DataSection()
    optim: Optim = Optim()
    run: Run = Run()


@dataclass(frozen=True)
class Classification(Recipe):
    """An image classification run."""

    task: ClassVar[str] = "classification"
    class_weights: Literal["equal", "inverse", "effective"] = "equal"
    """Loss weight of a class of n training images, up to a common factor. equal: 1; inverse: 1 / n; effective:
    1 / (1 - 0.999 ** n) (arXiv 1901.05555). An alternative to data.balanced."""
    data: ClassificationData = ClassificationData()
    augment: ClassificationAugment = ClassificationAugment()
    distill: Distill = Distill()


@dataclass(frozen=True)
class DetectionInput:
    """How images are prepared in evaluation and prediction."""

    image_size: Annotated[int, Side] = 800
    """Short side of the resized images, in pixels."""
    max_size: Annotated[int, Side] = 1333
    """Maximum long side, in pixels; it takes precedence over image_size."""


@dataclass(frozen=True)
class DetectionData(DetectionInput, DataSection):
    """The images and their objects."""

    dataset: str = "coco"
    """coco: images and COCO json files; shapes: generated images with boxes and masks."""
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


@dataclass(frozen=True)
class DetectionAugment:
    """Training augmentation of images, boxes and masks."""

    hflip: Share = 0.5
    """Probability of a horizontal flip."""
    multi_scale: Annotated[tuple[int, ...], Side] = ()
    """Short sides to choose from at random for each training image; empty: always image_size."""
    photometric: Share = 0.0
    """Probability of each of the changes in brightness, contrast, saturation and hue."""


@dataclass(frozen=True)
class Detection(Recipe):
    """An object detection or instance segmentation run."""

    task: ClassVar[str] = "detection"
    detector: Literal["retinanet", "mask-rcnn"] = "retinanet"
    """retinanet: boxes; mask-rcnn: boxes and masks."""
    roi_samples: Annotated[int, Interval(ge=4, le=100_000)] = 512
    """Mask R-CNN: proposals sampled per image to train its heads; fewer need less time and memory."""
    data: DetectionData = DetectionData()
    augment: DetectionAugment = DetectionAugment()


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
class SegmentationData(SegmentationInput, DataSection):
    """The images and their masks."""

    dataset: str = "masks"
    """masks: ROOT/images/SPLIT/**/NAME.jpg and ROOT/annotations/SPLIT/**/NAME.png; shapes: generated images."""
    root: Annotated[str, FREE] = ""
    """Dataset folder."""
    train_split: str = "train"
    """Folder name of the training split."""
    val_split: str = "val"
    """Folder name of the validation split."""
    classes: Annotated[str | None, FREE] = None
    """File of class names, one per line in label order, or as LABEL<TAB>NAME. None: ROOT/classes.txt or
    ROOT/objectInfo150.txt if it exists, otherwise the label numbers."""
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
    segmenter: Literal["deeplabv3", "pspnet"] = "deeplabv3"
    """Head: deeplabv3 (atrous spatial pyramid pooling) or pspnet (pyramid pooling)."""
    output_stride: Literal[8, 16] | None = None
    """Dilate the backbone to this stride, if it can be dilated. None: resize its last feature map to stride 8."""
    width: Annotated[int, Interval(ge=1, le=65536)] = 512
    """Channels of the head."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Channel dropout before the classifiers."""
    class_weights: Literal["equal", "median-frequency", "log"] = "equal"
    """Loss weight of a class whose share of the training pixels is f. equal: 1; median-frequency: median of all f / f,
    with f taken over the images that contain the class (SegNet); log: 1 / ln(1.02 + f) (ENet)."""
    data: SegmentationData = SegmentationData()
    augment: SegmentationAugment = SegmentationAugment()


KINDS: dict[str, type[Recipe]] = {}  # recipe classes by task
RECIPES: dict[str, Recipe] = {}  # recipes by name
ABOUT: dict[str, str] = {}  # one line about each recipe

R = TypeVar("R", bound=Recipe)


def register(kind: type[R], recipes: Mapping[str, tuple[str, R]]) -> None:
    """Add a task's recipe class and its named recipes, each with one line about it, to `KINDS`, `RECIPES`, `ABOUT`.

    Raises:
        ValueError: for a recipe name that is in use.
    """
    if taken := RECIPES.keys() & recipes:
        raise ValueError(f"recipes {sorted(taken)} are already registered")
    KINDS[kind.task] = kind
    for name, (about, recipe) in recipes.items():
        RECIPES[name], ABOUT[name] = recipe, about


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested plain data for JSON; `task` names its kind."""
    return {"task": recipe.task, **asdict(recipe)}


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` converted. Missing fields take their defaults; JSON lists become tuples.

    Raises:
        TypeError: for an unknown task or field, or a value of the wrong type. Bounds are not checked.
    """
    values = dict(values)
    task = values.pop("task", "classification")  # recipes of early versions lack it
    if task not in KINDS:
        raise TypeError(f"unknown task {task!r}")
    run = values.get("run")
    if isinstance(run, dict) and "accelerator" in run:  # the device's name in early versions
        device = {"gpu": "cuda"}.get(run["accelerator"], run["accelerator"])
        values["run"] = {key: value for key, value in run.items() if key != "accelerator"} | {"device": device}
    return build(KINDS[task], values)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """A recipe as one flat dictionary with keys "section.field"."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(recipe).items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def free_on_resume(kind: type[Recipe]) -> set[str]:
    """The "section.field" names that may differ when a run of this kind is resumed."""
    return {
        f"{section}.{name}"
        for section, cls in get_type_hints(kind).items()
        if is_dataclass(cls)
        for name, hint in get_type_hints(cls, include_extras=True).items()
        if FREE in getattr(hint, "__metadata__", ())
    }


def model_kwargs(model: Model) -> dict[str, Any]:
    """`model.args` as keyword arguments (token_grid=5 a number, token_mlp=mix a string), or an InputError."""
    kwargs: dict[str, Any] = {}
    for arg in model.args:
        name, equals, value = arg.partition("=")
        if not (name.isidentifier() and equals):
            raise InputError(f"--model.args {arg}: not of the form NAME=VALUE, for example token_grid=5")
        try:
            kwargs[name] = literal_eval(value)
        except (ValueError, SyntaxError):  # an unquoted string
            kwargs[name] = value
    return kwargs


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

# Tuned on a held-out tenth of Imagenette's training images (REPRODUCTION.md).
FOLDER = Classification(
    model=Model(pretrained="auto"),
    data=ClassificationData(crop_pct=1.0),
    augment=ClassificationAugment(scale=(0.35, 1.0)),
    optim=Optim(batch_size=32, warmup_epochs=0.5),
)

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
    augment=ClassificationAugment(scale=(0.25, 1.0), hflip="alternate"),
    optim=Optim(optimizer="muon", lr=4e-3, schedule="flat-cosine", epochs=24, batch_size=128, clip_grad=1.0),
    run=Run(precision="bf16-mixed"),
)

register(
    Classification,
    {
        "demo": (
            "Classify generated shapes: no files, no downloads, under two minutes on two CPU cores.",
            replace(
                FOLDER,
                model=Model(args=("depths=(1,2,1)",)),  # shallow, to be fast
                data=replace(FOLDER.data, dataset="shapes", image_size=64),
                augment=replace(FOLDER.augment, scale=(0.7, 1.0)),
                optim=replace(FOLDER.optim, epochs=6),
            ),
        ),
        "folder": ("Classify your own images: --data.root DIR with train/CLASS/*.jpg and val/CLASS/*.jpg.", FOLDER),
        "imagenette": (
            "Imagenette (10 classes of ImageNet, 160 pixels), downloaded by torchvision.",
            replace(FOLDER, data=replace(FOLDER.data, dataset="imagenette", root="data", image_size=128)),
        ),
        "tin190": (
            "Pretrain on 190 classes of Tiny-ImageNet: --data.root DIR with train/WNID/*.JPEG and val/WNID/*.JPEG.",
            TIN190,
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
    },
)

register(
    Detection,
    {
        "demo-detect": (
            "Detect generated shapes, with boxes and masks: no files, no downloads.",
            Detection(
                detector="mask-rcnn",
                roi_samples=32,
                model=Model(name="dualtoken_vit_tiny_mix", args=("depths=(1,2,1)",)),
                data=DetectionData(dataset="shapes", image_size=128, max_size=128),
                optim=Optim(lr=5e-4, batch_size=8, epochs=6, warmup_epochs=0.5, clip_grad=10.0),
            ),
        ),
        "coco": (
            "Detect your own objects: --data.images DIR --data.train-json FILE --data.val-json FILE.",
            Detection(
                model=Model(name="dualtoken_vit_small", pretrained="auto"),
                optim=Optim(lr=2e-4, batch_size=8, epochs=36, clip_grad=10.0),
            ),
        ),
        "coco-retinanet-1x": ("Table 4, RetinaNet 1x with S, from an ImageNet --model.checkpoint: 40.3 AP.", COCO),
        "coco-mask-rcnn-1x": ("Table 3, Mask R-CNN 1x with S (mix), likewise: 41.1 box AP, 38.1 mask AP.", COCO_MASK),
        "coco-mask-rcnn-3x": (
            "Table 3, Mask R-CNN 3x with S (mix), likewise, multi-scale: 43.7 box AP, 39.9 mask AP.",
            replace(
                COCO_MASK,
                augment=DetectionAugment(multi_scale=tuple(range(480, 801, 32))),
                optim=replace(COCO_MASK.optim, epochs=36, milestones=(27, 33)),
            ),
        ),
    },
)

register(
    Segmentation,
    {
        "demo-segment": (
            "Segment images of generated shapes: no files, no downloads.",
            Segmentation(
                width=64,
                model=Model(name="dualtoken_vit_tiny_mix", args=("depths=(1,2,1)",)),
                data=SegmentationData(dataset="shapes", crop_size=(128, 128)),
                augment=SegmentationAugment(scale=(0.8, 1.25), class_cap=1.0),
                optim=Optim(lr=1e-3, batch_size=16, schedule="poly", epochs=6, warmup_epochs=0.5),
            ),
        ),
        "masks": (
            "Segment your own images: --data.root DIR with images/{train,val}/*.jpg and annotations/{train,val}/*.png.",
            Segmentation(
                model=Model(pretrained="auto"),
                optim=Optim(lr=5e-4, batch_size=8, schedule="poly", epochs=100, weight_decay=1e-2),
            ),
        ),
        "ade20k-deeplabv3": ("Section 4.3, DeepLabv3 with S, from an ImageNet --model.checkpoint: 39.0 mIoU.", ADE20K),
        "ade20k-pspnet": ("Section 4.3, PSPNet with S, likewise: 38.8 mIoU.", replace(ADE20K, segmenter="pspnet")),
    },
)
