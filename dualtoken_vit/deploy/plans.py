"""What is exported for each task: the graph, its outputs and sizes, and what the predictor of the file needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dualtoken_vit.checkpoint import Checkpoint
from dualtoken_vit.deploy import graphs
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import ceil_div, check_size, pretrained_cfg
from dualtoken_vit.models.detectors import MaskRCNN
from dualtoken_vit.models.one_stage import DETECTIONS, Dense
from dualtoken_vit.paper.attention import blocks_of

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Plan:
    """How a network is exported."""

    graph: nn.Module
    outputs: tuple[str, ...]
    size: Size
    """The size of the images: the only one, if the graph is `fixed`, else the one to verify at first."""
    fixed: bool = False
    one: bool = False
    """Whether the graph takes one image only."""
    trace: Size = (96, 128)
    """The size of the example that a graph of any size is traced with: no side of a map in it may be 1."""
    about: dict[str, Any] = field(default_factory=dict)
    """For the predictor, in the description of the file."""


def plan(model: nn.Module, checkpoint: Checkpoint, size: Size | None, raw: bool, attention: bool) -> Plan:
    """How to export the network of a checkpoint.

    Args:
        size: height and width of the images; None: as in training
        raw: RetinaNet, FCOS, SSDLite: before the choice of boxes
        attention: DualToken-ViT classifiers: with the attention maps of the last block

    Raises:
        InputError: for a switch or size that the network does not have.
    """
    if raw and not isinstance(model, Dense):
        raise InputError(
            "--raw: only RetinaNet, FCOS and SSDLite have boxes of all anchors as their output; leave it out"
        )
    if attention and checkpoint.task != "classification":
        raise InputError(f"--attention: for classifiers, but this is {checkpoint.task}; leave it out")
    if checkpoint.task not in PLANS:
        raise InputError(f"task {checkpoint.task!r} cannot be exported; {', '.join(PLANS)} can")
    return PLANS[checkpoint.task](model, checkpoint, size, raw, attention)


def _classifier(model: Any, checkpoint: Checkpoint, size: Size | None, raw: bool, attention: bool) -> Plan:
    channels, *trained = checkpoint.preprocessing["input_size"]
    height, width = size = size or (trained[0], trained[1])
    if height != width:
        raise InputError(f"--size {width}x{height}: classifiers take square images; give one side")
    if list(size) != trained:
        check_size(model, channels, height, "--size")
    fixed = bool(pretrained_cfg(model).get("fixed_input_size"))
    mean, std = checkpoint.preprocessing["mean"], checkpoint.preprocessing["std"]
    if not attention:
        return Plan(graphs.Classifier(model, mean, std), ("logits",), size, fixed)
    about = {"attention": list(blocks_of(model, "--attention: the network"))[-1]}
    return Plan(graphs.AttentiveClassifier(model, mean, std), ("logits", "attention"), size, about=about)


def _segmenter(model: Any, checkpoint: Checkpoint, size: Size | None, raw: bool, attention: bool) -> Plan:
    _, height, width = checkpoint.preprocessing["input_size"]
    return Plan(model, ("logits",), size or (height, width))


def _detector(model: Any, checkpoint: Checkpoint, size: Size | None, raw: bool, attention: bool) -> Plan:
    multiple = model.transform.size_divisible
    _, height, width = checkpoint.preprocessing["input_size"]
    height, width = (ceil_div(side, multiple) * multiple for side in size or (height, width))
    if raw:
        about = dict(
            raw=True,
            score_threshold=0.0,
            multiple=multiple,
            anchors=model.anchor_generator.num_anchors_per_location()[0],
            strides=model.anchor_generator.strides,
            candidates=model.topk_candidates,
            nms_threshold=model.nms_thresh,
            detections=DETECTIONS,
        )
        return Plan(graphs.RawGraph(model), ("boxes", "scores"), (height, width), trace=(288, 416), about=about)
    about = {"score_threshold": model.score_thresh}
    if isinstance(model, MaskRCNN):
        graph: nn.Module = graphs.MaskGraph(model)
        outputs: tuple[str, ...] = ("boxes", "scores", "labels", "masks")
    else:
        graph, outputs = graphs.DenseGraph(model), ("boxes", "scores", "labels")
    return Plan(graph, outputs, (height, width), fixed=True, one=True, about=about)


PLANS: dict[str, Callable[[Any, Checkpoint, Size | None, bool, bool], Plan]] = {
    "classification": _classifier,
    "multilabel": _classifier,
    "detection": _detector,
    "segmentation": _segmenter,
}
"""task -> function of the network, its checkpoint and the arguments of `plan`."""
