"""A study that is launched again with a wider [search] continues with all of its trials."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tests.tuner.studies_for_tests import build
from trainer import UserError
from tuner import launch
from tuner.spec.comparison import compare_specs
from tuner.spec.setups import OutsideSearch, check_enqueued, count_val_samples, horizon, search_space, suggest
from tuner.spec.study_toml import Choice, StudySpec
from tuner.study import gaussian_process
from tuner.study.launch import open_study
from tuner.study.optuna_internals import StudyInSpace, fixed_params
from tuner.study.record import StudyRecord
from tuner.study.samplers import SpecSampler, build_sampler
from tuner.study.tracked_run import Runtime

LENGTHS: dict[str, Any] = {"trial.samples": 1600, "full.samples": 4800}
NARROW: dict[str, Any] = {"search.train.batch_size": {"choices": [8, 16]}, **LENGTHS}
WIDE: dict[str, Any] = {
    "search.train.batch_size": {"choices": [4, 8, 16, 32]},
    "search.train.d_coef": {"low": 0.01, "high": 10.0, "log": True},
    **LENGTHS,
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tuner.db"


def loss(params: dict[str, Any]) -> float:
    """Lowest at batch size 32 and d_coef 0.03, outside the narrow space."""
    return abs(math.log2(params["train.batch_size"] / 32)) + abs(math.log10(params["train.d_coef"] / 0.03))


def run(study: optuna.Study, spec: StudySpec, num_trials: int) -> list[dict[str, Any]]:
    """Trials without training; returns their parameters."""
    asked = []
    for _ in range(num_trials):
        trial = study.ask()
        asked.append(suggest(trial, spec))
        trial.report(loss(asked[-1]), 100)
        study.tell(trial, loss(asked[-1]))
    return asked


def with_sampler(spec: StudySpec, name: str) -> StudySpec:
    return spec.model_copy(update={"sampler": Choice(name=name)})


@pytest.mark.parametrize("name", ["gp", "tpe", "random", "qmc"])
def test_wider_space_is_searched_with_all_trials(name: str, url: str) -> None:
    narrow, wide = (with_sampler(build(**changes), name) for changes in (NARROW, WIDE))
    before = run(open_study(narrow, url), narrow, 8)
    study = open_study(wide, url)
    after = run(study, wide, 24)
    assert [trial.params for trial in study.trials] == before + after
    assert {params["train.batch_size"] for params in after} >= {4, 32}
    assert min(params["train.d_coef"] for params in after) < 0.1
    assert all(params["train.batch_size"] in (8, 16) for params in before)


def test_gaussian_process_learns_from_the_trials_of_the_narrower_space(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = build(**NARROW), build(**WIDE)
    before = run(open_study(narrow, url), narrow, 6)
    seen: list[np.ndarray[Any, Any]] = []

    class Watched(gaussian_process.HorizonModel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            seen.append(self.inputs)

    monkeypatch.setattr(gaussian_process, "HorizonModel", Watched)
    study = open_study(wide, url)
    after = run(study, wide, 3)
    assert [known.shape for known in seen] == [(6, 2), (7, 2), (8, 2)]
    # Coordinates are those of the wider space.
    ranked = sorted(before, key=loss)
    np.testing.assert_allclose(seen[0], gaussian_process.encode(dict(sorted(search_space(wide).items())), ranked))
    assert any(params["train.batch_size"] == 32 or params["train.d_coef"] < 0.1 for params in after)


@pytest.mark.parametrize("name", ["gp", "tpe", "random", "qmc"])
def test_numbers_are_chosen_as_from_a_list(name: str, url: str) -> None:
    """Although Optuna stores a range."""
    spec = with_sampler(build(**WIDE), name)
    study = open_study(spec, url)
    asked = run(study, spec, 9)
    plain = optuna.create_study(sampler=build_sampler(Choice(name=name), 0, horizon(spec)))
    for params in asked:
        trial = plain.ask()
        batch_size = trial.suggest_categorical("train.batch_size", [4, 8, 16, 32])
        d_coef = trial.suggest_float("train.d_coef", 0.01, 10.0, log=True)
        assert params == {"train.batch_size": batch_size, "train.d_coef": d_coef}
        trial.report(loss(params), 100)
        plain.tell(trial, loss(params))
    assert study.trials[0].distributions["train.batch_size"] == IntDistribution(4, 32)


def test_choices_of_a_fractional_field_are_stored_as_a_range_of_fractions(url: str) -> None:
    spec = build(**{"search.train.d_coef": {"choices": [1, 2.5]}})
    study = open_study(spec, url)
    run(study, spec, 2)
    assert study.trials[0].distributions["train.d_coef"] == FloatDistribution(1.0, 2.5)
    wider = build(**{"search.train.d_coef": {"choices": [0.5, 1, 2.5]}})
    assert {params["train.d_coef"] for params in run(open_study(wider, url), wider, 8)} == {0.5, 1, 2.5}


def test_enqueued_value_that_is_no_choice_is_refused_and_not_learned_from(url: str) -> None:
    spec = build(**WIDE)
    study = open_study(spec, url)
    run(study, spec, 4)
    study.enqueue_trial({"train.batch_size": 5, "train.d_coef": 1.0})
    trial = study.ask()
    with pytest.raises(OutsideSearch, match=r"batch_size = 5 is not in its search space \(4, 8"):
        check_enqueued(fixed_params(trial), spec)
    study.tell(trial, 0.0)
    assert len(run(study, spec, 2)) == 2


@pytest.mark.parametrize(
    ("name", "value", "space"),
    [
        ("train.batch_size", 6, "4, 8, 16"),
        ("train.batch_size", "large", "4, 8, 16"),
        ("train.d_coef", -1.0, "0.1 to 10, log"),
        ("train.d_coef", 20.0, "0.1 to 10, log"),
    ],
)
def test_study_goes_on_after_an_enqueued_value_outside_its_space(
    runtime: Runtime, url: str, name: str, value: Any, space: str
) -> None:
    study = launch(build(), storage=url, runtime=runtime, num_trials=1)
    study.enqueue_trial({"train.batch_size": 8, "train.d_coef": 1.0, name: value})
    launch(build(), storage=url, runtime=runtime, num_trials=3)
    trials = StudyRecord.read(study).trials
    assert [trial.state for trial in trials] == ["complete", "infeasible", "complete"]
    assert trials[1].infeasible == f"{name} = {value!r} is not in its search space ({space})"
    # Where one ended trial lacks a parameter, Optuna's samplers leave it out.
    space = SpecSampler(build()).infer_relative_search_space(study, study.trials[-1])
    assert space.keys() == {"train.batch_size", "train.d_coef"}


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"search.train.batch_size": {"choices": [4, 8]}}, r"batch_size was 4, 8, 16 and is now 4, 8: 16 is missing"),
        ({"search.train.batch_size": {"low": 4, "high": 16}}, "choices can't become a range"),
        ({"search.train.d_coef": {"choices": [0.1, 1.0, 10.0]}}, "a range can't become choices"),
        ({"search.train.d_coef": {"low": 0.2, "high": 10, "log": True}}, "now 0.2 to 10, log: it is narrower"),
        ({"search.train.d_coef": {"low": 0.1, "high": 9, "log": True}}, "it is narrower"),
        ({"search.train.d_coef": {"low": 0.1, "high": 10}}, "log and step can't change"),
        ({"search.workload.width": {"choices": [8, 16]}}, r"search\.workload\.width was added"),
    ],
)
def test_other_changes_are_refused_by_name(changes: dict[str, Any], phrase: str) -> None:
    loose = {**LENGTHS, "trial.evaluations": 1}
    (changed,) = compare_specs(build(**loose | changes), build(**loose))
    assert re.search(phrase, changed), changed


def test_removed_field_and_missed_steps_are_refused() -> None:
    steps = build(**{"search.train.d_coef": {"low": 0.5, "high": 2.0, "step": 0.5}})
    missed = build(**{"search.train.d_coef": {"low": 0.25, "high": 2.25, "step": 0.5}, "train.d_coef": 1.25})
    assert any("its steps miss 0.5" in phrase for phrase in compare_specs(missed, steps))
    wider = build(**{"search.train.d_coef": {"low": 0.5, "high": 4.0, "step": 0.5}})
    assert compare_specs(wider, steps) == []
    assert compare_specs(build(without="search.train.d_coef"), build()) == ["search.train.d_coef was removed"]


def test_space_that_changes_the_validation_set_is_refused() -> None:
    """Without train.val_samples, the smallest batch size decides how many a budget in steps affords."""
    steps = {"trial.steps": 20, "trial.samples": None}
    narrow = build(**NARROW | steps)
    wide = WIDE | steps
    assert any("train.val_samples was" in phrase for phrase in compare_specs(build(**wide), narrow))
    assert compare_specs(build(**wide, **{"train.val_samples": count_val_samples(narrow)}), narrow) == []


def test_study_with_a_stored_list_continues_and_keeps_its_list(url: str) -> None:
    """Early versions stored numbers as a list, which Optuna lets no study change."""
    spec = build()
    study = open_study(spec, url)
    params = {"train.batch_size": 8, "train.d_coef": 1.0}
    distributions = {
        "train.batch_size": CategoricalDistribution([4, 8, 16]),
        "train.d_coef": FloatDistribution(0.1, 10.0, log=True),
    }
    for value in (1.0, 2.0, 3.0, 4.0):
        study.add_trial(create_trial(value=value, params=params, distributions=distributions))
    run(open_study(spec, url), spec, 2)
    assert study.trials[-1].distributions["train.batch_size"] == CategoricalDistribution([4, 8, 16])
    with pytest.raises(UserError, match=r"batch_size: its trials are stored .*\[4, 8, 16\]\): give study\.name"):
        open_study(build(**{"search.train.batch_size": {"choices": [2, 4, 8, 16]}}), url)
    wider = {"search.train.d_coef": {"low": 0.01, "high": 10.0, "log": True}}
    run(open_study(build(**wider), url), build(**wider), 2)


def test_launch_continues_with_more_batch_sizes(runtime: Runtime, url: str) -> None:
    narrow = {"search.train.batch_size": {"choices": [8, 16]}}
    launch(build(**narrow), storage=url, runtime=runtime, num_trials=2)
    wider = {"search.train.batch_size": {"choices": [4, 8, 16]}, "search.try": [{"train.batch_size": 4}]}
    study = launch(build(**wider), storage=url, runtime=runtime, num_trials=4)
    assert [trial.state for trial in study.trials][:2] == [TrialState.COMPLETE] * 2
    assert study.trials[2].params == {"train.batch_size": 4, "train.d_coef": 1.0}
    with pytest.raises(UserError, match="4 is missing"):
        launch(build(**narrow), storage=url, runtime=runtime, num_trials=4)


def test_ended_trials_are_brought_into_the_space_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []
    convert = StudyInSpace._convert

    def count(view: StudyInSpace, trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
        converted.extend([trial.number] * trial.state.is_finished())
        return convert(view, trial)

    monkeypatch.setattr(StudyInSpace, "_convert", count)
    wide = build(**WIDE)
    run(open_study(wide, url), wide, 6)
    assert sorted(converted) == list(range(5))
