"""Commands in forks of a process that has imported everything, and what may never happen in one."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.util import _exit_function
from pathlib import Path
from typing import Any, NamedTuple

from dualtoken_vit import cli

LIMIT = 60.0  # seconds of CPU time that a command may take, and seconds that it may do nothing
PATIENCE = 10  # times the limit: the longest that a command may take on a busy machine


class Outcome(NamedTuple):
    """How a command ended."""

    status: int | None  # exit status; negative: the signal that ended it; None: it was still running at the limit
    out: str = ""
    err: str = ""
    left: bool = False  # whether a process that it started was still there
    seconds: float = 0.0  # of CPU time, of the process itself
    memory: int = 0  # the most it held, in kB

    @property
    def fault(self) -> str:
        """What must never happen; "" where the command ended well, with or without an error of its own."""
        if self.status is None:
            return f"still running after {LIMIT:g} s of CPU time, as long without any, or {PATIENCE} times as long"
        if "Traceback" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:200]}"
        if self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        if self.left:
            return "left a process behind"
        if self.status not in (0, 1, 2, 130):
            return f"ended with status {self.status}: {self.message}"
        if self.status in (2, 130) and not self.message:
            return f"ended with status {self.status} without a line of its own"
        return ""

    @property
    def message(self) -> str:
        """The last line that begins with the program's name: its error."""
        return next((line for line in self.err.splitlines()[::-1] if line.startswith("dualtoken-vit")), "")


class Verdict(NamedTuple):
    """The result of a case."""

    group: str  # a row of the summary
    what: str  # the case in a few words
    ended: str  # a column of the summary, for example "accepted" or "rejected"
    fault: str = ""


Case = Callable[[random.Random, Path, Path], Verdict]
"""A case draws all its choices from the generator, finds the world in the first folder and works in the second."""


def start(function: Callable[..., Any], *args: Any, folder: Path, env: dict[str, str] | None = None) -> int:
    """Call a function in a fork with its own process group and working folder; returns its process id.

    stdout and stderr go to FOLDER/{out,err}-PID.
    """
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70  # of a fork that could not even begin
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(f"{name}-{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(env or {})
        status = _call(function, args)
    finally:
        os._exit(status)


def _call(function: Callable[..., Any], args: Sequence[Any]) -> int:
    """As the interpreter ends: with the status of SystemExit, or a traceback and 1."""
    try:
        function(*args)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        _exit_function()  # ends the workers of data loaders
    except Exception as error:  # the interpreter prints it, too, and keeps the status
        print(f"ignored at the end: {error!r}", file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    return status


def finish(pid: int, folder: Path, limit: float = LIMIT) -> Outcome:
    """Wait for a process of `start`; end it and all that it started if it hangs.

    It does if they use `limit` seconds of CPU time, or hardly any for as long. A busy machine does not matter, but for
    `PATIENCE`.
    """
    begin = look = moved = time.monotonic()
    used, status = 0.0, None
    while (now := time.monotonic()) - begin < PATIENCE * limit:
        found, state, usage = os.wait4(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(state)
            break
        if now >= look:
            look, seconds = now + 1, cpu_seconds(pid)
            if seconds > used + limit / 200:
                used, moved = seconds, now
            if seconds > limit or now - moved > limit:
                break
        time.sleep(0.01)
    left = _kill_group(pid, status is not None and status >= 0)
    if status is None:
        _, _, usage = os.wait4(pid, 0)
    files = (folder / f"{name}-{pid}" for name in ("out", "err"))
    texts = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    return Outcome(status, *texts, left, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def cpu_seconds(group: int) -> float:
    """The CPU time that the processes of a group have used, and those that they have waited for."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def running(pid: int) -> bool:
    """Whether a process of `start` has not ended yet."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_until(holds: Callable[[], Any], pid: int) -> Any:
    """What the function returns as soon as that is true, or when the process has ended or the patience has."""
    end = time.monotonic() + PATIENCE * LIMIT
    while not (found := holds()) and running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def kill_after(pids: Sequence[int], seconds: float, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes when the first of them has used that much CPU time, unless it has ended."""
    clock = (~pids[0] << 3) | 2  # Linux's clock of a process
    end = time.monotonic() + PATIENCE * LIMIT
    with suppress(OSError):
        while time.clock_gettime(clock) < seconds:
            if not running(pids[0]) or time.monotonic() > end:
                return
            time.sleep(0.002)
        for pid in pids:
            os.kill(pid, number)


def _kill_group(group: int, patient: bool) -> bool:
    """End all processes of a group; returns whether there were any, after twenty seconds to end by themselves."""
    try:
        for _ in range(2000 if patient else 0):
            os.killpg(group, 0)
            time.sleep(0.01)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return patient


def command(*args: Any) -> None:
    """The program, as its entry point calls it, with one thread for each operation."""
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # it was set when the first process imported Lightning
    torch.set_num_threads(1)
    sys.argv = ["dualtoken-vit", *map(str, args)]
    cli.main()


def run(*args: Any, folder: Path, limit: float = LIMIT, **more: Any) -> Outcome:
    """The program with these arguments in a fork."""
    return finish(start(command, *args, folder=folder, **more), folder, limit)
