"""DualToken-ViT in one file, from leaf to root (Chu et al., arXiv 2309.12424, section 3).

Two streams run through the network. The image tokens X are a map of shape (B, H, W, C), kept channels-last from the
stem to the head. The position-aware global tokens G are a 7x7 grid, (B, 49, C), that every block updates from the
image and reads back into it:

    X_local  = Conv Encoder(X)                               local information          eq. 3.1
    X_ds     = step-wise downsampling of LN(X_local)         7x7 at 224 pixels          eq. 3.2
    X_ga     = self-attention over X_ds                      global information         eq. 3.3
    G_new    = alpha * MLP(LN(G)) + (1 - alpha) * X_ga       enriched by the past       eq. 3.7
    X_global = attention of LN(X_local) over G_new           broadcast to every place   eq. 3.5
    X        = X_local + X_global,  G = G + G_new            fusion                     eq. 3.6
    X        = X + BiDim(FFN(LN(X)))

The alternatives of the paper's Tables 6 to 9 are in `ablations.py`; `DualTokenViT`'s arguments choose between them.
Stem, patch merging, bi-dimensional attention and head follow LightViT (Huang et al., arXiv 2207.05557).
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    DropPath,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_device_dtype,
    is_exporting,
    lecun_normal_,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["DualTokenViT", "checkpoint_filter_fn"]

STRIDE = 32  # of the grid on which global information is gathered, and of the last stage


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis with the transformer's usual epsilon of 1e-6."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, eps=1e-6, device=device, dtype=dtype)


def is_known(condition: bool) -> bool:
    """`condition`, but in a graph compiled for any size only where it holds for every size.

    There a branch on a size would cost another compilation for each of its sides, and those of a few such branches
    together exceed torch.compile's limit.
    """
    if torch.jit.is_scripting():
        return condition
    elif torch.jit.is_tracing():  # where sizes are tensors
        return bool(condition)
    else:
        return statically_known_true(condition)


# Steps that branch on a size or a device are hidden from torch.fx, which cannot follow them.


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    return torch.get_num_threads() > 1 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def goes_to_onednn(x: Tensor) -> bool:
    """Whether `linear` convolves: oneDNN reorders the weights each time, which pays from about 1024 tokens on."""
    if torch.jit.is_scripting():  # cannot ask for threads and processor
        return False
    else:
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not is_exporting()
        return on_cpu and not is_known(x.numel() < 1024 * x.shape[-1]) and onednn_is_faster()


@register_notrace_function
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, [H,] W, C) @ weight (D, C)^T + bias (D) -> (B, [H,] W, D); if large, on the CPU, as a 1x1 convolution.

    PyTorch multiplies float32 matrices by MKL on the CPU but convolves by oneDNN, which uses AVX-512 on processors of
    every maker; where MKL does not, the same product takes half the time. Without AVX-512 both are equally fast.
    """
    if not goes_to_onednn(x):
        return F.linear(x, weight, bias)
    maps = x if x.ndim == 4 else x[:, None]  # (B, H, W, C), or tokens as (B, 1, M, C)
    y = F.conv2d(maps.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return y if x.ndim == 4 else y[:, 0]


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., C)
        return self.fc2(self.drop(self.act(self.fc1(x))))


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad (B, H, W, C) at the right and bottom until `multiple` divides H and W."""
    # Not -H % multiple: this way a compiler sees that `multiple` divides the sum.
    bottom = (x.shape[1] + multiple - 1) // multiple * multiple - x.shape[1]
    right = (x.shape[2] + multiple - 1) // multiple * multiple - x.shape[2]
    if not (is_known(bottom == 0) and is_known(right == 0)):
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


@register_notrace_function
def resize_grid(x: Tensor, size: int) -> Tensor:
    """Resize (B, H, W, C) bilinearly to (B, size, size, C) unless it has that size (section 3.3)."""
    if not (is_known(x.shape[1] == size) and is_known(x.shape[2] == size)):
        x = F.interpolate(x.permute(0, 3, 1, 2), (size, size), mode="bilinear").permute(0, 2, 3, 1)
    return x


def avg_pool2(x: Tensor) -> Tensor:
    """2x2 average pooling of (B, H, W, C); at an odd border the mean of what is there, so no token is lost."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)


