"""Runs of a given duration."""

from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise
from math import ceil
from statistics import median
from time import monotonic
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from dualtoken_vit.recipes import Recipe
from dualtoken_vit.tasks.loaders import completed
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
    steps, whose cost `TaskModule.cost` estimates, and the validation: for each batch half a step, or what the network
    takes for the first one where that is more, as with sliding windows or large images.
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

    def _time_validation(self, trainer: Trainer, task: Module, expected: float) -> float:
        """The seconds that the network takes for the first validation batch."""
        images, _ = trainer.strategy.batch_to_device(next(iter(trainer.datamodule.val_dataloader())))
        modes = [(module, module.training) for module in task.modules()]
        task.eval()
        with trainer.precision_plugin.val_step_context():
            for _ in range(2):  # the first time may be longer
                start = self._now(task)
                task.predict(images, 0)
                seconds = self._now(task) - start
                if seconds <= expected:
                    break
        for module, training in modes:
            module.training = training
        return seconds

    def _fit(self, trainer: Trainer, task: Module) -> None:
        recipe = self.folder.recipe
        ends = self.ends[:: trainer.accumulate_grad_batches]  # of the optimiser's steps, whose last batch has its part
        seconds = median(end - start for start, end in pairwise(ends)) / trainer.accumulate_grad_batches
        every, minutes = recipe.run.validate_every, recipe.run.max_minutes or 0
        loaders = trainer.datamodule
        batches = len(loaders.val) / (loaders.batch_size * trainer.world_size)  # of a validation in this process
        half = seconds * task.cost(1.0) / 2
        validation = max(batches * half, max(batches, 1.0) * self._time_validation(trainer, task, half))
        spent = self._now(task) - self.start

        def duration(epochs: int) -> float:
            fitted = with_epochs(recipe, epochs)
            cost = sum(task.cost(completed(fitted, epoch)) for epoch in range(epochs))
            return seconds * trainer.num_training_batches * cost + validation * epochs / every

        left = 60 * minutes - spent + seconds * (len(self.ends) - 1)
        choices = range(every, int(left / duration(1)) + 1, every)  # no epoch is shorter than the first
        epochs = trainer.strategy.broadcast(max(bisect_right(choices, left, key=duration), 1) * every)
        needed = duration(epochs)
        if trainer.is_global_zero:
            time = f"in {minutes:g} minutes"
            if needed > left:  # the fewest that there can be
                time = f"need {minutes + (needed - left) / 60:.3g} minutes, not {minutes:g}"
                time += f", and --run.validate-every {every} allows no fewer" * (every > 1)
            print(f"an epoch takes about {needed / epochs:.3g} s: {epochs} of them {time}", flush=True)
            if epochs == 1 and task.cost(1.0) > 1:
                print(
                    "the only epoch has begun at --data.start-size, and --data.image-size is not reached: give more "
                    "minutes, or leave out --data.start-size",
                    flush=True,
                )

        recipe = with_epochs(recipe, epochs)
        task.recipe = trainer.datamodule.recipe = recipe
        trainer.fit_loop.max_epochs = epochs
        (schedule,) = (config.scheduler for config in trainer.lr_scheduler_configs)
        schedule.lr_lambdas = [schedule_factor(recipe.optim, task.steps_per_epoch)] * len(schedule.lr_lambdas)
        self.folder.begin(trainer, recipe)
