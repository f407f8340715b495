"""Supervisor of the workers of one launch: starts them, shows their trials, and restarts those that die or hang.

Each worker has a pipe of its own: a shared queue has a lock, and a worker killed while it holds the lock would hang all
others; a killed worker's own pipe just ends.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, cast

import optuna
import torch

from trainer.clock import clock
from trainer.errors import UserError
from trainer.tracking import CheckpointTracker, Tracker
from tuner.study.optuna_internals import stored_trial
from tuner.study.record import TrialRecord
from tuner.study.worker_process import START, Job, Worker, WorkerProcess, interrupt

log = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds between two calls of `stop`."""
MAX_DEATHS = 5
"""Deaths in a row without an evaluation, for each worker, that end the launch. More than `objective.MAX_STARTS`, which
finds a trial with too little memory infeasible first."""


class Display(Protocol):
    """Shows the progress of a launch."""

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Tracker: ...

    def trial_ended(self, trial: TrialRecord) -> None: ...


class WorkerError(RuntimeError):
    """A worker raised an error that is no user's mistake; the message holds its traceback."""


def worker_environments(num_workers: int, devices: Sequence[str], threads: int, cores: int) -> list[dict[str, str]]:
    """The environment variables that divide a machine among workers. A pure function.

    Processes are not pinned to cores: the scheduler balances them better than fixed shares.

    Args:
        devices: The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them; empty for the CPU.
        threads: Threads to divide.
        cores: Of this machine.

    Raises:
        UserError: There are fewer GPUs than workers, or without GPUs fewer cores. Two trials on one GPU would disturb
            each other's measured memory and speed.
    """
    if not devices and num_workers > cores:
        raise UserError(f"--workers {num_workers}: this machine has {cores} cores: give at most {cores}.")
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
        self._workers: list[Worker] = []
        self._stopping: float | None = None
        """When the workers were asked to stop."""
        self._deaths = 0
        """Since the last evaluation."""
        self._error: Exception | None = None

    def run(self) -> bool:
        """Start the workers and wait until all have exited; True if no trial was left to claim, False if stopped.

        Raises:
            UserError: A worker met a user's mistake, or workers died again and again.
            WorkerError: A worker raised another error.
        """
        self._workers = [self._start_worker(index) for index in range(len(self.environments))]
        try:
            while self._workers:
                if self._stopping is None and self.stop():
                    self._stop_all()
                for worker, message in self._receive():
                    if message is None:
                        self._handle_death(worker)
                    else:
                        worker.note_life()
                        self._handle(worker, message)
                for worker in list(self._workers):
                    if (silent := worker.silence(self._stopping)) is not None:
                        self._end_hung(worker, silent)
        finally:
            self._interrupt()
        if self._error is not None:
            raise self._error
        return self._stopping is None

    def _stop_all(self) -> None:
        self._stopping = time.monotonic()
        for worker in self._workers:
            worker.request_stop()

    def _start_worker(self, index: int) -> Worker:
        return WorkerProcess(index, self.job, self.environments[index], self._start)

    def _interrupt(self) -> None:
        """Stop the workers that are left as soon as possible, and wait for their exits."""
        interrupt([worker for worker in self._workers if isinstance(worker, WorkerProcess)])

    def _receive(self) -> list[tuple[Worker, tuple[Any, ...] | None]]:
        """The next messages; None from a worker whose process has ended. Waits for `POLL_S` at most."""
        workers = {worker.connection: worker for worker in self._workers if isinstance(worker, WorkerProcess)}
        received: list[tuple[Worker, tuple[Any, ...] | None]] = []
        for connection in wait(list(workers), POLL_S):
            worker = workers[cast(Connection, connection)]
            try:
                received.append((worker, worker.connection.recv()))
            except (EOFError, OSError):
                received.append((worker, None))
        return received

    def _handle(self, worker: Worker, message: tuple[Any, ...]) -> None:
        match message:
            case ("alive",):
                """It is at a step."""
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
        return TrialRecord.read(stored_trial(self.study, number))

    def _end_hung(self, worker: Worker, silent: float) -> None:
        then = "its trial continues in a new one" if self._stopping is None else "its trial stays open"
        log.warning("worker %d has hung for %s and is killed; %s", worker.index, clock(silent), then)
        worker.kill()
        self._handle_death(worker)

    def _handle_death(self, worker: Worker) -> None:
        """Restart a worker whose process has ended, unless it exited on purpose."""
        self._workers.remove(worker)
        worker.close()
        if worker.has_exited or self._stopping is not None:
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
        self._workers.append(self._start_worker(worker.index))
