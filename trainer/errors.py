"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave. Its text is one line: what is wrong, the value, and the remedy.

    The command line prints it without a traceback and exits with 2; every other exception is a defect.
    """


class DamagedSample(Exception):
    """One sample of a dataset can't be read. It is skipped, named in the log, and counted."""
