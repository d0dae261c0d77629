"""The batches of each process and epoch."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning
import torch

from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.sampling import full_batches, loader
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted
from dualtoken_vit.recipes import Recipe


def completed(recipe: Recipe, epoch: int) -> float:
    """The share of the run at which an epoch's training images are prepared: 1 in the last one, as for its result.

    With `run.max_minutes` the first epoch begins before their number is known, so that it is never the last one here.
    """
    last = epoch + 1 == recipe.optim.epochs and (epoch > 0 or recipe.run.max_minutes is None)
    return 1.0 if last else epoch / recipe.optim.epochs


class _Batches:
    """A loader with the length of the whole epoch, as Lightning counts, even where its start is skipped.

    Its worker processes start with the first batch, not with `iter`, which Lightning calls twice an epoch.
    """

    def __init__(self, batches: Any, length: int):
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Loaders(lightning.LightningDataModule):
    """The batches of each process and epoch.

    Before a new run the first process reads every image (`ImageData.verify`); every process, and a `resumed` run, takes
    over what it found. `batch_size` is that of a process and accumulated batch.
    """

    trainer: Any
    """The lightning.Trainer of a `TaskModule`; set by Lightning."""

    def __init__(self, train: ImageData, val: ImageData, recipe: Recipe, batch_size: int, resumed: bool):
        super().__init__()
        self.train, self.val, self.recipe = train, val, recipe
        self.batch_size, self.resumed = batch_size, resumed
        self.problem = ""
        self.before: Any = None  # the loader of the last epoch, if its workers can go on
        self.prepare_data_per_node = False

    @property
    def images(self) -> list[int]:
        """Numbers of training and validation images."""
        return [len(self.train), len(self.val)]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; an InputError where the images do not suffice for one."""
        return full_batches(len(self.train), self.recipe.optim.batch_size)

    def prepare_data(self) -> None:
        """Read every image; called on the first process only, the others wait however long it takes."""
        if self.resumed or not self.recipe.data.verify:
            return
        try:
            for title, dataset in (("training", self.train), ("validation", self.val)):
                known = len(dataset.notes)
                if names := dataset.verify(skip=self.recipe.data.skip):
                    skipped = f"skipped {counted(len(names), f'unreadable {title} image')}"
                    print(skipped, *dataset.notes[known:], sep="\n")
        except InputError as error:
            self.problem = str(error)

    def setup(self, stage: str) -> None:
        """Hand what `prepare_data` found, or its error, to every process, so that none waits for a stopped one."""
        self.problem, found = self.trainer.strategy.broadcast((self.problem, self.state_dict()))
        if self.problem:
            raise InputError(self.problem)
        self.load_state_dict(found)
        count, world = len(self.val), self.trainer.world_size
        if count < world:
            images = counted(count, "validation image")
            raise InputError(f"{images} cannot be shared by {world} processes; use fewer --run.devices")

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train.state_dict(), "val": self.val.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train.load_state_dict(state_dict["train"])
        self.val.load_state_dict(state_dict["val"])
        self.trainer.lightning_module.steps_per_epoch = self.steps_per_epoch

    def _loader(self, images: ImageData, **more: Any) -> Any:
        return loader(
            images,
            batch_size=self.batch_size,
            seed=self.recipe.run.seed,
            workers=self.recipe.data.workers,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            collate_fn=self.trainer.lightning_module.collate,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            **more,
        )

    def train_dataloader(self) -> _Batches:
        loop, epoch = self.trainer.fit_loop, self.trainer.current_epoch
        done = loop.epoch_loop.batch_progress.current.processed if loop.restarting else 0
        module: Any = self.trainer.lightning_module
        batches = self._loader(
            self.train,
            train=True,
            groups=self.train.groups,
            weights=self.train.weights,
            epoch=epoch,
            progress=completed(self.recipe, epoch),
            prepare=module.prepare_epoch,
            before=self.before,
            skip=done,
        )
        if batches.persistent_workers and self.before is None:
            self.before = batches
            if batches.pin_memory:
                # The first use takes a lock of the C library. In the thread that pins one loader's batches it may hold
                # it while the other's workers are forked: their copy would never be released.
                torch.empty(1).pin_memory()
            # The validation's workers start now too: while they live, each page of memory that this process changes is
            # copied, and before the first step there are few.
            iter(self._val)
        return _Batches(batches, min(done + len(batches), self.steps_per_epoch * self.recipe.optim.accumulate))

    def val_dataloader(self) -> Any:
        return self._val

    @cached_property
    def _val(self) -> Any:
        return self._loader(self.val, train=False)
