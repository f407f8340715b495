"""What short trials tell of a longer run: its optimal batch size is larger.

The optimal batch size grows with the square root of a run's length (`GROWTH`). So a batch size of 32 is in a run of
16 times a trial's length as good as 8 is in a trial, up to the largest one of the space; the other parameters are as
good as they are in a trial. Over the curves in scripts/records this recommends better than the trials' own order with
15 trials, and worse with five; a model of all evaluations of the trials, and one that learns the growth from them, do
no better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from scipy.special import ndtr

from tuner.study.coordinates import choose, encode, features, find_largest, is_inside, log_range
from tuner.study.keys import Recommendation
from tuner.study.record import TrialRecord
from tuner.study.surrogate import Surrogate, single_threaded, standardized

Floats = NDArray[np.float64]

BATCH_SIZE = "train.batch_size"
GROWTH = 0.5
"""Exponent with which the optimal batch size grows with a run's length: 0.4 to 0.5 in the literature (Zhang et al.
2024, Bergsma et al. 2025)."""
MAX_TRIALS = 50
"""Number of the best trials, and of the newest, that the model has: its time grows with the cube of the number. Each
complete trial may be recommended, by the model alone if its own value is not among these."""


class HorizonModel:
    """A model of trials, of which at least one is comparable.

    A pruned trial counts with its last value less the median gain of complete trials from that point to their end.

    Args:
        ended: Complete, pruned and infeasible trials.
        running: They count as average trials, so that workers do not propose the same.
        horizon: Length of the longer run, in the unit of the trials' points; None: that of a trial.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        ended: Sequence[TrialRecord],
        *,
        minimized: bool = True,
        horizon: float | None = None,
        running: Sequence[TrialRecord] = (),
    ) -> None:
        sign = 1.0 if minimized else -1.0
        values = {number: sign * value for number, value in find_values(ended).items()}
        trials = {trial.number: trial for trial in ended}
        # Those first that may be recommended: the model has the best of them in any case.
        ranked = sorted(values, key=lambda number: (not is_comparable(trials[number]), values[number]))
        numbers = sorted({*ranked[:MAX_TRIALS], *list(values)[-MAX_TRIALS:]}, key=values.__getitem__)
        known = [trials[number] for number in numbers]
        self.tried = [trials[number] for number in ranked if is_comparable(trials[number])]
        """The complete ones, the best first; with a horizon only those whose batch size is not below the best one's."""
        end = max(max(trial.curve) for trial in self.tried)
        self.growth = max(horizon / end, 1.0) ** GROWTH if horizon else 1.0
        shift = 1.0
        if horizon and log_range(space.get(BATCH_SIZE)):
            smallest = self.tried[0].params[BATCH_SIZE]
            self.tried = [trial for trial in self.tried if trial.params[BATCH_SIZE] >= smallest]
            # Not beyond the space: what is best at its largest batch size stays so, and no trial tells of larger ones.
            shift = min(self.growth, find_largest(space[BATCH_SIZE]) / smallest)
        self.surrogate = Surrogate(
            encode(space, [trial.params for trial in (*known, *running)]),
            np.append(standardized([values[number] for number in numbers]), np.zeros(len(running))),
            build_shift(space, shift),
        )
        self.inputs = encode(space, [trial.params for trial in self.tried])
        self._chosen = int(self.surrogate.mean(self.inputs).argmin())

    @property
    def best(self) -> TrialRecord:
        """The tried one with the lowest mean in the longer run."""
        return self.tried[self._chosen]

    def recommend(self) -> Recommendation:
        mean, covariance = self.surrogate.predict(self.inputs[[0, self._chosen]])
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        better = (mean[0] - mean[1]) / math.sqrt(max(variance, 1e-12))
        return Recommendation(
            trial=self.best.number,
            best=self.tried[0].number,
            probability=float(ndtr(better)),
            growth=self.growth,
        )


@single_threaded
def recommend(
    space: Mapping[str, BaseDistribution], trials: Sequence[TrialRecord], *, minimized: bool, horizon: float | None
) -> Recommendation | None:
    """The trial to promote; None where a longer run is not known to change anything: no batch size is searched on a log
    scale, or the horizon is not known in the unit of the trials."""
    # In a space that became wider or was changed by hand a trial may have a value that is no longer a choice.
    with_space = [trial for trial in trials if is_inside(space, trial.params)]
    if not log_range(space.get(BATCH_SIZE)) or horizon is None or not any(map(is_comparable, with_space)):
        return None
    ended = [trial for trial in with_space if trial.is_finished and trial.state != "failed"]
    return HorizonModel(space, ended, minimized=minimized, horizon=horizon).recommend()


def is_comparable(trial: TrialRecord) -> bool:
    """Whether it may be recommended: it is complete and feasible, and has a finite value."""
    return trial.state == "complete" and trial.is_feasible and bool(trial.curve) and math.isfinite(trial.value or 0.0)


def find_values(ended: Sequence[TrialRecord]) -> dict[int, float]:
    """The values of feasible trials at their end, by number; estimated for pruned ones."""
    complete, values = [trial for trial in ended if is_comparable(trial)], {}
    for trial in ended:
        if not trial.is_feasible or not trial.curve:
            continue
        last = max(trial.curve)
        value = trial.curve[last] if trial.value is None else trial.value
        if trial.state == "pruned":
            gains = [each.curve[last] - (each.value or 0.0) for each in complete if last in each.curve]
            value -= median(gains) if gains else 0.0
        if math.isfinite(value):
            values[trial.number] = value
    return values


def build_shift(space: Mapping[str, BaseDistribution], growth: float) -> Floats:
    """[coordinates]: the growth of the batch size as a share of its range; 0 for the others."""
    shift: list[float] = []
    for name, distribution in space.items():
        if name == BATCH_SIZE and log_range(distribution):
            shift.append(math.log(growth) / log_range(distribution))
        else:
            shift += [0.0] * len(features(distribution, choose(distribution, 0.0)))
    return np.array(shift)
