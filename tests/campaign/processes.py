"""Signals, killed partners and killed data loading processes, and two commands in one folder."""

import os
import shutil
import signal
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from random import Random

from campaign.core import Case, Verdict, command, finish, kill_after, run, start, wait_until
from campaign.crashes import launch, same_run, whole
from campaign.world import TASKS, best, training

PARTNER = 60.0  # seconds that a process may go on without the other


def resumed(task: str, world: Path, out: Path, folder: Path) -> str:
    """What differs between a run that is resumed to its end and an uninterrupted one; "" if nothing."""
    time.sleep(1.1)  # TensorBoard orders files of events by the second
    ended = run(*training(task, world, out, "--resume"), folder=folder)
    if ended.status:
        return ended.fault or f"cannot be resumed: {ended.message}"
    return same_run(out, whole(world, task, 1)[0], ("metrics.csv",))


def stopped(task: str, number: signal.Signals) -> Case:
    """A training that is told to stop, and then resumed."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        out, seconds = folder / "run", whole(world, task, 1)[1]
        pid = start(command, *training(task, world, out, run__save_every=1000), folder=folder)
        kill_after([pid], rng.uniform(0, seconds), number)
        ended = finish(pid, folder)
        fault = ended.fault if ended.status != -number else ""
        names = "last.ckpt" in ended.message or "nothing was saved" in ended.message or "--resume" in ended.message
        if not fault and ended.status == 130 and not names:
            fault = f"does not say what is kept: {ended.message}"
        fault = fault or resumed(task, world, out, folder)
        how = {0: "finished before", 130: "ended with a message"}.get(ended.status or 0, "ended by the system")
        return Verdict(f"training, {number.name}", f"{task}: {ended.message}", how, fault)

    return case


def interrupted(number: signal.Signals) -> Case:
    """Another command that is told to stop, and repeated."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        out = folder / "out"
        args = rng.choice(
            [
                ["predict", best(world, "classification"), world / "photos", "--out", out],
                ["evaluate", best(world, "detection"), "--out", out],
                ["export", best(world, "classification"), "--out", out / "model.onnx"],
                ["convert", world / "objects", out, "--to", "voc"],
                ["check-data", "masks", "--data.root", world / "masks", "--out", out],
            ]
        )
        pid = start(command, *args, folder=folder)
        kill_after([pid], rng.uniform(0, 0.7), number)
        ended = finish(pid, folder)
        fault = ended.fault if ended.status != -number else ""
        if args[0] == "convert" and ended.status == 0:
            shutil.rmtree(out)
        if not fault:
            again = run(*args, folder=folder)
            fault = again.fault or (again.message if again.status == 2 else "")
            left = [path.name for path in folder.rglob("*.tmp")]
            fault = fault or (f"left {left}" if left else "")
        how = {0: "finished before", 130: "ended with a message"}.get(ended.status or 0, "ended by the system")
        return Verdict(f"other commands, {number.name}", str(args[0]), how, fault)

    return case


def partner(rng: Random, world: Path, folder: Path) -> Verdict:
    """One of two training processes is killed after the training began; before, it is for their launcher to notice."""
    task, rank = rng.choice(TASKS), rng.randrange(2)
    out = folder / "run"
    pids = launch(training(task, world, out, optim__epochs=20), folder, 2)
    wait_until((out / "recipe.json").exists, pids[0])
    time.sleep(rng.uniform(0, 1))
    os.kill(pids[rank], signal.SIGKILL)
    begin = time.monotonic()
    killed, other = (finish(pid, folder, PARTNER) for pid in (pids[rank], pids[1 - rank]))
    fault = other.fault
    if not fault and killed.status == -9 and other.status and "another process" not in other.message:
        fault = f"does not name the cause: {other.message}"
    how = "finished before" if killed.status == 0 else f"the other ended with status {other.status}"
    took = time.monotonic() - begin
    return Verdict("one of two processes killed", f"{task}, process {rank}, {took:.0f} s: {other.message}", how, fault)


def child(rng: Random, world: Path, folder: Path) -> Verdict:
    """The second of two processes, which the first has started itself, is killed at any time."""
    import __main__

    __main__.__spec__ = find_spec("dualtoken_vit.cli")  # what Lightning starts again
    pid = start(command, *training("classification", world, folder / "run", run__devices=2), folder=folder)
    second = wait_until(lambda: children_of(pid), pid)
    time.sleep(rng.uniform(0, 15))
    with suppress(ProcessLookupError, IndexError):
        os.kill(second[0], signal.SIGKILL)
    begin = time.monotonic()
    ended = finish(pid, folder, PARTNER)
    silent = not ended.message and "terminated with code -9" not in ended.err
    fault = "" if ended.status == -9 else ended.fault  # Lightning kills it
    fault = fault or ("does not name the cause" if ended.status and silent else "")
    what = f"{time.monotonic() - begin:.0f} s: {ended.err.strip().splitlines()[-1:]}"
    return Verdict("the second of two processes killed, Lightning's launcher", what, f"status {ended.status}", fault)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def worker(rng: Random, world: Path, folder: Path) -> Verdict:
    """A data loading process is killed."""
    out = folder / "run"
    pid = start(command, *training("classification", world, out, data__workers=2, optim__epochs=50), folder=folder)
    wait_until(lambda: len(children_of(pid)) > 1, pid)
    time.sleep(rng.uniform(0, 0.5))
    with suppress(ProcessLookupError, IndexError):
        os.kill(rng.choice(children_of(pid)), signal.SIGKILL)
    ended = finish(pid, folder)
    # PyTorch's handler may raise while Python runs a callback whose errors it prints and ignores.
    fault = "" if "Exception ignored in" in ended.err and ended.status == 2 else ended.fault
    fault = fault or ("" if "--data.workers" in ended.message else f"does not name the cause: {ended.message}")
    return Verdict("a data loading process killed", ended.message, f"status {ended.status}", fault)


def twice(rng: Random, world: Path, folder: Path) -> Verdict:
    """The same command twice in one folder, at the same time."""
    out = folder / "out"
    args = rng.choice(
        [
            training("classification", world, out),
            [*map(str, ("predict", best(world, "classification"), world / "photos", "--out", out))],
            [*map(str, ("evaluate", best(world, "segmentation"), "--out", out))],
            [*map(str, ("convert", world / "objects", out, "--to", "yolo"))],
        ]
    )
    pids = [start(command, *args, folder=folder)]
    time.sleep(rng.uniform(0, 0.6))
    pids.append(start(command, *args, folder=folder))
    ended = [finish(pid, folder) for pid in pids]
    fault = next((one.fault for one in ended if one.fault), "")
    if not fault and all(one.status for one in ended):
        fault = f"neither succeeded: {ended[0].message} {ended[1].message}"
    left = [path.name for path in folder.rglob("*.tmp")]
    fault = fault or (f"left {left}" if left else "")
    return Verdict(
        "two commands in one folder",
        f"{args[0]}: {ended[1].message}",
        f"status {ended[0].status}, {ended[1].status}",
        fault,
    )


CASES: list[Case] = [
    stopped("classification", signal.SIGINT),
    stopped("segmentation", signal.SIGTERM),
    interrupted(signal.SIGINT),
    partner,
    worker,
    child,
    twice,
    stopped("detection", signal.SIGINT),
    stopped("multilabel", signal.SIGTERM),
    interrupted(signal.SIGTERM),
]
COUNT = 90
EXPECTED = "a message that names the cause and what is kept, within a minute; a resumed run as without the signal"
