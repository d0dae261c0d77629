"""LightViT (Huang et al., arXiv 2207.05557), the network on which DualToken-ViT builds, for comparison.

Both share stem, patch merging, bi-dimensional attention and head. The blocks differ: in LightViT, image tokens attend
within windows. Eight global tokens without a position aggregate information from the whole image and broadcast it back.
Both kinds of attention use the same queries, keys and values, and image and global tokens pass through the same layers.
Weights are initialised as in DualToken-ViT (`TwoStreamViT.init_weights`), not by LightViT's truncated normal.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from dualtoken_vit.models.ablations import Windows, crop
from dualtoken_vit.models.layers import BiDim, Linear, Mlp, pad_to_multiple
from dualtoken_vit.models.two_stream import TwoStreamViT, check_stages, checkpoint_filter_fn, create, model_cfg

__all__ = ["LightViT", "checkpoint_filter_fn"]  # timm looks for the filter in the module of the class


class LocalGlobalAttention(Windows):
    """MSA within windows, plus attention to global tokens that have aggregated all image tokens."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, window: int = 7, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_drop, window, **dd)
        self.kv = Linear(dim, 2 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # (B, H, W, C), (B, M, C) -> (B, M + H*W, C)
        qkv = self.qkv(pad_to_multiple(self.norm(x), self.window))
        local = crop(self.attend_windows(qkv), x).flatten(1, 2)
        q, k, v = crop(qkv, x).flatten(1, 2).chunk(3, dim=-1)
        g = self.attend(self.qkv(self.norm(g)).chunk(3, dim=-1)[0], k, v)  # aggregation
        k, v = self.kv(g).chunk(2, dim=-1)
        return self.proj(torch.cat((g, local + self.attend(q, k, v)), dim=1))  # broadcast


class LightBlock(nn.Module):
    """Attention, then an FFN gated by bi-dimensional attention, on image and global tokens together."""

    def __init__(
        self, attn: nn.Module, dim: int, mlp_ratio: float, proj_drop: float, drop_path: float, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.bidim = BiDim(dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:  # (B, H, W, C), (B, M, C)
        assert g is not None
        tokens = torch.cat((g, x.flatten(1, 2)), dim=1) + self.drop_path1(self.attn(x, g))
        # BiDim takes a map; its mean runs over both kinds of tokens.
        y = self.bidim(self.mlp(self.norm2(tokens))[:, None])[:, 0]
        tokens = tokens + self.drop_path2(y)
        return tokens[:, g.shape[1] :].reshape(x.shape), tokens[:, : g.shape[1]]


class LightViT(TwoStreamViT):
    """Light-weight vision transformer without convolutions except in the stem.

    The first four arguments have a value per stage.

    Args:
        dims: channels C
        depths: blocks
        num_heads: heads of all attention layers
        mlp_ratios: expansion of the FFN
        num_tokens: number of global tokens, 1 or more
        window: side of the windows of self-attention, in tokens
        proj_drop_rate, attn_drop_rate: dropout in the FFN, and of attention weights
        kwargs: head_hidden_size, output_stride, in_chans, num_classes, global_pool, drop_rate, drop_path_rate: see
            `TwoStreamViT`

    Raises:
        ValueError: if a per-stage argument does not have one value per stage, or without global tokens.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256),  # C of each stage
        depths: tuple[int, ...] = (2, 6, 6),  # blocks
        num_heads: tuple[int, ...] = (2, 4, 8),
        mlp_ratios: tuple[float, ...] = (8, 4, 4),  # FFN expansion
        num_tokens: int = 8,  # global tokens
        window: int = 7,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs: Any,  # head_hidden_size, output_stride, in_chans, num_classes, ...: see TwoStreamViT
    ):
        dd = {"device": device, "dtype": dtype}
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens}: LightViT needs one or more")
        check_stages(dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)

        def make_block(i: int, halvings: int, dilation: int, drop_path: float) -> LightBlock:
            attn = LocalGlobalAttention(dims[i], num_heads[i], attn_drop_rate, window, **dd)
            return LightBlock(attn, dims[i], mlp_ratios[i], proj_drop_rate, drop_path, **dd)

        super().__init__(make_block, num_tokens, dims, depths, **dd, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "lightvit_tiny.untrained": model_cfg(
            paper_ids="arXiv:2207.05557",
            paper_name="LightViT: Towards Light-Weight Convolution-Free Vision Transformers",
            origin_url="https://arxiv.org/abs/2207.05557",
        ),
    }
)


@register_model
def lightvit_tiny(pretrained: bool = False, **kwargs: Any) -> LightViT:
    """LightViT-T: 9.4 M parameters, 0.7 G FLOPs, 78.7 % on ImageNet-1k as published (arXiv 2207.05557)."""
    return create(LightViT, "lightvit_tiny", pretrained, **kwargs)
