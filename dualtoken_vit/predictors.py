"""Trained networks from their files: as a predictor, or as a plain module.

predictor = load_predictor("runs/photos/best.safetensors")
result = predictor("image.jpg")             # or a PIL image, an array, a tensor, a folder, a list of these
"""

from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_vit.checkpoint import Checkpoint, read_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.machine import pick_device
from dualtoken_vit.recipes import Recipe, from_dict
from dualtoken_vit.tasks.predictor import Predictor
from dualtoken_vit.tasks.registry import get_task

__all__ = ["load_model", "load_predictor", "stored_recipe"]


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


def load_predictor(path: str | Path, device: str = "auto", **options: Any) -> Predictor[Any]:
    """A trained network as a function of images, ready to call; see `Predictor` for what it accepts.

    It returns `results.Classes`, `results.Objects` or `results.LabelMap`, depending on the task.

    Args:
        path: a best.safetensors
        device: auto (an accelerator if there is one), cpu, cuda or mps
        options: how to predict; by default as in the validation of the training run. Classification: image_size,
            crop_pct, interpolation, top_k (5). Detection: image_size, max_size, score (0.5). Segmentation: image_size,
            mode, window, window_stride, scales, flip

    Raises:
        InputError: for a file, device or option that cannot be used.
    """
    model, checkpoint = load_model(path)
    task = get_task(checkpoint.task)
    names, preprocessing, data = checkpoint.class_names, checkpoint.preprocessing, stored_recipe(path, checkpoint).data
    predictor = task.predictor.create(model.to(pick_device(device)), names, preprocessing, data, **options)
    predictor.category_ids = checkpoint.category_ids
    return predictor
