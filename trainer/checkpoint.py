"""The checkpoints of a run: which are kept, which one a run continues from, and a thread that writes them.

`step_*.pth` are the last few states, `latest.pth` is a hard link to the newest, `stable.pth` to the state before the
rate decays, `best.pth` to that of the best validation. `best_*.pth` and `milestone_*.pth` hold weights and metrics.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil

from trainer.checkpoint_file import (
    UnreadableFile,
    explain_write_error,
    is_checkpoint,
    link_checkpoint,
    num_bytes,
    read_checkpoint,
    snapshot,
    tensors_in,
    write_checkpoint,
)
from trainer.errors import UserError, first_line
from trainer.host_buffer import HostBuffer
from trainer.locks import is_locked, lock_folder
from trainer.run_folder import (
    BEST,
    LATEST,
    STABLE,
    delete,
    delete_checkpoints,
    delete_unfinished,
    holds_state,
    list_steps,
    milestone_file,
    newest_step,
    step_file,
    step_of,
)
from trainer.state_form import check_form, read_state
from trainer.units import format_bytes

__all__ = [
    "BEST",
    "LATEST",
    "STABLE",
    "Checkpoints",
    "delete_checkpoints",
    "explain_write_error",
    "find_state",
    "go_back",
    "holds_state",
    "is_checkpoint",
    "is_locked",
    "link_checkpoint",
    "list_steps",
    "lock_folder",
    "milestone_file",
    "newest_step",
    "num_bytes",
    "read_checkpoint",
    "snapshot",
    "step_file",
    "tensors_in",
    "write_checkpoint",
]

log = logging.getLogger(__name__)

KEPT_SHARE = 1 / 3
"""Share of the free host memory that may be kept for snapshots of a GPU's state."""
RETRY_S, MAX_RETRY_S = 2.0, 60.0
"""Seconds until a failed write is tried again: doubled each time, up to the second number."""
UNREADABLE = ".unreadable"
"""Suffix of a state that the disk refused to read when the run went back to an earlier one."""
POLL_S = 0.5
"""Seconds in which a stop ends the waiting."""
GIVE_UP_S = 600.0
"""A run ends once no checkpoint could be written for this many seconds."""


