"""Every experiment as plain data: a recipe holds all settings of a run and is stored with its results.

    dualtoken-vit train NAME [--section.field value ...]

A recipe is a frozen dataclass; the paper's ablations differ from its main rows by `dataclasses.replace` alone. Field
docstrings are the command line's help, and bounds stand on the fields. `register` adds a kind of recipe and its named
recipes, as the module of each task does.
"""

import os
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from annotated_types import Interval

from dualtoken_vit.bounds import build
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import check_folder

FREE = "may differ when a run is resumed"  # metadata of fields that say where a run reads its data or runs
Device = Literal["auto", "cpu", "cuda", "mps"]
Runtime = Literal["onnxruntime", "openvino"]
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

    def check_place(self) -> None:
        """Raise an InputError where the data cannot be; a quick check, which opens no file."""


@dataclass(frozen=True)
class SplitData(DataSection):
    """The data fields of tasks with a training and a validation split."""

    contents: ClassVar[str] = ""
    """What `root` contains in the default format of `dataset`."""
    contents_without_splits: ClassVar[str] = ""
    """The same with `holdout`, if it differs."""
    one_table: ClassVar[bool] = False
    """Whether `root` may be a CSV or Parquet table instead."""
    root: Annotated[str, FREE] = ""
    """Dataset folder."""
    train_split: str = "train"
    """Name of the training split or its folder."""
    val_split: str = "val"
    """Name of the validation split or its folder."""
    holdout: Annotated[float, Interval(ge=0, le=0.5)] = 0.0
    """Fraction of the training images to validate on, instead of the validation split."""

    def check_place(self) -> None:
        if not self.contents or self.dataset.partition("/")[0].lower() != type(self).dataset:
            return
        contents = (self.holdout and self.contents_without_splits) or self.contents
        if not self.root:
            raise InputError(f"--data.root is missing: give the folder that contains {contents}")
        table = self.one_table and self.root.lower().endswith((".csv", ".txt", ".parquet"))
        if not (table and os.path.isfile(self.root)):
            check_folder(self.root, contents)


@dataclass(frozen=True)
class Optim:
    """Optimiser and learning rate schedule, which is updated at every step and starts with a linear warm-up."""

    optimizer: str = "adamw"
    """Name of a timm optimiser, which lookahead_ may precede. The muon family leaves tokens, biases, norms, first
    convolution and classifier to AdamW (nmuon and nadamuon: NAdamW)."""
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
    """Stop after this many validations in a row without a better epoch; not as long as the metric is 0."""
    logger: Annotated[Literal["tensorboard", "csv", "wandb", "mlflow", "trackio"], FREE] = "tensorboard"
    """Tracker of losses and metrics. wandb, mlflow and trackio are extras of their names, and follow their own
    environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID)."""
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