def autocasts_on_cpu() -> bool:
    """Whether mixed precision is on for the CPU; TorchScript has autocast of its own and never is."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.is_autocast_enabled("cpu")


class Attention(nn.Module):
    """Multi-head scaled dot-product attention over tokens that are already projected.

    Fused by timm's rule (`timm.layers.use_fused_attn`, `set_fused_attn`), except under autocast on the CPU, where the
    backward pass of the fused kernel in bfloat16 is ten times slower than in float32. The unfused path runs through a
    node `softmax` and a module `attn_drop`, where `timm.utils.AttentionExtract` finds the map.
    """

    fused_attn: Final[bool]

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.attn_drop = nn.Dropout(attn_drop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q (B, N, C) over k and v (B, M, C), with a bias (heads, N, M) on the logits or none -> (B, N, C)."""
        B, N, C = q.shape
        q = q.reshape(B, N, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, C/heads)
        k = k.reshape(B, k.shape[1], self.num_heads, -1).transpose(1, 2)  # (B, heads, M, C/heads)
        v = v.reshape(B, v.shape[1], self.num_heads, -1).transpose(1, 2)
        if self.fused_attn and not autocasts_on_cpu():
            p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            if bias is not None:
                attn = attn + bias
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return x.transpose(1, 2).reshape(B, N, C)


