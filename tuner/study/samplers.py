"""Optuna's samplers and pruners by the names that a study.toml uses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from trainer.errors import UserError
from tuner.spec.setups import horizon, search_space, stored_space
from tuner.spec.study_toml import Choice, StudySpec
from tuner.study.gaussian_process import GaussianProcessSampler
from tuner.study.optuna_internals import StudyInSpace

T = TypeVar("T")

# Optuna samples the first 10 trials at random: half of a study of 20.
STARTUP_TRIALS = 5
# Optuna never prunes the first 5 trials: most of a short study. Besides, no trial is pruned while its d rises.
MEDIAN_STARTUP = 2

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "gp": GaussianProcessSampler,
    "tpe": lambda **kw: optuna.samplers.TPESampler(**{"n_startup_trials": STARTUP_TRIALS, **kw}),
    "random": RandomSampler,
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

MISTAKES = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, MemoryError)
"""Raised by Optuna's classes for an impossible argument, by some only at a trial."""


class PerTrialSampler(BaseSampler):
    """A sampler seeded from (study seed, trial number), whose mistakes are explained as those of `[sampler]`.

    One seed for all would make a relaunched study repeat its first proposals, and parallel workers repeat
    each other's.
    """

    def __init__(self, build: Callable[[int], BaseSampler], seed: int, choice: Choice) -> None:
        self._build, self._seed, self._choice = build, seed, choice
        self._number, self._sampler = -1, build(seed)

    @contextmanager
    def _for(self, trial: FrozenTrial) -> Iterator[BaseSampler]:
        if trial.number != self._number:
            mixed = np.random.SeedSequence((self._seed, trial.number)).generate_state(1)[0]
            self._number, self._sampler = trial.number, self._build(int(mixed))
        with _explained("sampler", self._choice):
            yield self._sampler

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        with self._for(trial) as sampler:
            return sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with self._for(trial) as sampler:
            return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        with self._for(trial) as sampler:
            return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with self._for(trial) as sampler:
            sampler.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        with self._for(trial) as sampler:
            sampler.after_trial(study, trial, state, values)


class SpecSampler(BaseSampler):
    """A sampler in the search space of a spec.

    It sees the trials of a space that was narrower as trials of the spec's, and chooses among numbers where Optuna
    stores the range that they span.
    """

    def __init__(self, spec: StudySpec) -> None:
        self._sampler, self._spec = build_sampler(spec.sampler, spec.study.seed, horizon(spec)), spec
        self._space = search_space(spec)
        self._known: dict[int, FrozenTrial | None] = {}

    def _view(self, study: optuna.Study) -> optuna.Study:
        return cast(optuna.Study, StudyInSpace(study, self._space, self._spec.search, self._known))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        inferred = self._sampler.infer_relative_search_space(self._view(study), trial)
        return inferred | {
            name: distribution
            for name, distribution in stored_space(self._spec, study.get_trials(deepcopy=False)).items()
            if name in inferred
        }

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        space = {name: self._space.get(name, distribution) for name, distribution in search_space.items()}
        return self._sampler.sample_relative(self._view(study), trial, space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        distribution = self._space.get(param_name, param_distribution)
        return self._sampler.sample_independent(self._view(study), trial, param_name, distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(self._view(study), trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._sampler.after_trial(self._view(study), trial, state, values)


def build_sampler(choice: Choice, seed: int, horizon: float | None = None) -> BaseSampler:
    """The sampler that `[sampler]` names.

    Args:
        horizon: See `tuner.spec.setups.horizon`.

    Raises:
        UserError: There is no such sampler, or it does not take these arguments; what only a trial shows is raised
            at that trial.
    """
    if "seed" in choice.arguments:
        raise UserError(f"[sampler] seed {choice.arguments['seed']!r}: set study.seed instead.")
    make = _named("sampler", SAMPLERS, choice)
    with _explained("sampler", choice):
        # It seeds itself by the trial's number, and its constructor checks every argument.
        if choice.name == "gp":
            return make(**{"horizon": horizon, **choice.arguments}, seed=seed)
        return PerTrialSampler(partial(_build_quietly, make, choice), seed, choice)


def build_pruner(choice: Choice, first_point: int) -> BasePruner:
    """The pruner that `[pruner]` names; those with rungs have the first one at the first point of the grid.

    Raises UserError as `build_sampler` does.
    """
    # Optuna's default counts epochs: over thousands of samples it makes many rungs below the first validation.
    rungs = {"min_resource": first_point} if choice.name in WITH_RUNGS else {}
    make = _named("pruner", PRUNERS, choice)
    with _explained("pruner", choice):
        pruner = make(**rungs | choice.arguments)
    prune = pruner.prune

    def explained_prune(study: optuna.Study, trial: FrozenTrial) -> bool:
        with _explained("pruner", choice):
            return prune(study, trial)

    # Optuna tests for the type of Hyperband, so it can't be wrapped in another class.
    pruner.prune = explained_prune  # type: ignore[method-assign]
    return pruner


def _named(kind: str, known: Mapping[str, Callable[..., T]], choice: Choice) -> Callable[..., T]:
    if choice.name not in known:
        raise UserError(f"{kind}.name {choice.name!r}: known are {', '.join(known)}.")
    return known[choice.name]


@contextmanager
def _explained(kind: str, choice: Choice) -> Iterator[None]:
    try:
        yield
    except MISTAKES as error:
        # A UserError, such as that of a locked database, is explained already; without arguments it is a defect.
        if isinstance(error, UserError) or not choice.arguments:
            raise
        given = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in choice.arguments.items())
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"[{kind}] {choice.name} with {given}: {reason}; change or remove it.") from error


def _build_quietly(make: Callable[..., BaseSampler], choice: Choice, seed: int) -> BaseSampler:
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        return make(**choice.arguments, seed=seed)
