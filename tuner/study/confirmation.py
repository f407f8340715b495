"""The result of a confirmation: the best trials and the baseline after a longer run, on several seeds.

Imports no torch: `tuner status` reads it. `tuner.study.keys` stores it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class ConfirmedTrial:
    """A trial's values at the end of the confirmation."""

    number: int
    params: dict[str, Any]
    values: dict[int, float]
    """By training seed."""
    failed: str = ""
    """Why one of its runs ended early; such a trial can't win."""

    @property
    def mean(self) -> float:
        return mean(self.values.values())

    @property
    def spread(self) -> float:
        """Largest minus smallest value over the seeds."""
        return max(self.values.values()) - min(self.values.values())


@dataclass(frozen=True)
class Confirmation:
    """The result of the longer runs."""

    metric: str
    minimized: bool
    unit: str
    rung: int
    """Length of the runs in `unit`: samples, steps or seconds."""
    trials: list[ConfirmedTrial]
    """The best mean first; failed trials last."""
    baseline: int | None
    """Number of the baseline among them."""

    @property
    def winner(self) -> ConfirmedTrial:
        return self.trials[0]

    def margin(self, trial: ConfirmedTrial) -> float | None:
        """By how much its mean is better than the baseline's; None if one of them has no mean."""
        base = next((each for each in self.trials if each.number == self.baseline), None)
        if base is None or base.failed or trial.failed:
            return None
        return base.mean - trial.mean if self.minimized else trial.mean - base.mean

    @property
    def noise(self) -> float | None:
        """Spread over the seeds, pooled (root mean square) over the trials; None with one seed."""
        spreads = [trial.spread for trial in self.trials if not trial.failed and len(trial.values) > 1]
        return math.sqrt(mean(spread**2 for spread in spreads)) if spreads else None

    @property
    def verdict(self) -> str:
        """The result in one line."""
        name, margin, noise = f"trial {self.winner.number}", self.margin(self.winner), self.noise
        if self.winner.number == self.baseline:
            return f"the baseline ({name}) is the best of them: the study found nothing better"
        if margin is None:
            return f"{name} is the best of them; the baseline has no value to compare it with"
        if noise is None:
            return f"{name} is {margin:.4f} better than the baseline; one seed does not show how much of it is noise"
        if margin < noise:
            return f"{name} is within noise of the baseline: {margin:.4f} better, and seeds alone differ by {noise:.4f}"
        return f"{name} is {margin:.4f} better than the baseline, and seeds alone differ by {noise:.4f}"


@dataclass(frozen=True)
class ConfirmationRequest:
    """The options of a confirmation, as the command line has them."""

    num_trials: int
    num_seeds: int
    rung: int
    best: int
    """Number of the study's best trial when the confirmation began."""

    @property
    def options(self) -> str:
        return f"--confirm {self.num_trials} --seeds {self.num_seeds} --rung {self.rung}"


@dataclass(frozen=True)
class ConfirmationRun:
    """One run of a confirmation: a trial on one seed."""

    run_dir: str
    curve: dict[int, float]
    """Value by point of the evaluation grid."""
    failed: str = ""
    hook: dict[str, float] = field(default_factory=dict)
    """Metrics of [hooks] at the end of the curve, if it judges."""
