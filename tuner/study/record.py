"""The record: a study as the tuner reads it, typed. `tuner.study.keys` has what is stored, and writes it.

Imports no torch, so that `tuner status` is quick.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from trainer.config import TrainConfig
from trainer.errors import UserError
from trainer.locks import is_locked
from tuner.study import optuna_internals
from tuner.study.confirmation import Confirmation, ConfirmationRequest, ConfirmationRun
from tuner.study.keys import (
    Decline,
    Deviation,
    FullRunKeys,
    PromotionKeys,
    Recommendation,
    StudyKeys,
    TrialKeys,
    confirmation_run_name,
)

if TYPE_CHECKING:
    from tuner.spec.study_toml import StudySpec

State = Literal["complete", "pruned", "infeasible", "failed", "running", "waiting"]
FullRunState = Literal["running", "interrupted", "finished"]
Phase = Literal["constant", "decay"]

CLAIM = ".claim"
"""Lock file in a trial's run directory, held by the process that trains the trial."""
STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class TrialRecord:
    """A trial: Optuna's own fields, and the tuner's attributes."""

    number: int
    state: State
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    value: float | None
    """At the end, or at the last evaluation."""
    curve: Mapping[int, float]
    """Value by point of the evaluation grid, in the unit of the budget."""
    started: datetime | None
    completed: datetime | None
    is_feasible: bool
    run_dir: Path | None
    host: str | None
    owner: str | None
    alive: float | None
    code: str | None
    aim_run: str | None
    is_baseline: bool
    tried: Mapping[str, Any]
    starts: Sequence[Any]
    infeasible: str | None
    d: Sequence[float]
    d_is_rising: bool
    """At the last evaluation."""
    full_hours: float | None
    """For `full_length`; `StudyRecord.full_hours` converts it to the length of today."""
    full_length: Mapping[str, int]
    samples_per_second: float | None
    micro_batch_size: int | None
    memory: int | None
    peak_memory: int | None

    @classmethod
    def read(cls, trial: FrozenTrial | optuna.Trial) -> TrialRecord:
        """Read a trial; an open one of this process with what it has reported and stored since."""
        if isinstance(trial, optuna.Trial):
            trial = optuna_internals.frozen(trial)
        keys, curve = cast(TrialKeys, trial.user_attrs), trial.intermediate_values
        value = trial.value
        if value is None and curve:
            value = curve[max(curve)]
        return cls(
            number=trial.number,
            # A process that is killed right after it stored the reason leaves the trial open, to be claimed again.
            state="infeasible" if "infeasible" in keys and trial.state in ENDED else STATES[trial.state],
            params=trial.params,
            distributions=trial.distributions,
            value=value,
            curve=curve,
            started=trial.datetime_start,
            completed=trial.datetime_complete,
            is_feasible=all(constraint <= 0 for constraint in trial.constraints.values()),
            run_dir=Path(keys["run_dir"]) if "run_dir" in keys else None,
            host=keys.get("host"),
            owner=keys.get("owner"),
            alive=keys.get("alive"),
            code=keys.get("code"),
            aim_run=keys.get("aim_run"),
            is_baseline=bool(keys.get("baseline")),
            tried=keys.get("tried", {}),
            starts=keys.get("starts", [0]),
            infeasible=keys.get("infeasible"),
            d=keys.get("d", []),
            d_is_rising=bool(keys.get("d_rising")),
            full_hours=keys.get("full_hours"),
            full_length=keys.get("full_length", {}),
            samples_per_second=keys.get("samples_per_second"),
            micro_batch_size=keys.get("micro_batch_size"),
            memory=keys.get("memory"),
            peak_memory=keys.get("peak_memory"),
        )

    @property
    def is_finished(self) -> bool:
        return self.state not in ("running", "waiting")

    @property
    def is_interrupted(self) -> bool:
        """Whether it is open, belongs to this machine, and no process trains it; the next launch continues it."""
        is_ours = self.state == "running" and self.host == platform.node()
        if not is_ours or self.run_dir is None or not self.run_dir.is_absolute():
            return False
        return not is_locked(self.run_dir, CLAIM)

    @property
    def ended_with_d_rising(self) -> bool:
        """Whether Prodigy's d still rose at the end of a complete trial: the trial was too short for its d_coef."""
        return self.state == "complete" and self.d_is_rising


