"""Networks: their switches, any size of image, and the precision of their values."""

import copy
import itertools
import math
import re
from unittest import mock

import pytest
import timm
import torch
from helpers import create
from timm.layers import set_fused_attn
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as fused_attention
from variants import NAMES, NARROW, VARIANTS, pyramid, relative_error

from dualtoken_vit.models.dualtoken import ConvEncoder, DualTokenViT
from dualtoken_vit.models.layers import resize_grid
from dualtoken_vit.models.two_stream import PatchMerging

SWITCHES = dict(
    token_mlp=("mlp", "mix"),
    token_grid=(7, 0, 3, 4, 5, 6, 8),
    global_tokens=("position", "normal", "normal_star"),
    local_attention=("conv", "window"),
    downsampling=("stepwise", "onestep"),
)


# The switches


def invalid_argument(token_mlp, token_grid, global_tokens, local_attention, downsampling):
    """The argument named in the error for an invalid combination, None for a valid one."""
    if global_tokens != "position" and token_grid != 7:
        return "token_grid"  # these tokens form no grid
    if token_mlp == "mix" and (token_grid == 0 or global_tokens == "normal"):
        return "token_mlp"  # no MLP on the tokens
    return None


@pytest.mark.parametrize("combination", list(itertools.product(*SWITCHES.values())), ids=str)
def test_every_combination_of_switches_trains_or_is_rejected(combination):
    kwargs = dict(zip(SWITCHES, combination, strict=True))
    if at_fault := invalid_argument(**kwargs):
        with pytest.raises(ValueError, match=f"^{at_fault}="):
            DualTokenViT(depths=(1, 1, 1), **NARROW, **kwargs)
        return
    model = DualTokenViT(depths=(1, 1, 1), num_classes=3, **NARROW, **kwargs)
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 3)
    out.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("token_mlp", "mlpp"),
        ("token_grid", 9),
        ("token_grid", -1),
        ("token_grid", "7"),
        ("global_tokens", "positional"),
        ("local_attention", "windows"),
        ("downsampling", "one-step"),
        ("grid_resize", "area"),
        ("output_stride", 4),
        ("output_stride", 64),
    ],
)
def test_unknown_value_of_a_switch_is_rejected(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}={value!r} is unknown; choose one of"):
        timm.create_model("dualtoken_vit_tiny", **{argument: value})


def test_lightvit_rejects_an_unknown_output_stride():
    with pytest.raises(ValueError, match=r"^output_stride=4 is unknown; choose one of 32, 16, 8$"):
        timm.create_model("lightvit_tiny", output_stride=4)


@pytest.mark.parametrize("argument", ["depths", "num_heads", "mlp_ratios", "kernel_sizes"])
@pytest.mark.parametrize("values", [(1, 1), (1, 1, 1, 1)])
def test_a_setting_without_one_value_per_stage_is_rejected(argument, values):
    message = f"{argument}={values} must have as many values as dims=(48, 96, 192)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        timm.create_model("dualtoken_vit_tiny", **{argument: values})


def test_unknown_argument_is_rejected():
    with pytest.raises(TypeError, match="token_gird"):
        timm.create_model("dualtoken_vit_tiny", token_gird=7)


@pytest.mark.parametrize("name", NAMES)
def test_variants_take_any_switch(name):
    model = timm.create_model(name, token_grid=5, num_classes=0)
    assert model.token_embed.shape[1] == 25
    mixing = [m for m in model.modules() if type(m).__name__ == "MixMlp"]
    assert len(mixing) == (sum(len(s.blocks) for s in model.stages) if name.endswith("mix") else 0)
    assert all(m.mix.weight.shape == (25, 25) for m in mixing)


# Resizing X_ga to the token grid


def triangle(old: int, new: int) -> torch.Tensor:
    """Weights (new, old) of PIL's antialiased bilinear filter along one axis, by its definition."""
    scale = old / new
    support = max(scale, 1)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    weights = (1 - (torch.arange(old) + 0.5 - centre[:, None]).abs() / support).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("size", [(5, 4), (3, 17), (9, 12), (25, 42)], ids=str)
