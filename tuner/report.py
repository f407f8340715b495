"""What a study found, as data: `tuner status`, its JSON, and the quickstart's tables are made from it."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from rich.console import Console

from tuner.display import trial_table
from tuner.promotion import full_runs
from tuner.trials import SPEC, baseline_trial, last_value, ranking, state_of, stored_values


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
    }


def _brief(trial: FrozenTrial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {"number": trial.number, "value": last_value(trial), "params": trial.params}


def print_studies(storage: BaseStorage, *, as_json: bool) -> None:
    """One line for each study of the storage that this tuner launched."""
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    found = [status(study) for study in studies if SPEC in study.user_attrs]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for entry in found:
        counts = ", ".join(f"{count} {state}" for state, count in entry["trials"].items() if count)
        best = entry["best"]
        shown = f"; best {entry['metric']} {best['value']:.4f} (trial {best['number']})" if best else ""
        print(f"{entry['study']}: {counts or 'no trials'}{shown}; full runs: {len(entry['full_runs'])}")
    if not found:
        print("no studies yet: tuner launch SPEC starts one")


def print_status(study: optuna.Study) -> None:
    """A study's trials as a table, and its full runs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(trial_table(study))
    for run in full_runs(study):
        losses = ", ".join(f"{name} {value:.4f}" for name, value in run.metrics.items())
        console.print(
            f"full run of trial {run.trial}: {run.state}, step {run.step:,} of {run.steps:,}; {losses}\n"
            f"  {run.run_dir}",
            highlight=False,
            soft_wrap=True,
        )
