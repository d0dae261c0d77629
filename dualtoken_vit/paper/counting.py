"""Parameters, multiply-accumulates and FLOPs of any model, from shapes alone (on the meta device)."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Counts:
    """Result of `count`, for one image."""

    params: int  # number of parameters
    macs: int  # multiply-accumulates of convolutions, linear layers and attention products
    flops: int  # FLOPs as the paper counts them: `macs` plus normalisation and bilinear resizing by fvcore's rules
    attention: int = 0  # the part of `macs` that multiplies two activations: Q K^T, and its product with V


def _per_element(cost: int, weight: int) -> Callable[..., int]:
    """Rule for a normalisation: `cost` per element, plus 1 if it has weights, its argument number `weight`."""
    return lambda *args, **kwargs: prod(args[0]) * (cost + (args[weight] is not None))


# fvcore's rules for operations other than matrix products. Tensor arguments arrive as shapes.
RULES: dict[Any, Callable[..., int]] = {
    aten.native_layer_norm: _per_element(4, weight=2),
    aten.native_group_norm: _per_element(4, weight=1),
    aten.native_batch_norm: _per_element(1, weight=1),  # with running statistics
    aten._native_batch_norm_legit_no_training: _per_element(1, weight=1),  # the same in older versions of PyTorch
    aten.upsample_bilinear2d: lambda *args, out_shape, **kwargs: 4 * prod(out_shape),
    aten._upsample_bilinear2d_aa: lambda *args, out_shape, **kwargs: 4 * prod(out_shape),
}


def count(
    model: nn.Module,
    input_size: tuple[int, ...] = (3, 224, 224),
    forward: Callable[[nn.Module, Tensor], object] | None = None,
    device: str = "meta",
) -> Counts:
    """Count the forward pass of one image through a model in evaluation mode. The model is not changed.

    Activations, softmax, pooling, biases and additions are not counted, as in fvcore.

    Args:
        model: on any device, including meta.
        input_size: channels, height and width of the image.
        forward: called with the model and a batch of one image; by default calls the model.
        device: "cpu" for a model whose operations depend on the values (a detector), which then runs on noise.
    """
    model = deepcopy(model).to(device).eval().requires_grad_(False)
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # PyTorch's counter has missed fused attention in some versions
        if isinstance(module, nn.Linear):
            module.requires_grad_()  # else PyTorch 2.11 computes some of them by `bmm`, as if they were attention
    dtype = next((p.dtype for p in model.parameters()), None)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=RULES) as counter:
        (forward or nn.Module.__call__)(model, torch.rand(1, *input_size, device=device, dtype=dtype))
    operations = counter.get_flop_counts()["Global"]
    rest = sum(n for op, n in operations.items() if op in RULES)
    macs = (sum(operations.values()) - rest) // 2  # PyTorch counts a multiply-accumulate as two
    attention = sum(operations.get(op, 0) for op in (aten.bmm, aten.baddbmm)) // 2
    return Counts(sum(p.numel() for p in model.parameters()), macs, macs + rest, attention)
