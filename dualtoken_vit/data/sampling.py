"""Batches that depend on the seed, the epoch and the dataset alone.

Whatever the number of processes and workers, and wherever a run was interrupted, the same images come in the same order
with the same augmentation.
"""

import gc
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_all_start_methods, get_start_method, parent_process
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted


def mix(*entropy: int) -> int:
    """One 64-bit seed from several integers, which may be negative."""
    numbers = [len(entropy), *(number % 2**64 for number in entropy)]  # (1, 0) and (1,) differ
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators from `entropy` inside, and restore them afterwards."""
    # timm's transforms draw from numpy's global generator, and torch.manual_seed would reset the GPUs' generators too.
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    seed = mix(*entropy)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


Prepare = Callable[[Any, int, float], None]


class _Seeded(Dataset):
    """`dataset` at (epoch, progress, i), with the randomness of sample i drawn from (seed, epoch, i).

    i may be one of `_weighted_order`.
    """

    def __init__(self, dataset: Any, seed: int, prepare: Prepare | None) -> None:
        self.dataset, self.seed, self.prepare = dataset, seed, prepare
        self.moment: tuple[int, float] | None = None  # what the dataset is prepared for

    def __getitem__(self, key: tuple[int, float, int]) -> Any:
        epoch, progress, index = key
        if self.prepare and self.moment != (epoch, progress):
            self.prepare(self.dataset, epoch, progress)
            self.moment = epoch, progress
        with seeded(self.seed, epoch, index):
            return self.dataset[index % len(self.dataset)]


class _Loader(DataLoader):
    """A DataLoader that collects garbage before it starts its workers.

    A fork has none of the threads that an object of this process may own and wait for as it is collected, as OpenVINO's
    networks do: a worker that collected one would never end.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers:
            gc.collect()
        return super().__iter__()


class _Rest(_Loader):
    """The batches of a stream from number `skip` on: those before are read and dropped."""

    skip = 0

    def __len__(self) -> int:
        return super().__len__() - self.skip

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return islice(super().__iter__(), self.skip, None)


def _steps(order: list[int], size: int, groups: Sequence[int] | None) -> list[list[int]]:
    """`order` in steps of `size` images of one group, in the order in which they fill up; then of the remainders."""
    steps: list[list[int]] = []
    filling: defaultdict[int, list[int]] = defaultdict(list)
    for index in order:
        step = filling[groups[index % len(groups)] if groups else 0]
        step.append(index)
        if len(step) == size:
            steps.append(step.copy())
            step.clear()
    rest = [index for step in filling.values() for index in step]
    return steps + [rest[start : start + size] for start in range(0, len(rest) - size + 1, size)]


def _weighted_order(weights: Sequence[float], generator: torch.Generator) -> list[int]:
    """As many numbers as there are images; image i gets weights[i] / mean(weights) of them, rounded at random.

    Systematic sampling: images are intervals of these lengths, side by side, and points at distance 1 with a random
    start draw them. Images of equal weight are neighbours, so that their total is off by one at most. The k-th number
    of image i, from 0, is i + k * len(weights).
    """
    count = len(weights)
    order = torch.randperm(count, generator=generator)
    lengths = torch.tensor(weights, dtype=torch.float64)[order]
    lengths, places = lengths.sort(stable=True)
    order, ends = order[places], lengths.cumsum(0)
    ends = (ends * (count / ends[-1]) + torch.rand((), generator=generator, dtype=torch.float64)).floor().long()
    times = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    numbers = torch.cat([order[times > k] + k * count for k in range(int(times.max()))])
    return numbers[torch.randperm(len(numbers), generator=generator)].tolist()


def full_batches(count: int, batch_size: int, world: int = 1) -> int:
    """The number of full batches of `world` processes in `count` training images; an InputError for none."""
    if count < batch_size * world:
        each = f" in each of {world} processes" if world > 1 else ""
        remedy = f"give --optim.batch-size {count // world} or less" if count >= world else "add images"
        raise InputError(f"{counted(count, 'training image')} cannot fill one batch of {batch_size}{each}; {remedy}")
    return count // (batch_size * world)


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """A batch of images of any size: a list of images, and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _start_worker(worker: int) -> None:
    """Prepare a data loading process: it never collects what it has inherited, see `_Loader`."""
    gc.freeze()
    outlast_signals()


GRACE = 60  # seconds


def outlast_signals() -> None:
    """Make a data loading process ignore Ctrl-C, and end only `GRACE` seconds after SIGTERM, at a second one at once.

    Both reach the whole group of processes, and the main one needs its workers to finish its step and save. Its own
    SIGTERM, by which it ends them, ends them at once. Without `sigwaitinfo` (macOS, Windows) SIGTERM is PyTorch's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # unlike a handler, it tells who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_await_sigterm, daemon=True).start()


