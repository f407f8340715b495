"""A study's runs in Aim: trials and full runs name their Aim run, and the Aim runs name study and trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.studies_for_tests import build, values
from trainer.tracking import AimTracker, BackgroundTracker, aim_run
from tuner import StudySpec, launch, promote
from tuner.spec.workloads import folder_digest, load_workload_class
from tuner.study.tracked_run import Runtime, code_digest

# Aim's own code leaves files to the garbage collector and calls deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore")


def aim_runs(repo: Path) -> dict[str, Any]:
    from aim.sdk.repo import Repo

    return {run.hash: run for run in Repo.from_path(str(repo)).iter_runs()}


def test_trials_and_full_runs_and_their_aim_runs_name_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AimTracker, "PATIENCE_S", 300.0)
    url, runtime = f"sqlite:///{tmp_path}/tuner.db", Runtime(tmp_path / "runs")
    study = launch(build(**{"trial.num_trials": 2}), storage=url, runtime=runtime)
    promote(study, trial=1, runtime=runtime)
    (full,) = optuna.load_study(study_name="toy.full", storage=url).trials
    found = aim_runs(tmp_path / "runs")
    assert len(found) == 3
    for trial, number, name in ((study.trials[0], 0, "trial-00000"), (full, 1, "full-trial-00001")):
        run = found[trial.user_attrs["aim_run"]]
        assert aim_run(Path(trial.user_attrs["run_dir"])) == run.hash
        assert (run.experiment, run.name, run["study"], run["trial"]) == ("toy", name, "toy", number)
        assert run["train", "batch_size"] == trial.params["train.batch_size"]
        assert "sqlite" not in str(run[...]), "the link must hold in another storage too"


def test_runs_are_written_to_the_trackers_of_the_spec_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(BackgroundTracker, "PATIENCE_S", 300.0)
    given = {**values(**{"trial.num_trials": 1}), "track": {"to": ["tensorboard"]}}
    spec, runtime = StudySpec.build(given, base_dir=tmp_path), Runtime(tmp_path / "runs")
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    promote(study, runtime=runtime)
    for name in ("trial-00000", "full-trial-00000"):
        assert len(list((tmp_path / "runs" / "toy" / name).glob("events.out.tfevents.*"))) == 1
    assert not (tmp_path / "runs" / ".aim").exists()


def test_without_tracking_there_is_no_aim_run(tmp_path: Path, runtime: Runtime) -> None:
    study = launch(build(**{"trial.num_trials": 1}), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    assert "aim_run" not in study.trials[0].user_attrs
    assert not (runtime.run_root / ".aim").exists()


def test_codes_digest_is_that_of_the_files_beside_the_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_study.py").write_text("from tests.toy import Toy\nclass Mine(Toy): ...\n")
    workload = load_workload_class("of_a_study:Mine", tmp_path)()
    before = folder_digest(tmp_path)
    assert code_digest(workload) == before
    (tmp_path / "notes.txt").write_text("no code")
    # An editor's link beside an unsaved file, and a folder with a suffix.
    (tmp_path / ".#of_a_study.py").symlink_to("nobody@nowhere")
    (tmp_path / "folder.py").mkdir()
    assert folder_digest(tmp_path) == before
    (tmp_path / "layers.py").write_text("WIDTH = 3\n")
    assert folder_digest(tmp_path) != before
    assert code_digest(workload) == before, "what this process has imported"
