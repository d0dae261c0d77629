"""The one error that a user can cause and mend."""


class InputError(Exception):
    """Bad input: the message names the file, key or argument and says what to do.

    The command line prints it as one line and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an error says, without what follows."""
    return (str(error).splitlines() or [type(error).__name__])[0]
