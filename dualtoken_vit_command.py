"""The command `dualtoken-vit`: what must be set before PyTorch is imported.

Where this module is imported first, `import dualtoken_vit` leaves PyTorch to the commands that need it.
"""

import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line with OpenMP threads that wait for each other shortly, then sleep.

    GNU's OpenMP, which PyTorch has on Linux, spins for milliseconds by default. Where other jobs need the cores, such
    threads keep them from each other: a training with two threads falls to a small part of its speed. Threads that
    sleep at once cost some microseconds for each operation, a quarter of the time of small batches. A thousand turns of
    the loop lie between: see "Waiting threads" in results/README.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (`>&-`): the next file to be opened would get its number, and its text
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    with suppress(AttributeError):  # of a stand-in for stdout, such as io.StringIO
        # Names of files and classes may be outside of stdout's encoding: they are escaped, as stderr does.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        from dualtoken_vit.cli import main as run

        run()
    finally:
        _end_output()


def _end_output() -> None:
    """Write what is left for stdout; if nobody reads it (`| head -1`), end as a program does that SIGPIPE ends."""
    error = sys.exc_info()[1]
    try:
        if isinstance(error, BrokenPipeError):
            print()  # fails again if stdout is the pipe
        sys.stdout.flush()
        if not isinstance(error, SystemExit) or not isinstance(error.__context__, BrokenPipeError):  # rich's exit
            return
    except OSError as failure:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries again at its exit
        if not isinstance(failure, BrokenPipeError) or not isinstance(error, SystemExit | BrokenPipeError):
            return  # a full disk, which the command has reported; or an error of its own, which is to be seen
    sys.exit(141)
