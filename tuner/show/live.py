"""A launch for a person: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.text import Text

from trainer.clock import clock
from tuner.show.palette import GREEN, SKY_BLUE
from tuner.show.renewed import Renewed
from tuner.show.table import duration, format_params, trial_table
from tuner.trials import BASELINE, ENDED, INFEASIBLE, last_value, state_of

if TYPE_CHECKING:
    from tuner.spec import StudySpec

FURNITURE = 13
"""Lines of a live display besides its trials: borders, remarks, cells that take two lines, the progress."""


class RunningTrial:
    """A `Tracker` for one of the trials that run, and what it was last told."""

    def __init__(self, display: StudyDisplay, number: int, resumed: bool) -> None:
        self.number = number
        self.samples = 0
        self.share = 0.0
        """Of its short run."""
        self.first_share: float | None = None if resumed else 0.0
        """Where it stood when this launch took it up; None: not known yet."""
        self.line = "continuing" if resumed else "starting"
        self._display = display

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.samples = samples
        if "val/loss" in values:
            losses = (
                f"{name} {v:.4f}" for name, v in values.items() if name.startswith("val/") and name.endswith("loss")
            )
            self.line = f"after {samples:,} samples: {', '.join(losses)}"
            self._display.say_of(self.number, self.line)
        elif "train/loss" in values:
            rate = values["train/samples_per_second"]
            self.line = f"step {step:,}, loss {values['train/loss']:.4f}, {rate:.1f} samples/s"
            self.share = share_done(values, samples)
            self.first_share = self.share if self.first_share is None else self.first_share

    def close(self) -> None:
        """A trial's training is over; the display goes on."""


def share_done(values: Mapping[str, float], samples: int) -> float:
    """The share of a run that is done, by what a log interval says of its rate and rest."""
    if "train/seconds_left" not in values:
        return 0.0
    return samples / max(1.0, samples + values["train/samples_per_second"] * values["train/seconds_left"])


class StudyDisplay:
    """Follows a launch, of one trial after the other or of several at once. A context manager; a `Display`.

    Args:
        total: The study's number of trials.
        plain: Plain lines on a terminal too.
    """

    def __init__(
        self, study: optuna.Study, spec: StudySpec, *, total: int, console: Console, plain: bool = False
    ) -> None:
        self.study, self.spec, self.total, self.console = study, spec, total, console
        self._running: dict[int, RunningTrial] = {}
        self._started = time.monotonic()
        self._done_before = float(self._num_done())
        self._live = Renewed(self._render, console) if console.is_terminal and not plain else None

    def __enter__(self) -> StudyDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        ended = self.study.user_attrs.get(ENDED)
        if ended and kind is None:
            self.console.print(f"ended: {ended}", markup=False, highlight=False, soft_wrap=True)

    def trial_started(self, trial: optuna.Trial, resumed: bool) -> RunningTrial:
        running = self._running[trial.number] = RunningTrial(self, trial.number, resumed)
        baseline = " (baseline)" if trial.user_attrs.get(BASELINE) else ""
        self._say(f"trial {trial.number}{baseline} {'continues from its checkpoint' if resumed else 'starts'}")
        return running

    def trial_ended(self, trial: FrozenTrial) -> None:
        ended = self._running.pop(trial.number, None)
        if ended is not None and ended.first_share:
            # What an earlier launch did of it took no time of this one.
            self._done_before += ended.first_share
        value = last_value(trial)
        text = f"trial {trial.number} {state_of(trial)}: {format_params(trial.params)}"
        text += "" if value is None else f", {self.spec.study.metric} {value:.4f}"
        text += f", {duration(trial)}"
        text += f" ({trial.user_attrs[INFEASIBLE]})" if INFEASIBLE in trial.user_attrs else ""
        self._say(f"{text} [{self._num_done()}/{self.total} trials{self._remaining()}]")

    def say_of(self, number: int, text: str) -> None:
        """One plain line of a running trial, where there is no live table."""
        if not self._live:
            self._say(f"  trial {number} ({format_params(self._params(number))}) {text}")

    def _say(self, text: str) -> None:
        if not self._live:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _params(self, number: int) -> dict[str, Any]:
        # From the storage: a worker in another process may have chosen them.
        return self.study.get_trials(deepcopy=False)[number].params

    def _render(self) -> Group:
        running = list(self._running.values())
        # What does not fit on the screen would push the progress out of sight.
        last = max(1, self.console.height - FURNITURE - len(running))
        parts: list[Any] = [
            trial_table(self.study, last=last, samples={trial.number: trial.samples for trial in running})
        ]
        parts += [Text(f"trial {trial.number}: {trial.line}", style=SKY_BLUE) for trial in running]
        done = self._num_done() + sum(trial.share for trial in running)
        parts.append(Text(f"{self._num_done()} of {self.total} trials{self._samples()}{self._remaining()}"))
        parts.append(ProgressBar(total=self.total, completed=done, width=60, complete_style=GREEN))
        return Group(*parts)

    def _samples(self) -> str:
        """Seen by all trials of the study so far, where they are measured in samples."""
        budget = self.spec.trial.samples
        if budget is None:
            return ""
        seen = {t.number: max(t.intermediate_values, default=0) for t in self.study.get_trials(deepcopy=False)}
        for trial in list(self._running.values()):
            seen[trial.number] = max(seen.get(trial.number, 0), trial.samples)
        return f", {sum(seen.values()):,} of {self.total * budget:,} samples"

    def _num_done(self) -> int:
        states = [state_of(trial) for trial in self.study.get_trials(deepcopy=False)]
        return sum(state in ("complete", "pruned", "infeasible") for state in states)

    def _remaining(self, now: float | None = None) -> str:
        """By the pace of this launch: pruned trials are as cheap from here on as they were."""
        running = list(self._running.values())
        shares = sum(trial.share for trial in running)
        done = self._num_done() + shares - self._done_before - sum(trial.first_share or 0.0 for trial in running)
        left = self.total - self._num_done() - shares
        if done <= 0 or left <= 0:
            return ""
        elapsed = (time.monotonic() if now is None else now) - self._started
        return f", about {clock(elapsed / done * left)} left"
