"""Augmentation that moves, cuts and copies objects, for small detection datasets: torchvision's transforms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from dualtoken_vit.data.coco import MIN_SIDE

ZOOM = (1.0, 2.0)  # sides of the frame in those of the image; SSD's 4 leaves small objects no pixels
VISIBLE = 0.1  # of an object's mask; one of which pasted objects leave less is dropped

Sample = tuple[tv_tensors.Image, dict[str, Any]]


class Geometric:
    """torchvision's zoom-out, IoU crop and scale jitter of an image and its target, see `DetectionDataset`.

    Afterwards boxes are clipped to the image, and objects with less than `MIN_SIDE` pixels or no mask are dropped.

    Args:
        zoom_out, iou_crop: probabilities of each (SSD, arXiv 1512.02325)
        scale: lowest and highest factor of the scale jitter, which keeps the size of the image by cropping or padding
    """

    def __init__(self, zoom_out: float, iou_crop: float, scale: tuple[float, float]) -> None:
        self.zoom_out, self.iou_crop, self.scale = zoom_out, iou_crop, scale

    def __call__(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        count = len(target["boxes"])
        size = v2.functional.get_size(image)
        crop = self.iou_crop if count and min(size) >= 4 else 0.0  # it looks for a crop with an object
        boxes = torch.cat([target["boxes"], target["crowd"]])  # transforms take one tensor of boxes
        moved = {"boxes": tv_tensors.wrap(boxes, like=target["boxes"])}
        moved |= {key: target[key] for key in ("masks",) if key in target}
        steps = [v2.RandomZoomOut(side_range=ZOOM, p=self.zoom_out), v2.RandomApply([_IoUCrop(count)], crop)]
        if self.scale != (1.0, 1.0):
            steps += [_ScaleJitter(size[::-1], self.scale), v2.RandomCrop(size, pad_if_needed=True)]
        image, moved = v2.Compose(steps)(image, moved)
        boxes = v2.functional.clamp_bounding_boxes(moved["boxes"])
        objects, crowds = (tv_tensors.wrap(part, like=boxes) for part in boxes.split([count, len(boxes) - count]))
        kept, whole = _large(objects), _large(crowds)
        if "masks" in moved:
            kept &= moved["masks"].flatten(1).bool().any(1)
        crowds = tv_tensors.wrap(crowds[whole], like=boxes)
        return image, select(target | moved | {"boxes": objects, "crowd": crowds}, kept)


class _IoUCrop(v2.RandomIoUCrop):
    """torchvision's, where all boxes after the first `objects` are crowd regions: cut by the crop, not dropped.

    A crop is chosen for the objects, and has those whose centres are in it.
    """

    def __init__(self, objects: int) -> None:
        super().__init__()
        self.objects = objects

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = next(each for each in flat_inputs if isinstance(each, tv_tensors.BoundingBoxes))
        objects = tv_tensors.wrap(boxes[: self.objects], like=boxes)
        params = super().make_params([objects if each is boxes else each for each in flat_inputs])
        if params:  # without, the image stays as it is
            inside = params["is_within_crop_area"]
            params["is_within_crop_area"] = torch.cat((inside, inside.new_ones(len(boxes) - self.objects)))
        return params


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, of a (width, height), with masks that stay on their image."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resize(inpt, params["size"])


def resize(inpt: Any, size: Sequence[int]) -> Any:
    """An image, boxes or masks (..., H, W) resized to (height, width).

    Of a mask the pixel whose centre is closest; torchvision rounds down, so that most masks move by half a pixel.
    """
    if not isinstance(inpt, tv_tensors.Mask):
        return v2.functional.resize(inpt, list(size), antialias=True)
    maps = inpt.as_subclass(Tensor).reshape(-1, 1, *inpt.shape[-2:])
    resized = F.interpolate(maps, tuple(size), mode="nearest-exact")
    return tv_tensors.wrap(resized.reshape(*inpt.shape[:-2], *size), like=inpt)


class CopyPaste:
    """Simple copy-paste (Ghiasi et al., arXiv 2012.07177): objects of another image on top of an image with masks.

    A random half of them, at least one, at their own place after a random scale and flip. Objects of which less than
    `VISIBLE` is left are dropped, and boxes follow their masks.

    Args:
        p: probability
        source: any number of samples, without a transform
    """

    def __init__(self, p: float, source: Any) -> None:
        self.p, self.source = p, source
        self.vary: Callable[..., Sample] = Geometric(0.0, 0.0, (0.5, 1.5))
        self.flip = v2.RandomHorizontalFlip(0.5)

    def __call__(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        if torch.rand(()) >= self.p:
            return image, target
        other, objects = self.flip(*self.vary(*self.source[int(torch.randint(len(self.source), ()))]))
        window = v2.RandomCrop(v2.functional.get_size(image), pad_if_needed=True)
        other, objects = window(other, {key: objects[key] for key in ("boxes", "labels", "masks")})
        chosen = torch.rand(len(objects["labels"])) < 0.5
        if len(chosen):
            chosen[torch.randint(len(chosen), ())] = True
        objects = select(objects, chosen & objects["masks"].flatten(1).bool().any(1))
        over = objects["masks"].bool().any(0)
        image = tv_tensors.wrap(torch.where(over, other, image), like=image)
        before = target["masks"].flatten(1).sum(1)
        masks = target["masks"] * ~over
        touched = masks.flatten(1).sum(1) < before
        kept = masks.flatten(1).sum(1) >= (VISIBLE * before).clamp(min=1)
        boxes = target["boxes"].clone()
        boxes[touched & kept] = _tight(masks[touched & kept])
        target = select(target | {"masks": masks, "boxes": boxes}, kept)
        joined = {
            "boxes": tv_tensors.wrap(torch.cat([target["boxes"], _tight(objects["masks"])]), like=target["boxes"]),
            "labels": torch.cat([target["labels"], objects["labels"]]),
            "masks": tv_tensors.Mask(torch.cat([target["masks"], objects["masks"]])),
        }
        return image, select(target | joined, _large(joined["boxes"]))


def select(target: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """A target with these of its objects, (N,) bool."""
    parts = {key: target[key] for key in ("boxes", "labels", "masks") if key in target}
    return target | {key: tv_tensors.wrap(each[kept], like=each) for key, each in parts.items()}


def _large(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).as_subclass(Tensor).amin(1) >= MIN_SIDE


def _tight(masks: Tensor) -> Tensor:
    """The boxes (N, 4) of masks (N, H, W) that are not empty, to the right and lower edges of their last pixels."""
    return masks_to_boxes(masks.as_subclass(Tensor)) + torch.tensor([0, 0, 1, 1])
