"""What every task shares: the network made from its recipe, the optimiser, and randomness that a resume repeats."""

import logging
import math
import random
import sys
import warnings
from difflib import get_close_matches
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from dualtoken_vit.data.sampling import mix
from dualtoken_vit.errors import InputError
from dualtoken_vit.optim import build_optimizer, build_schedule
from dualtoken_vit.recipes import Classification, Model, model_kwargs, to_dict

# Smallest and largest value of fields whose type does not say it already.
RANGES = {
    "model.drop_path_rate": (0, 0.99),
    "data.image_size": (1, math.inf),
    "data.crop_pct": (0.01, math.inf),
    "data.workers": (0, math.inf),
    "augment.label_smoothing": (0, 1),
    "augment.hflip": (0, 1),
    "augment.vflip": (0, 1),
    "augment.random_erasing": (0, 1),
    "augment.mixup": (0, math.inf),
    "augment.cutmix": (0, math.inf),
    "optim.lr": (1e-12, math.inf),
    "optim.warmup_epochs": (0, math.inf),
    "optim.min_lr": (0, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.accumulate": (1, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.clip_grad": (1e-12, math.inf),
    "optim.layer_decay": (1e-12, 1),
    "optim.ema_decay": (0, 1),
    "run.seed": (0, 2**32 - 1),
    "run.nodes": (1, math.inf),
    "run.save_every": (1, math.inf),
}


def check_ranges(recipe: Classification) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        InputError: names the first of them.
    """
    sections = to_dict(recipe)
    for name, (least, most) in RANGES.items():
        section, field = name.split(".")
        value = sections[section][field]
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {limit}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def create_model(recipe: Model, num_classes: int, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's timm model, and the arguments that make it again (`save_checkpoint`'s model_args).

    A network whose size is fixed (deit, vit, ...) is made for `image_size`.

    Raises:
        InputError: for an unknown name, arguments that it refuses, or pictures of a size that it does not take.
    """
    if ":" not in recipe.name and not timm.is_model(recipe.name):  # hf-hub:, local-dir: name a place
        near = get_close_matches(recipe.name, timm.list_models())
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise InputError(f"--model.name {recipe.name}: timm has no such model{hint}")
    args = model_kwargs(recipe)
    cfg = timm.get_pretrained_cfg(recipe.name) if ":" not in recipe.name else None
    if cfg is not None and cfg.fixed_input_size:
        args = {"img_size": image_size, **args}
    rates = {"drop_path_rate": recipe.drop_path_rate} if recipe.drop_path_rate > 0 else {}  # not every network takes it
    try:
        model = timm.create_model(
            recipe.name,
            pretrained=recipe.pretrained,
            num_classes=num_classes,
            in_chans=recipe.in_chans,
            **rates,
            **args,
        )
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing()
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise InputError(f"--model.name {recipe.name}: {first_line(error)}") from error
    check_size(model, recipe.in_chans, image_size)
    return model.train().to(memory_format=torch.channels_last), args


@torch.no_grad()
def check_size(model: nn.Module, in_chans: int, image_size: int) -> None:
    """See whether the network takes pictures of this size; leaves it in evaluation mode.

    Raises:
        InputError: if not.
    """
    try:
        model.eval()(torch.zeros(1, in_chans, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        name = model.pretrained_cfg["architecture"]
        message = f"--data.image-size {image_size} is not a size that {name} takes: {first_line(error)}"
        raise InputError(message) from error


class _AllReduce(torch.autograd.Function):
    """The sum over the processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class AllReduceBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, on any device (torch's SyncBatchNorm wants a GPU).

    Every process must have a batch of the same shape. Followed by the dropout and activation of timm's layer.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...)
        if not self.training:
            return self.act(self.drop(super().forward(x)))
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # statistics of half precision would be poor
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        world = dist.get_world_size()
        count = x.numel() // x.shape[1] * world
        mean = _AllReduce.apply(x.mean(dims)) / world
        centred = x - mean.view(shape)
        var = _AllReduce.apply(centred.square().mean(dims)) / world
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(x.to(dtype)))


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch normalisation see the whole batch when several processes share it; the state dict keeps its keys."""
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return AllReduceBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronise_batchnorm(child, device))
    return model


def quiet() -> None:
    """Silence what Lightning tells about its own workings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*resuming from a checkpoint that ended before the epoch ended.*",  # those of `fit` do resume
        r".*LeafSpec.*",
        r".*IterableDataset. has .__len__. defined.*",  # and each worker of ours has its own share
        r".*broadcast_buffers. is deprecated.*",  # its successor is not in every version of PyTorch that we support
        r".*srun. command is available.*",
        r".*compute. method of metric .* was called before the .*update.*",  # fewer validation batches than processes
    ):
        warnings.filterwarnings("ignore", message)


class ProgressBar(RichProgressBar):
    """Lightning's bar on stderr, where there is a terminal; epochs count from 1."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10 if sys.stderr.isatty() else 0, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: Trainer, task: LightningModule) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(trainer, task).items() if key != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))


class Task(LightningModule):
    """A network in training. A subclass adds `training_step`, `validation_step` and `compute_metrics`.

    Args:
        model: a timm model
        recipe: the experiment
        steps_per_epoch: optimiser steps
    """

    score: str
    """The validation metric that decides which epoch is the best; more is better."""

    def __init__(self, model: nn.Module, recipe: Classification, steps_per_epoch: int):
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.recipe.optim)
        schedule = build_schedule(optimizer, self.recipe.optim, self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout, drop path and mixup depend on the place in the run alone, not on what was drawn before."""
        seed = mix(self.recipe.run.seed, self.current_epoch, batch_idx, self.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  timm's Mixup draws from the global generator
        torch.manual_seed(seed)

    def compute_metrics(self) -> dict[str, float]:
        """The metrics of the validation just done, over all processes; called on each of them, and once."""
        raise NotImplementedError
