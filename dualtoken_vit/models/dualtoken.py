"""DualToken-ViT in one file, from leaf to root (Chu et al., arXiv 2309.12424, section 3).

The network has two streams. The image tokens X are a map (B, H, W, C), channels-last from the stem to the head. The
position-aware global tokens G are a 7x7 grid, (B, 49, C). Every block updates G from the image tokens and broadcasts it
back to them:

    X_local  = Conv Encoder(X)                               local information          eq. 3.1
    X_ds     = step-wise downsampling of LN(X_local)         7x7 at 224 pixels          eq. 3.2
    X_ga     = self-attention over X_ds                      global information         eq. 3.3
    G_new    = alpha * MLP(LN(G)) + (1 - alpha) * X_ga       fused with earlier stages  eq. 3.7
    X_global = attention of LN(X_local) over G_new           broadcast to all positions eq. 3.5
    X        = X_local + X_global,  G = G + G_new            fusion                     eq. 3.6
    X        = X + BiDim(FFN(LN(X)))

The alternatives of the paper's Tables 6 to 9 are in `ablations.py`; arguments of `DualTokenViT` select them.
Stem, patch merging, bi-dimensional attention and head follow LightViT (Huang et al., arXiv 2207.05557).
"""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from dualtoken_vit.models import ablations
from dualtoken_vit.models.layers import Attention, BiDim, Conv2d, Linear, Mlp, resize_grid, token_mlp_layer
from dualtoken_vit.models.two_stream import TwoStreamViT, check_stages, checkpoint_filter_fn, create, model_cfg

__all__ = ["DualTokenViT", "checkpoint_filter_fn"]


