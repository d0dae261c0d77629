"""Image transforms: the augmentation of every task, and timm's evaluation transform for classification."""

from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import chain
from math import floor
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import tv_tensors
from torchvision.transforms import v2

from dualtoken_vit import recipes
from dualtoken_vit.data.images import fitting
from dualtoken_vit.data.masks import IGNORE
from dualtoken_vit.data.objects import CopyPaste, Geometric, resize
from dualtoken_vit.errors import InputError


def train_size(data: recipes.ClassificationData | recipes.MultiLabelData, progress: float) -> int:
    """Side of the training images at the fraction `progress` of a run: progressive resizing in steps of 16 pixels."""
    if data.start_size is None or progress >= 0.8:
        return data.image_size
    grown = max(progress - 0.5, 0) / 0.3
    return min(data.start_size + round((data.image_size - data.start_size) * grown / 16) * 16, data.image_size)


def _posterize(image: Image.Image, bits: int, **how: Any) -> Image.Image:
    """timm's. At its strongest it keeps 0 bits or fewer: a black image, and since Pillow 13 an error."""
    return auto_augment.posterize(image, max(bits, 1), **how)


def classification_train(
    data: recipes.ClassificationData | recipes.MultiLabelData,
    augment: recipes.ClassificationAugment | recipes.MultiLabelAugment,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    progress: float = 0.0,
) -> Callable:
    """timm's training transform: a PIL image to a normalised float tensor (C, S, S), S = train_size(data, progress).

    Alternating flips come before it, from `ImageDataset.alternate_flips`.

    Raises:
        InputError: for an augmentation policy that timm rejects.
    """
    try:
        transform: Any = create_transform(
            train_size(data, progress),
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=0.0 if augment.hflip == "alternate" else augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # None: no jitter
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode="pixel",
            interpolation=data.interpolation,
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError, ValueError) as error:  # the bounds of the other fields are checked before
        raise InputError(
            f"--augment.auto-augment {augment.auto_augment}: not a policy of timm; try rand-m9-n2-mstd0.5"
        ) from error
    for step in transform.transforms:
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's random brightness, contrast, saturation and hue, without its channel permutation."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def classification_eval(data: recipes.ClassificationData, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """timm's evaluation transform: short side to S / crop_pct, centre crop, normalised float tensor (C, S, S)."""
    how: dict[str, Any] = dict(crop_pct=data.crop_pct, interpolation=data.interpolation, mean=mean, std=std)
    check = partial(fitting, short=floor(data.image_size / data.crop_pct))
    return v2.Compose([check, create_transform(data.image_size, **how)])


def detection_train(augment: recipes.DetectionAugment, dataset: Any = None) -> Callable:
    """The training transform of an image and its target. The detector resizes and normalises.

    Args:
        augment: what to do, see its fields
        dataset: a `DetectionDataset` with masks, whose objects are pasted; None: without copy-paste
    """
    values = augment.values()
    steps: list[Callable] = []
    if values.copy_paste > 0 and dataset is not None:
        source = copy(dataset)
        source.transform = None
        steps.append(CopyPaste(values.copy_paste, source))
    if values.zoom_out > 0 or values.iou_crop > 0 or values.scale != (1.0, 1.0):
        steps.append(Geometric(values.zoom_out, values.iou_crop, values.scale))
    steps.append(v2.RandomHorizontalFlip(values.hflip))
    if values.photometric > 0:
        steps.append(PhotometricDistort(p=values.photometric))
    return v2.Compose(steps)


TRIES = 10  # random positions per crop


class RandomScale(v2.Transform):
    """Resize to a random factor of `side` (short side in pixels; None: of the image's own size)."""

    def __init__(self, scale: tuple[float, float], side: int | None) -> None:
        super().__init__()
        self.scale, self.side = scale, side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        factor = torch.empty(()).uniform_(*self.scale).item()
        factor *= self.side / min(height, width) if self.side else 1.0
        return {"size": [max(1, round(side * factor)) for side in (height, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resize(inpt, params["size"])


class CappedCrop(v2.RandomCrop):
    """A random crop at the first of `TRIES` positions where no class covers more than `cap` of the pixels.

    Ignored pixels do not count; a crop of ignored pixels only is tried again. If no position satisfies the cap, the
    last one is used. Smaller images are padded with black, masks with `IGNORE`.
    """

    def __init__(self, size: tuple[int, int], cap: float) -> None:
        super().__init__(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE})
        self.cap = cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(one for one in flat_inputs if isinstance(one, tv_tensors.Mask))
        for _ in range(TRIES):
            params = super().make_params(flat_inputs)
            counts = torch.bincount(self.transform(mask, params).flatten(), minlength=IGNORE + 1)[:IGNORE]
            if 0 < counts.max() <= self.cap * counts.sum():
                break
        return params


def segmentation_train(data: recipes.SegmentationData, augment: recipes.SegmentationAugment) -> Callable:
    """The training transform of an image and its mask, both to the crop size."""
    scale, crop = RandomScale(augment.scale, data.image_size), CappedCrop(data.crop_size, augment.class_cap)
    return v2.Compose([scale, crop, v2.RandomHorizontalFlip(augment.hflip), PhotometricDistort(p=augment.photometric)])
