"""The arguments of the commands as dataclasses, whose docstrings are the command line's help, and their parser.

The commands whose arguments are the parameters of a function in `paper` are not here.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from dualtoken_vit.recipes import Device, Recipe, Runtime

R = TypeVar("R", bound=Recipe)
D = TypeVar("D")  # the data section of a recipe
O = TypeVar("O")  # noqa: E741  the options of a predictor
Switch = tyro.conf.FlagCreatePairsOff[bool]  # without its opposite


@dataclass(frozen=True)
class Nothing:
    """In place of options that depend on the recipe or checkpoint."""


@dataclass(frozen=True)
class Train(Generic[R]):
    recipe: Annotated[R, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    resume: Switch = False
    """Continue the run in that folder where it was interrupted, with its settings."""


@dataclass(frozen=True)
class CheckData(Generic[R]):
    recipe: Annotated[R, tyro.conf.arg(name="")]
    out: Path = Path("runs", "check-data")
    """Folder for labels.png, a contact sheet of images with their labels."""
    augmented: Switch = False
    """Draw the images as training sees them, after augmentation."""
    suspects: tuple[Path, ...] = ()
    """Classification: rank probably wrong labels by the networks of these runs, among the images that each did not
    train on; runs with --data.holdout 0.2 and --data.fold 0, 1, 2, 3, 4 cover all."""


@dataclass(frozen=True)
class Evaluate(Generic[D]):
    data: D
    batch_size: int | None = None
    """Images in a batch; by default as in training."""
    device: Device = "auto"
    """auto: an accelerator if there is one, else the CPU."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the forward pass; validation during training has that of --run.precision."""
    runtime: Runtime | None = None
    """Of an exported file; by default onnxruntime."""
    calibrate: Switch = False
    """Classification: fit the temperature of the probabilities on these images, and store it in the checkpoint."""
    out: Path | None = None
    """Folder for evaluation.json, plots, and in detection the results in COCO's format."""
    json: Switch = False
    """Print one JSON object, and nothing else. Classification: top1, top5 (of more than five classes), mean_accuracy,
    precision and f1 (means of the classes), loss, ece; multi-label: map, f1, micro_f1, loss; detection: box, mask,
    objects; segmentation: miou, pixel_accuracy, mean_accuracy; all: images, and per_class by class, in detection by
    kind. Shares are between 0 and 1; -1 or null: the class is absent."""


@dataclass(frozen=True)
class Predict(Generic[O]):
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders to search for them, subfolders included; or one video, or the number of a camera."""
    options: Annotated[O, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder for a drawing of each image, scaled to a long side of 800 to 1600 pixels (segmentation: 480 to 1280, with
    the label map in the image's size as a palette PNG), contact sheets of all images, and predictions.json. Of a video:
    the annotated video, scaled likewise, with a .jsonl beside it."""
    json: Switch = False
    """Print one JSON object on stdout instead of the table, and nothing else there; of a video, one for each frame."""
    batch_size: int | None = None
    """Images in a forward pass; by default 32, in detection and segmentation 4."""
    device: Device = "auto"
    """auto: an accelerator if there is one, else the CPU."""
    runtime: Runtime | None = None
    """Of an exported file; by default onnxruntime."""


@dataclass(frozen=True)
class Export(Generic[D]):
    data: D
    out: Path | None = None
    """The file; by default model.onnx beside the checkpoint, or NAME.onnx in this folder."""
    format: Literal["onnx", "litert", "coreml"] = "onnx"
    """onnx: for ONNX Runtime and OpenVINO. litert (.tflite), coreml (.mlpackage, not verified): one image of one size,
    classifiers and segmenters."""
    size: str | None = None
    """SIDE or WIDTHxHEIGHT in pixels; by default as in training. A detector takes this size only, rounded up to
    multiples of 32, and resizes and pads others: by default the size at which it processes most of --images, or of the
    validation images. Other files take any size."""
    raw: Switch = False
    """RetinaNet, FCOS, SSDLite: boxes (B, A, 4) and scores (B, A, classes) of all anchors, for images of any size; the
    predictor of the file chooses among them."""
    attention: Switch = False
    """DualToken-ViT classifiers: also the attention maps of the last block, for the command attention."""
    int8: Literal["dynamic", "static"] | None = None
    """Linear layers as int8: dynamic (also without a value), or static, with activations in the range of --images."""
    fp16: Switch = False
    """Weights as float16: half the size, not faster on a CPU."""
    images: Path | None = None
    """Folder of images to verify and calibrate with; by default noise."""
    evaluate: Switch = False
    """Also evaluate checkpoint and file on the validation images (--data.*)."""


@dataclass(frozen=True)
class Convert:
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of images and labels in COCO, YOLO, Pascal VOC, CSV or LabelMe form."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The new folder. Images are copied into it."""
    to: Literal["coco", "yolo", "voc"]
    """Format of the new folder."""
    format: str = "auto"
    """Format of the source: coco, yolo, voc, csv or labelme; auto: detect it."""


def parse_arguments(kind: Any, default: Any, args: list[str], prog: str, about: str, hint: str) -> Any:
    """Parse arguments into one of these dataclasses; `hint` is printed above the error for unknown options."""
    run = partial(tyro.cli, kind, default=default, prog=prog, description=about)
    chosen, unknown = run(args=args, return_unknown_args=True)
    if not unknown:
        return chosen
    kept: list[str] = []
    flag = ""
    for arg in args:
        flag = arg if arg.startswith("--") else flag
        if arg == flag or flag not in unknown or arg not in unknown:  # tyro would list the values as options, too
            kept.append(arg)
    if hint and any(arg.startswith("--") for arg in unknown):
        print(hint, file=sys.stderr)
    run(args=kept)
    raise AssertionError("the parser exits after its error")
