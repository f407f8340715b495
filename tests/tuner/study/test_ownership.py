"""A trial whose machine is gone is taken over, by one machine, and a late owner stops."""

from __future__ import annotations

import platform
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.commands import Command
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from trainer.checkpoint import read_checkpoint
from tuner import launch
from tuner.study import ownership
from tuner.study.keys import trial_name
from tuner.study.launch import open_study
from tuner.study.ownership import Owner
from tuner.study.record import TrialRecord
from tuner.study.storage import database_time, load_study, open_storage
from tuner.study.tracked_run import Runtime


class At:
    """A display that acts at a trial's validations."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count, self.seen = number, count, 0

    def trial_started(self, trial: TrialRecord, resumed: bool) -> At:
        self.seen = 0 if trial.number == self.number else -1000
        return self

    def trial_ended(self, trial: TrialRecord) -> None:
        """Nothing is shown."""

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.seen += "val/loss" in values
        if self.seen == self.count:
            self.act()

    def act(self) -> None:
        raise KeyboardInterrupt

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tuner.db"


def lose_machine(url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two trials begins on another machine, which is gone after its third validation."""
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "gone")
        with pytest.raises(KeyboardInterrupt):
            launch(build(**{"train.save_every": 5}), storage=url, runtime=runtime, num_trials=2, display=At(1, 3))


def take_over(url: str, monkeypatch: pytest.MonkeyPatch) -> Owner:
    """Take trial 0 as another machine."""
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "other")
        return Owner(optuna.load_study(study_name="toy", storage=open_storage(url)), 0)


def age(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the database's clock go on."""
    monkeypatch.setattr(ownership, "database_time", lambda storage: database_time(storage) + seconds)
    monkeypatch.setattr("tuner.study.claims.database_time", lambda storage: database_time(storage) + seconds)


@pytest.mark.parametrize("is_shared", [True, False])
def test_trial_of_a_machine_that_is_gone_continues_under_its_number(
    url: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    lose_machine(url, runtime, monkeypatch)
    if not is_shared:
        shutil.rmtree(runtime.run_root)
    study = launch(build(**{"train.save_every": 5}), storage=url, runtime=runtime, num_trials=2)
    assert study.trials[1].state == TrialState.RUNNING, "its machine may still train it"
    age(monkeypatch, ownership.LOST_AFTER_S + 60)
    study = launch(build(**{"train.save_every": 5}), storage=url, runtime=runtime, num_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert len(study.trials[1].intermediate_values) == 4
    run_dir = runtime.run_dir("toy", trial_name(1))
    assert read_checkpoint(run_dir / "latest.pth")["lineage"]["trial"] == 1
    assert ("continuing from" in (run_dir / "train.log").read_text()) == is_shared


def test_late_owner_stops_and_its_trial_has_one_end(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.0)
    others: list[Owner] = []

    class Taken(At):
        def act(self) -> None:
            others.append(take_over(url, monkeypatch))

    study = launch(build(), storage=url, runtime=runtime, num_trials=1, display=Taken(0, 2))
    assert study.trials[0].state == TrialState.RUNNING and len(study.trials[0].intermediate_values) == 2
    assert "trial 0 was taken over by other: it stops here" in caplog.messages
    assert not others[0].is_lost(at_once=True)


def test_owner_that_lost_its_trial_at_the_last_step_does_not_end_it(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(At):
        def act(self) -> None:
            take_over(url, monkeypatch)

    monkeypatch.setattr(ownership, "BEAT_S", 3600.0)
    study = launch(build(), storage=url, runtime=runtime, num_trials=1, display=Taken(0, 4))
    assert study.trials[0].state == TrialState.RUNNING


def test_owner_shows_life_once_a_minute(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(build(), open_storage(url))
    study.ask()
    owner = Owner(study, 0)
    before = TrialRecord.read(study.trials[0]).alive
    age(monkeypatch, 30)
    assert before is not None and not owner.is_lost() and TrialRecord.read(study.trials[0]).alive == before
    monkeypatch.setattr(ownership, "BEAT_S", 0.0)
    assert not owner.is_lost()
    assert TrialRecord.read(study.trials[0]).alive == pytest.approx(before + 30, abs=10)


def test_worker_joins_a_launched_study_by_its_name(
    url: str, tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TOML)
    assert run_command("worker", "toy", "--storage", url).returncode == 2
    assert run_command("launch", "study.toml", "--trials", "1", "--storage", url, "--no-track").returncode == 0
    (tmp_path / "study.toml").unlink()
    result = run_command("worker", "toy", "--storage", url, "--no-track")
    study = load_study("toy", open_storage(url))
    assert result.returncode == 0 and [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3, result
    assert len({trial.params["train.d_coef"] for trial in study.trials}) == 3
    again = run_command("worker", "none", "--storage", url)
    assert again.returncode == 2 and "study none: not in the storage (there: toy)" in again.stderr


class Finished(At):
    """Another machine takes trial 0 over, and ends it, while this one sleeps."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(0, 2)
        self.url, self.monkeypatch = url, monkeypatch

    def act(self) -> None:
        take_over(self.url, self.monkeypatch)
        optuna.load_study(study_name="toy", storage=open_storage(self.url)).tell(0, 1.0)


@pytest.mark.parametrize("beat", [0.0, 3600.0])
def test_owner_whose_trial_was_ended_meanwhile_goes_on_with_the_next(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, beat: float
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", beat)
    study = launch(build(), storage=url, runtime=runtime, num_trials=2, display=Finished(url, monkeypatch))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2 and study.trials[0].value == 1.0


def test_defect_after_the_loss_does_not_end_the_new_owners_trial(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(At):
        def act(self) -> None:
            take_over(url, monkeypatch)
            monkeypatch.setattr("tuner.study.objective.Objective._report", fail)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch(build(), storage=url, runtime=runtime, num_trials=1, display=Taken(0, 2))
    assert optuna.load_study(study_name="toy", storage=open_storage(url)).trials[0].state == TrialState.RUNNING


def test_two_machines_of_one_name_do_not_take_a_trial_in_turns(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.0)

    class Taken(At):
        def act(self) -> None:
            Owner(optuna.load_study(study_name="toy", storage=open_storage(url)), 0)

    with pytest.raises(UserError, match="trial 0 was taken over by another process that has this machine's name"):
        launch(build(), storage=url, runtime=runtime, num_trials=1, display=Taken(0, 2))


def test_long_validation_shows_life_at_its_batches(url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = Owner.is_lost

    def is_lost(owner: Owner, *, at_once: bool = False) -> bool:
        asked.append(
            "validation" if any("_signalling" in frame.name for frame in traceback.extract_stack()) else "step"
        )
        return real(owner, at_once=at_once)

    monkeypatch.setattr(Owner, "is_lost", is_lost)
    launch(build(), storage=url, runtime=runtime, num_trials=1)
    assert asked.count("validation") >= 4 and asked.count("step") >= 20
