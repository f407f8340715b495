"""Values of a search space's parameters as coordinates from 0 to 1, and candidates among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

Floats = NDArray[np.float64]

CANDIDATES = 512
"""Number of candidates over the whole space, besides those around the best trial; a power of two."""


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
    # bool is a type of its own here, unlike for isinstance.
    return {*map(type, distribution.choices)} <= {int, float}


def ordered(distribution: CategoricalDistribution) -> list[Any]:
    return sorted(distribution.choices) if is_ordered(distribution) else list(distribution.choices)


def log_range(distribution: BaseDistribution | None) -> float:
    """log(highest / lowest value) of a parameter whose coordinate is its logarithm, or its place among choices that
    are numbers; 0 for others."""
    if isinstance(distribution, CategoricalDistribution) and is_ordered(distribution):
        low, high = ordered(distribution)[0], ordered(distribution)[-1]
    elif isinstance(distribution, FloatDistribution | IntDistribution) and distribution.log:
        low, high = distribution.low, distribution.high
    else:
        return 0.0
    return math.log(high / low) if low > 0 else 0.0


def find_largest(distribution: BaseDistribution) -> float:
    """The largest value of a parameter with a `log_range`."""
    if isinstance(distribution, CategoricalDistribution):
        return float(ordered(distribution)[-1])
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return float(distribution.high)


def is_inside(space: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> bool:
    """Whether all parameters of the space are given, with values of the space."""
    return space.keys() <= params.keys() and all(_holds(each, params[name]) for name, each in space.items())


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return bool(distribution.low <= value <= distribution.high)


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
    return [to_params(space, point) for point in points]


def to_params(space: Mapping[str, BaseDistribution], point: Floats) -> dict[str, Any]:
    """The values at a point, [parameters] from 0 to 1."""
    return {name: choose(d, share) for (name, d), share in zip(space.items(), point, strict=True)}
