"""Detection in large images: overlapping tiles, whose objects are merged."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from dualtoken_vit.errors import InputError
from dualtoken_vit.runtime.boxes import suppress
from dualtoken_vit.runtime.session import Arrays

NMS_IOU = 0.5
EDGE = 1.0  # pixels: a box that ends closer to the edge of its tile may be cut off there


def check_overlap(options: Any, args: list[str]) -> None:
    """An InputError for arguments that give the overlap of tiles without tiles."""
    flags = [arg for arg in args if arg.partition("=")[0] in ("--overlap", "--data.overlap")]
    if flags and options.tile is None:
        raise InputError("--overlap is that of tiles: give --tile too, the side of a tile in pixels")


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin that cover a length; the last one ends with it."""
    return sorted({max(min(start, length - side), 0) for start in range(0, length, side - overlap)})


def detect_in_tiles(
    detect: Callable[[list[Any]], list[Arrays]], image: Any, side: int, overlap: float, batch_size: int = 1
) -> Arrays:
    """The objects of an image, detected in square tiles.

    A box that is cut off by the edge of its tile is dropped if it is smaller than the overlap: the next tile has the
    whole object. Of boxes of one class with an IoU above 0.5 the best is kept, as in other non-maximum suppression.

    Args:
        detect: returns the objects of each of several images (C, H, W): boxes (N, 4) XYXY in pixels, labels and scores
            (N,), and perhaps masks (N, 1, H, W)
        image: array or tensor (C, H, W), as `detect` takes it
        side: of the tiles, in pixels
        overlap: of neighbouring tiles, as a share of their side, below 1
        batch_size: tiles in a call of `detect`

    Returns:
        The same of the whole image, the best first.
    """
    height, width = image.shape[-2:]
    if max(height, width) <= side:
        (found,) = detect([image])
        order = np.argsort(-found["scores"], kind="stable")
        return {key: value[order] for key, value in found.items()}
    shared = int(side * overlap)
    places = list(product(starts(height, side, shared), starts(width, side, shared)))
    tiles = [image[:, top : top + side, left : left + side] for top, left in places]
    parts = [part for first in range(0, len(tiles), batch_size) for part in detect(tiles[first : first + batch_size])]
    kept = [
        whole(part["boxes"], place, (height, width), side, shared) for part, place in zip(parts, places, strict=True)
    ]
    parts = [{key: value[keep] for key, value in part.items()} for part, keep in zip(parts, kept, strict=True)]
    found = {key: np.concatenate([part[key] for part in parts]) for key in ("labels", "scores")}
    boxes = [
        part["boxes"] + np.array((left, top) * 2, np.float32) for part, (top, left) in zip(parts, places, strict=True)
    ]
    found["boxes"] = np.concatenate(boxes)
    best = suppress(found["boxes"], found["scores"], found["labels"], NMS_IOU)
    if "masks" in parts[0]:
        found["masks"] = _assemble(best, parts, places, (height, width))
    return {key: value if key == "masks" else value[best] for key, value in found.items()}


def whole(boxes: np.ndarray, place: Sequence[int], size: Sequence[int], side: int, shared: int) -> np.ndarray:
    """(N,) bool: which boxes of the tile that begins at `place` (top, left) are not dropped, see `detect_in_tiles`."""
    keep = np.ones(len(boxes), dtype=bool)
    for axis, (start, length) in enumerate(zip(reversed(place), reversed(size), strict=True)):  # x, y
        low, high = boxes[:, axis], boxes[:, axis + 2]
        cut = (low < EDGE) & (start > 0) | (high > side - EDGE) & (start + side < length)
        keep &= ~(cut & (high - low <= shared - 2 * EDGE))  # else the next tile may have it at its own edge
    return keep


def _assemble(best: np.ndarray, parts: list[Arrays], places: list[tuple[int, int]], size: tuple[int, int]) -> Any:
    """The masks (N, 1, H, W) of the chosen objects, counted over all tiles, in the image."""
    owner = [(mask, place) for part, place in zip(parts, places, strict=True) for mask in part["masks"]]
    masks = np.zeros((len(best), 1, *size), dtype=bool)
    for canvas, index in zip(masks, best, strict=True):
        mask, (top, left) = owner[index]
        canvas[:, top : top + mask.shape[-2], left : left + mask.shape[-1]] = mask
    return masks
