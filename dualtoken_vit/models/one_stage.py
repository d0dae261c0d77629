"""RetinaNet, FCOS and SSDLite with any timm backbone: torchvision's detectors without proposals.

See `detectors` for their inputs and outputs.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import fcos, retinanet, ssd
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from dualtoken_vit.models.anchors import Anchors, DefaultBoxes, Target, ignored, in_crowd, weigh_anchors
from dualtoken_vit.models.backbone import OverBackbone, run_alike
from dualtoken_vit.models.pyramid import CoarseLevels, LiteLevels, Pyramid, Stages
from dualtoken_vit.models.resizing import Transform

SCORE_THRESHOLD = 0.05
DETECTIONS = 100  # per image
SELECTION: dict[str, Any] = dict(score_thresh=SCORE_THRESHOLD, detections_per_img=DETECTIONS)
STRIDES = (8, 16, 32, 64, 128)
FCOS_WIDTH, FCOS_CONVS = 128, 2  # half of torchvision's, for small machines


def to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Forward hook: a head's outputs in float32, under autocast too, for exact boxes, losses and order of scores."""
    return tree_map(Tensor.float, outputs)


class Dense(OverBackbone):
    """What the detectors of this module share. Each derives from this class and from torchvision's of its name."""

    transform: Transform
    anchor_generator: Any
    head: Any
    box_coder: Any
    topk_candidates: int

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs are scores and boxes."""
        return (self.head,)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        if self.training:
            return super().forward(images, targets)
        return run_alike(super().forward, images, self.transform.padded)

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """The scores (B, A, classes) of all anchors, from the outputs of the head."""
        return outputs["cls_logits"].sigmoid()

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """The boxes (A, 4) of anchors (A, 4), from the head's regression (A, 4)."""
        return self.box_coder.decode_single(deltas, anchors)


class RetinaNet(Dense, retinanet.RetinaNet):
    """RetinaNet (Lin et al., arXiv 1708.02002) on levels of stride 8 to 128.

    P6 is computed from the last feature map of the backbone, P7 from P6. 9 anchors per position, 4 convolutions per
    tower. The losses are "classification" and "bbox_regression".
    """

    class_layers = ("head.classification_head.cls_logits",)
    head: retinanet.RetinaNetHead
    proposal_matcher: retinanet.det_utils.Matcher

    def __init__(self, model: nn.Module, num_classes: int, transform: Transform, class_weights: Tensor | None = None):
        body = Stages(model, 8, len(transform.image_mean))
        sizes = tuple(tuple(int(s * 2 ** (i / 3)) for i in range(3)) for s in (32, 64, 128, 256, 512))
        super().__init__(
            Pyramid(body, 8, CoarseLevels(body.feature_info.channels()[-1])),
            num_classes,
            anchor_generator=Anchors(STRIDES, sizes),
            nms_thresh=0.5,
            **SELECTION,
        )
        self.transform, self.class_weights = transform, class_weights
        self.head.register_forward_hook(to_float32)

    def compute_loss(self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]):
        matches = [self.match(a, t) for a, t in zip(anchors, targets, strict=True)]
        logits = weigh_anchors(head_outputs["cls_logits"], targets, matches, self.class_weights)
        return self.head.compute_loss(targets, {**head_outputs, "cls_logits": logits}, anchors, matches)

    def match(self, anchors: Tensor, target: Target) -> Tensor:
        """The object index of each anchor (N,), or the matcher's values: -1 for background, -2 for ignored anchors."""
        matcher = self.proposal_matcher
        if len(target["boxes"]):
            matches = matcher(box_iou(target["boxes"], anchors))
        else:
            matches = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        matches[(matches == matcher.BELOW_LOW_THRESHOLD) & in_crowd(anchors, target)] = matcher.BETWEEN_THRESHOLDS
        return matches


class FCOSHead(fcos.FCOSHead):
    """torchvision's FCOS head; anchors in crowd regions are excluded from the loss."""

    class_weights: Tensor | None = None

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        crowded = ignored(anchors, targets, matched_idxs)[..., None]
        logits = weigh_anchors(head_outputs["cls_logits"], targets, matched_idxs, self.class_weights)
        logits = logits.masked_fill(crowded, -100.0)  # certainly background: no loss
        return super().compute_loss(targets, {**head_outputs, "cls_logits": logits}, anchors, matched_idxs)


