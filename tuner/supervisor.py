"""Several workers on one study: processes that stay warm from trial to trial, started, watched and replaced here.

Each worker has a pipe of its own. A shared queue or event has a lock, and a worker that is killed while it holds that
lock would hang all others; what a killed worker leaves of its own pipe is the end of the file.
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
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage

from trainer.errors import UserError
from trainer.tracking import CheckpointTracker, Tracker
from tuner.study.record import TrialRecord

log = logging.getLogger(__name__)

POLL_S = 0.1
"""So often the supervisor asks whether it is to stop."""
MAX_DEATHS = 5
"""So many for each worker may die in a row without an evaluation: more than it takes to find that a trial has too
little memory (`tuner.objective.MAX_STARTS`)."""
PATIENCE_S = 10
"""How long workers may take to end at the second Ctrl-C."""
# As the interpreter's own options would not: the modules are found where this process finds them, a study's too.
START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from tuner.worker import main; main(int(sys.argv[1]))"


class Display(Protocol):
    """Shows a study's progress to a person."""

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Tracker: ...

    def trial_ended(self, trial: TrialRecord) -> None: ...


class WorkerError(RuntimeError):
    """A defect in a worker; its traceback is in the message."""


@dataclass(frozen=True)
class Job:
    """What a worker is given. It goes through a pipe."""

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

    Processes are not bound to cores: the system moves them better than a fixed share would.

    Args:
        devices: The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them; empty where they train on the CPU.
        threads: Of the whole machine, or of what of it this process may use.

    Raises:
        UserError: There are fewer GPUs than workers. Two trials on one would judge by each other's memory and speed
            what fits and how long a full run takes.
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
    """The GPUs that a run with `train.device` may use, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # CUDA reads the list up to the first name that is no device.
    return (named or [str(index) for index in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


class _Worker:
    def __init__(self, index: int, job: Job, environment: Mapping[str, str], start: str) -> None:
        self.index, self.environment = index, environment
        self.trackers: dict[int, Tracker] = {}
        self.said_farewell = False
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
                # A terminal's Ctrl-C is for the supervisor alone, which passes it on.
                start_new_session=True,
            )
        # Where it is gone already, the pipe's end says so.
        with suppress(OSError):
            self.connection.send(job)

    def ask_to_stop(self) -> None:
        """At the next step, with a checkpoint."""
        with suppress(OSError):
            self.connection.send("stop")

    def interrupt(self) -> None:
        """At once, as far as it can; then wait for its end."""
        self.ask_to_stop()
        for _ in range(PATIENCE_S):
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                return
        self.process.kill()
        self.process.wait()

    def how_it_died(self) -> str:
        code = self.process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{how}; its last words may be in {self.log_file}"


class Supervisor:
    """Runs the workers of one launch, and shows what they tell.

    Args:
        environments: One for each worker: what it has besides this process's.
        stop: Asked all the time; True stops each worker at its next step with a checkpoint.
        on_trial_end: Called after each trial that ended.
        start: The code that a worker process runs.
    """

    def __init__(
        self,
        job: Job,
        environments: Sequence[Mapping[str, str]],
        *,
        storage: BaseStorage,
        stop: Callable[[], bool],
        display: Display | None,
        on_trial_end: Callable[[], None],
        start: str = START,
    ) -> None:
        self.job, self.environments, self.stop, self._start = job, environments, stop, start
        self.display, self.on_trial_end = display, on_trial_end
        # To look at trials of others; a sampler that proposes would do it a second time.
        self._study = optuna.load_study(study_name=job.study_name, storage=storage, sampler=RandomSampler())
        self._team: list[_Worker] = []
        self._stopping = False
        self._deaths = 0
        """Since the last evaluation."""
        self._error: Exception | None = None

    def run(self) -> bool:
        """Start the workers and wait until all have ended; True if no trial was left to claim, False if stopped.

        Raises:
            UserError: A worker met a user's mistake, or they died again and again.
            WorkerError: A worker met a defect.
        """
        self._team = [_Worker(index, self.job, given, self._start) for index, given in enumerate(self.environments)]
        try:
            while self._team:
                if not self._stopping and self.stop():
                    self._stop_all()
                ready = wait([worker.connection for worker in self._team], POLL_S)
                for worker in [worker for worker in self._team if worker.connection in ready]:
                    self._hear(worker)
        finally:
            for worker in self._team:
                worker.interrupt()
        if self._error is not None:
            raise self._error
        return not self._stopping

    def _stop_all(self) -> None:
        self._stopping = True
        for worker in self._team:
            worker.ask_to_stop()

    def _hear(self, worker: _Worker) -> None:
        try:
            event = worker.connection.recv()
        except (EOFError, OSError):
            self._ended(worker)
            return
        match event:
            case ("started", int(number), bool(resumed)):
                if self.display:
                    worker.trackers[number] = self.display.trial_started(self._trial(number), resumed)
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
                    self.display.trial_ended(self._trial(number))
                self.on_trial_end()
            case ("warning", text):
                log.warning("worker %d: %s", worker.index, text)
            case ("farewell", kind, text):
                worker.said_farewell = True
                if kind != "done":
                    self._error = self._error or (UserError(text) if kind == "mistake" else WorkerError(text))
                    self._stop_all()
            case _:
                raise AssertionError(f"worker {worker.index} said {event!r}")

    def _trial(self, number: int) -> TrialRecord:
        return TrialRecord.read(self._study.get_trials(deepcopy=False)[number])

    def _ended(self, worker: _Worker) -> None:
        """A worker's pipe is at its end; put another in its place where it did not mean to go."""
        self._team.remove(worker)
        worker.connection.close()
        if worker.said_farewell or self._stopping:
            worker.process.wait()
            return
        self._deaths += 1
        how = worker.how_it_died()
        if self._deaths >= MAX_DEATHS * len(self.environments):
            self._error = UserError(
                f"{self._deaths} workers in a row died before an evaluation, the last one {how}: launch with "
                "--workers 1 to see why, or with fewer workers if memory is short."
            )
            self._stop_all()
            return
        log.warning("worker %d died (%s); another one takes its place", worker.index, how)
        self._team.append(_Worker(worker.index, self.job, worker.environment, self._start))
