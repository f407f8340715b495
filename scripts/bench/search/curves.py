"""Recorded learning curves, queried as if they were trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from scripts.bench.common import RECORDS
from trainer.errors import UserError
from tuner.study.trial_length import RISING

Floats = NDArray[np.float64]


def find_curves(grid: str) -> Path:
    return RECORDS / f"curves_{grid}.json"


@dataclass(frozen=True)
class Configuration:
    """A point of the search space."""

    batch_size: int
    d_coef: float


@dataclass(frozen=True)
class Curves:
    """The curves of a grid; between two recorded d_coefs, their mean weighted by log distance."""

    batch_sizes: Sequence[int]
    d_coefs: Floats
    seeds: Sequence[int]
    points: NDArray[np.int64]
    """Samples at each validation, [points]."""
    losses: Floats
    """[batch size, d_coef, seed, point]; infinite once a run has diverged."""
    d: Floats
    """Prodigy's, with the same axes; NaN once a run has diverged."""

    @classmethod
    def load(cls, path: Path) -> Curves:
        """Read a file of scripts.bench.search.record.

        Raises:
            UserError: The file does not exist, or curves are missing.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: record it with scripts.bench.search.record.") from None
        grid = record["grid"]
        points = np.arange(record["every"], record["length"] + 1, record["every"])
        shape = (len(grid["batch_sizes"]), len(grid["d_coefs"]), len(grid["seeds"]), len(points))
        losses, steps_d = np.full(shape, np.nan), np.full(shape, np.nan)
        for curve in record["curves"]:
            place = (
                grid["batch_sizes"].index(curve["batch_size"]),
                grid["d_coefs"].index(curve["d_coef"]),
                grid["seeds"].index(curve["seed"]),
            )
            losses[place] = np.inf
            losses[place][: len(curve["loss"])] = curve["loss"]
            steps_d[place][: len(curve["d"])] = curve["d"]
        if missing := int(np.isnan(losses[..., 0]).sum()):
            raise UserError(f"{path}: {missing} curves are missing; scripts.bench.search.record continues it.")
        return cls(grid["batch_sizes"], np.array(grid["d_coefs"]), grid["seeds"], points, losses, steps_d)

    @property
    def length(self) -> int:
        """The full run's, in samples."""
        return int(self.points[-1])

    def curve(self, configuration: Configuration, seed: int) -> Floats:
        """Losses at `points`, under the recorded training seed of this index."""
        return self._between(self.losses, configuration, seed)

    def rising(self, configuration: Configuration, seed: int) -> NDArray[np.bool_]:
        """Whether d rose since the point before, as the tuner marks a trial, [points]."""
        d = self._between(self.d, configuration, seed)
        return np.append(True, d[1:] > RISING * d[:-1])

    def _between(self, values: Floats, configuration: Configuration, seed: int) -> Floats:
        table: Floats = values[self.batch_sizes.index(configuration.batch_size), :, seed]
        at = np.interp(np.log(configuration.d_coef), np.log(self.d_coefs), np.arange(len(self.d_coefs)))
        low = int(at)
        high, share = min(low + 1, len(self.d_coefs) - 1), at - low
        between: Floats = table[low] if share == 0 else (1 - share) * table[low] + share * table[high]
        return between

    def regret(self, configuration: Configuration) -> float:
        """The share by which its full-length loss, the seeds' mean, is above the best recorded one's."""
        best = self.losses[..., -1].mean(axis=2).min()
        value = np.mean([self.curve(configuration, seed)[-1] for seed in range(len(self.seeds))])
        return float(value / best - 1)

    def rank_correlation(self, samples: int, *, resting: bool = False) -> float:
        """Spearman's, between all curves after `samples` and at full length; the mean over the seeds.

        Args:
            resting: Only of curves whose d no longer rose then.
        """
        at = int(np.searchsorted(self.points, samples))
        shown = self.d[..., at] <= RISING * self.d[..., at - 1] if resting else np.isfinite(self.losses[..., at])
        values = []
        for seed in range(len(self.seeds)):
            table = self.losses[:, :, seed][shown[:, :, seed]]
            values.append(spearmanr(table[:, at], table[:, -1]).statistic)
        return float(np.mean(values))
