"""Reading a study: its spec, its trials in order, their states. Shared by everything that looks at one.

Imports no torch: `tuner status` is quick.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from trainer.errors import UserError
from trainer.locks import is_locked

if TYPE_CHECKING:
    from tuner.spec import StudySpec

# Attributes of a study, and of its trials.
SPEC = "spec"
BASE_DIR = "base_dir"
DATA_DIGEST = "data_digest"
BASELINE = "baseline"
INFEASIBLE = "infeasible"
HOST = "host"
CODE = "code"
"""Digest of the workload's code as a trial ran it."""
ENDED = "ended"
"""Why the last launch came to its end; empty while one is under way or was stopped."""
FULL_HOURS = "full_hours"
"""Projected hours of the full run at the trial's speed; `full_hours` reads it."""
FULL_LENGTH = "full_length"
"""The samples or steps of the full run that `FULL_HOURS` was projected for."""
D_RISING = "d_rising"

CLAIM = ".claim"
"""Lock in a trial's run directory, held by the process that works on the trial."""

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def state_of(trial: FrozenTrial) -> str:
    """complete, pruned, infeasible, failed, running or waiting."""
    return "infeasible" if INFEASIBLE in trial.user_attrs else STATES[trial.state]


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether an open trial of this machine has no process that trains it; the next launch continues it."""
    run_dir, host = Path(trial.user_attrs.get("run_dir", "")), trial.user_attrs.get(HOST)
    is_ours = trial.state == TrialState.RUNNING and host == platform.node() and run_dir.is_absolute()
    return is_ours and not is_locked(run_dir, CLAIM)


def last_value(trial: FrozenTrial) -> float | None:
    """The value at the trial's end, or where it stands."""
    if trial.value is not None:
        return trial.value
    values = trial.intermediate_values
    return values[max(values)] if values else None


def trial_name(number: int) -> str:
    """The name of a trial's run directory."""
    return f"trial-{number:05d}"


def report_once(trial: optuna.Trial, value: float, step: int) -> bool:
    """Report an intermediate value, unless this step has one: after a crash a run passes some points again.

    Returns whether it was new.
    """
    if step in trial.storage.get_trial(trial._trial_id).intermediate_values:
        return False
    trial.report(value, step)
    return True


def stored_spec(study: optuna.Study) -> StudySpec:
    """The spec that a study was launched with.

    Raises:
        UserError: It is no study of this tuner.
    """
    # Here, for it imports torch.
    from tuner.spec import StudySpec

    values = stored_values(study)
    base_dir = Path(study.user_attrs[BASE_DIR])
    return StudySpec.build(values, base_dir=base_dir, source=f"study {study.study_name}", stored=True)


def stored_values(study: optuna.Study) -> dict[str, Any]:
    """The spec that a study was launched with, as plain values; its workload is not imported.

    Raises:
        UserError: It is no study of this tuner.
    """
    attrs = study.user_attrs
    if SPEC not in attrs:
        raise UserError(f"study {study.study_name} holds no spec: it was not launched by tuner; use another study.")
    values: dict[str, Any] = attrs[SPEC]
    return values


def ranking(study: optuna.Study, trials: Sequence[FrozenTrial] | None = None) -> list[FrozenTrial]:
    """Complete and feasible trials, the best one first."""
    trials = study.get_trials(deepcopy=False) if trials is None else trials
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    feasible = [t for t in complete if all(value <= 0 for value in t.constraints.values())]
    return sorted(feasible, key=lambda t: (sign * (t.value or 0.0), t.number))


def baseline_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial of the settings as given."""
    trials = study.get_trials(deepcopy=False)
    return next((t for t in trials if t.user_attrs.get(BASELINE) and t.state != TrialState.FAIL), None)


def trials_since_improvement(study: optuna.Study, trials: Sequence[FrozenTrial], min_delta: float) -> int:
    """Finished trials since the best value last became better by more than `min_delta`; 0 where there is none yet."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    values = {trial.number: sign * (trial.value or 0.0) for trial in ranking(study, trials)}
    best, since = None, 0
    for trial in trials:
        value = values.get(trial.number)
        if value is not None and (best is None or value < best - min_delta):
            best, since = value, 0
        elif best is not None and trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            since += 1
    return since


def full_hours(trial: FrozenTrial, full: Mapping[str, Any]) -> float | None:
    """Projected hours of the full run at a trial's speed; None where it was not timed.

    Args:
        full: `[full]` as it stands now. Its length may be another than when the trial ran.
    """
    hours, then = trial.user_attrs.get(FULL_HOURS), trial.user_attrs.get(FULL_LENGTH, {})
    if hours is None or not then:
        return hours
    unit = next(iter(then))
    # Between samples and steps lies the batch size, and with it the trial's parameters.
    return float(hours * full[unit] / then[unit]) if full.get(unit) else None


def not_beaten(study: optuna.Study, trials: Sequence[FrozenTrial] | None = None) -> set[int]:
    """Numbers of the trials to which no other is equal or better in metric and hours and better in one of them.

    Hours are those that the full run would take; a trial that was not timed is left out.
    """
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    full = study.user_attrs.get(SPEC, {}).get("full", {})
    timed = [(trial, full_hours(trial, full)) for trial in ranking(study, trials)]
    costs = {trial.number: (sign * (trial.value or 0.0), hours) for trial, hours in timed if hours}

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    return {number for number, own in costs.items() if not any(beats(other, own) for other in costs.values())}
