"""Anchors of detectors, crowd regions, and the weights of classes in the loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert

CROWD_OVERLAP = 0.5  # minimum share of a box's area in a crowd region for the box to belong to it

Target = dict[str, Tensor]


class Anchors(AnchorGenerator):
    """torchvision's anchors, with the nominal stride of each level and in float32.

    torchvision divides the size of the padded image by that of the level, which is not the stride if the level was
    rounded up. It also makes the anchors in the precision of the maps, which is off by pixels under autocast.
    """

    def __init__(
        self,
        strides: tuple[int, ...],
        sizes: tuple[tuple[int, ...], ...],
        ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    ):
        super().__init__(sizes, (ratios,) * len(sizes))
        self.strides = strides

    def grid(self, size: Sequence[int], maps: list[Tensor]) -> list[Tensor]:
        """The anchors (A, 4) of each of the maps of an image of (height, width)."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        return self.grid_anchors([m.shape[-2:] for m in maps], [(s, s) for s in self.strides])

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        return [torch.cat(self.grid(images.tensors.shape[-2:], maps))] * len(images.image_sizes)


class DefaultBoxes(DefaultBoxGenerator):
    """SSD's default boxes: evenly spread over the padded image, but of sizes that do not depend on it.

    torchvision stretches boxes with the image. For a square image of the nominal size, both are the same. The scales
    are those of torchvision's SSD300 for COCO, for levels of stride 8 to 256.

    A level divides the padded image into equal cells, also where its stride does not divide the sides, as at strides of
    128 and more: there the boxes move with the padding, and in training so with the other images of a batch of mixed
    sizes. At stride 256 a centre moves by up to 144 pixels if the padding grows from 320 to 512 pixels. Trained
    networks have learnt these places.

    Args:
        image_size: nominal side of the images, in pixels: 1 in the scales
    """

    strides = ()  # of levels whose best boxes are selected separately: SSD selects from all at once

    def __init__(self, image_size: int):
        super().__init__([[2, 3]] * 6, scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05])
        self.image_size = image_size

    def grid(self, size: Sequence[int], maps: list[Tensor]) -> list[Tensor]:
        """The boxes (A, 4) of all maps of an image of (height, width), as the only element of a list."""
        relative = self._grid_default_boxes([m.shape[-2:] for m in maps], size).to(maps[0].device)
        centres = relative[:, :2] * torch.tensor([size[1], size[0]], device=relative.device)
        return [box_convert(torch.cat((centres, relative[:, 2:] * self.image_size), dim=1), "cxcywh", "xyxy")]

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        return self.grid(images.tensors.shape[-2:], maps) * len(images.image_sizes)


def in_crowd(boxes: Tensor, target: Target) -> Tensor:
    """Whether each of the boxes (N, 4) belongs to a crowd region of the target -> (N,) bool."""
    crowd = target.get("crowd", boxes.new_empty(0, 4))
    sides = torch.minimum(boxes[:, None, 2:], crowd[:, 2:]) - torch.maximum(boxes[:, None, :2], crowd[:, :2])
    shared = sides.clamp(min=0).prod(2)  # (N, K)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (shared >= CROWD_OVERLAP * area[:, None]).any(1)


def ignored(anchors: list[Tensor], targets: list[Target], matches: list[Tensor]) -> Tensor:
    """Whether anchors (A, 4) of each image match no object (A,), -1, but belong to a crowd region -> (B, A) bool."""
    return torch.stack([(m < 0) & in_crowd(a, t) for a, t, m in zip(anchors, targets, matches, strict=True)])


def weigh(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The same logits, whose gradient is multiplied by the weight of the class of their anchor or proposal.

    It is the gradient of the weighted loss with the same normalisers. Values do not change: neither the loss, which
    remains comparable between runs, nor the negatives that SSD finds hardest.

    Args:
        logits: (..., classes), or (..., 1 + classes) with one of the background in front
        labels: (...), indices of logits; -1: background
        weights: (classes,); background has 1
    """
    background = logits.shape[-1] - len(weights)
    scale = F.pad(weights.to(logits), (background, 1), value=1.0)[labels]  # the last one is that of -1
    return logits.detach() + (logits - logits.detach()) * scale[..., None]


def weigh_anchors(logits: Tensor, targets: list[Target], matches: list[Tensor], weights: Tensor | None) -> Tensor:
    """`weigh` for logits (B, A, ...) of anchors that match objects (A,), or none where negative; None: as they are."""
    if weights is None:
        return logits
    pairs = zip(targets, matches, strict=True)
    labels = [F.pad(target["labels"], (0, 1), value=-1)[match.clamp(min=-1)] for target, match in pairs]
    return weigh(logits, torch.stack(labels), weights)
