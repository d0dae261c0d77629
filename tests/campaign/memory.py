"""Each command under a shrinking limit of its memory: an error in words, or a result."""

import resource
from pathlib import Path
from random import Random

from PIL import Image

from campaign.core import Case, Verdict, command, finish, start
from campaign.world import best, training

LIMITS = (4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)  # MB beyond what the process has at its start


KILLED = "cannot allocate memory for thread-local data: ABORT"  # the GNU C library's last words, with status 127


def limited(args: list[str], megabytes: int) -> None:
    """The program; what it may allocate is limited."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    command(*args)


def case(rng: Random, world: Path, folder: Path) -> Verdict:
    """A command on images that are large for the limit."""
    images, out = folder / "images", folder / "out"
    images.mkdir()
    side = rng.choice([256, 1024, 3000])
    for index in range(2):
        Image.new("RGB", (side, side), (index, 2, 3)).save(images / f"{index}.png")
    name = rng.choice(["train", "predict", "evaluate", "export", "convert", "check-data", "segmenter"])
    args = {
        "train": training("classification", world, out, data__image_size=rng.choice([32, 256, 1024])),
        "predict": ["predict", best(world, "classification"), images, "--out", out],
        "segmenter": ["predict", best(world, "segmentation"), images, "--out", out],
        "evaluate": ["evaluate", best(world, "detection"), "--out", out],
        "export": ["export", best(world, "classification"), "--out", out / "model.onnx"],
        "convert": ["convert", world / "objects", out, "--to", "yolo"],
        "check-data": ["check-data", "folder", "--data.root", world / "photos", "--out", out],
    }[name]
    limit = rng.choice(LIMITS)
    ended = finish(start(limited, args, limit, folder=folder), folder)
    killed = ended.status == 127 and ended.err.rstrip().endswith(KILLED) and "Traceback" not in ended.err
    fault = "" if killed else ended.fault
    if not fault and ended.status == 2 and "emory" not in ended.message + ended.err:
        fault = f"does not name the cause: {ended.message}"
    left = [path.name for path in folder.rglob("*.tmp")]
    fault = fault or (f"left {left}" if left else "")
    how = {0: "enough", 1: "images left out", 127: "killed by the C library"}.get(ended.status or 0, "a message")
    return Verdict(name, f"{limit} MB, {side} pixels: {ended.message}", how, fault)


CASES: list[Case] = [case]
COUNT = 60
EXPECTED = "a message that names the memory, or a result, unless the C library ends the process; nothing half-written"
