"""A launch for a person: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from trainer.clock import clock
from tuner.show.palette import GREEN, SKY_BLUE
from tuner.show.table import format_params, trial_duration, trial_table
from tuner.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from tuner.spec.study_toml import StudySpec

EVERY_S = 0.5
"""Seconds between two drawings. Each may read the study, which takes some milliseconds."""
OTHER_LINES = 13
"""Lines of a live display besides its trials: borders, remarks, cells of two lines, the progress."""


class Renewed:
    """A block on the terminal that a thread redraws, so that times advance while a trial compiles.

    Lines that are printed meanwhile appear above it.
    """

    def __init__(self, render: Callable[[], RenderableType], console: Console, *, every: float = EVERY_S) -> None:
        self._render, self._every = render, every
        # Not rich's own thread: it would call `render`, which reads the storage, while it holds the console.
        self._live = Live(console=console, auto_refresh=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._redraw, name="display", daemon=True)

    def start(self) -> None:
        self._live.start()
        self._thread.start()

    def stop(self) -> None:
        """Draw a last time, and leave the block on the terminal."""
        self._closed.set()
        self._thread.join()
        self._draw()
        self._live.stop()

    def _redraw(self) -> None:
        while not self._closed.is_set():
            self._draw()
            self._closed.wait(self._every)

    def _draw(self) -> None:
        try:
            self._live.update(self._render(), refresh=True)
        except optuna.exceptions.StorageInternalError:
            # Another process holds the database: keep the block as it is until the next drawing.
            return


class RunningTrial:
    """A `Tracker` of one running trial, and the last values that it received."""

    def __init__(self, display: StudyDisplay, number: int, resumed: bool) -> None:
        self.number = number
        self.samples = 0
        self.share = 0.0
        """Part of its short run that is done."""
        self.first_share: float | None = None if resumed else 0.0
        """Part that was done when this launch continued it; None: not known yet."""
        self.line = "continuing" if resumed else "starting"
        self._display = display

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.samples = samples
        if "val/loss" in values:
            losses = {name: v for name, v in values.items() if name.startswith("val/") and name.endswith("loss")}
            text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
            self.line = f"after {samples:,} samples: {text}"
            self._display.print_of_trial(self.number, self.line)
        elif "train/loss" in values:
            rate = values["train/samples_per_second"]
            self.line = f"step {step:,}, loss {values['train/loss']:.4f}, {rate:.1f} samples/s"
            self.share = share_done(values, samples)
            self.first_share = self.share if self.first_share is None else self.first_share

    def close(self) -> None:
        """Do nothing: `StudyDisplay.trial_ended` removes the trial."""


def share_done(values: Mapping[str, float], samples: int) -> float:
    """The part of a run that is done, by the speed and the time left of a log interval."""
    if "train/seconds_left" not in values:
        return 0.0
    return samples / max(1.0, samples + values["train/samples_per_second"] * values["train/seconds_left"])


class StudyDisplay:
    """Shows a launch, of one trial after the other or of several at once. A context manager; a `Display`.

    Args:
        total: The study's number of trials.
        plain: Print plain lines on a terminal too.
    """

    def __init__(
        self, study: optuna.Study, spec: StudySpec, *, total: int, console: Console, plain: bool = False
    ) -> None:
        self.study, self.spec, self.total, self.console = study, spec, total, console
        self._running: dict[int, RunningTrial] = {}
        self._started = time.monotonic()
        self._done_before = float(_num_done(StudyRecord.read(study)))
        self._live = Renewed(self._render, console) if console.is_terminal and not plain else None

    def __enter__(self) -> StudyDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        ended = StudyRecord.read(self.study).ended
        if ended and kind is None:
            self.console.print(f"ended: {ended}", markup=False, highlight=False, soft_wrap=True)

    def trial_started(self, trial: TrialRecord, resumed: bool) -> RunningTrial:
        running = self._running[trial.number] = RunningTrial(self, trial.number, resumed)
        baseline = " (baseline)" if trial.is_baseline else ""
        self._print(f"trial {trial.number}{baseline} {'continues from its checkpoint' if resumed else 'starts'}")
        return running

    def trial_ended(self, trial: TrialRecord) -> None:
        ended, record = self._running.pop(trial.number, None), StudyRecord.read(self.study)
        if ended is not None and ended.first_share:
            # An earlier launch did this part, so it took no time of this one.
            self._done_before += ended.first_share
        text = f"trial {trial.number} {trial.state}: {format_params(trial.params)}"
        text += "" if trial.value is None else f", {record.metric} {trial.value:.4f}"
        text += f", {trial_duration(trial)}"
        text += "" if trial.infeasible is None else f" ({trial.infeasible})"
        self._print(f"{text} [{_num_done(record)}/{self.total} trials{self._time_left(record)}]")

    def print_of_trial(self, number: int, text: str) -> None:
        """Print a plain line of a running trial, unless there is a live table."""
        if not self._live:
            # The storage has the parameters: a worker in another process may have chosen them.
            params = StudyRecord.read(self.study).trials[number].params
            self._print(f"  trial {number} ({format_params(params)}) {text}")

    def _print(self, text: str) -> None:
        if not self._live:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        running, record = list(self._running.values()), StudyRecord.read(self.study)
        # More lines than the screen has would push the progress out of sight.
        last = max(1, self.console.height - OTHER_LINES - len(running))
        samples = {trial.number: trial.samples for trial in running}
        num_done = _num_done(record)
        parts: list[Any] = [trial_table(record, last=last, samples=samples)]
        parts += [Text(f"trial {trial.number}: {trial.line}", style=SKY_BLUE) for trial in running]
        progress = f"{num_done} of {self.total} trials{self._samples_done(record, samples)}{self._time_left(record)}"
        completed = num_done + sum(trial.share for trial in running)
        bar = ProgressBar(total=self.total, completed=completed, width=60, complete_style=GREEN)
        return Group(*parts, Text(progress), bar)

    def _samples_done(self, record: StudyRecord, running: Mapping[int, int]) -> str:
        """Samples of all trials of the study, if their budget is in samples."""
        budget = self.spec.trial.samples
        if budget is None:
            return ""
        seen = sum(max(running.get(trial.number, 0), *trial.curve, 0) for trial in record.trials)
        return f", {seen:,} of {self.total * budget:,} samples"

    def _time_left(self, record: StudyRecord, now: float | None = None) -> str:
        """The time left at the pace of this launch, as if as many of the trials to come were pruned."""
        running, num_done = list(self._running.values()), _num_done(record)
        shares = sum(trial.share for trial in running)
        done = num_done + shares - self._done_before - sum(trial.first_share or 0.0 for trial in running)
        left = self.total - num_done - shares
        if done <= 0 or left <= 0:
            return ""
        elapsed = (time.monotonic() if now is None else now) - self._started
        return f", about {clock(elapsed / done * left)} left"


def _num_done(record: StudyRecord) -> int:
    return sum(trial.state in ("complete", "pruned", "infeasible") for trial in record.trials)
