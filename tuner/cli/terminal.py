"""What the commands share: options, the log on the terminal, Ctrl-C, and errors in one line."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from trainer.errors import UserError, first_line

if TYPE_CHECKING:
    import optuna

    from trainer import TrainResult
    from tuner.show.json_events import RunEvents, StudyEvents
    from tuner.show.live import StudyDisplay
    from tuner.show.run import RunDisplay
    from tuner.spec.study_toml import StudySpec


class Format(StrEnum):
    """How a run is shown: `auto` is live on a terminal and plain elsewhere."""

    auto = "auto"
    plain = "plain"
    json = "json"


Spec = Annotated[Path, typer.Argument(help="A study.toml.", show_default=False)]
Storage = Annotated[
    str | None, typer.Option(help=r"Database URL. \[default: $TUNER_STORAGE, else sqlite:///runs/tuner.db]")
]
RunRoot = Annotated[Path, typer.Option(help="Folder of the run directories and of the Aim repository.")]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Write losses and d to Aim.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, such as train.batch_size=16.")]

LogFormat = Annotated[
    Format, typer.Option("--log-format", help="plain: lines and no live view; json: a JSON object a line on stdout.")
]

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


class LogLines(logging.Handler):
    """Writes to what stdout (or stderr) is at the moment: a live view stands in for it, and lets lines pass above."""

    def __init__(self, stream: str, level: int) -> None:
        super().__init__(level)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self._stream), flush=True)


def _log_handlers(log_format: Format, level: int) -> Sequence[logging.Handler]:
    from tuner.study.tracked_run import LOGGERS

    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    if log_format != Format.json:
        return [LogLines("stdout", level)]
    from tuner.show.json_events import JsonWarnings

    return [LogLines("stderr", level), JsonWarnings()]


def show_log(log_format: Format = Format.auto) -> None:
    """The trainer's log on stdout, a line as it stands; as JSON, its warnings there and all of it on stderr."""
    logging.basicConfig(format="%(message)s", handlers=_log_handlers(log_format, logging.INFO))


@contextmanager
def temporary_log(log_format: Format = Format.auto, level: int = logging.INFO) -> Iterator[None]:
    """The same for a while, from a level on: trials have a display of their own."""
    handlers = _log_handlers(log_format, level)
    for handler in handlers:
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)


def follow_study(study: optuna.Study, spec: StudySpec, *, total: int, log_format: Format) -> StudyDisplay | StudyEvents:
    """Shows a launch in this format; a context manager."""
    from rich.console import Console

    from tuner.show.json_events import StudyEvents
    from tuner.show.live import StudyDisplay

    if log_format == Format.json:
        return StudyEvents(study, spec, total=total)
    return StudyDisplay(study, spec, total=total, console=Console(), plain=log_format == Format.plain)


def follow_run(name: str, log_format: Format) -> RunDisplay | RunEvents:
    """Shows one run in this format, beside its log; a context manager and a tracker."""
    from rich.console import Console

    from tuner.show.json_events import RunEvents
    from tuner.show.run import RunDisplay

    if log_format == Format.json:
        return RunEvents(name)
    return RunDisplay(name, Console(), plain=log_format == Format.plain, quiet=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """A run that can't go on with these settings ends with one line, not with a traceback."""
    from trainer import Diverged
    from tuner.study.objective import is_out_of_memory

    try:
        yield
    except Diverged as error:
        raise UserError(f"{error}: the loss diverged; lower train.d_coef or train.lr.") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        remedy = "use a smaller train.batch_size, with train.grad_accumulation for the same effective one"
        raise UserError(f"out of memory ({reason}): {remedy}.") from error


@contextmanager
def stop_on_signals(say: Callable[[str], Any]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM or a terminal that closes asks the run to stop at the next step with a checkpoint, and so does a
    pipe that nobody reads any more; a second signal stops at once."""
    asked: list[int] = []
    lost: list[bool] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping at the next step with a checkpoint; once more stops at once.")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        with survive_lost_output(lambda: lost.append(True)):
            yield lambda: bool(asked or lost)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LossyStream:
    """A stream that may lose its reader: what can't be written any more is dropped.

    Args:
        on_broken_pipe: Called where a pipe's reader is gone. A terminal that is gone or a disk that is full ends
            nothing: the run's log is a file, too.
    """

    def __init__(self, stream: TextIO, on_broken_pipe: Callable[[], Any]) -> None:
        self._stream, self._on_broken_pipe = stream, on_broken_pipe

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is in its buffer goes there too, else the interpreter would fail on it at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if error.errno == errno.EPIPE:
                self._on_broken_pipe()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def survive_lost_output(on_broken_pipe: Callable[[], Any]) -> Iterator[None]:
    """Standard output and errors may lose their readers meanwhile."""
    streams: Any = (sys.stdout, sys.stderr)
    # A program may be started without one.
    sys.stdout, sys.stderr = (stream and cast(TextIO, LossyStream(stream, on_broken_pipe)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def finish(run: RunDisplay | RunEvents, result: TrainResult, again: str) -> None:
    """Say how a run ended, and leave with its exit code; `again` is what continues a stopped one."""
    run.ended(result)
    if not result.finished:
        print(f"Stopped with a checkpoint; {again} goes on.", file=sys.stderr if run.as_json else sys.stdout)
        raise typer.Exit(STOPPED)
