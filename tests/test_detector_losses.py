"""Losses of the detectors: gradients, crowd regions, weights of classes, torchvision's values."""

import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import KINDS, confident, create, target
from torch import nn
from torchvision.models.detection import MaskRCNN, fcos, retinanet, ssd
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops import box_iou, sigmoid_focal_loss

from dualtoken_vit.models.detectors import create_detector, in_crowd

# Targets and losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets",
    [
        [target(64, 80, [[4, 8, 36, 40]], [2]), target(50, 40)],
        [target(64, 80), target(50, 40)],
        [target(64, 80, crowd=[[0, 0, 80, 64]]), target(50, 40, crowd=[[0, 0, 40, 50]])],
    ],
    ids=["one-empty", "both-empty", "nothing-but-crowd"],
)
def test_loss_and_gradients(kind, targets):
    detector = create(kind)
    copies = [{key: value.clone() for key, value in t.items()} for t in targets]
    losses = detector([torch.rand(3, 64, 80), torch.rand(3, 50, 40)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    gradients = {name: p.grad for name, p in detector.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert gradients["backbone.body.model.token_embed"].abs().sum() > 0
    for before, after in zip(copies, targets, strict=True):  # what was given is as it was
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    if kind == "mask-rcnn" and "crowd" in targets[0]:
        assert losses["loss_classifier"] == losses["loss_box_reg"] == losses["loss_mask"] == 0


CROWD = target(100, 100, [[0, 0, 20, 20]], [1], crowd=[[10, 0, 60, 50], [80, 80, 90, 90]])
ANCHORS = torch.tensor(
    [
        [0, 0, 20, 20],  # the object
        [0, 2, 20, 20],  # matches it (0.9), half in the crowd
        [20, 20, 40, 40],  # in the crowd
        [50, 0, 70, 20],  # half in it
        [51, 0, 71, 20],  # 9 of 20
        [70, 70, 90, 90],  # a quarter, though it holds all of the second crowd
        [30, 60, 50, 80],  # outside
        [10, 0, 30, 12],  # touches the object (120 of 520), in the crowd
    ],
    dtype=torch.float32,
)


def test_anchors_in_a_crowd_are_ignored():
    assert in_crowd(ANCHORS, CROWD).tolist() == [True, True, True, True, False, False, False, True]
    assert in_crowd(ANCHORS, target(100, 100)).tolist() == [False] * 8
    retinanet, mask_rcnn = create("retinanet"), create("mask-rcnn")
    assert retinanet.match(ANCHORS, CROWD).tolist() == [0, 0, -2, -2, -1, -1, -1, -2]
    assert retinanet.match(ANCHORS, CROWD | target(100, 100)).tolist() == [-2, -2, -2, -2, -1, -1, -1, -2]
    labels, boxes = mask_rcnn.rpn.assign_targets_to_anchors([ANCHORS], [CROWD])
    assert labels[0].tolist() == [1, 1, -1, -1, 0, 0, 0, -1]
    assert torch.equal(boxes[0][:2], CROWD["boxes"].expand(2, 4))
    kept = mask_rcnn.roi_heads.outside_crowd(ANCHORS, CROWD)
    assert torch.equal(kept, ANCHORS[[0, 1, 4, 5, 6]])
    assert torch.equal(mask_rcnn.roi_heads.outside_crowd(ANCHORS, CROWD | target(100, 100)), ANCHORS[[4, 5, 6]])


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "ssdlite"])
def test_ignored_anchors_have_no_loss(kind):
    """The same loss whatever the head predicts for what lies in the crowd, another for what lies outside."""
    detector = create(kind)
    crowd, outside = in_crowd(ANCHORS, CROWD), torch.tensor([6])
    outputs = dict(cls_logits=torch.zeros(1, 8, 3), bbox_regression=torch.zeros(1, 8, 4))
    more = []
    if kind == "fcos":
        outputs["bbox_ctrness"] = torch.zeros(1, 8, 1)
        more = [[8]]  # anchors of each level
    if kind == "ssdlite":
        outputs["cls_logits"] = torch.zeros(1, 8, 4)
        more = [[torch.tensor([0, 0, -1, -1, -1, -1, -1, -1])]]  # matches
    loss = lambda: detector.compute_loss([CROWD], outputs, [ANCHORS], *more)["classification"]  # noqa: E731
    base = loss()
    ignored = crowd & (torch.arange(8) >= 2)
    outputs["cls_logits"][:, ignored, -1] = 5
    assert loss() == base
    outputs["cls_logits"][:, outside, -1] = 5
    assert loss() > base + 1


TWINS = {
    "retinanet": (retinanet.RetinaNet, 3, {}),
    "fcos": (fcos.FCOS, 3, {"nms_thresh": 0.6}),
    "ssdlite": (ssd.SSD, 4, {"nms_thresh": 0.55}),
}


@pytest.mark.parametrize("kind", TWINS)
def test_losses_and_detections_are_torchvisions(kind):
    """With the same head on the same feature maps, of an image that is a multiple of all strides."""
    detector = confident(kind, image_size=128).train()
    detector.topk_candidates = 10_000
    cls, classes, args = TWINS[kind]
    args = {**args, "head": detector.head, "score_thresh": 0.05, "detections_per_img": 100, "topk_candidates": 10_000}
    if kind == "ssdlite":
        boxes = DefaultBoxGenerator([[2, 3]] * 6, scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05])
        twin = cls(detector.backbone, boxes, (128, 128), classes, **args)
    else:
        twin = cls(detector.backbone, classes, 128, 128, **args)
    images = [torch.rand(3, 128, 128) for _ in range(2)]
    targets = [
        target(128, 128, [[4, 8, 36, 40], [40, 20, 110, 90]], [2, 0]),
        target(128, 128, [[10, 50, 40, 128]], [1]),
    ]
    shift = classes - 3
    with torch.no_grad():
        losses = detector(images, targets)
        expected = twin(images, [{**t, "labels": t["labels"] + shift} for t in targets])
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
        for found, wanted in zip(detector.eval()(images), twin.eval()(images), strict=True):
            assert len(found["boxes"]) == 100
            assert torch.equal(found["labels"], wanted["labels"] - shift)
            torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["boxes"], wanted["boxes"], rtol=1e-4, atol=1e-3)


