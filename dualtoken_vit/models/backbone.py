"""timm networks as backbones: their feature maps for detectors and segmenters, and the image sizes they accept."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from dualtoken_vit.errors import InputError, first_line, lacks_memory

T = TypeVar("T")
REFUSALS = (AssertionError, RuntimeError, ValueError)  # by which timm's networks reject an image or an argument
ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # timm arguments that allow images of any size


def ceil_div(side: int, stride: int) -> int:
    """`side` / `stride`, rounded up. torch.export computes -(-side // stride) wrongly for dynamic sizes."""
    return (side + stride - 1) // stride


def constructor_arguments(network: type[nn.Module]) -> list[str]:
    """Names of a constructor's arguments, including those that it passes to its base classes as **kwargs."""
    parameters = [p for cls in network.__mro__ for p in inspect.signature(cls).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)))


def pretrained_cfg(model: Any) -> dict[str, Any]:
    """timm's description of a network, or of a detector's or segmenter's backbone: architecture, input size, ..."""
    return getattr(model, "network", model).pretrained_cfg


class Backbone(FeatureGetterNet):
    """Feature maps (B, C, H, W) of a timm network, finest first; layers after the last one are pruned.

    Some networks need sides divisible by their last stride (HRNet, DLA) or drop the remainder (ConvNeXt). For these,
    images are zero-padded at the right and bottom, and positions outside the image are cropped from the maps.

    Args:
        model: network from timm.create_model with `forward_intermediates`
        indices: of the maps, in the network's `feature_info`
        user: name of what needs the maps, for error messages
        size: height and width of a trial image
        in_chans: image channels

    Raises:
        InputError: if the network does not accept the trial image.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int], user: str, size: tuple[int, int], in_chans: int = 3):
        super().__init__(model, out_indices=tuple(indices))
        self.strides: list[int] = self.feature_info.reduction()
        reason: Any = None
        for multiple in (1, self.strides[-1]):
            self.multiple = multiple  # images are padded to a multiple of this
            try:
                with torch.no_grad():
                    maps = self.eval()(torch.zeros(1, in_chans, *size))
            except REFUSALS as error:
                if lacks_memory(error):
                    raise
                reason = reason or error
                continue
            self.sizes = [tuple(m.shape[2:]) for m in maps]  # height and width of each map of the trial image
            places = zip(self.sizes, self.strides, strict=True)
            if multiple > 1 or all(h * stride >= size[0] and w * stride >= size[1] for (h, w), stride in places):
                break
        else:
            known = constructor_arguments(type(self.model))
            argument = next((f"{key}={value}" for key, value in ANY_SIZE.items() if key in known), "")
            hint = f"; try --model.args {argument}" if argument else ""
            raise InputError(
                f"--model.name {pretrained_cfg(self.model)['architecture']}: fails on an image of {size[0]}x{size[1]} "
                f"pixels ({first_line(reason)}); {user} needs a network that accepts any image size{hint}"
            ) from reason
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.multiple == 1:
            return super().forward(x)
        height, width = x.shape[-2:]
        bottom, right = (ceil_div(side, self.multiple) * self.multiple - side for side in (height, width))
        maps = super().forward(F.pad(x, (0, right, 0, bottom)))
        return [  # not by slices: see `segmenters.enlarge`
            m.narrow(-2, 0, ceil_div(height, s)).narrow(-1, 0, ceil_div(width, s))
            for m, s in zip(maps, self.strides, strict=True)
        ]


def check_finite(outputs: Tensor) -> None:
    """Raise an InputError where a network's outputs are NaN or Inf."""
    if not (outputs.sum().isfinite() or outputs.isfinite().all()):  # the sum takes a tenth of the time
        raise InputError("the network produced NaN or Inf; use another checkpoint")


class OverBackbone(nn.Module):
    """Base of the models that contain a `Backbone`: what loading weights and building an optimiser need."""

    class_layers: tuple[str, ...]  # layers with weights of their own for each class

    def _inside(self) -> tuple[str, Any]:
        name, backbone = next((n, m) for n, m in self.named_modules() if isinstance(m, Backbone))
        return f"{name}.model", backbone.model

    @property
    def network(self) -> nn.Module:
        """The timm network of the backbone."""
        return self._inside()[1]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer number of each parameter, for `layer_decay`: timm's in the backbone, the next one for all others.

        Raises:
            InputError: for a network without a `group_matcher`.
        """
        place, network = self._inside()
        if not hasattr(network, "group_matcher"):
            name = pretrained_cfg(network)["architecture"]
            raise InputError(f"--optim.layer-decay: timm does not define the layers of {name}; leave it out")
        layers = group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
        top = max(layers.values()) + 1
        return lambda name: layers.get(name.removeprefix(f"{place}."), top)

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters without weight decay, besides biases and normalisation layers."""
        place, network = self._inside()
        return {f"{place}.{name}" for name in getattr(network, "no_weight_decay", set)()}


def layer_names(model: Any, kind: str) -> tuple[str, ...]:
    """Names of the layers of a kind, "first_conv" or "classifier", of a network, a detector or a segmenter."""
    if isinstance(model, OverBackbone):
        place, network = model._inside()
        return model.class_layers if kind == "classifier" else tuple(f"{place}.{x}" for x in layer_names(network, kind))
    names = getattr(model, "pretrained_cfg", {}).get(kind) or ()  # timm's cfgs name one layer, several, or none
    return (names,) if isinstance(names, str) else tuple(names)


def run_alike(
    run: Callable[[list[Tensor]], Sequence[T]], images: Sequence[Tensor], key: Callable[[Tensor], Hashable]
) -> list[T]:
    """The results of `run` for each image, where only images of the same `key` share a call."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        alike[key(image)].append(index)
    found: dict[int, T] = {}
    for indices in alike.values():
        found |= zip(indices, run([images[index] for index in indices]), strict=True)
    return [found[index] for index in range(len(images))]


def statistics(cfg: dict[str, Any], channels: int) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation ("mean", "std") per channel, by which a timm network's images are normalised.

    Args:
        cfg: the network's `pretrained_cfg`
        channels: image channels; if the cfg has another number, each gets the mean over the cfg's channels
    """
    found = {key: tuple(cfg[key]) for key in ("mean", "std")}
    if channels != len(found["mean"]):
        found = {key: (sum(values) / len(values),) * channels for key, values in found.items()}
    return found


@torch.no_grad()
def check_size(model: nn.Module, in_chans: int, image_size: int, flag: str = "--data.image-size") -> None:
    """Run a trial image; an InputError names `flag` if the network refuses it. Leaves it in evaluation mode."""
    cfg = pretrained_cfg(model)
    refusal = f"{flag} {image_size} is not a size that {cfg['architecture']} takes"
    least = max(cfg.get("min_input_size") or (0,))  # of (C, H, W)
    if image_size < least:
        raise InputError(f"{refusal}: give at least {least}")
    try:
        device = next(model.parameters()).device
        model.eval()(torch.zeros(1, in_chans, image_size, image_size, device=device))
    except REFUSALS as error:
        if lacks_memory(error):
            raise
        raise InputError(f"{refusal}: {first_line(error)}") from error


def create_body(name: str, **model_args: Any) -> nn.Module:
    """`timm.create_model` without a classifier; an InputError for an unknown name or invalid arguments."""
    try:
        return timm.create_model(name, num_classes=0, **model_args)
    except (TypeError, OSError, *REFUSALS) as error:
        if lacks_memory(error):
            raise
        raise InputError(f"--model.name {name}: {first_line(error)}") from error
