"""Detectors: structure, counts, targets, losses and detections."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import fcos, retinanet, ssd
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dualtoken_vit.checkpoint import load_weights
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import DETECTORS, RetinaNet, Transform, create_detector, in_crowd
from dualtoken_vit.models.one_stage import BatchNorm
from dualtoken_vit.paper.counting import RULES
from dualtoken_vit.recipes import Optim
from dualtoken_vit.tasks.optim import build_optimizer

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


# The numbers of the paper


def heads(detector, maps):
    """Everything behind the pyramid, with 1000 proposals and 100 detections."""
    if isinstance(detector, RetinaNet):
        return detector.head(maps)
    regions = detector.roi_heads
    detector.rpn.head(maps)
    regions.box_predictor(regions.box_head(maps[0].new_empty(1000, 256, 7, 7)))
    regions.mask_predictor(regions.mask_head(maps[0].new_empty(100, 256, 14, 14)))


@pytest.mark.parametrize(
    ("kind", "name", "params", "flops", "flops_without_attention"),
    [
        ("retinanet", "dualtoken_vit_small", 19.77e6, 174.3e9, 168.8e9),
        ("mask-rcnn", "dualtoken_vit_small_mix", 30.05e6, 196.1e9, 190.6e9),
    ],
)
def test_parameters_and_flops(kind, name, params, flops, flops_without_attention):
    detector = create_detector(kind, name, 80).to("meta").eval().requires_grad_(False)
    # torchvision gives the background a box of its own and a mask, which detectors elsewhere leave out.
    background = 0 if kind == "retinanet" else 4 * 1025 + 257
    background_flops = 0 if kind == "retinanet" else 1000 * 4 * 1024 + 100 * 28 * 28 * 256
    assert sum(p.numel() for p in detector.parameters()) - background == pytest.approx(params, abs=0.005e6)
    for module in detector.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False, custom_mapping=RULES) as counter:
        heads(detector, list(detector.backbone(torch.empty(1, 3, 800, 1280, device="meta")).values()))
    found = sum(n if op in RULES else n / 2 for op, n in counter.get_flop_counts()["Global"].items())
    # Q K^T and the sum over V: 25 x 40 places at stride 32 among themselves, every place over the 49 global tokens.
    stages = zip((2, 6, 6), (64, 128, 256), (100 * 160, 50 * 80, 25 * 40), strict=True)
    attention = sum(depth * 2 * dim * (1000 * 1000 + 49 * places) for depth, dim, places in stages)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 2 == attention
    assert found - background_flops == pytest.approx(flops, abs=0.05e9)
    assert found - background_flops - attention == pytest.approx(flops_without_attention, abs=0.05e9)


# The pyramid


@pytest.mark.parametrize(
    ("name", "stages", "channels"),
    [
        ("dualtoken_vit_small_mix", [8, 16, 32], [64, 128, 256]),
        ("resnet18", [4, 8, 16, 32], [64, 128, 256, 512]),
        ("pvt_v2_b0", [4, 8, 16, 32], [32, 64, 160, 256]),
        ("mobilenetv2_100", [4, 8, 16, 32], [24, 32, 96, 320]),
    ],
)
def test_levels(name, stages, channels):
    model = create("mask-rcnn", name).backbone
    assert (model.body.strides, model.body.feature_info.channels()) == (stages, channels)
    sizes = {key: tuple(m.shape) for key, m in model(torch.rand(1, 3, 128, 192)).items()}
    assert list(sizes) == ["0", "1", "2", "3", "pool"]
    assert list(sizes.values()) == [(1, 256, 128 // s, 192 // s) for s in (4, 8, 16, 32, 64)]
    model = create("retinanet", name).backbone
    assert model.body.feature_info.channels() == channels[-3:]
    sizes = [tuple(m.shape) for m in model(torch.rand(1, 3, 128, 192)).values()]
    assert sizes == [(1, 256, 128 // s, -(-192 // s)) for s in (8, 16, 32, 64, 128)]


def layer_norm(x):  # of weight 1 and bias 0
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()


@torch.no_grad()
def test_pyramid_is_torchvisions():
    pyramid = create("mask-rcnn", "resnet18").backbone.eval()
    reference = FeaturePyramidNetwork([64, 128, 256, 512], 256, LastLevelMaxPool())
    for ours, theirs in ((pyramid.laterals, reference.inner_blocks), (pyramid.outputs, reference.layer_blocks)):
        for source, copy in zip(ours, theirs, strict=True):
            copy[0].load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 64, 96)
    plain = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    plain.load_state_dict(pyramid.body.model.state_dict(), strict=False)
    expected = reference({str(i): layer_norm(m) for i, m in enumerate(plain(x))})
    found = pyramid(x)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_level_of_stride_4_by_transposed_convolution():
    pyramid = create("mask-rcnn").backbone.eval()
    assert pyramid.upsample.weight.shape == (256, 256, 2, 2)
    x = torch.randn(1, 3, 64, 64)
    c3, c4, c5 = (layer_norm(m) for m in pyramid.body(x))
    p5, p4, p3 = pyramid.laterals[2](c5), pyramid.laterals[1](c4), pyramid.laterals[0](c3)
    finest = p3 + F.interpolate(p4 + F.interpolate(p5, scale_factor=2), scale_factor=2)
    up = torch.einsum("bchw,cdij->bdhiwj", finest, pyramid.upsample.weight).reshape(1, 256, 16, 16)
    expected = pyramid.outputs[0](up + pyramid.upsample.bias[:, None, None])
    torch.testing.assert_close(pyramid(x)["0"], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_coarse_levels_come_from_the_last_map_handed_out():
    # Of 256 channels: torchvision would take P5 there.
    pyramid = create("retinanet", "dualtoken_vit_small").backbone.eval()
    x = torch.randn(1, 3, 64, 96)
    p6 = F.conv2d(layer_norm(pyramid.body(x)[-1]), pyramid.coarse.p6.weight, stride=2, padding=1)
    torch.testing.assert_close(pyramid(x)["p6"], p6, rtol=1e-4, atol=1e-4)
    p7 = F.conv2d(p6.relu(), pyramid.coarse.p7.weight, stride=2, padding=1)
    torch.testing.assert_close(pyramid(x)["p7"], p7, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dualtoken_vit_tiny_mix", "mobilenetv2_100"])
def test_statistics_are_frozen_and_everything_is_trained(name):
    detector = create("retinanet", name).eval().train()
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {key: value.clone() for key, value in detector.state_dict().items() if "running" in key}
    assert len(before) == 2 * len(norms) > 0
    sum(detector([torch.rand(3, 64, 64)], [target(64, 64, [[8, 8, 40, 40]], [0])]).values()).backward()
    assert detector.training
    assert not any(norm.training for norm in norms)
    for key, value in before.items():
        assert torch.equal(detector.state_dict()[key], value)
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms)


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


@torch.no_grad()
def test_levels_of_ssdlite():
    levels = create("ssdlite").backbone.eval()
    assert levels.out_channels == [48, 96, 192, 512, 256, 256]
    x = torch.rand(1, 3, 96, 160)
    found = list(levels(x).values())
    sizes = [
        (c, -(-96 // s), -(-160 // s)) for c, s in zip(levels.out_channels, (8, 16, 32, 64, 128, 256), strict=True)
    ]
    assert [tuple(m.shape[1:]) for m in found] == sizes
    for ours, theirs in zip(found[:3], levels.body(x), strict=True):
        assert torch.equal(ours, theirs)
    for block, before, after in zip(levels.extra, found[2:], found[3:], strict=False):
        torch.testing.assert_close(block(before), after)


def test_default_boxes_have_the_same_sizes_in_any_image():
    boxes = create("ssdlite").anchor_generator
    maps = [torch.empty(1, 1, -(-96 // s), -(-160 // s)) for s in (8, 16, 32, 64, 128, 256)]
    (found,) = boxes.grid((96, 160), maps)
    start = 0
    scales = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
    for index, m in enumerate(maps):
        height, width = m.shape[-2:]
        level = found[start : start + 6 * height * width].reshape(height, width, 6, 4)
        start += 6 * height * width
        centres, sides = (level[..., :2] + level[..., 2:]) / 2, level[..., 2:] - level[..., :2]
        x, y = (torch.arange(width) + 0.5) * 160 / width, (torch.arange(height) + 0.5) * 96 / height
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None].expand(-1, -1, 6, -1)
        torch.testing.assert_close(centres, grid)
        scale, middle = scales[index], (scales[index] * scales[index + 1]) ** 0.5
        pairs = [(scale, scale), (middle, middle)]
        for ratio in (2**0.5, 3**0.5):
            pairs += [(scale * ratio, scale / ratio), (scale / ratio, scale * ratio)]
        expected = 64 * torch.tensor(pairs).clamp(max=1)
        torch.testing.assert_close(sides, expected.expand(height, width, 6, 2))
    assert start == len(found)


def test_a_single_position_is_normalised_by_the_running_statistics():
    norm = BatchNorm(4)
    norm.running_mean.uniform_(), norm.running_var.uniform_(1, 2)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x)[0, :, 0, 0], (x[0, :, 0, 0] - mean) / (var + norm.eps).sqrt())
    assert torch.equal(norm.running_mean, mean)
    norm(torch.randn(2, 4, 1, 1))
    assert not torch.equal(norm.running_mean, mean)
    losses = create("ssdlite", image_size=32)([torch.rand(3, 32, 32)], [target(32, 32, [[4, 4, 20, 20]], [0])])
    assert sum(losses.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_resizing(kind):
    """Short side, long side, and what goes with the image, masks and crowds among it."""
    transform = create(kind, multi_scale=(32, 48, 96), max_size=120).transform
    given = target(40, 50, [[5, 10, 30, 20]], [0], crowd=[[0, 20, 50, 40]])
    seen = set()
    for _ in range(20):
        images, (found,) = transform([torch.zeros(3, 40, 50)], [given])
        (height, width), scale = images.image_sizes[0], images.image_sizes[0][0] / 40
        seen.add(height)
        ratio = torch.tensor([width / 50, height / 40] * 2)
        torch.testing.assert_close(found["boxes"], given["boxes"] * ratio)
        torch.testing.assert_close(found["crowd"], given["crowd"] * ratio)
        assert found["masks"].shape == (1, height, width)
        assert found["masks"].sum() == pytest.approx(250 * scale**2, rel=0.15)
    assert seen == {32, 48, 96}
    images, _ = transform.eval()([torch.zeros(3, 40, 50), torch.zeros(3, 200, 40), torch.full((3, 64, 64), 0.5)])
    assert images.image_sizes == [(64, 80), (120, 24), (64, 64)]
    assert images.tensors.shape == (3, 3, 128, 96)  # padded to the strides
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images.tensors[2, :, 0, 0], expected)
    assert images.tensors[1, :, :, 24:].abs().max() == 0


def test_anchors():
    anchors = create("retinanet").anchor_generator
    maps = [torch.empty(1, 256, -(-96 // s), -(-160 // s), dtype=torch.bfloat16) for s in (8, 16, 32, 64, 128)]
    boxes = anchors(ImageList(torch.empty(2, 3, 96, 160), [(90, 150), (96, 160)]), maps)
    assert len(boxes) == 2
    assert boxes[0].dtype == torch.float32
    boxes = [b.reshape(-1, 9, 4) for b in boxes[0].split([9 * m.shape[2] * m.shape[3] for m in maps])]
    for level, stride, size in zip(boxes, (8, 16, 32, 64, 128), (32, 64, 128, 256, 512), strict=True):
        centres = (level[:, 0, :2] + level[:, 0, 2:]) / 2
        width = -(-160 // stride)
        expected = [[stride * (i % width), stride * (i // width)] for i in range(len(level))]
        assert centres.tolist() == expected
        sides = (level[0, :, 2:] - level[0, :, :2]).prod(1).sqrt().reshape(3, 3)  # ratios, sizes
        expected = torch.tensor([size * 2 ** (i / 3) for i in range(3)]).expand(3, 3)
        torch.testing.assert_close(sides, expected, rtol=0.04, atol=0)
        ratios = ((level[0, :, 3] - level[0, :, 1]) / (level[0, :, 2] - level[0, :, 0])).reshape(3, 3)
        torch.testing.assert_close(ratios, torch.tensor([[0.5], [1.0], [2.0]]).expand(3, 3), rtol=0.06, atol=0)


# Targets and detections agree: heads that say what the targets are lose nothing and give the targets back.

IMAGES = [torch.rand(3, 64, 80), torch.rand(3, 100, 50)]
TRUTH = [
    target(64, 80, [[4, 8, 36, 40], [40, 20, 76, 60]], [2, 0]),
    target(100, 50, [[10, 50, 40, 90]], [1]),
]


def check_detections(detections):
    for found, truth in zip(detections, TRUTH, strict=True):
        order = found["labels"].argsort(descending=True)
        wanted = truth["labels"].argsort(descending=True)
        assert found["labels"][order].tolist() == truth["labels"][wanted].tolist()
        torch.testing.assert_close(found["boxes"][order], truth["boxes"][wanted], rtol=0, atol=1e-3)
        assert (found["scores"] > 0.99).all()


def perfect_retinanet(detector):
    def head(maps):
        images, targets = detector.transform(IMAGES, TRUTH)
        anchors = detector.anchor_generator(images, maps)
        logits = torch.full((2, len(anchors[0]), 3), -20.0)
        deltas = torch.zeros(2, len(anchors[0]), 4)
        for i, (boxes, truth) in enumerate(zip(anchors, targets, strict=True)):
            match = detector.match(boxes, truth)
            (found,) = (match >= 0).nonzero(as_tuple=True)
            logits[i, found, truth["labels"][match[found]]] = 20.0
            deltas[i, found] = detector.box_coder.encode_single(truth["boxes"][match[found]], boxes[found])
        return dict(cls_logits=logits, bbox_regression=deltas)

    return head


def test_retinanet_decodes_what_it_encodes(monkeypatch):
    detector = create("retinanet")
    detector.transform.size_divisible = 128  # so that both images go in together
    monkeypatch.setattr(detector.head, "forward", perfect_retinanet(detector))
    losses = detector(IMAGES, TRUTH)
    assert sum(losses.values()) < 1e-5
    with torch.no_grad():
        check_detections(detector.eval()(IMAGES))


def test_mask_rcnn_decodes_what_it_encodes(monkeypatch):
    detector = create("mask-rcnn")
    detector.transform.size_divisible = 128  # so that both images go in together
    regions = detector.roi_heads
    seen = {}

    def propose(images, maps, targets=None):
        """Proposals beside the objects."""
        truths = detector.transform(IMAGES, TRUTH)[1]
        seen["images"], seen["truths"] = images, truths
        return [t["boxes"] + torch.tensor([2.0, -1.0, 1.0, 2.0]) for t in truths], {}

    def pool(maps, boxes, sizes):
        """Each region's image, class (0 is the background) and object, instead of features."""
        seen["boxes"] = boxes
        seen["match"] = [
            (((b[:, None] - t["boxes"]).abs().sum(2)).argmin(1), t) for b, t in zip(boxes, seen["truths"], strict=True)
        ]
        return torch.cat(boxes)

    def predict_boxes(_):
        labels = torch.cat([t["labels"][match] + 1 for match, t in seen["match"]])
        logits = 20.0 * F.one_hot(labels, 4)
        deltas = regions.box_coder.encode([t["boxes"][match] for match, t in seen["match"]], seen["boxes"])
        return logits, torch.cat(deltas).repeat(1, 4)

    def predict_masks(_):
        """torchvision's own targets, in the class's channel alone."""
        wanted = [
            project_masks_on_boxes(t["masks"], boxes, match, 28)
            for boxes, (match, t) in zip(seen["boxes"], seen["match"], strict=True)
        ]
        labels = torch.cat([t["labels"][match] + 1 for match, t in seen["match"]])
        return torch.cat(wanted).logit(1e-8)[:, None] * F.one_hot(labels, 4)[..., None, None]

    monkeypatch.setattr(detector.rpn, "forward", propose)
    for name, forward in (
        ("box_roi_pool", pool),
        ("mask_roi_pool", pool),
        ("box_head", lambda x: x),
        ("mask_head", lambda x: x),
        ("box_predictor", predict_boxes),
        ("mask_predictor", predict_masks),
    ):
        monkeypatch.setattr(getattr(regions, name), "forward", forward)
    losses = detector(IMAGES, TRUTH)
    assert losses["loss_classifier"] < 1e-5
    assert losses["loss_box_reg"] < 1e-5
    with torch.no_grad():
        detections = detector.eval()(IMAGES)
    check_detections(detections)
    for found, image in zip(detections, IMAGES, strict=True):
        assert found["masks"].dtype == torch.bool
        assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])
        for mask, (x1, y1, x2, y2) in zip(found["masks"][:, 0], found["boxes"].round().int().tolist(), strict=True):
            box = torch.zeros_like(mask)
            box[y1:y2, x1:x2] = True
            assert (mask & box).sum() / (mask | box).sum() > 0.93  # the last row and column are half out of the target


