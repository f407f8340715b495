"""What the commands share: options, the log on the terminal, Ctrl-C, and errors in one line."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.errors import UserError

Spec = Annotated[Path, typer.Argument(help="A study.toml.", show_default=False)]
Storage = Annotated[
    str | None, typer.Option(help=r"Database URL. \[default: $TUNER_STORAGE, else sqlite:///runs/tuner.db]")
]
RunRoot = Annotated[Path, typer.Option(help="Folder of the run directories and of the Aim repository.")]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Write losses and d to Aim.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, such as train.batch_size=16.")]

STOPPED = 130
"""Exit code of a run that was stopped and can be continued."""


def parse_duration(text: str) -> float:
    """`8h`, `30m`, `90s` or `1h30m` in seconds.

    Raises:
        UserError: It is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise UserError(f"--timeout {text}: write it as 8h, 30m, 90s or 1h30m.")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def show_log() -> None:
    """The trainer's log on stdout, a line as it stands."""
    from tuner.run import LOGGERS

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def shown_log() -> Iterator[None]:
    """The same for a while: trials have a display of their own."""
    from tuner.run import LOGGERS

    handler = logging.StreamHandler(sys.stdout)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def explained() -> Iterator[None]:
    """A run that can't go on with these settings ends with one line, not with a traceback."""
    from trainer import Diverged
    from tuner.objective import is_out_of_memory

    try:
        yield
    except Diverged as error:
        raise UserError(f"{error}: the loss diverged; lower train.d_coef or train.lr.") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        remedy = "use a smaller train.batch_size, with train.grad_accumulation for the same effective one"
        raise UserError(f"out of memory ({reason}): {remedy}.") from error


@contextmanager
def stoppable(say: Callable[[str], Any]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks the run to stop at the next step with a checkpoint; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping at the next step with a checkpoint; once more stops at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
