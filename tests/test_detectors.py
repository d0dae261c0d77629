"""Detectors: structure, counts, levels, and what they load."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_detectors import create, target
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dualtoken_vit.checkpoint import load_weights
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import RetinaNet, create_detector
from dualtoken_vit.models.one_stage import BatchNorm
from dualtoken_vit.paper.counting import count
from dualtoken_vit.recipes import Optim
from dualtoken_vit.tasks.optim import build_optimizer

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
    detector = create_detector(kind, name, 80)
    # torchvision gives the background a box of its own and a mask, which detectors elsewhere leave out.
    background = 0 if kind == "retinanet" else 4 * 1025 + 257
    background_flops = 0 if kind == "retinanet" else 1000 * 4 * 1024 + 100 * 28 * 28 * 256
    assert sum(p.numel() for p in detector.parameters()) - background == pytest.approx(params, abs=0.005e6)
    counts = count(detector, (3, 800, 1280), lambda model, image: heads(model, list(model.backbone(image).values())))
    # Q K^T and the sum over V: 25 x 40 places at stride 32 among themselves, every place over the 49 global tokens.
    stages = zip((2, 6, 6), (64, 128, 256), (100 * 160, 50 * 80, 25 * 40), strict=True)
    attention = sum(depth * 2 * dim * (1000 * 1000 + 49 * places) for depth, dim, places in stages)
    assert counts.attention == attention
    assert counts.flops - background_flops == pytest.approx(flops, abs=0.05e9)
    assert counts.flops - background_flops - attention == pytest.approx(flops_without_attention, abs=0.05e9)


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


@pytest.mark.parametrize("channels", [1, 4])
def test_detectors_of_other_channels(channels):
    """Normalised by the mean over the three channels."""
    model = create("retinanet", in_chans=channels).eval()
    assert model.transform.image_mean == pytest.approx([sum((0.485, 0.456, 0.406)) / 3] * channels)
    assert set(model([torch.rand(channels, 64, 96)])[0]) == {"boxes", "scores", "labels"}
