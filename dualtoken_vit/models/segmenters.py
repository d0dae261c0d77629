"""DeepLabv3, PSPNet (section 4.3 of the paper) and LR-ASPP with any timm backbone, built from torchvision's layers.

    segmenter = create_segmenter("deeplabv3", "dualtoken_vit_small", num_classes=150)
    logits = segmenter(images)                  # in training {"out": ..., "aux": ...}
    labels = segment(segmenter.eval(), images, SegmentationInput())

Images are (B, C, H, W) in [0, 1], of any size from 32x32; the segmenter normalises them. Logits are
(B, num_classes, H, W) float32; those of the auxiliary head ("aux") exist in training only.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.lraspp import LRASPPHead
from torchvision.ops import Conv2dNormActivation

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import (
    Backbone,
    OverBackbone,
    ceil_div,
    check_finite,
    create_body,
    pretrained_cfg,
    run_alike,
    statistics,
)
from dualtoken_vit.models.layers import is_known
from dualtoken_vit.recipes import SegmentationInput

STRIDE = 8  # to which the last feature map is resized, and that of the finest one that a head takes
AUX_WIDTH = 256
LEAST_SIDE = 32  # of images, in pixels
LOGITS = 2**26  # maximum number of logits at image resolution held at once: 256 MiB, plus a copy


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    same = all(is_known(old == new) for old, new in zip(x.shape[-2:], size, strict=True))
    return x if same else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def enlarge(x: Tensor, factor: float, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, h, w) by `factor` and crop it to `size` at the bottom and right.

    The last cells of a map extend beyond an image whose sides are not multiples of the stride. Resizing the map to the
    size of the image would shift its predictions.
    """
    # Nearly always a whole factor, and sym_max: torch.export can neither round nor compare dynamic sizes.
    whole: Any = int(factor) if factor == int(factor) else factor
    grown = [side * whole if isinstance(whole, int) else round(side * whole) for side in x.shape[-2:]]
    inner: Any = [torch.sym_max(side, least) for side, least in zip(grown, size, strict=True)]
    # Not a slice: torch.export of PyTorch 2.11 does not see that its end is within the map.
    return resize(x, inner).narrow(-2, 0, size[0]).narrow(-1, 0, size[1])


