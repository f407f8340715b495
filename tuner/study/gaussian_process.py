"""A sampler for few, expensive trials, by the model in `tuner.study.horizon`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from tuner.study.coordinates import CANDIDATES, choose, encode, propose, to_params
from tuner.study.horizon import HorizonModel, is_comparable
from tuner.study.record import TrialRecord
from tuner.study.surrogate import matern, single_threaded

Floats = NDArray[np.float64]

FEASIBLE_LENGTH = 0.7
"""Length scale of what is feasible, in shares of a parameter's range."""


class GaussianProcessSampler(BaseSampler):
    """Proposes where expected improvement times the probability of being feasible is largest.

    By turns, the improvement is that of a trial and that of the longer run: the model learns most where trials are
    best, and only settings that were tried are promoted. Numeric choices are ordered: the result of batch size 8
    informs about 16. Proposals are a pure function of the seed, the trial's number and the study's trials.

    Args:
        n_startup_trials: Number of finished trials before which points of a Sobol sequence are proposed.
        horizon: Length of the run that is searched for, in the unit of the trials' points; None: that of a trial.
    """

    def __init__(self, seed: int = 0, n_startup_trials: int = 3, horizon: float | None = None) -> None:
        if not isinstance(n_startup_trials, int) or n_startup_trials < 1:
            raise ValueError(f"n_startup_trials {n_startup_trials!r} must be a whole number of at least 1")
        if horizon is not None and (not isinstance(horizon, int | float) or not horizon > 0):
            raise ValueError(f"horizon {horizon!r} must be a number above 0")
        self._seed, self._n_startup_trials, self._horizon = seed, n_startup_trials, horizon
        self._asked: dict[str, int] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = intersection_search_space(study.get_trials(deepcopy=False), include_pruned=True)
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A coordinate of this trial's Sobol point: used before any trial has ended."""
        axis = self._asked.setdefault(param_name, len(self._asked))
        return choose(param_distribution, self._sobol(trial.number, axis + 1)[0, axis])

    @single_threaded
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        trials = [t for t in study.get_trials(deepcopy=False) if search_space.keys() <= t.params.keys()]
        ended = [TrialRecord.read(t) for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        # Training is deterministic: a setting that was tried would have the same result.
        tried = [{name: t.params[name] for name in search_space} for t in trials if t.state != TrialState.FAIL]
        if len(ended) < self._n_startup_trials or not any(map(is_comparable, ended)):
            points = self._sobol(trial.number, len(search_space), CANDIDATES)
            proposals = [to_params(search_space, point) for point in points]
            return next((each for each in proposals if each not in tried), proposals[0])
        model = HorizonModel(
            search_space,
            ended,
            minimized=study.direction == StudyDirection.MINIMIZE,
            horizon=self._horizon if trial.number % 2 == 0 else None,
            running=[TrialRecord.read(t) for t in trials if not t.state.is_finished() and t.number != trial.number],
        )
        proposals = propose(search_space, model.best.params, np.random.default_rng([self._seed, trial.number]))
        candidates = encode(search_space, proposals)
        score = model.surrogate.expected_improvement(model.inputs, candidates)
        infeasible = np.array([not t.is_feasible for t in ended], dtype=float)
        if infeasible.any():
            score *= feasibility(encode(search_space, [t.params for t in ended]), infeasible, candidates)
        score[[each in tried for each in proposals]] = -1
        return proposals[int(score.argmax())]

    def _sobol(self, number: int, dimensions: int, count: int = 1) -> Floats:
        """[count, dimensions] Points of the sequence from `number` on."""
        engine = qmc.Sobol(max(dimensions, 8), rng=np.random.default_rng(self._seed))
        points: Floats = engine.random_base2((number + count - 1).bit_length())
        return points[number : number + count, :dimensions]


def feasibility(known: Floats, infeasible: Floats, candidates: Floats) -> Floats:
    """The probability that each candidate is feasible, [candidates]; 1 far from all infeasible trials."""
    scale = np.full(known.shape[1], FEASIBLE_LENGTH)
    weights = np.linalg.solve(matern(known, known, scale) + 1e-3 * np.eye(len(known)), infeasible)
    probability: Floats = 1 - np.clip(matern(candidates, known, scale) @ weights, 0, 1)
    return probability
