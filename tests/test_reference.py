"""A reference DualToken-ViT in numpy, float64, for one image, written from the paper's formulas, not from the code.

Maps are (H, W, C), tokens (M, C). Only the names of the weights are shared with the package.
"""

import math

import numpy as np
import pytest
import torch
from helpers import create

HEADS = (2, 4, 8)
KERNELS = (5, 7, 0)
erf = np.vectorize(math.erf, otypes=[float])


class Weights(dict):
    """A state dict in float64; `at("norm1")` returns the weights under that prefix."""

    @classmethod
    def of(cls, module):
        return cls({key: value.double().numpy() for key, value in module.state_dict().items()})

    def at(self, prefix):
        return Weights({key[len(prefix) + 1 :]: value for key, value in self.items() if key.startswith(prefix + ".")})


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, w):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w["weight"] + w["bias"]


def batch_norm(x, w):
    return (x - w["running_mean"]) / np.sqrt(w["running_var"] + 1e-5) * w["weight"] + w["bias"]


def linear(x, w):
    return x @ w["weight"].T + w.get("bias", 0.0)


def conv(x, w, stride=1, depthwise=False):
    """Convolution, zero-padded by half the kernel; the output has ceil(size / stride) positions."""
    kernel = w["weight"]  # (out, in, k, k)
    k = kernel.shape[-1]
    x = np.pad(x, ((k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    height, width = (-(-(n - k + 1) // stride) for n in x.shape[:2])
    out = np.zeros((height, width, len(kernel)))
    for i in range(height):
        for j in range(width):
            patch = x[i * stride : i * stride + k, j * stride : j * stride + k]
            out[i, j] = np.einsum(
                "abc,cab->c" if depthwise else "abi,oiab->o", patch, kernel.squeeze(1) if depthwise else kernel
            )
    return out + w.get("bias", 0.0)


def pool(x, size=2):
    """Average pooling; at an odd border, over the remaining positions only."""
    rows = [x[i : i + size] for i in range(0, x.shape[0], size)]
    return np.array([[row[:, j : j + size].mean((0, 1)) for j in range(0, x.shape[1], size)] for row in rows])


def resize(x, size):
    """Bilinear with half-pixel centres, without antialiasing."""

    def matrix(old):
        m = np.zeros((size, old))
        for i in range(size):
            position = max((i + 0.5) * old / size - 0.5, 0)
            low = min(int(position), old - 1)
            high = min(low + 1, old - 1)
            m[i, low] += 1 - (position - low)
            m[i, high] += position - low
        return m

    return np.einsum("ih,hwc,jw->ijc", matrix(x.shape[0]), x, matrix(x.shape[1]))


def attention(q, k, v, heads, bias=None):
    d = q.shape[-1] // heads
    out = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        logits = q[:, part] @ k[:, part].T / math.sqrt(d)
        out.append(softmax(logits if bias is None else logits + bias[h]) @ v[:, part])
    return np.concatenate(out, -1)


def split(x, w, parts):
    return np.split(linear(x, w), parts, -1)


def conv_encoder(x, w):
    y = layer_norm(conv(x, w.at("dw"), depthwise=True), w.at("norm"))
    return x + linear(gelu(linear(y, w.at("mlp.fc1"))), w.at("mlp.fc2"))


def windows(x, w, heads):
    """Attention within 7x7 windows of LN(x)."""
    height, width, channels = x.shape
    y = np.zeros((-(-height // 7) * 7, -(-width // 7) * 7, channels))
    y[:height, :width] = layer_norm(x, w.at("norm"))
    table = w["relative_position_bias_table"].reshape(13, 13, heads)
    positions = [(i, j) for i in range(7) for j in range(7)]
    bias = np.array([[table[a - c + 6, b - d + 6] for c, d in positions] for a, b in positions]).transpose(2, 0, 1)
    for i in range(0, y.shape[0], 7):
        for j in range(0, y.shape[1], 7):
            q, k, v = split(y[i : i + 7, j : j + 7].reshape(49, channels), w.at("qkv"), 3)
            y[i : i + 7, j : j + 7] = attention(q, k, v, heads, bias).reshape(7, 7, channels)
    return y[:height, :width]


def token_mlp(g, w):
    if "mix.weight" in w:
        return linear(linear(g, w.at("fc")).T, w.at("mix")).T
    return linear(gelu(linear(g, w.at("fc1"))), w.at("fc2"))


def fusion(x_ga, g, w, heads, grid, tokens):
    """G_new from X_ga and G."""
    flat = x_ga.reshape(-1, x_ga.shape[-1])
    if g is None:
        return flat
    if tokens == "position":
        x_ga = x_ga if x_ga.shape[:2] == (grid, grid) else resize(x_ga, grid)
        return 0.1 * token_mlp(layer_norm(g, w.at("norm")), w.at("mlp")) + 0.9 * x_ga.reshape(grid * grid, -1)
    query = layer_norm(g, w.at("norm"))
    if tokens == "normal_star":
        query = token_mlp(query, w.at("mlp"))
    k, v = split(flat, w.at("kv"), 2)
    g = attention(linear(query, w.at("q")), k, v, heads)
    return linear(g, w.at("proj")) if tokens == "normal" else g


def bidim(x, w):
    y = layer_norm(x, w.at("norm"))
    channel = gelu(linear(y.reshape(-1, y.shape[-1]).mean(0), w.at("channel_reduce")))
    spatial = gelu(linear(y, w.at("spatial_reduce")))
    both = np.concatenate((spatial, np.broadcast_to(channel, spatial.shape)), -1)
    return x * sigmoid(linear(channel, w.at("channel_expand"))) * sigmoid(linear(both, w.at("spatial_select")))


def block(x, g, w, stage, grid=7, tokens="position", local="conv", downsampling="stepwise"):
    heads = HEADS[stage]
    if KERNELS[stage]:
        x = conv_encoder(x, w.at("local")) if local == "conv" else x + windows(x, w.at("local"), heads)
    y = layer_norm(x, w.at("norm1"))
    if downsampling == "onestep":
        x_ds = pool(y, (4, 2, 1)[stage])
    elif stage == 0:
        x_ds = pool(conv(pool(y), w.at("downsample.convs.0")))
    else:
        x_ds = pool(y) if stage == 1 else y
    q, k, v = split(x_ds.reshape(-1, x_ds.shape[-1]), w.at("aggregate_attn.qkv"), 3)
    g_new = fusion(attention(q, k, v, heads).reshape(x_ds.shape), g, w.at("fusion"), heads, grid, tokens)
    broadcast = w.at("broadcast_attn")
    k, v = split(g_new, broadcast.at("kv"), 2)
    q = linear(y, broadcast.at("q")).reshape(-1, y.shape[-1])
    x = x + linear(attention(q, k, v, heads), broadcast.at("proj")).reshape(x.shape)
    ffn = linear(gelu(linear(layer_norm(x, w.at("norm2")), w.at("mlp.fc1"))), w.at("mlp.fc2"))
    return x + bidim(ffn, w.at("bidim")), None if g is None else g + g_new


def light_block(x, g, w, stage):
    """LightViT: aggregation into global tokens, window attention and broadcast, then the FFN on all tokens."""
    heads, attn = HEADS[stage], w.at("attn")
    q, k, v = split(layer_norm(x, attn.at("norm")).reshape(-1, x.shape[-1]), attn.at("qkv"), 3)
    aggregated = attention(split(layer_norm(g, attn.at("norm")), attn.at("qkv"), 3)[0], k, v, heads)
    seen = windows(x, attn, heads).reshape(q.shape) + attention(q, *split(aggregated, attn.at("kv"), 2), heads)
    tokens = np.concatenate((g, x.reshape(q.shape)))
    tokens = tokens + linear(np.concatenate((aggregated, seen)), attn.at("proj"))
    ffn = linear(gelu(linear(layer_norm(tokens, w.at("norm2")), w.at("mlp.fc1"))), w.at("mlp.fc2"))
    tokens = tokens + bidim(ffn, w.at("bidim"))
    return tokens[len(g) :].reshape(x.shape), tokens[: len(g)]


def stem(x, w):
    """Strides 2, 4 and 8."""

    def conv_bn_gelu(x, w, **kwargs):
        return gelu(batch_norm(conv(x, w.at("conv"), **kwargs), w.at("bn")))

    x = conv_bn_gelu(x, w.at("stride2.0"), stride=2)
    x = conv_bn_gelu(x, w.at("stride2.1"), depthwise=True)
    x2 = conv_bn_gelu(x, w.at("stride2.2"), depthwise=True)
    x4 = conv_bn_gelu(x2, w.at("stride4"), stride=2, depthwise=True)
    return x2, x4, layer_norm(conv(x4, w.at("proj"), stride=2), w.at("norm"))


def merge(x, g, w):
    """Patch merging; odd sizes are zero-padded at the right and bottom."""
    x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)))
    four = np.array([x[a::2, b::2] for a in (0, 1) for b in (0, 1)])
    main = linear(layer_norm(np.concatenate(four, -1), w.at("norm")), w.at("reduction"))
    if g is not None:
        g = linear(layer_norm(g, w.at("token_norm")), w.at("token_reduction"))
    return main + linear(four.max(0), w.at("residual")), g


def head(x, g, w):
    tokens = x.reshape(-1, x.shape[-1])
    if g is not None:
        tokens = np.concatenate((g, tokens))
    y = linear(layer_norm(tokens, w.at("norm")), w.at("token_mean.fc"))
    return linear(gelu(layer_norm(y, w.at("token_mean.norm"))).mean(0), w.at("head"))


def network(image, w, depths, block=block, **switches):
    """(H, W, channels) -> logits and the five maps of the pyramid."""
    x2, x4, x = stem(image, w.at("stem"))
    maps = [x2, x4]
    g = w["token_embed"][0] if "token_embed" in w else None
    for stage, depth in enumerate(depths):
        here = w.at(f"stages.{stage}")
        if stage > 0:
            x, g = merge(x, g, here.at("merging"))
        for i in range(depth):
            x, g = block(x, g, here.at(f"blocks.{i}"), stage, **switches)
        maps.append(x)
    return head(x, g, w), maps


def assert_close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["dualtoken_vit_tiny", "dualtoken_vit_tiny_mix"])
@pytest.mark.parametrize(
    ("stage", "size"), [(0, (28, 28)), (0, (9, 13)), (1, (14, 14)), (1, (5, 8)), (2, (7, 7)), (2, (3, 5))]
)
def test_block(name, stage, size, dtype, tolerance):
    torch.manual_seed(1)
    module = create(name).to(dtype).stages[stage].blocks[0]
    dim = (48, 96, 192)[stage]
    x, g = torch.randn(2, *size, dim, dtype=dtype), torch.randn(2, 49, dim, dtype=dtype)
    y, h = module(x, g)
    for i in range(2):
        expected = block(x[i].double().numpy(), g[i].double().numpy(), Weights.of(module), stage)
        assert_close(y[i], expected[0], tolerance)
        assert_close(h[i], expected[1], tolerance)


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        ((224, 224), {}),
        ((33, 47), {}),
        ((97, 131), dict(name="dualtoken_vit_tiny_mix")),
        ((64, 64), dict(depths=(2, 1, 2), in_chans=4)),
        ((64, 96), dict(token_grid=3)),
        ((64, 96), dict(token_grid=0)),
        ((97, 70), dict(local_attention="window")),
        ((97, 70), dict(downsampling="onestep")),
        ((64, 96), dict(global_tokens="normal")),
        ((64, 96), dict(global_tokens="normal_star")),
        ((64, 96), dict(global_tokens="normal_star", name="dualtoken_vit_tiny_mix")),
        ((97, 131), dict(name="lightvit_tiny")),
    ],
    ids=str,
)
def test_network(size, kwargs):
    torch.manual_seed(1)
    model = create(**kwargs).double()
    depths = kwargs.get("depths", (1, 1, 1))
    names = dict(token_grid="grid", global_tokens="tokens", local_attention="local", downsampling="downsampling")
    switches = {names[key]: value for key, value in kwargs.items() if key in names}
    if model.default_cfg["architecture"].startswith("lightvit"):
        switches["block"] = light_block
    x = torch.randn(1, model.in_chans, *size, dtype=torch.float64)
    logits, maps = network(x[0].permute(1, 2, 0).numpy(), Weights.of(model), depths, **switches)
    assert_close(model(x)[0], logits)
    for actual, expected in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        assert_close(actual[0].permute(1, 2, 0), expected)
