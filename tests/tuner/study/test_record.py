"""A study, its run directories and checkpoints as version 0.1.0 wrote them are read and continued as they were.

`study_0.1.0.tar.gz` holds the SQL dump of a database and the checkpoints of its runs: a baseline, two infeasible and
two complete trials, an interrupted one, a confirmation on two seeds, and a full run that was stopped at step 60 of 80.
"""

from __future__ import annotations

import platform
import sqlite3
import tarfile
from pathlib import Path

import optuna
import pytest
import torch

from tuner.promotion.promote import promote
from tuner.study.launch import launch, open_study
from tuner.study.record import FullRunRecord, StudyRecord, TrialRecord, full_study, read_spec
from tuner.study.storage import load_study, open_storage
from tuner.study.tracked_run import Runtime

ARCHIVE = Path(__file__).parent / "study_0.1.0.tar.gz"


OLD_VALUES = (
    (2.2064214178856383, 1.274164727393617)
    if torch.backends.cpu.get_cpu_capability() == "AVX2"
    else (2.2064255734707445, 1.2741665454621012)
)
"""Of trials 5 and 6 by the old code. Without AVX-512 PyTorch's kernels round otherwise."""


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    places = {"@PLACE@": str(tmp_path), "@BASE@": str(Path.cwd()), "@HOST@": platform.node()}
    sql = (tmp_path / "study.sql").read_text()
    for mark, place in places.items():
        sql = sql.replace(mark, place)
    database = sqlite3.connect(tmp_path / "runs" / "tuner.db")
    database.executescript(sql)
    database.close()
    return load_study("toy", open_storage(f"sqlite:///{tmp_path}/runs/tuner.db"))


def test_every_field_of_a_trial_is_read(study: optuna.Study, tmp_path: Path) -> None:
    trials = StudyRecord.read(study).trials
    assert [t.state for t in trials] == ["complete", "infeasible", "infeasible", "complete", "complete", "running"]
    first = trials[0]
    started, completed = first.started, first.completed
    assert started and completed and started < completed
    assert first == TrialRecord(
        number=0,
        state="complete",
        params={"train.batch_size": 8, "train.d_coef": 1.0},
        distributions=first.distributions,
        value=1.6817289311835106,
        curve={40: 2.918056536735372, 80: 2.9083838929521275, 120: 2.3523681640625, 160: 1.6817289311835106},
        started=started,
        completed=completed,
        is_feasible=True,
        run_dir=tmp_path / "runs/toy/trial-00000",
        host=platform.node(),
        owner=None,
        alive=None,
        code="7db81962274a212b",
        aim_run=None,
        is_baseline=True,
        tried={},
        starts=[1, 0, ""],
        infeasible=None,
        d=[1.16284e-05, 0.000496902, 0.0354605, 0.0407087],
        d_is_rising=True,
        full_hours=1.721854771225409e-05,
        full_length={"samples": 640},
        samples_per_second=10324.783526967083,
        micro_batch_size=8,
        memory=25276510208,
        peak_memory=481292288,
    )
    assert trials[1].infeasible == "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB"
    assert not trials[1].is_feasible
    assert trials[5].is_interrupted and trials[5].value == 2.8351032662898934


def test_every_field_of_a_study_is_read(study: optuna.Study, tmp_path: Path) -> None:
    record = StudyRecord.read(study)
    assert (record.name, record.metric, record.unit, record.minimized) == ("toy", "val/loss", "samples", True)
    assert (record.base_dir, record.data_digest, record.ended) == (Path.cwd(), "toy", "")
    assert record.spec["search"]["train.batch_size"] == {"choices": [4, 8, 16]}
    assert [t.number for t in record.ranked] == [0, 4, 3]
    assert [t.number for t in record.finished] == [0, 4, 3, 1, 2]
    assert record.best is record.baseline is record.trials[0]
    assert record.pareto_front == {0}
    assert record.confirmation_request and record.confirmation_request.options == "--confirm 1 --seeds 2 --rung 320"
    assert record.confirmation
    assert record.confirmation.winner.values == {0: 1.621131280127992, 1: 1.5116503127077792}
    assert record.confirmation.verdict.startswith("the baseline (trial 0) is the best of them")
    run = record.confirmation_run(0, 0)
    assert run and run.run_dir == str(tmp_path / "runs/toy/confirm-00000-seed-0") and run.failed == ""
    assert run.curve == {
        200: 1.6020646764876996,
        240: 1.651488608502327,
        280: 2.052676716256649,
        320: 1.621131280127992,
    }
    (promotion,) = record.promotions
    assert promotion["trial"] == promotion["best"] == 0 and promotion["continued_at"] == 40
    assert promotion["continued_from"] == run.run_dir and promotion["code_version"] == "0.1.0+caeff4a"


