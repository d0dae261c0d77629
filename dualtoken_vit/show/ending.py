"""How a command ends: errors that a user can fix are one line on stderr."""

import errno
import os
import sys
from typing import NoReturn

from dualtoken_vit.errors import InputError, lacks_memory
from dualtoken_vit.files import printable


def end(message: str, status: int = 2) -> NoReturn:
    """Exit with one line on stderr; all processes except the first prefix their rank."""
    # set by torchrun, Lightning and srun, in this order where one runs inside another
    rank = next((os.environ[key] for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if key in os.environ), "0")
    print(f"dualtoken-vit{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
    sys.exit(status)


def end_by(error: Exception) -> None:
    """Exit with one line and status 2 for an error that a user can fix; return for others."""
    if isinstance(error, InputError):
        # An error in a data loading process arrives behind a traceback.
        message = str(error).rpartition(f"{InputError.__module__}.InputError: ")[2]
        end(f"error: {printable(message.strip())}")
    if lacks_memory(error):
        error.__traceback__ = error.__context__ = None  # frees what their frames hold: a message needs memory, too
        end("error: out of memory; give smaller images, batches or networks")
    if isinstance(error, OSError):
        _end_by_files(error)


def _end_by_files(error: OSError) -> None:
    """Exit with one line where a disk, a permission or a name prevents reading or writing; return for other errors."""
    if error.errno == errno.ENAMETOOLONG:
        end(f"error: {printable(str(error.filename))[:100]}...: {error.strerror}")
    where = f" {printable(error.filename)}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        end(f"error: cannot write{where}: {error.strerror}; what was saved is kept")
    if error.errno == errno.EACCES:
        there = error.filename and os.path.exists(error.filename)
        action = "read" if there and not os.access(error.filename, os.R_OK) else "write" if there else "read or write"
        end(f"error: cannot {action}{where}: {error.strerror}; what was saved is kept")
