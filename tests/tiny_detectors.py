"""The detectors that the tests share, and their targets."""

import torch
from torch import nn

from dualtoken_vit.models.detectors import DETECTORS, create_detector

KINDS = tuple(DETECTORS)


def create(kind, name="dualtoken_vit_tiny_mix", num_classes=3, **kwargs):
    torch.manual_seed(0)
    args = dict(depths=(1, 1, 1)) if name.startswith("dualtoken") else {}
    detector = create_detector(kind, name, num_classes, **{"image_size": 64, **args, **kwargs})
    if kind == "mask-rcnn":  # few regions: quick
        detector.rpn._post_nms_top_n = dict(training=8, testing=8)
        detector.roi_heads.detections_per_img = 4
    return detector


def target(height, width, boxes=(), labels=(), crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    found = dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.int64), masks=masks)
    return found if crowd is None else found | {"crowd": torch.tensor(crowd, dtype=torch.float32)}


# Whole


def confident(kind, **kwargs):
    """A detector as initialised, but for scores above the threshold and few detections."""
    detector = create(kind, **kwargs).eval()
    for name, parameter in (detector.rpn if kind == "mask-rcnn" else detector).head.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return detector
