"""The best trial at an edge of the search space."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from tests.tuner.show.made_studies import GRID, new_study, read
from tests.tuner.studies_for_tests import build
from tuner import launch
from tuner.promotion import promote as promote_module
from tuner.spec.setups import search_space
from tuner.spec.study_toml import StudySpec
from tuner.study.edges import MIN_TRIALS, describe_edges
from tuner.study.record import read_spec
from tuner.study.tracked_run import Runtime

LINEAR = {"search.train.d_coef": {"low": 0.05, "high": 10.0}}


def edges(
    best: dict[str, Any], num_trials: int = MIN_TRIALS, best_state: TrialState = TrialState.COMPLETE, **changes: Any
) -> list[str]:
    """The sentences of a study whose last trial, of `num_trials`, is the best."""
    study = new_study(**changes)
    spec: StudySpec = read_spec(study)
    middle = {"train.batch_size": 8, "train.d_coef": 1.0, "workload.width": 16, "train.use_bias_correction": False}
    middle["train.weight_decay"] = 0.05
    space = search_space(spec)
    for number in range(num_trials):
        last = number == num_trials - 1
        params = {name: (middle | best if last else middle)[name] for name in space}
        state, value = best_state if last else TrialState.COMPLETE, 1.0 if last else 2.0
        study.add_trial(
            create_trial(
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                params=params,
                distributions=space,
                intermediate_values={GRID[-1]: value},
            )
        )
    return describe_edges(read(study))


@pytest.mark.parametrize(
    ("d_coef", "changes", "edge"),
    [
        (0.1, {}, "lower"),
        (0.125, {}, "lower"),
        (0.127, {}, None),
        (1.0, {}, None),
        (7.9, {}, None),
        (8.0, {}, "upper"),
        (0.51, LINEAR, "lower"),
        (0.56, LINEAR, None),
        (9.4, LINEAR, None),
        (9.6, LINEAR, "upper"),
    ],
)
def test_twentieth_of_a_range_at_each_end_is_its_edge(d_coef: float, changes: Any, edge: str | None) -> None:
    low = changes["search.train.d_coef"]["low"] if changes else 0.1
    expected = f"best train.d_coef = {d_coef:.3g} is at the {edge} edge of {low:.3g} to 10: widen it in [search]"
    assert edges({"train.d_coef": d_coef}, **changes) == ([expected] if edge else [])


@pytest.mark.parametrize(("batch_size", "edge"), [(4, "lower"), (8, None), (16, "upper")])
def test_first_and_last_of_numbers_are_edges(batch_size: int, edge: str | None) -> None:
    sentence = f"best train.batch_size = {batch_size} is at the {edge} edge of 4, 8, 16: widen it in [search]"
    assert edges({"train.batch_size": batch_size}) == ([sentence] if edge else [])
    unordered = {"search.train.batch_size": {"choices": [16, 4, 8]}}
    assert len(edges({"train.batch_size": batch_size}, **unordered)) == (edge is not None)


def test_two_choices_words_and_the_least_size_are_no_edges() -> None:
    assert edges({"workload.width": 32}, **{"search.workload.width": {"choices": [16, 32]}}) == []
    assert edges({"train.batch_size": 1}, **{"search.train.batch_size": {"choices": [1, 8, 16]}}) == []
    sizes = {"search.train.batch_size": {"low": 1, "high": 30}, "trial.samples": 1600, "full.samples": 4800}
    assert edges({"train.batch_size": 1}, **sizes) == []
    assert len(edges({"train.batch_size": 30}, **sizes)) == 1
    assert edges({"train.weight_decay": 0.0}, **{"search.train.weight_decay": {"low": 0.0, "high": 0.1}}) == []
    flag = {"search.train.use_bias_correction": {"choices": [False, True]}}
    assert edges({"train.use_bias_correction": True}, **flag) == []


def test_few_trials_and_pruned_ones_have_no_edge() -> None:
    assert edges({"train.d_coef": 0.1}, MIN_TRIALS - 1) == []
    assert edges({"train.d_coef": 0.1}, MIN_TRIALS + 1, TrialState.PRUNED) == []
    assert len(edges({"train.batch_size": 4, "train.d_coef": 0.1})) == 2


def test_promotion_logs_the_edge_of_the_best_trial(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=1)
    monkeypatch.setattr(promote_module, "describe_edges", lambda record: [f"edge of {record.best.number}"])
    with caplog.at_level(logging.INFO):
        promote_module.promote(study, runtime=runtime)
    assert "edge of 0" in caplog.messages
