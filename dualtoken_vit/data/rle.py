"""COCO's run-length encoding of masks, without torch and COCO's programs."""

from typing import Any

import numpy as np


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) bool in COCO's compressed RLE: the lengths of the runs down the columns, the first of zeros.

    From the fourth run on, the difference to the length two runs before is stored, in groups of five bits, the lowest
    first, each of them as one character.
    """
    flat = np.concatenate(([False], mask.T.ravel()))
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
    runs = np.diff(ends, prepend=0)
    runs[3:] -= runs[1:-2].copy()
    text = []
    for run in runs.tolist():
        more = True
        while more:
            bits, run = run & 31, run >> 5
            more = run != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return {"size": list(mask.shape), "counts": "".join(text)}
