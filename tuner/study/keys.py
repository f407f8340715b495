"""What the tuner stores in a study: the keys, and what writes them. `tuner.study.record` reads them.

The classes `...Keys` are the schema: each field is an attribute that Optuna stores under the field's name, and it
outlives versions of this package. Imports no torch, so that `tuner status` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict, Unpack, cast

import optuna

from tuner.study import optuna_internals
from tuner.study.confirmation import Confirmation, ConfirmationRequest, ConfirmationRun

HOST_KEY, RUN_DIR_KEY, ALIVE_KEY = "host", "run_dir", "alive"
"""For SQL on a database that must not be opened through Optuna."""


class TrialKeys(TypedDict, total=False):
    """User attributes of a trial."""

    run_dir: str
    host: str
    owner: str
    """Token of the process that trains the trial."""
    alive: float
    """When it last showed that it lives: seconds since 1970 on the database's clock."""
    code: str
    """Digest of the workload's code that the trial ran."""
    aim_run: str
    baseline: bool
    tried: Mapping[str, Any]
    """The parameters of the entry of [[search.try]] that it was created for; empty if another trial has them."""
    starts: list[Any]
    """[starts since the last progress, number of evaluations, newest checkpoint, boot of the machine, processes that
    its kernel has killed for memory]; the last two where it counts."""
    infeasible: str
    """The reason."""
    d: list[float]
    """Prodigy's d at each evaluation."""
    d_rising: bool
    full_hours: float
    """Projected hours of the full run at the trial's speed, for the length in `full_length`."""
    full_length: Mapping[str, int]
    samples_per_second: float
    micro_batch_size: int
    memory: int
    """Bytes of the device."""
    peak_memory: int


class Deviation(TypedDict):
    """A point at which a full run from step 0 differs from its trial."""

    samples: int
    trial: float
    full: float
    allowed: float


class Decline(TypedDict):
    """The latest decline of a full run that its guard found."""

    step: int
    reason: str
    outcome: str
    """"" while it lasts, else how it ended: "recovered at step 1,200", "went back to step 900"."""


class FullRunKeys(TypedDict, total=False):
    """User attributes of a trial of `<study>.full`, which holds the curve of one full run."""

    run_dir: str
    trial: int
    aim_run: str
    steps: int | None
    """Length of the run."""
    decay_steps: int
    """The steps at its end over which the learning rate falls to zero; 0: it is constant."""
    step: int
    """Step of the last evaluation, or of the end."""
    metrics: dict[str, float]
    continued_from: str | None
    """Run directory whose checkpoint the run continued from; None: it started at step 0; absent: not known."""
    deviation: list[Deviation]
    decline: Decline
    full_hours: float
    """Of the whole run, at its own measured speed."""


class PromotionKeys(TypedDict, total=False):
    """An entry of the study's attribute `promotions`."""

    trial: int
    value: float
    params: Mapping[str, Any]
    best: int
    """Number of the best trial at that time."""
    run_dir: str
    continued_from: str | None
    continued_at: int
    """Step of the checkpoint that the run continued from."""
    started: str
    code_version: str
    confirmation: dict[str, Any]


class Recommendation(TypedDict):
    """The trial that the full run is expected to favour, by the model of `tuner.study.horizon`."""

    trial: int
    best: int
    """Number of the best trial at that time."""
    probability: float
    """That the trial is better than the best one at the full run's end."""
    growth: float
    """Of the optimal batch size, as a factor, from a trial to the full run's end."""


class StudyKeys(TypedDict, total=False):
    """User attributes of a study. Besides, `confirm-<trial>-seed-<seed>` holds each `ConfirmationRun`."""

    spec: Mapping[str, Any]
    base_dir: str
    data_digest: str
    num_samples: int
    """Of the training data."""
    ended: str
    """Why the last launch ended; empty while one runs, or after it was stopped."""
    recommendation: Recommendation | None
    promotions: list[PromotionKeys]
    confirmation: dict[str, Any]
    """`asked`: the ConfirmationRequest, and once it has ended `found`: the Confirmation."""
    promoted_from: str
    """Of `<study>.full`: name of the study."""


def write_trial(trial: optuna.Trial, **values: Unpack[TrialKeys]) -> None:
    """Store attributes of an open trial. A finished trial can't be written to."""
    _write_changed(trial, values)


def write_aim_run(trial: optuna.Trial, run_hash: str) -> None:
    """Store the hash of the Aim run of a trial or a full run, once."""
    _write_changed(trial, {"aim_run": run_hash})


def create_trial(study: optuna.Study, fixed_params: Mapping[str, Any], **values: Unpack[TrialKeys]) -> int:
    """Create a RUNNING trial that has these attributes from its first moment; returns its number."""
    return optuna_internals.create_running_trial(study, cast(Mapping[str, Any], values), fixed_params)


def write_unopened_trial(study: optuna.Study, number: int, **values: Unpack[TrialKeys]) -> None:
    """Store attributes of a RUNNING trial before the sampler proposes its parameters."""
    for key, value in values.items():
        optuna_internals.set_user_attr(study, number, key, value)


def write_full_run(curve: optuna.Trial, **values: Unpack[FullRunKeys]) -> None:
    """Store attributes of the open trial of `<study>.full` that holds a full run's curve."""
    _write_changed(curve, values)


def _write_changed(trial: optuna.Trial, values: Mapping[str, Any]) -> None:
    """Store the attributes that have changed: each takes three SQL statements."""
    stored = trial.user_attrs
    for key, value in values.items():
        if key not in stored or stored[key] != value:
            trial.set_user_attr(key, value)


def write_study(study: optuna.Study, **values: Unpack[StudyKeys]) -> None:
    """Store attributes of a study."""
    for key, value in values.items():
        study.set_user_attr(key, value)


def write_confirmation(
    study: optuna.Study, request: ConfirmationRequest, confirmation: Confirmation | None = None
) -> None:
    """Store a confirmation: its request when it begins, its result when it has ended."""
    result = {} if confirmation is None else {"found": asdict(confirmation)}
    write_study(study, confirmation={"asked": asdict(request), **result})


def write_confirmation_run(study: optuna.Study, number: int, seed: int, run: ConfirmationRun) -> None:
    """Store one run of a confirmation, complete or not."""
    study.set_user_attr(confirmation_run_name(number, seed), asdict(run))


def report_once(trial: optuna.Trial, value: float, step: int) -> bool:
    """Report an intermediate value unless the step has one: after a crash a run passes some points again.

    Returns whether it was new.
    """
    if step in optuna_internals.frozen(trial).intermediate_values:
        return False
    trial.report(value, step)
    return True


def trial_name(number: int) -> str:
    """Name of a trial's run directory."""
    return f"trial-{number:05d}"


def confirmation_run_name(number: int, seed: int) -> str:
    """Name of a confirmation run: its run directory, and the study's attribute."""
    return f"confirm-{number:05d}-seed-{seed}"
