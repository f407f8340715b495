"""Runs the command of [hooks] on checkpoints of a full run, in a process of its own beside the training."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.clock import clock
from trainer.errors import first_line
from trainer.units import format_bytes
from tuner.spec.beside import PLACEHOLDER, HooksSection
from tuner.study.process import run_in_shell
from tuner.study.samples import Samples, read_samples, samples_dir

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Seconds that a command gets to end after SIGTERM."""
MAX_LOG_BYTES = 100_000_000
"""Of one command's log: a full disk ends the training."""
CHECKPOINT, LOG = "checkpoint.pth", "hook.log"
RUNNING, FAILED = ".running", ".failed"
"""Endings of the folders of commands that have not succeeded."""


@dataclass(frozen=True)
class _Job:
    step: int
    checkpoint: Path
    folder: Path
    """While it runs."""
    final: Path
    """The folder's name after success."""


@dataclass(frozen=True)
class Hook:
    """The command of [hooks], for one run."""

    section: HooksSection
    base_dir: Path
    """Working directory of the command."""
    values: Mapping[str, str]
    """`study` and `trial`."""

    def sample(self, run_dir: Path, checkpoint: Path, step: int, *, stop: Callable[[], bool]) -> Samples | None:
        """What the command leaves for a checkpoint: run now if its step lacks the metric; None if it failed."""
        final = samples_dir(run_dir, step)
        if final.exists():
            if self.section.metric in (found := read_samples(final)).metrics:
                return found
            # The command ended well, but without the metric; it may have been corrected since.
            _give_up(final)
        _tidy(final.parent)
        return self.run(_prepare(step, checkpoint, final), stop)

    def run(self, job: _Job, stop: Callable[[], bool]) -> Samples | None:
        """Run the command on a job, until `stop` at most; None if it failed, which is logged."""
        started = time.monotonic()
        with open(job.folder / LOG, "ab") as output:

            def fills_disk() -> bool:
                return os.fstat(output.fileno()).st_size > MAX_LOG_BYTES

            code = run_in_shell(
                self._command(job),
                timeout=self.section.timeout,
                grace=GRACE_S,
                cwd=self.base_dir,
                output=output,
                stop=lambda: fills_disk() or stop(),
            )
            is_full = fills_disk()
        if code != 0:
            failed = _give_up(job.folder)
            reason = f"exit code {code}"
            if code is None:
                reason = "the run stopped" if stop() else f"it took over {clock(self.section.timeout)}"
                reason = f"its log has over {format_bytes(MAX_LOG_BYTES)}" if is_full else reason
            log.warning("hook: step %s failed (%s): its log is %s", f"{job.step:,}", reason, failed / LOG)
            return None
        (job.folder / CHECKPOINT).unlink(missing_ok=True)
        done = job.folder.rename(job.final)
        samples = read_samples(done)
        figures = "".join(f", {name} {value:.4g}" for name, value in samples.metrics.items())
        seconds = clock(time.monotonic() - started)
        log.info("hook: step %s, %d files in %s%s (%s)", f"{job.step:,}", len(samples.files), done, figures, seconds)
        return samples

    def _command(self, job: _Job) -> str:
        values = {**self.values, "checkpoint": str(job.checkpoint), "step": str(job.step), "out": str(job.folder)}
        return PLACEHOLDER.sub(lambda found: shlex.quote(values[found[1]]), self.section.command)


class HookRunner:
    """A `FileTracker` that runs the command, one at a time; of those that wait, only the newest is run.

    The checkpoint is hard-linked into the command's folder, so that it stays as it is however fast newer ones come.

    Args:
        best: Name of the checkpoint whose new versions are the event "best".
        num_steps: Length of the run: its last state is the event "end".
        stop: Whether the run was asked to stop: then `close` ends the command.
        on_samples: Receives what each command leaves, in the runner's thread.
    """

    def __init__(
        self,
        hook: Hook,
        run_dir: Path,
        *,
        best: str | None,
        num_steps: int | None,
        stop: Callable[[], bool] = lambda: False,
        on_samples: Callable[[Samples], None] = lambda samples: None,
    ) -> None:
        self.hook, self.run_dir = hook, run_dir
        self.best, self.num_steps, self.on_samples = best, num_steps, on_samples
        self._stop = stop
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._closing = self._ending = False
        self._newest = -1
        """The step of the last job."""
        self._thread = threading.Thread(target=self._work, name="hooks", daemon=True)
        self._started = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        """Do nothing: a checkpoint starts a command."""

    def written(self, path: Path, kind: str, step: int) -> None:
        """Run the command on this checkpoint if [hooks] has its event, and if its step was not sampled yet."""
        event = kind
        if kind == "state":
            event = "end" if self.num_steps is not None and step >= self.num_steps else ""
        if event not in self.hook.section.on or (kind == "best" and path.name != self.best):
            return
        final = samples_dir(self.run_dir, step)
        if step == self._newest or final.exists():
            return
        self._newest = step
        try:
            if not self._started:
                _tidy(final.parent)
            job = _prepare(step, path, final)
        except OSError as error:
            log.warning("hook: step %s is left out (%s)", f"{step:,}", first_line(error))
            return
        with self._changed:
            replaced, self._waiting = self._waiting, job
            if not self._started:
                self._started = True
                self._thread.start()
            self._changed.notify()
        if replaced is not None:
            log.info("hook: step %s is left out, step %s is newer", f"{replaced.step:,}", f"{step:,}")
            _discard(replaced)

    def close(self) -> None:
        """Wait for the last command; end it if the run was stopped or failed."""
        if not self._started:
            return
        self._ending = sys.exception() is not None
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive() and not self._must_end():
            log.info("waiting for the hook, at most %s a command", clock(self.hook.section.timeout))
        try:
            self._thread.join()
        except BaseException:
            self._ending = True
            self._thread.join(2 * GRACE_S)
            raise

    def _must_end(self) -> bool:
        return self._ending or (self._closing and self._stop())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                job, self._waiting = self._waiting, None
            if job is None:
                return
            if self._must_end():
                _discard(job)
                continue
            # No failure here may end a run of days. With its traceback: it may be a defect.
            try:
                self._run(job)
            except Exception:
                log.warning("hook: step %s failed", f"{job.step:,}", exc_info=True)

    def _run(self, job: _Job) -> None:
        samples = self.hook.run(job, self._must_end)
        if samples is not None:
            self.on_samples(samples)


def _prepare(step: int, checkpoint: Path, final: Path) -> _Job:
    """Create the folder of a job, with a hard link to its checkpoint if the file system has hard links."""
    folder = final.with_name(f"{final.name}{RUNNING}")
    folder.mkdir(parents=True)
    link = folder / CHECKPOINT
    try:
        os.link(checkpoint, link)
    except OSError:
        return _Job(step, checkpoint, folder, final)
    return _Job(step, link, folder, final)


def _discard(job: _Job) -> None:
    """Remove a job that was not run."""
    (job.folder / CHECKPOINT).unlink(missing_ok=True)
    job.folder.rmdir()


def _give_up(folder: Path) -> Path:
    """Keep the folder of a command that failed under another name; returns its path."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    failed = folder.with_suffix(FAILED)
    number = 1
    while failed.exists():
        number += 1
        failed = folder.with_suffix(f"{FAILED}-{number}")
    return folder.rename(failed)


def _tidy(samples: Path) -> None:
    """Give up the commands of a process that was killed: each holds a checkpoint of gigabytes."""
    for folder in samples.glob(f"step_*{RUNNING}"):
        _give_up(folder)