def test_masks_come_back_as_they_were():
    """Cut out for the loss by torchvision and pasted again, ellipses are where they were (by its own way: 0.91)."""
    y, x = torch.meshgrid(torch.arange(90.0) + 0.5, torch.arange(120.0) + 0.5, indexing="ij")
    for cx, cy, rx, ry in ((40, 50, 12, 9), (70.3, 40.6, 30, 25), (20.4, 30.2, 8, 20), (110, 80, 25, 25)):
        ellipse = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        for size in (90, 180):
            transform = Transform(size, 1333, (), (0, 0, 0), (1, 1, 1)).eval()
            box = torch.tensor([[cx - rx, cy - ry, min(cx + rx, 120), min(cy + ry, 90)]])
            images, (t,) = transform([torch.zeros(3, 90, 120)], [dict(boxes=box, masks=ellipse[None])])
            small = project_masks_on_boxes(t["masks"], t["boxes"], torch.tensor([0]), 28)[:, None]
            (found,) = transform.postprocess([dict(boxes=t["boxes"], masks=small)], images.image_sizes, [(90, 120)])
            mask = found["masks"][0, 0]
            assert (mask & ellipse).sum() / (mask | ellipse).sum() > 0.95, (cx, size)


def test_the_narrowest_image():
    transform = create("retinanet", image_size=64, max_size=96).transform.eval()
    images, _ = transform([torch.zeros(3, 1, 200), torch.zeros(3, 2000, 1)])
    assert images.image_sizes == [(1, 96), (96, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_grey_images_and_statistics_of_one_s_own(kind):
    detector = create(kind, in_chans=1, mean=(0.25,), std=(0.5,)).eval()
    images, _ = detector.transform([torch.full((1, 64, 64), 0.75)])
    assert images.tensors.shape == (1, 1, 64, 64)
    assert images.tensors.unique().tolist() == [1.0]
    with torch.no_grad():
        (found,) = detector([torch.rand(1, 64, 80)])
    assert found["boxes"].shape[1] == 4


def test_layer_decay_reaches_into_the_backbone():
    detector = create("retinanet")
    groups = build_optimizer(detector, Optim(lr=1.0, layer_decay=0.5)).param_groups
    names = {id(p): name for name, p in detector.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    inside = "backbone.body.model."
    assert rates["head.classification_head.cls_logits.weight"] == 1
    assert rates["backbone.laterals.0.weight"] == 1
    blocks = [rates[f"{inside}stages.{stage}.blocks.0.mlp.fc1.weight"] for stage in range(3)]
    assert blocks == sorted(blocks)
    assert rates[f"{inside}stem.proj.weight"] < blocks[0] < blocks[1] < blocks[2] < 1


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


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_batch_of_mixed_sizes_is_its_images(kind):
    detector = confident(kind)
    images = [torch.rand(3, 64, 80), torch.rand(3, 100, 50), torch.rand(3, 32, 32)]
    together = detector(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector([image])
        assert len(found["boxes"]) > 0
        assert found.keys() == alone.keys()
        for key in ("boxes", "labels", "scores"):
            torch.testing.assert_close(found[key], alone[key], rtol=1e-3, atol=1e-3)
        assert len(found["boxes"]) <= 100
        assert found["scores"].min() > 0.05
        assert found["boxes"].min() >= 0
        assert (found["boxes"].amax(0) <= torch.tensor([*image.shape[:0:-1]] * 2) + 1e-3).all()
        assert found["labels"].min() >= 0
        assert found["labels"].max() < 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dualtoken_vit_tiny_mix", "resnet18"])
@torch.no_grad()
def test_small_and_narrow_images(kind, name):
    detector = confident(kind, name=name, image_size=32, max_size=1333)
    for size in ((32, 32), (33, 45), (32, 400)):
        (found,) = detector([torch.rand(3, *size)])
        assert len(found["boxes"]) > 0
        if kind == "mask-rcnn":
            assert found["masks"].shape == (len(found["boxes"]), 1, *size)


def test_regions_are_cut_out_where_they_are():
    """Whatever the padding: a map that holds its own coordinates gives the boxes' centres."""
    pool = create("mask-rcnn").roi_heads.box_roi_pool
    boxes = torch.tensor([[4.0, 8, 20, 24], [16, 4, 32, 36]])
    maps = {}
    for level, stride in enumerate((4, 8, 16, 32)):
        places = (torch.arange(64 // stride) + 0.5) * stride
        maps[str(level)] = torch.stack(torch.meshgrid(places, places, indexing="xy"))[None]
    found = pool(maps, [boxes], [(40, 40)]).mean((2, 3))  # 64 after padding
    torch.testing.assert_close(found, (boxes[:, :2] + boxes[:, 2:]) / 2 + 2, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    """Under autocast losses and gradients are those of float32 to bfloat16's precision."""
    images, truth = [torch.rand(3, 32, 64)], [target(32, 64, [[4, 6, 30, 28], [20, 2, 60, 26]], [0, 1])]
    extra = {"roi_samples": 16} if kind == "mask-rcnn" else {}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        detector = create(kind, image_size=32, **extra)
        torch.manual_seed(1)  # for the samples
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = detector(images, truth)
        sum(losses.values()).backward()
        found.append((losses, {name: p.grad for name, p in detector.named_parameters()}))
    (expected, wanted), (losses, gradients) = found
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss > 0
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=1e-2)
    # The layers of the heads, where gradients begin; deeper down bfloat16's rounding adds up.
    # SSDLite may choose other negatives.
    heads = ("head.regression_head" if kind == "ssdlite" else "head.", "rpn.head", "roi_heads.box_predictor")
    heads += ("roi_heads.mask_predictor",)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if name.startswith(heads) and wanted[name].norm() > 1e-3:
            assert F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.9, name


@torch.no_grad()
def test_bfloat16_keeps_the_precision_of_boxes():
    detector = confident("retinanet", image_size=32)
    for parameter in detector.head.regression_head.bbox_reg.parameters():
        nn.init.zeros_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([torch.rand(3, 32, 600)])
    images = ImageList(torch.empty(1, 3, 32, 608), [(32, 600)])
    maps = [torch.empty(1, 1, -(-32 // s), -(-608 // s)) for s in (8, 16, 32, 64, 128)]
    (anchors,) = detector.anchor_generator(images, maps)
    anchors[:, 0::2] = anchors[:, 0::2].clamp(0, 600)
    anchors[:, 1::2] = anchors[:, 1::2].clamp(0, 32)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert found["boxes"].max() > 300  # from where on bfloat16 has only even numbers
    assert torch.cdist(found["boxes"], anchors).amin(1).max() < 1e-2


# What the tasks need


@pytest.mark.parametrize("name", ["dualtoken_vit_tiny_mix", "resnet18"])
def test_backbone_from_a_classification_checkpoint(name, tmp_path):
    args = dict(depths=(1, 1, 1)) if name.startswith("dualtoken") else {}
    torch.manual_seed(1)
    source = timm.create_model(name, num_classes=7, **args)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    network = create("mask-rcnn", name).network
    report = load_weights(network, tmp_path / "weights.safetensors")
    assert report.new == report.adapted == ()
    weights = source.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_a_colour_detector_into_a_grey_one(tmp_path):
    source, target = create("retinanet"), create("retinanet", in_chans=1, mean=(0.25,), std=(0.5,))
    weights = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    report = load_weights(target, tmp_path / "weights.safetensors")
    assert (report.new, report.adapted) == ((), ("backbone.body.model.stem.stride2.0.conv.weight",))
    first, grey = (model.network.stem.stride2[0].conv.weight for model in (source, target))
    torch.testing.assert_close(grey, first.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["fcos", "ssdlite"])
def test_a_detector_of_other_classes(kind, tmp_path):
    """Everything is loaded but the classifiers."""
    source, other = create(kind), create(kind, num_classes=2)
    weights = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    before = {name: other.get_parameter(f"{name}.weight").clone() for name in other.class_layers}
    report = load_weights(other, tmp_path / "weights.safetensors", ("a", "b"))
    assert set(report.new) == {f"{name}.{part}" for name in other.class_layers for part in ("weight", "bias")}
    assert all(torch.equal(other.get_parameter(f"{name}.weight"), value) for name, value in before.items())
    assert all(torch.equal(other.state_dict()[key], weights[key]) for key in report.loaded)


def test_what_is_not_decayed():
    detector = create("mask-rcnn")
    names = {id(p): name for name, p in detector.named_parameters()}
    groups = build_optimizer(detector, Optim(weight_decay=0.05)).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = set(names.values()) - decayed
    assert "backbone.body.model.token_embed" in spared
    expected = {name for name, p in detector.named_parameters() if p.ndim == 1} | {"backbone.body.model.token_embed"}
    assert spared == expected


def test_pretrained_cfg_says_how_to_normalise():
    transform = create("retinanet", "vgg11", pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(1, 2, 3))).transform
    assert (tuple(transform.image_mean), tuple(transform.image_std)) == ((0.1, 0.2, 0.3), (1, 2, 3))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("yolo", "resnet18"), "--detector yolo: choose one of retinanet, mask-rcnn, fcos, ssdlite"),
        (("retinanet", "nosuchnet"), "--model.name nosuchnet: "),
        (("retinanet", "test_vit"), "--model.name test_vit: has no feature maps of strides 8, 16 and 32"),
        (("retinanet", "swin_tiny_patch4_window7_224"), "fails on an image of 64x96 pixels"),
    ],
)
def test_refusals(args, said):
    with pytest.raises(InputError) as error:
        create_detector(*args, 3)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
