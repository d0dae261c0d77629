"""The one error for bad input."""

from textwrap import shorten


class InputError(Exception):
    """Bad input: the message names the file, key or argument and what to do.

    The command line prints it as one line and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or its type."""
    return next(filter(str.strip, str(error).splitlines()), type(error).__name__)


def reason(error: BaseException) -> str:
    """An error's message on one line of at most 300 characters, or its type."""
    return shorten(str(error), 300, placeholder=" ...") or type(error).__name__
