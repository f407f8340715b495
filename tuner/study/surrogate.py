"""A Gaussian process over the values of the trials, for settings of a longer run.

Hyperparameters are not optimized, which may fail to converge, but averaged: fixed draws from their priors, weighted by
likelihood (Snoek et al. 2012). Expected improvement is that of Jones et al. 1998, and of what one trial can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtr, ndtri
from scipy.stats import qmc
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]

DRAWS = 64
"""Number of draws of the hyperparameters; a power of two."""
KEPT, MIN_WEIGHT = 8, 0.01
"""The draws that predict: the likeliest ones, without those whose weight is below this share of the first one's. In a
study of 200 trials about two draws are left."""
LENGTH_SCALE = (-0.5, 0.7)
NOISE = (-5.0, 1.5)
"""Mean and standard deviation of the logarithm: of length scales in shares of a parameter's range, of the noise
variance in that of the values."""
MEAN = 1.0
"""Variance of the mean of all values."""

F = TypeVar("F", bound=Callable[..., Any])


def single_threaded(function: F) -> F:
    """Decorator: its matrices are small, and BLAS threads that wait for a busy core take ten times the CPU time."""
    limited: F = threadpool_limits.wrap(limits=1, user_api="blas")(function)
    return limited


class Surrogate:
    """The model of the trials' values.

    Args:
        inputs: [trials, coordinates]
        values: [trials], standardized; lower is better.
        shift: [coordinates] An input of the longer run is as good as this much less is in a trial.
    """

    def __init__(self, inputs: Floats, values: Floats, shift: Floats) -> None:
        draws = qmc.Sobol(inputs.shape[1] + 1, rng=np.random.default_rng(0)).random(DRAWS)
        normal = ndtri(np.clip(draws, 0.01, 0.99))
        scales = np.exp(LENGTH_SCALE[0] + LENGTH_SCALE[1] * normal[:, :-1])
        noises = np.exp(NOISE[0] + NOISE[1] * normal[:, -1])
        fits = [Fit(inputs, values, shift, *draw) for draw in zip(scales, noises, strict=True)]
        likeliest = sorted(fits, key=lambda fit: -fit.likelihood)[:KEPT]
        weights = np.exp([fit.likelihood - likeliest[0].likelihood for fit in likeliest])
        weights = weights[weights >= MIN_WEIGHT]
        self._fits, self._weights = likeliest[: len(weights)], weights / weights.sum()

    def mean(self, inputs: Floats) -> Floats:
        """[inputs], in the longer run."""
        mean: Floats = self._weights @ np.array([fit.mean(inputs) for fit in self._fits])
        return mean

    def predict(self, inputs: Floats) -> tuple[Floats, Floats]:
        """Mean [inputs] and covariance [inputs, inputs] in the longer run."""
        predictions = [fit.predict(inputs) for fit in self._fits]
        means = np.array([mean for mean, _ in predictions])
        mean: Floats = self._weights @ means
        covariance: Floats = np.einsum("f,fij->ij", self._weights, np.array([each for _, each in predictions]))
        covariance += np.einsum("f,fi,fj->ij", self._weights, means - mean, means - mean)
        return mean, covariance

    def expected_improvement(self, tried: Floats, candidates: Floats) -> Floats:
        """How far a trial at each candidate is expected to lower the lowest mean of the tried inputs in the longer run,
        [candidates].

        Args:
            tried: [trials, coordinates] Those of the complete trials.
        """
        improvements = np.array([fit.expected_improvement(tried, candidates) for fit in self._fits])
        mean: Floats = self._weights @ improvements
        return mean


class Fit:
    """The model with one draw of its hyperparameters."""

    def __init__(self, inputs: Floats, values: Floats, shift: Floats, scale: Floats, noise: float) -> None:
        self.inputs, self.shift, self.scale, self.noise = inputs, shift, scale, noise
        covariance = matern(inputs, inputs, scale) + MEAN + noise * np.eye(len(inputs))
        self.factor = np.linalg.cholesky(covariance)
        self.whitened = solve_triangular(self.factor, values, lower=True)
        # The values' variance has the prior InverseGamma(1, 1).
        rows, misfit = len(values), float(self.whitened @ self.whitened) + 2
        self.likelihood = -np.log(np.diag(self.factor)).sum() - (rows + 2) / 2 * math.log(misfit)
        self.variance = misfit / (rows + 2)

    def _whiten(self, inputs: Floats) -> Floats:
        whitened: Floats = solve_triangular(self.factor, matern(self.inputs, inputs, self.scale) + MEAN, lower=True)
        return whitened

    def mean(self, inputs: Floats) -> Floats:
        mean: Floats = self._whiten(inputs - self.shift).T @ self.whitened
        return mean

    def predict(self, inputs: Floats) -> tuple[Floats, Floats]:
        cross = self._whiten(inputs - self.shift)
        return cross.T @ self.whitened, self.variance * (matern(inputs, inputs, self.scale) + MEAN - cross.T @ cross)

    def expected_improvement(self, tried: Floats, candidates: Floats) -> Floats:
        trial, run = self._whiten(candidates), self._whiten(candidates - self.shift)
        # The deviation is that of the mean after a trial there, and not all that is unknown of the longer run: no
        # trial tells of the smallest batches there, and they would be tried for ever.
        distance = matern(np.zeros((1, len(self.shift))), self.shift[None], self.scale)[0, 0]
        covariance = distance + MEAN - (trial * run).sum(axis=0)
        deviation = math.sqrt(self.variance) * covariance / np.sqrt(1 + MEAN + self.noise - (trial**2).sum(axis=0))
        deviation = np.maximum(np.abs(deviation), 1e-9)
        z = (self.mean(tried).min() - run.T @ self.whitened) / deviation
        improvement: Floats = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
        return improvement


def standardized(values: Sequence[float]) -> Floats:
    """Values with mean 0 and deviation 1. Values far above the median, of diverged runs, are clipped: otherwise all
    good trials would look alike."""
    array = np.array(values)
    low, median = array.min(), np.median(array)
    if median > low:
        array = np.minimum(array, median + 2 * (median - low))
    standard: Floats = (array - array.mean()) / (array.std() or 1.0)
    return standard


def matern(one: Floats, other: Floats, scale: Floats) -> Floats:
    """Matérn 5/2 covariance of unit variance, [one, other]."""
    one, other = one / scale, other / scale
    # By the binomial theorem: thrice as fast as the differences of all pairs.
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    distance = np.sqrt(5 * np.maximum(squares, 0, out=squares), out=squares)
    covariance: Floats = distance * distance
    covariance /= 3
    covariance += distance
    covariance += 1
    covariance *= np.exp(np.negative(distance, out=distance), out=distance)
    return covariance
