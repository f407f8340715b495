"""A study's trials as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from trainer.clock import clock, format_hours
from tuner.show.palette import STATE_STYLES
from tuner.trials import (
    BASELINE,
    D_RISING,
    full_hours,
    is_interrupted,
    last_value,
    not_beaten,
    ranking,
    state_of,
    stored_values,
)


def format_params(params: Mapping[str, Any]) -> str:
    """`batch_size=8 d_coef=0.412`."""
    return " ".join(f"{name.rpartition('.')[2]}={format_value(value)}" for name, value in params.items())


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trial_table(
    study: optuna.Study, title: str | None = None, last: int = 1000, samples: Mapping[int, int] | None = None
) -> Table:
    """The `last` trials of a study, the baseline and the best one marked in words.

    Args:
        samples: What running trials have seen since their last validation, by trial number.

    The projected hours of the full run stand in a column of their own where they are known; only the states break
    into two lines where 80 columns are too few.
    """
    trials = study.get_trials(deepcopy=False)
    ranked = ranking(study, trials)
    best, front = ranked[0].number if ranked else None, not_beaten(study, trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    full = stored_values(study)["full"]
    timed = any(full_hours(trial, full) for trial in trials)
    unit = budget_unit(study)
    live = samples if samples and unit == "samples" else {}
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
        unit,
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
        value, seen = last_value(trial), max(live.get(trial.number, 0), *trial.intermediate_values, 0)
        notes = _notes(trial, best)
        table.add_row(
            str(trial.number),
            *(format_value(trial.params[name]) if name in trial.params else "" for name in names),
            f"{seen:,}" if seen else "",
            "" if value is None else f"{value:.4f}",
            *([_hours(full_hours(trial, full), trial.number in front)] if timed else []),
            Text(", ".join(notes), style=STATE_STYLES[notes[0]]),
            duration(trial),
            style="bold" if trial.number == best else None,
        )
    return table


def budget_unit(study: optuna.Study) -> str:
    """samples, steps or seconds: what a study's trials are measured in."""
    budget = stored_values(study)["trial"]
    return next((unit for unit in ("steps", "seconds") if budget.get(unit)), "samples")


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


def _hours(hours: float | None, on_front: bool) -> str:
    return "" if hours is None else f"{format_hours(hours)} {'*' if on_front else ' '}"


def duration(trial: FrozenTrial) -> str:
    """How long a trial took, or has been running."""
    if trial.datetime_start is None or is_interrupted(trial):
        return ""
    return clock(((trial.datetime_complete or datetime.now()) - trial.datetime_start).total_seconds())
