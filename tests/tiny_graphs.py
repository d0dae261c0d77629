"""Untrained detectors, and images, for the tests of graphs and exported files."""

import torch
from torch import nn

from dualtoken_vit import create_detector
from dualtoken_vit.checkpoint import Checkpoint
from dualtoken_vit.deploy.plans import Plan, plan

SHALLOW = {"depths": (1, 1, 1)}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
ONE_STAGE = ["retinanet", "fcos", "ssdlite"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def detector(kind: str, **args):
    """An untrained detector with scores that differ, so that the order of boxes is not chance."""
    torch.manual_seed(0)
    model = create_detector(kind, "dualtoken_vit_tiny", 3, **SHALLOW, **args).eval()
    for name in model.class_layers:
        layer = model.get_submodule(name)
        if kind == "ssdlite" or "box_predictor.cls_score" in name:
            nn.init.normal_(layer.weight, std=0.5 if kind == "ssdlite" else 0.05)
        elif kind != "mask-rcnn":
            nn.init.normal_(layer.weight, std=0.05)
            nn.init.constant_(layer.bias, -2.0)
    return model


def broken(x: torch.Tensor) -> torch.Tensor:
    """The images with one pixel that is NaN."""
    x = x.clone()
    x[..., 40, 50] = torch.nan
    return x


def raw_plan(model) -> Plan:
    """The plan of --raw, by which the file's predictor chooses, too."""
    about = Checkpoint("detection", "", {}, (), {"input_size": (3, 64, 96)}, {}, {}, state_dict={})
    return plan(model, about, None, raw=True, attention=False)
