"""Where a run's figures go. A tracker never stops or slows training: Aim works in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives a run's figures by name (`train/loss`, `val/text_loss`), at most once per log interval."""

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        for tracker in self.trackers:
            tracker.track(values, step=step, samples=samples)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class AimTracker:
    """Writes to an Aim repository from a thread; if Aim fails, says so once and training goes on without it.

    A run directory remembers its Aim run, so that a resumed run continues the same curves.

    Args:
        repo: Folder of the Aim repository; made where there is none.
        run_dir: The training run's directory.
        experiment: What the run belongs to, such as the study's name.
        params: Hyperparameters and lineage shown with the run.
    """

    CAPACITY = 10_000
    PATIENCE_S = 10.0

    def __init__(self, repo: Path, *, run_dir: Path, experiment: str, params: Mapping[str, Any]) -> None:
        self._repo, self._run_dir, self._experiment, self._params = repo, run_dir, experiment, params
        self._queue: queue.Queue[tuple[Mapping[str, float], int, int] | None] = queue.Queue(self.CAPACITY)
        # A daemon: Aim's close can hang on a damaged repository, and must not keep the process.
        self._thread = threading.Thread(target=self._work, name="aim", daemon=True)
        self._started = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if not self._started:
            # Not before there is something to write: a run that is refused leaves no trace in Aim.
            self._thread.start()
            self._started = True
        with suppress(queue.Full):
            self._queue.put_nowait((values, step, samples))

    def close(self) -> None:
        if not self._started:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(self.PATIENCE_S)
        if self._thread.is_alive():
            log.warning("Aim did not finish writing within %.0f s; the run's other files are whole", self.PATIENCE_S)

    def _work(self) -> None:
        try:
            run = self._open()
            while (item := self._queue.get()) is not None:
                values, step, samples = item
                for name, value in values.items():
                    subset, _, metric = name.partition("/")
                    run.track(value, name=metric, step=step, context={"subset": subset})
                run.track(samples, name="samples", step=step)
            run.close()
            _index(run)
        # Whatever a tracker meets (a locked repository, a full disk, a version it can't read) is no reason to
        # lose a run of days.
        except Exception as error:
            log.warning("Aim stopped tracking (%s: %s); training goes on without it", type(error).__name__, error)

    def _open(self) -> Any:
        """The run to write to: the one that the run directory remembers, else a new one."""
        from aim.sdk.run import Run

        remembered = self._run_dir / "aim_run"
        run_hash = remembered.read_text().strip() if remembered.is_file() else None
        self._repo.mkdir(parents=True, exist_ok=True)
        run = Run(
            run_hash,
            repo=str(self._repo),
            experiment=self._experiment,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        run.name = self._run_dir.name
        for key, value in self._params.items():
            run[key] = value
        remembered.write_text(run.hash)
        return run


def _index(run: Any) -> None:
    """Enter a closed run into the repository's index. `aim up` does it too, but until somebody opens it, Aim's own
    API would not find the run."""
    from aim.sdk.index_manager import RepoIndexManager

    RepoIndexManager.get_index_manager(run.repo).index(run.hash)
