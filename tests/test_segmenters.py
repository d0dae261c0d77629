"""DeepLabv3, PSPNet and LR-ASPP: structure, counts, and the inference settings."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation import LRASPP

from dualtoken_vit.checkpoint import load_weights, save_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.models import segmenters
from dualtoken_vit.models.backbone import constructor_arguments
from dualtoken_vit.models.detectors import create_detector
from dualtoken_vit.models.segmenters import create_segmenter, segment
from dualtoken_vit.paper.counting import count
from dualtoken_vit.recipes import Optim
from dualtoken_vit.recipes import SegmentationInput as View
from dualtoken_vit.tasks.optim import build_optimizer

KINDS = ("deeplabv3", "pspnet", "lraspp")


def create(kind="deeplabv3", name="dualtoken_vit_tiny_mix", num_classes=3, **kwargs):
    torch.manual_seed(0)
    args = dict(dims=(16, 32, 32), depths=(1, 1, 1)) if name.startswith("dualtoken") else {}
    return create_segmenter(kind, name, num_classes, **{"width": 16, **args, **kwargs})


# The numbers of the paper


@pytest.mark.parametrize(
    ("kind", "params", "printed", "macs"),
    [("deeplabv3", 26.25e6, 26.3e6, 68.3e9), ("pspnet", 21.80e6, 21.7e6, 48.4e9)],
)
def test_parameters_and_macs(kind, params, printed, macs):
    counts = count(create_segmenter(kind, "dualtoken_vit_small", 150), (3, 512, 512))
    assert counts.params == pytest.approx(params, abs=0.005e6)
    assert counts.params == pytest.approx(printed, rel=0.005)
    assert counts.macs - counts.attention == pytest.approx(macs, abs=0.05e9)


def convolution(inside, outside, kernel, places):
    return inside * outside * kernel * kernel * places


@pytest.mark.parametrize("kind", ["deeplabv3", "pspnet"])
def test_the_head_s_macs_in_closed_form(kind):
    segmenter = create_segmenter(kind, "dualtoken_vit_small", 150).eval()
    with FlopCounterMode(display=False) as counter:
        segmenter.head.to("meta")(torch.empty(1, 256, 64, 64, device="meta"))
    places = 64 * 64
    if kind == "deeplabv3":
        context = convolution(256, 512, 1, places + 1) + 3 * convolution(256, 512, 3, places)
        context += convolution(2560, 512, 3, places)
    else:
        context = convolution(256, 512, 1, 1 + 4 + 9 + 36) + convolution(2304, 512, 3, places)
    assert counter.get_total_flops() / 2 == context + convolution(512, 150, 1, places)


# Structure


@pytest.mark.parametrize(
    ("name", "args", "stages"),
    [
        ("dualtoken_vit_tiny_mix", {}, [(16, 8), (32, 16), (32, 32)]),
        ("mobilenetv3_small_100", {}, [(24, 8), (48, 16), (576, 32)]),
        ("resnet18", {"output_stride": 16}, [(128, 8), (256, 16), (512, 16)]),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, [(192, 16)] * 3),
    ],
)
@torch.no_grad()
def test_lraspp_is_torchvisions(name, args, stages):
    segmenter = create("lraspp", name, width=24, **args).eval()
    assert list(zip(segmenter.backbone.feature_info.channels(), segmenter.backbone.strides, strict=True)) == stages

    class Maps(nn.Module):
        def forward(self, x):
            low, *_, high = segmenter.backbone((x - segmenter.mean) / segmenter.std)
            return {"low": low, "high": high}

    twin = LRASPP(Maps(), stages[0][0], stages[-1][0], 3, 24).eval()
    twin.classifier.load_state_dict(segmenter.head.state_dict())
    x = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(segmenter(x), twin(x)["out"], rtol=1e-4, atol=1e-4)


def test_lraspp_drops_channels_after_its_gate():
    segmenter = create("lraspp", dropout=0.5)
    seen = []
    segmenter.head.high_classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    segmenter(torch.rand(2, 3, 64, 64))
    zero = (seen[0] == 0).all(dim=(2, 3))
    assert 4 < zero.sum() < 28  # of 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dualtoken_vit_tiny_mix", "resnet18", "mobilevitv2_050"])
def test_logits_have_the_size_of_the_image(kind, name):
    segmenter, x = create(kind, name), torch.rand(2, 3, 40, 72)
    out = segmenter(x)
    assert out.keys() == {"out", "aux"}
    assert {tuple(logits.shape) for logits in out.values()} == {(2, 3, 40, 72)}
    with torch.no_grad():
        assert segmenter.eval()(x).shape == (2, 3, 40, 72)


@torch.no_grad()
def test_the_head_sees_the_last_map_at_stride_8_of_a_normalised_image():
    segmenter = create(name="resnet18").eval()
    plain = timm.create_model("resnet18", features_only=True, out_indices=(4,)).eval()
    plain.load_state_dict(segmenter.network.state_dict(), strict=False)
    seen = []
    segmenter.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 3, 64, 100)
    segmenter(x)
    mean, std = (torch.tensor(plain.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    (last,) = plain((x - mean) / std)
    whole = F.interpolate(last, (8, 16), mode="bilinear")  # of 64x128 pixels
    torch.testing.assert_close(seen[0], whole[..., :13], rtol=1e-4, atol=1e-4)


class Places(nn.Module):
    """A backbone whose maps say where the middle of each place is in the image, in pixels from the left."""

    def __init__(self, strides):
        super().__init__()
        self.strides = strides

    def forward(self, x):
        height, width = x.shape[-2:]
        return [
            (torch.arange(-(-width // s)) * s + (s - 1) / 2).expand(1, 1, -(-height // s), -1) for s in self.strides
        ]


class Ones(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 1, 1, 1)


@pytest.mark.parametrize("width", [512, 481, 683, 100])
@pytest.mark.parametrize("output_stride", [None, 16])
@torch.no_grad()
def test_what_a_map_predicts_stays_at_its_place(width, output_stride):
    segmenter = create(name="resnet18", output_stride=output_stride).train()
    segmenter.backbone = Places((16, output_stride or 32))
    segmenter.head = segmenter.aux_head = nn.Identity()
    for logits in segmenter(torch.rand(1, 3, 70, width)).values():
        assert logits.shape == (1, 1, 70, width)
        inside = slice(24, width - 40)  # where there are places at both sides
        expected = torch.arange(width).float()[inside].expand(70, -1)
        torch.testing.assert_close(logits[0, 0, :, inside], expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_both_maps_of_lraspp_stay_at_their_places():
    segmenter = create("lraspp").eval()
    segmenter.backbone = Places((8, 16, 32))
    head = segmenter.head
    head.cbr = head.low_classifier = head.high_classifier = nn.Identity()
    head.scale = Ones()
    found = segmenter(torch.rand(1, 3, 70, 483))[0, 0, :, 32:440]
    expected = 2.0 * torch.arange(32, 440).expand(70, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_network_for_multiples_of_32_sees_zeros_around_the_image():
    segmenter = create(name="dla34").eval()
    plain = timm.create_model("dla34", features_only=True, out_indices=(4, 5)).eval()
    with pytest.raises(RuntimeError):
        plain(torch.zeros(1, 3, 70, 99))
    plain.load_state_dict(segmenter.network.state_dict(), strict=False)
    x = torch.randn(1, 3, 72, 40)  # of 3x2 places of stride 32, and of 5x3 of stride 16 that show some of the image
    framed = torch.zeros(1, 3, 96, 64)
    framed[..., :72, :40] = x
    middle, last = plain(framed)
    found = segmenter.backbone(x)
    torch.testing.assert_close(found[0], middle[..., :5, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], last, rtol=1e-4, atol=1e-4)
    assert segmenter(x).shape == (1, 3, 72, 40)


@pytest.mark.parametrize(("name", "multiple"), [("convnext_atto", 32), ("resnet18", 1), ("dualtoken_vit_tiny", 1)])
@torch.no_grad()
def test_maps_cover_the_whole_image(name, multiple):
    backbone = create(name=name).eval().backbone
    assert backbone.multiple == multiple
    assert [tuple(m.shape[2:]) for m in backbone(torch.rand(1, 3, 95, 127))] == [(6, 8), (3, 4)]


@torch.no_grad()
def test_a_vision_transformer_with_its_size_set_free():
    segmenter = create(name="vit_tiny_patch16_224", dynamic_img_size=True).eval()
    assert segmenter.backbone.multiple == 16
    assert segmenter(torch.rand(1, 3, 50, 90)).shape == (1, 3, 50, 90)


@pytest.mark.parametrize("stride", [8, 16])
@torch.no_grad()
def test_output_stride(stride):
    segmenter = create(output_stride=stride).eval()
    assert segmenter.backbone.strides[-1] == stride
    seen = []
    segmenter.head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    assert segmenter(torch.rand(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    assert seen == [(64 // stride, 96 // stride)]


@torch.no_grad()
def test_pspnet_s_context_is_the_whole_image():
    """In one place, through the pooled levels alone: the mean over the image, linearly."""
    pool = create("pspnet").eval().head[0]
    for module in pool.modules():
        if isinstance(module, nn.ReLU):
            module.forward = lambda x: x
    x = torch.randn(1, 32, 6, 6)
    expected = [x]
    for level, parts in zip(pool.levels, (1, 2, 3, 6), strict=True):
        means = x.unfold(2, 6 // parts, 6 // parts).unfold(3, 6 // parts, 6 // parts).mean((4, 5))
        expected.append(F.interpolate(level[1](means), (6, 6), mode="bilinear"))
    seen = []
    pool.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pool(x)
    torch.testing.assert_close(seen[0], torch.cat(expected, 1))


@pytest.mark.parametrize("kind", ["deeplabv3", "lraspp"])
def test_every_parameter_learns_and_tokens_are_not_decayed(kind):
    segmenter = create(kind, "dualtoken_vit_tiny")
    out = segmenter(torch.rand(2, 3, 64, 64))
    (out["out"].square().mean() + out["aux"].square().mean()).backward()
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []
    (name,) = segmenter.no_weight_decay()
    plain = [group for group in build_optimizer(segmenter, Optim()).param_groups if group["weight_decay"] == 0]
    assert any(p is segmenter.get_parameter(name) for group in plain for p in group["params"])


def test_grey_images():
    segmenter = create(in_chans=1).eval()
    assert segmenter.mean.flatten().tolist() == pytest.approx([sum((0.485, 0.456, 0.406)) / 3])
    with torch.no_grad():
        assert segmenter(torch.rand(1, 1, 32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("unet", "resnet18", "--segmenter unet: choose one of deeplabv3, pspnet, lraspp"),
        (
            "pspnet",
            "deit_tiny_patch16_224",
            r"deit_tiny_patch16_224: fails on an image of 70x99 pixels \(Input height \(.*\); a segmenter needs "
            "a network that accepts any image size; try --model.args dynamic_img_size=True",
        ),
        (
            "pspnet",
            "levit_128",
            r"levit_128: fails on an image of 70x99 pixels \(.*\); a segmenter needs a network that accepts any image "
            "size$",
        ),
        ("pspnet", "no_such_net", "--model.name no_such_net: "),
    ],
)
def test_refusals(kind, name, message):
    with pytest.raises(InputError, match=message):
        create(kind, name)


def test_lack_of_memory_is_no_refusal(monkeypatch):
    def full(*args, **more):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(F, "conv2d", full)
    with pytest.raises(RuntimeError, match="primitive"):
        create()


@pytest.mark.parametrize(
    ("name", "inherited"),
    [("dualtoken_vit_tiny", "output_stride"), ("deit_tiny_distilled_patch16_224", "dynamic_img_size")],
)
def test_constructor_arguments_include_those_of_base_classes(name, inherited):
    with torch.device("meta"):
        found = constructor_arguments(type(timm.create_model(name)))
    assert inherited in found
    assert not {"args", "kwargs", "make_block"} & set(found)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("deeplabv3", ("head.1.1",)), ("lraspp", ("head.low_classifier", "head.high_classifier"))],
)
def test_starting_from_other_files(tmp_path, kind, layers):
    source = create(kind)
    args = dict(dims=(16, 32, 32), depths=(1, 1, 1))
    shape = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    about = dict(preprocessing=shape, recipe={}, metrics={})
    made = {**args, "segmenter": kind, "width": 16}
    save_checkpoint(
        tmp_path / "a.safetensors", source, task="segmentation", class_names=("a", "b", "c"), model_args=made, **about
    )
    same = create(kind)
    for p in same.parameters():
        nn.init.zeros_(p)
    report = load_weights(same, tmp_path / "a.safetensors", ("a", "b", "c"))
    assert not report.new
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True))
    report = load_weights(create(kind, num_classes=2), tmp_path / "a.safetensors", ("a", "d"))
    new = {f"{layer}.{part}" for layer in (*layers, "aux_head.1.1") for part in ("weight", "bias")}
    assert set(report.new) == new


@pytest.mark.parametrize("detector", ["retinanet", "mask-rcnn"])
def test_a_detector_s_network_in_a_segmenter_and_back(tmp_path, detector):
    args = dict(dims=(16, 32, 32), depths=(1, 1, 1))
    source = create_detector(detector, "dualtoken_vit_tiny_mix", 2, **args)
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "d.safetensors")
    model = create()
    report = load_weights(model, tmp_path / "d.safetensors", ("a", "b", "c"))
    assert not report.new
    found, given = model.network.state_dict(), source.network.state_dict()
    assert found.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in found.items())
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "s.safetensors")
    other = create_detector(detector, "dualtoken_vit_tiny_mix", 2, **args)
    assert not load_weights(other, tmp_path / "s.safetensors", ("a", "b")).new
    assert all(torch.equal(value, given[key]) for key, value in other.network.state_dict().items())


@pytest.mark.parametrize("name", ["vgg11", "pvt_v2_b0"])
def test_a_network_that_cannot_be_dilated(name):
    with pytest.raises(InputError, match=f"--output-stride 8: {name} does not support it; leave it out"):
        create_segmenter("pspnet", name, 3, output_stride=8)
    with pytest.raises(InputError, match="nonsense"):  # what has another cause is said as it is
        create_segmenter("pspnet", name, 3, output_stride=8, nonsense=1)


# Looking at images


class Colours(nn.Module):
    """Logits that are the image's channels: what is right is known."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        return x.clone()


