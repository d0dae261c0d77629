"""Processes that do the same at the same time."""

import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from dualtoken_vit.errors import InputError, first_line


class Processes:
    """Fresh processes that do the same at the same time. A context manager, which ends them.

    Raises:
        InputError: if one of them cannot be started, or ends by itself.
    """

    def __init__(self, count: int):
        context = get_context("spawn")
        self.workers: list[tuple[BaseProcess, Connection]] = []
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()  # else the end of the process would not end what waits for it
                self.workers.append((process, ours))
        except OSError as error:
            self.__exit__()
            raise InputError(f"processes: {len(self.workers)} of {count} started; give fewer ({error})") from error

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process, connection in self.workers:
            process.terminate()
            connection.close()
        for process, _ in self.workers:
            process.join()

    def run(self, do: Callable[[], object]) -> None:
        """Do this, which can be pickled, in each process; return when all have.

        Raises:
            InputError: if a process ended. After an error that no user can mend, it has printed a traceback.
            RuntimeError: with the message of such an error, or of a ValueError, in one of them.
        """
        try:
            for _, connection in self.workers:
                connection.send(do)
            problems = [connection.recv() for _, connection in self.workers]
        except (EOFError, OSError) as e:
            raise InputError(
                f"processes: one of {len(self.workers)} ended; give fewer if memory was short, and in a script call "
                'benchmark below `if __name__ == "__main__":`'
            ) from e
        if problem := next(filter(None, problems), None):
            raise RuntimeError(problem)


def _work(connection: Connection) -> None:
    """What one of `Processes` does until the main process ends, or ends it."""
    # Ctrl-C is for the main process, which ends this one. This module imports no PyTorch, so that the signal is ignored
    # before the seconds which that takes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):  # the main process has gone
        while True:
            do, problem = connection.recv(), ""
            try:
                do()
            except (RuntimeError, ValueError) as error:  # of a network that does not run
                problem = first_line(error)
            connection.send(problem)
