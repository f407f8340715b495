"""What a study has found so far, read from its storage at once: its page, its plots and its files show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trainer.config import TrainConfig
from tuner.full.confirmed import Confirmation, stored_confirmation
from tuner.full.runs import newest_curves
from tuner.trials import BASELINE, ENDED, full_hours, not_beaten, ranking, state_of, stored_values

PLAIN = ("complete", "running", "waiting")


@dataclass(frozen=True)
class Findings:
    """A study's trials and full runs."""

    name: str
    study_id: int
    spec: Mapping[str, Any]
    """As stored, as plain values: looking must not need the workload's module."""
    minimized: bool
    trials: list[FrozenTrial]
    ranked: list[FrozenTrial]
    """Complete and feasible, the best one first."""
    not_beaten: set[int]
    """Numbers of the trials that no other beats in both metric and the full run's hours."""
    full_runs: list[FrozenTrial]
    """The curves of `<study>.full`, the newest one of each promoted trial."""
    confirmation: Confirmation | None
    """The last one that came to its end."""
    ended: str
    """Why the last launch came to its end; empty while one is under way or was stopped."""

    @classmethod
    def of(cls, study: optuna.Study) -> Findings:
        """Read a study.

        Raises:
            UserError: It is no study of this tuner.
        """
        trials = study.get_trials(deepcopy=False)
        return cls(
            name=study.study_name,
            study_id=study._study_id,
            spec=stored_values(study),
            minimized=study.direction == StudyDirection.MINIMIZE,
            trials=trials,
            ranked=ranking(study, trials),
            not_beaten=not_beaten(study, trials),
            full_runs=newest_curves(study),
            confirmation=stored_confirmation(study),
            ended=study.user_attrs.get(ENDED, ""),
        )

    def full_hours(self, trial: FrozenTrial) -> float | None:
        """Projected hours of the full run at a trial's speed."""
        return full_hours(trial, self.spec["full"])

    @property
    def metric(self) -> str:
        return str(self.spec["study"]["metric"])

    @property
    def best(self) -> FrozenTrial | None:
        return self.ranked[0] if self.ranked else None

    @cached_property
    def baseline(self) -> FrozenTrial | None:
        """The trial of the settings as given."""
        known = (t for t in self.trials if t.user_attrs.get(BASELINE) and t.state != TrialState.FAIL)
        return next(known, None)

    @cached_property
    def finished(self) -> list[FrozenTrial]:
        """The ranked trials, then the pruned, infeasible and failed ones by number."""
        ranked = {trial.number for trial in self.ranked}
        others = (t for t in self.trials if t.state.is_finished() and t.number not in ranked)
        return [*self.ranked, *others]

    def is_baseline(self, trial: FrozenTrial) -> bool:
        return self.baseline is not None and trial.number == self.baseline.number

    def is_best(self, trial: FrozenTrial) -> bool:
        return self.best is not None and trial.number == self.best.number

    def role(self, trial: FrozenTrial) -> str:
        """best, baseline, or the trial's state. The best one is that even where it is the baseline, and an
        infeasible baseline is infeasible."""
        state = state_of(trial)
        return "best" if self.is_best(trial) else "baseline" if self.is_baseline(trial) and state in PLAIN else state

    def samples_at(self, trial: FrozenTrial) -> dict[int, float]:
        """Samples seen at each reported point of a trial, by the point as reported (in the budget's unit).

        Empty where the budget is in seconds and the trial did not get to its end, so that its speed is unknown.
        """
        points, budget = trial.intermediate_values, self.spec["trial"]
        if "steps" in budget:
            train = {k.partition(".")[2]: v for k, v in trial.params.items() if k.startswith("train.")}
            config = TrainConfig.model_validate({**self.spec["train"], **train, "steps": 1})
            return {point: float(point * config.effective_batch_size) for point in sorted(points)}
        speed = trial.user_attrs.get("samples_per_second") if "seconds" in budget else 1.0
        return {} if speed is None else {point: point * speed for point in sorted(points)}
