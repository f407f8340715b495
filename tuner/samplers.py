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
from tuner.spec import Choice

T = TypeVar("T")

# Of 20 trials Optuna would spend 10 at random.
STARTUP_TRIALS = 5
# Optuna would let 5 trials run to their end: most of a short study. A trial whose d still rises is spared besides.
MEDIAN_STARTUP = 2

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
    "median": lambda **kw: optuna.pruners.MedianPruner(**{"n_startup_trials": MEDIAN_STARTUP, **kw}),
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "none": optuna.pruners.NopPruner,
}


WITH_RUNGS = ("hyperband", "successive_halving")


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


def build_sampler(choice: Choice, seed: int) -> BaseSampler:
    """The sampler that `[sampler]` names.

    Raises:
        UserError: There is no such sampler, or it does not take these arguments.
    """
    if "seed" in choice.arguments:
        raise UserError(f"[sampler] seed {choice.arguments['seed']!r}: set study.seed instead.")

    def build(seed: int) -> BaseSampler:
        return _build("sampler", SAMPLERS, choice, {"seed": seed})

    # Its proposals depend on the trial's number already.
    return build(seed) if choice.name == "gp" else PerTrialSampler(build, seed)


def build_pruner(choice: Choice, first_point: int) -> BasePruner:
    """The pruner that `[pruner]` names; those with rungs have the first one at the first point of the grid.

    Raises UserError as `build_sampler` does.
    """
    # Optuna's default counts epochs: over thousands of samples it makes many rungs below the first validation.
    rungs = choice.name in WITH_RUNGS and "min_resource" not in choice.arguments
    return _build("pruner", PRUNERS, choice, {"min_resource": first_point} if rungs else {})


def _build(kind: str, known: Mapping[str, Callable[..., T]], choice: Choice, extra: dict[str, Any]) -> T:
    if choice.name not in known:
        raise UserError(f"{kind}.name {choice.name!r}: known are {', '.join(known)}.")
    try:
        return known[choice.name](**{**choice.arguments, **extra})
    except (TypeError, ValueError) as error:
        raise UserError(f"[{kind}] {choice.name}: {error}.") from error
