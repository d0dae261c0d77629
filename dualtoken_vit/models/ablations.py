"""The alternatives of the paper's Tables 6 to 9, selected by the arguments of `DualTokenViT`."""

import torch
from timm.layers import LayerNorm, gen_relative_position_index, trunc_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn

from dualtoken_vit.models.layers import Attention, Linear, pad_to_multiple, token_mlp_layer


class NoTokens(nn.Module):
    """No global tokens (Table 7, 0): the broadcast reads X_ga itself."""

    def forward(self, x_ga: Tensor, g: Tensor | None) -> Tensor:  # (B, h, w, C) -> (B, h*w, C)
        return x_ga.flatten(1, 2)


class NormalFusion(Attention):
    """Global tokens without positions (Table 6), G_new = Proj(MSA(Q(MLP(LN(G))), K(X_ga), V(X_ga))).

    Normal* (Figure 3d) has no output projection. Normal (Figure 3c; `token_mlp` None) has no MLP. The paper shows it in
    a figure only; this is the design closest to the published parameters and FLOPs.
    """

    def __init__(self, dim, num_heads, token_mlp: str | None, num_tokens, attn_drop=0.0, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_drop)
        self.norm = LayerNorm(dim, **dd)
        self.mlp = token_mlp_layer(token_mlp, dim, num_tokens, **dd) if token_mlp else nn.Identity()
        self.q = Linear(dim, dim, **dd)
        self.kv = Linear(dim, 2 * dim, **dd)
        self.proj = nn.Identity() if token_mlp else Linear(dim, dim, **dd)

    def forward(self, x_ga: Tensor, g: Tensor | None) -> Tensor:  # (B, h, w, C), (B, M, C) -> (B, M, C)
        assert g is not None
        k, v = self.kv(x_ga.flatten(1, 2)).chunk(2, dim=-1)
        return self.proj(self.attend(self.q(self.mlp(self.norm(g))), k, v))


class OneStepDownsample(nn.Module):
    """Average pooling of X_local to the size of X_ds in one step (Table 9)."""

    def __init__(self, halvings: int):
        super().__init__()
        self.pool = nn.AvgPool2d(2**halvings, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_function
def crop(x: Tensor, like: Tensor) -> Tensor:
    """Crop x (B, H, W, C) at the right and bottom to the height and width of `like`."""
    # Not a slice: torch.export of PyTorch 2.11 does not see that its end is within the map.
    return x.narrow(1, 0, like.shape[1]).narrow(2, 0, like.shape[2])


class Windows(Attention):
    """Attention within windows that do not overlap, with relative position bias, not shifted.

    The base of Table 8's `WindowAttention` and of LightViT's attention, which compute queries, keys and values.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, window: int = 7, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_drop)
        self.window = window
        self.norm = LayerNorm(dim, **dd)
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **dd))
        index = torch.empty(window**2, window**2, dtype=torch.long, device=device)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.relative_position_index.copy_(gen_relative_position_index((self.window, self.window)))

    def attend_windows(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3C), H and W multiples of window -> (B, H, W, C)
        w = self.window
        B, H, W, C = qkv.shape  # C: three times the dim
        y = qkv.reshape(B, H // w, w, W // w, w, C).transpose(2, 3)
        y = y.flatten(3, 4).flatten(0, 2)  # (B * windows, w^2, 3C); no -1, which is ambiguous for an empty batch
        q, k, v = y.chunk(3, dim=-1)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, w^2, w^2)
        y = self.attend(q, k, v, bias)
        return y.reshape(B, H // w, W // w, w, w, C // 3).transpose(2, 3).reshape(B, H, W, C // 3)


class WindowAttention(Windows):
    """Window self-attention (Table 8): X + MSA within the windows of LN(X), no output projection."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        qkv = self.qkv(pad_to_multiple(self.norm(x), self.window))
        return x + crop(self.attend_windows(qkv), x)
