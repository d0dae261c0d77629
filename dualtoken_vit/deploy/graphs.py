"""The networks as they are exported: one image tensor in, the arrays of one contract out.

Input `image` (B, 3, H, W) is float32 RGB (or grey) in [0, 1]: normalisation is part of the graph. Outputs:

    Classifier            logits (B, classes)
    AttentiveClassifier   the same, and attention (B, H', W', h, w), see `paper.attention`
    a Segmenter itself    logits (B, classes, H, W)
    DenseGraph            boxes (100, 4) in pixels of the input, scores (100,) and labels (100,), the best first, of one
                          image of fixed size; unused rows are -1
    MaskGraph             the same, and masks (100, 1, 28, 28), probabilities within each box
    RawGraph              boxes (B, A, 4), scores (B, A, classes) of all A anchors, before non-maximum suppression

The detectors compute what `models.detectors` does, with outputs of a fixed shape. Where a network produced NaN or Inf,
all scores of DenseGraph and MaskGraph are NaN: the choice of boxes would drop such boxes, as if there were no objects.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from dualtoken_vit.models.detectors import Detector
from dualtoken_vit.models.one_stage import DETECTIONS
from dualtoken_vit.paper.attention import recording

CANDIDATES = 4000
"""Boxes of the box head that reach non-maximum suppression; models.detectors takes all above the score threshold."""

LEAST_LOGIT = -1e4  # of a proposal; a float16, too


class Normalised(nn.Module):
    """Base of the graphs: normalises the image for its network."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def normalise(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class Classifier(Normalised):
    """A timm classifier."""

    def forward(self, image: Tensor) -> Any:
        return self.model(self.normalise(image))


class AttentiveClassifier(Classifier):
    """A DualToken-ViT, with the attention maps of its last block."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with recording(self.model) as maps:
            logits = super().forward(image)
        return logits, list(maps.values())[-1]


class DetectorGraph(Normalised):
    """What the detectors share."""

    model: Any

    def __init__(self, model: Detector):
        super().__init__(model, model.transform.image_mean, model.transform.image_std)

    def features(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The feature maps and their anchors (A, 4), or the anchors of all of them as one (SSDLite)."""
        levels = list(self.model.backbone(self.normalise(image)).values())
        rpn = getattr(self.model, "rpn", self.model)
        return levels, rpn.anchor_generator.grid(image.shape[-2:], levels)


def sound(*outputs: Tensor) -> tuple[Tensor, ...]:
    """Whether all outputs of a head are finite, (), and the outputs; else 0, since the order of NaN is undefined."""
    finite = torch.stack([(each.abs() < torch.inf).all() for each in outputs]).all()
    return finite, *(torch.where(finite, each, 0.0) for each in outputs)


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, least: float, count: int) -> Tensor:
    """Non-maximum suppression within each group: indices (count,) of the best boxes, -1 where there are fewer.

    Boxes (N, 4) whose score (N,) is not above `least` are not chosen. Groups (N,) are kept apart by an offset, as in
    torchvision's `batched_nms`.
    """
    valid = scores > least
    apart = boxes + (groups * (boxes.max() + 1))[:, None]
    # All the others are one box outside, of which only the first is left: suppression is quadratic in what is left.
    apart = torch.where(valid[:, None], apart, apart.new_tensor([-2.0, -2.0, -1.0, -1.0]))
    keep = nms(apart, torch.where(valid, scores, least - 1), threshold)
    found = torch.cat((keep, keep.new_zeros(count)))[torch.arange(count, device=keep.device)]
    return torch.where((torch.arange(count, device=keep.device) < keep.shape[0]) & valid[found], found, -1)


def take(values: Tensor, chosen: Tensor) -> Tensor:
    """The rows of `values` that `suppress` has chosen; -1 for the others."""
    there = (chosen >= 0).view(-1, *(1,) * (values.ndim - 1))
    return torch.where(there, values[chosen.clamp(min=0)], -1)


class DenseGraph(DetectorGraph):
    """A detector of one stage with its non-maximum suppression."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, size = self.model, (image.shape[2], image.shape[3])
        levels, anchors = self.features(image)
        out = model.head(levels)
        finite, *values = sound(*out.values())
        out, counts = dict(zip(out, values, strict=True)), [len(each) for each in anchors]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for each, deltas, level in zip(
            model.scores(out)[0].split(counts), out["bbox_regression"][0].split(counts), anchors, strict=True
        ):
            scores, index = each.flatten().topk(min(model.topk_candidates, each.numel()))
            anchor, label = index // each.shape[1], index % each.shape[1]
            boxes = model.decode(deltas[anchor], level[anchor])
            found.append((clip_boxes_to_image(boxes, size), scores, label))
        boxes, scores, labels = (torch.cat(each) for each in zip(*found, strict=True))
        chosen = suppress(boxes, scores, labels, model.nms_thresh, model.score_thresh, DETECTIONS)
        return take(boxes, chosen), torch.where(finite, take(scores, chosen), torch.nan), take(labels, chosen)


class RawGraph(DetectorGraph):
    """A detector of one stage before the choice of boxes, for images of any size."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        levels, anchors = self.features(image)
        out = self.model.head(levels)
        deltas = out["bbox_regression"]
        boxes = self.model.decode(deltas.flatten(0, 1), torch.cat(anchors).repeat(image.shape[0], 1))
        return boxes.view(deltas.shape), self.model.scores(out)


