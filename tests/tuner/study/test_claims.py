"""Claims of several machines on one study, whose processes share no lock."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from tests.tuner.studies_for_tests import build
from tuner.study import claims
from tuner.study.claims import claim_trial, describe_end, needs_more_trials
from tuner.study.launch import open_study
from tuner.study.record import StudyRecord
from tuner.study.storage import open_storage
from tuner.study.tracked_run import Runtime

ClaimOn = Callable[..., tuple[optuna.Trial, bool]]


@pytest.fixture
def claim_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Claim a trial as a machine of this name, with its own run root; it is held until the test ends."""
    url = f"sqlite:///{tmp_path}/tuner.db"
    with ExitStack() as held:

        def claim(
            machine: str, sampler: optuna.samplers.BaseSampler | None = None, **changes: Any
        ) -> tuple[optuna.Trial, bool]:
            spec = build(**changes)
            study = open_study(spec, open_storage(url))
            study.sampler = sampler or RandomSampler(seed=0)
            name = platform.node()
            monkeypatch.setattr(platform, "node", lambda: machine)
            found = claim_trial(study, spec, Runtime(tmp_path / machine, track=False), 10, held)
            monkeypatch.setattr(platform, "node", lambda: name)
            assert found is not None
            return found.trial, found.resumed

        yield claim


