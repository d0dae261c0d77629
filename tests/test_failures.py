"""What ends a run is named in one line: memory, other processes, labels that are not finite."""

import errno
import math

import pytest
import torch
from helpers import native

from dualtoken_vit import cli
from dualtoken_vit.data.detection import DetectionDataset, save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.tasks.failures import explained


def ended(how):
    """What PyTorch raises for a process that ended while it waits for a batch; why is in the cause alone."""
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError(f"DataLoader worker (pid 7) {how}")
    return error


@pytest.mark.parametrize(
    ("error", "processes", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "give fewer --data.workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), 1, "from outside.*with --resume"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), 1, "give fewer --data.workers"),
        (ended("exited unexpectedly with exit code 1. Details"), 1, "an error printed above.*in a script.*__main__"),
        (ended("is killed by signal: Killed. "), 1, r"memory \(.*\); give fewer --data.workers$"),
        (ended("is killed by signal: Terminated. "), 1, "from outside.*with --resume"),
        (RuntimeError("[pair.cc:525] Connection closed by peer [127.0.0.1]:1234"), 2, "another process of this run"),
        (RuntimeError("NCCL communicator was aborted on rank 1."), 4, "another process of this run"),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "out of memory.*HINT",
        ),
        (MemoryError(), 1, "out of memory.*HINT"),
        (RuntimeError("could not create a primitive"), 1, "out of memory.*HINT"),  # oneDNN's
        (RuntimeError("Resource temporarily unavailable"), 1, "out of memory.*HINT"),  # C++'s, of a thread
        (RuntimeError("std::bad_alloc"), 1, "out of memory.*HINT"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory.*HINT"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "out of memory.*HINT"),
    ],
)
def test_causes(error, processes, message):
    with pytest.raises(InputError, match=message) as caught, explained("HINT", processes):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),
        RuntimeError("a bug"),
        ValueError("gloo"),
        RuntimeError("could not create a primitive descriptor"),  # oneDNN's for what it does not support
        ImportError("b.so: cannot allocate memory in static TLS block"),  # the linker's, of another kind of memory
        InputError("CUDA out of memory.png"),
    ],
)
def test_other_errors_stay(error):
    with pytest.raises(type(error), match=str(error)), explained("HINT"):
        raise error


@pytest.mark.parametrize(("detector", "bad"), [("ssdlite", math.inf), ("mask-rcnn", math.nan)])
def test_a_box_that_is_not_finite_names_its_image(tmp_path, monkeypatch, detector, bad):
    """torchvision finds some of them with an AssertionError, others become a loss of NaN."""
    save_scenes(tmp_path, size=32, train=4, val=2)
    sample = DetectionDataset.__getitem__

    def spoilt(self, index):
        image, target = sample(self, index)
        if index == 2 and "train" in self.image_names[index]:
            target["boxes"][0, 2] = bad
        return image, target

    monkeypatch.setattr(DetectionDataset, "__getitem__", spoilt)
    args = ["train", "coco", "--detector", detector, "--data.images", tmp_path / "images", "--out", tmp_path / "run"]
    for split in ("train", "val"):
        args += [f"--data.{split}-json", tmp_path / "annotations" / f"instances_{split}.json"]
    args += ["--model.name", "dualtoken_vit_small", "--model.args", "dims=(16,32,32)", "depths=(1,1,1)"]
    args += ["--data.image-size", 32, "--data.workers", 0, "--optim.batch-size", 4, "--run.device", "cpu"]
    with pytest.raises(
        InputError, match=native(r"images/train-0002\.png: a box is NaN or Inf at step 1, after augmentation")
    ):
        cli.run(list(map(str, args)))
