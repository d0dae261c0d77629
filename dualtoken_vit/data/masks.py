"""The labels of a mask file, and the classes that they stand for."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from dualtoken_vit.data.images import naming, open_image
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, printable

IGNORE = 255  # label of ignored pixels in targets, whatever it is in files
BEYOND = 254  # of labels outside the classes

MODES = ("L", "P", "1", "I", "I;16", "I;16B")  # Pillow's, of mask files
INVERTED = re.compile(r"[1L];\d?IR?")  # Pillow's raw modes of TIFF files whose photometric interpretation is 0
STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow scales 2-bit and 4-bit greyscale to 0 ... 255


def read_mask(path: str | Path) -> np.ndarray:
    """The labels (H, W), uint8 or int32, of a single-channel mask file as stored; an InputError for other files."""
    with naming(path), open_image(path) as mask:
        return _labels(mask, printable(path))


def _labels(mask: ImageFile, name: str) -> np.ndarray:
    """As `read_mask`, of an open file; `name` is that in messages."""
    if _is_lossy(mask):
        raise InputError(f"{name}: a JPEG mask, whose compression changes labels; save masks as PNG")
    tiles: Any = mask.tile
    stored = next((tile.args if isinstance(tile.args, str) else tile.args[0] for tile in tiles), "")
    if INVERTED.fullmatch(str(stored)):
        raise InputError(f"{name}: a TIFF mask whose 0 is white: Pillow inverts its labels; save masks as PNG")
    mask.load()
    labels, mode = np.asarray(mask), mask.mode
    if mode not in MODES:
        raise InputError(
            f"{name}: a mask of mode {mode}, but masks need one label per pixel, or a class file (--data.classes) with "
            "the colour of each class in a line NAME,R,G,B; other colours are then ignored"
        )
    if stored in STRETCHED:
        labels = labels // STRETCHED[stored]
    return labels.astype(np.uint8 if mode in ("L", "P", "1") else np.int32)


def _is_lossy(mask: Image.Image) -> bool:
    return mask.format in ("JPEG", "MPO", "JPEG2000") or mask.info.get("compression") == "jpeg"  # the latter: in TIFF


def read_coloured(path: str | Path, colours: np.ndarray, first: int, other: int) -> np.ndarray:
    """The labels of a mask whose colours stand for classes: row i of `colours` (N, 3) for label `first` + i.

    All other colours become the label `other`. A greyscale mask has labels already, unless each of its greys is among
    the colours, and it has two (1 bit), or one that is no label.
    """
    labels = None
    with naming(path), open_image(path) as mask:
        if mask.mode not in ("P", "RGB", "RGBA") or _is_lossy(mask):
            labels = _labels(mask, printable(path))
            if mask.mode not in ("1", "L"):
                return labels
        pixels = np.asarray(mask.convert("RGB"))
    keys, found = (each.astype(np.int32) @ (65536, 256, 1) for each in (colours, pixels))
    order = np.argsort(keys)
    place = np.searchsorted(keys, found, sorter=order).clip(max=len(keys) - 1)
    label = order[place]
    known = keys[label] == found
    if labels is not None and not (known.all() and (mask.mode == "1" or labels.max() >= first + len(colours))):
        return labels
    return np.where(known, label + first, other).astype(np.int32)


def label_table(classes: Sequence[int], ignore_index: int = 255, reduce_zero_label: bool = False) -> np.ndarray:
    """What each label becomes, (257 or more,) uint8: a class, `IGNORE` or `BEYOND`; the last is for all other labels.

    `classes` are those of the labels from 0 on; with `reduce_zero_label`, from 1 on, and label 0 is ignored too.
    """
    first = int(reduce_zero_label)
    table = np.full(max(257, ignore_index + 2), BEYOND, dtype=np.uint8)
    table[first : first + len(classes)] = classes
    table[:first] = IGNORE
    table[ignore_index] = IGNORE
    return table


def to_classes(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Labels converted by a `label_table`, uint8."""
    return table[labels if labels.dtype == np.uint8 else np.clip(labels, -1, len(table) - 1)]


def mask_fault(image: str, size: tuple[int, int], labels: np.ndarray, classes: np.ndarray, table: np.ndarray) -> str:
    """What is wrong with a mask of an image of this size (width, height), by its labels and their classes; or ""."""
    height, width = labels.shape
    if size != (width, height):
        shown = f"{size[0]}x{size[1]} (after any EXIF rotation)"
        return f"{width}x{height} pixels, but {printable(image)} is {shown}: make them equal"
    beyond, pixels = np.unique(labels[classes == BEYOND], return_counts=True)
    if not beyond.size:
        return ""
    more = f" (and {len(beyond) - 1} more such labels)" if len(beyond) > 1 else ""
    return (
        f"label {beyond[0]} in {counted(pixels[0], 'pixel')}{more}, but there are {(table < BEYOND).sum()} classes: "
        "correct it, or see --data.classes, --data.ignore-index and --data.reduce-zero-label"
    )
