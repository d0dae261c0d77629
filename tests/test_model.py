import copy
import itertools
import math
import re
from unittest import mock

import pytest
import timm
import torch
from helpers import create
from timm.layers import get_notrace_functions, get_notrace_modules, set_fused_attn
from timm.models import group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import AttentionExtract
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as fused_attention
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from dualtoken_vit.models.dualtoken import ConvEncoder, DualTokenViT
from dualtoken_vit.models.layers import resize_grid
from dualtoken_vit.models.two_stream import PatchMerging, checkpoint_filter_fn

NAMES = ["dualtoken_vit_tiny", "dualtoken_vit_tiny_mix", "dualtoken_vit_small", "dualtoken_vit_small_mix"]
SWITCHES = dict(
    token_mlp=("mlp", "mix"),
    token_grid=(7, 0, 3, 4, 5, 6, 8),
    global_tokens=("position", "normal", "normal_star"),
    local_attention=("conv", "window"),
    downsampling=("stepwise", "onestep"),
)
LIGHTVIT = dict(name="lightvit_tiny")
ABLATIONS = [
    dict(token_mlp="mix"),
    dict(token_grid=0),
    dict(token_grid=5),
    dict(global_tokens="normal"),
    dict(global_tokens="normal_star"),
    dict(local_attention="window"),
    dict(downsampling="onestep"),
]
VARIANTS = [{}, *ABLATIONS, dict(grid_resize="antialias"), LIGHTVIT]
NARROW = dict(dims=(8, 16, 24), num_heads=(1, 2, 3), head_hidden_size=32)  # for tests of structure


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def pyramid(model, x):
    return model.forward_intermediates(x, intermediates_only=True)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


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


# Attention


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_fused_attention_equals_unfused(kwargs):
    model = create(**kwargs).double()
    attentions = [m for m in model.modules() if hasattr(m, "fused_attn")]
    assert all(m.fused_attn for m in attentions)
    x = torch.randn(2, 3, 97, 70, dtype=torch.float64)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=fused_attention) as spy:
        fused = model(x)
        calls = 3 if kwargs.get("name") == "lightvit_tiny" else 1  # windows, aggregation and broadcast in one module
        assert spy.call_count == calls * len(attentions)
        for m in attentions:
            m.fused_attn = False
        unfused = model(x)
        assert spy.call_count == calls * len(attentions)
    torch.testing.assert_close(unfused, fused, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("method", ["fx", "hook"])
def test_attention_extract_sees_the_broadcast(method):
    model = create("dualtoken_vit_tiny_mix")
    maps = AttentionExtract(model, method=method)(torch.randn(2, 3, 224, 224))
    end = {"fx": "softmax", "hook": "attn_drop"}[method]
    for stage, (heads, positions) in enumerate(((2, 28 * 28), (4, 14 * 14), (8, 7 * 7))):
        broadcast = maps[f"stages.{stage}.blocks.0.broadcast_attn.{end}"]
        assert broadcast.shape == (2, heads, positions, 49)
        torch.testing.assert_close(broadcast.sum(-1), torch.ones(2, heads, positions))
        assert maps[f"stages.{stage}.blocks.0.aggregate_attn.{end}"].shape == (2, heads, 49, 49)
    assert len(maps) == 6
    # The extracted map is the one that the block uses, computed here from the inputs of the block.
    block, inputs = model.stages[2].blocks[0], []
    block.broadcast_attn.register_forward_hook(lambda module, args, output: inputs.extend(args))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    maps = AttentionExtract(model, method=method)(x)
    inputs.clear()
    model(x)
    q = block.broadcast_attn.q(inputs[0]).reshape(2, 49, 8, 24)
    k = block.broadcast_attn.kv(inputs[1])[..., :192].reshape(2, 49, 8, 24)
    expected = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 24**0.5).softmax(-1)
    torch.testing.assert_close(maps[f"stages.2.blocks.0.broadcast_attn.{end}"], expected)


# Compilers


