"""What ends a run from outside is named in one line."""

import errno

import pytest
import torch

from dualtoken_vit.errors import InputError
from dualtoken_vit.tasks.failures import explained


@pytest.mark.parametrize(
    ("error", "processes", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "give fewer --data.workers"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), 1, "give fewer --data.workers"),
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
