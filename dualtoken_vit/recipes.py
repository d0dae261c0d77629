"""Every experiment as plain data: a recipe says all that a run depends on, and is stored with its results.

    dualtoken-vit train NAME [--section.field value ...]

A recipe is a frozen dataclass; the paper's ablations differ from its main rows by `dataclasses.replace` alone.
This file needs the standard library only. `RECIPES` at the end maps names to recipes.
"""

from ast import literal_eval
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dualtoken_vit.errors import InputError


@dataclass(frozen=True)
class Model:
    """The network."""

    name: str = "dualtoken_vit_tiny"
    """Any timm model name; DualToken-ViT: dualtoken_vit_{tiny,tiny_mix,small,small_mix}."""
    args: tuple[str, ...] = ()
    """Further arguments of timm.create_model, NAME=VALUE each, for example: token_grid=5 token_mlp=mix."""
    in_chans: int = 3
    """Channels of the pictures the network takes: 3 (RGB) or 1 (grey)."""
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
    """The pictures."""

    dataset: str = "folder"
    """folder: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; shapes: drawn by the program; imagenette: fetched by
    torchvision; or a timm data spec: wds/..., hfds/..., tfds/... (with the package that reads it installed)."""
    root: str = ""
    """Folder of the data set."""
    train_split: str = "train"
    """Name of the training split or folder."""
    val_split: str = "val"
    """Name of the validation split or folder."""
    holdout: float = 0.0
    """Share of each class's training pictures to validate on instead of the validation split, 0 to 0.5. For tuning
    without a look at the validation pictures, or where there are none."""
    image_size: int = 224
    """Side of the square that pictures are resized and cropped to, in pixels."""
    crop_pct: float = 0.875
    """In evaluation the short side is resized to image_size / crop_pct and the centre is cropped."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How pictures are resized."""
    unreadable: Literal["stop", "skip"] = "stop"
    """What to do with a picture that cannot be read: stop before the first step, or skip and count it."""
    workers: int = 2
    """Processes that read pictures; 0: read them in the training process."""


@dataclass(frozen=True)
class Augment:
    """What training does to the pictures (timm's transforms)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the share of the picture's area that the random crop keeps."""
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
    """Optimiser and schedule: linear warm-up, then half a cosine, stepped every batch."""

    optimizer: str = "adamw"
    """Any of timm's optimisers."""
    lr: float = 1e-3
    """Peak learning rate for batch_size as given (it is not rescaled)."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    epochs: int = 30
    """Passes over the training pictures."""
    batch_size: int = 64
    """Pictures a step, over all the processes and accumulated batches together."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step; each has batch_size / accumulate pictures."""
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
    save_every: int = 200
    """Steps between two saves of last.ckpt, beside the one at the end of every epoch."""


@dataclass(frozen=True)
class Classification:
    """A classification run."""

    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    run: Run = Run()


def to_dict(recipe: Classification) -> dict[str, Any]:
    """The recipe as nested plain data, for JSON."""
    return asdict(recipe)


def from_dict(values: dict[str, Any]) -> Classification:
    """The recipe that `to_dict` wrote (JSON's lists become tuples again).

    Raises:
        TypeError: for a section or field that does not exist.
    """
    sections = {"model": Model, "data": Data, "augment": Augment, "optim": Optim, "run": Run}
    built = {}
    for name, section in values.items():
        if name not in sections:
            raise TypeError(f"a recipe has no section {name!r}")
        section = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
        built[name] = sections[name](**section)
    return Classification(**built)


def model_kwargs(model: Model) -> dict[str, Any]:
    """`model.args` as keyword arguments: `token_grid=5` gives the number 5, `token_mlp=mix` the word "mix".

    Raises:
        InputError: for an argument that is not of the form NAME=VALUE.
    """
    kwargs: dict[str, Any] = {}
    for arg in model.args:
        name, equals, value = arg.partition("=")
        if not (name.isidentifier() and equals):
            raise InputError(f"model.args: {arg!r} is not of the form NAME=VALUE, for example token_grid=5")
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

# The folder recipe's defaults were chosen on a tenth of Imagenette's training pictures (REPRODUCTION.md).
FOLDER = Classification(
    data=Data(crop_pct=1.0),
    augment=Augment(scale=(0.35, 1.0)),
    optim=Optim(batch_size=32, warmup_epochs=0.5),
)

# name: (what it is, recipe)
_ALL: dict[str, tuple[str, Classification]] = {
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
    "folder": ("Your own pictures: --data.root DIR with train/CLASS/*.jpg and val/CLASS/*.jpg.", FOLDER),
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
}
RECIPES = {name: recipe for name, (_, recipe) in _ALL.items()}
ABOUT = {name: about for name, (about, _) in _ALL.items()}
