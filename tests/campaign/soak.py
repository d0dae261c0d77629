"""Long runs: memory, open files and threads stay as they are."""

import os
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

import numpy as np

from campaign.core import Case, Verdict, command, finish, running, start
from campaign.world import best, training

GROWTH = 1.0  # MB for 1,000 images


class Sample(NamedTuple):
    """A process at one moment."""

    memory: float  # MB that only this process has
    files: int
    threads: int


def sample(pid: int) -> Sample:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) for line in rollup if line.startswith(("Private", "Swap:")))
    threads = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Threads"))
    return Sample(own / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(threads.split()[1]))


def watch(pid: int, folder: Path, images: int, limit: float) -> tuple[str, str]:
    """Sample a process until it ends; returns what was seen in its second half, and a fault or "".

    The slope of the memory is that of a line through these samples: before, what is needed once is allocated, such as
    that of the first drawings.
    """
    samples, times, begin = [], [], time.monotonic()
    while time.monotonic() - begin < limit:
        try:
            samples.append(sample(pid))
            times.append(time.monotonic() - begin)
        except (OSError, StopIteration):  # it ended
            break
        if not running(pid):
            break
        time.sleep(0.2)
    ended = finish(pid, folder, limit)
    later = samples[len(samples) // 2 : -3]
    if ended.status or len(later) < 10:
        return "", ended.fault or ended.message or "too short to be measured"
    slope = np.polyfit(times[len(samples) // 2 : -3], [one.memory for one in later], 1)[0]
    growth = slope * times[-1] / images * 1000
    half, more, seen = len(later) // 2, [], f"{growth:+.2f} MB for 1,000 images"
    for name in ("files", "threads"):
        before, after = (median(getattr(one, name) for one in part) for part in (later[:half], later[half:]))
        seen += f", {before:g} to {after:g} {name}"
        more += [name] * (after > before)
    return seen, f"grows: {seen}" if growth > GROWTH or more else ""


def link(sources: list[Path], folder: Path, count: int) -> None:
    """Many images, which are links to a few."""
    folder.mkdir(parents=True)
    for index in range(count):
        os.link(sources[index % len(sources)], folder / f"{index:06}.png")


def predicting(count: int) -> Case:
    """`predict` over many images."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        images = folder / "images"
        link(sorted((world / "photos").rglob("*.png")), images, count)
        pid = start(command, "predict", best(world, "classification"), images, "--json", folder=folder)
        seen, fault = watch(pid, folder, count, 3600)
        return Verdict("predict", f"{count} images: {seen}", seen or "?", fault)

    return case


def training_run(epochs: int, workers: int) -> Case:
    """A training of many short epochs."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        photos, count = folder / "photos", {"train": 400, "val": 80}  # images of each class
        for source in (world / "photos").glob("*/*"):
            link(sorted(source.iterdir()), photos / source.parent.name / source.name, count[source.parent.name])
        changed = {"data__root": photos, "data__workers": workers, "run__save_every": 1000}
        changed |= {"optim__epochs": epochs, "optim__batch_size": 32}
        pid = start(command, *training("classification", world, folder / "run", **changed), folder=folder)
        seen, fault = watch(pid, folder, epochs * 3 * sum(count.values()), 3600)
        return Verdict("training", f"{epochs} epochs, {workers} workers: {seen}", seen or "?", fault)

    return case


CASES: list[Case] = [predicting(20_000), training_run(50, 1)]
COUNT = len(CASES)
EXPECTED = "less than 1 MB more for 1,000 images; files and threads do not become more"
