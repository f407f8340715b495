"""Attacks on trials: their processes are killed again and again, for memory or for other reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.tuner.studies_for_tests import build
from tests.tuner.study.test_infeasible import KILLS, _kernel, killed_launch  # noqa: F401
from trainer import UserError
from trainer.cgroup import oom_kills
from tuner.api import launch
from tuner.study.tracked_run import Runtime


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 's.db'}"


def test_kills_that_had_nothing_to_do_with_memory_make_nothing_infeasible(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        killed_launch(runtime, url, monkeypatch, at=3, for_memory=False)
    study = launch(build(), storage=url, runtime=runtime, num_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_baseline_is_never_infeasible_by_its_kills(runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        killed_launch(runtime, url, monkeypatch, at=3)
    with pytest.raises(UserError, match=r"the baseline was killed 3 times before .*free some memory"):
        launch(build(), storage=url, runtime=runtime)
    study = launch(build(), storage=url, runtime=runtime, num_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE and study.trials[0].constraints == {}


def test_reboots_are_no_lack_of_memory(runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boots = iter(range(100))
    monkeypatch.setattr("tuner.study.objective.oom_kills", lambda: (f"boot-{next(boots)}", 1))
    for _ in range(4):
        killed_launch(runtime, url, monkeypatch, at=3)
    assert launch(build(), storage=url, runtime=runtime, num_trials=1).trials[0].state == TrialState.COMPLETE


@pytest.mark.parametrize(("at", "is_infeasible"), [(3, True), (8, False)])
def test_where_the_kernel_does_not_count_a_log_line_is_progress(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch, at: int, is_infeasible: bool
) -> None:
    monkeypatch.setattr("tuner.study.objective.oom_kills", lambda: None)
    spec = build(**{"trial.evaluations": 1, "train.save_every": 1000})
    launch(spec, storage=url, runtime=runtime, num_trials=1)
    for _ in range(3):
        killed_launch(runtime, url, monkeypatch, at=at, spec=spec)
    study = launch(spec, storage=url, runtime=runtime, num_trials=2)
    assert (study.trials[1].constraints == {"memory": 1.0}) == is_infeasible


def test_kernel_counts_its_kills(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\n")
    (tmp_path / "boot").write_text("a-b\n")
    assert oom_kills(tmp_path / "vmstat", tmp_path / "boot") == ("a-b", 3)
    (tmp_path / "vmstat").write_text("nr_free_pages 12\n")
    assert oom_kills(tmp_path / "vmstat", tmp_path / "boot") is None
    assert oom_kills(tmp_path / "none", tmp_path / "boot") is None
