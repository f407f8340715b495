from __future__ import annotations

import warnings
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from trainer import UserError
from tuner.spec.study_toml import Choice
from tuner.study.samplers import PRUNERS, SAMPLERS, build_pruner, build_sampler


def run_trials(first_point: int = 1, **chosen: Any) -> list[FrozenTrial]:
    """Ten trials with four reports each, every trial better than those before."""
    study = optuna.create_study(**{"sampler": optuna.samplers.RandomSampler(0), **chosen})
    for number in range(10):
        trial = study.ask()
        trial.suggest_float("float", 0.1, 10.0, log=True)
        trial.suggest_categorical("categorical", ["one", "other"])
        for point in range(1, 5):
            trial.report(1 / (number + point), point * first_point)
            trial.should_prune()
        study.tell(trial, 1 / (number + 4))
    return study.trials


def assert_one_line(error: pytest.ExceptionInfo[UserError], start: str) -> None:
    message = str(error.value)
    assert message.startswith(start) and message.endswith("; change or remove it.") and "\n" not in message


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("tpe", {"n_startup": 3}, "n_startup = 3"),
        ("qmc", {"qmc_type": "x"}, 'qmc_type = "x"'),
        ("gp", {"n_startup_trials": "x"}, 'n_startup_trials = "x"'),
        (
            "gp",
            {"n_startup_trials": 0},
            "n_startup_trials = 0: n_startup_trials 0 must be a whole number",
        ),
        ("random", {"scramble": True}, "scramble = true"),
    ],
)
def test_impossible_sampler_option_is_one_line_before_any_trial(name: str, options: dict[str, Any], shown: str) -> None:
    with pytest.raises(UserError) as error:
        build_sampler(Choice(name=name, **options), 0)
    assert_one_line(error, f"[sampler] {name} with {shown}")


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("tpe", {"n_startup_trials": "x"}, 'n_startup_trials = "x"'),
        ("tpe", {"prior_weight": -1}, "prior_weight = -1: A non-negative value"),
        ("tpe", {"n_ei_candidates": 0}, "n_ei_candidates = 0"),
        ("tpe", {"n_ei_candidates": 2.5}, "n_ei_candidates = 2.5"),
        ("tpe", {"gamma": 0.25}, "gamma = 0.25"),
        ("tpe", {"constraints_func": "x"}, 'constraints_func = "x"'),
        ("qmc", {"independent_sampler": "random"}, 'independent_sampler = "random"'),
    ],
)
def test_sampler_option_impossible_only_in_a_trial_is_one_line(name: str, options: dict[str, Any], shown: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        sampler = build_sampler(Choice(name=name, **options), 0)
        with pytest.raises(UserError) as error:
            run_trials(sampler=sampler)
    assert_one_line(error, f"[sampler] {name} with {shown}")


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("hyperband", {"bootstrap_count": 1}, "bootstrap_count = 1"),
        ("successive_halving", {"min_resource": 0}, "min_resource = 0"),
        ("median", {"n_warmup_steps": "x"}, 'n_warmup_steps = "x"'),
        ("percentile", {"percentile": 300}, "percentile = 300"),
        ("none", {"patience": 3}, "patience = 3"),
    ],
)
def test_impossible_pruner_option_is_one_line_before_any_trial(name: str, options: dict[str, Any], shown: str) -> None:
    with pytest.raises(UserError) as error:
        build_pruner(Choice(name=name, **options), 1)
    assert_one_line(error, f"[pruner] {name} with {shown}")


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("hyperband", {"min_resource": 0}, "min_resource = 0"),
        ("hyperband", {"min_resource": "auto"}, 'min_resource = "auto"'),
        ("hyperband", {"max_resource": 0}, "max_resource = 0"),
        ("hyperband", {"reduction_factor": 1}, "reduction_factor = 1"),
        ("hyperband", {"reduction_factor": 2.5}, "reduction_factor = 2.5"),
        ("successive_halving", {"reduction_factor": 2.5}, "reduction_factor = 2.5"),
    ],
)
@pytest.mark.parametrize("first_point", [1, 2000])
def test_pruner_option_impossible_only_in_a_trial_is_one_line(
    name: str, options: dict[str, Any], shown: str, first_point: int
) -> None:
    pruner = build_pruner(Choice(name=name, **options), first_point)
    with pytest.raises(UserError) as error, warnings.catch_warnings(action="ignore"):
        run_trials(first_point, pruner=pruner)
    assert_one_line(error, f"[pruner] {name} with {shown}")


class Locked(optuna.samplers.RandomSampler):
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        raise UserError("the database is locked")


class Defective(optuna.samplers.RandomSampler):
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        raise KeyError("defect")


def test_user_errors_and_defects_are_not_blamed_on_the_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SAMPLERS, "locked", lambda width=1, **kw: Locked(**kw))
    monkeypatch.setitem(SAMPLERS, "defective", Defective)
    with pytest.raises(UserError, match=r"^the database is locked$"):
        run_trials(sampler=build_sampler(Choice(name="locked", width=2), 0))
    with pytest.raises(KeyError, match="defect"):
        run_trials(sampler=build_sampler(Choice(name="defective"), 0))


def test_every_sampler_and_pruner_by_its_defaults_runs_trials() -> None:
    for name in SAMPLERS:
        assert len(run_trials(sampler=build_sampler(Choice(name=name), 0))) == 10
    for name in PRUNERS:
        assert len(run_trials(40, pruner=build_pruner(Choice(name=name), 40))) == 10


def test_options_of_a_sampler_are_built_without_optunas_warnings() -> None:
    with warnings.catch_warnings(action="error"):
        build_sampler(Choice(name="tpe", multivariate=True, group=True), 0)