def test_mask_rcnn_is_torchvisions():
    """With its own weights, where torchvision's defaults are the settings of the paper."""
    torch.manual_seed(0)
    args = dict(image_size=128, depths=(1, 1, 1), roi_samples=8)
    detector = create_detector("mask-rcnn", "dualtoken_vit_tiny_mix", 3, **args).train()
    for parameter in detector.rpn.head.bbox_pred.parameters():
        nn.init.normal_(parameter, std=0.1)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    sizes = dict(min_size=128, max_size=128, box_batch_size_per_image=8)
    twin = MaskRCNN(detector.backbone, 4, **sizes, rpn_anchor_generator=anchors).train()
    twin.load_state_dict(detector.state_dict())
    images = [torch.rand(3, 128, 128) for _ in range(2)]
    targets = [
        target(128, 128, [[4, 8, 36, 40], [40, 20, 110, 90]], [2, 0]),
        target(128, 128, [[10, 50, 40, 128]], [1]),
    ]
    losses = []
    for model, shift in ((detector, 0), (twin, 1)):
        model.rpn.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)  # of the sampling
        with torch.no_grad():
            losses.append(model(images, [{**t, "labels": t["labels"] + shift} for t in targets]))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for found, wanted in zip(detector.eval()(images), twin.eval()(images), strict=True):
            assert len(found["boxes"]) == 100
            assert torch.equal(found["labels"], wanted["labels"] - 1)
            torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["boxes"], wanted["boxes"], rtol=1e-4, atol=1e-3)


