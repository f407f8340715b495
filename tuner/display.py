"""A study's progress for a person: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from trainer.clock import clock, format_hours
from tuner.trials import (
    BASELINE,
    D_RISING,
    ENDED,
    FULL_HOURS,
    INFEASIBLE,
    is_interrupted,
    last_value,
    not_beaten,
    ranking,
    state_of,
    stored_values,
)

if TYPE_CHECKING:
    from tuner.spec import StudySpec

FURNITURE = 14
"""Lines of a live display besides its trials: borders, remarks, cells that take two lines, the progress."""


def format_params(params: Mapping[str, Any]) -> str:
    """`batch_size=8 d_coef=0.412`."""
    return " ".join(f"{name.rpartition('.')[2]}={format_value(value)}" for name, value in params.items())


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trial_table(study: optuna.Study, title: str | None = None, last: int = 1000) -> Table:
    """The `last` trials of a study, the baseline and the best one marked in words.

    The projected hours of the full run stand in a column of their own where they are known; only the states break
    into two lines where 80 columns are too few.
    """
    trials = study.get_trials(deepcopy=False)
    ranked = ranking(study, trials)
    best, front = ranked[0].number if ranked else None, not_beaten(study, trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    timed = any(FULL_HOURS in trial.user_attrs for trial in trials)
    # Without lines between the columns, all of them go into 80.
    table = Table(
        title=title or f"study {study.study_name}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.caption = "\n".join(remarks(study, trials)) or None
    for heading in (
        "trial",
        *(name.rpartition(".")[2] for name in names),
        "samples",
        "loss",
        *(["full run"] if timed else []),
        "state",
        "time",
    ):
        if heading == "state":
            table.add_column(heading, min_width=len("interrupted"))
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials[-last:]:
        value, values = last_value(trial), trial.intermediate_values
        table.add_row(
            str(trial.number),
            *(format_value(trial.params[name]) if name in trial.params else "" for name in names),
            f"{max(values):,}" if values else "",
            "" if value is None else f"{value:.4f}",
            *([_full_hours(trial, trial.number in front)] if timed else []),
            ", ".join(_notes(trial, best)),
            _duration(trial),
            style="bold" if trial.number == best else None,
        )
    return table


def remarks(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[str]:
    """What is to be said of a study's trials beneath their table, a sentence each."""
    said = []
    if not_beaten(study, trials):
        said.append("* no other trial is better in both loss and the full run's hours")
    rising = [trial for trial in trials if is_rising(trial)]
    if rising:
        numbers = ", ".join(f"{t.number} (d_coef {format_value(_d_coef(study, t))})" for t in rising)
        said.append(f"d still rising at the end of trial {numbers}: the short run is too short for this d_coef")
    return said


def is_rising(trial: FrozenTrial) -> bool:
    """Whether Prodigy's d still rose when a trial had come to its end."""
    return trial.state == TrialState.COMPLETE and bool(trial.user_attrs.get(D_RISING))


def _d_coef(study: optuna.Study, trial: FrozenTrial) -> Any:
    as_given = stored_values(study)["train"].get("d_coef", 1.0)
    return trial.params.get("train.d_coef", as_given)


def _notes(trial: FrozenTrial, best: int | None) -> list[str]:
    notes = ["interrupted" if is_interrupted(trial) else state_of(trial)]
    notes += ["baseline"] if trial.user_attrs.get(BASELINE) else []
    notes += ["best"] if trial.number == best else []
    return notes + (["d rising"] if is_rising(trial) else [])


def _full_hours(trial: FrozenTrial, on_front: bool) -> str:
    hours = trial.user_attrs.get(FULL_HOURS)
    return "" if hours is None else f"{format_hours(hours)} {'*' if on_front else ' '}"


def _duration(trial: FrozenTrial) -> str:
    if trial.datetime_start is None or trial.datetime_complete is None:
        return ""
    return clock((trial.datetime_complete - trial.datetime_start).total_seconds())


