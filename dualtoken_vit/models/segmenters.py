"""DeepLabv3 and PSPNet over any timm backbone, from torchvision's parts (section 4.3 of the paper).

    segmenter = create_segmenter("deeplabv3", "dualtoken_vit_small", num_classes=150)
    logits = segmenter(images)                  # in training {"out": ..., "aux": ...}
    labels = segment(segmenter.eval(), images, View())

Images are (B, C, H, W) in [0, 1], of any size from 32x32 up; the segmenter normalises. Logits are
(B, num_classes, H, W) float32, those of the auxiliary head ("aux") in training only.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import Backbone, OverBackbone, create_body, statistics

__all__ = ["SEGMENTERS", "Segmenter", "View", "build_segmenter", "create_segmenter", "segment"]

STRIDE = 8  # that the last map is resized to
AUX_WIDTH = 256
LEAST_SIDE = 32  # of images, in pixels
LOGITS = 2**26  # numbers of scores at the images' size that are held at a time: 256 MiB, and as many again


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    same = tuple(x.shape[-2:]) == tuple(size)
    return x if same else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def enlarge(x: Tensor, factor: float, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, h, w) to `factor` times its size, and keep the first rows and columns: `size`.

    The last places of a map reach beyond an image whose sides their stride does not divide. Resized to the image's
    size, the map would be squeezed, and all that it says shifted.
    """
    inner = [max(round(side * factor), least) for side, least in zip(x.shape[-2:], size, strict=True)]
    return resize(x, inner)[..., : size[0], : size[1]]


def atrous_pooling(channels: int, width: int) -> nn.Module:
    """DeepLabv3's context (Chen et al., arXiv 1706.05587): rates 1, 12, 24, 36 and the whole image, then a 3x3."""
    pool = ASPP(channels, (12, 24, 36), width)
    pool.project = Conv2dNormActivation(5 * width, width, 3)
    return pool


