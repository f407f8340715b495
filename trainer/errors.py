"""Exceptions whose text is for the user, and the first line of any other."""


class UserError(ValueError):
    """A mistake in the user's input. Its text is one line: what is wrong, the value, and the remedy.

    The command line prints it without a traceback and exits with 2; every other exception is a defect.
    """


class DamagedSample(Exception):
    """One sample of a dataset can't be read. It is skipped, named in the log, and counted."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
