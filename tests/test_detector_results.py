"""What detectors find: sizes, boxes and masks in the image, batches, precisions."""

import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import KINDS, confident, create, target
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from dualtoken_vit.models.detectors import Transform


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
        for size, least in ((90, 0.95), (137, 0.95), (150, 0.95), (180, 0.95), (61, 0.9)):  # also factors that round
            transform = Transform(size, 1333, (), (0, 0, 0), (1, 1, 1)).eval()
            box = torch.tensor([[cx - rx, cy - ry, min(cx + rx, 120), min(cy + ry, 90)]])
            images, (t,) = transform([torch.zeros(3, 90, 120)], [dict(boxes=box, masks=ellipse[None])])
            small = project_masks_on_boxes(t["masks"], t["boxes"], torch.tensor([0]), 28)[:, None]
            (found,) = transform.postprocess([dict(boxes=t["boxes"], masks=small)], images.image_sizes, [(90, 120)])
            mask = found["masks"][0, 0]
            assert (mask & ellipse).sum() / (mask | ellipse).sum() > least, (cx, size)


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
