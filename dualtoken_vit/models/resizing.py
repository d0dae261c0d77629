"""Images and targets as detectors process them, and detections back in the pixels of the image."""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from dualtoken_vit.models.anchors import Target


def paste_mask(canvas: Tensor, mask: Tensor, box: Sequence[float]) -> None:
    """Paste the mask (1, M, M) of a box x1, y1, x2, y2 into a canvas (1, H, W) bool of the size of the image.

    torchvision's version rounds to whole pixels, which enlarges masks (32x32 becomes 34x34) and costs small objects a
    tenth of their IoU.
    """
    height, width = canvas.shape[1:]
    x1, y1, x2, y2 = box
    left, right = max(floor(x1), 0), min(ceil(x2), width)
    top, bottom = max(floor(y1), 0), min(ceil(y2), height)
    if left < right and top < bottom:
        x = (torch.arange(left, right, device=mask.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
        canvas[:, top:bottom, left:right] = F.grid_sample(mask[None], grid[None], align_corners=False)[0] >= 0.5


class Transform(GeneralizedRCNNTransform):
    """torchvision's transform, which normalises, resizes and pads, with crowd regions and for any aspect ratio.

    See `detectors.build_detector` for the arguments.
    """

    def __init__(
        self, image_size: int, max_size: int, multi_scale: tuple[int, ...], mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__(image_size, max_size, list(mean), list(std))
        self.multi_scale = multi_scale

    def normalize(self, image: Tensor) -> Tensor:
        return image  # after resizing, which commutes with it: images become smaller there

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        old = image.shape[-2:]
        short = self.torch_choice(self.multi_scale) if self.training and self.multi_scale else self.min_size[-1]
        new = self.fit(old, short)
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False, antialias=True)[0]
        if target is not None:
            for key in target.keys() & {"boxes", "crowd"}:
                target[key] = resize_boxes(target[key], old, new)
            if "masks" in target:
                # "nearest" would round down, half a pixel to the right and down at most factors.
                masks = F.interpolate(target["masks"][:, None].float(), new, mode="nearest-exact")
                target["masks"] = masks[:, 0].byte()
        return super().normalize(image), target

    def fit(self, size: Sequence[int], short: int) -> tuple[int, int]:
        """Height and width of an image of this size after resizing to the given short side."""
        scale = min(short / min(size), self.max_size / max(size))
        height, width = (max(1, round(side * scale)) for side in size)  # 0 for a very narrow image
        return height, width

    def padded(self, image: Tensor) -> tuple[int, int]:
        """Height and width of an image in a batch of its own in evaluation, resized and padded.

        In evaluation, only images of the same padded size share a batch: global tokens attend to the whole feature map,
        including padding, so the detections of an image would otherwise depend on the other images.
        """
        height, width = self.fit(image.shape[-2:], self.min_size[-1])
        multiple = self.size_divisible
        return ceil(height / multiple) * multiple, ceil(width / multiple) * multiple

    def usual(self, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Height and width, as by `padded`, of most of the images of these (width, height)."""
        shapes = (torch.empty(1, height, width, device="meta") for width, height in sizes)
        return Counter(map(self.padded, shapes)).most_common(1)[0][0]

    def postprocess(self, result, image_shapes, original_image_sizes) -> list[dict[str, Tensor]]:
        for found, size, original in zip(result, image_shapes, original_image_sizes, strict=False):  # [] in training
            boxes = found["boxes"]
            found["boxes"] = resize_boxes(boxes, size, original)
            if "masks" in found:
                # torchvision crops target masks half a pixel too far right and down (RoIAlign without `aligned`), so
                # the predicted masks have the same offset.
                places = resize_boxes(boxes + 0.5, size, original).tolist()
                masks = torch.zeros(len(boxes), 1, *original, dtype=torch.bool, device=boxes.device)
                for canvas, mask, box in zip(masks, found["masks"], places, strict=True):
                    paste_mask(canvas, mask, box)
                found["masks"] = masks
        return result
