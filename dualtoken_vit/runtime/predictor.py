"""The predictor of an exported file, by its task, without PyTorch: what `load_predictor` returns for it.

predictor = load_predictor("model.onnx")
result = predictor("image.jpg")             # or a PIL image, an array, a folder, a list of these
"""

from pathlib import Path
from typing import Any

from dualtoken_vit.errors import InputError
from dualtoken_vit.runtime.classification import Classifier, Labeller
from dualtoken_vit.runtime.detection import AnySizeDetector, Detector
from dualtoken_vit.runtime.exported import ExportedPredictor
from dualtoken_vit.runtime.segmentation import Segmenter
from dualtoken_vit.runtime.session import ExportedModel, read_description

PREDICTORS: dict[str, type[ExportedPredictor[Any]]] = {
    "classification": Classifier,
    "multilabel": Labeller,
    "detection": Detector,
    "segmentation": Segmenter,
}


def load_predictor(
    path: str | Path, runtime: str = "onnxruntime", threads: int | None = None, device: str = "auto", **options: Any
) -> ExportedPredictor[Any]:
    """An exported file as a function of images, ready to call; see `BasePredictor` for what it accepts.

    It returns `results.Classes`, `Labels`, `Objects` or `LabelMap`, depending on the task.

    Args:
        path: a file written by `dualtoken-vit export`
        runtime: onnxruntime or openvino
        threads: CPU threads; None: the runtime's default
        device: auto or cpu, where exported files run
        options: how to predict; by default as in the validation of the training run. Classification: image_size,
            crop_pct, interpolation, top_k (5); multilabel: threshold instead of top_k. Detection: score (0.5), tile,
            overlap, and for files of any size image_size, max_size. Segmentation: image_size, mode, window,
            window_stride, scales, flip

    Raises:
        InputError: for a file, runtime or option that cannot be used.
    """
    if str(path).endswith(".safetensors"):  # with PyTorch, `load_predictor` takes checkpoints too
        raise InputError(f"{path}: a checkpoint needs PyTorch; dualtoken-vit export writes a file that does not")
    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: exported files run on the CPU; leave it out")
    model = ExportedModel(path, runtime, threads)
    kind = predictor_class(model.description)
    return kind(model, kind.make_options(**kind.stored_options(model.description) | options))


def default_options(path: str | Path) -> Any:
    """The options of `load_predictor` for an exported file, with the values of the validation of its training run."""
    found = read_description(path)
    kind = predictor_class(found)
    return kind.make_options(**kind.stored_options(found))


def predictor_class(description: dict[str, Any]) -> type[ExportedPredictor[Any]]:
    """The class of predictor for a file of this description; an InputError for a task without one."""
    task = description["task"]
    if task not in PREDICTORS:
        raise InputError(f"task {task!r} of an exported file is unknown here; {', '.join(PREDICTORS)} are known")
    return AnySizeDetector if task == "detection" and description["export"]["raw"] else PREDICTORS[task]
