"""A study's trials, and a confirmation, as tables; and how all surfaces format parameters and name trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from trainer.clock import clock, format_hours
from tuner.show.palette import STATE_STYLES
from tuner.study.confirmation import Confirmation
from tuner.study.record import FullRunRecord, StudyRecord, TrialRecord

if TYPE_CHECKING:
    from tuner.promotion.evaluate import CheckpointMetrics

LAST = 100
"""Trials in a table: it would be slow to draw, and read by nobody, with thousands."""
FULL_LENGTH_HEADINGS = ("full samples", "epochs")
CONFIRMATION_HEADINGS = ("trial", "parameters", "mean", "min to max", "over the baseline", "remarks")


def format_params(params: Mapping[str, Any]) -> str:
    """`batch_size=8 d_coef=0.412`."""
    return " ".join(f"{short_name(name)}={format_value(value)}" for name, value in params.items())


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def short_name(name: str) -> str:
    """A parameter's name without its section."""
    return name.rpartition(".")[2]


def trial_marks(record: StudyRecord, trial: TrialRecord) -> list[str]:
    """`baseline`, `try` (an entry of [[search.try]]) and `best`, if the trial is one."""
    return ["baseline"] * record.is_baseline(trial) + ["try"] * bool(trial.tried) + ["best"] * record.is_best(trial)


def trial_duration(trial: TrialRecord) -> str:
    """How long a trial took, or has been running; empty if it waits or was interrupted."""
    if trial.started is None or trial.is_interrupted:
        return ""
    return clock(((trial.completed or datetime.now()) - trial.started).total_seconds())


def build_table(title: str) -> Table:
    """An empty table without lines between its columns, so that all of them fit into 80 characters."""
    return Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )


def list_shown(record: StudyRecord, trials: Sequence[TrialRecord], last: int) -> Sequence[TrialRecord]:
    """At most `last` of `trials`: the latest, and if all have room the baseline, the best and the recommended one."""
    named = {trial.number for trial in (record.baseline, record.best, record.recommended) if trial is not None}
    if len(trials) <= last or last <= len(named):
        return trials[-last:]
    others = [trial.number for trial in trials if trial.number not in named]
    shown = {*named, *others[-(last - len(named)) :]}
    return [trial for trial in trials if trial.number in shown]


def trial_table(
    record: StudyRecord,
    title: str | None = None,
    last: int = LAST,
    samples: Mapping[int, int] | None = None,
    *,
    full_length: bool = False,
) -> Table:
    """The trials of a study that `list_shown` gives.

    The projected hours of the full run have a column if any are known. Only the states break into two lines where 80
    columns are too few.

    Args:
        samples: Samples that running trials have seen since their last validation, by trial number.
        full_length: Show the samples and epochs of each trial's full run.
    """
    names = list(dict.fromkeys(name for trial in record.trials for name in trial.params))
    hours = {trial.number: record.full_hours(trial) for trial in record.trials}
    is_timed = any(hours.values())
    live = samples if samples and record.unit == "samples" else {}
    table = build_table(title or f"study {record.name}")
    trials = list_shown(record, record.trials, last)
    table.caption = "\n".join(_remarks(record, trials)) or None
    full_run = ["full run"] * is_timed + list(FULL_LENGTH_HEADINGS) * full_length
    for heading in ("trial", *map(short_name, names), record.unit, name_value(record), *full_run, "state", "time"):
        if heading == "state":
            table.add_column(heading, min_width=len("interrupted"))
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials:
        seen = max(live.get(trial.number, 0), *trial.curve, 0)
        state = "interrupted" if trial.is_interrupted else trial.state
        words = [state, *trial_marks(record, trial)] + ["d rising"] * trial.ended_with_d_rising
        table.add_row(
            str(trial.number),
            *(format_value(trial.params[name]) if name in trial.params else "" for name in names),
            f"{seen:,}" if seen else "",
            "" if trial.value is None else f"{trial.value:.4f}",
            *([_format_full_hours(hours[trial.number], trial.number in record.pareto_front)] if is_timed else []),
            *(format_full_length(record, trial) if full_length else ()),
            Text(", ".join(words), style=STATE_STYLES[state]),
            trial_duration(trial),
            style="bold" if record.is_best(trial) else None,
        )
    return table


def name_value(record: StudyRecord) -> str:
    """The heading of the trials' values: "loss" for the metric val/loss."""
    return record.metric.removeprefix("val/")


