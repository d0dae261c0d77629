"""The comparison of an exported file with PyTorch."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import load_image
from dualtoken_vit.deploy.plans import Plan, Size
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import ceil_div
from dualtoken_vit.runtime.arrays import to_array, to_float
from dualtoken_vit.runtime.session import Arrays

TOLERANCE = 1e-4
"""The largest difference with which a file is kept, relative to the largest output; in boxes, to the image's side; ten
times as much in masks, whose network sees what the last digits of a box select."""
IMAGES = 8  # of a folder
NEAR = 1e-3  # of the threshold or of the lowest score: the object may be in one of two results only


def batches(plan: Plan, channels: int, images: Path | None) -> list[np.ndarray]:
    """Inputs (B, C, H, W) in [0, 1]: at the plan's size, another batch size, and an odd size.

    Args:
        images: a folder of images, which are stretched to the size; None: noise

    Raises:
        InputError: for a folder without images, or one that cannot be read.
    """
    height, width = plan.size
    odd = height | 1, max(width * 3 // 4, 32) | 1
    shapes: list[tuple[int, Size]] = [(1, plan.size)] * 3 if plan.one else [(1, plan.size), (3, plan.size)]
    shapes += [] if plan.fixed else [(2, odd)]
    real = load_images(images, channels, IMAGES) if images else None
    found, seed = [], np.random.default_rng(0)
    for number, (count, (height, width)) in enumerate(shapes):
        if real is None:
            found.append(seed.random((count, channels, height, width), dtype=np.float32))
            continue
        some = [real[(number + place) % len(real)].resize((width, height)) for place in range(count)]
        found.append(np.stack([to_float(to_array(image)) for image in some]))
    return found


def load_images(folder: Path, channels: int, most: int) -> list[Image.Image]:
    """At most that many images in a folder, evenly spaced."""
    names = image_files(folder) if folder.is_dir() else []
    if not names:
        raise InputError(f"--images {folder}: not a folder of images")
    return [load_image(name, channels) for name in names[:: ceil_div(len(names), most)]]


@torch.inference_mode()
def expected(plan: Plan, image: np.ndarray) -> Arrays:
    """The outputs in PyTorch."""
    outputs = plan.graph(torch.from_numpy(image))
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return {name: value.numpy() for name, value in zip(plan.outputs, outputs, strict=True)}


def difference(ours: Arrays, theirs: Arrays, side: int) -> float:
    """The largest difference between two outputs, see `TOLERANCE`; infinite if shapes or objects differ.

    Args:
        side: of the image, in pixels, by which differences of boxes are divided
    """
    if "labels" in ours:
        return float(np.max([_objects(ours, theirs, side), _objects(theirs, ours, side)]))  # NaN where one is
    if any(ours[name].shape != theirs[name].shape for name in ours):
        return float("inf")
    scale = {name: side if name == "boxes" else float(np.abs(value).max()) or 1.0 for name, value in ours.items()}
    return float(np.max([np.abs(ours[name] - theirs[name]).max() / scale[name] for name in ours]))


def _objects(ours: Arrays, theirs: Arrays, side: int) -> float:
    """The largest difference between each of our objects and the most similar one of theirs."""
    ours, theirs = ({key: value[each["labels"] >= 0] for key, value in each.items()} for each in (ours, theirs))
    sure = ours["scores"] > max(ours["scores"].min(initial=1), 0.05) + NEAR
    gaps = [
        np.where(ours["labels"][:, None] == theirs["labels"], 0, np.inf),
        np.abs(ours["boxes"][:, None] - theirs["boxes"]).max(-1) / side,
        np.abs(ours["scores"][:, None] - theirs["scores"]),
    ]
    if "masks" in ours:
        gaps.append(np.abs(ours["masks"][:, None] - theirs["masks"]).max((2, 3, 4)) / 10)
    return float(np.max(gaps, 0).min(1, initial=np.inf)[sure].max(initial=0))