def test_antialiased_resizing_is_the_triangle_filter(size):
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    expected = torch.einsum("ih,bhwc,jw->bijc", triangle(size[0], 7), x, triangle(size[1], 7))
    torch.testing.assert_close(resize_grid(x, 7, antialias=True), expected, rtol=1e-6, atol=1e-6)


def test_upsampling_is_the_same_with_antialiasing():
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(resize_grid(x, 7, antialias=True), resize_grid(x, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_antialiased_resizing_in_half_precision(dtype):
    x = torch.randn(1, 15, 20, 4)
    actual = resize_grid(x.to(dtype), 7, antialias=True)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), resize_grid(x, 7, antialias=True), rtol=1e-2, atol=1e-2)


def test_grid_resize_decides_which_positions_reach_the_global_tokens():
    """At 800x1280 pixels X_ga is 25x40: plain bilinear resizing reads 14x14 of its positions, antialiasing all."""
    read = {}
    for grid_resize in ("bilinear", "antialias"):
        torch.manual_seed(0)
        fusion = DualTokenViT(depths=(1, 1, 1), **NARROW, grid_resize=grid_resize).stages[0].blocks[0].fusion
        x_ga = torch.randn(1, 25, 40, 8, requires_grad=True)
        fusion(x_ga, torch.randn(1, 49, 8)).sum().backward()
        read[grid_resize] = (x_ga.grad.abs().sum(-1) > 0).sum().item()
    assert read["antialias"] == 25 * 40
    assert read["bilinear"] < 200


# Inputs


@pytest.mark.parametrize("kwargs", [*VARIANTS, dict(output_stride=8)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_an_empty_batch_gives_empty_results(kwargs, fused):
    set_fused_attn(fused)
    model = create(**NARROW, **kwargs)
    set_fused_attn(True)
    empty, full = (model.forward_intermediates(torch.zeros(b, 3, 70, 97)) for b in (0, 1))
    assert empty[0].shape == (0, *full[0].shape[1:])
    assert [m.shape for m in empty[1]] == [(0, *m.shape[1:]) for m in full[1]]
    assert model(torch.zeros(0, 3, 70, 97)).shape == (0, 5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 131), (64, 256), (800, 1333)], ids=str)
def test_any_size(size):
    model = create()
    with torch.no_grad():
        out, maps = model.forward_intermediates(torch.randn(1, 3, *size))
        logits = model.forward_head(out)
    assert [m.shape[1:] for m in maps] == [
        (c, math.ceil(size[0] / s), math.ceil(size[1] / s))
        for c, s in zip((24, 24, 48, 96, 192), (2, 4, 8, 16, 32), strict=True)
    ]
    assert logits.isfinite().all()
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("kwargs", [*VARIANTS, dict(output_stride=8)], ids=str)
def test_an_image_gives_the_same_alone_and_in_a_batch(kwargs):
    model = create(**kwargs).double()
    x = torch.randn(3, 3, 97, 70, dtype=torch.float64)
    with torch.no_grad():
        single = torch.cat([model(one[None]) for one in x])
        torch.testing.assert_close(model(x), single, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(single[0], single[1], atol=1e-2)  # the weights distinguish images


def test_alone_and_in_a_batch_in_float32(threads):
    """In float32 `linear` may compute a batch as a convolution and a single image as a matrix product."""
    model = create()
    x = torch.randn(4, 3, 97, 130)
    with torch.no_grad():
        single = torch.cat([model(one[None]) for one in x])
        torch.testing.assert_close(model(x), single, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(single[0], single[1], atol=1e-2)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 6e-3)], ids=str)