def _await_sigterm() -> None:
    parent = parent_process()  # not of a fork server
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid == (parent.pid if parent else os.getppid()):
        os._exit(0)  # as PyTorch's handler: any other status would be an error
    signal.sigtimedwait({signal.SIGTERM}, GRACE)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def start_method(workers: int) -> str | None:
    """How to start data loading processes; None: as the program does.

    On Linux they are forks, unless the program has chosen something else than the system's default: the fork server of
    Python 3.14 does not outlast the signals that its workers do, see `outlast_signals`.
    """
    chosen = get_start_method(allow_none=True) not in (None, get_all_start_methods()[0])
    return "fork" if workers and sys.platform == "linux" and not chosen else None


def loader(
    dataset: ImageData,
    batch_size: int,
    *,
    train: bool,
    seed: int,
    epoch: int = 0,
    progress: float = 0.0,
    prepare: Prepare | None = None,
    before: DataLoader | None = None,
    skip: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    groups: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    collate_fn: Callable | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """The batches that process `rank` of `world` sees in one epoch.

    In training, the order is drawn from (seed, epoch); without `weights` it is a permutation. Each process takes every
    `world`-th index, and images that do not fill a batch in every process are left out. In validation, every image
    occurs exactly once over all processes, so one process may have a batch fewer, or a smaller one.

    Args:
        dataset: map-style, or a stream
        batch_size: images per batch of this process
        train: whether to shuffle, and to drop images that do not fill a batch
        seed, epoch: of the order and the augmentation
        progress: completed share of the run
        prepare: adapts the training data to epoch and progress, in each process that reads them
        before: the training loader of another epoch, whose workers continue with this one
        skip: batches at the start of the epoch that are already done
        rank, world: number of this process, and number of processes
        workers: processes that read images; 0: this one
        groups: a number for each image. In training, the images of a step, over all processes, have the same number,
            except in the last steps, which consist of the remainders of the groups. Not for a stream.
        weights: how often each image occurs in training, relative to the others, in as many batches; None: once. Not
            for a stream.
        collate_fn: makes a batch of a list of samples; default: tensors are stacked
        pin_memory: whether the batches go to a CUDA device, see PyTorch's DataLoader

    Returns:
        A loader of what `collate_fn` makes; for classification, (images (B, C, S, S), targets (B,)).

    Raises:
        InputError: if the training images do not fill one batch.
    """
    common: dict[str, Any] = dict(
        collate_fn=collate_fn,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(mix(seed, epoch)),  # a loader would otherwise draw from the global one
    )
    samples: Any = dataset
    if isinstance(dataset, IterableDataset):  # see `ImageStream`
        if prepare:
            prepare(dataset, epoch, progress)
        stream = samples.epoch(batch_size, train, mix(seed, epoch), rank, world, workers)
        common |= dict(num_workers=stream.workers, multiprocessing_context=start_method(stream.workers))
        rest = _Rest(stream, batch_size, drop_last=train, **common)
        rest.skip = skip
        return rest
    count = len(dataset)
    if train:
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        order = _weighted_order(weights, generator) if weights else torch.randperm(count, generator=generator).tolist()
        full_batches(count, batch_size, world)
        steps = _steps(order, batch_size * world, groups)[skip:]
        batches: list[Any] = [[(epoch, progress, index) for index in step[rank::world]] for step in steps]
        if before is not None:
            before.batch_sampler[:] = batches  # type: ignore[index]  # the list below
            return before
        samples = _Seeded(dataset, seed, prepare)
    else:
        own = list(range(rank, count, world))
        batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    common |= dict(num_workers=workers, persistent_workers=workers > 0, multiprocessing_context=start_method(workers))
    return _Loader(samples, batch_sampler=batches, **common)
