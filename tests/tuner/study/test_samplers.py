from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import pytest

from trainer import UserError
from tuner.spec.study_toml import Choice
from tuner.study.samplers import PRUNERS, SAMPLERS, build_pruner, build_sampler


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("tpe", {"n_startup_trials": "x"}, 'n_startup_trials = "x"'),
        ("tpe", {"prior_weight": -1}, "prior_weight = -1: A non-negative value"),
        ("tpe", {"n_startup_trials": 500, "prior_weight": -1}, "n_startup_trials = 500, prior_weight = -1"),
        ("tpe", {"n_ei_candidates": 0}, "n_ei_candidates = 0"),
        ("tpe", {"n_ei_candidates": 2.5}, "n_ei_candidates = 2.5"),
        ("tpe", {"gamma": 0.25}, "gamma = 0.25"),
        ("tpe", {"constraints_func": "x"}, 'constraints_func = "x"'),
        ("tpe", {"n_startup": 3}, "n_startup = 3"),
        ("qmc", {"qmc_type": "x"}, 'qmc_type = "x"'),
        ("qmc", {"independent_sampler": "random"}, 'independent_sampler = "random"'),
        ("gp", {"n_startup_trials": "x"}, 'n_startup_trials = "x"'),
        ("gp", {"n_startup_trials": 0}, "n_startup_trials = 0: n_startup_trials 0 must be at least 1"),
        ("random", {"scramble": True}, "scramble = true"),
    ],
)
def test_a_samplers_option_that_can_not_be_is_one_line_before_any_trial(
    name: str, options: dict[str, Any], shown: str
) -> None:
    with pytest.raises(UserError) as error:
        build_sampler(Choice(name=name, **options), 0)
    assert str(error.value).startswith(f"[sampler] {name} with {shown}")
    assert str(error.value).endswith("; change or remove it.") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("hyperband", {"min_resource": 0}, "min_resource = 0"),
        ("hyperband", {"min_resource": "auto"}, 'min_resource = "auto"'),
        ("hyperband", {"max_resource": 0}, "max_resource = 0"),
        ("hyperband", {"reduction_factor": 1}, "reduction_factor = 1"),
        ("hyperband", {"reduction_factor": 2.5}, "reduction_factor = 2.5"),
        ("hyperband", {"bootstrap_count": 1}, "bootstrap_count = 1"),
        ("successive_halving", {"min_resource": 0}, "min_resource = 0"),
        ("successive_halving", {"reduction_factor": 2.5}, "reduction_factor = 2.5"),
        ("median", {"n_warmup_steps": "x"}, 'n_warmup_steps = "x"'),
        ("percentile", {"percentile": 300}, "percentile = 300"),
        ("none", {"patience": 3}, "patience = 3"),
    ],
)
@pytest.mark.parametrize("first_point", [1, 2000])
def test_a_pruners_option_that_can_not_be_is_one_line_before_any_trial(
    name: str, options: dict[str, Any], shown: str, first_point: int
) -> None:
    with pytest.raises(UserError) as error:
        build_pruner(Choice(name=name, **options), first_point)
    assert str(error.value).startswith(f"[pruner] {name} with {shown}")
    assert str(error.value).endswith("; change or remove it.") and "\n" not in str(error.value)


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def heard() -> Iterator[list[logging.LogRecord]]:
    """What Optuna logs, from INFO on."""
    handler, logger, verbosity = Heard(), logging.getLogger("optuna"), optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logger.addHandler(handler)
    yield handler.records
    logger.removeHandler(handler)
    optuna.logging.set_verbosity(verbosity)


def test_every_sampler_and_pruner_is_tried_out_in_silence(heard: list[logging.LogRecord]) -> None:
    with warnings.catch_warnings(action="error"):
        for name in SAMPLERS:
            build_sampler(Choice(name=name), 0)
        build_sampler(Choice(name="tpe", multivariate=True, group=True), 0)
        for name in PRUNERS:
            build_pruner(Choice(name=name), 40)
    assert heard == []
    optuna.create_study()
    assert len(heard) == 1, "afterwards Optuna logs as before"


def test_what_was_tried_out_leaves_no_trace_in_the_proposals() -> None:
    def proposals() -> list[float]:
        study = optuna.create_study(sampler=build_sampler(Choice(name="tpe", n_startup_trials=3), 5))
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=6)
        return [trial.params["x"] for trial in study.trials]

    assert proposals() == proposals()
