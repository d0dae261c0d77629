"""RetinaNet and Mask R-CNN with any timm backbone, built on torchvision's (section 4.2 of the paper).

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
from collections.abc import Sequence
from math import ceil, floor
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import Backbone, OverBackbone, create_body, pretrained_cfg, run_alike

__all__ = ["MaskRCNN", "Pyramid", "RetinaNet", "build_detector", "create_detector"]

CHANNELS = 256  # of every pyramid level
ASPECT_RATIOS = (0.5, 1.0, 2.0)
SCORE_THRESHOLD = 0.05
DETECTIONS = 100  # per image
SELECTION: dict[str, Any] = dict(score_thresh=SCORE_THRESHOLD, nms_thresh=0.5, detections_per_img=DETECTIONS)
CROWD_OVERLAP = 0.5  # minimum share of a box's area in a crowd region for the box to belong to it

Target = dict[str, Tensor]


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

    Returns:
        {name: (B, 256, H / stride, W / stride)}, finest first: "0", "1", ..., then the names from `coarse`.
    """

    def __init__(self, body: Stages, finest: int, coarse: nn.Module):
        super().__init__()
        self.out_channels = CHANNELS  # torchvision reads this name
        self.body = body
        channels = body.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(c) for c in channels)
        self.laterals = nn.ModuleList(nn.Conv2d(c, CHANNELS, 1) for c in channels)
        self.upsample = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2) if body.strides[0] > finest else None
        levels = len(channels) + (self.upsample is not None)
        self.outputs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(levels))
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