@pytest.mark.slow
def test_compile_runs_any_batch_and_size_in_one_graph(threads):
    torch.compiler.reset()
    model = create("dualtoken_vit_tiny_mix", **NARROW)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, *size in [(2, 64, 96), (3, 33, 47), (4, 97, 131), (2, 72, 224), (3, 224, 224)]:
            x = torch.randn(batch, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_stays_within_its_limit_with_batches_of_one_in_between(threads):
    torch.compiler.reset()
    model = create("dualtoken_vit_tiny_mix", **NARROW)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch, *size in [(1, 32, 32), (16, 64, 64), (2, 33, 47), (1, 97, 131), (3, 224, 160)]:
            x = torch.randn(batch, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    # One graph for a batch of one, one for maps of 1x1, whose sizes are then constants, ...: not one for each input.
    assert counter.frame_count < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(token_mlp="mix", local_attention="window", downsampling="onestep"), dict(global_tokens="normal")],
    ids=str,
)
def test_compile_trains_without_a_graph_break(kwargs):
    torch.compiler.reset()
    model = create(**NARROW, **kwargs).train()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 33, 64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    reference(x).square().sum().backward()
    for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kwargs", [*VARIANTS, dict(output_stride=8)], ids=str)
def test_torchscript(kwargs):
    model = create(**NARROW, **kwargs)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in (64, 64), (33, 47), (224, 224):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1,), (2, 3)], ids=str)
def test_features_torchscript(out_indices):
    model = timm.create_model(
        "dualtoken_vit_tiny", depths=(1, 1, 1), features_only=True, out_indices=out_indices
    ).eval()
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("kwargs", [*VARIANTS, dict(output_stride=8)], ids=str)
def test_fx(kwargs):
    model = create(**NARROW, **kwargs)
    tracer = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    last = get_graph_node_names(model, tracer_kwargs=tracer)[1][-1]
    traced = create_feature_extractor(model, {last: "logits"}, tracer_kwargs=tracer)
    with torch.no_grad():
        for size in (64, 64), (33, 47), (224, 224):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(traced(x)["logits"], model(x), rtol=0, atol=0)


# timm's interface, where timm's own tests name other models


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_device_and_dtype_reach_every_tensor(kwargs):
    name = kwargs.get("name", "dualtoken_vit_tiny")
    kwargs = NARROW | {key: value for key, value in kwargs.items() if key != "name"}
    model = timm.create_model(name, **kwargs, device="meta", dtype=torch.float64)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, t in tensors if t.device.type != "meta"] == []
    assert [name for name, t in tensors if t.is_floating_point() and t.dtype != torch.float64] == []
    assert model(torch.randn(2, 3, 64, 64, device="meta", dtype=torch.float64)).shape == (2, 1000)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_init_weights_after_to_empty(kwargs):
    name = kwargs.get("name", "dualtoken_vit_tiny")
    kwargs = dict(depths=(1, 1, 1)) | {key: value for key, value in kwargs.items() if key != "name"}
    fresh = timm.create_model(name, **kwargs)
    model = timm.create_model(name, **kwargs, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 10**6)
    model.init_weights()
    expected = dict([*fresh.named_parameters(), *fresh.named_buffers()])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or expected[name].unique().numel() == 1:  # an index, a bias, a norm
            assert torch.equal(tensor, expected[name]), name
        elif tensor.numel() > 200:
            assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.2), name
        else:
            assert tensor.isfinite().all(), name


def test_initial_weights():
    """Xavier's variance for linear layers, LeCun's for convolutions, 0.02 for the classifier and the global tokens."""
    model = timm.create_model("dualtoken_vit_small", depths=(1, 1, 1))
    assert model.token_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(("stem", "head")):
            fan_out, fan_in = len(module.weight), module.weight[0].numel()
            variance = 2 / (fan_in + fan_out) if isinstance(module, nn.Linear) else 1 / fan_in
            assert module.weight.std().item() == pytest.approx(variance**0.5, rel=0.2), name
            assert module.bias is None or (module.bias == 0).all(), name


