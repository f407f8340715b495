"""The curve of a full run: an open trial of `<study>.full`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from tuner.promotion.curve_check import own_curve
from tuner.spec.study_toml import StudySpec
from tuner.study import optuna_internals
from tuner.study.keys import FullRunKeys, report_once, write_full_run, write_study
from tuner.study.record import FullRunRecord, StudyRecord, TrialRecord, full_study


def begin_curve(
    record: StudyRecord,
    spec: StudySpec,
    trial: TrialRecord,
    last: FullRunRecord | None,
    origin: Path | None,
    keys: FullRunKeys,
) -> optuna.Trial:
    """The curve of a run without a checkpoint of its own: it begins with that of the run it continues from.

    Args:
        last: The newest curve of the trial's full runs.
        origin: The run directory that the run continues from.
    """
    follows = origin is not None and spec.trial.unit == "samples"
    values = own_curve(record, trial, spec.baseline.seed) if follows else {}
    keys = {**keys, "continued_from": None if origin is None else str(origin)}
    known = last if last and last.is_open else None
    if known and (known.step or known.decline):
        # It has values of its own: those of a run whose states are lost.
        _close(record, known)
        known = None
    return _open(record, trial, known, values, keys)


def continue_curve(
    record: StudyRecord,
    trial: TrialRecord,
    last: FullRunRecord | None,
    keys: FullRunKeys,
    restart: int | None,
    batch_size: int,
) -> optuna.Trial | None:
    """The curve of a run with a checkpoint; None if the run has finished at this length.

    Args:
        restart: The step that the run goes back to.
    """
    if last is None or (last.is_open and restart is None):
        return _open(record, trial, last, {}, keys)
    if restart is None and last.step >= (keys["steps"] or 0):
        return None
    # A finished trial can't be written to, and a point can't be taken back, so another one continues its curve.
    if last.is_open:
        _close(record, last)
    if last.started_at_zero or last.continued_from:
        keys = {**keys, "continued_from": str(last.continued_from) if last.continued_from else None}
    values = dict(last.curve)
    if restart is not None:
        keys = {**keys, "step": restart}
        if last.decline is not None and last.is_declining:
            keys = {**keys, "decline": {**last.decline, "outcome": f"went back to step {restart:,}"}}
        values = {samples: value for samples, value in values.items() if samples <= restart * batch_size}
    return _open(record, trial, None, values, keys)


def _close(record: StudyRecord, last: FullRunRecord) -> None:
    curves = full_study(record.study)
    assert curves is not None
    if last.curve:
        curves.tell(last.number, last.curve[max(last.curve)])
    else:
        curves.tell(last.number, state=TrialState.FAIL)


def _open(
    record: StudyRecord,
    trial: TrialRecord,
    known: FullRunRecord | None,
    values: Mapping[int, float],
    keys: FullRunKeys,
) -> optuna.Trial:
    """Open a known trial of `<study>.full`, or create one; store values that it lacks, and its attributes."""
    curves = full_study(record.study)
    if curves is None:
        storage = optuna_internals.storage_of(record.study)
        # Another promotion may create it at this moment.
        curves = optuna.create_study(
            study_name=f"{record.name}.full", storage=storage, direction=record.study.direction, load_if_exists=True
        )
        write_study(curves, promoted_from=record.name)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            curves.set_metric_names([record.metric])
    if known is not None:
        curve = optuna_internals.open_trial(curves, known.number)
    else:
        curves.enqueue_trial(dict(trial.params))
        curve = curves.ask(fixed_distributions=dict(trial.distributions))
    for samples, value in values.items():
        report_once(curve, value, samples)
    write_full_run(curve, **keys)
    # Last: until it names its trial, a killed promotion's curve does not count, and another one is created.
    write_full_run(curve, trial=trial.number)
    return curve
