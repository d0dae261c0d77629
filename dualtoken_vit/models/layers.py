"""Layers that DualToken-ViT, its ablations and LightViT share. Maps are channels-last, (B, H, W, C)."""

from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true


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