@pytest.mark.parametrize("kwargs", [{}, *ABLATIONS[:4]], ids=str)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_local_folder_round_trip(tmp_path, kwargs, safe):
    model = create(num_classes=7, in_chans=2, **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=safe, model_config=dict(label_names=list("abcdefg")))
    x = torch.randn(2, 2, 64, 64)
    # the config in the folder names the architecture and its arguments
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(reloaded(x), model(x), rtol=0, atol=0)
    assert reloaded.pretrained_cfg["label_names"] == list("abcdefg")
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    for actual, expected in zip(features(x), pyramid(model, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_pretrained_weights_fit_other_channels_and_classes(tmp_path):
    model = create()
    save_for_hf(model, tmp_path, safe_serialization=True)
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, num_classes=9).eval()
    assert grey.head.out_features == 9
    x = torch.randn(2, 1, 64, 64)
    # timm sums the filters over the channels: a grey image then equals an RGB image with three equal channels
    expected = model.forward_features(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(x), expected, rtol=1e-4, atol=1e-4)


def test_headless_checkpoint_reload():
    model, reloaded = (create(num_classes=0), timm.create_model("dualtoken_vit_tiny", depths=(1, 1, 1), num_classes=0))
    reloaded.load_state_dict(checkpoint_filter_fn(dict(sorted(model.state_dict().items())), reloaded))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(reloaded.eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("nesting", [None, "state_dict", "model", "state_dict_ema"])
def test_checkpoint_filter_unwraps(prefix, nesting):
    model = create(**NARROW)
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    checkpoint = {nesting: weights, "epoch": 3} if nesting else weights
    fitted = checkpoint_filter_fn(checkpoint, model)
    assert fitted.keys() == model.state_dict().keys()
    assert all(fitted[key] is weights[prefix + key] for key in fitted)


def test_checkpoint_filter_resizes_the_token_grid():
    old, new = create(**NARROW, token_grid=4), create(**NARROW, token_grid=8)
    # A ramp over the grid stays the same ramp, except at the border, where interpolation clamps.
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        old.token_embed.copy_((10 * y + x).reshape(1, 16, 1).expand_as(old.token_embed))
    new.load_state_dict(checkpoint_filter_fn(old.state_dict(), new))
    position = ((torch.arange(8.0) + 0.5) / 2 - 0.5).clamp(0, 3)
    expected = 10 * position[:, None] + position
    torch.testing.assert_close(new.token_embed[0, :, 0].reshape(8, 8), expected)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_reset_classifier_keeps_the_pool(pool):
    model = create(global_pool=pool)
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    before = model.forward_head(features, pre_logits=True)
    model.reset_classifier(9)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), before)
    assert model(x).shape == (2, 9)
    assert before.shape[1] == model.head_hidden_size == (2560 if pool == "catavgmax" else 1280)
    model.reset_classifier(9, "avg")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_head_of_features_is_the_forward(kwargs):
    model = create(**kwargs)
    x = torch.randn(2, 3, 33, 47)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, 2, 2, model.num_features)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x), rtol=0, atol=0)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits, rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_checkpointed_gradients_are_equal(kwargs):
    x = torch.randn(2, 3, 64, 48)
    gradients = []
    for enable in (False, True):
        model = create(**kwargs).train()
        model.set_grad_checkpointing(enable)
        with mock.patch("dualtoken_vit.models.two_stream.checkpoint", wraps=timm.models.checkpoint) as spy:
            model(x).square().sum().backward()
        assert spy.call_count == (3 if enable else 0)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_checkpointed_gradients_of_features_are_equal():
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("dualtoken_vit_tiny", depths=(2, 1, 1), features_only=True).train()
        model.model.set_grad_checkpointing(enable)
        sum(f.square().mean() for f in model(x)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert None not in gradients[0].values()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_pruning_leaves_no_unused_parameter(kwargs):
    model = create(**NARROW, **kwargs, drop_rate=0.5)
    x = torch.randn(2, 3, 64, 48)
    last = len(model.feature_info) - 1
    taps = pyramid(model, x)
    for index, prune_norm in itertools.product(range(last + 1), (True, False)):
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([index], prune_norm=prune_norm)
        final, (tap,) = pruned.forward_intermediates(x, indices=take)
        torch.testing.assert_close(tap, taps[index], rtol=0, atol=0)
        torch.testing.assert_close(pruned(x), final, rtol=0, atol=0)  # no pool, no dropout
        (final.sum() + tap.sum()).backward()
        assert [name for name, p in pruned.named_parameters() if p.grad is None] == []


def test_pruned_model_takes_a_new_head():
    model = create()
    x = torch.randn(2, 3, 64, 48)
    for index, width in enumerate((24, 24, 48, 96, 192)):
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([index], prune_norm=True)
        pruned.reset_classifier(7, "avg")
        assert pruned.head_hidden_size == pruned.num_features == width
        pooled = pyramid(model, x)[index].mean((2, 3))
        torch.testing.assert_close(pruned.forward_head(pruned.forward_features(x), pre_logits=True), pooled)
        assert pruned(x).shape == (2, 7)
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([4], prune_head=False)
    torch.testing.assert_close(whole(x), model(x), rtol=0, atol=0)


def test_intermediates():
    model = create()
    x = torch.randn(2, 3, 64, 48)
    maps = pyramid(model, x)
    modules = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda m, i, o, name=info["module"]: modules.update({name: o}))
    final, again = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    for info, one, other in zip(model.feature_info, maps, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        hooked = modules[info["module"]]
        hooked = hooked[0].permute(0, 3, 1, 2) if isinstance(hooked, tuple) else hooked
        torch.testing.assert_close(one, hooked, rtol=0, atol=0)
    nhwc = model.forward_intermediates(x, indices=[3, -1], output_fmt="NHWC", norm=True, intermediates_only=True)
    torch.testing.assert_close(nhwc[0], maps[3].permute(0, 2, 3, 1))
    torch.testing.assert_close(nhwc[1], model.norm(maps[4].permute(0, 2, 3, 1)))
    for i in range(5):
        _, (tap,) = model.forward_intermediates(x, indices=[i], stop_early=True)
        torch.testing.assert_close(tap, maps[i], rtol=0, atol=0)


# Training


def test_drop_path_rates_rise_over_the_blocks():
    model = timm.create_model("dualtoken_vit_tiny", drop_path_rate=0.22)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [[getattr(d, "drop_prob", 0.0) for d in (b.drop_path1, b.drop_path2)] for b in blocks]
    assert rates == [pytest.approx([0.02 * i] * 2) for i in range(12)]


@pytest.mark.parametrize("rate", ["drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
@pytest.mark.parametrize("kwargs", [{}, dict(local_attention="window", global_tokens="normal_star")], ids=str)
def test_dropout_acts_in_training_only(rate, kwargs):
    model = create(**NARROW, **kwargs, **{rate: 0.5})
    plain = create(**NARROW, **kwargs)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), plain(x))
    model.train().stem.eval()  # only dropout then differs between two calls
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = timm.create_model(name, num_classes=10)
    state = model.state_dict()
    assert model.no_weight_decay() == {"token_embed"}
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    depths = [len(stage.blocks) for stage in model.stages]
    order = [f"stages.{i}.blocks.{j}." for i, depth in enumerate(depths) for j in range(depth)]
    expected = {}
    for key, _ in model.named_parameters():
        if key.startswith(("stem.", "token_embed")):
            expected[key] = 0
        elif key.startswith("head."):
            expected[key] = len(order) + 1
        elif key.startswith(("norm.", "token_mean.")):
            expected[key] = len(order)
        else:  # the merging belongs to the first block after it
            block = key.replace("merging", "blocks.0")
            expected[key] = 1 + next(i for i, prefix in enumerate(order) if block.startswith(prefix))
    assert layers == expected

    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert {key: coarse[key] for key in ("token_embed", "stages.0.norm1", "head.weight") if key in coarse} == {
        "token_embed": 0,
        "head.weight": 4,
    }

    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    settings = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for key, p in model.named_parameters():
        decay = 0.0 if p.ndim == 1 or key == "token_embed" else 0.05
        assert settings[id(p)] == (0.5 ** (len(order) + 1 - expected[key]), decay), key
    assert state["token_embed"].ndim == 3  # excluded by name, not by its number of dimensions


def test_relative_position_bias_does_not_decay():
    model = timm.create_model("dualtoken_vit_tiny", **NARROW, local_attention="window")
    spared, _ = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    tables = [name for p in spared["params"] if (name := names[id(p)]).endswith("relative_position_bias_table")]
    assert len(tables) == 2 + 6  # the blocks of the first two stages


@pytest.mark.parametrize("name", NAMES)
def test_cfg_matches_the_model(name):
    model = timm.create_model(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert (cfg["architecture"], cfg["tag"]) == (name, "untrained")
    assert not cfg.get("url")
    assert not cfg.get("hf_hub_id")
    assert state[cfg["classifier"] + ".weight"].shape == (cfg["num_classes"], 1280)
    assert state[cfg["first_conv"] + ".weight"].shape[1] == cfg["input_size"][0]
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    with torch.no_grad():
        assert model.eval().forward_features(torch.randn(1, *cfg["input_size"])).shape[1:3] == cfg["pool_size"]
        assert model(torch.randn(1, *cfg["min_input_size"])).isfinite().all()
