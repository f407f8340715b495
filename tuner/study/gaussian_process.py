"""A sampler for few, expensive trials: a Gaussian process over all of them, averaged over its hyperparameters.

Expected improvement as in Jones et al. 1998; averaging over hyperparameters as in Snoek et al. 2012, by fixed draws
from their priors, weighted by likelihood: nothing is optimized, so nothing fails to converge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr, ndtri
from scipy.stats import qmc

Floats = NDArray[np.float64]

DRAWS = 64
"""Number of draws of the hyperparameters; a power of two."""
CANDIDATES = 512
"""Number of candidates over the whole space, besides those around the best trial; a power of two."""
LENGTH_SCALE = (-0.5, 0.7)
NOISE = (-5.0, 1.5)
"""Mean and standard deviation of the logarithm: of length scales in shares of a parameter's range, of the noise
variance in that of the values."""
FEASIBLE_LENGTH = 0.7


class GaussianProcessSampler(BaseSampler):
    """Proposes where expected improvement times the probability of being feasible is largest.

    Numeric choices are ordered: the result of batch size 8 informs about 16. A pruned trial counts with its last value
    less the median gain of complete trials from that point to their end; a running trial counts as an average one, so
    that workers do not propose the same. Proposals are a pure function of the seed, the trial's number and the study's
    trials.

    Args:
        n_startup_trials: Number of finished trials before which points of a Sobol sequence are proposed.
    """

    def __init__(self, seed: int = 0, n_startup_trials: int = 3) -> None:
        if n_startup_trials < 1:
            raise ValueError(f"n_startup_trials {n_startup_trials} must be at least 1")
        self._seed, self._n_startup_trials = seed, n_startup_trials
        self._asked: dict[str, int] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = intersection_search_space(study.get_trials(deepcopy=False), include_pruned=True)
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A coordinate of this trial's Sobol point: used before any trial has ended."""
        axis = self._asked.setdefault(param_name, len(self._asked))
        return choose(param_distribution, self._sobol(trial.number, axis + 1)[axis])

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        trials = [t for t in study.get_trials(deepcopy=False) if search_space.keys() <= t.params.keys()]
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        values = {t.number: sign * value for t, value in zip(ended, values_at_end(ended), strict=True)}
        known = [t for t in ended if is_feasible(t) and math.isfinite(values[t.number])]
        if len(ended) < self._n_startup_trials or not known:
            point = self._sobol(trial.number, len(search_space))
            return {name: choose(d, u) for (name, d), u in zip(search_space.items(), point, strict=True)}
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number]
        rng = np.random.default_rng([self._seed, trial.number])
        best = min(known, key=lambda t: values[t.number])
        proposals = propose(search_space, best.params, rng)
        candidates = encode(search_space, proposals)
        targets = standardized([values[t.number] for t in known])
        score = expected_improvement(
            encode(search_space, [t.params for t in (*known, *running)]),
            np.concatenate([targets, np.full(len(running), targets.mean())]),
            candidates,
        )
        infeasible = np.array([not is_feasible(t) for t in ended], dtype=float)
        if infeasible.any():
            score *= feasibility(encode(search_space, [t.params for t in ended]), infeasible, candidates)
        return proposals[int(score.argmax())]

    def _sobol(self, number: int, dimensions: int) -> Floats:
        engine = qmc.Sobol(max(dimensions, 8), rng=np.random.default_rng(self._seed))
        points: Floats = engine.random_base2(number.bit_length())
        return points[number, :dimensions]