class Anchors(AnchorGenerator):
    """torchvision's anchors, with the nominal stride of each level and in float32.

    torchvision divides the size of the padded image by that of the level, which is not the stride if the level was
    rounded up. It also makes the anchors in the precision of the maps, which is off by pixels under autocast.
    """

    def __init__(self, strides: tuple[int, ...], sizes: tuple[tuple[int, ...], ...]):
        super().__init__(sizes, (ASPECT_RATIOS,) * len(sizes))
        self.strides = strides

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in maps], [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


def paste_mask(canvas: Tensor, mask: Tensor, box: Sequence[float]) -> None:
    """Paste the mask (1, M, M) of a box x1, y1, x2, y2 into a canvas (1, H, W) bool of the size of the image.

    torchvision's version rounds to whole pixels, which enlarges masks (32x32 becomes 34x34) and costs small objects a
    tenth of their IoU.
    """
    height, width = canvas.shape[1:]
    x1, y1, x2, y2 = box
    left, right = max(floor(x1), 0), min(ceil(x2), width)
    top, bottom = max(floor(y1), 0), min(ceil(y2), height)
    if left < right and top < bottom:
        x = (torch.arange(left, right, device=mask.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
        canvas[:, top:bottom, left:right] = F.grid_sample(mask[None], grid[None], align_corners=False)[0] >= 0.5


class Transform(GeneralizedRCNNTransform):
    """torchvision's transform, which normalises, resizes and pads, with crowd regions and for any aspect ratio.

    See `build_detector` for the arguments.
    """

    def __init__(
        self, image_size: int, max_size: int, multi_scale: tuple[int, ...], mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__(image_size, max_size, list(mean), list(std))
        self.multi_scale = multi_scale

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        old = image.shape[-2:]
        short = self.torch_choice(self.multi_scale) if self.training and self.multi_scale else self.min_size[-1]
        new = self.fit(old, short)
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False, antialias=True)[0]
        if target is not None:
            for key in target.keys() & {"boxes", "crowd"}:
                target[key] = resize_boxes(target[key], old, new)
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), new)[:, 0].byte()
        return image, target

    def fit(self, size: Sequence[int], short: int) -> tuple[int, int]:
        """Height and width of an image of this size after resizing to the given short side."""
        scale = min(short / min(size), self.max_size / max(size))
        height, width = (max(1, round(side * scale)) for side in size)  # 0 for a very narrow image
        return height, width

    def padded(self, image: Tensor) -> tuple[int, int]:
        """Height and width of an image in a batch of its own in evaluation, resized and padded.

        In evaluation, only images of the same padded size share a batch: global tokens attend to the whole feature map,
        including padding, so the detections of an image would otherwise depend on the other images.
        """
        height, width = self.fit(image.shape[-2:], self.min_size[-1])
        multiple = self.size_divisible
        return ceil(height / multiple) * multiple, ceil(width / multiple) * multiple

    def postprocess(self, result, image_shapes, original_image_sizes) -> list[dict[str, Tensor]]:
        for found, size, original in zip(result, image_shapes, original_image_sizes, strict=False):  # [] in training
            boxes = found["boxes"]
            found["boxes"] = resize_boxes(boxes, size, original)
            if "masks" in found:
                # torchvision crops target masks half a pixel too far right and down (RoIAlign without `aligned`), so
                # the predicted masks have the same offset.
                places = resize_boxes(boxes + 0.5, size, original).tolist()
                masks = torch.zeros(len(boxes), 1, *original, dtype=torch.bool, device=boxes.device)
                for canvas, mask, box in zip(masks, found["masks"], places, strict=True):
                    paste_mask(canvas, mask, box)
                found["masks"] = masks
        return result


def in_crowd(boxes: Tensor, target: Target) -> Tensor:
    """Whether each of the boxes (N, 4) belongs to a crowd region of the target -> (N,) bool."""
    crowd = target.get("crowd", boxes.new_empty(0, 4))
    sides = torch.minimum(boxes[:, None, 2:], crowd[:, 2:]) - torch.maximum(boxes[:, None, :2], crowd[:, :2])
    shared = sides.clamp(min=0).prod(2)  # (N, K)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (shared >= CROWD_OVERLAP * area[:, None]).any(1)


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RPN; anchors in crowd regions are excluded from the loss."""

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[Target]):
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & in_crowd(anchor, target)] = -1
        return labels, boxes


class RegionHeads(RoIHeads):
    """torchvision's RoI heads; proposals in crowd regions are excluded from the loss."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals = [self.outside_crowd(p, t) for p, t in zip(proposals, targets, strict=True)]
        detections, losses = super().forward(features, proposals, image_shapes, targets)
        if not any(len(boxes) for boxes in (*proposals, *(t["boxes"] for t in targets))):
            # Only crowd regions: torchvision's mean over no proposals is NaN.
            losses = {name: loss.nan_to_num() for name, loss in losses.items()}
        return detections, losses

    def outside_crowd(self, proposals: Tensor, target: Target) -> Tensor:
        """The proposals (N, 4) that match an object or are outside crowd regions."""
        ignored = in_crowd(proposals, target)
        if len(target["boxes"]):
            overlap = box_iou(proposals, target["boxes"]).amax(1)
            ignored &= overlap < self.proposal_matcher.low_threshold
        return proposals[~ignored]


class CoarseLevels(LastLevelP6P7):
    """torchvision's P6 and P7, always from the last feature map of the backbone and in float32.

    torchvision uses P5 instead if the map has as many channels. In bfloat16 on the CPU, PyTorch's convolutions of maps
    one pixel wide return random gradients (seen in 2.14).
    """

    def __init__(self, in_channels: int):
        super().__init__(in_channels, CHANNELS)
        self.use_P5 = False

    def forward(self, levels: list[Tensor], maps: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        device = levels[-1].device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return super().forward(levels, maps, names)
        with torch.autocast(device, enabled=False):
            return super().forward(levels, [m.float() for m in maps], names)


def to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Forward hook: a head's outputs in float32, under autocast too, for exact boxes, losses and order of scores."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {key: to_float32(module, inputs, value) for key, value in outputs.items()}
    return type(outputs)(to_float32(module, inputs, value) for value in outputs)


class RetinaNet(OverBackbone, retinanet.RetinaNet):
    """RetinaNet (Lin et al., arXiv 1708.02002) on levels of stride 8 to 128.

    P6 is computed from the last feature map of the backbone, P7 from P6. 9 anchors per position, 4 convolutions per
    tower. The losses are "classification" and "bbox_regression".
    """

    class_layers = ("head.classification_head.cls_logits",)
    transform: Transform
    head: retinanet.RetinaNetHead
    proposal_matcher: retinanet.det_utils.Matcher

    def __init__(self, model: nn.Module, num_classes: int, transform: Transform):
        body = Stages(model, 8, len(transform.image_mean))
        sizes = tuple(tuple(int(s * 2 ** (i / 3)) for i in range(3)) for s in (32, 64, 128, 256, 512))
        super().__init__(
            Pyramid(body, 8, CoarseLevels(body.feature_info.channels()[-1])),
            num_classes,
            anchor_generator=Anchors((8, 16, 32, 64, 128), sizes),
            **SELECTION,
        )
        self.transform = transform
        self.head.register_forward_hook(to_float32)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        if self.training:
            return super().forward(images, targets)
        return run_alike(super().forward, images, self.transform.padded)

    def compute_loss(self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]):
        matches = [self.match(a, t) for a, t in zip(anchors, targets, strict=True)]
        return self.head.compute_loss(targets, head_outputs, anchors, matches)

    def match(self, anchors: Tensor, target: Target) -> Tensor:
        """The object index of each anchor (N,), or the matcher's values: -1 for background, -2 for ignored anchors."""
        matcher = self.proposal_matcher
        if len(target["boxes"]):
            matches = matcher(box_iou(target["boxes"], anchors))
        else:
            matches = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        matches[(matches == matcher.BELOW_LOW_THRESHOLD) & in_crowd(anchors, target)] = matcher.BETWEEN_THRESHOLDS
        return matches


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
    roi_heads: RegionHeads

    def __init__(self, model: nn.Module, num_classes: int, transform: Transform, roi_samples: int = 512):
        anchors = Anchors((4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,)))
        proposals = ProposalNetwork(
            anchors,
            RPNHead(CHANNELS, len(ASPECT_RATIOS)),
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
            **SELECTION,
            mask_roi_pool=self.roi_pool(14),
            mask_head=MaskRCNNHeads(CHANNELS, (256,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(256, 256, num_classes + 1),
        )
        for head in (proposals.head, heads.box_predictor, heads.mask_predictor):
            head.register_forward_hook(to_float32)
        super().__init__(
            Pyramid(Stages(model, 4, len(transform.image_mean)), 4, LastLevelMaxPool()), proposals, heads, transform
        )

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


DETECTORS = {"retinanet": RetinaNet, "mask-rcnn": MaskRCNN}


def build_detector(
    detector: str,
    model: nn.Module,
    num_classes: int,
    *,
    image_size: int = 800,
    max_size: int = 1333,
    multi_scale: tuple[int, ...] = (),
    roi_samples: int = 512,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> RetinaNet | MaskRCNN:
    """A detector with a timm network as backbone, in training mode; see the module for its inputs and outputs.

    Args:
        detector: "retinanet" or "mask-rcnn"
        model: network from timm.create_model
        num_classes: number of object classes, without the background
        image_size: short side of the resized images, in pixels
        max_size: maximum long side, which takes precedence
        multi_scale: short sides to choose from at random for each training image; empty: image_size
        roi_samples: Mask R-CNN: proposals sampled per image to train the heads
        mean, std: per image channel; by default those of the network

    Raises:
        InputError: for an unknown detector, or a network without feature maps of strides 8, 16 and 32.
    """
    if detector not in DETECTORS:
        raise InputError(f"--detector {detector}: choose one of {', '.join(DETECTORS)}")
    cfg = pretrained_cfg(model)
    transform = Transform(image_size, max_size, multi_scale, mean or cfg["mean"], std or cfg["std"])
    more = {"roi_samples": roi_samples} if detector == "mask-rcnn" else {}
    return DETECTORS[detector](model, num_classes, transform, **more).to(memory_format=torch.channels_last)


def create_detector(detector: str, name: str, num_classes: int, **args: Any) -> RetinaNet | MaskRCNN:
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