class FCOS(Dense, fcos.FCOS):
    """FCOS (Tian et al., arXiv 2006.09214) on levels of stride 8 to 128: RetinaNet's, with 128 channels.

    One point per position, 2 convolutions per tower. The losses are "classification", "bbox_regression" and
    "bbox_ctrness".
    """

    class_layers = ("head.classification_head.cls_logits",)

    def __init__(self, model: nn.Module, num_classes: int, transform: Transform, class_weights: Tensor | None = None):
        body = Stages(model, 8, len(transform.image_mean))
        super().__init__(
            Pyramid(body, 8, CoarseLevels(body.feature_info.channels()[-1], FCOS_WIDTH), FCOS_WIDTH),
            num_classes,
            anchor_generator=Anchors(STRIDES, tuple((stride,) for stride in STRIDES), (1.0,)),
            head=FCOSHead(FCOS_WIDTH, 1, num_classes, FCOS_CONVS),
            nms_thresh=0.6,
            **SELECTION,
        )
        self.transform = transform
        self.head.class_weights = class_weights
        self.head.register_forward_hook(to_float32)

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return (super().scores(outputs) * outputs["bbox_ctrness"].sigmoid()).sqrt()

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode(deltas, anchors)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation; a map of one position in a batch of one, by the running statistics in training, too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.num_features:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SSDLite(Dense, ssd.SSD):
    """SSDLite (Sandler et al., arXiv 1801.04381) on levels of stride 8 to 256, the three coarsest of its own.

    torchvision's, without the stretching of images to a square, and with a level of stride 8 for small objects. 6
    default boxes per position. Batch normalisation of the head is trained. The losses are "classification" and
    "bbox_regression".
    """

    def __init__(self, model: nn.Module, num_classes: int, transform: Transform, class_weights: Tensor | None = None):
        norm = partial(BatchNorm, eps=0.001, momentum=0.03)  # as in torchvision
        side = transform.min_size[-1]
        boxes = DefaultBoxes(side)
        levels = LiteLevels(Stages(model, 8, len(transform.image_mean)), norm)
        head = SSDLiteHead(levels.out_channels, boxes.num_anchors_per_location(), num_classes + 1, norm)
        super().__init__(
            levels, boxes, (side, side), num_classes + 1, head=head, nms_thresh=0.55, topk_candidates=2000, **SELECTION
        )
        self.transform, self.class_weights = transform, class_weights
        self.head.register_forward_hook(to_float32)
        self.class_layers = tuple(
            f"head.classification_head.module_list.{level}.1" for level in range(len(levels.out_channels))
        )

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        # torchvision's class 0 is the background.
        return super().forward(images, targets and [{**t, "labels": t["labels"] + 1} for t in targets])

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        logits = weigh_anchors(head_outputs["cls_logits"], targets, matched_idxs, self.class_weights)
        background = 100.0 * F.one_hot(logits.new_zeros((), dtype=torch.int64), logits.shape[-1])  # certain: no loss
        logits = torch.where(ignored(anchors, targets, matched_idxs)[..., None], background, logits)
        losses = super().compute_loss(targets, {**head_outputs, "cls_logits": logits}, anchors, matched_idxs)
        empty = [not len(target["boxes"]) for target in targets]
        if any(empty):
            # torchvision trains on 3 negatives for each positive: on none in an image without objects.
            log_shares = logits[empty].log_softmax(-1)[..., 0]
            hardest = log_shares.topk(round(self.neg_to_pos_ratio), largest=False).values
            positives = torch.cat(matched_idxs).ge(0).sum().clamp(min=1)
            losses["classification"] = losses["classification"] - hardest.sum() / positives
        return losses

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].softmax(-1)[..., 1:]

    def postprocess_detections(self, head_outputs, image_anchors, image_shapes) -> list[dict[str, Tensor]]:
        """torchvision's without its loop over the classes; the `topk_candidates` are of all classes."""
        found = []
        for scores, deltas, anchors, size in zip(
            self.scores(head_outputs), head_outputs["bbox_regression"], image_anchors, image_shapes, strict=True
        ):
            anchor, label = (scores > self.score_thresh).nonzero(as_tuple=True)
            best, order = scores[anchor, label].topk(min(self.topk_candidates, len(anchor)))
            anchor, label = anchor[order], label[order]
            boxes = clip_boxes_to_image(self.decode(deltas[anchor], anchors[anchor]), size)
            keep = batched_nms(boxes, best, label, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": boxes[keep], "scores": best[keep], "labels": label[keep]})
        return found
