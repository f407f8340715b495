"""Optuna's samplers and pruners by the names that a study.toml uses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from trainer.errors import UserError
from tuner.spec.study_toml import Choice
from tuner.study.gaussian_process import GaussianProcessSampler

T = TypeVar("T")

# Of 20 trials Optuna would spend 10 at random.
STARTUP_TRIALS = 5
# Optuna would let 5 trials run to their end: most of a short study. A trial whose d still rises is spared besides.
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

TRIED_TRIALS = 10
MISTAKES = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, MemoryError)
"""What Optuna's classes raise for an argument that can't be, some of them only at a trial."""


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
    """The sampler that `[sampler]` names, tried out.

    Raises:
        UserError: There is no such sampler, or it does not take these arguments.
    """
    if "seed" in choice.arguments:
        raise UserError(f"[sampler] seed {choice.arguments['seed']!r}: set study.seed instead.")
    make = _named("sampler", SAMPLERS, choice)
    with _explained("sampler", choice):
        # Its proposals depend on the trial's number already, and its constructor finds every mistake.
        if choice.name == "gp":
            return make(**choice.arguments, seed=seed)
        _try_out(lambda: optuna.create_study(sampler=make(**_without_startup(choice), seed=seed)), 1)
        return PerTrialSampler(partial(_build_quietly, make, choice), seed)


def build_pruner(choice: Choice, first_point: int) -> BasePruner:
    """The pruner that `[pruner]` names, tried out; those with rungs have the first one at the first point of the grid.

    Raises UserError as `build_sampler` does.
    """
    # Optuna's default counts epochs: over thousands of samples it makes many rungs below the first validation.
    rungs = {"min_resource": first_point} if choice.name in WITH_RUNGS else {}
    make = _named("pruner", PRUNERS, choice)
    with _explained("pruner", choice):
        arguments = rungs | choice.arguments
        _try_out(
            lambda: optuna.create_study(study_name="tried", sampler=RandomSampler(), pruner=make(**arguments)),
            first_point,
        )
        return make(**arguments)


def _named(kind: str, known: Mapping[str, Callable[..., T]], choice: Choice) -> Callable[..., T]:
    if choice.name not in known:
        raise UserError(f"{kind}.name {choice.name!r}: known are {', '.join(known)}.")
    return known[choice.name]


@contextmanager
def _explained(kind: str, choice: Choice) -> Iterator[None]:
    try:
        yield
    except MISTAKES as error:
        given = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in choice.arguments.items())
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"[{kind}] {choice.name} with {given}: {reason}; change or remove it.") from error


def _build_quietly(make: Callable[..., BaseSampler], choice: Choice, seed: int) -> BaseSampler:
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        return make(**choice.arguments, seed=seed)


def _without_startup(choice: Choice) -> dict[str, Any]:
    """The arguments that propose from the second trial on."""
    startup = choice.arguments.get("n_startup_trials", STARTUP_TRIALS)
    return choice.arguments | ({"n_startup_trials": 1} if choice.name == "tpe" and isinstance(startup, int) else {})


def _try_out(create_study: Callable[[], optuna.Study], first_point: int) -> None:
    """Some made-up trials, each better than those before, silently: many an argument is first looked at when a trial
    asks, or when it is promoted to the next rung. Takes about 10 ms."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            study = create_study()
            for number in range(TRIED_TRIALS):
                trial = study.ask()
                trial.suggest_float("float", 0.1, 10.0, log=True)
                trial.suggest_int("int", 1, 8)
                trial.suggest_categorical("categorical", ["one", "other"])
                for point in range(1, 5):
                    trial.report(1 / (number + point), point * first_point)
                    trial.should_prune()
                study.tell(trial, 1 / (number + 4))
    finally:
        optuna.logging.set_verbosity(verbosity)
