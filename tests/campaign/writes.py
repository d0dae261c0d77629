"""Each operation of a command on its files fails once: full disk, no permission, read-only, quota, name too long.

The operations are those that Python reports to audit hooks (opening for writing, renaming, creating folders) and fsync,
which is where a full disk may first be noticed; those on a real small file system are in `small_disk`.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from campaign.core import Verdict, command, finish, run, start
from campaign.world import best, study, training

ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT)
EVENTS = {"os.rename": 1, "os.mkdir": 0, "os.truncate": 0, "os.symlink": 1, "os.link": 1}  # place of the path written


def commands(world: Path) -> dict[str, list[str]]:
    """Commands that write into OUT; a run that is resumed has begun there."""
    network, photos = str(best(world, "classification")), str(world / "photos" / "val")
    return {
        "check-data": ["check-data", "folder", "--data.root", str(world / "photos"), "--out", "OUT"],
        "convert": ["convert", str(world / "objects"), "OUT", "--to", "coco"],
        "evaluate": ["evaluate", network, "--out", "OUT"],
        "export": ["export", network, "--out", "OUT/model.onnx"],
        "train": training("classification", world, "OUT", optim__epochs=1),
        "train --resume": training("classification", world, "OUT", "--resume"),
        "predict": ["predict", network, photos, "--out", "OUT"],
        "attention": ["attention", network, photos, "--out", "OUT"],
        "evaluate detection": ["evaluate", str(best(world, "detection")), "--out", "OUT"],
        "evaluate segmentation": ["evaluate", str(best(world, "segmentation")), "--out", "OUT"],
        "predict segmentation": ["predict", str(best(world, "segmentation")), photos, "--out", "OUT"],
        "train detection": training("detection", world, "OUT", optim__epochs=1),
        "train segmentation": training("segmentation", world, "OUT", optim__epochs=1),
        "train multilabel": training("multilabel", world, "OUT", optim__epochs=1),
        "predict detection": ["predict", str(best(world, "detection")), photos, "--out", "OUT"],
        "check-data detection": ["check-data", "coco", "--data.root", str(world / "objects"), "--out", "OUT"],
        "check-data segmentation": ["check-data", "masks", "--data.root", str(world / "masks"), "--out", "OUT"],
        "export int8": ["export", network, "--int8", "--out", "OUT/model.onnx"],
        "study": study(world, "OUT"),
    }


def failing(args: list[str], out: Path, number: int, code: int, log: Path) -> None:
    """The program; its `number`-th operation beside or in `out` fails. `log` gets a line for each operation."""
    count, fsync = 0, os.fsync
    lines = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    inside = os.fspath(out.parent)

    def operation(kind: str, path: Any) -> None:
        nonlocal count
        if isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(inside):
            count += 1
            os.write(lines, f"{kind} {os.path.relpath(os.fsdecode(path), inside)}\n".encode())
            if count == number:
                raise OSError(code, os.strerror(code), os.fsdecode(path))

    def hook(event: str, values: tuple) -> None:
        if event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            operation("open", values[0])
        elif event in EVENTS and not (event == "os.mkdir" and os.path.isdir(values[0])):  # it would do nothing
            operation(event, values[EVENTS[event]])

    def checked(descriptor: int) -> None:
        operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = checked
    sys.addaudithook(hook)
    command(*args)


def begin(name: str, world: Path, out: Path) -> None:
    """What must be there before the command."""
    if name == "train --resume":
        shutil.copytree(world / "half", out)


def half(world: Path) -> None:
    """A run of two epochs that was interrupted after the first."""
    from test_resume import run_until_killed

    if (world / "half" / "best.safetensors").exists():
        return
    shutil.rmtree(world / "half", ignore_errors=True)
    ended = finish(
        start(run_until_killed, training("classification", world, world / "half"), "saved last.ckpt", 4, folder=world),
        world,
    )
    assert ended.status == -9, ended.err


def operations(world: Path) -> list[tuple[str, int]]:
    """Every operation of every command, as (command, number)."""
    half(world)
    found = []
    for name, args in commands(world).items():
        log = world / "operations" / name.replace(" ", "-")
        if not log.exists():
            log.parent.mkdir(exist_ok=True)
            out = world / "operations" / "out"
            shutil.rmtree(out, ignore_errors=True)
            begin(name, world, out)
            part = log.with_suffix(".part")
            part.unlink(missing_ok=True)
            args = [arg.replace("OUT", str(out)) for arg in args]
            ended = finish(start(failing, args, out, 0, 0, part, folder=world), world, 300)
            assert ended.status == 0, ended.err
            part.rename(log)
        found += [(name, number + 1) for number in range(len(log.read_text().splitlines()))]
    return found


def one(name: str, number: int) -> Callable[[Random, Path, Path], Verdict]:
    """The case of one operation."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        out, code = folder / "out", rng.choice(ERRORS)
        begin(name, world, out)
        args = [arg.replace("OUT", str(out)) for arg in commands(world)[name]]
        before = sound(out)
        ended = finish(start(failing, args, out, number, code, folder / "log", folder=folder), folder)
        done = (folder / "log").read_text().splitlines()
        if len(done) < number:
            return Verdict(name, f"operation {number} of {len(done)}", "did not come to it", ended.fault)
        what = f"{name}: {done[number - 1]}: {errno.errorcode[code]}"
        fault = ended.fault or after_failure(name, out, before, ended.message if ended.status else ended.err)
        again = args
        if name.startswith("train") and (out / "recipe.json").exists() and "--resume" not in args:
            again = [*args, "--resume"]
        if name == "convert" and ended.status == 0:
            shutil.rmtree(out)
        if not fault:
            repeated = run(*again, folder=folder)
            fault = repeated.fault or (f"repeated: {repeated.message}" if repeated.status else "")
            left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".tmp")]
            fault = fault or (f"left {left}" if left else "")
        return Verdict(name, what, "warned" if ended.status == 0 else "ended with an error", fault)

    return case


