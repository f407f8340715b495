from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from threadpoolctl import threadpool_info, threadpool_limits

from tuner.study import gaussian_process
from tuner.study.coordinates import choose, features
from tuner.study.gaussian_process import GaussianProcessSampler, feasibility

BATCH_SIZES = (4, 8, 16, 32)
DISTRIBUTIONS = [
    CategoricalDistribution((32, 4, 16, 8)),
    CategoricalDistribution(("none", "cosine", "wsd")),
    CategoricalDistribution((True, False)),
    FloatDistribution(0.1, 10.0, log=True),
    FloatDistribution(-1.0, 1.0),
    FloatDistribution(0.0, 1.0, step=0.25),
    IntDistribution(3, 9),
    IntDistribution(1, 128, log=True),
    IntDistribution(0, 100, step=20),
]


def loss(batch_size: int, d_coef: float) -> float:
    """A bowl with its lowest point at batch size 8, d_coef 0.4."""
    return 3 + math.log(d_coef / 0.4) ** 2 + 0.2 * abs(math.log2(batch_size / 8))


def search(sampler: GaussianProcessSampler, num_trials: int, largest: int = 32, direction: str = "minimize") -> Any:
    """A study of the bowl; batch sizes above `largest` do not fit into memory."""
    study = optuna.create_study(sampler=sampler, direction=direction)
    for _ in range(num_trials):
        trial = study.ask()
        batch_size = trial.suggest_categorical("batch_size", BATCH_SIZES)
        d_coef = trial.suggest_float("d_coef", 0.1, 10.0, log=True)
        if batch_size > largest:
            trial.set_constraint("memory", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            value = loss(batch_size, d_coef) * (1 if direction == "minimize" else -1)
            trial.report(value, 100)
            study.tell(trial, value)
    return study


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_every_value_of_a_parameter_is_proposed_and_none_beside(distribution: Any) -> None:
    values = [choose(distribution, share) for share in np.linspace(0, 1, 2000)]
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)
    if isinstance(distribution, CategoricalDistribution):
        assert set(values) == set(distribution.choices)
    elif isinstance(distribution, IntDistribution):
        assert set(values) == set(range(distribution.low, distribution.high + 1, distribution.step))
    else:
        assert [values[0], values[-1]] == pytest.approx([distribution.low, distribution.high])


def test_numbers_among_choices_have_an_order_and_words_have_none() -> None:
    numbers, words = DISTRIBUTIONS[:2]
    assert [features(numbers, value) for value in (4, 8, 16, 32)] == [[0], [1 / 3], [2 / 3], [1]]
    apart = {
        math.dist(features(words, one), features(words, other))
        for one in words.choices
        for other in words.choices
        if one != other
    }
    assert all(distance == pytest.approx(1) for distance in apart)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("seed", range(3))
def test_lowest_point_is_found_in_a_dozen_trials(seed: int, direction: str) -> None:
    study = search(GaussianProcessSampler(seed), 12, direction=direction)
    assert abs(study.best_value) - loss(8, 0.4) < 0.05


def test_sampler_learns_infeasible_sizes() -> None:
    trials = search(GaussianProcessSampler(1), 24, largest=8).trials
    too_large = [trial.number for trial in trials if trial.params["batch_size"] > 8]
    assert too_large  # the start knows nothing
    assert sum(number >= 8 for number in too_large) <= 3


def test_proposals_depend_on_the_seed_and_the_trials_alone() -> None:
    first, again = (search(GaussianProcessSampler(5), 10) for _ in range(2))
    assert [t.params for t in first.trials] == [t.params for t in again.trials]
    assert [t.params for t in search(GaussianProcessSampler(6), 10).trials] != [t.params for t in first.trials]
    # A new process continues as the old one would have.
    continued = optuna.create_study(sampler=GaussianProcessSampler(5))
    continued.add_trials(first.trials[:7])
    proposed = continued.ask(dict(first.trials[7].distributions))
    assert proposed.params == first.trials[7].params


def test_model_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def fit(*args: Any, **keywords: Any) -> Any:
        threads.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        return model(*args, **keywords)

    model = gaussian_process.HorizonModel
    monkeypatch.setattr(gaussian_process, "HorizonModel", fit)
    with threadpool_limits(2, "blas"):
        search(GaussianProcessSampler(0), 4)
    assert set(threads) == {1}


def test_simultaneous_workers_get_different_proposals() -> None:
    study = search(GaussianProcessSampler(2), 8)
    space = dict(study.trials[0].distributions)
    asked = [study.ask(space).params for _ in range(3)]
    places = [[features(space[name], params[name])[0] for name in space] for params in asked]
    assert all(math.dist(one, other) > 0.02 for i, one in enumerate(places) for other in places[:i])


def test_feasibility_is_one_where_nothing_failed_and_none_where_it_did() -> None:
    known, infeasible = np.array([[0.0], [1.0]]), np.array([0.0, 1.0])
    below, at, far = feasibility(known, infeasible, np.array([[0.0], [1.0], [-2.0]]))
    assert below > 0.98 and at < 0.02 and far > 0.98


def test_start_without_trials_is_refused() -> None:
    with pytest.raises(ValueError, match="n_startup_trials 0"):
        GaussianProcessSampler(n_startup_trials=0)


@pytest.mark.parametrize("horizon", ["x", 0, [1]])
def test_horizon_that_is_no_length_is_refused(horizon: Any) -> None:
    with pytest.raises(ValueError, match=r"horizon .* must be a number above 0"):
        GaussianProcessSampler(horizon=horizon)


@pytest.mark.parametrize("baseline", BATCH_SIZES)
def test_start_does_not_repeat_the_baseline(baseline: int) -> None:
    study = optuna.create_study(sampler=GaussianProcessSampler(0, n_startup_trials=4))
    study.enqueue_trial({"batch_size": baseline})
    for _ in BATCH_SIZES:
        trial = study.ask()
        study.tell(trial, trial.suggest_categorical("batch_size", BATCH_SIZES))
    assert {trial.params["batch_size"] for trial in study.trials} == {*BATCH_SIZES}


def test_no_setting_is_proposed_twice() -> None:
    study = optuna.create_study(sampler=GaussianProcessSampler(0))
    for _ in range(8):
        trial = study.ask()
        value = trial.suggest_categorical("batch_size", BATCH_SIZES) / trial.suggest_int("width", 1, 2)
        trial.report(value, 100)
        study.tell(trial, value)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 8
