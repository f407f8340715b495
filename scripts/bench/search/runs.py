"""The runs that a search trains, on recorded curves, and their compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from scripts.bench.search.curves import Configuration, Curves, Floats

Run = tuple[Configuration, int]
"""A configuration and a training seed."""


@dataclass(frozen=True)
class Task:
    """One search."""

    curves: Curves
    train_seed: int
    """The recorded training seed that trials run under."""
    seed: int
    """The strategy's own."""
    budget: int
    """In samples. No trial starts after it is spent."""


class Choice(NamedTuple):
    """The configuration that a search would promote after some compute, in samples."""

    spent: int
    configuration: Configuration
    contained: int = 0
    """The part of it that the promoted run contains: its own trial, which it continues."""


@dataclass
class Runs:
    """All runs of a search. A run that is continued is counted once."""

    curves: Curves
    trained: dict[Run, int] = field(default_factory=dict)
    """Samples at the constant rate."""
    decays: dict[tuple[Configuration, int, int], int] = field(default_factory=dict)
    """By run and length, the samples of the decay, which branches off."""

    def copy(self) -> Runs:
        return Runs(self.curves, dict(self.trained), dict(self.decays))

    @property
    def spent(self) -> int:
        return sum(self.trained.values()) + sum(self.decays.values())

    def train(self, configuration: Configuration, seed: int, until: int) -> Floats:
        """Train up to a point, or continue to it; the losses at all points so far."""
        run = configuration, seed
        self.trained[run] = max(until, self.trained.get(run, 0))
        return self.curves.losses(configuration, seed)[: np.searchsorted(self.curves.points, until, side="right")]

    def anneal(self, configuration: Configuration, seed: int, length: int) -> float:
        """Train up to four fifths of the length, then decay the rate over the rest; the loss at the end."""
        self.train(configuration, seed, length * 4 // 5)
        self.decays[configuration, seed, length] = length - length * 4 // 5
        return self.curves.annealed_loss(configuration, seed, length)

    def choose(self, configuration: Configuration, seed: int) -> Choice:
        """The choice of this configuration now, whose run under the seed is continued."""
        return Choice(self.spent, configuration, self.trained.get((configuration, seed), 0))
