"""A worker process of `tuner launch --workers N`: claims and runs trials until none is left to claim.

It sends its trials' progress to the supervisor through a pipe. Any message on the pipe, and EOF, mean: stop.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import optuna

from trainer.errors import UserError
from tuner.spec.study_toml import StudySpec
from tuner.study.launch import run_trials
from tuner.study.record import TrialRecord
from tuner.study.samplers import SpecSampler, build_pruner
from tuner.study.storage import open_patiently
from tuner.study.tracked_run import Runtime
from tuner.study.worker_process import Job

SIGN_S = 1.0
"""Seconds between two signs of life, at least."""


class Line(ABC):
    """A worker's line to its supervisor. `stopped` is set once the supervisor requests it or has died."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._signed_at = -SIGN_S

    @abstractmethod
    def send(self, *message: object) -> None:
        """Send a message; without a supervisor it is dropped, and the trial stops at its next step."""

    def should_stop(self) -> bool:
        """Whether to stop. It is asked at each step: the supervisor learns that the worker lives."""
        if time.monotonic() - self._signed_at >= SIGN_S:
            self._signed_at = time.monotonic()
            self.send("alive")
        return self.stopped.is_set()


class WorkerPipe(Line):
    """A pipe to a supervisor on this machine."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Set `stopped` at the next message or at EOF."""

        def wait() -> None:
            with suppress(EOFError, OSError):
                self._connection.recv()
            self.stopped.set()

        threading.Thread(target=wait, name="supervisor", daemon=True).start()

    def send(self, *message: object) -> None:
        # Trackers and checkpoints log warnings from threads of their own.
        with self._lock, suppress(OSError):
            self._connection.send(message)


class PipeWarnings(logging.Handler):
    """Sends warnings and errors of the log to the supervisor."""

    def __init__(self, pipe: Line) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send("warning", record.getMessage())


class PipeDisplay:
    """A `Display` that sends to the supervisor's."""

    def __init__(self, pipe: Line) -> None:
        self._pipe = pipe

    def trial_started(self, trial: TrialRecord, resumed: bool) -> PipeTracker:
        self._pipe.send("started", trial.number, resumed)
        return PipeTracker(self._pipe, trial.number)

    def trial_ended(self, trial: TrialRecord) -> None:
        self._pipe.send("ended", trial.number)


class PipeTracker:
    """A `Tracker` that sends to the supervisor's."""

    def __init__(self, pipe: Line, number: int) -> None:
        self._pipe, self._number = pipe, number

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self._pipe.send("track", self._number, dict(values), step, samples)

    def checkpoint(self, name: str, *, step: int) -> None:
        self._pipe.send("checkpoint", self._number, name, step)

    def close(self) -> None:
        """The display sends the end of the trial."""


def main(fd: int) -> None:
    """Work for the supervisor at the other end of this file descriptor, a socket."""
    faulthandler.enable()
    with Connection(fd) as connection, suppress(EOFError):
        job: Job = connection.recv()
        pipe = WorkerPipe(connection)
        logging.getLogger().addHandler(PipeWarnings(pipe))
        _handle_signals(pipe)
        pipe.listen()
        pipe.send("exit", *work(job, pipe))


def _handle_signals(pipe: WorkerPipe) -> None:
    """SIGTERM stops with a checkpoint; if a stop was requested before, it stops at once."""

    def stop(number: int, frame: Any) -> None:
        if pipe.stopped.is_set():
            raise KeyboardInterrupt
        pipe.stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def work(job: Job, pipe: Line) -> tuple[str, str]:
    """Run trials; returns the kind of the end (done, mistake, defect) and a message."""
    try:
        spec = StudySpec.build(job.spec, base_dir=job.base_dir)
        study = optuna.load_study(
            study_name=job.study_name,
            storage=open_patiently(job.storage),
            sampler=SpecSampler(spec),
            pruner=build_pruner(spec.pruner, spec.trial.first_point),
        )
        runtime = Runtime(job.run_root, job.track, stop=pipe.should_stop, alive=pipe.should_stop)
        run_trials(study, spec, runtime, job.total, PipeDisplay(pipe))
    except KeyboardInterrupt:
        return "done", ""
    except (UserError, PermissionError, NotADirectoryError, FileExistsError) as error:
        return "mistake", str(error)
    except Exception:
        return "defect", traceback.format_exc()
    return "done", ""
