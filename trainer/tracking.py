"""Trackers receive a run's figures. They never stop or slow training: each writes from a thread of its own."""

from __future__ import annotations

import logging
import queue
import shlex
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from trainer.errors import first_line

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
class FileTracker(Protocol):
    """A `Tracker` that also receives checkpoints when they are whole on disk, in the thread that wrote them.

    The file is not replaced or deleted before `written` returns. `kind` is "best", "milestone" or "state".
    """

    def written(self, path: Path, kind: str, step: int) -> None: ...


@runtime_checkable
class EventTracker(Protocol):
    """A `Tracker` that also receives what happens to the run, as a kind and a sentence.

    Kinds: `gpu_idle`, and of the guard: `declined` (with the reason), `recovered` (a new best validation),
    `stopped_by_guard`.
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

    def written(self, path: Path, kind: str, step: int) -> None:
        self._notify(lambda tracker: tracker.written(path, kind, step), kind=FileTracker)

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


class BackgroundTracker(ABC):
    """Writes from a thread. If that fails, it warns once, and training continues without it.

    Args:
        root: Folder of all runs, for what a tracker stores about several of them.
        run_dir: The training run's directory.
        experiment: The group of the run, such as the study's name.
        params: Hyperparameters and lineage shown with the run.
    """

    CAPACITY = 10_000
    PATIENCE_S = 10.0
    NAME: str
    """As the log has it."""

    def __init__(self, root: Path, *, run_dir: Path, experiment: str, params: Mapping[str, Any]) -> None:
        self._root, self._run_dir, self._experiment, self._params = root, run_dir, experiment, params
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(self.CAPACITY)
        # A daemon: a close can hang (Aim's on a damaged repository), and must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=self.NAME, daemon=True)
        self._started = False
        self._first_step = 0

    @staticmethod
    @abstractmethod
    def viewer(root: Path) -> str:
        """The command that shows the curves of all runs."""

    @abstractmethod
    def _open(self) -> Any:
        """The run to write to; the run directory exists."""

    @abstractmethod
    def _write(self, run: Any, values: Mapping[str, float], step: int) -> None:
        """Write figures by name."""

    @abstractmethod
    def _write_checkpoint(self, run: Any, name: str, step: int) -> None: ...

    @abstractmethod
    def _write_text(self, run: Any, name: str, text: str, step: int) -> None: ...

    @abstractmethod
    def _close(self, run: Any) -> None: ...

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        figures = {**values, "samples": samples}
        self._put(lambda run: self._write(run, figures, step), step)

    def checkpoint(self, name: str, *, step: int) -> None:
        self._put(lambda run: self._write_checkpoint(run, name, step), step)

    def event(self, kind: str, text: str, *, step: int) -> None:
        self._put(lambda run: self._write_text(run, kind, text, step), step)

    def close(self) -> None:
        if not self._started:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(self.PATIENCE_S)
        if self._thread.is_alive():
            log.warning(
                "%s did not finish writing within %.0f s; the run's other files are whole", self.NAME, self.PATIENCE_S
            )

    def _put(self, write: Callable[[Any], None], step: int) -> None:
        if not self._started:
            # Started with the first write, so that a refused run leaves no trace.
            self._first_step = step
            self._thread.start()
            self._started = True
        with suppress(queue.Full):
            self._queue.put_nowait(write)

    def _work(self) -> None:
        try:
            run = self._open()
            while (write := self._queue.get()) is not None:
                write(run)
            self._close(run)
        # No failure of a tracker (a locked repository, a full disk, no network) may end a run of days.
        except Exception as error:
            kind, reason = type(error).__name__, first_line(error)
            log.warning("%s stopped tracking (%s: %s); training continues without it", self.NAME, kind, reason)


class AimTracker(BackgroundTracker):
    """Writes to the Aim repository in `root`, which is created if missing.

    A figure `train/loss` is Aim's metric `loss` in the context `{subset: train}`; checkpoints are texts named
    `checkpoint`, and events are texts named by their kind. A run directory stores the hash of its Aim run, so that a
    resumed run continues the same curves.
    """

    NAME = "Aim"

    @staticmethod
    def viewer(root: Path) -> str:
        return f"aim up --repo {shlex.quote(str(root))}"

    def _write(self, run: Any, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            subset, _, metric = name.rpartition("/")
            run.track(value, name=metric, step=step, context={"subset": subset} if subset else None)

    def _write_checkpoint(self, run: Any, name: str, step: int) -> None:
        from aim.sdk.objects.text import Text

        text: Any = Text
        run.track(text(name), name="checkpoint", step=step, context={"file": name})
        run["checkpoints", name] = step

    def _write_text(self, run: Any, name: str, text: str, step: int) -> None:
        from aim.sdk.objects.text import Text

        kept: Any = Text
        run.track(kept(text), name=name, step=step)

    def samples(self, files: Sequence[Path], metrics: Mapping[str, float], *, step: int) -> None:
        """Write audio, images and texts, and figures of them, in the context `{subset: samples}`."""

        def write(run: Any) -> None:
            for path in files:
                try:
                    run.track(_read_object(path), name=path.stem, step=step, context=context)
                except (OSError, ValueError, TypeError) as error:
                    log.warning("%s is not shown in Aim (%s)", path, first_line(error))
            for name, value in metrics.items():
                run.track(value, name=name, step=step, context=context)

        context = {"subset": "samples"}
        self._put(write, step)

    def _open(self) -> Any:
        """The Aim run that the run directory names, else a new one."""
        self._root.mkdir(parents=True, exist_ok=True)
        stored_hash = aim_run(self._run_dir)
        run = _reopen_run(self._root, stored_hash) if stored_hash else None
        if run is None:
            run = _new_run(self._root)
            if stored_hash:
                run["continues"] = stored_hash
        run.experiment, run.name = self._experiment, self._run_dir.name
        for key, value in self._params.items():
            run[key] = value
        (self._run_dir / AIM_RUN).write_text(run.hash)
        return run

    def _close(self, run: Any) -> None:
        run.close()
        _index_run(run)


def _read_object(path: Path) -> Any:
    """A file as Aim's Audio, Text or Image, by its ending."""
    from aim.sdk.objects.audio import Audio
    from aim.sdk.objects.image import Image
    from aim.sdk.objects.text import Text

    classes: Any = (Audio, Image, Text)
    audio, image, text = classes
    if path.suffix == ".wav":
        return audio(str(path), format="wav", caption=path.stem)
    if path.suffix == ".txt":
        return text(path.read_text(encoding="utf-8", errors="replace"))
    return image(str(path), caption=path.stem)


def aim_run(run_dir: Path) -> str | None:
    """Hash of the Aim run of a run directory; None if there is none (yet)."""
    try:
        return (run_dir / AIM_RUN).read_text().strip() or None
    except FileNotFoundError:
        return None


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
    from aim.sdk.repo import Repo
    from aim.sdk.run import Run

    if (repo / ".aim").is_dir() and not (repo / ".aim" / "VERSION").exists():
        # A process ended while it made the repository; Aim would refuse it as one of an old version.
        Repo.from_path(str(repo), init=True)
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