@dataclass(frozen=True)
class FullRunRecord:
    """A full run, as the study keeps it."""

    number: int
    """Of the trial of `<study>.full` that holds its curve."""
    trial: int
    run_dir: Path
    is_open: bool
    params: Mapping[str, Any]
    curve: Mapping[int, float]
    """Value by samples."""
    step: int
    steps: int | None
    decay_steps: int | None
    """The steps at its end over which the learning rate falls to zero; 0: it is constant; None: an early version, which
    did not store it, started the run."""
    metrics: Mapping[str, float]
    started_at_zero: bool
    """Whether it is known to have started at step 0."""
    continued_from: Path | None
    deviations: Sequence[Deviation]
    decline: Decline | None
    hours: float | None
    aim_run: str | None

    @classmethod
    def read(cls, trial: FrozenTrial | optuna.Trial) -> FullRunRecord | None:
        """Read a trial of `<study>.full`; None while it is being created."""
        if isinstance(trial, optuna.Trial):
            trial = optuna_internals.frozen(trial)
        keys = cast(FullRunKeys, trial.user_attrs)
        if "trial" not in keys or "run_dir" not in keys:
            return None
        origin = keys.get("continued_from")
        return cls(
            number=trial.number,
            trial=keys["trial"],
            run_dir=Path(keys["run_dir"]),
            is_open=trial.state == TrialState.RUNNING,
            params=trial.params,
            curve=trial.intermediate_values,
            step=keys.get("step", 0),
            steps=keys.get("steps"),
            decay_steps=keys.get("decay_steps"),
            metrics=keys.get("metrics", {}),
            started_at_zero="continued_from" in keys and origin is None,
            continued_from=Path(origin) if origin else None,
            deviations=keys.get("deviation", []),
            decline=keys.get("decline"),
            hours=keys.get("full_hours"),
            aim_run=keys.get("aim_run"),
        )

    @property
    def state(self) -> FullRunState:
        if not self.is_open:
            return "finished"
        return "running" if is_locked(self.run_dir) else "interrupted"

    @property
    def is_declining(self) -> bool:
        """Whether its guard found a decline that it has not left since."""
        return self.decline is not None and not self.decline["outcome"]

    @property
    def decay_start(self) -> int | None:
        """The first update at a lowered learning rate; None if the rate is constant."""
        return self.steps - self.decay_steps + 1 if self.steps and self.decay_steps else None

    @property
    def phase(self) -> Phase | None:
        """Of its learning rate at `step`; None for a run without a decay."""
        if self.decay_start is None:
            return None
        return "decay" if self.step > self.decay_start else "constant"


def full_study(study: optuna.Study) -> optuna.Study | None:
    """`<study>.full`, which holds the curves of the full runs; None before the first promotion."""
    name, storage = f"{study.study_name}.full", optuna_internals.storage_of(study)
    if name not in optuna.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=name, storage=storage)


def is_new(study: optuna.Study) -> bool:
    """Whether nothing is stored in the study yet."""
    return not study.user_attrs and not study.get_trials(deepcopy=False)


def is_launched(study: optuna.Study) -> bool:
    """Whether this tuner launched the study."""
    return "spec" in study.user_attrs


def read_spec(study: optuna.Study) -> StudySpec:
    """The spec that a study was launched with, checked; it imports the workload.

    Raises:
        UserError: The study was not launched by this tuner, or its workload can't be imported.
    """
    from tuner.spec.study_toml import StudySpec  # imports torch

    record = StudyRecord.read(study)
    assert record.base_dir is not None
    return StudySpec.build(record.spec, base_dir=record.base_dir, source=f"study {record.name}", stored=True)


