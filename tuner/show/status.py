"""What a study found, as data and as tables: `tuner status` and its JSON, and a confirmation's table.

Imports no torch: `tuner status` is quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.errors import UserError
from tuner.full.runs import full_runs
from tuner.show.json_events import to_json
from tuner.show.sparklines import curves_table
from tuner.show.table import format_params, is_rising, trial_table
from tuner.trials import (
    BASELINE,
    ENDED,
    SPEC,
    baseline_trial,
    full_hours,
    last_value,
    not_beaten,
    ranking,
    state_of,
    stored_values,
)

if TYPE_CHECKING:
    from tuner.full.confirmed import Confirmation


NO_STUDIES = "no studies yet: tuner launch SPEC starts one"
WATCH_FURNITURE = 20
"""Lines of a study besides its trials and their curves: headings, remarks, full runs."""


def status(study: optuna.Study) -> dict[str, Any]:
    """A study's state as plain values: the contract of `tuner status STUDY --json`."""
    # Not the whole spec: looking must not need the workload's module.
    spec = stored_values(study)["study"]
    trials = study.get_trials(deepcopy=False)
    counts = dict.fromkeys(("complete", "pruned", "infeasible", "failed", "running", "waiting"), 0)
    for trial in trials:
        counts[state_of(trial)] += 1
    ranked = ranking(study, trials)
    return {
        "study": study.study_name,
        "direction": spec["direction"],
        "metric": spec["metric"],
        "trials": counts,
        "baseline": _brief(baseline_trial(study)),
        "best": _brief(ranked[0] if ranked else None),
        "full_runs": [
            {
                "run_dir": str(run.run_dir),
                "trial": run.trial,
                "step": run.step,
                "steps": run.steps,
                "state": run.state,
                "metrics": run.metrics,
            }
            for run in full_runs(study)
        ],
        "trials_detail": _details(study, trials),
        "ended": study.user_attrs.get(ENDED) or None,
    }


def _details(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """One entry for each trial; what was not measured is None."""
    front = not_beaten(study, trials)
    return [
        {
            "number": trial.number,
            "state": state_of(trial),
            "value": last_value(trial),
            "params": trial.params,
            "baseline": bool(trial.user_attrs.get(BASELINE)),
            "full_hours": full_hours(trial, stored_values(study)["full"]),
            "pareto": trial.number in front,
            "d_rising": is_rising(trial),
            "peak_memory": trial.user_attrs.get("peak_memory"),
        }
        for trial in trials
    ]


def _brief(trial: FrozenTrial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {"number": trial.number, "value": last_value(trial), "params": trial.params}


def _studies(storage: BaseStorage) -> list[dict[str, Any]]:
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    return [status(study) for study in studies if SPEC in study.user_attrs]


def print_studies(storage: BaseStorage, *, as_json: bool) -> None:
    """One line for each study of the storage that this tuner launched."""
    found = _studies(storage)
    print(to_json(found, indent=1) if as_json else "\n".join(map(_study_line, found)) or NO_STUDIES)


def _study_line(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in found["trials"].items() if count)
    best = found["best"]
    shown = f"; best {found['metric']} {best['value']:.4f} (trial {best['number']})" if best else ""
    return f"{found['study']}: {counts or 'no trials'}{shown}; full runs: {len(found['full_runs'])}"


def print_status(study: optuna.Study) -> None:
    """A study's trials as a table, their curves, and its full runs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for part in status_parts(study, ascii_only=console.options.ascii_only):
        console.print(part, soft_wrap=isinstance(part, Text))


def status_parts(study: optuna.Study, *, last: int = 1000, ascii_only: bool = False) -> list[RenderableType]:
    """What `tuner status STUDY` shows, of the `last` trials."""
    parts: list[RenderableType] = [trial_table(study, last=last)]
    curves = curves_table(study, last=last, ascii_only=ascii_only)
    parts += [curves] if curves else []
    if ended := study.user_attrs.get(ENDED):
        parts.append(Text(f"ended: {ended}"))
    for run in full_runs(study):
        losses = ", ".join(f"{name} {value:.4f}" for name, value in run.metrics.items())
        steps = "?" if run.steps is None else f"{run.steps:,}"
        parts.append(Text(f"full run of trial {run.trial}: {run.state}, step {run.step:,} of {steps}; {losses}"))
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
    """Show a study, or the list of all, and renew it every `interval` seconds until Ctrl-C.

    Raises:
        UserError: There is no terminal to renew it on.
    """
    if not console.is_terminal:
        raise UserError("--watch renews a terminal's screen, and there is none: leave it out, or use --json in a loop.")

    def view() -> RenderableType:
        if study is None:
            return Text("\n".join(map(_study_line, _studies(storage))) or NO_STUDIES)
        # Table and curves have a line each for a trial; what does not fit would push the end out of sight.
        last = max(1, (console.height - WATCH_FURNITURE) // 2)
        return Group(*status_parts(study, last=last, ascii_only=console.options.ascii_only))

    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(Group(view(), Text(f"every {interval:g} s; Ctrl-C ends", style="dim")), refresh=True)
                sleep(interval)
        except KeyboardInterrupt:
            return


def confirmation_table(found: Confirmation) -> Table:
    """The confirmed trials, the best mean first: mean and spread over the seeds, and the margin over the baseline."""
    table = Table(title=f"confirmation over {found.rung:,} {found.unit}", title_justify="left")
    for heading in ("trial", "parameters", "mean", "min to max", "over the baseline"):
        table.add_column(heading, justify="left" if heading == "parameters" else "right")
    for trial in found.trials:
        number = f"{trial.number} (baseline)" if trial.number == found.baseline else str(trial.number)
        if trial.failed:
            table.add_row(number, format_params(trial.params), "", trial.failed, "")
            continue
        margin = found.margin(trial)
        table.add_row(
            number,
            format_params(trial.params),
            f"{trial.mean:.4f}",
            f"{min(trial.values.values()):.4f} to {max(trial.values.values()):.4f}",
            "" if margin is None or trial.number == found.baseline else f"{margin:+.4f}",
            style="bold" if trial is found.winner else None,
        )
    return table