class Slow(RandomSampler):
    """While it thinks, another machine claims a trial."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        super().__init__(seed=0)
        self._meanwhile = meanwhile

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._meanwhile()


def test_trial_being_proposed_belongs_to_its_machine(claim_on: ClaimOn) -> None:
    claim_on("alpha")
    others: list[tuple[optuna.Trial, bool]] = []
    mine, resumed = claim_on("alpha", Slow(lambda: others.append(claim_on("beta"))))
    ((other, other_resumed),) = others
    assert (resumed, other_resumed) == (False, False)
    assert mine.number != other.number
    assert (mine.user_attrs["host"], other.user_attrs["host"]) == ("alpha", "beta")


def test_only_the_first_machine_has_the_baseline(claim_on: ClaimOn) -> None:
    others: list[tuple[optuna.Trial, bool]] = []
    first, _ = claim_on("alpha", Slow(lambda: others.append(claim_on("beta"))))
    assert first.user_attrs["baseline"] and first.suggest_float("train.d_coef", 0.1, 10.0) == 1.0
    assert not others[0][0].user_attrs.get("baseline")


def test_later_of_two_simultaneous_baselines_becomes_a_usual_trial(
    claim_on: ClaimOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_on("alpha")
    looks = iter((False, True))
    monkeypatch.setattr("tuner.study.claims._has_baseline", lambda trials: next(looks))
    later, _ = claim_on("beta")
    assert later.number == 1 and later.user_attrs["baseline"] is False
    assert later.suggest_float("train.d_coef", 0.1, 10.0) != 1.0, "not the baseline's value"


TWO: dict[str, Any] = {"search.try": [{"train.d_coef": 3.0}, {"train.batch_size": 16}]}


def params_of(trial: optuna.Trial) -> tuple[int, float]:
    return suggest_batch_size(trial), trial.suggest_float("train.d_coef", 0.1, 10.0)


def suggest_batch_size(trial: optuna.Trial) -> int:
    return trial.suggest_categorical("train.batch_size", [4, 8, 16])


def test_settings_of_the_user_follow_the_baseline_once(claim_on: ClaimOn) -> None:
    """The first one is not opened when the second is claimed."""
    claimed = [claim_on("alpha", **TWO)[0] for _ in range(4)]
    assert [params_of(trial) for trial in claimed[:3]] == [(8, 1.0), (8, 3.0), (16, 1.0)]
    assert params_of(claimed[3]) not in ((8, 3.0), (16, 1.0))
    assert [bool(trial.user_attrs.get("tried")) for trial in claimed] == [False, True, True, False]


def test_setting_that_was_added_later_is_tried_next(claim_on: ClaimOn) -> None:
    first = TWO["search.try"][:1]
    claimed = [claim_on("alpha", **{"search.try": first})[0] for _ in range(3)]
    sampled = params_of(claimed[2])
    more = {"search.try": [{"train.batch_size": sampled[0], "train.d_coef": sampled[1]}, *TWO["search.try"]]}
    assert params_of(claim_on("alpha", **more)[0]) == (16, 1.0), "the sampler's trial has the first one's parameters"
    assert params_of(claim_on("alpha", **more)[0]) != (16, 1.0)


def test_failed_setting_of_the_user_is_tried_again(claim_on: ClaimOn) -> None:
    claim_on("alpha", **TWO)
    trial = claim_on("alpha", **TWO)[0]
    trial.study.tell(trial, state=TrialState.FAIL)
    assert params_of(claim_on("alpha", **TWO)[0]) == (8, 3.0)


def test_later_of_two_simultaneous_tries_becomes_a_usual_trial(
    claim_on: ClaimOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_on("alpha", **TWO), claim_on("alpha", **TWO)
    entries = claims.list_untried([], build(**TWO))
    looks = iter((entries, entries[1:]))
    monkeypatch.setattr(claims, "list_untried", lambda trials, spec: next(looks, []))
    later, _ = claim_on("beta", **TWO)
    assert later.number == 2 and later.user_attrs["tried"] == {}
    assert params_of(later) != (8, 3.0)


def test_settings_of_the_user_count_and_outlast_patience(claim_on: ClaimOn) -> None:
    spec = build(**TWO, **{"trial.patience": 1})
    trial, _ = claim_on("alpha", **TWO)
    params_of(trial)
    trial.study.tell(trial, 1.0)
    other, _ = claim_on("alpha", **TWO)
    params_of(other)
    other.study.tell(other, 2.0)
    record = StudyRecord.read(trial.study)
    assert needs_more_trials(record, spec, 3)
    assert not needs_more_trials(record, build(**{"trial.patience": 1}), 3)
    assert not needs_more_trials(record, spec, 2)
    assert describe_end(record, spec, 2) == (
        "the study has its 2 trials; 1 of [[search.try]] not tried: raise trial.num_trials"
    )


def test_enqueued_trial_runs_next(claim_on: ClaimOn) -> None:
    first, _ = claim_on("alpha")
    first.study.enqueue_trial({"train.d_coef": 3.0})
    mine, resumed = claim_on("alpha")
    assert not resumed and mine.user_attrs["host"] == "alpha"
    assert mine.suggest_float("train.d_coef", 0.1, 10.0) == 3.0


def test_enqueued_trial_belongs_to_its_machine_during_sampling(claim_on: ClaimOn) -> None:
    first, _ = claim_on("alpha")
    first.study.enqueue_trial({"train.d_coef": 3.0})
    others: list[tuple[optuna.Trial, bool]] = []
    mine, _ = claim_on("alpha", Slow(lambda: others.append(claim_on("beta"))))
    assert mine.number != others[0][0].number


def test_running_trial_without_an_owner_is_not_counted(claim_on: ClaimOn) -> None:
    trial, _ = claim_on("alpha")
    trial.study.ask()
    record = StudyRecord.read(trial.study)
    assert [each.state for each in record.trials] == ["running"] * 2
    assert needs_more_trials(record, build(), 2) and not needs_more_trials(record, build(), 1)


def test_another_machines_trial_is_not_shown_as_interrupted(claim_on: ClaimOn) -> None:
    trial, _ = claim_on("alpha")
    (other,) = StudyRecord.read(trial.study).trials
    assert other.state == "running" and not other.is_interrupted


def test_trial_that_ends_while_the_trials_are_looked_at_is_not_taken(
    claim_on: ClaimOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With 64 workers a machine looks at their trials for long.
    monkeypatch.setattr(claims, "lock_folder", lambda *_: nullcontext())
    first, _ = claim_on("here")

    def end_first(*_: object) -> bool:
        if first.storage.get_trial(first._trial_id).state == TrialState.RUNNING:
            first.study.tell(first, 1.0)
        return False

    monkeypatch.setattr(claims, "is_locked", end_first)
    second, resumed = claim_on("here")
    assert (second.number, resumed) == (1, False)