@dataclass(frozen=True)
class StudyRecord:
    """A study with its trials, read at one moment; the full runs are read on first use."""

    study: optuna.Study = field(repr=False)
    name: str
    spec: Mapping[str, Any]
    """As plain values: reading must not need the workload's module."""
    base_dir: Path | None
    data_digest: str | None
    num_samples: int | None
    """Of the training data; None in a study of an early version."""
    minimized: bool
    trials: list[TrialRecord]
    ended: str
    recommendation: Recommendation | None
    promotions: list[PromotionKeys]
    confirmation_request: ConfirmationRequest | None
    """Of the last confirmation."""
    confirmation: Confirmation | None
    """The result of the last confirmation; None until it has ended."""
    confirmation_runs: Mapping[str, ConfirmationRun]

    @classmethod
    def read(cls, study: optuna.Study) -> StudyRecord:
        """Read a study.

        Raises:
            UserError: This tuner did not launch it.
        """
        attrs = study.user_attrs
        keys = cast(StudyKeys, attrs)
        if "spec" not in keys:
            raise UserError(f"study {study.study_name} holds no spec: tuner did not launch it; use another study.")
        kept = keys.get("confirmation", {})
        kept = kept if isinstance(kept, Mapping) and "asked" in kept else {}
        return cls(
            study=study,
            name=study.study_name,
            spec=keys["spec"],
            base_dir=Path(keys["base_dir"]) if "base_dir" in keys else None,
            data_digest=keys.get("data_digest"),
            num_samples=keys.get("num_samples"),
            minimized=study.direction == StudyDirection.MINIMIZE,
            trials=[TrialRecord.read(trial) for trial in study.get_trials(deepcopy=False)],
            ended=keys.get("ended", ""),
            recommendation=keys.get("recommendation"),
            promotions=keys.get("promotions", []),
            confirmation_request=ConfirmationRequest(**kept["asked"]) if kept else None,
            confirmation=_confirmation.validate_python(kept["found"]) if "found" in kept else None,
            confirmation_runs={
                name: _confirmation_run.validate_python(run)
                for name, run in attrs.items()
                if re.fullmatch(r"confirm-\d+-seed-\d+", name) and _is_confirmation_run(run)
            },
        )

    @property
    def metric(self) -> str:
        return str(self.spec["study"]["metric"])

    @property
    def unit(self) -> Literal["samples", "steps", "seconds"]:
        """The unit of a trial's budget."""
        budget = self.spec["trial"]
        return "steps" if budget.get("steps") else "seconds" if budget.get("seconds") else "samples"

    def sortable(self, value: float) -> float:
        """The value with its sign such that lower is better."""
        return value if self.minimized else -value

    @cached_property
    def ranked(self) -> list[TrialRecord]:
        """Complete and feasible trials, the best first."""
        complete = [t for t in self.trials if t.state == "complete" and t.is_feasible and t.value is not None]
        return sorted(complete, key=lambda t: (self.sortable(t.value or 0.0), t.number))

    @property
    def best(self) -> TrialRecord | None:
        return self.ranked[0] if self.ranked else None

    @cached_property
    def recommended(self) -> TrialRecord | None:
        """The trial to promote: that of the recommendation, or the best one if there is none since it was complete."""
        found = self.recommendation
        if self.best is None or found is None or found["best"] != self.best.number:
            return self.best
        return next((trial for trial in self.ranked if trial.number == found["trial"]), self.best)

    @property
    def favourites(self) -> list[TrialRecord]:
        """The ranked trials, with the recommended one first."""
        return sorted(self.ranked, key=lambda trial: trial is not self.recommended)

    @cached_property
    def baseline(self) -> TrialRecord | None:
        """The trial of the settings in `[train]`."""
        return next((t for t in self.trials if t.is_baseline and t.state != "failed"), None)

    @cached_property
    def finished(self) -> list[TrialRecord]:
        """The ranked trials, then the pruned, infeasible and failed ones by number."""
        ranked = {trial.number for trial in self.ranked}
        return [*self.ranked, *(t for t in self.trials if t.is_finished and t.number not in ranked)]

    @cached_property
    def full_runs(self) -> list[FullRunRecord]:
        """The newest full run of each promoted trial, in the order of their first starts."""
        return list({run.trial: run for run in self.all_full_runs}.values())

    @cached_property
    def all_full_runs(self) -> list[FullRunRecord]:
        """Every trial of `<study>.full`: a run that was made longer has several."""
        study = full_study(self.study)
        runs = map(FullRunRecord.read, study.get_trials(deepcopy=False)) if study else ()
        return [run for run in runs if run is not None]

    def is_best(self, trial: TrialRecord) -> bool:
        return self.best is not None and trial.number == self.best.number

    def is_baseline(self, trial: TrialRecord) -> bool:
        return self.baseline is not None and trial.number == self.baseline.number

    def full_hours(self, trial: TrialRecord) -> float | None:
        """Projected hours of the full run at a trial's speed, for the length in `[full]` of today."""
        hours, then, now = trial.full_hours, trial.full_length, self.spec["full"]
        if hours is None or not then:
            return hours
        unit = next(iter(then))
        # Between samples and steps is the batch size, and with it the trial's parameters.
        return float(hours * now[unit] / then[unit]) if now.get(unit) else None

    def full_samples(self, trial: TrialRecord) -> int | None:
        """Samples of a trial's full run, in whole batches; None while the trial has no parameters."""
        if not trial.params:
            return None
        step_size, full = 1, self.spec["full"]
        for name in ("batch_size", "grad_accumulation"):
            default = self.spec["train"].get(name, TrainConfig.model_fields[name].default)
            step_size *= trial.params.get(f"train.{name}", default)
        return int(step_size * (full.get("steps") or math.ceil(full["samples"] / step_size)))

    def full_epochs(self, trial: TrialRecord) -> float | None:
        """Passes of a trial's full run over the training data; None if the size of the data is not known."""
        samples = self.full_samples(trial)
        return samples / self.num_samples if samples and self.num_samples else None

    @cached_property
    def pareto_front(self) -> set[int]:
        """Numbers of the trials that no other trial beats in both the metric and the full run's hours.

        A trial without projected hours is left out.
        """
        timed = [(trial, self.full_hours(trial)) for trial in self.ranked]
        costs = {trial.number: (self.sortable(trial.value or 0.0), hours) for trial, hours in timed if hours}
        front, newest = set(), (-math.inf, math.inf)
        for number, cost in sorted(costs.items(), key=lambda item: item[1]):
            # Each is faster than all that are better; trials of equal cost do not beat each other.
            if cost[1] < newest[1] or cost == newest:
                front.add(number)
                newest = cost
        return front

    def trials_since_improvement(self, min_delta: float) -> int:
        """Finished trials since the best value last improved by more than `min_delta`; 0 before the first value."""
        values = {trial.number: self.sortable(trial.value or 0.0) for trial in self.ranked}
        best, since = None, 0
        for trial in self.trials:
            value = values.get(trial.number)
            if value is not None and (best is None or value < best - min_delta):
                best, since = value, 0
            elif best is not None and trial.state in ("complete", "pruned", "infeasible"):
                since += 1
        return since

    def confirmation_run(self, number: int, seed: int) -> ConfirmationRun | None:
        """A confirmation run of a trial, complete or not."""
        return self.confirmation_runs.get(confirmation_run_name(number, seed))


def _is_confirmation_run(value: Any) -> bool:
    """Whether the tuner stored it: anybody may add attributes to a study."""
    return (
        isinstance(value, Mapping)
        and {"run_dir", "curve"} <= value.keys() <= ConfirmationRun.__dataclass_fields__.keys()
    )


# Stored as JSON, which turns the integer keys of `values` and `curve` into text.
_confirmation, _confirmation_run = TypeAdapter(Confirmation), TypeAdapter(ConfirmationRun)
