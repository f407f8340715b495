"""Where a run's figures go. A tracker never stops or slows training: Aim works in a thread of its own."""

from __future__ import annotations

import logging
import queue
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

log = logging.getLogger(__name__)

AIM_RUN = "aim_run"
"""File in a run directory: the hash of its Aim run."""


class Tracker(Protocol):
    """Receives a run's figures by name (`train/loss`, `val/text_loss`), at most once per log interval."""

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class CheckpointTracker(Protocol):
    """A `Tracker` that is also told of checkpoints as they are taken; they may still be being written."""

    def checkpoint(self, name: str, *, step: int) -> None: ...


class Trackers:
    """Several trackers as one. One that fails is left out from then on: training goes on."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self._tell(lambda tracker: tracker.track(values, step=step, samples=samples))

    def checkpoint(self, name: str, *, step: int) -> None:
        self._tell(lambda tracker: tracker.checkpoint(name, step=step), to=CheckpointTracker)

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())

    def _tell(self, say: Callable[[Any], None], to: type = object) -> None:
        for tracker in [tracker for tracker in self.trackers if isinstance(tracker, to)]:
            try:
                say(tracker)
            # Whatever it meets is no reason to lose a run of days. With its traceback: it may be a defect.
            except Exception:
                log.warning("%s failed; training goes on without it", type(tracker).__name__, exc_info=True)
                self.trackers.remove(tracker)
                with suppress(Exception):
                    tracker.close()


class AimTracker:
    """Writes to an Aim repository from a thread; if Aim fails, says so once and training goes on without it.

    A figure `train/loss` is Aim's metric `loss` in the context `{subset: train}`; checkpoints are the texts
    `checkpoint`. A run directory remembers its Aim run, so that a resumed run continues the same curves.

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
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(self.CAPACITY)
        # A daemon: Aim's close can hang on a damaged repository, and must not keep the process.
        self._thread = threading.Thread(target=self._work, name="aim", daemon=True)
        self._started = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        def write(run: Any) -> None:
            for name, value in values.items():
                subset, _, metric = name.partition("/")
                run.track(value, name=metric, step=step, context={"subset": subset})
            run.track(samples, name="samples", step=step)

        self._put(write)

    def checkpoint(self, name: str, *, step: int) -> None:
        def write(run: Any) -> None:
            from aim.sdk.objects.text import Text

            text: Any = Text
            run.track(text(name), name="checkpoint", step=step, context={"file": name})
            run["checkpoints", name] = step

        self._put(write)

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

    def _put(self, write: Callable[[Any], None]) -> None:
        if not self._started:
            # Not before there is something to write: a run that is refused leaves no trace in Aim.
            self._thread.start()
            self._started = True
        with suppress(queue.Full):
            self._queue.put_nowait(write)

    def _work(self) -> None:
        try:
            run = self._open()
            while (write := self._queue.get()) is not None:
                write(run)
            run.close()
            _index(run)
        # Whatever a tracker meets (a locked repository, a full disk, a version it can't read) is no reason to
        # lose a run of days.
        except Exception as error:
            log.warning("Aim stopped tracking (%s: %s); training goes on without it", type(error).__name__, error)

    def _open(self) -> Any:
        """The run to write to: the one that the run directory remembers, else a new one."""
        self._repo.mkdir(parents=True, exist_ok=True)
        remembered = aim_run(self._run_dir)
        run = _continued(self._repo, remembered) if remembered else None
        if run is None:
            run = _new_run(self._repo)
            if remembered:
                run["continues"] = remembered
        run.experiment, run.name = self._experiment, self._run_dir.name
        for key, value in self._params.items():
            run[key] = value
        (self._run_dir / AIM_RUN).write_text(run.hash)
        return run


def aim_run(run_dir: Path) -> str | None:
    """Hash of the Aim run of a run directory; None where there is none (yet)."""
    try:
        return (run_dir / AIM_RUN).read_text().strip() or None
    except FileNotFoundError:
        return None


def aim_command(repo: Path) -> str:
    """What opens the repository in a browser."""
    return f"aim up --repo {shlex.quote(str(repo))}"


def _continued(repo: Path, run_hash: str) -> Any | None:
    """The Aim run of that hash, open for more; None where it is gone, or still open elsewhere."""
    from aim.sdk.errors import MissingRunError, RunLockingError
    from filelock import Timeout

    if not (repo / ".aim" / "meta" / "chunks" / run_hash).is_dir():
        log.info("Aim run %s is not in %s: a new one begins, which names it", run_hash, repo)
        return None
    try:
        return _new_run(repo, run_hash)
    except MissingRunError:
        # Aim keeps its list of runs for half a second: a run that ended just now is not on it yet.
        time.sleep(1)
        return _new_run(repo, run_hash)
    except (RunLockingError, Timeout):
        log.warning("Aim run %s is still open elsewhere: a new one begins, which names it", run_hash)
        return None


def _new_run(repo: Path, run_hash: str | None = None) -> Any:
    from aim.sdk.run import Run

    return Run(
        run_hash,
        repo=str(repo),
        system_tracking_interval=None,
        log_system_params=False,
        capture_terminal_logs=False,
    )


def _index(run: Any) -> None:
    """Enter a closed run into the repository's index. `aim up` does it too, but until somebody opens it, Aim's own
    API would not find the run."""
    from aim.sdk.index_manager import RepoIndexManager

    try:
        RepoIndexManager.get_index_manager(run.repo).index(run.hash)
    # All is written; `aim up` or another run that ends just now has the index open, and `aim up` catches up by itself.
    except Exception as error:
        log.info("Aim's index is busy (%s): the run is entered when aim up starts", type(error).__name__)
