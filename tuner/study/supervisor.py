"""Supervisor of the workers of one launch: starts them, shows their trials, and restarts those that die.

A worker is a process that stays warm from trial to trial. Each has a pipe of its own: a shared queue has a lock, and a
worker killed while it holds the lock would hang all others; a killed worker's own pipe just ends.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.storages import BaseStorage

from trainer.errors import UserError
from trainer.tracking import CheckpointTracker, Tracker
from tuner.study.record import TrialRecord

log = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds between two calls of `stop`."""
MAX_DEATHS = 5
"""Deaths in a row without an evaluation, for each worker, that end the launch. More than `objective.MAX_STARTS`, which
finds a trial with too little memory infeasible first."""
GRACE_S = 10
"""Seconds that workers get to exit at the second Ctrl-C."""
# Modules, a study's too, are imported from where this process imports them; no option of the interpreter does that.
START = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from tuner.study.worker import main
main(int(sys.argv[1]))
"""


class Display(Protocol):
    """Shows the progress of a launch."""

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Tracker: ...

    def trial_ended(self, trial: TrialRecord) -> None: ...


class WorkerError(RuntimeError):
    """A worker raised an error that is no user's mistake; the message holds its traceback."""


@dataclass(frozen=True)
class Job:
    """A worker's task, sent to it through its pipe."""

    study_name: str
    spec: Mapping[str, Any]
    base_dir: Path
    storage: BaseStorage | str
    run_root: Path
    track: bool
    total: int
    """The study's number of trials."""


def worker_environments(num_workers: int, devices: Sequence[str], threads: int) -> list[dict[str, str]]:
    """The environment variables that divide a machine among workers. A pure function.

    Processes are not pinned to cores: the scheduler balances them better than fixed shares.

    Args:
        devices: The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them; empty for the CPU.
        threads: Threads to divide.

    Raises:
        UserError: There are fewer GPUs than workers. Two trials on one GPU would disturb each other's measured memory
            and speed.
    """
    if devices and num_workers > len(devices):
        raise UserError(
            f"--workers {num_workers}: {len(devices)} GPU{'s' if len(devices) > 1 else ''} can be used, and each "
            f"worker needs one of its own: give --workers {len(devices)}, or more in CUDA_VISIBLE_DEVICES."
        )
    share = str(max(1, threads // num_workers))
    environments = [{"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share} for _ in range(num_workers)]
    for environment, device in zip(environments, devices, strict=False):
        environment["CUDA_VISIBLE_DEVICES"] = device
    return environments


def visible_devices(device: str) -> list[str]:
    """The GPUs that a run with this `train.device` may use, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # CUDA ignores the list from the first name on that is no device.
    return (named or [str(index) for index in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


class _Worker:
    def __init__(self, index: int, job: Job, environment: Mapping[str, str], start: str) -> None:
        self.index, self.environment = index, environment
        self.trackers: dict[int, Tracker] = {}
        self.has_exited = False
        """Whether it sent its exit message: it ended on purpose."""
        self.log_file = job.run_root / job.study_name / f"worker-{index}.log"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.connection, theirs = multiprocessing.Pipe()
        with theirs, open(self.log_file, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", start, str(theirs.fileno()), json.dumps(sys.path)],
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A terminal's Ctrl-C reaches the supervisor alone, which sends it on.
                start_new_session=True,
            )
        # If the process has died already, EOF on the pipe tells the supervisor.
        with suppress(OSError):
            self.connection.send(job)

    def request_stop(self) -> None:
        """Stop at the next step, with a checkpoint."""
        with suppress(OSError):
            self.connection.send("stop")

    def interrupt(self) -> None:
        """Stop as soon as possible, and wait for the exit."""
        self.request_stop()
        for _ in range(GRACE_S):
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                return
        self.process.kill()
        self.process.wait()

    def describe_death(self) -> str:
        code = self.process.wait()
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{cause}; its last output may be in {self.log_file}"


class Supervisor:
    """Runs the workers of one launch.

    Args:
        environments: One for each worker: environment variables besides this process's.
        stop: Polled; True stops each worker at its next step with a checkpoint.
        on_trial_end: Called after each trial.
        start: The code that a worker process runs.
    """

    def __init__(
        self,
        job: Job,
        environments: Sequence[Mapping[str, str]],
        *,
        study: optuna.Study,
        stop: Callable[[], bool],
        display: Display | None,
        on_trial_end: Callable[[], None],
        start: str = START,
    ) -> None:
        self.job, self.environments, self.study, self.stop, self._start = job, environments, study, stop, start
        self.display, self.on_trial_end = display, on_trial_end
        self._workers: list[_Worker] = []
        self._stopping = False
        self._deaths = 0
        """Since the last evaluation."""
        self._error: Exception | None = None

    def run(self) -> bool:
        """Start the workers and wait until all have exited; True if no trial was left to claim, False if stopped.

        Raises:
            UserError: A worker met a user's mistake, or workers died again and again.
            WorkerError: A worker raised another error.
        """
        self._workers = [_Worker(index, self.job, given, self._start) for index, given in enumerate(self.environments)]
        try:
            while self._workers:
                if not self._stopping and self.stop():
                    self._stop_all()
                ready = wait([worker.connection for worker in self._workers], POLL_S)
                for worker in [worker for worker in self._workers if worker.connection in ready]:
                    self._receive(worker)
        finally:
            for worker in self._workers:
                worker.interrupt()
        if self._error is not None:
            raise self._error
        return not self._stopping

    def _stop_all(self) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.request_stop()

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._handle_eof(worker)
            return
        match message:
            case ("started", int(number), bool(resumed)):
                if self.display:
                    worker.trackers[number] = self.display.trial_started(self._read_trial(number), resumed)
            case ("track", int(number), values, int(step), int(samples)):
                if any(name.startswith("val/") for name in values):
                    self._deaths = 0
                if number in worker.trackers:
                    worker.trackers[number].track(values, step=step, samples=samples)
            case ("checkpoint", int(number), str(name), int(step)):
                tracker = worker.trackers.get(number)
                if isinstance(tracker, CheckpointTracker):
                    tracker.checkpoint(name, step=step)
            case ("ended", int(number)):
                self._deaths = 0
                if self.display:
                    worker.trackers.pop(number).close()
                    self.display.trial_ended(self._read_trial(number))
                self.on_trial_end()
            case ("warning", text):
                log.warning("worker %d: %s", worker.index, text)
            case ("exit", kind, text):
                worker.has_exited = True
                if kind != "done":
                    self._error = self._error or (UserError(text) if kind == "mistake" else WorkerError(text))
                    self._stop_all()
            case _:
                raise AssertionError(f"worker {worker.index} sent {message!r}")

    def _read_trial(self, number: int) -> TrialRecord:
        return TrialRecord.read(self.study.get_trials(deepcopy=False)[number])

    def _handle_eof(self, worker: _Worker) -> None:
        """EOF on a worker's pipe: restart the worker unless it exited on purpose."""
        self._workers.remove(worker)
        worker.connection.close()
        if worker.has_exited or self._stopping:
            worker.process.wait()
            return
        self._deaths += 1
        death = worker.describe_death()
        if self._deaths >= MAX_DEATHS * len(self.environments):
            self._error = UserError(
                f"{self._deaths} workers in a row died before an evaluation, the last one {death}: launch with "
                "--workers 1 to see why, or with fewer workers if memory is short."
            )
            self._stop_all()
            return
        log.warning("worker %d died (%s) and is restarted", worker.index, death)
        self._workers.append(_Worker(worker.index, self.job, worker.environment, self._start))
