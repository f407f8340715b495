"""Trackers receive a run's figures. They never stop or slow training: Aim has a thread of its own."""

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
    """A `Tracker` that also receives checkpoints when they are taken, which may still be being written."""

    def checkpoint(self, name: str, *, step: int) -> None: ...


@runtime_checkable
class EventTracker(Protocol):
    """A `Tracker` that also receives what the guard of a run reports.

    Kinds: `declined` (the text has the reason), `recovered` (a new best validation), `stopped_by_guard`.
    """

    def event(self, kind: str, text: str, *, step: int) -> None: ...


class Trackers:
    """Several trackers as one. One that fails is removed, and training continues."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self._notify(lambda tracker: tracker.track(values, step=step, samples=samples))

    def checkpoint(self, name: str, *, step: int) -> None:
        self._notify(lambda tracker: tracker.checkpoint(name, step=step), kind=CheckpointTracker)

    def event(self, kind: str, text: str, *, step: int) -> None:
        self._notify(lambda tracker: tracker.event(kind, text, step=step), kind=EventTracker)

    def close(self) -> None:
        self._notify(lambda tracker: tracker.close())

    def _notify(self, call: Callable[[Any], None], kind: type = object) -> None:
        for tracker in [tracker for tracker in self.trackers if isinstance(tracker, kind)]:
            try:
                call(tracker)
            # No failure of a tracker may end a run of days. With its traceback: it may be a defect.
            except Exception:
                log.warning("%s failed; training continues without it", type(tracker).__name__, exc_info=True)
                self.trackers.remove(tracker)
                with suppress(Exception):
                    tracker.close()


class AimTracker:
    """Writes to an Aim repository from a thread. If Aim fails, it warns once, and training continues without it.

    A figure `train/loss` is Aim's metric `loss` in the context `{subset: train}`; checkpoints are texts named
    `checkpoint`, and events are texts named by their kind. A run directory stores the hash of its Aim run, so that a
    resumed run continues the same curves.

    Args:
        repo: Folder of the Aim repository; created if missing.
        run_dir: The training run's directory.
        experiment: The group of the run, such as the study's name.
        params: Hyperparameters and lineage shown with the run.
    """

    CAPACITY = 10_000
    PATIENCE_S = 10.0

    def __init__(self, repo: Path, *, run_dir: Path, experiment: str, params: Mapping[str, Any]) -> None:
        self._repo, self._run_dir, self._experiment, self._params = repo, run_dir, experiment, params
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(self.CAPACITY)
        # A daemon: Aim's close can hang on a damaged repository, and must not keep the process alive.
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

    def event(self, kind: str, text: str, *, step: int) -> None:
        def write(run: Any) -> None:
            from aim.sdk.objects.text import Text

            kept: Any = Text
            run.track(kept(text), name=kind, step=step)

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
            # Started with the first write, so that a refused run leaves no trace in Aim.
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
            _index_run(run)
        # No failure of Aim (a locked repository, a full disk, a version that it can't read) may end a run of days.
        except Exception as error:
            log.warning("Aim stopped tracking (%s: %s); training continues without it", type(error).__name__, error)

    def _open(self) -> Any:
        """The Aim run that the run directory names, else a new one."""
        self._repo.mkdir(parents=True, exist_ok=True)
        stored_hash = aim_run(self._run_dir)
        run = _reopen_run(self._repo, stored_hash) if stored_hash else None
        if run is None:
            run = _new_run(self._repo)
            if stored_hash:
                run["continues"] = stored_hash
        run.experiment, run.name = self._experiment, self._run_dir.name
        for key, value in self._params.items():
            run[key] = value
        (self._run_dir / AIM_RUN).write_text(run.hash)
        return run


def aim_run(run_dir: Path) -> str | None:
    """Hash of the Aim run of a run directory; None if there is none (yet)."""
    try:
        return (run_dir / AIM_RUN).read_text().strip() or None
    except FileNotFoundError:
        return None


def aim_command(repo: Path) -> str:
    """The command that opens the repository in a browser."""
    return f"aim up --repo {shlex.quote(str(repo))}"


def _reopen_run(repo: Path, run_hash: str) -> Any | None:
    """Open an Aim run to continue it; None if it is missing, or still open elsewhere."""
    from aim.sdk.errors import MissingRunError, RunLockingError
    from filelock import Timeout

    if not (repo / ".aim" / "meta" / "chunks" / run_hash).is_dir():
        log.info("Aim run %s is not in %s: a new Aim run starts, with a reference to it", run_hash, repo)
        return None
    try:
        return _new_run(repo, run_hash)
    except MissingRunError:
        # Aim caches its list of runs for half a second: a run that has just ended is not in it yet.
        time.sleep(1)
        return _new_run(repo, run_hash)
    except (RunLockingError, Timeout):
        log.warning("Aim run %s is still open elsewhere: a new Aim run starts, with a reference to it", run_hash)
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


def _index_run(run: Any) -> None:
    """Add a closed run to the repository's index. `aim up` does so, too, but until it runs, Aim's own API would not
    find the run."""
    from aim.sdk.index_manager import RepoIndexManager

    try:
        RepoIndexManager.get_index_manager(run.repo).index(run.hash)
    # The data is complete. `aim up`, or another run that is ending, holds the index; `aim up` adds the run later.
    except Exception as error:
        log.info("Aim's index is busy (%s): aim up adds the run when it starts", type(error).__name__)
