"""The base of DualToken-ViT and LightViT: stem, stages of blocks on two streams, head and timm's interface."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    BatchNormAct2d,
    LayerNorm,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_device_dtype,
    lecun_normal_,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, list_pretrained
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dualtoken_vit.models.layers import Conv2d, Linear, pad_to_multiple, resize_grid

STRIDE = 32  # of the last stage, and of the map on which global information is aggregated


class PatchMerging(nn.Module):
    """Residual patch merging (LightViT): halves the resolution and projects image and global tokens to `out_dim`.

    With `stride` 1 (`output_stride` below 32) every position is merged with its three neighbours at distance
    `dilation`, so that weights trained at stride 2 remain valid.
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
    """Patch merging (except in the first stage) and blocks."""

    def __init__(self, merging: PatchMerging | None, blocks: list[nn.Module]):
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


class ConvNormAct(nn.Module):
    """A 3x3 convolution without bias, batch normalisation and GELU, with the names of timm's layer of this name."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, groups: int = 1, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = Conv2d(in_chans, out_chans, 3, stride, padding=1, groups=groups, bias=False, **dd)
        self.bn = BatchNormAct2d(out_chans, act_layer=nn.GELU, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, out_chans, H / stride, W / stride)
        return self.bn(self.conv(x))


class Stem(nn.Module):
    """Convolutional stem of stride 8 (LightViT), with intermediate maps of stride 2 and 4; C' = C / 2."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        mid = dim // 2
        self.stride2 = nn.Sequential(  # stride 2
            ConvNormAct(in_chans, mid, stride=2, **dd),
            ConvNormAct(mid, mid, groups=mid, **dd),
            ConvNormAct(mid, mid, groups=mid, **dd),
        )
        self.stride4: nn.Module = ConvNormAct(mid, mid, stride=2, groups=mid, **dd)  # stride 4
        self.proj: nn.Module = Conv2d(mid, dim, 3, stride=2, padding=1, **dd)
        self.norm: nn.Module = LayerNorm(dim, **dd)

    def embed(self, x: Tensor) -> Tensor:  # (B, C', H/4, W/4) -> (B, H/8, W/8, C)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, H/8, W/8, C)
        return self.embed(self.stride4(self.stride2(x)))


class TokenMean(nn.Module):
    """The classification head before pooling (LightViT): LN, Linear to 1280, LN, GELU, mean over X and G.

    The mean covers the tokens of both streams, but timm's `forward_features` must return one map. N image tokens f(X)
    and M global tokens f(G) become the map (N f(X) + sum f(G)) / (N + M), whose average is the mean over all N + M
    tokens.
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
    """Stem, stages of blocks on two streams, head, and timm's interface.

    Takes (B, in_chans, H, W) of any size from 32x32 up and returns logits (B, num_classes). `forward_features` returns
    a map (B, H/32, W/32, 1280), NHWC, that includes the global tokens (see `TokenMean`). `forward_intermediates`
    returns the pyramid of strides 2, 4 (stem), 8, 16, 32 (stages).

    Args:
        make_block: (stage, halvings from its stride to 32, dilation, drop path) -> a block (X, G) -> (X, G)
        num_tokens: number of global tokens, 0 for none
        dims: C of each stage
        depths: number of blocks of each stage
        head_hidden_size: width of the head
        output_stride: stride of the last stage: 8, 16 or 32
        drop_rate: dropout before the classifier
        others: as in every timm model

    Raises:
        ValueError: for another output_stride.
    """

    def __init__(
        self,
        make_block: Callable[[int, int, int, float], nn.Module],
        num_tokens: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        /,
        head_hidden_size: int = 1280,
        output_stride: int = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        if output_stride not in (32, 16, 8):
            raise ValueError(f"output_stride={output_stride!r} is unknown; choose one of 32, 16, 8")
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"

        self.stem = Stem(in_chans, dims[0], **dd)
        self.token_embed = nn.Parameter(torch.empty(1, num_tokens, dims[0], **dd)) if num_tokens else None
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=dims[0] // 2, reduction=2, module="stem.stride2"),
            dict(num_chs=dims[0] // 2, reduction=4, module="stem.stride4"),
        ]

        drop_path: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
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

        self.norm: nn.Module = LayerNorm(prev_dim, **dd)
        self.token_mean: TokenMean | None = TokenMean(prev_dim, head_hidden_size, **dd)
        self.num_features = head_hidden_size  # of the map that `forward_features` returns
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter and buffer, also after `to_empty`. All initialisation is here.

        Linear layers use Xavier, the convolutions of the stages LeCun initialisation: in layers this narrow the usual
        standard deviation of 0.02 leaves every branch near zero, and training starts slowly (REPRODUCTION.md). The stem
        keeps PyTorch's default, classifier and global tokens use 0.02, biases are zero.

        Args:
            needs_reset: call `reset_parameters` first; not needed in the constructor
        """
        if needs_reset:
            for module in self.modules():
                if reset := getattr(module, "reset_parameters", None):
                    reset()
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
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes remove it. `global_pool` None keeps the pooling, "" disables it."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt
            ).train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        head: nn.Module = nn.Identity()
        if num_classes > 0:
            head = linear = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self))
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
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
        """Return the final features and the pyramid. Indices 0 and 1 are the stem (strides 2 and 4), then the stages.

        Args:
            x: (B, in_chans, H, W)
            indices: the last n if an int, all if None, else those listed
            norm: apply the final LayerNorm to the last stage's map
            stop_early: skip the stages after the last requested index
            output_fmt: "NCHW" or "NHWC"
            intermediates_only: return the list only
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
        if len(stages) == len(self.stages):  # otherwise the final norm does not fit the width of x
            x = self._finish(x, g)
        return x, maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that these `forward_intermediates` indices do not need; return them as non-negative."""
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
        """The global tokens repeated for each image of x: (B, M, C)."""
        g = self.token_embed
        return g.expand(x.shape[0], -1, -1) if g is not None else None

    def _finish(self, x: Tensor, g: Tensor | None) -> Tensor:
        """The final norm and, unless pruned, the head before pooling."""
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


Model = TypeVar("Model", bound=TwoStreamViT)


def check_stages(dims: tuple[int, ...], **settings: tuple[float, ...]) -> None:
    """Raise ValueError for a per-stage argument that does not have one value per stage."""
    for name, values in settings.items():
        if len(values) != len(dims):
            raise ValueError(f"{name}={values} must have as many values as dims={dims}: one per stage")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Fit a checkpoint to `model`: remove wrapping keys and prefixes, resize the grid of global tokens."""
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


def create(cls: type[Model], variant: str, pretrained: bool, **kwargs: Any) -> Model:
    """Build a model with timm's `build_model_with_cfg`.

    The default cfg of a variant is the paper's, for ImageNet-1k and without weights; `pretrained` takes the first that
    has weights.
    """
    if pretrained and not kwargs.get("pretrained_cfg") and (tagged := list_pretrained(f"{variant}.*")):
        kwargs["pretrained_cfg"] = tagged[0].partition(".")[2]
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        # timm's default feature wrapper chains the children, which would lose the global tokens.
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )
