"""Detection in large images: overlapping tiles, whose objects are merged."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torchvision.ops import batched_nms

NMS_IOU = 0.5
EDGE = 1.0  # pixels: a box that ends closer to the edge of its tile may be cut off there

Detections = dict[str, Tensor]


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin that cover a length; the last one ends with it."""
    return sorted({max(min(start, length - side), 0) for start in range(0, length, side - overlap)})


def detect_in_tiles(
    model: Callable[[list[Tensor]], list[Detections]], image: Tensor, side: int, overlap: float, batch_size: int
) -> Detections:
    """The objects of an image, detected in square tiles.

    A box that is cut off by the edge of its tile is dropped if it is not larger than the overlap: the next tile has the
    whole object. Of boxes of one class with an IoU above 0.5 the best is kept, as in other non-maximum suppression.

    Args:
        model: a detector, which takes images (C, H, W)
        image: (C, H, W), as the detector takes it
        side: of the tiles, in pixels
        overlap: of neighbouring tiles, as a share of their side, below 1
        batch_size: tiles in a forward pass

    Returns:
        boxes (N, 4) XYXY in pixels of the image, labels and scores (N,), the best first, and masks (N, 1, H, W), if the
        detector returns them.
    """
    height, width = image.shape[-2:]
    shared = int(side * overlap)
    places = list(product(starts(height, side, shared), starts(width, side, shared)))
    tiles = [image[:, top : top + side, left : left + side] for top, left in places]
    parts = [part for first in range(0, len(tiles), batch_size) for part in model(tiles[first : first + batch_size])]
    kept = [
        whole(part["boxes"], place, (height, width), side, shared) for part, place in zip(parts, places, strict=True)
    ]
    parts = [{key: value[keep] for key, value in part.items()} for part, keep in zip(parts, kept, strict=True)]
    found = {key: torch.cat([part[key] for part in parts]) for key in ("labels", "scores")}
    boxes = [
        part["boxes"] + part["boxes"].new_tensor((left, top) * 2)
        for part, (top, left) in zip(parts, places, strict=True)
    ]
    found["boxes"] = torch.cat(boxes)
    best = batched_nms(found["boxes"], found["scores"], found["labels"], NMS_IOU)
    if "masks" in parts[0]:
        found["masks"] = _assemble(best, parts, places, (height, width))
    return {key: value if key == "masks" else value[best] for key, value in found.items()}


def whole(boxes: Tensor, place: Sequence[int], size: Sequence[int], side: int, shared: int) -> Tensor:
    """(N,) bool: which boxes of the tile that begins at `place` (top, left) are not dropped, see `detect_in_tiles`."""
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for axis, (start, length) in enumerate(zip(reversed(place), reversed(size), strict=True)):  # x, y
        low, high = boxes[:, axis], boxes[:, axis + 2]
        cut = (low < EDGE) & (start > 0) | (high > side - EDGE) & (start + side < length)
        keep &= ~(cut & (high - low <= shared))
    return keep


def _assemble(best: Tensor, parts: list[Detections], places: list[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """The masks (N, 1, H, W) of the chosen objects, counted over all tiles, in the image."""
    owner = [
        (part["masks"][index], place)
        for part, place in zip(parts, places, strict=True)
        for index in range(len(part["masks"]))
    ]
    masks = torch.zeros(len(best), 1, *size, dtype=torch.bool, device=best.device)
    for canvas, index in zip(masks, best.tolist(), strict=True):
        mask, (top, left) = owner[index]
        canvas[:, top : top + mask.shape[-2], left : left + mask.shape[-1]] = mask
    return masks
