"""RetinaNet, Mask R-CNN (section 4.2 of the paper), FCOS and SSDLite with any timm backbone, built on torchvision's.

    detector = create_detector("mask-rcnn", "dualtoken_vit_small_mix", num_classes=80)
    losses = detector(images, targets)          # in training: {name: scalar}, to be summed
    detections = detector.eval()(images)        # one dict per image

Images are a list of (3, H, W) in [0, 1], of any sizes from 32x32. The detector normalises, resizes and pads them.

Targets are one dict per image, in pixels of the original image:
    boxes    (N, 4) float32, x1 y1 x2 y2 with x1 < x2 and y1 < y2
    labels   (N,) int64, from 0 to num_classes - 1
    masks    (N, H, W) bool or uint8; Mask R-CNN only
    crowd    (K, 4), optional: crowd regions. Anchors and proposals that match no object and have half of their area or
             more in one region are excluded from the loss.
N may be 0: an image without objects.

Detections are one dict per image, in pixels of the original image, highest score first, at most `DETECTIONS`:
    boxes    (N, 4) float32, x1 y1 x2 y2
    labels   (N,) int64, from 0 to num_classes - 1
    scores   (N,) float32, above `SCORE_THRESHOLD`
    masks    (N, 1, H, W) bool; Mask R-CNN only
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.anchors import Anchors, Target, in_crowd, weigh
from dualtoken_vit.models.backbone import OverBackbone, check_finite, create_body, pretrained_cfg, run_alike, statistics
from dualtoken_vit.models.one_stage import FCOS, SELECTION, RetinaNet, SSDLite, to_float32
from dualtoken_vit.models.pyramid import CHANNELS, Pyramid, Stages
from dualtoken_vit.models.resizing import Transform


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RPN; anchors in crowd regions are excluded from the loss."""

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[Target]):
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & in_crowd(anchor, target)] = -1
        return labels, boxes


class RegionHeads(RoIHeads):
    """torchvision's RoI heads; proposals in crowd regions are excluded from the loss."""

    labels: Tensor
    """(P,): of the proposals sampled for the loss; 0 is the background."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals = [self.outside_crowd(p, t) for p, t in zip(proposals, targets, strict=True)]
        detections, losses = super().forward(features, proposals, image_shapes, targets)
        if not any(len(boxes) for boxes in (*proposals, *(t["boxes"] for t in targets))):
            # Only crowd regions: torchvision's mean over no proposals is NaN.
            losses = {name: loss.nan_to_num() for name, loss in losses.items()}
        return detections, losses

    def select_training_samples(self, proposals, targets):
        samples = super().select_training_samples(proposals, targets)
        self.labels = torch.cat(samples[2])
        return samples

    def weigh(self, weights: Tensor, predictor: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]):
        """Forward hook of the box predictor: `weights` (classes,) in the classification loss."""
        logits, deltas = outputs
        return (weigh(logits, self.labels, weights), deltas) if self.training else outputs

    def outside_crowd(self, proposals: Tensor, target: Target) -> Tensor:
        """The proposals (N, 4) that match an object or are outside crowd regions."""
        ignored = in_crowd(proposals, target)
        if len(target["boxes"]):
            overlap = box_iou(proposals, target["boxes"]).amax(1)
            ignored &= overlap < self.proposal_matcher.low_threshold
        return proposals[~ignored]


class MaskRCNN(OverBackbone, GeneralizedRCNN):
    """Mask R-CNN (He et al., arXiv 1703.06870) on levels of stride 4 to 64, the last one pooled.

    The box head has 2 fully connected layers (1024), the mask head 4 convolutions. The losses are "loss_objectness" and
    "loss_rpn_box_reg" of the RPN, "loss_classifier", "loss_box_reg" and "loss_mask" of the heads.
    """

    class_layers = (
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    )
    transform: Transform
    rpn: RegionProposalNetwork
    roi_heads: RegionHeads

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        transform: Transform,
        roi_samples: int = 512,
        class_weights: Tensor | None = None,
    ):
        anchors = Anchors((4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,)))
        proposals = ProposalNetwork(
            anchors,
            RPNHead(CHANNELS, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=dict(training=2000, testing=1000),
            post_nms_top_n=dict(training=2000, testing=1000),
            nms_thresh=0.7,
        )
        heads = RegionHeads(
            self.roi_pool(7),
            TwoMLPHead(CHANNELS * 7 * 7, 1024),
            FastRCNNPredictor(1024, num_classes + 1),  # torchvision's class 0 is the background
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            nms_thresh=0.5,
            **SELECTION,
            mask_roi_pool=self.roi_pool(14),
            mask_head=MaskRCNNHeads(CHANNELS, (256,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(256, 256, num_classes + 1),
        )
        super().__init__(
            Pyramid(Stages(model, 4, len(transform.image_mean)), 4, LastLevelMaxPool()), proposals, heads, transform
        )
        for head in self.heads:
            head.register_forward_hook(to_float32)
        if class_weights is not None:
            heads.box_predictor.register_forward_hook(partial(heads.weigh, class_weights))

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs are scores, boxes and masks."""
        return self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor

    @property
    def score_thresh(self) -> float:
        """Minimum score of a detection, under RetinaNet's name for it; the RPN has a threshold of its own."""
        return self.roi_heads.score_thresh

    @score_thresh.setter
    def score_thresh(self, score: float) -> None:
        self.roi_heads.score_thresh = score

    @staticmethod
    def roi_pool(size: int) -> MultiScaleRoIAlign:
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=2)
        # torchvision would infer these from the first batch, wrongly if its images are half padding.
        pool.scales, pool.map_levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32], initLevelMapper(2, 5)
        return pool

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        if self.training:
            return super().forward(images, targets and [{**t, "labels": t["labels"] + 1} for t in targets])
        return [{**d, "labels": d["labels"] - 1} for d in run_alike(super().forward, images, self.transform.padded)]


