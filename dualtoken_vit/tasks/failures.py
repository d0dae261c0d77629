"""What ends a training or an evaluation from outside, in words: memory, data loading processes, other processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dualtoken_vit.errors import InputError, naming_memory, reason

WORKER = re.compile(r"DataLoader worker.*(exited unexpectedly|killed by signal)", re.DOTALL)
ENDED = re.compile(r"DataLoader worker.*killed by signal: (Terminated|Hangup|Interrupt)", re.DOTALL)
FAILED = re.compile(r"DataLoader worker.*exited unexpectedly with exit code 1\b", re.DOTALL)  # Python's for an error
PEER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


@contextmanager
def explained(hint: str, processes: int = 1) -> Iterator[None]:
    """Raise an InputError for an error inside that the user can do something about.

    `hint` is what helps against lack of memory, and `processes` the number of those that take part.
    """
    try:
        with naming_memory(hint):
            yield
    except RuntimeError as error:
        if ENDED.search(str(error)):
            cause = f"a data loading process was ended from outside ({reason(error)})"
            raise InputError(f"{cause}; run the command again, a training with --resume") from error
        if FAILED.search(str(error)):
            cause = f"a data loading process ended by an error, perhaps the one printed above ({reason(error)})"
            remedy = 'in a script, train and evaluate below `if __name__ == "__main__":`; or give --data.workers 0'
            raise InputError(f"{cause}; {remedy}") from error
        if WORKER.search(str(error)):
            cause = "a data loading process was killed, perhaps for lack of memory"
            raise InputError(f"{cause} ({reason(error)}); give fewer --data.workers") from error
        if processes > 1 and PEER.search(str(error)):
            cause = "another process of this run ended or cannot be reached; see its message"
            raise InputError(f"{cause}, and continue with --resume") from error
        raise
