"""A worker process of `tuner launch --workers N`: claims and runs trials until there is nothing left to claim.

It listens to its supervisor through a pipe, on which it tells of its trials. The supervisor's end is a wish to stop.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import optuna

from trainer.errors import UserError
from tuner.launcher import run_trials
from tuner.run import Runtime
from tuner.samplers import build_pruner, build_sampler
from tuner.spec import StudySpec
from tuner.storage import opened
from tuner.study.record import TrialRecord
from tuner.supervisor import Job


class Line:
    """The worker's end of the pipe. `stopped` is set once the supervisor asks for it, or is gone."""

    def __init__(self, connection: Connection) -> None:
        self.stopped = threading.Event()
        self._connection = connection
        self._lock = threading.Lock()

    def listen(self) -> None:
        """From now on, whatever comes is the wish to stop."""

        def wait() -> None:
            with suppress(EOFError, OSError):
                self._connection.recv()
            self.stopped.set()

        threading.Thread(target=wait, name="supervisor", daemon=True).start()

    def tell(self, *event: object) -> None:
        """Send an event; without a supervisor nobody hears it, and the trial ends at its next step."""
        # Trackers and checkpoints warn from threads of their own.
        with self._lock, suppress(OSError):
            self._connection.send(event)


class Warnings(logging.Handler):
    """Passes on what is logged as a warning or worse."""

    def __init__(self, line: Line) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.tell("warning", record.getMessage())


class RemoteDisplay:
    """A `Display` at the other end of the line."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def trial_started(self, trial: TrialRecord, resumed: bool) -> RemoteTracker:
        self._line.tell("started", trial.number, resumed)
        return RemoteTracker(self._line, trial.number)

    def trial_ended(self, trial: TrialRecord) -> None:
        self._line.tell("ended", trial.number)


class RemoteTracker:
    """A `Tracker` at the other end of the line."""

    def __init__(self, line: Line, number: int) -> None:
        self._line, self._number = line, number

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self._line.tell("track", self._number, dict(values), step, samples)

    def checkpoint(self, name: str, *, step: int) -> None:
        self._line.tell("checkpoint", self._number, name, step)

    def close(self) -> None:
        """The trial's end is told by the display."""


def main(fd: int) -> None:
    """Work for the supervisor at the other end of this file descriptor, a socket."""
    faulthandler.enable()
    with Connection(fd) as connection, suppress(EOFError):
        job: Job = connection.recv()
        line = Line(connection)
        logging.getLogger().addHandler(Warnings(line))
        _heed_signals(line)
        line.listen()
        line.tell("farewell", *_work(job, line))


def _heed_signals(line: Line) -> None:
    """SIGTERM stops with a checkpoint, and at once where that was asked for already."""

    def stop(number: int, frame: Any) -> None:
        if line.stopped.is_set():
            raise KeyboardInterrupt
        line.stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(job: Job, line: Line) -> tuple[str, str]:
    """Run trials; returns how that ended, and what is to be said of it."""
    try:
        spec = StudySpec.build(job.spec, base_dir=job.base_dir)
        study = optuna.load_study(
            study_name=job.study_name,
            storage=opened(job.storage),
            sampler=build_sampler(spec.sampler, spec.study.seed),
            pruner=build_pruner(spec.pruner, spec.trial.first_point),
        )
        runtime = Runtime(job.run_root, job.track, line.stopped.is_set)
        run_trials(study, spec, runtime, job.total, RemoteDisplay(line))
    except KeyboardInterrupt:
        return "done", ""
    except (UserError, PermissionError, NotADirectoryError, FileExistsError) as error:
        return "mistake", str(error)
    except Exception:
        return "defect", traceback.format_exc()
    return "done", ""
