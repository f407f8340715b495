"""The recommended trial: stored at a launch, its checkpoint kept, named, and promoted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.studies_for_tests import build
from trainer.checkpoint import holds_state
from tuner import launch, promote
from tuner.study import launch as launching
from tuner.study.keys import Recommendation, write_study
from tuner.study.recommendation import describe_recommendation
from tuner.study.record import StudyRecord, TrialRecord
from tuner.study.tracked_run import Runtime


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path / "runs", track=False)


def run(tmp_path: Path, runtime: Runtime, samples: int = 480) -> optuna.Study:
    return launch(build(**{"full.samples": samples}), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)


def recommend_the_last(space: Any, trials: Sequence[TrialRecord], **_: Any) -> Recommendation | None:
    complete = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.value or 0.0)
    if not complete:
        return None
    return {"trial": complete[-1].number, "best": complete[0].number, "probability": 0.75, "growth": 5.0}


def test_launch_stores_a_recommendation_for_a_long_full_run_alone(tmp_path: Path, runtime: Runtime) -> None:
    record = StudyRecord.read(run(tmp_path, runtime, samples=9600))
    assert record.recommendation is not None and record.best is not None
    assert record.recommendation["growth"] == pytest.approx(30**0.5)
    assert record.recommendation["best"] == record.best.number
    # Without a new trial.
    assert StudyRecord.read(run(tmp_path, runtime, samples=480)).recommendation is None
    (tmp_path / "short").mkdir()
    short = StudyRecord.read(run(tmp_path / "short", Runtime(tmp_path / "short/runs", track=False)))
    assert short.recommendation is None and short.recommended is short.best


def test_recommended_trial_keeps_its_checkpoint_and_is_promoted(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launching, "recommend", recommend_the_last)
    monkeypatch.setattr(launching, "KEEP_TRIALS", 1)
    study = run(tmp_path, runtime)
    record = StudyRecord.read(study)
    chosen = record.recommended
    assert chosen is record.ranked[-1] and chosen is not record.best
    kept = {trial.number for trial in record.ranked if trial.run_dir and holds_state(trial.run_dir)}
    assert kept == {record.ranked[0].number, chosen.number, 0}
    caplog.set_level("INFO")
    result = promote(study, runtime=runtime)
    assert result.run_dir.name == f"full-trial-{chosen.number:05d}"
    assert describe_recommendation(record) in caplog.messages


def test_recommendation_from_before_a_better_trial_is_not_used(tmp_path: Path, runtime: Runtime) -> None:
    study = run(tmp_path, runtime)
    ranked = StudyRecord.read(study).ranked
    write_study(
        study, recommendation={"trial": ranked[2].number, "best": ranked[1].number, "probability": 0.9, "growth": 5.0}
    )
    assert StudyRecord.read(study).recommended == ranked[0]


def test_sentence_names_the_trial_its_probability_and_the_growth(tmp_path: Path, runtime: Runtime) -> None:
    study = run(tmp_path, runtime)
    best, *_, last = (trial.number for trial in StudyRecord.read(study).ranked)
    assert describe_recommendation(StudyRecord.read(study)) is None
    write_study(study, recommendation={"trial": last, "best": best, "probability": 0.75, "growth": 5.477})
    assert describe_recommendation(StudyRecord.read(study)) == (
        f"trial {last} is recommended for the full run: there it is better than trial {best} with probability 0.75; "
        "the optimal batch size is expected to grow by a factor of 5.5 until its end"
    )
