"""What a study remembers of its full runs: each is also a trial of `<study>.full`, which draws its curve.

Imports no torch: `tuner status` is quick.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from trainer.locks import is_locked
from tuner.trials import report_once, stored_values

CONTINUED_FROM = "continued_from"
"""Attribute of a curve: the run directory whose checkpoint the run went on from; None: it started at step 0."""
DEVIATION = "deviation"
"""Attribute of a curve: where a run from step 0 did not retrace its trial."""


@dataclass(frozen=True)
class FullRun:
    """A promoted run as the study remembers it."""

    trial: int
    run_dir: Path
    step: int
    steps: int | None
    state: str
    """"running", "interrupted" or "finished"."""
    metrics: dict[str, float]


def full_runs(study: optuna.Study) -> list[FullRun]:
    """The full runs that were promoted from a study, in the order of their start."""
    return [_describe(curve) for curve in newest_curves(study)]


def newest_curves(study: optuna.Study) -> list[FrozenTrial]:
    """The newest trial of `<study>.full` of each promoted trial, in the order of their first starts."""
    curves = full_study(study)
    trials = curves.get_trials(deepcopy=False) if curves else []
    # One that was just opened has no run yet.
    known = (t for t in trials if {"trial", "run_dir"} <= t.user_attrs.keys())
    return list({t.user_attrs["trial"]: t for t in known}.values())


def full_study(study: optuna.Study) -> optuna.Study | None:
    """`<study>.full`, which holds the curves of the full runs; None where none was promoted."""
    name, storage = f"{study.study_name}.full", study._storage
    if name not in optuna.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=name, storage=storage)


def run_state(curve: FrozenTrial) -> str:
    """running, interrupted or finished."""
    if curve.state != TrialState.RUNNING:
        return "finished"
    return "running" if is_locked(Path(curve.user_attrs["run_dir"])) else "interrupted"


def curves_of(study: optuna.Study, chosen: FrozenTrial) -> list[FrozenTrial]:
    """The trials of `<study>.full` that drew full runs of this trial, the newest last."""
    curves = full_study(study)
    trials = curves.get_trials(deepcopy=False) if curves else []
    return [trial for trial in trials if trial.user_attrs.get("trial") == chosen.number]


def open_curve(
    study: optuna.Study,
    chosen: FrozenTrial,
    run_dir: Path,
    steps: int | None,
    *,
    past: Mapping[int, float] | None,
    continued_from: Path | None,
) -> optuna.Trial | None:
    """The open trial of `<study>.full` that draws this run: the one left open, or a new one.

    A run that begins now (also because its folder is gone) has the `past` of the run that it is `continued_from`;
    one that was under way (`past` None) has the curve that was drawn. Returns None where it has already finished at
    this length.
    """
    curves = full_study(study)
    if curves is None:
        curves = optuna.create_study(
            study_name=f"{study.study_name}.full", storage=study._storage, direction=study.direction
        )
        curves.set_user_attr("promoted_from", study.study_name)
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            curves.set_metric_names([stored_values(study)["study"]["metric"]])
    mine = curves_of(study, chosen)
    last = mine[-1] if mine else None
    if last and last.state == TrialState.RUNNING:
        curve, drawn = optuna.Trial(curves, last._trial_id), past or {}
    elif last and past is None and last.user_attrs["step"] >= (steps or 0):
        return None
    else:
        curves.enqueue_trial(chosen.params)
        curve = curves.ask(fixed_distributions=chosen.distributions)
        drawn = last.intermediate_values if last and past is None else past or {}
    for step, value in drawn.items():
        report_once(curve, value, step)
    curve.set_user_attr("run_dir", str(run_dir))
    curve.set_user_attr("trial", chosen.number)
    curve.set_user_attr("steps", steps)
    if past is not None:
        curve.set_user_attr(CONTINUED_FROM, None if continued_from is None else str(continued_from))
    elif last and CONTINUED_FROM in last.user_attrs:
        curve.set_user_attr(CONTINUED_FROM, last.user_attrs[CONTINUED_FROM])
    return curve


def _describe(curve: FrozenTrial) -> FullRun:
    attrs = curve.user_attrs
    return FullRun(
        trial=attrs["trial"],
        run_dir=Path(attrs["run_dir"]),
        step=attrs.get("step", 0),
        steps=attrs.get("steps"),
        state=run_state(curve),
        metrics=attrs.get("metrics", {}),
    )
