"""Check that a full run from step 0 repeats its trial's curve: if it does not, the trial did not predict it."""

from __future__ import annotations

import logging
import math

import optuna

from tuner.spec.setups import trial_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.keys import Deviation, confirmation_run_name, write_full_run
from tuner.study.record import FullRunRecord, StudyRecord, TrialRecord

log = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Allowed relative deviation if the trial did not run on several seeds."""


def own_curve(record: StudyRecord, trial: TrialRecord, seed: int) -> dict[int, float]:
    """A trial's values by point, followed by those of its confirmation on the study's own training seed."""
    confirmed = record.confirmation_run(trial.number, seed)
    return {**trial.curve, **(confirmed.curve if confirmed else {})}


def seed_spread(record: StudyRecord, trial: TrialRecord, seed: int, point: int) -> float | None:
    """Largest minus smallest value of a trial over its seeds at a point; None with fewer than two seeds."""
    prefix = confirmation_run_name(trial.number, 0).removesuffix("0")
    curves = [run.curve for name, run in record.confirmation_runs.items() if name.startswith(prefix)]
    # A confirmed trial's own seed is in it twice, which does not change the spread.
    values = {curve[point] for curve in (own_curve(record, trial, seed), *curves) if point in curve}
    return max(values) - min(values) if len(values) > 1 else None


class CurveCheck:
    """Compares a full run from step 0 with the trial's values at the same points."""

    def __init__(self, record: StudyRecord, spec: StudySpec, trial: TrialRecord) -> None:
        self.record, self.spec, self.trial = record, spec, trial
        self.expected: dict[int, float] = {}
        """The trial's values by samples; empty if its points are in seconds."""
        if spec.trial.unit != "seconds":
            samples = 1 if spec.trial.unit == "samples" else trial_setup(spec, trial.params).config.effective_batch_size
            curve = own_curve(record, trial, spec.baseline.seed)
            self.expected = {point * samples: value for point, value in curve.items()}

    def warn_if_blind(self, every: float) -> None:
        """Warn if a run that is validated every `every` samples meets none of the trial's points."""
        budget = self.spec.trial
        if budget.unit == "seconds":
            log.warning("the full run can't be compared with trial %d: its points are in seconds", self.trial.number)
            return
        if any(math.isclose(at / every, round(at / every), abs_tol=1e-6) for at in self.expected):
            return
        log.warning(
            "the full run can't be compared with trial %d: it is validated every %s samples, the trial was validated "
            "every %s %s up to %s; remove full.eval_every, or choose one that meets a point of the trial",
            self.trial.number,
            f"{every:,g}",
            f"{budget.budget / budget.evaluations:,g}",
            budget.unit,
            f"{budget.budget:,g}",
        )

    def check(self, curve: optuna.Trial, point: float, value: float) -> None:
        """Warn of a deviation, and store it with the full run's curve."""
        at = round(point)
        if at not in self.expected:
            return
        expected, spread = self.expected[at], None
        if self.spec.trial.unit == "samples":
            spread = seed_spread(self.record, self.trial, self.spec.baseline.seed, at)
        allowed = TOLERANCE * abs(expected) if spread is None else spread
        if abs(value - expected) <= allowed:
            return
        log.warning(
            "after %s samples %s is %.4f, and trial %d had %.4f: the full run deviates from it (allowed: %.4f, %s)",
            f"{at:,}",
            self.spec.study.metric,
            value,
            self.trial.number,
            expected,
            allowed,
            "5%" if spread is None else "the spread over seeds",
        )
        full_run = FullRunRecord.read(curve)
        before = list(full_run.deviations) if full_run else []
        if all(deviation["samples"] != at for deviation in before):
            deviation = Deviation(samples=at, trial=expected, full=value, allowed=allowed)
            write_full_run(curve, deviation=[*before, deviation])
