"""Helpers shared by several test files."""

import os
import re
import struct
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dualtoken_vit  # noqa: F401  registers the models

SERVER = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")  # Windows cannot fork


def native(pattern):
    """A regular expression of paths with slashes, for paths as the system writes them: on Windows with backslashes."""
    return pattern.replace("/", re.escape(os.sep))


def need_name(folder, name):
    """Skip the test where no file can have such a name: macOS wants UTF-8, Windows no control characters."""
    try:
        Path(folder, name).touch()
    except (OSError, ValueError) as error:
        pytest.skip(f"the file system refuses this name: {error!r}")
    Path(folder, name).unlink()


def create(name="dualtoken_vit_tiny", depths=(1, 1, 1), num_classes=5, **kwargs):
    """A shallow model in evaluation mode with fixed, non-trivial values for all weights and statistics.

    After initialisation, biases are zero, norms are the identity and tokens are small: a test of values would not
    notice if the model ignored one of them.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, depths=depths, num_classes=num_classes, **kwargs).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.ndim > 1 and value.is_floating_point():
            value.normal_(std=value[0].numel() ** -0.5)  # keeps the variance
        elif value.is_floating_point():
            value.add_(torch.randn_like(value) / 3)
    return model


def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


def edit(source, path, tensors=lambda found: found, metadata=lambda found: found):
    """Write a best.safetensors with other tensors or metadata, and without the checksum, as early versions did."""
    with safe_open(source, framework="pt") as file:
        about = file.metadata()
    about.pop("sha256", None)
    found = {key: value.clone() for key, value in load_file(source).items()}  # not in a file that is overwritten
    save_file(tensors(found), path, metadata(about))


def save_tiff(path, pixels, width, bits, photometric=1):
    """A TIFF of one row of packed `pixels`, written by hand: Pillow does not write every kind that it reads."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags = [(tag, value) for tag, value in (*tags, (279, len(pixels))) if value is not None]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    path.write_bytes(start + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))


def save_scenes(folder, size, **counts):
    """Write the first scenes of a split (train=12) as FOLDER/{images,annotations}/SPLIT/*.png and FOLDER/classes.txt.

    They have `size` pixels a side.
    """
    from dualtoken_vit.data.segmentation import SCENE_CLASSES, draw_scenes  # a bare install has the models only

    for split, count in counts.items():
        scenes = draw_scenes(split, size)
        for index in range(count):
            image, mask = scenes.sources(index)
            for kind, content in (("images", image), ("annotations", Image.fromarray(mask))):
                path = Path(folder, kind, split, f"{scenes.pairs[index][0]}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                content.save(path)
    Path(folder, "classes.txt").write_text("\n".join(SCENE_CLASSES) + "\n")


def near(metrics, tolerance):
    """Metrics as `pytest.approx` compares them, those of each class too, which it refuses in a nested form."""
    if isinstance(metrics, dict):
        return {key: near(value, tolerance) for key, value in metrics.items()}
    return pytest.approx(metrics, abs=tolerance)