class PyramidPooling(nn.Module):
    """PSPNet's context (Zhao et al., arXiv 1612.01105): means over 1, 4, 9 and 36 parts of the image, then a 3x3."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(parts), Conv2dNormActivation(channels, width, 1))
            for parts in (1, 2, 3, 6)
        )
        self.project = Conv2dNormActivation(channels + 4 * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, width, H, W)
        return self.project(torch.cat([x, *(resize(level(x), x.shape[-2:]) for level in self.levels)], dim=1))


SEGMENTERS = {"deeplabv3": atrous_pooling, "pspnet": PyramidPooling}


def classifier(width: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))


class Segmenter(OverBackbone, nn.Module):
    """The last map of a network under a head, the map before it under an auxiliary one; see `build_segmenter`."""

    class_layers = ("head.1.1", "aux_head.1.1")

    def __init__(
        self,
        context: nn.Module,
        model: nn.Module,
        num_classes: int,
        stride: int | None,
        width: int,
        dropout: float,
        in_chans: int,
    ):
        super().__init__()
        name, info = model.pretrained_cfg["architecture"], getattr(model, "feature_info", ())
        if not hasattr(model, "forward_intermediates") or len(info) < 2:
            raise InputError(f"--model.name {name}: gives no maps of its stages; a segmenter needs the last two")
        self.backbone = Backbone(model, (len(info) - 2, len(info) - 1), "a segmenter", (70, 99), in_chans)
        self.stride, self.num_classes = stride, num_classes
        middle, last = self.backbone.feature_info.channels()
        self.head = nn.Sequential(context(last, width), classifier(width, num_classes, dropout))
        self.aux_head = nn.Sequential(
            Conv2dNormActivation(middle, AUX_WIDTH, 3), classifier(AUX_WIDTH, num_classes, dropout)
        )
        for key, values in statistics(model.pretrained_cfg, in_chans).items():  # saved: a name alone may have others
            self.register_buffer(key, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:  # (B, C, H, W)
        size = x.shape[-2:]
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        middle, last = self.backbone(x)
        middle_stride, stride = self.backbone.strides
        if self.stride:
            last = enlarge(last, stride / self.stride, [-(-side // self.stride) for side in size])
            stride = self.stride
        out = enlarge(self.head(last).float(), stride, size)
        if not self.training:
            return out
        return {"out": out, "aux": enlarge(self.aux_head(middle).float(), middle_stride, size)}


def dilated(create: Callable[..., nn.Module], output_stride: int | None) -> nn.Module:
    """The network that `create` makes, with this output stride if there is one.

    Raises:
        InputError: for a network that cannot have it, and whatever `create` raises without it.
    """
    if not output_stride:
        return create()
    try:
        model = create(output_stride=output_stride)
    except InputError:
        model = create()  # raises what has another cause
    info = getattr(model, "feature_info", ())
    if info and info[-1]["reduction"] != output_stride:
        name = model.pretrained_cfg["architecture"]
        raise InputError(f"--output-stride {output_stride}: {name} cannot be made with it; leave it out")
    return model


def build_segmenter(
    segmenter: str,
    model: nn.Module,
    num_classes: int,
    *,
    output_stride: int | None = None,
    width: int = 512,
    dropout: float = 0.1,
    in_chans: int = 3,
) -> Segmenter:
    """A segmenter over a timm network, in training mode; the module's docstring says what it takes and gives.

    Args:
        segmenter: "deeplabv3" or "pspnet"
        model: of timm.create_model
        num_classes: of pixels
        output_stride: what the network was made with, 8 or 16, if it was: then its last map goes into the head as it
            is, else resized to stride 8, as in the paper
        width: channels of the head
        dropout: rate at which channels are left out before the classifiers, in training
        in_chans: channels of the images

    Raises:
        InputError: for an unknown segmenter, or a network without two maps or for one size of images only.
    """
    if segmenter not in SEGMENTERS:
        raise InputError(f"--segmenter {segmenter}: choose one of {', '.join(SEGMENTERS)}")
    stride = None if output_stride else STRIDE
    built = Segmenter(SEGMENTERS[segmenter], model, num_classes, stride, width, dropout, in_chans)
    return built.to(memory_format=torch.channels_last)


def create_segmenter(
    segmenter: str,
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    output_stride: int | None = None,
    in_chans: int = 3,
    width: int = 512,
    dropout: float = 0.1,
    **model_args: Any,
) -> Segmenter:
    """`build_segmenter` over the timm network of that name.

    Args:
        segmenter: "deeplabv3" or "pspnet"
        name: timm's name of the backbone
        num_classes: of pixels
        pretrained: take timm's weights of the backbone
        output_stride: 8 or 16: make the backbone with this stride, and take its last map as it is; None: resize it
        width: channels of the head
        dropout: rate at which channels are left out before the classifiers, in training
        in_chans: channels of the images
        model_args: other arguments of timm.create_model

    Raises:
        InputError: as `build_segmenter`, and for an unknown network or refused arguments.
    """
    body = partial(create_body, name, pretrained=pretrained, in_chans=in_chans, **model_args)
    head = dict(output_stride=output_stride, width=width, dropout=dropout, in_chans=in_chans)
    return build_segmenter(segmenter, dilated(body, output_stride), num_classes, **head)


@dataclass(frozen=True)
class View:
    """How a trained segmenter looks at an image."""

    image_size: int | None = None
    """Short side that images are resized to, in pixels; None: they stay as they are."""
    mode: Literal["whole", "slide"] = "whole"
    """The whole image at once, or windows over it, whose logits are averaged where they overlap."""
    window: int = 512
    """Side of the windows in pixels."""
    window_stride: int = 341
    """Pixels from one window to the next."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes relative to the first; with several the probabilities are averaged."""
    flip: bool = False
    """Look at the mirror image too."""

    def __post_init__(self) -> None:
        if self.window < LEAST_SIDE:
            raise InputError(f"window={self.window}: must be at least {LEAST_SIDE}")
        if not 0 < self.window_stride <= self.window:
            raise InputError(
                f"window_stride={self.window_stride}: must be at least 1 and at most the window's {self.window}"
            )
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise InputError(f"scales={self.scales}: give one or more numbers between 0.1 and 10")


