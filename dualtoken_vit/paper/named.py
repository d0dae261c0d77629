"""The models of `benchmark` by their names: networks, detectors and segmenters of any library, and exported files."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD

from dualtoken_vit.errors import InputError
from dualtoken_vit.files import similar
from dualtoken_vit.models.detectors import DETECTORS, create_detector
from dualtoken_vit.models.segmenters import SEGMENTERS, create_segmenter
from dualtoken_vit.runtime.session import RUNTIMES, ExportedModel, read_description

TORCHVISION_DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)
TORCHVISION_SEGMENTERS = torchvision.models.list_models(module=torchvision.models.segmentation)
CLASSES = 150  # of segmenters
DETECTED = 80  # of detectors


def _timm(name: str, size: tuple[int, int]) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    kwargs: dict[str, Any] = {"img_size": size} if cfg and cfg.fixed_input_size else {}
    return timm.create_model(name, **kwargs)


def _torchvision(name: str, size: tuple[int, int]) -> nn.Module:
    kwargs: dict[str, Any] = {}
    if name in TORCHVISION_SEGMENTERS:
        kwargs = {"weights_backbone": None, "num_classes": CLASSES}
    elif name in TORCHVISION_DETECTORS:
        kwargs = {"weights_backbone": None}
        if not name.startswith("keypoint"):  # of R-CNNs and SSD the background is one more
            kwargs["num_classes"] = DETECTED if name.startswith(("retinanet", "fcos")) else DETECTED + 1
        if not name.startswith("ssd"):  # whose size is fixed
            kwargs |= {"min_size": min(size), "max_size": max(size)}
    elif name in ("googlenet", "inception_v3"):  # with classifiers that only training uses
        kwargs = {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(name, weights=None, **kwargs)


def _detector(kind: str, name: str, size: tuple[int, int]) -> nn.Module:
    name, _, side = name.partition("@")
    short = int(side or min(size))
    return create_detector(kind, name, DETECTED, image_size=short, max_size=round(max(size) * short / min(size)))


def _segmenter(kind: str, name: str, size: tuple[int, int]) -> nn.Module:
    return create_segmenter(kind, name, CLASSES)


class ExportedNetwork(nn.Module):
    """The network of an exported file, on the CPU."""

    def __init__(self, runtime: str, file: str, size: tuple[int, int]):
        super().__init__()
        self.run = ExportedModel(file, runtime, torch.get_num_threads())

    @torch.compiler.disable
    def forward(self, x: Tensor) -> object:
        return self.run(x.numpy())


BUILDERS: dict[str, Callable[[str, tuple[int, int]], nn.Module]] = {
    "": _timm,
    **{kind: partial(_detector, kind) for kind in DETECTORS},
    **{kind: partial(_segmenter, kind) for kind in SEGMENTERS},
    "torchvision": _torchvision,
    **{runtime: partial(ExportedNetwork, runtime) for runtime in RUNTIMES},
}
"""KIND in KIND:NAME -> function that builds NAME for images of (height, width), with random weights."""


def split(name: str) -> tuple[str, str]:
    """The kind, "" for timm's networks, and the name in it: of KIND:NAME, where NAME may be a path with colons."""
    kind, colon, inner = name.partition(":")
    return (kind, inner) if colon else ("", name)


def detects(model: nn.Module) -> bool:
    """Whether this is a detector, compiled or not."""
    return isinstance(getattr(model, "_orig_mod", model), (GeneralizedRCNN, RetinaNet, FCOS, SSD))


def check_models(models: tuple[str, ...], train: bool) -> None:
    if not models:
        raise InputError("models: none given; name one or more timm models")
    for name in models:
        if models.count(name) > 1:
            raise InputError(f"models: {name} is given twice; give it once")
        kind, inner = split(name)
        if kind and kind not in BUILDERS:
            kinds = ", ".join(filter(None, BUILDERS))
            raise InputError(f"models: {name}: {kind!r} is not a kind of model; use one of {kinds}, or a timm name")
        if kind in RUNTIMES:
            read_description(inner)
            if train:
                raise InputError(f"--train: {name} is an exported file, which cannot be trained; leave it out")
            continue
        if kind in DETECTORS and "@" in inner:
            inner, _, side = inner.partition("@")
            if not side.isdecimal() or int(side) < 32:
                raise InputError(f"models: {name}: give the short side of resized images as @320, at least 32 pixels")
        library = torchvision.models if kind == "torchvision" else timm
        names = library.list_models()
        if inner not in names and not (library is timm and timm.is_model(inner)):  # timm also accepts names with a tag
            hint = similar(inner, names) or f"{library.__name__}.list_models() lists them"
            raise InputError(f"models: {kind or 'timm'} has no model {inner!r}; {hint}")
        if train and kind:
            raise InputError(f"models: {name}: only timm names can be trained; remove it, or leave out train")