def find_state(
    run_dir: Path,
    fits: Callable[[Mapping[str, Any]], bool] = lambda state: True,
    on_unreadable: Callable[[Path], object] = lambda path: None,
) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest undamaged checkpoint, its tensors mapped from the file. Logs and skips damaged ones.

    Args:
        fits: Whether a run may continue from a state. If the newest does not fit, `stable.pth` is returned if it does.
            `best.pth` is returned if all others are damaged.
        on_unreadable: Called with a state that the disk refused to read, which is skipped too.

    Raises:
        UserError: There are checkpoints, and none of them can be read; or one is of another program.
    """
    # Alone, best.pth is what a run that was removed has left.
    names = (LATEST, STABLE, BEST) if holds_state(run_dir) else (STABLE,)
    paths = (*list_steps(run_dir)[::-1], *(run_dir / name for name in names))
    candidates = [path for path in paths if path.exists()]
    newest = None
    for path in candidates:
        if newest and path.name != STABLE:
            continue
        try:
            found = path, read_checkpoint(path, mmap=True)
        except UserError as error:
            if isinstance(error, UnreadableFile):
                if path.name in names:
                    raise  # the next state would take its name
                on_unreadable(path)
            log.warning("%s", error)
            continue
        check_form(found[1], path)
        if fits(found[1]):
            if newest:
                log.warning(
                    "going back to step %d: the states after it had another learning rate, and the next one replaces "
                    "them",
                    found[1]["step"],
                )
            return found
        newest = newest or found
    if candidates and newest is None:
        raise UserError(
            f"all states in {run_dir} are damaged: rename that folder, which keeps its best_*.pth and milestone_*.pth, "
            "then start again."
        )
    return newest


def go_back(run_dir: Path, name: str) -> None:
    """Make a state that has another name, such as `best.pth`, the newest one: the states after it are deleted.

    Raises:
        UserError: It is missing or damaged.
    """
    path = run_dir / name
    target = run_dir / step_file(read_state(path)["step"])
    for alias in (target, run_dir / LATEST):
        link_checkpoint(path, alias)
    for later in list_steps(run_dir)[list_steps(run_dir).index(target) + 1 :]:
        if _is_refused(later):
            # Under its own name it would be the newest state once the disk reads it again.
            later.rename(later.with_name(later.name + UNREADABLE))
            log.warning("%s could not be read, and is kept as %s%s", later, later.name, UNREADABLE)
        else:
            delete(later)


def _is_refused(path: Path) -> bool:
    try:
        read_checkpoint(path, mmap=True)
    except UnreadableFile:
        return True
    except UserError:
        pass
    return False


class Checkpoints:
    """The checkpoints of one run directory. A context manager: its exit waits for the last write.

    A state is good once a later gradient was finite: only then is it known that the run can go on from there. The
    newest good one is kept however many come after it.

    Args:
        keep: Number of states to keep.
        on_written: Called with path, kind ("best", "milestone" or "state") and step once a file is whole, before a
            later one may replace or delete it.
        stop: Whether training, which waits for a write that the disk refuses, should stop.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        on_written: Callable[[Path, str, int], None] = lambda path, kind, step: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run_dir, self.keep, self._on_written, self._stop = run_dir, keep, on_written, stop
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._closing = threading.Event()
        self._refused_since: float | None = None
        """When the disk refused the first of the writes that it has refused since."""
        self._good: int | None = None
        """Step of the newest good state. None: the oldest one is kept in its place."""
        self._unjudged: list[int] = []
        """Steps of the states after it."""
        self._unreadable: set[Path] = set()
        self._buffer = HostBuffer()
        self._buffered: Future[None] | None = None
        """The write of the snapshot in the buffer."""
        self._has_warned = False
        delete_unfinished(run_dir)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing.set()
        self._writer.shutdown(wait=True)
        self._buffer.close()
        if kind is None:
            self._wait()

    def find(
        self, fits: Callable[[Mapping[str, Any]], bool] = lambda state: True
    ) -> tuple[Path, dict[str, Any]] | None:
        """Returns the checkpoint to continue from.

        As `find_state`. A state that was written without its alias gets it.
        """
        found = find_state(self.run_dir, fits, self._unreadable.add)
        if found and found[0].name.startswith("step_"):
            link_checkpoint(found[0], self.run_dir / LATEST)
            self._good, self._unjudged = found[1].get("known_good"), [step_of(found[0])]
        return found

    def confirm(self, step: int) -> None:
        """Count the states before `step` as good: the gradient of the update before it was finite."""
        self._good = max((saved for saved in self._unjudged if saved < step), default=self._good)
        self._unjudged = [saved for saved in self._unjudged if saved >= step]

    def return_to_good(self) -> None:
        """Delete the states after the newest good one: the run has diverged, and would again from there. If the disk
        or a damaged file prevents it, all states stay, with a warning."""
        self._closing.set()
        self._writer.shutdown(wait=True)
        good = self._good_state()
        if good is not None and good != list_steps(self.run_dir)[-1]:
            log.warning("going back to %s: the states after it led to the divergence", good)
            try:
                go_back(self.run_dir, good.name)
            except (UserError, OSError) as error:
                log.warning("%s", error)

    def save(self, state: dict[str, Any], *, also: Sequence[str] = (), is_last: bool = False) -> None:
        """Write the state as the newest checkpoint, in the background if memory can hold a snapshot.

        Args:
            also: Further names under which it is kept: STABLE, and BEST if the disk has room for it.
            is_last: The run is finished, and its validation loss was finite: as no gradient follows, this one is good.

        Raises:
            UserError: The disk refused all writes for `GIVE_UP_S`.
        """

        def write(kept: dict[str, Any]) -> None:
            self._write_step(kept, (*also, LATEST))

        if is_last:
            self._good = state["step"]
        marked = {**state, "known_good": self._good}
        if not self._submit_buffered(marked, write):
            self._submit(marked, write)
        self._unjudged.append(state["step"])

    def save_weights(self, state: dict[str, Any], names: Sequence[str]) -> None:
        """Write weights and metrics under each of `names` (`best_*.pth`, `milestone_*.pth`)."""

        def write(kept: dict[str, Any]) -> None:
            first, *others = (self.run_dir / name for name in names)
            write_checkpoint(kept, first)
            for other in others:
                link_checkpoint(first, other)
            for path in (first, *others):
                self._on_written(path, path.name.partition("_")[0], kept["step"])

        self._submit(state, write)

    def check(self) -> None:
        """Raise the error of a write that was given up. Never waits."""
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in done]
        for future in done:
            future.result()

    def _submit(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        self.check()
        size = num_bytes(state)
        if size > psutil.virtual_memory().available / 2:
            self._wait()
        if size > psutil.virtual_memory().available / 2:
            log.info("training waits while %s are written: no memory for a snapshot", format_bytes(size))
            self._write(state, write, self._stop)
        else:
            self._pending.append(self._writer.submit(self._write, snapshot(state), write))

    def _submit_buffered(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> bool:
        """Write a GPU's state from the kept buffer, if it is free and the host has the memory to keep it."""
        self.check()
        size = self._buffer.count(tensors_in(state))
        is_free = self._buffered is None or self._buffered.done()
        if not size or not is_free or size - self._buffer.size > psutil.virtual_memory().available * KEPT_SHARE:
            return False
        self._buffer.begin(size)
        kept = snapshot(state, self._buffer)
        self._buffer.wait()
        self._buffered = self._writer.submit(self._write, kept, write)
        self._pending.append(self._buffered)
        return True

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        while wait(pending, POLL_S).not_done:
            if self._refused_since is not None and self._stop():
                self._closing.set()
        for future in pending:
            future.result()

    def _write(
        self,
        state: dict[str, Any],
        write: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write, and try again while the disk refuses: its shortage may be over soon. A stop ends that."""
        delay = RETRY_S
        while True:
            try:
                write(state)
            except (UserError, OSError) as refused:
                error = refused
                if isinstance(refused, OSError):  # of deleting an old state, or of looking for one
                    error = UserError(
                        f"the disk of {self.run_dir} refuses its work ({first_line(refused)}): check it and start "
                        "again, the run continues from its last checkpoint."
                    )
                now = time.monotonic()
                if self._refused_since is None:
                    self._refused_since = now
                    log.warning("%s It is tried again for %.0f minutes; only then the run ends.", error, GIVE_UP_S / 60)
                limit = self._refused_since + GIVE_UP_S
                end = min(now + delay, limit)
                while not (self._closing.is_set() or stop()) and time.monotonic() < end:
                    self._closing.wait(min(delay, POLL_S))
                if time.monotonic() < end or now >= limit:
                    raise error from None
                delay = min(2 * delay, MAX_RETRY_S)
            else:
                if self._refused_since is not None:
                    log.info("the checkpoint of step %s is written now", state["step"])
                self._refused_since = None
                return

    def _write_step(self, state: dict[str, Any], aliases: Sequence[str]) -> None:
        path = self.run_dir / step_file(state["step"])
        write_checkpoint(state, path)
        for name in aliases:
            if name != BEST or self._has_room(path):
                link_checkpoint(path, self.run_dir / name)
        self._on_written(path, "state", state["step"])
        steps = list_steps(self.run_dir)
        # Later states are damaged, or of a decay or a divergence that this run has left.
        later = steps[steps.index(path) + 1 :]
        kept = {self._good_state(), *self._unreadable}
        for old in [*later, *steps[: steps.index(path) + 1][: -self.keep]]:
            if old not in kept:
                delete(old)

    def _good_state(self) -> Path | None:
        """The newest good state. Before one is known, the oldest: it is the likeliest."""
        good = None if self._good is None else self.run_dir / step_file(self._good)
        return good if good and good.exists() else next(iter(list_steps(self.run_dir)), None)

    def _has_room(self, path: Path) -> bool:
        """Whether `best.pth` can be kept once `path` is no longer one of the newest states. Warns once if not."""
        if (self.run_dir / BEST).exists():
            return True  # it takes the place of the file before it
        # At its peak the run has one more state than it keeps, while it writes, and this one. It keeps a good one too.
        size, more = path.stat().st_size, max(self.keep, 2) + 2 - len(list_steps(self.run_dir))
        free = shutil.disk_usage(self.run_dir).free
        if free < more * size and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s is not kept: it needs room for %d more checkpoints of %s, and %s are free in %s; free some space",
                BEST,
                more,
                format_bytes(size),
                format_bytes(free),
                self.run_dir,
            )
        return free >= more * size
