"""Detects that a run gets worse: its loss is far above the lowest level that it had, or stops improving.

A level is a median of a few values, and the noise is estimated from the loss's own newest values: one outlier is no
decline, and a noisy curve needs a larger rise than a quiet one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

GuardEvent = Literal["declined", "recovered"]


@dataclass(frozen=True)
class Rule:
    """When a loss counts as risen: `high` of its `newest` values are above its lowest level by more than its noise."""

    high: int
    newest: int
    window: int
    """Values whose median is a level."""
    first: int
    """No judgement before this number of values: a curve falls steeply at first."""
    noises: float
    share: float
    """The least rise, as a share of the level."""


TRAIN = Rule(high=4, newest=5, window=5, first=25, noises=8.0, share=0.10)
"""For the mean over a log interval, which is of other samples each time."""
VALIDATION = Rule(high=2, newest=3, window=3, first=8, noises=6.0, share=0.05)
HISTORY = 40
"""Values, before the newest ones, from which the noise is estimated."""


def noise_of(values: Sequence[float]) -> float:
    """The standard deviation of a curve around its trend, by the distance of values from their neighbours' mean."""
    distances = [abs(b - (a + c) / 2) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    # For normal noise of deviation 1 the distance has deviation sqrt(1.5), and its median is 1 / 1.4826 of that.
    return 1.4826 * median(distances) / math.sqrt(1.5) if distances else 0.0


@dataclass
class Series:
    """One loss over a run."""

    values: list[float] = field(default_factory=list)
    """The newest ones."""
    count: int = 0
    level: float = math.inf
    """The lowest median of `Rule.window` values in a row, without the newest ones."""

    def add(self, value: float, rule: Rule) -> str:
        """Add a value; returns by how much the loss has risen, in words, or "" if it has not."""
        self.values, self.count = [*self.values, value][-HISTORY - rule.newest :], self.count + 1
        before, newest = self.values[: -rule.newest], self.values[-rule.newest :]
        if len(before) >= rule.window:
            self.level = min(self.level, median(before[-rule.window :]))
        if self.count < rule.first:
            return ""
        noise, rise = noise_of(before), sorted(newest)[-rule.high] - self.level
        if rise <= max(rule.noises * noise, rule.share * abs(self.level)):
            return ""
        high, low = f"{self.level + rise:.4f}", f"{self.level:.4f} (noise: {noise:.4f})"
        return f"at least {high} in {rule.high} of the last {rule.newest} values, and its lowest level was {low}"


@dataclass
class Guard:
    """Watches the losses of one run. Its fields are plain values, stored in checkpoints."""

    train: Series = field(default_factory=Series)
    validation: Series = field(default_factory=Series)
    best: float = math.inf
    """The lowest validation loss."""
    since_best: int = 0
    """Validations since then."""
    declined: str = ""
    """Why the run is declining; empty while it is not. Only a new best validation clears it."""

    def add_train(self, loss: float) -> GuardEvent | None:
        """Add the training loss of a log interval; one that is not finite is left out."""
        return self._decline("train/loss is ", self.train.add(loss, TRAIN)) if math.isfinite(loss) else None

    def add_validation(self, loss: float, patience: int | None = None) -> GuardEvent | None:
        """Add a finite validation loss.

        Args:
            patience: Validations without a new best value that count as a decline.
        """
        risen = self.validation.add(loss, VALIDATION)
        if loss < self.best:
            self.best, self.since_best, was = loss, 0, self.declined
            self.declined = ""
            return "recovered" if was else None
        self.since_best += 1
        if not risen and patience is not None and self.since_best >= patience:
            return self._decline("val/loss ", f"has not been below {self.best:.4f} in {self.since_best} validations")
        return self._decline("val/loss is ", risen)

    def _decline(self, subject: str, reason: str) -> GuardEvent | None:
        """A decline is reported once, until the run has recovered."""
        if not reason or self.declined:
            return None
        self.declined = subject + reason
        return "declined"