def indices(there: Tensor) -> Tensor:
    """The indices of what is there (N,) bool, and always 0: not every runtime computes layers of nothing."""
    return torch.where(there | (torch.arange(len(there), device=there.device) == 0))[0]


def put(values: Tensor, index: Tensor, count: int) -> Tensor:
    """`count` rows: `values` at the indices, and 0 in the others."""
    return values.new_zeros(count, *values.shape[1:]).index_put((index,), values)


def pool(align: Any, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """RoIAlign of boxes (N, 4), each on the level that it belongs to."""
    which = align.map_levels([boxes])
    count = boxes.shape[0]  # not len(), an integer that may be unknown
    rois = torch.cat((boxes.new_zeros(count, 1), boxes), 1)
    pooled = boxes.new_zeros(count, levels[0].shape[1], *align.output_size)
    for number, (level, scale) in enumerate(zip(levels, align.scales, strict=False)):
        (index,) = torch.where(which == number)
        found = roi_align(level, rois[index], align.output_size, scale, align.sampling_ratio)
        pooled = pooled.index_put((index,), found)
    return pooled


class MaskGraph(DetectorGraph):
    """A Mask R-CNN."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        levels, anchors = self.features(image)
        size, heads = (image.shape[2], image.shape[3]), self.model.roi_heads
        proposals, there, finite = self.proposals(levels, anchors, size)

        index = indices(there)
        found = heads.box_predictor(heads.box_head(pool(heads.box_roi_pool, levels, proposals[index])))
        finite_boxes, logits, deltas = sound(*found)
        deltas, shares = (put(each, index, len(proposals)) for each in (deltas, logits.softmax(-1)))
        boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, [proposals]), size)[:, 1:]  # without the background
        scores = shares[:, 1:] * there[:, None] * large(boxes, 1e-2)
        scores, index = scores.flatten().topk(min(CANDIDATES, scores.numel()))
        boxes, labels = boxes.flatten(0, 1)[index], index % boxes.shape[1]
        chosen = suppress(boxes, scores, labels, heads.nms_thresh, heads.score_thresh, DETECTIONS)

        index = indices(chosen >= 0)
        best = chosen[index].clamp(min=0)
        masks = heads.mask_predictor(heads.mask_head(pool(heads.mask_roi_pool, levels, boxes[best])))
        finite_masks, masks = sound(masks)
        masks = masks.sigmoid().gather(1, (labels[best] + 1)[:, None, None, None].expand(-1, 1, *masks.shape[2:]))
        scores = torch.where(finite & finite_boxes & finite_masks, take(scores, chosen), torch.nan)
        return take(boxes, chosen), scores, take(labels, chosen), put(masks, index, DETECTIONS)

    def proposals(self, levels: list[Tensor], anchors: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """The RPN's proposals (P, 4), whether each of them is one (P,), and whether its outputs are finite ()."""
        rpn = self.model.rpn
        objectness, deltas = rpn.head(levels)
        finite, scores, deltas = sound(*concat_box_prediction_layers(objectness, deltas))
        boxes = clip_boxes_to_image(rpn.box_coder.decode_single(deltas, torch.cat(anchors)), size)
        most, counts = rpn.pre_nms_top_n(), [len(each) for each in anchors]
        starts = [sum(counts[:level]) for level in range(len(counts))]
        index = torch.cat(
            [
                each.topk(min(most, len(each))).indices + start
                for each, start in zip(scores[:, 0].split(counts), starts, strict=True)
            ]
        )
        level = torch.cat([torch.full((min(most, count),), number) for number, count in enumerate(counts)])
        # By logits, which have the order of torchvision's sigmoid: near 1 that rounds differently in each runtime.
        boxes, scores = boxes[index], scores[index, 0]
        scores = torch.where(large(boxes, rpn.min_size), scores, 2 * LEAST_LOGIT)
        chosen = suppress(boxes, scores, level, rpn.nms_thresh, LEAST_LOGIT, min(rpn.post_nms_top_n(), len(boxes)))
        return boxes[chosen.clamp(min=0)], chosen >= 0, finite


def large(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides of boxes (..., 4) are at least `least`."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)
