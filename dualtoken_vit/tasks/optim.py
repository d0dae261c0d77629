"""The optimiser, the learning rate schedule and weight averaging."""

import math
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, similar
from dualtoken_vit.models.backbone import layer_names
from dualtoken_vit.recipes import Optim, Recipe

FLAT = 0.75  # share of the run after which schedule flat-cosine decays


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """A timm optimiser for the parameters of a model.

    Biases, normalisation layers and the parameters in `model.no_weight_decay()` have no weight decay. The Muon family
    leaves these, the first convolution and the classifiers to its fallback, AdamW (or NAdamW). With `layer_decay`,
    groups follow `model.group_matcher()` and have peak learning rate lr * layer_decay ** (layers above).

    Raises:
        InputError: for an unknown optimiser, or one that cannot be used here.
    """
    options: dict[str, Any] = dict(lr=optim.lr, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay)
    base = optim.optimizer.lower().removeprefix("lookahead_")
    ends = [*layer_names(model, "first_conv"), *layer_names(model, "classifier")]
    try:
        if "_" in base:  # timm takes what follows the last one, whatever precedes it
            raise ValueError("only lookahead_ may precede the name of an optimiser")
        info = timm.optim.get_optimizer_info(base)
        if info.second_order:
            raise ValueError("needs second derivatives, which training does not compute")
        if info.opt_class is timm.optim.kron.Kron:  # as timm compiles it, with and without opt_einsum
            raise ValueError("takes tens of gigabytes of memory for a weight of 384 x 192")
        if info.num_betas == 2:  # some have three
            options["betas"] = optim.betas
        optimizer = timm.optim.create_optimizer_v2(
            model,
            opt=optim.optimizer,
            fallback_list=[f"{name}.*" for name in ends],
            fallback_no_weight_decay=True,
            **options,
        )
    except (ValueError, AssertionError, ImportError, RuntimeError) as error:  # some need a GPU, or another package
        names = list(map(str, timm.optim.list_optimizers()))
        hint = "" if base in names else similar(base, names)
        raise InputError(f"--optim.optimizer {optim.optimizer}: {error}{hint and f'; {hint}'}") from error
    for group in optimizer.param_groups:  # torch's schedulers ignore timm's lr_scale
        group["lr"] *= group.get("lr_scale", 1.0)
        if "fused" in group and all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["fused"] = True  # takes a third of the time
    return optimizer


def ema_update(decay: float) -> Callable[..., None]:
    """The `multi_avg_fn` of an AveragedModel: an exponential moving average with a warm-up of the decay.

    Update n after the first, which copies, has decay min(decay, 1 - (1 + n) ** (-2 / 3)), as timm's ModelEmaV3 with
    `use_warmup`. Otherwise the average of a short run would still contain the initial weights.
    """

    def update(averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
        if not (values[0].is_floating_point() or values[0].is_complex()):  # indices and counters
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
            return
        get_ema_multi_avg_fn(min(decay, 1 - (1 + count.item()) ** (-2 / 3)))(averages, values, count)

    return update


class Average(WeightAveraging):
    """The average of the weights by `ema_update`, on the device of the run.

    Lightning would keep it where the network is at `setup`, which is the CPU, and copy all weights there at each step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=ema_update(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)


def warmup_steps(optim: Optim, steps_per_epoch: int) -> int:
    """Steps until the learning rate has its peak."""
    return round(optim.warmup_epochs * steps_per_epoch) if optim.warmup_steps is None else optim.warmup_steps


def schedule_notes(recipe: Recipe, steps_per_epoch: int) -> list[str]:
    """Lines on parts of the schedule that have no effect. With `run.max_minutes`, the length of the run is not known.

    Raises:
        InputError: for steps at no epoch.
    """
    optim, notes = recipe.optim, []
    if optim.schedule == "step" and not optim.milestones:
        raise InputError("--optim.schedule step: needs --optim.milestones, the epochs after which the rate falls")
    milestones = " ".join(map(str, optim.milestones))
    if milestones and optim.schedule != "step":
        notes.append(f"--optim.milestones {milestones} is for --optim.schedule step, and not used")
    if recipe.run.max_minutes is not None:
        return notes
    if optim.schedule == "step" and min(optim.milestones) >= optim.epochs:
        notes.append(f"--optim.milestones {milestones}: the run ends before, so that the learning rate never falls")
    warmup, total = warmup_steps(optim, steps_per_epoch), optim.epochs * steps_per_epoch
    flag = "--optim.warmup-epochs" if optim.warmup_steps is None else "--optim.warmup-steps"
    if warmup >= total:
        notes.append(
            f"the warm-up of {counted(warmup, 'step')} is cut to the {total} of this run: the learning rate rises "
            f"until the end; give a smaller {flag}, or more epochs"
        )
    return notes


def schedule_factor(optim: Optim, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate at each step, relative to the peak: linear warm-up, then `optim.schedule` until the last."""
    total = optim.epochs * steps_per_epoch
    warmup = min(warmup_steps(optim, steps_per_epoch), total)
    floor = optim.min_lr / optim.lr

    def factor(step: int) -> float:
        progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        elif optim.schedule == "step":
            return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in optim.milestones)
        elif optim.schedule == "poly":
            return floor + (1 - floor) * (1 - progress) ** 0.9
        elif optim.schedule == "flat-cosine":
            start = max(min(FLAT * total, total - 2), 0)  # the last step decays in short runs, too
            progress = min(max((step - start) / max(total - 1 - start, 1), 0.0), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
