"""A full run from step 0 must retrace its trial's curve: where it does not, the trial's promise does not hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tuner.full.confirmation import own_curve, seed_spread
from tuner.full.runs import DEVIATION
from tuner.search_space import trial_setup
from tuner.spec import StudySpec

log = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Relative deviation that is let pass where no seeds were compared."""


class Retracing:
    """Holds a run from step 0 against the trial's values at the same points."""

    def __init__(self, study: optuna.Study, spec: StudySpec, trial: FrozenTrial) -> None:
        self.study, self.spec, self.trial = study, spec, trial
        self.expected: dict[int, float] = {}
        """The trial's values, by samples; none where its points are in seconds."""
        if spec.trial.unit != "seconds":
            samples = 1 if spec.trial.unit == "samples" else trial_setup(spec, trial.params).config.effective_batch_size
            self.expected = {at * samples: value for at, value in own_curve(study, spec, trial).items()}

    def say_if_blind(self, every: float) -> None:
        """Warn where a run that is validated after `every` samples meets none of the trial's points."""
        if self.spec.trial.unit == "seconds":
            log.warning("the full run can't be held against trial %d, whose points are in seconds", self.trial.number)
            return
        if any(math.isclose(at / every, round(at / every), abs_tol=1e-6) for at in self.expected):
            return
        points = f"every {self.spec.trial.budget / self.spec.trial.evaluations:,g} {self.spec.trial.unit}"
        log.warning(
            "the full run can't be held against trial %d: it is validated every %s samples, the trial was %s up to %s; "
            "leave full.eval_every out, or choose one that meets a point of the trial",
            self.trial.number,
            f"{every:,g}",
            points,
            f"{self.spec.trial.budget:,g}",
        )

    def check(self, curve: optuna.Trial, point: float, value: float) -> None:
        """Warn of a deviation, and record it with the full run's curve."""
        at = round(point)
        if at not in self.expected:
            return
        expected = self.expected[at]
        spread = seed_spread(self.study, self.spec, self.trial, at) if self.spec.trial.unit == "samples" else None
        allowed = TOLERANCE * abs(expected) if spread is None else spread
        if abs(value - expected) <= allowed:
            return
        log.warning(
            "after %s samples %s is %.4f, and trial %d had %.4f: the full run does not retrace it (allowed: %.4f, %s)",
            f"{at:,}",
            self.spec.study.metric,
            value,
            self.trial.number,
            expected,
            allowed,
            "5%" if spread is None else "the spread over seeds",
        )
        found: Sequence[dict[str, Any]] = curve.user_attrs.get(DEVIATION, [])
        if all(entry["samples"] != at for entry in found):
            entry = {"samples": at, "trial": expected, "full": value, "allowed": allowed}
            curve.set_user_attr(DEVIATION, [*found, entry])
