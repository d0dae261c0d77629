"""Processes that do the same at the same time."""

import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import current_thread, main_thread

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
                with _without_ctrl_c():
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
            InputError: if a process ended. Where an error of the program ended it, it has printed a traceback.
            RuntimeError: with the message of another error in one of them, such as of a network that does not run.
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


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C, also while they import PyTorch: the main process ends them."""
    if current_thread() is not main_thread():  # which alone can set a handler
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(connection: Connection) -> None:
    """What one of `Processes` does until the main process ends, or ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not inherited
    with suppress(EOFError, OSError):  # the main process has gone
        while True:
            connection.send(_problem(connection.recv_bytes()))


def _problem(message: bytes) -> str:
    """Do what `run` was given; return the first line of an error, "" without."""
    try:
        pickle.loads(message)()
    except (EOFError, InputError, MemoryError, OSError, RuntimeError, ValueError) as error:
        return first_line(error)
    return ""
