"""Shared by the commands: options, the log on the terminal, signals, and errors in one line."""

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
from tuner.cli.watchdog import end_if_hung

if TYPE_CHECKING:
    import optuna

    from trainer import TrainResult
    from tuner.show.json_events import RunEvents, StudyEvents
    from tuner.show.live import StudyDisplay
    from tuner.show.run import RunDisplay
    from tuner.spec.study_toml import StudySpec


class Format(StrEnum):
    """How a run is shown. `auto` is live on a terminal, and plain elsewhere."""

    auto = "auto"
    plain = "plain"
    json = "json"


Spec = Annotated[Path, typer.Argument(help="A study.toml.", show_default=False)]
Storage = Annotated[
    str | None, typer.Option(help=r"Database URL. \[default: $TUNER_STORAGE, else sqlite:///runs/tuner.db]")
]
RunRoot = Annotated[Path, typer.Option(help="Folder of all run directories and of the trackers' files.")]
Track = Annotated[bool, typer.Option("--track/--no-track", help=r"Write to the trackers of \[track].")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override section.key=value, for example train.batch_size=16.")
]

LogFormat = Annotated[
    Format, typer.Option("--log-format", help="plain: log lines, no live view; json: JSON lines on stdout.")
]

STOPPED = 130
"""Exit code of a stopped run, which can be continued."""
DECLINED = 3
"""Exit code of a run that its guard has stopped."""
LONGEST_TIMEOUT = 8
"""Characters of a timeout: more seconds than that are no time that the operating system can wait."""


def parse_duration(text: str) -> float:
    """`8h`, `30m`, `90s` or `1h30m` in seconds. A number alone is none: 8 may be meant as hours.

    Raises:
        UserError: It is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not text.strip() or match is None:
        raise UserError(f"--timeout {text}: write it as 8h, 30m, 90s or 1h30m.")
    if len(text) > LONGEST_TIMEOUT:
        raise UserError(f"--timeout {text[:20]}...: leave it out for a launch without an end.")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


class LogLines(logging.Handler):
    """Writes to the current stdout or stderr: a live view replaces it, and prints lines above itself."""

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


def show_log(log_format: Format = Format.auto, level: int = logging.INFO) -> None:
    """Print the trainer's log, from `level` on, on stdout. With JSON: on stderr, and warnings as JSON on stdout."""
    logging.basicConfig(format="%(message)s", handlers=_log_handlers(log_format, level))


@contextmanager
def temporary_log(log_format: Format = Format.auto, level: int = logging.INFO) -> Iterator[None]:
    """The same inside the block, from `level` on: trials have their own display."""
    handlers = _log_handlers(log_format, level)
    for handler in handlers:
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)


def follow_study(study: optuna.Study, spec: StudySpec, *, total: int, log_format: Format) -> StudyDisplay | StudyEvents:
    """A context manager that shows a launch in this format."""
    from rich.console import Console

    from tuner.show.json_events import StudyEvents
    from tuner.show.live import StudyDisplay

    if log_format == Format.json:
        return StudyEvents(study, spec, total=total)
    return StudyDisplay(study, spec, total=total, console=Console(), plain=log_format == Format.plain)


def follow_run(name: str, log_format: Format) -> RunDisplay | RunEvents:
    """A context manager and tracker that shows one run in this format."""
    from rich.console import Console

    from tuner.show.json_events import RunEvents
    from tuner.show.run import RunDisplay

    if log_format == Format.json:
        return RunEvents(name)
    return RunDisplay(name, Console(), plain=log_format == Format.plain, quiet=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns divergence and lack of memory into a UserError."""
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
def stop_on_signals(report: Callable[[str], Any], timeout: float | None = None) -> Iterator[Callable[[], bool]]:
    """Yields whether the run should stop with a checkpoint: after Ctrl-C, SIGTERM, a closed terminal, or the loss of
    the reader of its output. A second signal raises KeyboardInterrupt. A process that hangs is ended some time after a
    signal, or after `timeout` seconds."""
    requests: list[int] = []
    broken_pipes: list[bool] = []

    def request_stop(number: int, _: Any) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)
        report("Stopping at the next step with a checkpoint. A second signal (Ctrl-C) stops at once.")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        with (
            end_if_hung(numbers, exit_code=STOPPED, timeout=timeout),
            survive_lost_output(lambda: broken_pipes.append(True)),
        ):
            yield lambda: bool(requests or broken_pipes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LossyStream:
    """A stream that drops its output after an error of writing.

    Args:
        on_broken_pipe: Called when a pipe loses its reader. A lost terminal or a full disk does not stop the run: its
            log is also a file.
    """

    def __init__(self, stream: TextIO, on_broken_pipe: Callable[[], Any]) -> None:
        self._stream, self._on_broken_pipe = stream, on_broken_pipe

    def write(self, text: str) -> int:
        with self._drop_on_error():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._drop_on_error():
            self._stream.flush()

    @contextmanager
    def _drop_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Flushes the buffer to /dev/null too: otherwise the interpreter fails at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if error.errno == errno.EPIPE:
                self._on_broken_pipe()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def survive_lost_output(on_broken_pipe: Callable[[], Any]) -> Iterator[None]:
    """Stdout and stderr may lose their readers inside the block."""
    streams: Any = (sys.stdout, sys.stderr)  # None if the program was started without
    sys.stdout, sys.stderr = (stream and cast(TextIO, LossyStream(stream, on_broken_pipe)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def finish(run: RunDisplay | RunEvents, result: TrainResult, again: str, remedy: str) -> None:
    """Report the end of a run, and exit with its code.

    Args:
        again: The command that continues a stopped run.
        remedy: What to do with a run that its guard has stopped, besides.
    """
    run.ended(result)
    if result.finished:
        return
    stream = sys.stderr if run.as_json else sys.stdout
    if result.stopped_by_guard:
        print(f"Stopped by its guard, with a checkpoint: {result.stopped_by_guard}.", file=stream)
        print(f"{remedy}; {again} continues it as it is.", file=stream)
        raise typer.Exit(DECLINED)
    print(f"Stopped with a checkpoint. To continue, run {again}.", file=stream)
    raise typer.Exit(STOPPED)
