"""Images as arrays: conversion, resizing and what else of torch the predictors of exported files need, in NumPy."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dualtoken_vit.errors import InputError


def to_array(image: Image.Image) -> np.ndarray:
    """An 8-bit PIL image as (C, H, W) uint8."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def shrink(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (C, H, W) float32 bilinearly with antialiasing, as torch's interpolate, which follows Pillow."""
    if image.shape[1:] == tuple(size):
        return image
    box = size[1], size[0]
    return np.stack([np.asarray(Image.fromarray(each).resize(box, Image.Resampling.BILINEAR)) for each in image])


def sample(x: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Linear interpolation of x along an axis at `places`, in units of its elements, constant outside."""
    places = places.clip(0, x.shape[axis] - 1)
    low = np.floor(places).astype(int)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (places - low).astype(np.float32).reshape(shape)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    return x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight


def resize(x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (..., H, W) bilinearly without antialiasing, as torch's interpolate does by default."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = x.shape[axis]
        if old != new:
            x = sample(x, axis, (np.arange(new) + 0.5) * old / new - 0.5)
    return x


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def check_finite(outputs: np.ndarray) -> np.ndarray:
    if not np.isfinite(outputs).all():
        raise InputError("the network produced NaN or Inf; use another checkpoint")
    return outputs
