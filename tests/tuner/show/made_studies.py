"""Studies with trials, full runs and a confirmation without training, for the tests of tuner.show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Unpack

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from tests.tuner.studies_for_tests import build
from tuner.study.confirmation import Confirmation, ConfirmationRequest, ConfirmedTrial
from tuner.study.keys import FullRunKeys, TrialKeys, write_study
from tuner.study.optuna_internals import storage_of
from tuner.study.record import StudyRecord, TrialRecord

GRID = (40, 80, 120, 160)
OUT_OF_MEMORY = "out of memory: tried | 2.00 GiB of *23.6* <GiB>\nTraceback"
STARTED = datetime(2026, 1, 2, 3, 4, 5)


def new_study(storage: BaseStorage | str | None = None, *, without: str = "", **changes: Any) -> optuna.Study:
    """A study without trials; `changes` as `build` takes them."""
    spec = build(without=without, **changes)
    study = optuna.create_study(study_name="toy", storage=storage, direction=spec.study.direction)
    write_study(study, spec=spec.to_dict(), base_dir="/studies/toy", num_samples=128)
    return study


def add_trial(
    study: optuna.Study,
    values: list[float],
    *,
    batch_size: int = 8,
    d_coef: float = 1.0,
    state: TrialState | None = None,
    **attrs: Unpack[TrialKeys],
) -> TrialRecord:
    """A finished trial with `values` on the grid; one that is shorter than the grid was pruned."""
    if state is None:
        state = TrialState.COMPLETE if len(values) == len(GRID) else TrialState.PRUNED
    trial = create_trial(
        state=state,
        value=values[-1] if state == TrialState.COMPLETE else None,
        params={"train.batch_size": batch_size, "train.d_coef": d_coef},
        distributions={
            "train.batch_size": optuna.distributions.CategoricalDistribution([4, 8, 16]),
            "train.d_coef": optuna.distributions.FloatDistribution(0.1, 10.0, log=True),
        },
        intermediate_values=dict(zip(GRID, values, strict=False)),
        user_attrs=dict(attrs),
    )
    trial.datetime_start = STARTED
    trial.datetime_complete = STARTED + timedelta(hours=1, minutes=22, seconds=29) if state.is_finished() else None
    study.add_trial(trial)
    return TrialRecord.read(study.get_trials(deepcopy=False)[-1])


def add_full_run(study: optuna.Study, curve: Mapping[int, float], **attrs: Unpack[FullRunKeys]) -> None:
    """An open trial of `<study>.full`."""
    full = optuna.create_study(study_name="toy.full", storage=storage_of(study), load_if_exists=True)
    full.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values=dict(curve), user_attrs=dict(attrs)))


def add_five_trials(study: optuna.Study) -> optuna.Study:
    """The baseline, the best one, a slow one, one pruned and one infeasible."""
    d = [1e-6, 1e-5, 1e-4, 1e-3]
    add_trial(study, [4.0, 3.5, 3.2, 3.0], d=d, baseline=True, full_hours=30.0, peak_memory=10**9)
    add_trial(study, [3.9, 3.0, 2.6, 2.5], batch_size=4, d_coef=0.5, d=d, d_rising=True, full_hours=36.25)
    add_trial(study, [4.1, 3.9, 3.8, 3.7], batch_size=16, d_coef=2.0, d=d, full_hours=40.0, micro_batch_size=4)
    add_trial(study, [5.0], batch_size=16, d_coef=9.0, d=d[:1])
    # Its last value is lower than that of every other.
    add_trial(study, [1.0], batch_size=4, d_coef=8.0, infeasible=OUT_OF_MEMORY)
    return study


def add_everything(study: optuna.Study) -> optuna.Study:
    """Five trials, a confirmation in which a run failed, a full run of the best trial, and why the launch ended."""
    add_five_trials(study)
    slow = ConfirmedTrial(2, {"train.d_coef": 2.0}, {0: 2.3}, failed="seed 1: no gradient was finite")
    base = ConfirmedTrial(0, {"train.d_coef": 1.0}, {0: 2.4, 1: 2.8})
    best = ConfirmedTrial(1, {"train.d_coef": 0.5}, {0: 2.2, 1: 2.6})
    confirmation = Confirmation("val/loss", True, "samples", 320, [best, base, slow], baseline=0)
    request = ConfirmationRequest(2, 2, 320, best=1)
    add_full_run(
        study,
        {40: 3.9, 160: 2.5, 8000: 1.9},
        trial=1,
        run_dir=str(Path("/runs/toy/full-trial-00001")),
        step=2000,
        steps=4000,
        metrics={"val/loss": 1.9, "val/token_loss": 1.4},
        full_hours=88 / 3600,
        decline={"step": 1800, "reason": "val/loss is at least 2.4 in 2 of the last 3 values", "outcome": ""},
    )
    write_study(
        study,
        confirmation={"asked": asdict(request), "found": asdict(confirmation)},
        recommendation={"trial": 1, "best": 1, "probability": 0.5, "growth": 5.5},
        ended="3 trials in a row improved nothing",
    )
    return study


def read(study: optuna.Study) -> StudyRecord:
    return StudyRecord.read(study)