@torch.inference_mode()
def segment(model: Segmenter, images: Sequence[Tensor], view: View, check: bool = True) -> list[Tensor]:
    """The class of every pixel of images (C, H, W) in [0, 1] of any sizes -> (H, W) int64 each.

    Images of one size go through the network together, as many as `LOGITS` allows. No side is made smaller than 32
    pixels.

    Raises:
        InputError: where the network's answers are not numbers, if that is to be checked.
    """
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        alike[image.shape].append(index)
    labels: dict[int, Tensor] = {}
    for size, indices in alike.items():
        area = sum(height * width for height, width in _inner(size[-2:], view))  # scores of all scales are held at once
        most = max(1, LOGITS // (model.num_classes * max(area, size[1] * size[2])))
        for start in range(0, len(indices), most):
            some = indices[start : start + most]
            found = _classes(model, torch.stack([images[index] for index in some]), view, check)
            labels |= zip(some, found, strict=True)
    return [labels[index] for index in range(len(images))]


def _inner(size: Sequence[int], view: View) -> list[list[int]]:
    """The sizes, one a scale, in which the network sees an image of this size."""
    base = view.image_size / min(size) if view.image_size else 1.0
    return [[max(LEAST_SIDE, round(side * base * scale)) for side in size] for scale in view.scales]


def _classes(model: Segmenter, x: Tensor, view: View, check: bool) -> Tensor:  # (B, C, H, W) -> (B, H, W)
    size = x.shape[-2:]
    scores = []  # of each scale, at its size
    for inner in _inner(size, view):
        y = x
        if inner != list(size):
            y = F.interpolate(x, inner, mode="bilinear", align_corners=False, antialias=True)
        found = _scores(model, y, view, check)
        if view.flip:
            found = found + _scores(model, y.flip(-1), view, check).flip(-1)
        scores.append(found)
    # A few classes at a time: all of a large image's scores at its own size may not fit into memory.
    step = max(1, LOGITS // (len(x) * size[0] * size[1]))
    best, classes = x.new_full((len(x), *size), -torch.inf), x.new_zeros((len(x), *size), dtype=torch.int64)
    for start in range(0, scores[0].shape[1], step):
        total = sum(resize(each[:, start : start + step], size) for each in scores)
        highest, which = total.max(1)
        classes = torch.where(highest > best, which + start, classes)
        best = torch.maximum(best, highest)
    return classes


def _scores(model: Segmenter, x: Tensor, view: View, check: bool) -> Tensor:
    """Logits of one look at an image; probabilities, if it is one of several."""
    logits = _slide(model, x, view) if view.mode == "slide" else model(x)
    if check and not logits.isfinite().all():
        raise InputError("the network answers with what are not numbers; take another checkpoint")
    return logits.softmax(1) if view.flip or len(view.scales) > 1 else logits


def _slide(model: Segmenter, x: Tensor, view: View) -> Tensor:
    """Logits of windows over the image, averaged where they overlap; the last ones end at its border."""
    starts = [
        sorted({min(start, max(side - view.window, 0)) for start in range(0, side, view.window_stride)})
        for side in x.shape[-2:]
    ]
    total, count = 0.0, x.new_zeros(x.shape[-2:])
    for top, left in product(*starts):
        place = ..., slice(top, top + view.window), slice(left, left + view.window)
        logits = model(x[place])
        if isinstance(total, float):
            total = logits.new_zeros(*logits.shape[:2], *x.shape[-2:])
        total[place] += logits
        count[place] += 1
    return total / count
