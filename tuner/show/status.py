"""`tuner status`: a study as JSON and as tables, once or renewed. Imports no torch, so that it is quick."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import optuna
from optuna.storages import BaseStorage
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from trainer.errors import UserError
from tuner.show.json_events import to_json
from tuner.show.sparklines import curves_table
from tuner.show.table import LAST, describe_state, trial_table
from tuner.study.edges import describe_edges
from tuner.study.recommendation import describe_recommendation
from tuner.study.record import State, StudyRecord, TrialRecord, is_launched
from tuner.study.trial_length import judge_trial_length

NO_STUDIES = "no studies yet: tuner launch SPEC starts one"
WIDE = 110
"""Columns of a screen from which on the length of each trial's full run is shown."""
OTHER_LINES = 20
"""Lines of a study besides its trials and their curves: headings, remarks, full runs."""
STATES: tuple[State, ...] = ("complete", "pruned", "infeasible", "failed", "running", "waiting")


def status(record: StudyRecord) -> dict[str, Any]:
    """A study as plain values: the contract of `tuner status STUDY --json`. Unknown values are None."""
    states = [trial.state for trial in record.trials]
    return {
        "study": record.name,
        "direction": record.spec["study"]["direction"],
        "metric": record.metric,
        "trials": {state: states.count(state) for state in STATES},
        "baseline": _brief(record.baseline),
        "best": _brief(record.best),
        "recommended": _brief(record.recommended),
        "recommendation": record.recommendation,
        "edges": describe_edges(record),
        "full_runs": [
            {
                "run_dir": str(run.run_dir),
                "trial": run.trial,
                "step": run.step,
                "steps": run.steps,
                "state": run.state,
                "phase": run.phase,
                "decay_start": run.decay_start,
                "decline": run.decline,
                "metrics": run.metrics,
            }
            for run in record.full_runs
        ],
        "trials_detail": [_detail(record, trial) for trial in record.trials],
        "trial_length": asdict(length) if (length := judge_trial_length(record)) else None,
        "ended": record.ended or None,
    }


def _brief(trial: TrialRecord | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {"number": trial.number, "value": trial.value, "params": trial.params}


def _detail(record: StudyRecord, trial: TrialRecord) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "value": trial.value,
        "params": trial.params,
        "baseline": trial.is_baseline,
        "full_hours": record.full_hours(trial),
        "full_samples": record.full_samples(trial),
        "full_epochs": record.full_epochs(trial),
        "pareto": trial.number in record.pareto_front,
        "d_rising": trial.ended_with_d_rising,
        "peak_memory": trial.peak_memory,
    }


def _read_all(storage: BaseStorage) -> list[StudyRecord]:
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    return [StudyRecord.read(study) for study in studies if is_launched(study)]


def print_studies(storage: BaseStorage, *, as_json: bool) -> None:
    """Print one line for each study of the storage that this tuner launched."""
    print(to_json([status(record) for record in _read_all(storage)], indent=1) if as_json else _list_studies(storage))


def _list_studies(storage: BaseStorage) -> str:
    return "\n".join(map(_study_line, _read_all(storage))) or NO_STUDIES


def _study_line(record: StudyRecord) -> str:
    states, best = [trial.state for trial in record.trials], record.best
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    best_text = f"; best {record.metric} {best.value:.4f} (trial {best.number})" if best else ""
    return f"{record.name}: {counts or 'no trials'}{best_text}; full runs: {len(record.full_runs)}"


def print_status(record: StudyRecord) -> None:
    """Print a study's trials as a table, their curves, and its full runs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for part in status_parts(record, width=console.width, ascii_only=console.options.ascii_only):
        console.print(part, soft_wrap=isinstance(part, Text))
    if len(record.trials) > LAST:
        console.print(f"{len(record.trials):,} trials: --json has all of them", highlight=False)


def status_parts(
    record: StudyRecord, *, last: int = LAST, width: int = WIDE, ascii_only: bool = False
) -> list[RenderableType]:
    """The output of `tuner status STUDY`, with at most `last` trials, for a screen of `width` columns."""
    parts: list[RenderableType] = [trial_table(record, last=last, full_length=width >= WIDE)]
    curves = curves_table(record, last=last, ascii_only=ascii_only)
    parts += [curves] if curves else []
    if (length := judge_trial_length(record)) is not None:
        parts.append(Text(str(length)))
    parts += map(Text, filter(None, (describe_recommendation(record), *describe_edges(record))))
    if record.ended:
        parts.append(Text(f"ended: {record.ended}"))
    if record.confirmation is not None:
        parts.append(Text(f"confirmed: {record.confirmation.verdict}"))
    for run in record.full_runs:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in run.metrics.items())
        steps = "?" if run.steps is None else f"{run.steps:,}"
        state = describe_state(run)
        parts.append(Text(f"full run of trial {run.trial}: {state}, step {run.step:,} of {steps}; {losses}"))
        parts += [Text(f"  declined: {run.decline['reason']}")] if run.decline else []
        parts.append(Text(f"  {run.run_dir}"))
    return parts


def watch(
    storage: BaseStorage,
    study: optuna.Study | None,
    *,
    interval: float,
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a study, or the list of all studies, and renew it every `interval` seconds until Ctrl-C.

    Raises:
        UserError: The console is no terminal.
    """
    if not console.is_terminal:
        raise UserError("--watch needs a terminal, and stdout is none: leave it out, or use --json in a loop.")

    def view() -> RenderableType:
        if study is None:
            return Text(_list_studies(storage))
        # Table and curves have a line each for a trial; more than the screen has would push the end out of sight.
        last = max(1, (console.height - OTHER_LINES) // 2)
        record = StudyRecord.read(study)
        return Group(*status_parts(record, last=last, width=console.width, ascii_only=console.options.ascii_only))

    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(Group(view(), Text(f"every {interval:g} s; Ctrl-C ends", style="dim")), refresh=True)
                sleep(interval)
        except KeyboardInterrupt:
            return