def _remarks(record: StudyRecord, shown: Sequence[TrialRecord]) -> list[str]:
    """Sentences below the table of trials."""
    remarks = []
    if record.pareto_front:
        remarks.append(f"* no other trial is better in both {name_value(record)} and the full run's hours")
    if rising := [trial for trial in shown if trial.ended_with_d_rising]:
        default = record.spec["train"].get("d_coef", 1.0)
        numbers = (f"{t.number} (d_coef {format_value(t.params.get('train.d_coef', default))})" for t in rising)
        remarks.append(
            f"d still rising at the end of trial {', '.join(numbers)}: the short run is too short for this d_coef"
        )
    return remarks


def _format_full_hours(hours: float | None, on_front: bool) -> str:
    return "" if hours is None else f"{format_hours(hours)} {'*' if on_front else ' '}"


def format_full_length(record: StudyRecord, trial: TrialRecord) -> tuple[str, str]:
    """Samples and epochs of a trial's full run, below `FULL_LENGTH_HEADINGS`; empty if not known."""
    samples, epochs = record.full_samples(trial), record.full_epochs(trial)
    return "" if samples is None else f"{samples:,}", "" if epochs is None else f"{epochs:.2f}"


def confirmation_rows(confirmation: Confirmation) -> list[tuple[str, ...]]:
    """A row of `CONFIRMATION_HEADINGS` for each trial, the best mean first."""
    rows: list[tuple[str, ...]] = []
    for trial in confirmation.trials:
        is_baseline, margin = trial.number == confirmation.baseline, confirmation.margin(trial)
        remarks = ["winner"] * (trial is confirmation.winner) + ["baseline"] * is_baseline
        remarks += [trial.failed] if trial.failed else []
        lowest, highest = min(trial.values.values(), default=0.0), max(trial.values.values(), default=0.0)
        row = (
            str(trial.number),
            format_params(trial.params),
            "" if trial.failed else f"{trial.mean:.4f}",
            "" if trial.failed else f"{lowest:.4f} to {highest:.4f}",
            "" if margin is None or is_baseline else f"{margin:+.4f}",
            ", ".join(remarks),
        )
        rows.append(row)
    return rows


def confirmation_table(confirmation: Confirmation) -> Table:
    """The confirmed trials: mean and range over the seeds, and the margin over the baseline."""
    table = build_table(f"confirmation by {confirmation.metric} over {confirmation.rung:,} {confirmation.unit}")
    for heading in CONFIRMATION_HEADINGS:
        table.add_column(heading, justify="left" if heading in ("parameters", "remarks") else "right")
    for trial, row in zip(confirmation.trials, confirmation_rows(confirmation), strict=True):
        table.add_row(*row, style="bold" if trial is confirmation.winner else None)
    return table


def checkpoints_table(found: Sequence[CheckpointMetrics]) -> Table:
    """Checkpoints in their order, with their ranks by each loss: of other metrics the better end is not known."""
    table = build_table(f"{len(found)} checkpoints, {found[0].samples:,} samples" if found else "no checkpoints")
    table.add_column("checkpoint")
    table.add_column("step", justify="right")
    metrics = list(dict.fromkeys(name for one in found for name in one.metrics))
    losses = [name for name in metrics if name.endswith("loss")]
    ordered = {name: sorted(one.metrics[name] for one in found if name in one.metrics) for name in losses}
    for name in metrics:
        table.add_column(name.removeprefix("val/"), justify="right", no_wrap=True)
    for one in found:
        ranks = {name: f" ({ordered[name].index(one.metrics[name]) + 1})" for name in losses if name in one.metrics}
        cells = [f"{one.metrics[name]:.4f}{ranks.get(name, '')}" if name in one.metrics else "" for name in metrics]
        table.add_row(", ".join(one.names), "" if one.step is None else f"{one.step:,}", *cells)
    return table


def describe_state(run: FullRunRecord) -> str:
    """A full run's state, its last decline, and where its rate falls: "running, rate falls from step 192,001"."""
    words: list[str] = [run.state]
    if run.decline is not None:
        words.append(f"declined at step {run.decline['step']:,}")
        words += [run.decline["outcome"]] if run.decline["outcome"] else []
    if run.decay_start is not None and run.state != "finished":
        verb = "falls" if run.phase == "constant" else "has been falling"
        words.append(f"rate {verb} from step {run.decay_start:,}")
    return ", ".join(words)