def sound(out: Path) -> dict[str, Any]:
    """The files of a run that can be read."""
    readers = {"last.ckpt": torch.load, "best.safetensors": load_file}
    return {name: read(out / name) for name, read in readers.items() if (out / name).exists()}


def after_failure(name: str, out: Path, before: dict[str, Any], message: str) -> str:
    """The last good state is there, and the message names what could not be written."""
    if missing := before.keys() - sound(out).keys():
        return f"{missing} was lost"
    return "" if message.strip() else "nothing was said"


def small_disk(name: str, kilobytes: int) -> Callable[[Random, Path, Path], Verdict]:
    """A command on a file system that is too small; only where it may be mounted."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        disk = folder / "disk"
        disk.mkdir()
        size = rng.randrange(4, kilobytes)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return Verdict("small disk", "no permission to mount one", "left out")
        try:
            out = disk / "out"
            args = [arg.replace("OUT", str(out)) for arg in commands(world)[name]]
            ended = run(*args, folder=folder)
            fault = ended.fault or after_failure(name, out, {}, ended.message if ended.status else ended.err or "fits")
            sound(out)
            subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
            if not fault and not (name == "convert" and ended.status == 0):
                again = [*args, "--resume"] if name.startswith("train") and (out / "recipe.json").exists() else args
                repeated = run(*again, folder=folder)
                fault = repeated.fault or (f"repeated: {repeated.message}" if repeated.status else "")
                left = [path.name for path in disk.rglob("*") if path.name.endswith(".tmp")]
                fault = fault or (f"left {left}" if left else "")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return Verdict(
            "small disk", f"{name} on {size} kB", "fits" if ended.status == 0 else "ended with an error", fault
        )

    return case


SIZES = {
    "train": 1500,
    "predict": 400,
    "export": 400,
    "convert": 60,
    "train segmentation": 2500,
    "predict segmentation": 500,
}


def cases(world: Path) -> list[Callable[[Random, Path, Path], Verdict]]:
    """One for each operation, and some on small disks."""
    return [
        *(one(*each) for each in operations(world)),
        *(small_disk(*each) for each in SIZES.items() for _ in range(5)),
    ]


EXPECTED = "the last good state is kept and named; the repeated command succeeds and leaves no temporary file"
