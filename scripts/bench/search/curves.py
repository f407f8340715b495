"""Recorded learning curves, queried as if they were trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.bench.common import RECORDS, Record
from trainer.config import TrainConfig
from trainer.errors import UserError
from tuner.study.trial_length import is_rising

Floats = NDArray[np.float64]

NUM_NEIGHBOURS = 3
D0 = TrainConfig.model_fields["d0"].default


def find_curves(task: str) -> Path:
    return RECORDS / f"curves_{task}.json"


@dataclass(frozen=True)
class Configuration:
    """A point of the search space."""

    batch_size: int
    d_coef: float


@dataclass(frozen=True)
class Curves:
    """A task's curves. Between two recorded d_coefs: their mean weighted by log distance.

    The tables have the axes [batch size, d_coef, seed]. A configuration that was not recorded under a seed has the
    curve of seed 0 there. A run that diverged has infinite losses.
    """

    batch_sizes: Sequence[int]
    d_coefs: Floats
    points: NDArray[np.int64]
    """Samples at each validation, [points]."""
    lengths: NDArray[np.int64]
    """Those with an annealed loss, in samples; the last one is the full run's."""
    loss: Floats
    """[batch size, d_coef, seed, point]"""
    average: Floats
    """The averaged weights' loss, with the same axes."""
    d: Floats
    """Prodigy's, with the same axes; NaN once a run has diverged."""
    annealed: Floats
    """[batch size, d_coef, seed, length]"""
    recorded: NDArray[np.bool_]

    @classmethod
    def load(cls, path: Path, *, fill: bool = False) -> Curves:
        """Read a file of scripts.bench.search.record.

        Args:
            fill: Curves of seed 0 that are not recorded yet are means of their nearest neighbours. For trying only.

        Raises:
            UserError: The file does not exist, or curves of seed 0 are missing.
        """
        curves = cls.load_recorded(path)
        if missing := int((~curves.recorded[..., 0]).sum()):
            if not fill:
                raise UserError(f"{path}: {missing} curves of seed 0 are missing: run scripts.bench.search.record.")
            fill_missing(curves)
        return curves

    @classmethod
    def load_recorded(cls, path: Path) -> Curves:
        """As `load`; NaN where seed 0 is not recorded."""
        record = read_record(path)
        grid, num_points = record["grid"], len(record["points"])
        lengths = [int(length) for length in record["curves"][0]["annealed"]]
        recorded = np.zeros(list_axes(record), bool)
        for curve in record["curves"]:
            recorded[find_place(grid, curve)] = True
        loss, average, d = (build_table(record, name, num_points) for name in ("loss", "average", "d"))
        annealed = build_table(record, "annealed", len(lengths))
        for table in (loss, average, d, annealed):
            table[:] = np.where(recorded[..., None], table, table[:, :, :1])
        d_coefs, points = np.array(grid["d_coefs"]), np.array(record["points"])
        return cls(grid["batch_sizes"], d_coefs, points, np.array(lengths), loss, average, d, annealed, recorded)

    @property
    def length(self) -> int:
        """The full run's, in samples."""
        return int(self.lengths[-1])

    @property
    def num_seeds(self) -> int:
        """Of the training runs."""
        return int(self.recorded.shape[2])

    @property
    def truth(self) -> Floats:
        """The annealed loss at full length, mean over the recorded seeds, [batch size, d_coef]."""
        mean: Floats = np.mean(self.annealed[..., -1], axis=2, where=self.recorded | ~self.recorded[..., :1])
        return mean

    def losses(self, configuration: Configuration, seed: int) -> Floats:
        """At `points`."""
        return self._between(self.loss[:, :, seed], configuration)

    def annealed_loss(self, configuration: Configuration, seed: int, length: int) -> float:
        """The run's of this length, whose rate decays over the last fifth.

        Raises:
            UserError: No run of this length was annealed.
        """
        at = np.flatnonzero(self.lengths == length)
        if not len(at):
            raise UserError(
                f"no annealed loss at {length:,} samples: recorded are {', '.join(map(str, self.lengths))}."
            )
        return float(self._between(self.annealed[:, :, seed, at[0]], configuration))

    def d_at(self, configuration: Configuration, seed: int) -> list[float]:
        """Prodigy's d at `points`."""
        d: list[float] = self._between(self.d[:, :, seed], configuration).tolist()
        return d

    def rising(self, configuration: Configuration, seed: int) -> list[bool]:
        """Whether d rises at each of `points`, as the tuner marks a trial."""
        d = self.d_at(configuration, seed)
        return [is_rising(d[: number + 1], D0) for number in range(len(d))]

    def regret(self, configuration: Configuration) -> float:
        """The share by which its annealed loss at full length is above the best recorded one."""
        return float(self._between(self.truth, configuration) / self.truth.min() - 1)

    def _between(self, values: Floats, configuration: Configuration) -> Floats:
        row = values[self.batch_sizes.index(configuration.batch_size)]
        at = np.interp(np.log(configuration.d_coef), np.log(self.d_coefs), np.arange(len(self.d_coefs)))
        low = int(at)
        share = at - low
        between: Floats = row[low] if share == 0 else (1 - share) * row[low] + share * row[low + 1]
        return between


def read_record(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: record it with scripts.bench.search.record.") from None
    return record


def list_axes(record: Record) -> tuple[int, int, int]:
    """The numbers of batch sizes, d_coefs and seeds."""
    grid, last_seed = record["grid"], max(curve["seed"] for curve in record["curves"])
    return len(grid["batch_sizes"]), len(grid["d_coefs"]), last_seed + 1


def build_table(record: Record, name: str, num_values: int) -> Floats:
    """One value of the curves, [batch size, d_coef, seed, value]; NaN where it is not recorded. A run that diverged has
    fewer values, and lacks some annealed ones."""
    table = np.full((*list_axes(record), num_values), np.nan)
    for curve in record["curves"]:
        row = table[find_place(record["grid"], curve)]
        values = curve[name].values() if name == "annealed" else curve[name]
        row[:] = np.nan if name == "d" else np.inf
        row[: len(values)] = [np.inf if value is None else value for value in values]
    return table


def find_place(grid: Mapping[str, Sequence[float]], curve: Mapping[str, Any]) -> tuple[int, int, int]:
    """A curve's index in the tables."""
    size, d_coef = grid["batch_sizes"].index(curve["batch_size"]), grid["d_coefs"].index(curve["d_coef"])
    return size, d_coef, curve["seed"]


def fill_missing(curves: Curves) -> None:
    """Write the curves that no seed has: the nearest neighbours' in the plane of the logarithms, weighted by inverse
    distance."""
    size, d_coef = np.meshgrid(np.log(curves.batch_sizes), np.log(curves.d_coefs), indexing="ij")
    plane = np.stack([size, d_coef], axis=-1)
    known = np.argwhere(curves.recorded[..., 0])
    for place in np.argwhere(~curves.recorded[..., 0]):
        distances = np.linalg.norm(plane[tuple(known.T)] - plane[tuple(place)], axis=1)
        nearest = distances.argsort()[:NUM_NEIGHBOURS]
        weights = 1 / distances[nearest]
        for table in (curves.loss, curves.average, curves.d, curves.annealed):
            table[*place] = np.average(table[*known[nearest].T, 0], axis=0, weights=weights)
