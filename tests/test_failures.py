"""What ends a run from outside is named in one line."""

import pytest

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
    ],
)
def test_causes(error, processes, message):
    with pytest.raises(InputError, match=message) as caught, explained("HINT", processes):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("Connection closed by peer"), RuntimeError("a bug"), ValueError("gloo")]
)
def test_other_errors_stay(error):
    with pytest.raises(type(error), match=str(error)), explained("HINT"):
        raise error
