"""Every use of Optuna's private names, so that an upgrade of Optuna is this file's work. Checked against Optuna 5.0."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Engine

STORAGE_METHODS = (*sorted(BaseStorage.__abstractmethods__), "_create_new_trial", "_get_trials", "_set_trial_param")
"""The methods of a storage that may ask its server; those with an underscore are called by Optuna's cache."""

FIXED_PARAMS = "fixed_params"
"""System attribute in which Optuna keeps parameters that were enqueued."""


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that a study was loaded from."""
    return study._storage


def id_of(study: optuna.Study) -> int:
    """A study's id in its storage, which the addresses of optuna-dashboard hold."""
    return study._study_id


def backend_of(storage: BaseStorage) -> BaseStorage:
    """The storage itself, without the cache that a study wraps around a database."""
    backend: BaseStorage = getattr(storage, "_backend", storage)
    return backend


def engine_of(storage: BaseStorage) -> Engine | None:
    """SQLAlchemy's engine of a storage; None for a storage that is no database, such as one in memory."""
    return getattr(backend_of(storage), "engine", None)


def make_proxy_server(storage: BaseStorage, host: str, port: int, threads: ThreadPoolExecutor) -> Any:
    """The server of Optuna's gRPC proxy, not started.

    Raises:
        ImportError: grpcio is not installed.
        RuntimeError: The port is in use.
    """
    from optuna.storages._grpc.server import make_server

    return make_server(storage, host, port, threads)


def frozen(trial: optuna.Trial) -> FrozenTrial:
    """A copy of an open trial as this process has read and changed it since; no other process changes it."""
    return copy.deepcopy(trial._cached_frozen_trial)


def stored_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """A trial as the storage has it now. Reading all of them takes seconds in a study of thousands."""
    return study._storage.get_trial(_trial_id(study, number))


def open_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A RUNNING trial to train with; the sampler proposes what the trial has no parameters for yet."""
    # As `Study.ask` does: the sampler must not see the trials as they were at its last proposal.
    study._thread_local.cached_all_trials = None
    return optuna.Trial(study, _trial_id(study, number))


def create_running_trial(study: optuna.Study, user_attrs: Mapping[str, Any], fixed_params: Mapping[str, Any]) -> int:
    """Create a RUNNING trial that has its attributes from its first moment, and return its number.

    `Study.ask` creates one without attributes and then calls the sampler: until that returns, another machine would
    take the trial for one without an owner.
    """
    system_attrs = {FIXED_PARAMS: dict(fixed_params)} if fixed_params else {}
    template = create_trial(state=TrialState.RUNNING, user_attrs=dict(user_attrs), system_attrs=system_attrs)
    trial_id = study._storage.create_new_trial(study._study_id, template)
    return study._storage.get_trial_number_from_id(trial_id)


def pop_waiting_trial(study: optuna.Study) -> int | None:
    """Set an enqueued trial to RUNNING and return its number; None if there is none."""
    trial_id = study._pop_waiting_trial_id()
    return None if trial_id is None else study._storage.get_trial_number_from_id(trial_id)


def set_user_attr(study: optuna.Study, number: int, key: str, value: Any) -> None:
    """Set an attribute of an open trial without opening it, which would call the sampler."""
    study._storage.set_trial_user_attr(_trial_id(study, number), key, value)


def remove_fixed_params(study: optuna.Study, number: int) -> None:
    """Let the sampler propose all parameters of a trial that was created with fixed ones."""
    study._storage.set_trial_system_attr(_trial_id(study, number), FIXED_PARAMS, {})


def fixed_params(trial: optuna.Trial) -> Mapping[str, Any]:
    """The parameters that an open trial was enqueued or created with."""
    fixed: Mapping[str, Any] = frozen(trial).system_attrs.get(FIXED_PARAMS, {})
    return fixed


class StudyInSpace:
    """A study for a sampler, as if all of its trials had the parameters of one search space.

    Optuna's samplers leave a parameter out whose distribution has changed, or that one finished trial lacks. A trial
    with a value outside of the space is left out, and a finished one without all parameters.

    Args:
        search: The values of each parameter.
        known: Keeps the finished trials for later, in the space, by id: thousands take half a second.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Mapping[str, BaseDistribution],
        search: Mapping[str, Container[Any]],
        known: dict[int, FrozenTrial | None],
    ) -> None:
        self._study, self._space, self._search, self._known = study, space, search, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.get_trials()

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = map(self._find, self._study._get_trials(False, states, use_cache))
        found = [trial for trial in trials if trial is not None]
        return copy.deepcopy(found) if deepcopy else found

    def _find(self, trial: FrozenTrial) -> FrozenTrial | None:
        if trial._trial_id in self._known:
            return self._known[trial._trial_id]
        converted = self._convert(trial) if self._is_inside(trial) else None
        if trial.state.is_finished():
            self._known[trial._trial_id] = converted
        return converted

    def _is_inside(self, trial: FrozenTrial) -> bool:
        is_whole = not trial.state.is_finished() or self._search.keys() <= trial.params.keys()
        return is_whole and all(trial.params[name] in self._search[name] for name in trial.params.keys() & self._search)

    def _convert(self, trial: FrozenTrial) -> FrozenTrial:
        converted = copy.copy(trial)
        converted.distributions = {name: self._space.get(name, d) for name, d in trial.distributions.items()}
        return converted


def _trial_id(study: optuna.Study, number: int) -> int:
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
