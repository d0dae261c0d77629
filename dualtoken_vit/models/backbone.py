"""What is asked of a timm network: its size of images, its maps for detectors and segmenters."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from dualtoken_vit.errors import InputError, first_line

__all__ = ["Backbone", "OverBackbone", "check_size", "create_body", "statistics"]

FREED = {"dynamic_img_size": True, "strict_img_size": False}  # arguments that let timm networks take any size


class Backbone(FeatureGetterNet):
    """Some of a timm network's maps, (B, C, H, W) each, the finest first; what lies behind the last is cut off.

    A network that takes only sizes that its last stride divides (HRNet, DLA), or leaves out what is over (ConvNeXt),
    sees zeros at the right and bottom; the places of its maps that lie beyond the image are left out.

    Args:
        model: from timm.create_model, with `forward_intermediates`
        indices: places in the network's `feature_info`
        user: who needs them, for errors
        size: height and width of the image that it is tried with
        in_chans: channels of the images

    Raises:
        InputError: for a network that refuses that image.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int], user: str, size: tuple[int, int], in_chans: int = 3):
        super().__init__(model, out_indices=list(indices))
        self.strides: list[int] = self.feature_info.reduction()
        self.multiple = 1
        """What must divide the sides of what the network sees."""
        try:
            maps = self._try(in_chans, size)
            whole = all(
                places >= -(-side // stride)
                for m, stride in zip(maps, self.strides, strict=True)
                for places, side in zip(m.shape[2:], size, strict=True)
            )
        except (AssertionError, RuntimeError, ValueError) as error:
            whole, reason = False, error
        else:
            reason = None
        if not whole:
            self.multiple = self.strides[-1]
            try:
                maps = self._try(in_chans, size)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise InputError(self._refusal(user, size, first_line(reason or error))) from error
        self.sizes = [tuple(m.shape[2:]) for m in maps]
        """Those of its maps of that image."""
        self.train()

    @torch.no_grad()
    def _try(self, in_chans: int, size: tuple[int, int]) -> list[Tensor]:
        return self.eval()(torch.zeros(1, in_chans, *size))

    def _refusal(self, user: str, size: tuple[int, int], reason: str) -> str:
        known = inspect.signature(type(self.model)).parameters
        freed = next((f"{key}={value}" for key, value in FREED.items() if key in known), "")
        hint = f"; try --model.args {freed}" if freed else ""
        name = self.model.pretrained_cfg["architecture"]
        return (
            f"--model.name {name}: refuses a trial image of {size[0]}x{size[1]} pixels ({reason}); {user} needs a "
            f"network for any size{hint}"
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.multiple == 1:
            return super().forward(x)
        height, width = x.shape[-2:]
        maps = super().forward(F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple)))
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, self.strides, strict=True)]


class OverBackbone:
    """What the tasks need of a network over a `Backbone`, beside its forward."""

    class_layers: tuple[str, ...]
    """Those whose weights belong to single classes."""

    def _inside(self) -> tuple[str, nn.Module]:
        name, backbone = next((n, m) for n, m in self.named_modules() if isinstance(m, Backbone))
        return f"{name}.model", backbone.model

    @property
    def network(self) -> nn.Module:
        """The timm network inside: for `checkpoint.load_weights`, `set_grad_checkpointing`, `pretrained_cfg`."""
        return self._inside()[1]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """timm's layers, for `layer_decay`: those of the network inside, and all else one above them.

        Raises:
            InputError: for a network whose layers timm does not know.
        """
        place, network = self._inside()
        if not hasattr(network, "group_matcher"):
            name = network.pretrained_cfg["architecture"]
            raise InputError(f"--optim.layer-decay: timm does not know the layers of {name}; leave it out")
        layers = group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
        top = max(layers.values()) + 1
        return lambda name: layers.get(name.removeprefix(f"{place}."), top)

    def no_weight_decay(self) -> set[str]:
        """timm's list of parameters that are not decayed (beside biases and norms)."""
        place, network = self._inside()
        return {f"{place}.{name}" for name in getattr(network, "no_weight_decay", set)()}


def statistics(cfg: dict[str, Any], channels: int) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of each channel by which a timm network's images are normalised.

    Args:
        cfg: the network's `pretrained_cfg`
        channels: of the images; where it is not the cfg's number, each has the mean of those
    """
    found = {key: tuple(cfg[key]) for key in ("mean", "std")}
    if channels != len(found["mean"]):
        found = {key: (sum(values) / len(values),) * channels for key, values in found.items()}
    return found


@torch.no_grad()
def check_size(model: nn.Module, in_chans: int, image_size: int) -> None:
    """See whether the network takes images of this size, by timm's record and by trial; leaves it in evaluation mode.

    Raises:
        InputError: if not.
    """
    refusal = f"--data.image-size {image_size} is not a size that {model.pretrained_cfg['architecture']} takes"
    least = max(model.pretrained_cfg.get("min_input_size") or (0,))  # of (C, H, W)
    if image_size < least:
        raise InputError(f"{refusal}: give at least {least}")
    try:
        model.eval()(torch.zeros(1, in_chans, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"{refusal}: {first_line(error)}") from error


def create_body(name: str, **model_args: Any) -> nn.Module:
    """timm's network of that name without a classifier.

    Raises:
        InputError: for an unknown name, or arguments that it refuses.
    """
    try:
        return timm.create_model(name, num_classes=0, **model_args)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise InputError(f"--model.name {name}: {first_line(error)}") from error
