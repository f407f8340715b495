"""A worker, as its supervisor has it: a process that stays warm from trial to trial, at the other end of a pipe."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from optuna.storages import BaseStorage

from trainer.tracking import Tracker

GRACE_S = 10
"""Seconds that workers get to exit at the second Ctrl-C, and the kernel to end a killed one."""
HANG_S, STOP_HANG_S = 900.0, 480.0
"""Seconds without a sign of life, or 10 of its usual intervals if they are longer, after which a worker hangs: before
and after a request to stop, which may take a validation and a checkpoint of gigabytes. Compilation and reading
the data give no sign."""
# Modules, a study's too, are imported from where this process imports them; no option of the interpreter does that.
START = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from tuner.study.worker import main
main(int(sys.argv[1]))
"""


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


class Worker(ABC):
    """A worker of a launch, wherever it runs."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.trackers: dict[int, Tracker] = {}
        self.has_exited = False
        """Whether it sent its exit message: it ended on purpose."""
        self.alive_at = time.monotonic()
        """When it last gave a sign of life."""
        self._intervals: deque[float] = deque(maxlen=20)
        """Seconds between the newest signs."""

    def note_life(self) -> None:
        now = time.monotonic()
        self._intervals.append(now - self.alive_at)
        self.alive_at = now

    def silence(self, since: float | None) -> float | None:
        """Seconds without a sign of life if they are too many, else None.

        Args:
            since: When it was asked to stop.
        """
        silent = time.monotonic() - max(self.alive_at, since or 0.0)
        usual = median(self._intervals) if self._intervals else 0.0
        return silent if silent > max(HANG_S if since is None else STOP_HANG_S, 10 * usual) else None

    @abstractmethod
    def request_stop(self) -> None:
        """Stop at the next step, with a checkpoint."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once."""

    @abstractmethod
    def close(self) -> None:
        """Let go of a worker that has ended."""

    @abstractmethod
    def describe_death(self) -> str:
        """How it ended, and where to look."""


class WorkerProcess(Worker):
    """A process on this machine."""

    def __init__(self, index: int, job: Job, environment: Mapping[str, str], start: str) -> None:
        super().__init__(index)
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
        with suppress(OSError):
            self.connection.send("stop")

    def kill(self) -> None:
        """A process that waits for a dead device or file system outlives even SIGKILL, and is left alone."""
        self.process.kill()
        self._reap()

    def close(self) -> None:
        self.connection.close()
        self._reap()

    def _reap(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)

    def describe_death(self) -> str:
        self._reap()
        code = self.process.returncode
        if code is None:
            return f"process {self.process.pid} does not end; see {self.log_file}"
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{cause}; its last output may be in {self.log_file}"


def interrupt(workers: Sequence[WorkerProcess]) -> None:
    """Stop workers as soon as possible, and wait for their exits: for all together, since a watchdog waits too."""
    for worker in workers:
        worker.request_stop()
    for _ in range(GRACE_S):
        living = [worker.process for worker in workers if worker.process.poll() is None]
        for process in living:
            process.terminate()
        until = time.monotonic() + 1
        for process in living:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.close()
