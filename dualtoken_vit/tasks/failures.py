"""What ends a training or an evaluation from outside, in words: memory, data loading processes, other processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dualtoken_vit.errors import InputError, naming_memory, reason

WORKER = re.compile(r"DataLoader worker.*(exited unexpectedly|killed by signal)", re.DOTALL)
ENDED = re.compile(r"DataLoader worker.*killed by signal: (Terminated|Hangup|Interrupt)", re.DOTALL)
ONE_VALUE = "Expected more than 1 value per channel"  # PyTorch's batch normalisation in training
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
        text = f"{error} {error.__cause__ or ''}"  # PyTorch may tell of the signal in the cause alone
        if ENDED.search(text):
            cause = f"a data loading process was ended from outside ({reason(error)})"
            raise InputError(f"{cause}; run the command again, a training with --resume") from error
        if WORKER.search(text) and "killed by signal" in text:
            cause = "a data loading process was killed, perhaps for lack of memory"
            raise InputError(f"{cause} ({reason(error)}); give fewer --data.workers") from error
        if WORKER.search(text):
            cause = f"a data loading process ended, perhaps by an error printed above ({reason(error)})"
            remedy = 'give fewer --data.workers, and in a script train and evaluate below `if __name__ == "__main__":`'
            raise InputError(f"{cause}; {remedy}") from error
        if processes > 1 and PEER.search(str(error)):
            cause = "another process of this run ended or cannot be reached; see its message"
            raise InputError(f"{cause}, and continue with --resume") from error
        raise
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        cause = "batch normalisation has nothing to average where a feature map of one image has a single position"
        remedy = "give a larger --optim.batch-size or smaller --optim.accumulate, or larger images (--data.*)"
        raise InputError(f"{cause}; {remedy}") from error