def test_ssdlite_learns_from_images_without_objects():
    """Their three hardest anchors, by the number of positives in the batch."""
    detector = create("ssdlite")
    anchors = detector.anchor_generator.grid((64, 64), [torch.empty(1, 1, 64 // s, 64 // s) for s in (8, 16, 32)] * 2)
    count = len(anchors[0])
    outputs = dict(cls_logits=torch.randn(2, count, 4), bbox_regression=torch.zeros(2, count, 4))
    matches = [torch.full((count,), -1), torch.full((count,), -1)]
    matches[0][:5] = 0
    first = target(64, 64, [[8, 8, 40, 40]], [1])
    losses = detector.compute_loss([first, target(64, 64)], outputs, anchors * 2, matches)["classification"]
    alone = {key: value[:1] for key, value in outputs.items()}
    expected = ssd.SSD.compute_loss(detector, [first], alone, anchors, matches[:1])["classification"]
    background = F.cross_entropy(outputs["cls_logits"][1], torch.zeros(count, dtype=torch.int64), reduction="none")
    expected = expected + background.sort().values[-3:].sum() / 5
    torch.testing.assert_close(losses, expected)


# Weights of classes

WEIGHTS = torch.tensor([0.0, 0.25, 3.0])  # no object of the first class
PAIR = target(100, 100, [[0, 0, 20, 20], [30, 60, 50, 80]], [1, 2], crowd=[[10, 0, 60, 50], [80, 80, 90, 90]])


def dense_loss(kind, class_weights, outputs):
    """The losses of the 24 anchors in an image with two objects, and in one without objects."""
    detector = create(kind, class_weights=class_weights)
    anchors, targets = [ANCHORS.repeat(3, 1)] * 2, [PAIR, target(100, 100)]
    if kind == "retinanet":
        return detector.compute_loss(targets, outputs, anchors)
    matches = [torch.full((24,), -1), torch.full((24,), -1)]
    matches[0][[0, 6]] = torch.tensor([0, 1])
    if kind == "fcos":
        return detector.head.compute_loss(targets, outputs, anchors, matches)
    labels = [{**t, "labels": t["labels"] + 1} for t in targets]
    return detector.compute_loss(labels, outputs, anchors, matches)


def weighted_loss(kind, logits):
    """The same classification loss with weights, written down."""
    crowd = in_crowd(ANCHORS, PAIR).repeat(3)
    labels = torch.full((24,), -1)
    places = [0, 6] if kind != "retinanet" else [k + 8 * copy for k in (0, 1, 6) for copy in range(3)]
    for place in places:
        labels[place] = 2 if place % 8 == 6 else 1
    found, near, scale = labels >= 0, (labels < 0) & ~crowd, torch.where(labels >= 0, WEIGHTS[labels], 1)
    if kind == "ssdlite":  # three negatives for each positive, the hardest
        negatives = [F.cross_entropy(x, torch.zeros(24, dtype=torch.int64), reduction="none") for x in logits]
        positives = F.cross_entropy(logits[0], labels + 1, reduction="none") * scale
        hardest = negatives[0][near].topk(6).values.sum() + negatives[1].topk(3).values.sum()
        return (positives[found].sum() + hardest) / 2
    one_hot = F.one_hot(labels + 1, 4)[:, 1:].float()
    first = (sigmoid_focal_loss(logits[0], one_hot) * scale[:, None])[found | near].sum()
    second = sigmoid_focal_loss(logits[1], torch.zeros(24, 3)).sum()
    return (first / len(places) + second) / 2 if kind == "retinanet" else (first + second) / len(places)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "ssdlite"])
def test_gradients_with_class_weights_are_those_of_the_weighted_loss(kind):
    torch.manual_seed(0)
    outputs = dict(
        cls_logits=torch.randn(2, 24, 3 + (kind == "ssdlite"), requires_grad=True),
        bbox_regression=torch.rand(2, 24, 4, requires_grad=True),
    )
    if kind == "fcos":
        outputs["bbox_ctrness"] = torch.randn(2, 24, 1, requires_grad=True)
    logits, *others = outputs.values()
    losses, plain = dense_loss(kind, WEIGHTS, outputs), dense_loss(kind, None, outputs)
    assert losses == plain  # as they are logged
    (found,) = torch.autograd.grad(losses["classification"], logits, retain_graph=True)
    (expected,) = torch.autograd.grad(weighted_loss(kind, logits), logits)
    torch.testing.assert_close(found, expected)
    (unweighted,) = torch.autograd.grad(plain["classification"], logits, retain_graph=True)
    assert not torch.allclose(found, unweighted)
    del losses["classification"], plain["classification"]
    for one, other in zip(*(torch.autograd.grad(sum(each.values()), others) for each in (losses, plain)), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_mask_rcnn_s_class_scores():
    """All proposals outside crowd regions are sampled, and the objects themselves."""
    torch.manual_seed(0)
    features = {key: torch.rand(1, 256, side, side) for key, side in zip("0123", (25, 13, 7, 4), strict=True)}
    targets, found = [{**PAIR, "labels": PAIR["labels"] + 1}], []
    for weights in (None, WEIGHTS):
        heads = create("mask-rcnn", class_weights=weights).roi_heads
        scores = []
        heads.box_predictor.cls_score.register_forward_hook(lambda module, x, out, scores=scores: scores.append(out))
        losses = heads(features, [ANCHORS], [(100, 100)], targets)[1]
        gradients = torch.autograd.grad(losses["loss_classifier"], scores, retain_graph=True)
        boxes = torch.autograd.grad(losses["loss_box_reg"], heads.box_predictor.bbox_pred.weight)
        found.append((losses, boxes[0], gradients[0], scores[0]))
    (plain, plain_boxes, before, _), (losses, boxes, gradient, logits) = found
    assert losses == plain  # as they are logged
    assert torch.equal(boxes, plain_boxes)
    kept = torch.cat([ANCHORS[[0, 1, 4, 5, 6]], PAIR["boxes"]])
    best, index = box_iou(kept, PAIR["boxes"]).max(1)
    truth = torch.where(best >= 0.5, PAIR["labels"][index] + 1, 0)
    assert truth.tolist() == [2, 2, 0, 0, 3, 2, 3]
    loss = F.cross_entropy(logits, truth, reduction="none") * torch.tensor([1, *WEIGHTS])[truth]
    torch.testing.assert_close(gradient, torch.autograd.grad(loss.mean(), logits)[0])
    assert not torch.allclose(gradient, before)