def is_feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def values_at_end(trials: Sequence[FrozenTrial]) -> list[float]:
    """Each trial's value at its end, estimated for a pruned trial; NaN for a trial that reported nothing."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE]

    def value_of(trial: FrozenTrial) -> float:
        if trial.state == TrialState.COMPLETE:
            return math.nan if trial.value is None else trial.value
        step = trial.last_step
        if step is None:
            return math.nan
        gains = [t.intermediate_values[step] - (t.value or 0.0) for t in complete if step in t.intermediate_values]
        return trial.intermediate_values[step] - (float(np.median(gains)) if gains else 0.0)

    return [value_of(trial) for trial in trials]


def choose(distribution: BaseDistribution, share: float) -> Any:
    """A parameter's value at a share, 0 to 1, of its range; choices that are numbers in their order."""
    if isinstance(distribution, CategoricalDistribution):
        choices = ordered(distribution)
        return choices[min(int(share * len(choices)), len(choices) - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    # Each whole number gets an equal width of the range.
    margin = 0.5 * (distribution.step or 0) if isinstance(distribution, IntDistribution) else 0.0
    low, high = low - margin, high + margin
    value = math.exp(math.log(low) + share * math.log(high / low)) if distribution.log else low + share * (high - low)
    if distribution.step is not None:
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
    value = min(max(value, distribution.low), distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


def features(distribution: BaseDistribution, value: Any) -> list[float]:
    """Coordinates of a parameter's value: one from 0 to 1, or one for each choice if they have no order."""
    if isinstance(distribution, CategoricalDistribution):
        choices = ordered(distribution)
        at = choices.index(value)
        if is_ordered(distribution):
            return [at / (len(choices) - 1)]
        return [math.sqrt(0.5) * (number == at) for number in range(len(choices))]  # 1 apart
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    return [math.log(value / low) / math.log(high / low) if distribution.log else (value - low) / (high - low)]


def is_ordered(distribution: CategoricalDistribution) -> bool:
    return all(isinstance(c, int | float) and not isinstance(c, bool) for c in distribution.choices)


def ordered(distribution: CategoricalDistribution) -> list[Any]:
    return sorted(distribution.choices) if is_ordered(distribution) else list(distribution.choices)


def encode(space: Mapping[str, BaseDistribution], params: Sequence[Mapping[str, Any]]) -> Floats:
    """[trials, coordinates]."""
    return np.array([[x for name, d in space.items() for x in features(d, each[name])] for each in params])


def propose(
    space: Mapping[str, BaseDistribution], best: Mapping[str, Any], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Candidates: over the whole space, and about the best trial, at two distances."""
    whole = qmc.Sobol(len(space), rng=rng).random(CANDIDATES)
    near = []
    for name, distribution in space.items():
        place = features(distribution, best[name])
        # Choices without order keep the best value here; others come from the whole space.
        kept = isinstance(distribution, CategoricalDistribution) and not is_ordered(distribution)
        width = np.repeat([0.1, 0.02], CANDIDATES // 4)
        if kept:
            assert isinstance(distribution, CategoricalDistribution)
            at = (ordered(distribution).index(best[name]) + 0.5) / len(distribution.choices)
            near.append(np.full(len(width), at))
        else:
            near.append(np.clip(place[0] + rng.normal(size=len(width)) * width, 0, 1))
    points = np.vstack([whole, np.column_stack(near)])
    return [{name: choose(d, u) for (name, d), u in zip(space.items(), point, strict=True)} for point in points]


def standardized(values: Sequence[float]) -> Floats:
    """Values with mean 0 and deviation 1. Values far above the median, of diverged runs, are clipped: otherwise all
    good trials would look alike."""
    array = np.array(values)
    low, median = array.min(), np.median(array)
    if median > low:
        array = np.minimum(array, median + 2 * (median - low))
    standard: Floats = (array - array.mean()) / (array.std() or 1.0)
    return standard


def expected_improvement(known: Floats, targets: Floats, candidates: Floats) -> Floats:
    """Expected improvement of each candidate over the best known point, [candidates]; targets are standardized.

    Averaged over draws of the length scales and the noise, and in closed form over the scale of the values.
    """
    n = len(known)
    draws = qmc.Sobol(known.shape[1] + 1, rng=np.random.default_rng(0)).random(DRAWS)
    normal = ndtri(np.clip(draws, 0.01, 0.99))
    scales = np.exp(LENGTH_SCALE[0] + LENGTH_SCALE[1] * normal[:, :-1])
    noises = np.exp(NOISE[0] + NOISE[1] * normal[:, -1])
    weights, improvements = [], []
    for scale, noise in zip(scales, noises, strict=True):
        factor = np.linalg.cholesky(matern(known, known, scale) + noise * np.eye(n))
        whitened = np.linalg.solve(factor, targets)
        # The values' variance has the prior InverseGamma(1, 1).
        misfit = whitened @ whitened + 2
        weights.append(-np.log(np.diag(factor)).sum() - (n + 2) / 2 * np.log(misfit))
        cross = np.linalg.solve(factor, matern(known, candidates, scale))
        mean = cross.T @ whitened
        deviation = np.sqrt(np.maximum(1 - (cross**2).sum(axis=0), 1e-9) * misfit / (n + 2))
        best = (targets - noise * np.linalg.solve(factor.T, whitened)).min()
        z = (best - mean) / deviation
        improvements.append(deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)))
    likelihood = np.exp(np.array(weights) - max(weights))
    averaged: Floats = likelihood @ np.array(improvements) / likelihood.sum()
    return averaged


def feasibility(known: Floats, infeasible: Floats, candidates: Floats) -> Floats:
    """The probability that each candidate is feasible, [candidates]; 1 far from all infeasible trials."""
    scale = np.full(known.shape[1], FEASIBLE_LENGTH)
    weights = np.linalg.solve(matern(known, known, scale) + 1e-3 * np.eye(len(known)), infeasible)
    probability: Floats = 1 - np.clip(matern(candidates, known, scale) @ weights, 0, 1)
    return probability


def matern(one: Floats, other: Floats, scale: Floats) -> Floats:
    """Matérn 5/2 covariance of unit variance, [one, other]."""
    distance = math.sqrt(5) * np.sqrt((((one[:, None] - other[None]) / scale) ** 2).sum(axis=-1))
    covariance: Floats = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return covariance
