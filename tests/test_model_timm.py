"""Networks as timm's models: initialisation, checkpoints, heads, features, groups of parameters."""

import copy
import itertools
from unittest import mock

import pytest
import timm
import torch
from helpers import create
from timm.models import group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from variants import ABLATIONS, NAMES, NARROW, VARIANTS, pyramid

from dualtoken_vit.models.two_stream import checkpoint_filter_fn

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
