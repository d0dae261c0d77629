"""Trained networks, from checkpoints, exported files and weights of the package: as a predictor, or as a plain module.

predictor = load_predictor("runs/photos/best.safetensors")
result = predictor("image.jpg")             # or a PIL image, an array, a tensor, a folder, a list of these
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_vit.checkpoint import Checkpoint, read_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.machine import pick_device
from dualtoken_vit.recipes import Recipe, from_dict
from dualtoken_vit.runtime import predictor as exported
from dualtoken_vit.runtime.base import BasePredictor
from dualtoken_vit.runtime.session import is_exported, read_description
from dualtoken_vit.tasks.registry import get_task


def load_model(path: str | Path) -> tuple[nn.Module, Checkpoint]:
    """The trained network of a best.safetensors in evaluation mode, and its description.

    Raises:
        InputError: for a file that is missing, truncated or of another kind, or does not fit the installed timm.
    """
    checkpoint = read_checkpoint(path)
    return get_task(checkpoint.task).restore(checkpoint, path), checkpoint


def stored_recipe(path: str | Path, checkpoint: Checkpoint) -> Recipe:
    """The recipe that a checkpoint was trained with; an InputError where this version cannot read it."""
    get_task(checkpoint.task)  # an unknown task is an error of its own
    try:
        return from_dict(checkpoint.recipe)
    except TypeError as error:
        raise InputError(f"{path} was written by another version of dualtoken-vit: {error}") from error


def read_header(path: str | Path) -> Checkpoint:
    """The description in a best.safetensors or an exported file, without weights.

    Raises:
        InputError: as `read_checkpoint` and `read_description`.
    """
    if not is_exported(path):
        return read_checkpoint(path, weights=False)
    found, known = read_description(path), {field.name for field in fields(Checkpoint)}
    own: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key in known
    }
    return Checkpoint(**own, state_dict={})


def default_options(path: str | Path) -> Any:
    """The options of `load_predictor` for a file, with the values of the validation of its training run."""
    if is_exported(path):
        return exported.default_options(path)
    header = read_header(path)
    predictor = get_task(header.task).predictor
    return predictor.make_options(**predictor.stored_options(stored_recipe(path, header).data, header.preprocessing))


def load_predictor(path: str | Path, device: str = "auto", **options: Any) -> BasePredictor[Any]:
    """A trained network as a function of images, ready to call; see `BasePredictor` for what it accepts.

    It returns `results.Classes`, `Labels`, `Objects` or `LabelMap`, depending on the task.

    Args:
        path: a best.safetensors, a file that `dualtoken-vit export` wrote, or the name of a network whose weights come
            with the package
        device: auto (an accelerator if there is one), cpu, cuda or mps; exported files run on the CPU
        options: how to predict; by default as in the validation of the training run. Classification: image_size,
            crop_pct, interpolation, top_k (5); multilabel: threshold instead of top_k. Detection: score (0.5), tile,
            overlap, image_size, max_size. Segmentation: image_size, mode, window, window_stride, scales, flip. Exported
            files: runtime (onnxruntime, openvino), threads; those of detectors of fixed size: no image_size, max_size

    Raises:
        InputError: for a file, device or option that cannot be used.
    """
    if is_exported(path):
        return exported.load_predictor(path, device=device, **options)
    if "runtime" in options:
        raise InputError(f"--runtime {options['runtime']}: for files that dualtoken-vit export wrote, not for {path}")
    model, checkpoint = load_model(path)
    task = get_task(checkpoint.task)
    names, preprocessing, data = checkpoint.class_names, checkpoint.preprocessing, stored_recipe(path, checkpoint).data
    predictor = task.predictor.create(model.to(pick_device(device)), names, preprocessing, data, **options)
    predictor.category_ids = checkpoint.category_ids
    return predictor
