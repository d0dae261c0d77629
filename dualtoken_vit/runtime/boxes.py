"""Boxes of objects (N, 4), as left, top, right, bottom in pixels."""

from collections.abc import Sequence

import numpy as np


def clip(boxes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Boxes (N, 4) within an image of (height, width)."""
    return boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))


def suppress(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression within each group: the indices of the boxes (N, 4) that are left, the best first."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    keep: list[int] = []
    for group in np.unique(groups):
        order = np.flatnonzero(groups == group)
        order = order[np.argsort(-scores[order], kind="stable")]
        while order.size:
            best, rest = order[0], order[1:]
            keep.append(best)
            corner = np.maximum(boxes[rest, :2], boxes[best, :2])
            shared = (np.minimum(boxes[rest, 2:], boxes[best, 2:]) - corner).clip(0).prod(1)
            with np.errstate(invalid="ignore"):  # two empty boxes
                order = rest[~(shared / (area[rest] + area[best] - shared) > threshold)]
    left = np.sort(np.array(keep, dtype=int))
    return left[np.argsort(-scores[left], kind="stable")]
