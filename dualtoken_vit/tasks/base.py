"""What every task shares: the network made from its recipe, the optimiser, and randomness that a resume repeats."""

import inspect
import logging
import math
import random
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Table
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.utils.data import Dataset

from dualtoken_vit.backbone import check_size
from dualtoken_vit.checkpoint import LoadReport
from dualtoken_vit.data.sampling import mix
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.optim import build_optimizer, build_schedule
from dualtoken_vit.recipes import Model, Recipe, model_kwargs, to_dict

# Smallest and largest value of fields whose type does not say it already.
RANGES = {
    "roi_samples": (4, math.inf),
    "width": (1, math.inf),
    "dropout": (0, 0.99),
    "model.drop_path_rate": (0, 0.99),
    "data.image_size": (1, math.inf),
    "data.start_size": (1, math.inf),
    "data.max_size": (1, math.inf),
    "data.limit": (1, math.inf),
    "data.crop_pct": (0.01, math.inf),
    "data.workers": (0, math.inf),
    "data.ignore_index": (0, 65535),
    "data.crop_size": (32, math.inf),
    "augment.multi_scale": (1, math.inf),
    "augment.scale": (1e-3, math.inf),
    "augment.class_cap": (1e-3, 1),
    "augment.photometric": (0, 1),
    "augment.label_smoothing": (0, 1),
    "augment.hflip": (0, 1),
    "augment.vflip": (0, 1),
    "augment.random_erasing": (0, 1),
    "augment.mixup": (0, math.inf),
    "augment.cutmix": (0, math.inf),
    "optim.lr": (1e-12, math.inf),
    "optim.warmup_epochs": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "optim.milestones": (1, math.inf),
    "optim.min_lr": (0, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.accumulate": (1, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.clip_grad": (1e-12, math.inf),
    "optim.layer_decay": (1e-12, 1),
    "optim.ema_decay": (0, 1),
    "run.seed": (0, 2**32 - 1),
    "run.devices": (1, math.inf),
    "run.nodes": (1, math.inf),
    "run.validate_every": (1, math.inf),
    "run.save_every": (1, math.inf),
}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as one level of "section.field"."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(recipe).items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def check_ranges(recipe: Recipe) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        InputError: names the first of them.
    """
    values = flatten(recipe)
    for name, (least, most) in RANGES.items():
        given = values.get(name)  # not every kind of recipe has it
        for value in given if isinstance(given, tuple) else (given,):
            if value in (None, "auto") or least <= value <= most:
                continue
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {limit}")


def create_network(recipe: Model, num_classes: int, **args: Any) -> nn.Module:
    """The recipe's timm network.

    Args:
        recipe: what is asked for
        num_classes: 0: without a classifier
        args: other arguments of timm.create_model, `model.args` among them

    Raises:
        InputError: for an unknown name, or arguments that it refuses.
    """
    if ":" not in recipe.name and not timm.is_model(recipe.name):  # hf-hub:, local-dir: name a place
        near = get_close_matches(recipe.name, timm.list_models())
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise InputError(f"--model.name {recipe.name}: timm has no such model{hint}")
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
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError, OSError) as error:
        raise InputError(_refusal(recipe, error)) from error
    if recipe.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except AssertionError as error:
            raise InputError(f"--model.grad-checkpointing: {recipe.name}: {first_line(error)}") from error
    return model


def create_model(recipe: Model, num_classes: int, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's classifier, and the arguments that make it again (`save_checkpoint`'s model_args).

    A network whose size is fixed (deit, vit, ...) is made for `image_size`.

    Raises:
        InputError: for an unknown name, arguments that it refuses, or pictures of a size that it does not take.
    """
    args = model_kwargs(recipe)
    if ":" not in recipe.name and timm.is_model(recipe.name):
        cfg = timm.get_pretrained_cfg(recipe.name)
        if cfg is not None and cfg.fixed_input_size:
            args = {"img_size": image_size, **args}
    model = create_network(recipe, num_classes, **args)
    check_size(model, recipe.in_chans, image_size)
    return model.train().to(memory_format=torch.channels_last), args


def _refusal(recipe: Model, error: Exception) -> str:
    """Which field of the recipe made timm refuse the network with this error, and why."""
    name, args, reason = recipe.name, model_kwargs(recipe), first_line(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
    key = unknown[1] if unknown else None
    if key in args:
        with torch.device("meta"):
            known = inspect.signature(type(timm.create_model(name))).parameters
        near = get_close_matches(key, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        return f"--model.args {key}={args[key]}: {name} has no such argument; {hint}"
    if key == "drop_path_rate":
        return f"--model.drop-path-rate {recipe.drop_path_rate}: {name} has no stochastic depth; give 0"
    fetched = recipe.pretrained or ":" in name
    if args and not (fetched and isinstance(error, RuntimeError | OSError)):
        return f"--model.args {' '.join(recipe.args)}: {reason}"
    return f"--model.name {name}: {reason}"


class _AllReduce(torch.autograd.Function):
    """The sum over the processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over the processes, as floating point; of values only, no gradient goes through it."""
    x = x.detach().float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


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
        return AllReduceBatchNorm(model).train(model.training)  # a detector's stays in evaluation mode
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
        r".*in eval mode at the start of training.*",  # a detector's frozen statistics
        r".*IterableDataset. has .__len__. defined.*",  # and each worker of ours has its own share
        r".*broadcast_buffers. is deprecated.*",  # its successor is not in every version of PyTorch that we support
        r".*srun. command is available.*",
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
    """A network in training, and what validation says of it.

    A subclass adds `training_step`, `validation_step` and the methods and attributes without a value here.

    Args:
        model: a network
        recipe: the experiment
        steps_per_epoch: optimiser steps; the data module may still change them when it leaves out pictures
    """

    score: str
    """The validation metric that decides which epoch is the best; more is better."""
    panels: dict[str, dict[str, str]]
    """What `plots.save_curves` draws."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples; none: tensors are stacked."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps_per_epoch: int):
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

    def prepare_epoch(self, train: Dataset, progress: float) -> None:
        """Adapt the training data to the share of the run that is done; called before each epoch's first batch."""

    def compute_metrics(self) -> dict[str, float]:
        """The metrics of the validation just done, over all processes; called on each of them, and once."""
        raise NotImplementedError

    def headline(self, row: dict[str, Any]) -> str:
        """The metrics of an epoch in a few words."""
        raise NotImplementedError

    def save_details(self, out: Path) -> None:
        """Write what the last validation gave beside the metrics into a folder."""
        raise NotImplementedError

    def evaluation(self) -> "Evaluation":
        """The last validation, to be told."""
        raise NotImplementedError


class Evaluation(Protocol):
    """What a network does on a validation set."""

    def to_json(self) -> dict[str, Any]: ...

    def table(self) -> Table: ...

    def headline(self) -> str: ...


@dataclass(frozen=True)
class Setup:
    """All that `fit` needs of one kind of task."""

    model: nn.Module
    train: Dataset
    val: Dataset
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    """`save_checkpoint`'s, and so are `model_args` and `category_ids`."""
    model_args: dict[str, Any]
    report: LoadReport | None
    """What was loaded to start from."""
    build_task: Callable[[nn.Module, int], Task]
    """Makes the task of the network, perhaps synchronised, and the optimiser steps an epoch."""
    category_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines to tell before the run."""
