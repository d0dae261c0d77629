"""Optimisers and the schedule of the learning rate."""

import math
from difflib import get_close_matches

import timm.optim
import torch
from torch import nn

from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """timm's optimiser of that name over the model's parameters.

    Biases, norms and what `model.no_weight_decay()` names are not decayed. With `layer_decay` the groups follow
    `model.group_matcher()`, and each group's peak learning rate is lr * layer_decay ** (layers above it).

    Raises:
        InputError: for an optimiser that timm does not have.
    """
    try:
        pair = timm.optim.get_optimizer_info(optim.optimizer.rpartition("_")[2]).num_betas == 2  # some take three
        optimizer = timm.optim.create_optimizer_v2(
            model,
            opt=optim.optimizer,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **({"betas": optim.betas} if pair else {}),
        )
    except ValueError as error:
        near = get_close_matches(optim.optimizer, timm.optim.list_optimizers())
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"--optim.optimizer {optim.optimizer}: {error}{hint}") from error
    for group in optimizer.param_groups:  # torch's schedulers do not know timm's lr_scale
        group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer, optim: Optim, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up to the peak, then `optim.schedule` to the last step; to be stepped every batch."""
    total = optim.epochs * steps_per_epoch
    warmup = round(optim.warmup_epochs * steps_per_epoch) if optim.warmup_steps is None else optim.warmup_steps
    warmup = min(warmup, total)
    floor = optim.min_lr / optim.lr

    def factor(step: int) -> float:
        progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        elif optim.schedule == "step":
            return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in optim.milestones)
        elif optim.schedule == "poly":
            return floor + (1 - floor) * (1 - progress) ** 0.9
        else:
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