class AtrousPooling(ASPP):
    """DeepLabv3's ASPP (Chen et al., arXiv 1706.05587): rates 1, 12, 24, 36 and image pooling, then a 3x3."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, (12, 24, 36), width)
        self.project = Conv2dNormActivation(5 * width, width, 3)


class Bins(nn.AdaptiveAvgPool2d):
    """Average pooling to parts x parts bins.

    In an exported graph by matrix products, which allow dynamic sizes, and on MPS, where PyTorch pools only sides that
    are multiples of the bins.
    """

    def __init__(self, parts: int):
        super().__init__(parts)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, parts, parts)
        if not torch.compiler.is_exporting() and x.device.type != "mps":
            return super().forward(x)
        rows, columns = (self.means(side, x) for side in x.shape[-2:])
        return rows @ x @ columns.T

    def means(self, side: int, like: Tensor) -> Tensor:
        """(parts, side): the weights of the positions in the mean of each bin; bins start and end as in PyTorch."""
        place, which = (torch.arange(count, device=like.device) for count in (side, self.parts))
        start, end = which * side // self.parts, ((which + 1) * side + self.parts - 1) // self.parts
        inside = (start[:, None] <= place) & (place < end[:, None])
        return inside.to(like.dtype) / (end - start)[:, None]


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling (Zhao et al., arXiv 1612.01105): bins of 1x1, 2x2, 3x3 and 6x6, then a 3x3."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(Bins(parts), Conv2dNormActivation(channels, width, 1)) for parts in (1, 2, 3, 6)
        )
        self.project = Conv2dNormActivation(channels + 4 * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, width, H, W)
        return self.project(torch.cat([x, *(resize(level(x), x.shape[-2:]) for level in self.levels)], dim=1))


def classifier(width: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))


class ContextHead(nn.Sequential):
    """A context module on the last feature map, resized to stride 8, then a classifier."""

    context: ClassVar[type[AtrousPooling] | type[PyramidPooling]]  # (B, channels, H, W) -> (B, width, H, W)
    width = 512
    class_layers = ("1.1",)

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, num_classes: int, dropout: float):
        super().__init__(self.context(channels[-1], width), classifier(width, num_classes, dropout))


class DeepLabHead(ContextHead):
    context = AtrousPooling


class PSPHead(ContextHead):
    context = PyramidPooling


class LiteHead(LRASPPHead):
    """LR-ASPP (Howard et al., arXiv 1905.02244): the last feature map as it is, gated by its mean, and a finer one.

    torchvision's, with dropout, and without the shift by which it resizes a map that extends beyond the image.

    Args:
        channels, strides: of the backbone's feature maps; the first and the last one are used
        width: channels of the last feature map after its projection
        num_classes: number of pixel classes
        dropout: channel dropout rate after the gate
    """

    width = 128
    class_layers = ("low_classifier", "high_classifier")

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, num_classes: int, dropout: float):
        super().__init__(channels[0], channels[-1], num_classes, width)
        self.factor = strides[-1] / strides[0]
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # -> (B, num_classes, H, W) of the low map
        # Classified before it is resized, which is the same and needs fewer operations.
        logits = self.high_classifier(self.dropout(self.cbr(high) * self.scale(high)))
        return self.low_classifier(low) + enlarge(logits, self.factor, low.shape[-2:])


SEGMENTERS: dict[str, type[ContextHead] | type[LiteHead]] = {
    "deeplabv3": DeepLabHead,
    "pspnet": PSPHead,
    "lraspp": LiteHead,
}


class Segmenter(OverBackbone):
    """A head on the last feature map of a timm network, and an auxiliary head on the one before.

    LR-ASPP also takes the finest feature map of stride 8 or more.

    In training mode at first; see the module for its inputs and outputs.

    Args:
        segmenter: "deeplabv3", "pspnet" or "lraspp"
        model: network from timm.create_model
        num_classes: number of pixel classes
        output_stride: 8 or 16 if the network was created with this output stride: the head uses its last feature map as
            it is. None: the map is resized to stride 8, as in the paper, except for LR-ASPP
        width: channels of the head; None: 512, for LR-ASPP 128
        dropout: channel dropout rate before the classifiers
        in_chans: image channels

    Raises:
        InputError: for an unknown segmenter, or a network with fewer than two feature maps or a fixed image size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        segmenter: str,
        model: nn.Module,
        num_classes: int,
        *,
        output_stride: int | None = None,
        width: int | None = None,
        dropout: float = 0.1,
        in_chans: int = 3,
    ):
        super().__init__()
        if segmenter not in SEGMENTERS:
            raise InputError(f"--segmenter {segmenter}: choose one of {', '.join(SEGMENTERS)}")
        cfg, info = pretrained_cfg(model), getattr(model, "feature_info", ())
        if not hasattr(model, "forward_intermediates") or len(info) < 2:
            name = cfg["architecture"]
            raise InputError(f"--model.name {name}: returns no feature maps; a segmenter needs those of two stages")
        kind, indices = SEGMENTERS[segmenter], {len(info) - 2, len(info) - 1}
        self.lite = issubclass(kind, LiteHead)
        if self.lite:
            indices.add(next((i for i, stage in enumerate(info) if stage["reduction"] >= STRIDE), len(info) - 1))
        self.backbone = Backbone(model, sorted(indices), "a segmenter", (70, 99), in_chans)
        self.stride, self.num_classes = None if output_stride or self.lite else STRIDE, num_classes
        channels = self.backbone.feature_info.channels()
        self.head = kind(channels, self.backbone.strides, width or kind.width, num_classes, dropout)
        self.class_layers = (*(f"head.{name}" for name in kind.class_layers), "aux_head.1.1")
        self.aux_head = nn.Sequential(
            Conv2dNormActivation(channels[-2], AUX_WIDTH, 3), classifier(AUX_WIDTH, num_classes, dropout)
        )
        for key, values in statistics(cfg, in_chans).items():  # saved: timm's values for a name may change
            self.register_buffer(key, torch.tensor(values).view(1, -1, 1, 1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:  # (B, C, H, W)
        size = x.shape[-2:]
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps, strides = self.backbone(x), self.backbone.strides
        stride, last = strides[-1], maps[-1]
        if self.lite:
            stride, out = strides[0], self.head(maps[0], last)
        else:
            if self.stride:
                last = enlarge(last, stride / self.stride, [ceil_div(side, self.stride) for side in size])
                stride = self.stride
            out = self.head(last)
        out = enlarge(out.float(), stride, size)
        if not self.training:
            return out
        return {"out": out, "aux": enlarge(self.aux_head(maps[-2]).float(), strides[-2], size)}


def dilated(create: Callable[..., nn.Module], output_stride: int | None) -> nn.Module:
    """What `create` returns, with the given output stride, if any; an InputError if the network lacks it."""
    if not output_stride:
        return create()
    try:
        model = create(output_stride=output_stride)
    except InputError:
        model = create()  # raises if the error has another cause
    info = getattr(model, "feature_info", ())
    if info and info[-1]["reduction"] != output_stride:
        name = pretrained_cfg(model)["architecture"]
        raise InputError(f"--output-stride {output_stride}: {name} does not support it; leave it out")
    return model


def create_segmenter(
    segmenter: str, name: str, num_classes: int, *, output_stride: int | None = None, in_chans: int = 3, **args: Any
) -> Segmenter:
    """A `Segmenter` with a new timm network.

    Args:
        segmenter, num_classes, in_chans: see `Segmenter`
        name: timm model name of the backbone
        output_stride: 8 or 16: dilate the backbone to this stride; None: resize its last feature map to stride 8
        args: `width` and `dropout` of `Segmenter`, and other arguments of timm.create_model (pretrained, ...)

    Raises:
        InputError: as `Segmenter`, and for an unknown network or invalid arguments.
    """
    head = {key: args.pop(key) for key in {"width", "dropout"} & args.keys()}
    model = dilated(partial(create_body, name, in_chans=in_chans, **args), output_stride)
    return Segmenter(segmenter, model, num_classes, output_stride=output_stride, in_chans=in_chans, **head)


def check_windows(view: SegmentationInput) -> None:
    """An InputError for inference settings that would leave pixels without a prediction."""
    if view.window_stride > view.window:
        raise InputError(f"window_stride={view.window_stride}: must be at most the window's {view.window}")
    if not view.scales:
        raise InputError("scales: give one or more")


@torch.inference_mode()
def segment(model: Segmenter, images: Sequence[Tensor], view: SegmentationInput, check: bool = True) -> list[Tensor]:
    """The class of every pixel of images (C, H, W) in [0, 1] of any sizes -> (H, W) int64 each.

    Images of the same size share a forward pass, as many as `LOGITS` allows. Images are never resized to less than 32
    pixels a side.

    Raises:
        InputError: if `check` is set and the network produced NaN or Inf.
    """
    check_windows(view)

    def run(some: list[Tensor]) -> list[Tensor]:
        size = some[0].shape[-2:]
        area = sum(height * width for height, width in _inner(size, view))  # all scales are held at once
        most = max(1, LOGITS // (model.num_classes * max(area, size.numel())))
        batches = (some[start : start + most] for start in range(0, len(some), most))
        return [labels for batch in batches for labels in _classes(model, torch.stack(batch), view, check)]

    return run_alike(run, images, lambda image: image.shape)


def _inner(size: Sequence[int], view: SegmentationInput) -> list[list[int]]:
    """Height and width at which the network processes an image of this size, for each scale."""
    base = view.image_size / min(size) if view.image_size else 1.0
    return [[max(LEAST_SIDE, round(side * base * scale)) for side in size] for scale in view.scales]


def _classes(model: Segmenter, x: Tensor, view: SegmentationInput, check: bool) -> Tensor:  # (B, C, H, W) -> (B, H, W)
    size = x.shape[-2:]
    scores = []  # for each scale, at its size
    for inner in _inner(size, view):
        y = x
        if inner != list(size):
            y = F.interpolate(x, inner, mode="bilinear", align_corners=False, antialias=True)
        found = _scores(model, y, view, check)
        if view.flip:
            found = found + _scores(model, y.flip(-1), view, check).flip(-1)
        scores.append(found)
    # A few classes at a time: the scores of all classes at the size of a large image may not fit into memory.
    step = max(1, LOGITS // (len(x) * size[0] * size[1]))
    best, classes = x.new_full((len(x), *size), -torch.inf), x.new_zeros((len(x), *size), dtype=torch.int64)
    for start in range(0, scores[0].shape[1], step):
        total = reduce(torch.add, (resize(each[:, start : start + step], size) for each in scores))
        highest, which = total.max(1)
        classes = torch.where(highest > best, which + start, classes)
        best = torch.maximum(best, highest)
    return classes


def _scores(model: Segmenter, x: Tensor, view: SegmentationInput, check: bool) -> Tensor:
    """Logits at one scale and orientation; probabilities where several are averaged."""
    logits = _slide(model, x, view) if view.mode == "slide" else model(x)
    if check:
        check_finite(logits)
    return logits.softmax(1) if view.flip or len(view.scales) > 1 else logits


def _slide(model: Segmenter, x: Tensor, view: SegmentationInput) -> Tensor:
    """Logits of windows, averaged where they overlap; the last windows are aligned with the image border."""
    starts = [
        sorted({min(start, max(side - view.window, 0)) for start in range(0, side, view.window_stride)})
        for side in x.shape[-2:]
    ]
    total = x.new_zeros(len(x), model.num_classes, *x.shape[-2:], dtype=torch.float32)
    count = x.new_zeros(x.shape[-2:])
    for top, left in product(*starts):
        place = ..., slice(top, top + view.window), slice(left, left + view.window)
        total[place] += model(x[place])
        count[place] += 1
    return total / count
