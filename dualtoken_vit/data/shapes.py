"""Generated images of shapes: a small dataset that needs no files and no network.

Every image shows a circle, cross, ring, square, star or triangle of random colour, position, size and angle on a
mottled background with strokes over it. Neither colours nor single pixels reveal the class: only the outline does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
COUNTS = {"train": 3000, "val": 600}
SCENES = {"train": 1000, "val": 200}


class Shape(NamedTuple):
    """One shape in an image of side S."""

    label: int  # index into CLASSES
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are exclusive
    mask: np.ndarray  # (S, S) bool: where it is visible


def _corners(count: int, *radii: float) -> np.ndarray:
    """(count, 2): points at equal angles; the radii alternate."""
    angles = 2 * np.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_R, _H = np.sqrt(1 - 0.3**2), 0.3  # reach and half the width of the cross's arms
_CROSS = np.array([(_R, -_H), (_R, _H), (_H, _H), (_H, _R), (-_H, _R), (-_H, _H)])  # half of its corners
# Corners in the unit circle; a second polygon is a hole in the first.
_OUTLINES = {
    "circle": [_corners(40, 1.0)],
    "cross": [np.concatenate([_CROSS, -_CROSS])],
    "ring": [_corners(40, 1.0), _corners(40, 0.55)],
    "square": [_corners(4, 1.0)],
    "star": [_corners(10, 1.0, 0.42)],
    "triangle": [_corners(3, 1.0)],
}


def draw(
    rng: np.random.Generator, size: int, labels: Sequence[int], radii: tuple[float, float] = (0.3, 0.45)
) -> tuple[Image.Image, list[Shape]]:
    """Draw an RGB image of `size` pixels a side, and one shape per label over it; later shapes cover earlier ones.

    Args:
        rng: draws everything except the classes
        labels: indices into CLASSES
        radii: smallest and largest radius of a shape, as a fraction of `size`
    """
    ground = rng.integers(0, 256, 3)
    mottle = np.clip(ground + rng.normal(0, 25, (6, 6, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(mottle).resize((size, size), Image.Resampling.BICUBIC)
    masks: list[np.ndarray] = []
    for label in labels:
        colour = (ground + rng.integers(90, 167, 3)) % 256  # differs by 90 or more from the background in every channel
        radius = size * rng.uniform(*radii)
        centre = rng.uniform(radius, size - radius, 2)
        angle = rng.uniform(0, 2 * np.pi)
        axes = radius * np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        cover = Image.new("L", (4 * size, 4 * size))  # at four times the resolution, then averaged: smooth edges
        for fill, outline in zip((255, 0), _OUTLINES[CLASSES[label]], strict=False):
            ImageDraw.Draw(cover).polygon((4 * (outline @ axes + centre)).ravel().tolist(), fill=fill)
        cover = cover.reduce(4)
        image.paste(tuple(colour.tolist()), mask=cover)
        mask = np.asarray(cover) >= 128
        masks = [below & ~mask for below in masks] + [mask]
    strokes = ImageDraw.Draw(image)
    for _ in range(2):
        ends, colour = rng.uniform(0, size, 4), rng.integers(0, 256, 3)
        strokes.line(ends.tolist(), tuple(colour.tolist()), width=max(1, size // 40))
    pixels = np.asarray(image) + rng.integers(-16, 17, (size, size, 3))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    boxes = [Image.fromarray(mask).getbbox() or (0, 0, 0, 0) for mask in masks]
    return image, [Shape(*shape) for shape in zip(labels, boxes, masks, strict=True)]


class ShapeImages(Sequence):
    """The images of a split, `size` pixels a side, drawn on access; image i shows class i modulo their number."""

    def __init__(self, split: str, size: int) -> None:
        self.split, self.size = split, size
        self.targets = [index % len(CLASSES) for index in range(COUNTS[split])]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> Any:
        rng = np.random.default_rng([list(COUNTS).index(self.split), index])
        return draw(rng, self.size, [self.targets[index]])[0]


def scene(split: str, index: int, size: int) -> tuple[Image.Image, list[Shape]]:
    """Image `index` of a split, with up to five smaller shapes; almost hidden ones are not listed."""
    rng = np.random.default_rng([len(COUNTS) + list(COUNTS).index(split), index])
    labels = rng.integers(0, len(CLASSES), rng.integers(0, 6)).tolist()
    image, shapes = draw(rng, size, labels, radii=(0.1, 0.25))
    return image, [shape for shape in shapes if shape.mask.mean() > 0.004]  # a third of the smallest star


def save(folder: str | Path, count: int = 36, size: int = 64) -> None:
    """Write the first `count` validation images as FOLDER/CLASS/INDEX.png, to try `predict` on."""
    images = ShapeImages("val", size)
    for index, label in enumerate(images.targets[:count]):
        path = Path(folder, CLASSES[label], f"{index:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        images[index].save(path)