def test_half_precision_is_close_to_float32(kwargs, dtype, tolerance):
    model = create(**kwargs)
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        actual = model.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_autocast_is_close_to_float32(kwargs):
    model = create(**kwargs)
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(x)
    assert relative_error(actual, expected) < 5e-2


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_autocast_on_the_cpu_does_not_call_the_fused_kernel(kwargs):
    model = create(**NARROW, **kwargs).train()
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=fused_attention) as spy:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 64, 64)).sum().backward()
        assert spy.call_count == 0
        model(torch.randn(2, 3, 64, 64))
        assert spy.call_count > 0


def test_autocast_on_the_cpu_leaves_convolutions_in_float32():
    model = create(**NARROW)
    seen = []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(lambda module, args, y: seen.append((module, args[0], y)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 64, 64))
    assert [module for module, *_ in seen] == convolutions
    for module, x, y in seen:
        plain = nn.functional.conv2d(
            x.float(), module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups
        )
        assert torch.equal(y, plain)


@pytest.mark.parametrize("name", ["dualtoken_vit_tiny_mix", "dualtoken_vit_small_mix"])
def test_training_in_bfloat16_follows_float32(name):
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(1)
        model = timm.create_model(name, depths=(1, 1, 1), num_classes=4).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[enabled] = []
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = nn.functional.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[enabled].append(loss.item())
    assert losses[False][-1] < 0.8 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float32_agrees_with_float64(threads, memory_format):
    """For every kernel that the number of threads and the memory format select."""
    model = create()
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 224, 224)
    out = model.to(memory_format=memory_format)(x.to(memory_format=memory_format))
    out.square().sum().backward()
    expected = exact(x.double())
    expected.square().sum().backward()
    assert relative_error(out, expected) < 1e-5
    gradients = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, exact))
    assert relative_error(*gradients) < 1e-4


@pytest.mark.parametrize("in_chans", [1, 2, 4, 12])
def test_in_chans(in_chans):
    model = timm.create_model("dualtoken_vit_tiny", in_chans=in_chans, num_classes=0)
    assert model.get_submodule(model.default_cfg["first_conv"]).weight.shape[1] == in_chans
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 1280)


# Strides


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride(kwargs, output_stride):
    model = create(output_stride=output_stride, **kwargs)
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == [min(s, output_stride) for s in (2, 4, 8, 16, 32)]
    for size in (64, 96), (33, 71):
        maps = pyramid(model, torch.randn(2, 3, *size))
        assert [m.shape[-2:] for m in maps] == [tuple(math.ceil(n / r) for n in size) for r in reductions]
        assert all(m.isfinite().all() for m in maps)
    standard = create(**kwargs).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in standard.items()}


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 5)], ids=str)
def test_dilated_stage_contains_the_positions_of_the_strided_one(size):
    """At every second position, a stage at stride 1 equals the same weights at stride 2."""
    torch.manual_seed(0)
    strided, dense = (PatchMerging(6, 10, True, stride, 1) for stride in (2, 1))
    dense.load_state_dict(strided.state_dict())
    x, g = torch.randn(2, *size, 6), torch.randn(2, 4, 6)
    (y, h), (dense_y, dense_h) = strided(x, g), dense(x, g)
    assert dense_y.shape[1:3] == size
    torch.testing.assert_close(dense_y[:, ::2, ::2], y)
    torch.testing.assert_close(dense_h, h, rtol=0, atol=0)

    encoder, dilated = (ConvEncoder(10, 7, dilation) for dilation in (1, 2))
    dilated.load_state_dict(encoder.state_dict())
    z, dense_z = encoder(y), dilated(dense_y)
    torch.testing.assert_close(dense_z[:, ::2, ::2], z)

    strided, dense = PatchMerging(10, 12, False, 2, 1), PatchMerging(10, 12, False, 1, 2)
    dense.load_state_dict(strided.state_dict())
    torch.testing.assert_close(dense(dense_z, None)[0][:, ::4, ::4], strided(z, None)[0])


def test_lightvit_without_global_tokens():
    with pytest.raises(ValueError, match="num_tokens=0: LightViT needs one or more"):
        timm.create_model("lightvit_tiny", num_tokens=0)
