"""The feature maps that detectors use, from any timm backbone."""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import ssdlite
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import Backbone, pretrained_cfg

CHANNELS = 256  # of every pyramid level of the paper's detectors
T = TypeVar("T")


class Stages(Backbone):
    """Feature maps of a timm network at strides 8, 16, 32, and 4 if it has a stage of that stride.

    A map of stride 4 is used unless `feature_info` places it in the stem: ResNet and PVT have one, DualToken-ViT, whose
    map of stride 4 is inside the stem, does not. BatchNorm statistics are frozen because detection batches are small;
    BatchNorm weights and biases are trained.

    Args:
        model: network from timm.create_model
        finest: smallest stride to return, 4 or 8
        in_chans: image channels

    Raises:
        InputError: for a network without these strides or with a fixed image size.
    """

    def __init__(self, model: nn.Module, finest: int, in_chans: int):
        info = getattr(model, "feature_info", ())
        at = {f["reduction"]: i for i, f in enumerate(info) if not (f["reduction"] == 4 and "stem" in f["module"])}
        name = pretrained_cfg(model)["architecture"]
        if not hasattr(model, "forward_intermediates") or not {8, 16, 32} <= at.keys():
            raise InputError(f"--model.name {name}: has no feature maps of strides 8, 16 and 32; a detector needs them")
        indices = [at[s] for s in (4, 8, 16, 32) if s >= finest and s in at]
        super().__init__(model, indices, "a detector", (64, 96), in_chans)
        if self.sizes != [(64 // s, 96 // s) for s in self.strides]:
            raise InputError(
                f"--model.name {name}: strides {self.strides}, but the feature maps of a 64x96 image are {self.sizes}"
            )

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class Pyramid(nn.Module):
    """A LayerNorm on each feature map of the backbone, then a feature pyramid (Lin et al., arXiv 1612.03144).

    Args:
        body: the backbone
        finest: stride of the finest level, 4 or 8. If the backbone has no stage of stride 4, a 2x2 transposed
            convolution of stride 2 makes this level from the one of stride 8, after its top-down sum (LightViT)
        coarse: torchvision's extra block for the coarser levels
        width: channels of every level

    Returns:
        {name: (B, width, H / stride, W / stride)}, finest first: "0", "1", ..., then the names from `coarse`.
    """

    def __init__(self, body: Stages, finest: int, coarse: nn.Module, width: int = CHANNELS):
        super().__init__()
        self.out_channels = width  # torchvision reads this name
        self.body = body
        channels = body.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(c) for c in channels)
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2) if body.strides[0] > finest else None
        levels = len(channels) + (self.upsample is not None)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(levels))
        for layer in (*self.laterals, *self.outputs, *([self.upsample] if self.upsample is not None else [])):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # as in torchvision
            nn.init.zeros_(layer.bias)
        self.coarse = coarse

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # (B, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = [norm(m) for norm, m in zip(self.norms, self.body(x), strict=True)]
        sums = [lateral(m) for lateral, m in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(sums) - 1)):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], sums[i].shape[-2:])
        if self.upsample is not None:
            sums.insert(0, self.upsample(sums[0]))
        levels = [output(s) for output, s in zip(self.outputs, sums, strict=True)]
        levels, names = self.coarse(levels, maps, [str(i) for i in range(len(levels))])
        return dict(zip(names, levels, strict=True))


def in_float32(run: Callable[[Tensor], T], x: Tensor) -> T:
    """`run(x)` in float32, under autocast too.

    In bfloat16 on the CPU, PyTorch's convolutions of maps one pixel wide return random gradients (seen in 2.14).
    """
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return run(x)
    with torch.autocast(device, enabled=False):
        return run(x.float())


class CoarseLevels(LastLevelP6P7):
    """torchvision's P6 and P7, always from the last feature map of the backbone and in float32.

    torchvision uses P5 instead if the map has as many channels.
    """

    def __init__(self, in_channels: int, width: int = CHANNELS):
        super().__init__(in_channels, width)
        self.use_P5 = False

    def forward(self, levels: list[Tensor], maps: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        coarse = super().forward
        return in_float32(lambda last: coarse(levels, [last], names), maps[-1])


class LiteLevels(nn.Module):
    """The feature maps of the backbone as they are, and three coarser ones by torchvision's blocks of SSDLite.

    Args:
        body: the backbone
        norm: normalisation layer of the blocks, given its channels

    Returns:
        {name: (B, channels of the level, H / stride, W / stride)} for strides 8 to 256.
    """

    def __init__(self, body: Stages, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.body = body
        channels = body.feature_info.channels()
        self.out_channels = [*channels, 512, 256, 256]  # as in torchvision
        pairs = pairwise(self.out_channels[len(channels) - 1 :])
        self.extra = nn.ModuleList(ssdlite._extra_block(*pair, norm) for pair in pairs)
        ssdlite._normal_init(self.extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # (B, 3, H, W)
        levels = list(self.body(x.contiguous(memory_format=torch.channels_last)))
        for block in self.extra:
            levels.append(in_float32(block, levels[-1]))
        return {str(i): level for i, level in enumerate(levels)}