def blocks(height, width, side=16):
    """An image of blocks of one channel each, and the channels (H, W)."""
    labels = (torch.arange(height)[:, None] // side + torch.arange(width) // side) % 3
    return F.one_hot(labels, 3).permute(2, 0, 1).float(), labels


@pytest.mark.parametrize(
    "view",
    [
        View(),
        View(mode="slide", window=40, window_stride=25),
        View(flip=True),
        View(scales=(1.0, 2.0), flip=True),
        View(mode="slide", window=48, window_stride=48, flip=True, image_size=160),
    ],
)
def test_all_views_agree_on_a_sharp_image(view):
    images, labels = zip(blocks(80, 112), blocks(96, 64), blocks(80, 112), strict=True)
    for found, expected in zip(segment(Colours(), images, view), labels, strict=True):
        assert found.shape == expected.shape
        assert (found == expected).float().mean() > 0.97  # a resized edge may shift by a pixel
        if not view.image_size and view.scales == (1.0,):
            assert torch.equal(found, expected)


def test_what_the_network_sees():
    model = Colours()
    segment(model, [torch.rand(3, 60, 90), torch.rand(3, 60, 90), torch.rand(3, 90, 60)], View(image_size=40))
    assert model.sizes == [(2, 3, 40, 60), (1, 3, 60, 40)]
    model.sizes.clear()
    segment(model, [torch.rand(3, 50, 100)], View(mode="slide", window=40, window_stride=30, scales=(1.0, 0.5)))
    assert model.sizes == [(1, 3, 40, 40)] * 6 + [(1, 3, 32, 40)] * 2  # 50x100; then 25x50, no side below 32
    with pytest.raises(InputError, match=r"window_stride=50: must be at most the window's 40"):
        segment(Colours(), [torch.zeros(3, 64, 64)], View(window=40, window_stride=50))


def test_many_images_go_in_a_few_at_a_time(monkeypatch):
    images, labels = zip(*[blocks(64, 48)] * 5, strict=True)
    monkeypatch.setattr(segmenters, "LOGITS", 2 * 3 * 64 * 48 + 1)
    model = Colours()
    found = segment(model, images, View())
    assert [size[0] for size in model.sizes] == [2, 2, 1]
    assert all(torch.equal(one, expected) for one, expected in zip(found, labels, strict=True))


@pytest.mark.parametrize("view", [View(), View(scales=(0.5, 1.5), flip=True)])
def test_the_best_class_is_found_a_few_classes_at_a_time(monkeypatch, view):
    torch.manual_seed(0)
    images = [torch.rand(7, 64, 48)]
    model = Colours()
    model.num_classes = 7
    (whole,) = segment(model, images, view)
    monkeypatch.setattr(segmenters, "LOGITS", 3 * 64 * 48)
    (found,) = segment(model, images, view)
    assert torch.equal(found, whole)
    assert view.flip or torch.equal(whole, images[0].argmax(0))
    assert whole.unique().tolist() == list(range(7))


def test_answers_that_are_not_numbers():
    image = torch.rand(3, 40, 40)
    image[1, 3, 3] = torch.nan
    with pytest.raises(InputError, match="the network produced NaN or Inf"):
        segment(Colours(), [image], View())
    (labels,) = segment(Colours(), [image], View(), check=False)  # for a training that ends by itself
    assert labels.shape == (40, 40)


@torch.no_grad()
def test_probabilities_of_views_are_averaged():
    """A mirror pass of a network that only looks at the left half."""

    class Half(nn.Module):
        num_classes = 2

        def forward(self, x):
            left = torch.arange(x.shape[-1]) < x.shape[-1] // 2
            return torch.stack([4.0 * left, 3.0 * ~left]).expand(x.shape[-2], 2, -1).transpose(0, 1)[None]

    (plain,) = segment(Half(), [torch.rand(3, 32, 32)], View())
    (both,) = segment(Half(), [torch.rand(3, 32, 32)], View(flip=True))
    assert plain[0].tolist() == [0] * 16 + [1] * 16
    assert both.unique().tolist() == [0]  # softmax(4, 0) + softmax(0, 3) favours class 0 everywhere
