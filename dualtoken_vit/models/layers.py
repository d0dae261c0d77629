"""Layers shared by DualToken-ViT, its ablations and LightViT. Maps are channels-last, (B, H, W, C)."""

import platform
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, is_exporting, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.flop_counter import flop_registry, register_flop_formula


def is_known(condition: bool) -> bool:
    """Return `condition`; in a graph compiled for dynamic sizes, True only if it holds for every size.

    There, a branch on a size would need one compilation per outcome, and a few such branches exceed torch.compile's
    recompilation limit.
    """
    if torch.jit.is_scripting():
        return condition
    elif torch.jit.is_tracing():  # sizes are tensors
        return bool(condition)
    else:
        return statically_known_true(condition)


def autocasts_on_cpu() -> bool:
    """Whether autocast is enabled on the CPU; False in TorchScript, which has its own autocast."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.is_autocast_enabled("cpu")


# Multiply-accumulates from which oneDNN is as fast as MKL, or faster: its matrix product, its convolution.
ONEDNN_MACS: Final[int] = 2**21
ONEDNN_CONV_MACS: Final[int] = 2**24


@cache
def is_intel() -> bool:
    """Whether the CPU is of Intel, by its vendor on Linux and Windows; False where that is not known."""
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" in (info.read_text() if info.exists() else platform.processor())


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether oneDNN has AVX-512 where MKL has not: MKL uses it on processors of Intel only."""
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and torch.backends.cpu.get_cpu_capability() == "AVX512" and not is_intel()


def goes_to_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` uses oneDNN. Small products do not: it reorders the weights in each call."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    usual = type(weight) in (Tensor, nn.Parameter)  # subclasses, such as quantised weights, have rules of their own
    if torch.compiler.is_compiling():  # becomes a convolution of maps or tokens
        possible, least = x.ndim in (3, 4), ONEDNN_CONV_MACS
    else:  # becomes an operation without rules for transforms and forward-mode derivatives
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        possible, least = not (transformed or torch.jit.is_tracing()), ONEDNN_MACS
    possible = plain and usual and possible and not (is_exporting() or autocasts_on_cpu())
    large = possible and not is_known(x.numel() * weight.shape[0] < least)
    # Wrong shapes get PyTorch's own message from its matrix product.
    return large and is_known(x.shape[-1] == weight.shape[-1]) and onednn_is_faster()


class OneDNNLinear(torch.autograd.Function):
    """x (..., C) @ weight (D, C)^T + bias (D) -> (..., D) and its gradients by oneDNN."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (N, D)
        return (
            linear(grad, weight.T, None) if of_x else None,
            linear(x.reshape(-1, x.shape[-1]).T, rows.T, None).T if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
        """FLOPs of `OneDNNLinear` by its shapes, for PyTorch's `FlopCounterMode`, which does not know the operation."""
        return 2 * prod(x) * weight[0]


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`."""
    if torch.compiler.is_compiling():  # Inductor calls oneDNN's matrix product only if the weight is a constant
        maps = x if x.ndim == 4 else x[:, None]  # (B, H, W, C), or tokens as (B, 1, M, C)
        y = F.conv2d(maps.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
        return y if x.ndim == 4 else y[:, 0]
    compute = OneDNNLinear.apply if torch.is_grad_enabled() else OneDNNLinear.forward
    return compute(x, weight, bias)


@register_notrace_function
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) @ weight (D, C)^T + bias (D) -> (..., D); large products on the CPU by oneDNN.

    On the CPU, PyTorch uses MKL for float32 matrix products. oneDNN uses AVX-512 on processors of every vendor, MKL on
    those of Intel only. On one thread of an AMD EPYC, DualToken-ViT-S at 224 pixels and batch 16 runs 1.6 times as fast
    by oneDNN, and trains 1.4 times as fast; on an Intel Xeon, batch 1 and training are faster by MKL.
    """
    if torch.jit.is_scripting():  # TorchScript cannot query the processor
        return F.linear(x, weight, bias)
    else:
        return onednn_linear(x, weight, bias) if goes_to_onednn(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d in the precision of its weights under autocast on the CPU.

    The backward pass of a depthwise convolution in bfloat16 takes 1.7 times as long there as in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and autocasts_on_cpu():  # TorchScript cannot compile the context
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.to(self.weight.dtype), self.weight, self.bias)
        return self._conv_forward(x, self.weight, self.bias)


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
    # Not -H % multiple: in this form torch.compile sees that `multiple` divides the sum.
    bottom = (x.shape[1] + multiple - 1) // multiple * multiple - x.shape[1]
    right = (x.shape[2] + multiple - 1) // multiple * multiple - x.shape[2]
    if not (is_known(bottom == 0) and is_known(right == 0)):
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


@register_notrace_function
def resize_grid(x: Tensor, size: int, antialias: bool = False) -> Tensor:
    """Resize (B, H, W, C) bilinearly to (B, size, size, C) unless it has that size (section 3.3).

    `antialias` widens the filter when downsampling, so that every position contributes; upsampling is unchanged.
    """
    if not (is_known(x.shape[1] == size) and is_known(x.shape[2] == size)):
        maps = x.permute(0, 3, 1, 2)
        if antialias:  # the CPU kernel does not support half precision
            maps = maps.to(torch.promote_types(x.dtype, torch.float32))
        maps = F.interpolate(maps, (size, size), mode="bilinear", antialias=antialias)
        x = maps.permute(0, 2, 3, 1).to(x.dtype)
    return x


class Attention(nn.Module):
    """Multi-head scaled dot-product attention over projected tokens.

    Fused by timm's rule (`timm.layers.use_fused_attn`, `set_fused_attn`), except under autocast on the CPU, where the
    backward pass of the fused kernel in bfloat16 is ten times slower than in float32. The unfused path has a node
    `softmax` and a module `attn_drop`, from which `timm.utils.AttentionExtract` reads the attention map.

    Raises:
        ValueError: if num_heads does not divide dim.
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
        """q (B, N, C), k and v (B, M, C), optional bias (heads, N, M) added to the logits -> (B, N, C)."""
        B, N, C = q.shape
        head_dim = C // self.num_heads  # not -1, which is ambiguous for an empty batch
        q = q.reshape(B, N, self.num_heads, head_dim).transpose(1, 2)  # (B, heads, N, C/heads)
        k = k.reshape(B, k.shape[1], self.num_heads, head_dim).transpose(1, 2)  # (B, heads, M, C/heads)
        v = v.reshape(B, v.shape[1], self.num_heads, head_dim).transpose(1, 2)
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
    """Transpose(Linear(Transpose(Linear(G)))): mixes channels, then tokens (eq. 3.9)."""

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
    """Bi-dimensional attention (LightViT): gates the FFN output by channel and by position."""

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
        channel = self.act(self.channel_reduce(y.mean((1, 2))[:, None]))  # (B, 1, C/4): LiteRT has no product of rank 4
        spatial = self.act(self.spatial_reduce(y))  # (B, H, W, C/4)
        # spatial_select acts on [spatial, channel] concatenated; split in two, `channel` is not copied per position.
        w_spatial, w_channel = self.spatial_select.weight.chunk(2, dim=1)
        gate = F.linear(spatial, w_spatial, self.spatial_select.bias) + F.linear(channel, w_channel)[:, None]
        return x * (self.channel_expand(channel)[:, None].sigmoid() * gate.sigmoid())