def test_every_field_of_a_full_run_is_read(study: optuna.Study, tmp_path: Path) -> None:
    (run,) = StudyRecord.read(study).full_runs
    assert run == FullRunRecord(
        number=0,
        trial=0,
        run_dir=tmp_path / "runs/toy/full-trial-00000",
        is_open=True,
        params={"train.batch_size": 8, "train.d_coef": 1.0},
        curve=run.curve,
        step=60,
        steps=80,
        decay_steps=None,
        metrics={"val/loss": 1.2980615494099068, "val/token_loss": 1.2980615494099068},
        started_at_zero=False,
        continued_from=tmp_path / "runs/toy/confirm-00000-seed-0",
        deviations=[],
        hours=None,
        aim_run=None,
        decline=None,
    )
    assert run.state == "interrupted"
    assert run.curve[40] == 2.918056536735372 and run.curve[480] == 1.2980615494099068


def test_interrupted_trial_and_study_continue_with_the_same_numbers(study: optuna.Study, tmp_path: Path) -> None:
    spec, storage = read_spec(study), f"sqlite:///{tmp_path}/runs/tuner.db"
    study = open_study(spec, storage)
    # What the sampler of that time proposed.
    study.enqueue_trial({"train.batch_size": 4, "train.d_coef": 0.8904215414936063})
    launch(study, spec, runtime=Runtime(tmp_path / "runs", track=False), num_trials=7)
    trials = StudyRecord.read(study).trials
    assert [trial.value for trial in trials[5:]] == pytest.approx(OLD_VALUES, rel=1e-6)
    assert trials[5].curve[80] == 2.8351032662898934
    first, last = study.get_trials(deepcopy=False)[0].user_attrs, study.get_trials(deepcopy=False)[6].user_attrs
    assert last.keys() == first.keys() - {"baseline"} | {"owner", "alive"}
    assert all(type(last[key]) is type(first[key]) for key in first if key in last)


def test_full_run_continues_with_the_same_numbers(study: optuna.Study, tmp_path: Path) -> None:
    (before,) = StudyRecord.read(study).full_runs
    result = promote(study, runtime=Runtime(tmp_path / "runs", track=False))
    assert (result.finished, result.step) == (True, 80)
    assert result.metrics["val/loss"] == pytest.approx(1.202132594331782, rel=1e-6)
    (run,) = StudyRecord.read(study).full_runs
    assert run.curve == {**before.curve, 640: result.metrics["val/loss"]}
    assert (run.state, run.step, run.continued_from) == ("finished", 80, before.continued_from)
    curves = full_study(study)
    assert curves is not None and len(curves.trials) == 1


def test_attributes_of_others_are_ignored(study: optuna.Study) -> None:
    study.set_user_attr("confirm-00099-seed-9", "yes")
    study.set_user_attr("confirm-00001-seed-5", {"note": "mine"})
    assert len(StudyRecord.read(study).confirmation_runs) == 2
    study.set_user_attr("confirmation", "looks good")
    assert StudyRecord.read(study).confirmation is None


def test_copied_study_finds_its_full_run(study: optuna.Study, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/runs/tuner.db"
    optuna.copy_study(from_study_name="toy", from_storage=storage, to_storage=storage, to_study_name="other")
    result = promote(load_study("other", open_storage(storage)), runtime=Runtime(tmp_path / "runs", track=False))
    assert result.run_dir == tmp_path / "runs/toy/full-trial-00000"