class ConvEncoder(nn.Module):
    """Local information: the ConvNeXt block, X + PW2(GELU(PW1(LN(DW(X))))), expansion 4 (eq. 3.1)."""

    def __init__(self, dim: int, kernel_size: int, dilation: int = 1, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        padding = kernel_size // 2 * dilation
        self.dw = nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, **dd)
        self.norm = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)  # PW1, GELU, PW2

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + self.mlp(self.norm(self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


class StepwiseDownsample(nn.Module):
    """X_ds = phi(DS(X)): halve by average pooling, then (convolve, halve) M times (eq. 3.2)."""

    def __init__(self, dim: int, steps: int, convs: int, device=None, dtype=None):
        super().__init__()
        self.steps = steps  # halvings
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, device=device, dtype=dtype) for _ in range(convs))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H / 2^steps, W / 2^steps, C)
        for conv in self.convs:
            x = conv(avg_pool2(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for _ in range(self.steps - len(self.convs)):
            x = avg_pool2(x)
        return x


class GlobalAggregation(Attention):
    """X_ga = MSA(Q(X_ds), K(X_ds), V(X_ds)), no output projection (eq. 3.3)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, device=None, dtype=None):
        super().__init__(dim, num_heads, attn_drop)
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        return self.attend(q, k, v).reshape(x.shape)


class GlobalBroadcast(Attention):
    """X_global = Proj(MSA(Q(X), K(G_new), V(G_new))): every place reads the global tokens (eq. 3.5)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_drop)
        self.q = Linear(dim, dim, **dd)
        self.kv = Linear(dim, 2 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # (B, H, W, C), (B, M, C) -> (B, H, W, C)
        k, v = self.kv(g).chunk(2, dim=-1)
        return self.proj(self.attend(self.q(x).flatten(1, 2), k, v)).reshape(x.shape)


class MixMlp(nn.Module):
    """Transpose(Linear(Transpose(Linear(G)))): channels, then tokens (eq. 3.9)."""

    def __init__(self, dim: int, num_tokens: int, device=None, dtype=None):
        super().__init__()
        self.fc = Linear(dim, dim, device=device, dtype=dtype)
        self.mix = nn.Linear(num_tokens, num_tokens, device=device, dtype=dtype)

    def forward(self, g: Tensor) -> Tensor:  # (B, M, C)
        return self.mix(self.fc(g).transpose(1, 2)).transpose(1, 2)


def token_mlp_layer(kind: str, dim: int, num_tokens: int, device=None, dtype=None) -> nn.Module:
    """The MLP on G: "mlp" is Linear, GELU, Linear (eq. 3.8), "mix" is `MixMlp` (eq. 3.9)."""
    if kind == "mlp":
        return Mlp(dim, dim, device=device, dtype=dtype)
    return MixMlp(dim, num_tokens, device=device, dtype=dtype)


class PositionAwareFusion(nn.Module):
    """G_new = alpha * MLP(LN(G)) + (1 - alpha) * X_ga, place by place (eq. 3.7)."""

    def __init__(self, dim: int, grid: int, token_mlp: str, alpha: float, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grid = grid
        self.alpha = alpha
        self.norm = LayerNorm(dim, **dd)
        self.mlp = token_mlp_layer(token_mlp, dim, grid * grid, **dd)

    def forward(self, x_ga: Tensor, g: Tensor | None) -> Tensor:  # (B, h, w, C), (B, M, C) -> (B, M, C)
        assert g is not None
        x_ga = resize_grid(x_ga, self.grid).flatten(1, 2)
        return self.alpha * self.mlp(self.norm(g)) + (1 - self.alpha) * x_ga


class BiDim(nn.Module):
    """Bi-dimensional attention (LightViT): gates what the FFN says by channel and by place."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = LayerNorm(dim, **dd)
        self.channel_reduce = Linear(dim, dim // 4, **dd)
        self.channel_expand = Linear(dim // 4, dim, **dd)
        self.spatial_reduce = Linear(dim, dim // 4, **dd)
        self.spatial_select = Linear(2 * (dim // 4), 1, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        y = self.norm(x)
        channel = self.act(self.channel_reduce(y.mean((1, 2), keepdim=True)))  # (B, 1, 1, C/4)
        spatial = self.act(self.spatial_reduce(y))  # (B, H, W, C/4)
        # spatial_select acts on [spatial, channel] concatenated; in two parts nothing is copied to every place.
        w_spatial, w_channel = self.spatial_select.weight.chunk(2, dim=1)
        gate = F.linear(spatial, w_spatial, self.spatial_select.bias) + F.linear(channel, w_channel)
        return x * (self.channel_expand(channel).sigmoid() * gate.sigmoid())


class Block(nn.Module):
    """Dual Token Block (Figure 2): local branch, global branch through G, fusion, FFN with BiDim attention."""

    def __init__(
        self,
        local: nn.Module,  # X -> X_local
        downsample: nn.Module,  # LN(X_local) -> X_ds
        fusion: nn.Module,  # X_ga, G -> G_new
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.local = local
        self.norm1 = LayerNorm(dim, **dd)
        self.downsample = downsample
        self.aggregate_attn = GlobalAggregation(dim, num_heads, attn_drop, **dd)
        self.fusion = fusion
        self.broadcast_attn = GlobalBroadcast(dim, num_heads, attn_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.bidim = BiDim(dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:  # (B, H, W, C), (B, M, C)
        x = self.local(x)
        y = self.norm1(x)
        g_new = self.fusion(self.aggregate_attn(self.downsample(y)), g)
        x = x + self.drop_path1(self.broadcast_attn(y, g_new))
        if g is not None:
            g = g + g_new
        x = x + self.drop_path2(self.bidim(self.mlp(self.norm2(x))))
        return x, g


class PatchMerging(nn.Module):
    """Residual patch merging (LightViT): halves the map, widens both kinds of tokens.

    With `stride` 1 (`output_stride` below 32) every place is merged with its three neighbours at distance
    `dilation`, so that the weights trained at stride 2 mean the same.
    """

    def __init__(self, dim: int, out_dim: int, has_tokens: bool, stride: int, dilation: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.stride = stride
        self.dilation = dilation
        self.norm = LayerNorm(4 * dim, **dd)
        self.reduction = Linear(4 * dim, out_dim, bias=False, **dd)
        self.residual = Linear(dim, out_dim, bias=False, **dd)
        # global tokens
        self.token_norm = LayerNorm(dim, **dd) if has_tokens else nn.Identity()
        self.token_reduction = Linear(dim, out_dim, bias=False, **dd) if has_tokens else nn.Identity()

    def forward(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:  # (B, H, W, C), (B, M, C)
        if self.stride == 2:
            x = pad_to_multiple(x, 2)
            B, H, W, C = x.shape
            x = x.reshape(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(B, H // 2, W // 2, 4, C)
        else:
            d = self.dilation
            B, H, W, C = x.shape
            x = F.pad(x, (0, 0, 0, d, 0, d))
            x = torch.stack((x[:, :H, :W], x[:, :H, d:], x[:, d:, :W], x[:, d:, d:]), dim=3)
        x = self.reduction(self.norm(x.flatten(3))) + self.residual(x.amax(3))
        if g is not None:
            g = self.token_reduction(self.token_norm(g))
        return x, g


class Stage(nn.Module):
    """Patch merging (but in the first stage) and blocks."""

    def __init__(self, merging: PatchMerging | None, blocks: list[Block]):
        super().__init__()
        self.merging = merging
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:  # (B, H, W, C), (B, M, C)
        if self.merging is not None:
            x, g = self.merging(x, g)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, g = checkpoint(block, x, g)
            else:
                x, g = block(x, g)
        return x, g


class Stem(nn.Module):
    """Convolutions to stride 8 (LightViT), with the maps of stride 2 and 4 on the way; C' = C / 2."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        mid = dim // 2
        kwargs = dict(kernel_size=3, act_layer=nn.GELU, **dd)
        self.stride2 = nn.Sequential(  # stride 2
            ConvNormAct(in_chans, mid, stride=2, **kwargs),
            ConvNormAct(mid, mid, groups=mid, **kwargs),
            ConvNormAct(mid, mid, groups=mid, **kwargs),
        )
        self.stride4 = ConvNormAct(mid, mid, stride=2, groups=mid, **kwargs)  # stride 4
        self.proj = nn.Conv2d(mid, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(dim, **dd)

    def embed(self, x: Tensor) -> Tensor:  # (B, C', H/4, W/4) -> (B, H/8, W/8, C)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, H/8, W/8, C)
        return self.embed(self.stride4(self.stride2(x)))


class TokenMean(nn.Module):
    """The classification head up to its pooling (LightViT): LN, Linear to 1280, LN, GELU, mean over X and G.

    The mean runs over the tokens of both streams, yet what leaves is one map, as timm's `forward_features` must:
    N image tokens f(X) and M global tokens f(G) become (N f(X) + sum f(G)) / (N + M), whose plain average over the
    map is the mean over all N + M tokens.
    """

    def __init__(self, dim: int, hidden_size: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc = Linear(dim, hidden_size, **dd)
        self.norm = LayerNorm(hidden_size, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor, g: Tensor | None) -> Tensor:  # normed (B, H, W, C), (B, M, C) -> (B, H, W, 1280)
        x = self.act(self.norm(self.fc(x)))
        if g is not None:
            g = self.act(self.norm(self.fc(g)))
            share = 1 / (x.shape[1] * x.shape[2] + g.shape[1])
            x = x * (1 - share * g.shape[1]) + (g.sum(1) * share)[:, None, None]
        return x


class TwoStreamViT(nn.Module):
    """What DualToken-ViT and LightViT share: stem, stages of blocks on both streams, head; all that timm asks for.

    Takes (B, in_chans, H, W) of any size from 32x32 up and returns logits (B, num_classes). `forward_features` returns
    a map (B, H/32, W/32, 1280), NHWC, in which the global tokens already have their share (see `TokenMean`);
    `forward_intermediates` returns the pyramid of strides 2, 4 (stem), 8, 16, 32 (stages).

    Args:
        make_block: (stage, halvings from its stride to 32, dilation, drop path) -> a block: X, G -> X, G
        num_tokens: global tokens, 0: none
        dims: C of each stage
        depths: blocks of each stage
        head_hidden_size: width of the head
        output_stride: of the last stage, 8, 16 or 32
    """

    def __init__(
        self,
        make_block: Callable[[int, int, int, float], nn.Module],
        num_tokens: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        head_hidden_size: int,
        output_stride: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        device,
        dtype,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"

        self.stem = Stem(in_chans, dims[0], **dd)
        self.token_embed = nn.Parameter(torch.empty(1, num_tokens, dims[0], **dd)) if num_tokens else None
        self.feature_info = [
            dict(num_chs=dims[0] // 2, reduction=2, module="stem.stride2"),
            dict(num_chs=dims[0] // 2, reduction=4, module="stem.stride4"),
        ]

        drop_path = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages, prev_dim, stride, dilation = [], dims[0], 8, 1
        for i, dim in enumerate(dims):
            merging = None
            if i > 0:
                merge_stride = 2 if stride < output_stride else 1
                merging = PatchMerging(prev_dim, dim, num_tokens > 0, merge_stride, dilation, **dd)
                stride, dilation = stride * merge_stride, dilation * 2 // merge_stride
            halvings = (STRIDE // stride).bit_length() - 1
            blocks = [make_block(i, halvings, dilation, next(drop_path)) for _ in range(depths[i])]
            stages.append(Stage(merging, blocks))
            prev_dim = dim
            self.feature_info.append(dict(num_chs=dim, reduction=stride, module=f"stages.{i}"))
        self.stages = nn.ModuleList(stages)

        self.norm = LayerNorm(prev_dim, **dd)
        self.token_mean = TokenMean(prev_dim, head_hidden_size, **dd)
        self.num_features = head_hidden_size  # of the map that `forward_features` returns
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter and buffer; also after `to_empty`. All initialisation is in this one place.

        Weights keep the variance of what goes through them (Xavier for linear layers, LeCun for the stages'
        convolutions): in layers as narrow as these the usual 0.02 leaves every branch near zero and learning slow to
        start (REPRODUCTION.md). The stem as PyTorch has it; classifier and global tokens 0.02; biases zero.

        Args:
            needs_reset: call `reset_parameters` first; not needed for a model whose constructor just ran.
        """
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d) and not name.startswith("stem"):
                lecun_normal_(module.weight)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.num_classes > 0:
            trunc_normal_(self.head.weight, std=0.02)
        if self.token_embed is not None:
            trunc_normal_(self.token_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return tables | {"token_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem|^token_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.merging", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm|^token_mean", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes: none. `global_pool` None keeps the pooling, "" leaves the map."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt
            ).train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        head = nn.Identity()
        if num_classes > 0:
            head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self))
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final features and the pyramid: indices 0, 1 are the stem at strides 2, 4, then one a stage.

        Args:
            x: (B, in_chans, H, W)
            indices: the last n if an int, all if None, else those listed
            norm: apply the final LayerNorm to the last stage's map
            stop_early: leave out the stages behind the last index asked for
            output_fmt: "NCHW" or "NHWC"
            intermediates_only: return the list alone
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be NCHW or NHWC."
        take_indices, max_index = feature_take_indices(2 + len(self.stages), indices)
        maps: list[Tensor] = []  # NHWC
        x = self.stem.stride2(x)
        if 0 in take_indices:
            maps.append(x.permute(0, 2, 3, 1))
        x = self.stem.stride4(x)
        if 1 in take_indices:
            maps.append(x.permute(0, 2, 3, 1))
        x = self.stem.embed(x)
        g = self._expand_tokens(x)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a ModuleList
            stages = self.stages
        else:
            stages = self.stages[: max(max_index - 1, 0)]
        for i, stage in enumerate(stages):
            x, g = stage(x, g)
            if i + 2 in take_indices:
                maps.append(self.norm(x) if norm and i == last else x)
        if output_fmt == "NCHW":
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if intermediates_only:
            return maps
        if len(stages) == len(self.stages):  # else stopped early: the final norm is not sized for x
            x = self._finish(x, g)
        return x, maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given `forward_intermediates` indices do not need; returns them as non-negative numbers."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.feature_info) - 1
        if max_index < 1:
            self.stem.stride4 = nn.Identity()
        if max_index < 2:
            self.stem.proj, self.stem.norm = nn.Identity(), nn.Identity()
            self.token_embed = None
        self.stages = self.stages[: max(max_index - 1, 0)]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.token_mean = None
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        return take_indices

    def _expand_tokens(self, x: Tensor) -> Tensor | None:
        """The learnable global tokens, once for each image of x."""
        g = self.token_embed
        return g.expand(x.shape[0], -1, -1) if g is not None else None

    def _finish(self, x: Tensor, g: Tensor | None) -> Tensor:
        """The final norm and, unless pruned away, the head up to its pooling."""
        x = self.norm(x)
        if self.token_mean is not None:
            x = self.token_mean(x, self.norm(g) if g is not None else None)
        return x

    def forward_features(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, H/32, W/32, 1280)
        x = self.stem(x)
        g = self._expand_tokens(x)
        for stage in self.stages:
            x, g = stage(x, g)
        return self._finish(x, g)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # -> (B, num_classes)
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class DualTokenViT(TwoStreamViT):
    """Position-aware efficient vision transformer with dual token fusion.

    Raises:
        ValueError: for a switch with an unknown value, a combination of switches that means nothing, or a setting of
            the stages that is longer or shorter than dims.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256),  # C of each stage (Table 1)
        depths: tuple[int, ...] = (2, 6, 6),  # blocks
        num_heads: tuple[int, ...] = (2, 4, 8),
        mlp_ratios: tuple[float, ...] = (8, 4, 4),  # FFN expansion
        kernel_sizes: tuple[int, ...] = (5, 7, 0),  # of the Conv Encoder's depth-wise convolution, 0: no Conv Encoder
        head_hidden_size: int = 1280,
        alpha: float = 0.1,  # weight of the global tokens in eq. 3.7
        token_mlp: str = "mlp",  # "mlp" (eq. 3.8) or "mix" (eq. 3.9)
        token_grid: int = 7,  # n of the n x n global tokens, 0: none (Table 7)
        global_tokens: str = "position",  # "position", "normal" or "normal_star" (Table 6)
        local_attention: str = "conv",  # "conv" or "window" (Table 8)
        downsampling: str = "stepwise",  # "stepwise" or "onestep" (Table 9)
        output_stride: int = 32,  # 8, 16 or 32
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,  # dropout before the classifier
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        _check_switches(token_mlp, token_grid, global_tokens, local_attention, downsampling, output_stride)
        check_stages(dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, kernel_sizes=kernel_sizes)
        position_aware = global_tokens == "position"
        num_tokens = token_grid**2 if position_aware else 8

        def make_block(i: int, halvings: int, dilation: int, drop_path: float) -> Block:
            dim, heads = dims[i], num_heads[i]
            if kernel_sizes[i] == 0:
                local = nn.Identity()
            elif local_attention == "conv":
                local = ConvEncoder(dim, kernel_sizes[i], dilation, **dd)
            else:
                local = _ablations().WindowAttention(dim, heads, attn_drop_rate, **dd)
            if downsampling == "stepwise":  # M = 1 in the first stage, 0 in the others (section 3.3)
                downsample = StepwiseDownsample(dim, halvings, convs=int(i == 0), **dd)
            else:
                downsample = _ablations().OneStepDownsample(halvings)
            if position_aware and token_grid > 0:
                fusion = PositionAwareFusion(dim, token_grid, token_mlp, alpha, **dd)
            elif position_aware:
                fusion = _ablations().NoTokens()
            else:
                layer = _ablations().FUSIONS[global_tokens]
                fusion = layer(dim, heads, token_mlp, num_tokens, attn_drop_rate, **dd)
            rates = dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, drop_path=drop_path)
            return Block(local, downsample, fusion, dim, heads, mlp_ratios[i], **rates, **dd)

        super().__init__(
            make_block,
            num_tokens=num_tokens,
            dims=dims,
            depths=depths,
            head_hidden_size=head_hidden_size,
            output_stride=output_stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )


def _ablations():
    """The paper's alternatives, loaded when one is chosen: that file builds on the layers of this one."""
    from dualtoken_vit import ablations

    return ablations


def _check_switches(token_mlp, token_grid, global_tokens, local_attention, downsampling, output_stride) -> None:
    """Refuse unknown values and combinations that mean nothing, naming the argument and what to do."""
    for name, value, allowed in (
        ("token_mlp", token_mlp, ("mlp", "mix")),
        ("token_grid", token_grid, (7, 0, 3, 4, 5, 6, 8)),
        ("global_tokens", global_tokens, ("position", "normal", "normal_star")),
        ("local_attention", local_attention, ("conv", "window")),
        ("downsampling", downsampling, ("stepwise", "onestep")),
        ("output_stride", output_stride, (32, 16, 8)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    if global_tokens != "position" and token_grid != 7:
        raise ValueError(
            f"token_grid={token_grid} goes with global_tokens='position' only: {global_tokens!r} tokens form no grid, "
            "there are always 8 of them; leave token_grid out"
        )
    if token_mlp == "mix" and token_grid == 0:
        raise ValueError("token_mlp='mix' has no tokens to mix at token_grid=0; use token_mlp='mlp'")
    if token_mlp == "mix" and global_tokens == "normal":
        raise ValueError("token_mlp='mix' does not go with global_tokens='normal', which has no MLP; use 'mlp'")


def check_stages(dims: tuple[int, ...], **settings: tuple[float, ...]) -> None:
    """Refuse a setting that does not have one value for each stage, naming it."""
    for name, values in settings.items():
        if len(values) != len(dims):
            raise ValueError(f"{name}={values} must have as many values as dims={dims}: one for each stage")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit a checkpoint to `model`: unwrap trainers' nesting and prefixes, resize the grid of global tokens."""
    for key in ("state_dict_ema", "state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    state_dict = {key.removeprefix("module.").removeprefix("model."): value for key, value in state_dict.items()}
    old, new = state_dict.get("token_embed"), getattr(model, "token_embed", None)
    if old is not None and new is not None and old.shape[1] != new.shape[1]:
        old_grid, new_grid = (int(tokens.shape[1] ** 0.5) for tokens in (old, new))
        if old_grid**2 == old.shape[1] and new_grid**2 == new.shape[1]:
            grid = resize_grid(old.reshape(1, old_grid, old_grid, -1).float(), new_grid)
            state_dict["token_embed"] = grid.flatten(1, 2).to(old.dtype)
    return state_dict


def model_cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "min_input_size": (3, 32, 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.stride2.0.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2309.12424",
        "paper_name": "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
        "origin_url": "https://arxiv.org/abs/2309.12424",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "dualtoken_vit_tiny.untrained": model_cfg(),
        "dualtoken_vit_tiny_mix.untrained": model_cfg(),
        "dualtoken_vit_small.untrained": model_cfg(),
        "dualtoken_vit_small_mix.untrained": model_cfg(),
    }
)


def create(cls: type[TwoStreamViT], variant: str, pretrained: bool, **kwargs: Any) -> TwoStreamViT:
    """A network by timm's rules."""
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        # timm's default wrapper rewrites a model as a chain of children, which would lose the global tokens.
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )


TINY = dict(dims=(48, 96, 192), depths=(2, 6, 4), num_heads=(2, 4, 8))  # Table 1
SMALL = dict(dims=(64, 128, 256), depths=(2, 6, 6), num_heads=(2, 4, 8))


@register_model
def dualtoken_vit_tiny(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-T with the plain MLP on the global tokens (not in the paper's tables)."""
    return create(DualTokenViT, "dualtoken_vit_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def dualtoken_vit_tiny_mix(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-T (mix): 5.8 M parameters, 0.5 G FLOPs, 75.4 % on ImageNet-1k (Table 2)."""
    return create(DualTokenViT, "dualtoken_vit_tiny_mix", pretrained, **{**TINY, "token_mlp": "mix", **kwargs})


@register_model
def dualtoken_vit_small(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-S: 11.9 M parameters, 1.1 G FLOPs, 79.5 % on ImageNet-1k (Table 2)."""
    return create(DualTokenViT, "dualtoken_vit_small", pretrained, **{**SMALL, **kwargs})


@register_model
def dualtoken_vit_small_mix(pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    """DualToken-ViT-S (mix): 11.4 M parameters, 1.0 G FLOPs, 79.4 % on ImageNet-1k (Table 2)."""
    return create(DualTokenViT, "dualtoken_vit_small_mix", pretrained, **{**SMALL, "token_mlp": "mix", **kwargs})
