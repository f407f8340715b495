"""Optuna's samplers and pruners by the names that a study.toml uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from trainer.errors import UserError
from tuner.gaussian_process import GaussianProcessSampler
from tuner.spec import Choice, StudySpec

T = TypeVar("T")

# Of 20 trials Optuna would spend 10 at random.
STARTUP_TRIALS = 5

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "gp": GaussianProcessSampler,
    "tpe": lambda **kw: optuna.samplers.TPESampler(**{"n_startup_trials": STARTUP_TRIALS, **kw}),
    "random": optuna.samplers.RandomSampler,
    "qmc": optuna.samplers.QMCSampler,
}
PRUNERS: dict[str, Callable[..., BasePruner]] = {
    "percentile": lambda **kw: optuna.pruners.PercentilePruner(
        **{"percentile": 75.0, "n_startup_trials": STARTUP_TRIALS, **kw}
    ),
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "none": optuna.pruners.NopPruner,
}


class PerTrialSampler(BaseSampler):
    """A sampler seeded from (study seed, trial number).

    One seed for all would make a relaunched study repeat its first proposals, and parallel workers repeat
    each other's.
    """

    def __init__(self, build: Callable[[int], BaseSampler], seed: int) -> None:
        self._build, self._seed = build, seed
        self._number, self._sampler = -1, build(seed)

    def _for(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            mixed = np.random.SeedSequence((self._seed, trial.number)).generate_state(1)[0]
            self._number, self._sampler = trial.number, self._build(int(mixed))
        return self._sampler

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._for(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._for(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._for(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._for(trial).before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._for(trial).after_trial(study, trial, state, values)


def build_sampler(spec: StudySpec) -> BaseSampler:
    """The sampler that `[sampler]` names.

    Raises:
        UserError: There is no such sampler, or it does not take these arguments.
    """

    def build(seed: int) -> BaseSampler:
        return _build("sampler", SAMPLERS, spec.sampler, {"seed": seed})

    return PerTrialSampler(build, spec.study.seed)


def build_pruner(spec: StudySpec) -> BasePruner:
    """The pruner that `[pruner]` names. Raises UserError as `build_sampler` does."""
    return _build("pruner", PRUNERS, spec.pruner, {})


def _build(kind: str, known: Mapping[str, Callable[..., T]], choice: Choice, extra: dict[str, Any]) -> T:
    if choice.name not in known:
        raise UserError(f"{kind}.name {choice.name!r}: known are {', '.join(known)}.")
    try:
        return known[choice.name](**{**choice.arguments, **extra})
    except (TypeError, ValueError) as error:
        raise UserError(f"[{kind}] {choice.name}: {error}.") from error