class ConvEncoder(nn.Module):
    """Local information: the ConvNeXt block, X + PW2(GELU(PW1(LN(DW(X))))), expansion 4 (eq. 3.1)."""

    def __init__(self, dim: int, kernel_size: int, dilation: int = 1, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        padding = kernel_size // 2 * dilation
        self.dw = Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, **dd)
        self.norm = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)  # PW1, GELU, PW2

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + self.mlp(self.norm(self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


def avg_pool2(x: Tensor) -> Tensor:
    """2x2 average pooling of (B, H, W, C). At an odd border it averages the remaining tokens: none is lost."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)


class StepwiseDownsample(nn.Module):
    """X_ds = phi(DS(X)): average pooling by 2, the first M followed by a convolution (eq. 3.2)."""

    def __init__(self, dim: int, steps: int, convs: int, device=None, dtype=None):
        super().__init__()
        self.steps = steps  # halvings
        self.convs = nn.ModuleList(Conv2d(dim, dim, 3, padding=1, device=device, dtype=dtype) for _ in range(convs))

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
    """X_global = Proj(MSA(Q(X), K(G_new), V(G_new))): every image token attends to the global tokens (eq. 3.5)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_drop)
        self.q = Linear(dim, dim, **dd)
        self.kv = Linear(dim, 2 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # (B, H, W, C), (B, M, C) -> (B, H, W, C)
        k, v = self.kv(g).chunk(2, dim=-1)
        return self.proj(self.attend(self.q(x).flatten(1, 2), k, v)).reshape(x.shape)


class PositionAwareFusion(nn.Module):
    """G_new = alpha * MLP(LN(G)) + (1 - alpha) * X_ga, position by position (eq. 3.7)."""

    def __init__(self, dim: int, grid: int, token_mlp: str, alpha: float, antialias: bool, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grid = grid
        self.antialias = antialias
        self.alpha = alpha
        self.norm = LayerNorm(dim, **dd)
        self.mlp = token_mlp_layer(token_mlp, dim, grid * grid, **dd)

    def forward(self, x_ga: Tensor, g: Tensor | None) -> Tensor:  # (B, h, w, C), (B, M, C) -> (B, M, C)
        assert g is not None
        x_ga = resize_grid(x_ga, self.grid, self.antialias).flatten(1, 2)
        return self.alpha * self.mlp(self.norm(g)) + (1 - self.alpha) * x_ga


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


class DualTokenViT(TwoStreamViT):
    """Position-aware efficient vision transformer with dual token fusion.

    Tables and equations are the paper's. The first five arguments have a value per stage.

    Args:
        dims: channels C (Table 1)
        depths: blocks (Table 1)
        num_heads: heads of all attention layers (Table 1)
        mlp_ratios: expansion of the FFN
        kernel_sizes: of the depthwise convolution in the Conv Encoder (eq. 3.1); 0: no local branch
        alpha: weight of the position-aware global tokens in their fusion with X_ga (eq. 3.7)
        token_mlp: MLP on the global tokens: "mlp" (eq. 3.8) or "mix" (eq. 3.9, the networks called mix)
        token_grid: n of the n x n position-aware global tokens: 3 to 8, or 0 for none (Table 7)
        global_tokens: "position", or 8 tokens without positions: "normal" or "normal_star" (Table 6)
        local_attention: local branch: "conv", or "window" self-attention (Table 8)
        downsampling: of the map on which global information is aggregated: "stepwise" or "onestep" (Table 9)
        grid_resize: interpolation of X_ga to the token grid, which the paper leaves open: "bilinear" or "antialias"
            (bilinear with antialiasing)
        proj_drop_rate, attn_drop_rate: dropout in the FFN, and of attention weights
        kwargs: head_hidden_size, output_stride, in_chans, num_classes, global_pool, drop_rate, drop_path_rate: see
            `TwoStreamViT`

    Raises:
        ValueError: for an unknown value, an invalid combination of arguments, or a per-stage argument that does not
            have one value per stage.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256),  # C of each stage (Table 1)
        depths: tuple[int, ...] = (2, 6, 6),  # blocks
        num_heads: tuple[int, ...] = (2, 4, 8),
        mlp_ratios: tuple[float, ...] = (8, 4, 4),  # FFN expansion
        kernel_sizes: tuple[int, ...] = (5, 7, 0),  # of the Conv Encoder's depth-wise convolution, 0: no Conv Encoder
        alpha: float = 0.1,  # weight of the global tokens in eq. 3.7
        token_mlp: str = "mlp",  # "mlp" (eq. 3.8) or "mix" (eq. 3.9)
        token_grid: int = 7,  # n of the n x n global tokens, 0: none (Table 7)
        global_tokens: str = "position",  # "position", "normal" or "normal_star" (Table 6)
        local_attention: str = "conv",  # "conv" or "window" (Table 8)
        downsampling: str = "stepwise",  # "stepwise" or "onestep" (Table 9)
        grid_resize: str = "bilinear",  # of X_ga to the token grid: "bilinear" or "antialias" (bilinear, antialiased)
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs: Any,  # head_hidden_size, output_stride, in_chans, num_classes, ...: see TwoStreamViT
    ):
        dd = {"device": device, "dtype": dtype}
        _check_switches(token_mlp, token_grid, global_tokens, local_attention, downsampling, grid_resize)
        check_stages(dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, kernel_sizes=kernel_sizes)
        position_aware = global_tokens == "position"
        num_tokens = token_grid**2 if position_aware else 8

        def make_block(i: int, halvings: int, dilation: int, drop_path: float) -> Block:
            dim, heads = dims[i], num_heads[i]
            if kernel_sizes[i] == 0:
                local: nn.Module = nn.Identity()
            elif local_attention == "conv":
                local = ConvEncoder(dim, kernel_sizes[i], dilation, **dd)
            else:
                local = ablations.WindowAttention(dim, heads, attn_drop_rate, **dd)
            if downsampling == "stepwise":  # M = 1 in the first stage, 0 in the others (section 3.3)
                downsample: nn.Module = StepwiseDownsample(dim, halvings, convs=int(i == 0), **dd)
            else:
                downsample = ablations.OneStepDownsample(halvings)
            if position_aware and token_grid > 0:
                antialias = grid_resize == "antialias"
                fusion: nn.Module = PositionAwareFusion(dim, token_grid, token_mlp, alpha, antialias, **dd)
            elif position_aware:
                fusion = ablations.NoTokens()
            else:
                mlp = token_mlp if global_tokens == "normal_star" else None
                fusion = ablations.NormalFusion(dim, heads, mlp, num_tokens, attn_drop_rate, **dd)
            rates = dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, drop_path=drop_path)
            return Block(local, downsample, fusion, dim, heads, mlp_ratios[i], **rates, **dd)

        super().__init__(make_block, num_tokens, dims, depths, **dd, **kwargs)


def _check_switches(token_mlp, token_grid, global_tokens, local_attention, downsampling, grid_resize) -> None:
    """Raise ValueError for unknown values and invalid combinations, naming the argument and what to do."""
    for name, value, allowed in (
        ("token_mlp", token_mlp, ("mlp", "mix")),
        ("token_grid", token_grid, (7, 0, 3, 4, 5, 6, 8)),
        ("global_tokens", global_tokens, ("position", "normal", "normal_star")),
        ("local_attention", local_attention, ("conv", "window")),
        ("downsampling", downsampling, ("stepwise", "onestep")),
        ("grid_resize", grid_resize, ("bilinear", "antialias")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    if global_tokens != "position" and token_grid != 7:
        raise ValueError(
            f"token_grid={token_grid} requires global_tokens='position': the 8 {global_tokens!r} tokens form no grid; "
            "leave token_grid out"
        )
    if token_mlp == "mix" and token_grid == 0:
        raise ValueError("token_mlp='mix' requires global tokens, but token_grid=0; use token_mlp='mlp'")
    if token_mlp == "mix" and global_tokens == "normal":
        raise ValueError("token_mlp='mix' has no effect with global_tokens='normal', which has no MLP; use 'mlp'")


WEIGHTS = Path(__file__).parents[1] / "weights"


def _trained(variant: str, tag: str) -> dict[str, Any]:
    """The cfg of weights in the package, for images of 128x128 pixels; their model card is beside them."""
    labels = (WEIGHTS / f"{tag}.txt").read_text().split()
    return model_cfg(
        file=str(WEIGHTS / f"dualtoken_vit_{variant}.{tag}.safetensors"),
        license="cc-by-nc-4.0",
        num_classes=len(labels),
        label_names=labels,
        input_size=(3, 128, 128),
        pool_size=(4, 4),
        crop_pct=1.0,
    )


default_cfgs = generate_default_cfgs(
    {
        "dualtoken_vit_tiny_mix.tin190": _trained("tiny_mix", "tin190"),
        "dualtoken_vit_small_mix.tin190": _trained("small_mix", "tin190"),
        # the default of a network without pretrained=True
        **{
            f"dualtoken_vit_{variant}.untrained*": model_cfg() for variant in ("tiny", "tiny_mix", "small", "small_mix")
        },
    }
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
