"""Runs of a given duration."""

from dataclasses import replace
from math import ceil
from statistics import median
from time import monotonic
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from dualtoken_vit.recipes import Recipe
from dualtoken_vit.tasks.optim import schedule_factor
from dualtoken_vit.tasks.run_folder import Module, RunFolder, Trainer

STEPS = 20  # the most that are timed


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with another number of epochs, its milestones at the same shares of them, warm-up in half at most.

    A warm-up in steps becomes shorter with the run.
    """
    optim, share = recipe.optim, epochs / recipe.optim.epochs
    changed = replace(
        optim,
        epochs=epochs,
        milestones=tuple(max(round(each * share), 1) for each in optim.milestones),
        warmup_epochs=min(optim.warmup_epochs, epochs / 2),
        warmup_steps=optim.warmup_steps and ceil(optim.warmup_steps * min(share, 1)),
    )
    return replace(recipe, optim=changed)


class TimeBudget(Callback):
    """Times the first steps, then sets the number of epochs to what fits into `run.max_minutes`.

    Only then does the run's folder get its recipe, with that number, which a resumed run keeps. An epoch takes its
    steps, whose cost `TaskModule.cost` estimates, and the validation, half a step for each batch.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.start = monotonic()
        self.ends: list[float] = []  # of each batch

    def _now(self, task: Module) -> float:
        if task.device.type != "cpu":
            torch.accelerator.synchronize()  # a step ends when the device has done it, not when it was queued
        return monotonic()

    def on_train_start(self, trainer: Trainer, task: Module) -> None:
        self.ends = [self._now(task)]

    def on_train_batch_end(self, trainer: Trainer, task: Module, outputs: Any, batch: Any, index: int) -> None:
        if self.folder.begun:
            return
        self.ends.append(self._now(task))
        steps = min(STEPS, ceil(task.steps_per_epoch / 4))  # a single epoch, too, has time to lower its learning rate
        if index + 1 == steps * trainer.accumulate_grad_batches:
            self._fit(trainer, task)

    def _fit(self, trainer: Trainer, task: Module) -> None:
        recipe = self.folder.recipe
        seconds = median(end - start for start, end in zip(self.ends, self.ends[1:], strict=False))
        cost = sum(task.cost((place + 0.5) / 100) for place in range(100)) / 100
        every, minutes = recipe.run.validate_every, recipe.run.max_minutes or 0
        loaders = trainer.datamodule
        batches = len(loaders.val) / (loaders.batch_size * trainer.world_size)  # of a validation in this process
        validation = batches * task.cost(1.0) / 2
        epoch = seconds * (trainer.num_training_batches * cost + validation / every)
        left = 60 * minutes - (self.ends[-1] - self.start) + seconds * (len(self.ends) - 1)
        epochs = trainer.strategy.broadcast(max(int(left / epoch) // every, 1) * every)
        if trainer.is_global_zero:
            time = f"in {minutes:g} minutes"
            if epochs * epoch > left:  # the fewest that there can be
                time = f"need {minutes + (epochs * epoch - left) / 60:.3g} minutes, not {minutes:g}"
                time += f", and --run.validate-every {every} allows no fewer" * (every > 1)
            print(f"an epoch takes about {epoch:.3g} s: {epochs} of them {time}", flush=True)

        recipe = with_epochs(recipe, epochs)
        task.recipe = trainer.datamodule.recipe = recipe
        trainer.fit_loop.max_epochs = epochs
        (schedule,) = (config.scheduler for config in trainer.lr_scheduler_configs)
        schedule.lr_lambdas = [schedule_factor(recipe.optim, task.steps_per_epoch)] * len(schedule.lr_lambdas)
        self.folder.begin(trainer, recipe)