class StudyDisplay:
    """Follows a launch. A context manager; a `Display` for `launch` and a `Tracker` for its trials."""

    def __init__(self, study: optuna.Study, spec: StudySpec, *, total: int, console: Console) -> None:
        self.study, self.spec, self.total, self.console = study, spec, total, console
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._started = time.monotonic()
        self._done_before = self._num_done()
        self._trial: optuna.Trial | None = None
        self._samples = 0
        self._line = ""

    def __enter__(self) -> StudyDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.update(self._render())
            self._live.stop()
        ended = self.study.user_attrs.get(ENDED)
        if ended and kind is None:
            self.console.print(f"ended: {ended}", markup=False, highlight=False, soft_wrap=True)

    def trial_started(self, trial: optuna.Trial, resumed: bool) -> StudyDisplay:
        self._trial, self._samples, self._line = trial, 0, "continuing" if resumed else "starting"
        baseline = " (baseline)" if trial.user_attrs.get(BASELINE) else ""
        self._say(f"trial {trial.number}{baseline} {'continues from its checkpoint' if resumed else 'starts'}")
        self._refresh()
        return self

    def trial_ended(self, trial: FrozenTrial) -> None:
        self._trial = None
        value = last_value(trial)
        text = f"trial {trial.number} {state_of(trial)}: {format_params(trial.params)}"
        text += "" if value is None else f", {self.spec.study.metric} {value:.4f}"
        text += f", {_duration(trial)}"
        text += f" ({trial.user_attrs[INFEASIBLE]})" if INFEASIBLE in trial.user_attrs else ""
        self._say(f"{text} [{self._num_done()}/{self.total} trials{self._remaining()}]")
        self._refresh()

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self._samples = samples
        if "val/loss" in values and self._trial is not None:
            losses = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
            self._line = f"after {samples:,} samples: {losses}"
            self._say(f"  trial {self._trial.number} ({format_params(self._trial.params)}) {self._line}")
        elif "train/loss" in values:
            rate = values["train/samples_per_second"]
            self._line = f"step {step}, loss {values['train/loss']:.4f}, {rate:.1f} samples/s"
        self._refresh()

    def close(self) -> None:
        """A trial's training is over; the display goes on."""

    def _say(self, text: str) -> None:
        """One plain line, where there is no live table."""
        if not self._live:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._render())

    def _render(self) -> Group:
        # What does not fit on the screen would push the progress out of sight.
        parts: list[Any] = [trial_table(self.study, last=max(1, self.console.height - FURNITURE))]
        if self._trial is not None:
            parts.append(f"trial {self._trial.number}: {format_params(self._trial.params)} | {self._line}")
        done = self._num_done() + self._share_of_trial()
        parts.append(ProgressBar(total=self.total, completed=done, width=60))
        parts.append(f" {self._num_done()} of {self.total} trials{self._remaining()}")
        return Group(*parts)

    def _share_of_trial(self) -> float:
        if self._trial is None or not self._trial.params:
            return 0.0
        # Here, for it imports torch, and others show a study without.
        from tuner.search_space import trial_setup

        config = trial_setup(self.spec, self._trial.params).config
        if config.num_steps is None:
            return 0.0
        return min(1.0, self._samples / (config.num_steps * config.effective_batch_size))

    def _num_done(self) -> int:
        states: Sequence[str] = [state_of(trial) for trial in self.study.get_trials(deepcopy=False)]
        return sum(state in ("complete", "pruned", "infeasible") for state in states)

    def _remaining(self) -> str:
        done = self._num_done() - self._done_before + self._share_of_trial()
        left = self.total - self._num_done() - self._share_of_trial()
        if done <= 0 or left <= 0:
            return ""
        return f", about {clock((time.monotonic() - self._started) / done * left)} left"


class RunDisplay:
    """Follows one run: a line that is renewed on a terminal, plain lines at each validation elsewhere."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self._status = console.status(f"{name} starts") if console.is_terminal else None

    def __enter__(self) -> RunDisplay:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
        text = f"{self.name}: step {step:,}, {samples:,} samples, {losses}"
        if self._status:
            self._status.update(text)
        if "val/loss" in values:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing to write at the end."""