Detector = RetinaNet | MaskRCNN | FCOS | SSDLite


@contextmanager
def refusing_nan(detector: Detector) -> Iterator[None]:
    """In this context, an InputError where the detector's heads produce NaN or Inf: it would detect nothing there."""

    def check(module: nn.Module, inputs: Any, outputs: Any) -> None:
        for value in tree_leaves(outputs):
            check_finite(value)

    with ExitStack() as stack:
        for head in detector.heads:
            stack.enter_context(head.register_forward_hook(check))
        yield


DETECTORS: dict[str, type[Detector]] = {
    "retinanet": RetinaNet,
    "mask-rcnn": MaskRCNN,
    "fcos": FCOS,
    "ssdlite": SSDLite,
}


def build_detector(
    detector: str,
    model: nn.Module,
    num_classes: int,
    *,
    image_size: int = 800,
    max_size: int = 1333,
    multi_scale: tuple[int, ...] = (),
    roi_samples: int = 512,
    class_weights: Tensor | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Detector:
    """A detector with a timm network as backbone, in training mode; see the module for its inputs and outputs.

    Args:
        detector: "retinanet", "mask-rcnn", "fcos" or "ssdlite"
        model: network from timm.create_model
        num_classes: number of object classes, without the background
        image_size: short side of the resized images, in pixels; SSDLite's default boxes are in proportion to it
        max_size: maximum long side, which takes precedence
        multi_scale: short sides to choose from at random for each training image; empty: image_size
        roi_samples: Mask R-CNN: proposals sampled per image to train the heads
        class_weights: (num_classes,): what the classification loss of the anchors or proposals that match an object of
            each class is multiplied by, as in MMDetection; background has 1. They are in the gradient only: the
            returned losses remain comparable. None: all are 1
        mean, std: per image channel; by default those of the network

    Raises:
        InputError: for an unknown detector, or a network without feature maps of strides 8, 16 and 32.
    """
    if detector not in DETECTORS:
        raise InputError(f"--detector {detector}: choose one of {', '.join(DETECTORS)}")
    cfg = pretrained_cfg(model)
    own = statistics(cfg, getattr(model, "in_chans", len(cfg["mean"])))
    transform = Transform(image_size, max_size, multi_scale, mean or own["mean"], std or own["std"])
    more: dict[str, Any] = {"roi_samples": roi_samples} if detector == "mask-rcnn" else {}
    built = DETECTORS[detector](model, num_classes, transform, class_weights=class_weights, **more)
    return built.to(memory_format=torch.channels_last)


def create_detector(detector: str, name: str, num_classes: int, **args: Any) -> Detector:
    """`build_detector` with a new timm network.

    Args:
        detector, num_classes: see `build_detector`
        name: timm model name of the backbone
        args: other arguments of `build_detector` and of timm.create_model (pretrained, in_chans, drop_path_rate, ...)

    Raises:
        InputError: as `build_detector`, and for an unknown network or invalid arguments.
    """
    own = {key: args.pop(key) for key in inspect.signature(build_detector).parameters.keys() & args.keys()}
    return build_detector(detector, create_body(name, **args), num_classes, **own)
