from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from optuna_dashboard import get_note
from pydantic import PrivateAttr
from torch import Tensor, nn

from tests.toy import Toy
from tests.tuner.promotion.conftest import Launched
from tests.tuner.studies_for_tests import build
from trainer import UserError
from trainer.checkpoint import BEST, lock_folder, read_checkpoint
from tuner import confirm, launch, promote
from tuner.promotion.curve_check import CurveCheck
from tuner.promotion.full_run import FullRun
from tuner.promotion.projection import MeasuredSpeed, Projection
from tuner.show.status import status
from tuner.study.keys import report_once
from tuner.study.record import CLAIM, StudyRecord, read_spec
from tuner.study.tracked_run import Runtime


@pytest.fixture
def study(launched: Launched, tmp_path: Path) -> optuna.Study:
    return launched(build(), tmp_path)


def curves(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="toy.full", storage=study._storage).trials


def test_best_trial_becomes_the_full_run_with_its_lineage(study: optuna.Study, runtime: Runtime) -> None:
    best = StudyRecord.read(study).ranked[0]
    result = promote(study, runtime=runtime)
    assert result.finished and result.samples == 480
    assert result.run_dir == runtime.run_dir("toy", f"full-trial-{best.number:05d}")
    checkpoint = read_checkpoint(result.run_dir / "latest.pth")
    assert checkpoint["lineage"]["trial"] == best.number
    assert checkpoint["lineage"]["params"] == best.params
    (record,) = study.user_attrs["promotions"]
    assert record["trial"] == best.number and record["run_dir"] == str(result.run_dir) and record["code_version"]


def test_full_run_continues_from_the_trials_checkpoint(study: optuna.Study, runtime: Runtime) -> None:
    best = StudyRecord.read(study).ranked[0]
    promote(study, runtime=runtime)
    (curve,) = curves(study)
    assert curve.params == best.params
    trial_curve = best.curve
    assert {step: curve.intermediate_values[step] for step in trial_curve} == trial_curve
    assert sorted(curve.intermediate_values) == [40, 80, 120, 160, 320, 480]
    log = (runtime.run_dir("toy", f"full-trial-{best.number:05d}") / "train.log").read_text()
    assert f"at step {160 // best.params['train.batch_size']}" in log


def test_promotion_from_the_checkpoint_equals_the_run_from_the_start(study: optuna.Study, runtime: Runtime) -> None:
    """A trial is a prefix of its full run."""
    best = StudyRecord.read(study).ranked[0]
    promoted = promote(study, runtime=runtime)
    for path in runtime.run_dir("toy", f"trial-{best.number:05d}").glob("*.pth"):
        path.unlink()
    shutil.rmtree(promoted.run_dir)
    fresh = promote(study, runtime=Runtime(runtime.run_root / "fresh", track=False))
    assert fresh.metrics == promoted.metrics


class Killed(BaseException):
    """The process ends here, and nothing after it runs."""


@pytest.mark.parametrize("where", ["link_checkpoint.link_checkpoint", "full_curve._open", "promote.tracked_train"])
def test_promotion_killed_before_its_first_step_restarts_with_its_lineage(
    study: optuna.Study, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = promote(study, runtime=Runtime(runtime.run_root / "whole", track=False))
    expected, (curve,) = study.user_attrs["promotions"][0], curves(study)
    optuna.delete_study(study_name="toy.full", storage=study._storage)
    study.set_user_attr("promotions", [])

    def kill(*given: object, **_: object) -> None:
        # Of the links, at the last one, which makes it a run that can be continued.
        if where != "link_checkpoint.link_checkpoint" or given[0].name == "latest.pth":  # type: ignore[attr-defined]
            raise Killed

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(f"tuner.promotion.{where}", kill)
        promote(study, runtime=runtime)
    result = promote(study, runtime=runtime)
    assert result.metrics == whole.metrics
    (record,), (resumed_curve,) = study.user_attrs["promotions"], curves(study)
    assert record["continued_from"] == expected["continued_from"] is not None
    assert resumed_curve.intermediate_values == curve.intermediate_values
    assert resumed_curve.user_attrs["continued_from"] == curve.user_attrs["continued_from"]
    lineages = [read_checkpoint(run.run_dir / "latest.pth")["lineage"]["continued_from"] for run in (result, whole)]
    assert lineages[0] == lineages[1] == {"run_dir": record["continued_from"], "step": record["continued_at"]}


def test_fresh_run_without_a_checkpoint_restarts_at_step_zero(study: optuna.Study, runtime: Runtime) -> None:
    def kill() -> bool:
        raise Killed

    confirmed = confirm(study, 1, num_seeds=1, runtime=runtime)
    with pytest.raises(Killed):
        promote(study, runtime=replace(runtime, stop=kill), fresh=True, confirmed=confirmed)
    verdict = study.user_attrs["promotions"][0]["confirmation"]["verdict"]
    promote(study, runtime=runtime)
    (record,) = study.user_attrs["promotions"]
    assert record["continued_from"] is None and record["confirmation"]["verdict"] == verdict
    assert min(curves(study)[0].intermediate_values) > 40


def test_full_run_of_a_record_without_the_step_continues(study: optuna.Study, runtime: Runtime) -> None:
    asked = itertools.count()
    promote(study, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 5))
    (record,) = study.user_attrs["promotions"]
    del record["continued_at"]
    study.set_user_attr("promotions", [record])
    assert promote(study, runtime=runtime).finished


def test_full_run_in_a_folder_that_was_moved_keeps_its_lineage(study: optuna.Study, runtime: Runtime) -> None:
    asked = itertools.count()
    promote(study, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 5))
    moved = runtime.run_root.rename(runtime.run_root.with_name("moved"))
    result = promote(study, runtime=Runtime(moved, track=False))
    assert result.finished
    assert read_checkpoint(result.run_dir / "latest.pth")["lineage"]["continued_from"]["step"] > 0
    assert len(study.user_attrs["promotions"]) == 1


def test_length_already_passed_is_refused(study: optuna.Study, runtime: Runtime) -> None:
    with pytest.raises(UserError, match=r"--steps 2: .* had a constant one until step \d\d?; give at least \d\d?\."):
        promote(study, runtime=runtime, steps=2)
    assert "promotions" not in study.user_attrs and StudyRecord.read(study).full_runs == []
    promote(study, runtime=runtime)
    with pytest.raises(UserError, match=r"--steps 2: .* give at least \d+\."):
        promote(study, runtime=runtime, steps=2)


class FailsLate(Toy):
    """Toy whose training fails in a full run."""

    _batches: int = PrivateAttr(0)

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._batches += model.training
        if self._batches > 160 / 4:
            raise ZeroDivisionError
        return super().loss_sums(model, inputs)


def test_note_of_a_failed_full_run_does_not_call_it_running(runtime: Runtime, tmp_path: Path) -> None:
    spec = build(**{"study.workload": "tests.tuner.promotion.test_promote:FailsLate", "trial.num_trials": 1})
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    with pytest.raises(ZeroDivisionError):
        promote(study, runtime=runtime, fresh=True, steps=100)
    note = get_note(study)
    assert "interrupted" in note and "running" not in note


def test_interrupted_promotion_continues_and_then_is_finished(study: optuna.Study, runtime: Runtime) -> None:
    asked = itertools.count()
    stopped = promote(study, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 5))
    assert not stopped.finished
    assert status(StudyRecord.read(study))["full_runs"][0]["state"] == "interrupted"
    assert promote(study, runtime=runtime).finished
    assert promote(study, runtime=runtime).finished
    assert [curve.state for curve in curves(study)] == [TrialState.COMPLETE]
    assert len(study.user_attrs["promotions"]) == 1
    (run,) = StudyRecord.read(study).full_runs
    steps = 480 // StudyRecord.read(study).ranked[0].params["train.batch_size"]
    assert (run.state, run.step, run.steps) == ("finished", steps, steps)


def test_finished_full_run_can_be_extended(study: optuna.Study, runtime: Runtime) -> None:
    steps = promote(study, runtime=runtime).step
    longer = promote(study, runtime=runtime, steps=2 * steps)
    assert longer.step == 2 * steps
    (run,) = StudyRecord.read(study).full_runs
    assert run.steps == 2 * steps


def test_requested_length_is_used_again(study: optuna.Study, runtime: Runtime) -> None:
    shorter = 240 // StudyRecord.read(study).ranked[0].params["train.batch_size"]
    asked = itertools.count()
    stopped = Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 0)
    promote(study, steps=shorter, runtime=stopped)
    assert promote(study, runtime=runtime).step == shorter


def test_chosen_trial_continues_without_a_choice_until_a_better_one_appears(
    study: optuna.Study, runtime: Runtime
) -> None:
    worse = StudyRecord.read(study).ranked[1].number
    promote(study, trial=worse, runtime=runtime)
    assert promote(study, runtime=runtime).run_dir.name == f"full-trial-{worse:05d}"


def test_finished_run_without_its_folder_is_repeated(study: optuna.Study, runtime: Runtime) -> None:
    first = promote(study, runtime=runtime)
    shutil.rmtree(first.run_dir)
    again = promote(study, runtime=runtime)
    assert again.finished and again.metrics == first.metrics


def test_fresh_run_without_its_folder_continues_from_the_trial(study: optuna.Study, runtime: Runtime) -> None:
    shutil.rmtree(promote(study, fresh=True, runtime=runtime).run_dir)
    promote(study, runtime=runtime)
    (record,) = study.user_attrs["promotions"]
    assert record["continued_from"] == str(StudyRecord.read(study).ranked[0].run_dir)


def test_stopped_run_without_its_folder_leaves_nothing_to_the_next_one(study: optuna.Study, runtime: Runtime) -> None:
    asked = itertools.count()
    stopped = promote(study, steps=900, runtime=replace(runtime, stop=lambda: next(asked) > 30))
    (curve,) = curves(study)
    study._storage.set_trial_user_attr(curve._trial_id, "decline", {"step": 9, "reason": "it rose", "outcome": ""})
    shutil.rmtree(stopped.run_dir)
    result = promote(study, runtime=runtime)
    (run,) = StudyRecord.read(study).full_runs
    assert result.samples == 480 and (run.steps, run.decline) == (result.step, None)
    assert len(curves(study)) == 2 and sorted(run.curve) == [40, 80, 120, 160, 320, 480]


def test_second_process_changes_nothing_of_a_run_that_begins(study: optuna.Study, runtime: Runtime) -> None:
    asked = itertools.count()
    run_dir = promote(study, runtime=replace(runtime, stop=lambda: next(asked) > 3)).run_dir
    before = StudyRecord.read(study).full_runs
    with lock_folder(run_dir, CLAIM), pytest.raises(UserError, match="is in use by another process"):
        promote(study, runtime=runtime, steps=900)
    assert StudyRecord.read(study).full_runs == before


def test_best_state_is_used_where_all_others_are_damaged(study: optuna.Study, runtime: Runtime) -> None:
    asked = itertools.count()
    run_dir = promote(study, runtime=replace(runtime, stop=lambda: next(asked) > 3)).run_dir
    shutil.copy(run_dir / "latest.pth", run_dir / BEST)
    for path in (*run_dir.glob("step_*.pth"), run_dir / "latest.pth"):
        path.write_bytes(b"damaged")
    assert promote(study, runtime=runtime).finished
    for path in run_dir.glob("*.pth"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"all states in .* are damaged: rename that folder"):
        promote(study, runtime=runtime)


def test_damaged_trial_checkpoint_restarts_at_step_zero(
    study: optuna.Study, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    best = StudyRecord.read(study).ranked[0]
    for path in runtime.run_dir("toy", f"trial-{best.number:05d}").glob("*.pth"):
        path.write_bytes(b"damaged")
    assert promote(study, runtime=runtime).finished
    assert "the full run starts at step 0" in caplog.text


def test_another_length_than_the_schedules_is_refused_without_a_trace(runtime: Runtime, tmp_path: Path) -> None:
    spec = build(**{"full.schedule": "cosine", "study.name": "cosine"})
    study = launch(spec, storage=f"sqlite:///{tmp_path}/cosine.db", runtime=runtime, num_trials=1)
    with pytest.raises(UserError, match="--steps 500: the trials followed a cosine over 60 steps"):
        promote(study, steps=500, runtime=runtime)
    assert "promotions" not in study.user_attrs and StudyRecord.read(study).full_runs == []
    longer = build(**{"full.schedule": "cosine", "study.name": "cosine", "full.samples": 960})
    with pytest.raises(UserError, match=r"full\.samples was 480 and is now 960"):
        launch(longer, storage=f"sqlite:///{tmp_path}/cosine.db", runtime=runtime)


def test_better_trial_after_the_full_run_needs_a_choice(study: optuna.Study, runtime: Runtime) -> None:
    worse = StudyRecord.read(study).ranked[1].number
    promote(study, trial=worse, runtime=runtime)
    best = study.ask(fixed_distributions=study.trials[0].distributions)
    best.set_user_attr("run_dir", str(runtime.run_dir("toy", "trial-00004")))
    study.tell(best, 0.0)
    best = best.number
    with pytest.raises(UserError, match=rf"--trial {worse} \(continue\) or --trial {best}"):
        promote(study, runtime=runtime)
    assert promote(study, trial=best, runtime=runtime).finished
    assert {run.trial for run in StudyRecord.read(study).full_runs} == {worse, best}


def test_impossible_promotion_is_refused_with_the_reason(study: optuna.Study, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial 99: it has 4"):
        promote(study, trial=99, runtime=runtime)
    study.ask()
    with pytest.raises(UserError, match="trial 4 of toy is running"):
        promote(study, trial=4, runtime=runtime)
    empty = launch(build(), storage=f"sqlite:///{tmp_path}/empty.db", runtime=runtime, timeout=0.0)
    with pytest.raises(UserError, match="no complete trial yet"):
        promote(empty, runtime=runtime)


def test_status_has_the_promised_form(study: optuna.Study, runtime: Runtime) -> None:
    promote(study, runtime=runtime)
    found = status(StudyRecord.read(study))
    assert list(found) == [
        *("study", "direction", "metric", "trials", "baseline", "best", "recommended", "recommendation", "edges"),
        *("full_runs", "trials_detail", "trial_length", "ended"),
    ]
    assert list(found["trials"]) == ["complete", "pruned", "infeasible", "failed", "running", "waiting"]
    assert found["baseline"]["number"] == 0 and found["best"]["value"] == study.best_value
    assert list(found["full_runs"][0]) == [
        *("run_dir", "trial", "step", "steps", "state", "phase", "decay_start", "decline", "metrics")
    ]


def test_best_checkpoints_of_the_trial_are_copied(study: optuna.Study, runtime: Runtime) -> None:
    """Else a full run that never beats its first samples would have none."""
    asked = itertools.count()
    run_dir = promote(study, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 0)).run_dir
    assert read_checkpoint(run_dir / "best_token_model.pth")["metrics"]


def test_fresh_run_starts_at_step_zero_and_repeats_the_trial(study: optuna.Study, runtime: Runtime) -> None:
    best = StudyRecord.read(study).ranked[0]
    result = promote(study, fresh=True, runtime=runtime)
    assert "continuing from" not in (result.run_dir / "train.log").read_text()
    assert read_checkpoint(result.run_dir / "latest.pth")["lineage"]["continued_from"] is None
    (curve,) = curves(study)
    assert sorted(curve.intermediate_values) == [160, 320, 480], "the trial's own points are not taken over"
    assert curve.intermediate_values[160] == best.value and "deviation" not in curve.user_attrs
    assert promote(study, fresh=True, runtime=runtime).finished, "the same command again"


def test_run_from_a_checkpoint_does_not_become_a_fresh_one(study: optuna.Study, runtime: Runtime) -> None:
    result = promote(study, runtime=runtime)
    origin = f"trial-{StudyRecord.read(study).ranked[0].number:05d}"
    assert read_checkpoint(result.run_dir / "latest.pth")["lineage"]["continued_from"]["run_dir"].endswith(origin)
    with pytest.raises(UserError, match=f"continued from {origin}: remove that folder"):
        promote(study, fresh=True, runtime=runtime)


@pytest.mark.parametrize(
    ("factor", "seed_curve", "deviates"),
    [(1.2, None, True), (1.02, None, False), (1.2, 0.5, False), (1.02, 0.01, True)],
    ids=["beyond 5%", "within 5%", "within the seeds' spread", "beyond the seeds' spread"],
)
def test_run_that_differs_from_its_trial_is_logged_and_recorded(
    study: optuna.Study,
    runtime: Runtime,
    caplog: pytest.LogCaptureFixture,
    factor: float,
    seed_curve: float | None,
    deviates: bool,
) -> None:
    """A trial that claims other values than its parameters give."""
    best = StudyRecord.read(study).ranked[0]
    real = best.curve[160]
    claimed = factor * real
    study.add_trial(
        optuna.trial.create_trial(
            value=0.0,
            params=best.params,
            distributions=best.distributions,
            intermediate_values={160: claimed},
            user_attrs={"run_dir": str(runtime.run_dir("toy", "trial-00004"))},
        )
    )
    if seed_curve is not None:
        record = {"run_dir": "elsewhere", "curve": {"160": claimed + seed_curve}, "failed": ""}
        study.set_user_attr("confirm-00004-seed-1", record)
    promote(study, trial=4, runtime=runtime)
    (curve,) = curves(study)
    assert ("deviates from it" in caplog.text) == deviates
    if deviates:
        allowed = 0.05 * claimed if seed_curve is None else seed_curve
        assert curve.user_attrs["deviation"] == [
            {"samples": 160, "trial": claimed, "full": real, "allowed": pytest.approx(allowed)}
        ]
    else:
        assert "deviation" not in curve.user_attrs


def test_full_run_without_a_common_point_logs_that(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = build(**{"full.eval_every": 100, "trial.num_trials": 1})
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    promote(study, runtime=runtime, fresh=True)
    assert (
        "can't be compared with trial 0: it is validated every 100 samples, "
        "the trial was validated every 40 samples up to 160" in caplog.text
    )


def test_trial_in_steps_is_compared_too(runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"full.eval_every": 80, "trial.steps": 20, "trial.num_trials": 1}
    study = launch(build(without="trial.samples", **values), storage=f"sqlite:///{tmp_path}/t.db", runtime=runtime)
    record = StudyRecord.read(study)
    assert CurveCheck(record, read_spec(study), record.trials[0]).expected.keys() == {40, 80, 120, 160}
    promote(study, runtime=runtime, fresh=True)
    assert "deviates" not in caplog.text and "compared with" not in caplog.text


def test_changed_workload_is_logged_before_the_full_run_and_the_next_trial(
    study: optuna.Study, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    promote(study, runtime=runtime)
    launch(build(), storage=study._storage, runtime=runtime, num_trials=4)
    assert "has changed" not in caplog.text
    for module in ("promotion.full_run", "study.launch"):
        monkeypatch.setattr(f"tuner.{module}.code_digest", lambda workload: "other")
    promote(study, runtime=runtime)
    best = StudyRecord.read(study).ranked[0].number
    assert f"the code of tests.toy:Toy has changed since trial {best} ran" in caplog.text
    launch(build(), storage=study._storage, runtime=runtime, num_trials=4)
    assert "has changed since trials 0, 1, 2, 3 ran" in caplog.text


def test_busy_storage_does_not_end_a_full_run(
    study: optuna.Study, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The database is held by somebody else at one validation."""
    reports = itertools.count()

    def report(curve: optuna.Trial, value: float, step: int) -> bool:
        if step > 160 and next(reports) == 0:
            raise StorageInternalError("An exception is raised during the commit.") from OSError("database is locked")
        return report_once(curve, value, step)

    monkeypatch.setattr("tuner.promotion.full_run.report_once", report)
    assert promote(study, runtime=runtime).finished
    assert "could not be written (database is locked): the run continues" in caplog.text
    assert 480 in curves(study)[0].intermediate_values


def test_cost_of_the_full_run_is_logged_beside_the_baselines(
    study: optuna.Study, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    best = next(trial for trial in StudyRecord.read(study).ranked if trial.number != 0)
    promote(study, trial=best.number, runtime=runtime)
    lines = [line for line in caplog.messages if line.startswith("full run of ")]
    steps = 480 // best.params["train.batch_size"]
    assert lines[0].startswith(f"full run of trial {best.number}: {steps} steps, 480 samples, 3.75 epochs")
    assert lines[1].startswith("full run of the baseline (trial 0) would be: 60 steps, 480 samples, 3.75 epochs")
    assert all("of memory" in line for line in lines)
    assert len(lines) == 2 and promote(study, trial=best.number, runtime=runtime).finished
    assert len([line for line in caplog.messages if line.startswith("full run of ")]) == 2, "a finished run takes none"


@pytest.mark.parametrize("fresh", [True, False], ids=["from step zero", "from the trial's checkpoint"])
def test_only_a_run_from_step_zero_is_compared_with_its_trial(
    study: optuna.Study, runtime: Runtime, caplog: pytest.LogCaptureFixture, fresh: bool
) -> None:
    """A trial with the best one's checkpoint that claims other values than that had."""
    best = StudyRecord.read(study).ranked[0]
    study.add_trial(
        optuna.trial.create_trial(
            value=0.0,
            params=best.params,
            distributions=best.distributions,
            intermediate_values={160: 1.2 * best.curve[160]},
            user_attrs={"run_dir": str(best.run_dir)},
        )
    )
    promote(study, trial=4, fresh=fresh, runtime=runtime)
    (curve,) = curves(study)
    assert ("deviates from it" in caplog.text) == ("deviation" in curve.user_attrs) == fresh


def test_measured_speed_is_logged_once_beside_the_baselines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    own = Projection("trial 3", 10_000, 80_000, 2.5, hours=None, memory=None)
    base = Projection("the baseline (trial 0)", 10_000, 80_000, 2.5, hours=12.5, memory=None)
    kept: list[float] = []
    speed = MeasuredSpeed([own, base], peak=lambda: 3_200_000_000, store_hours=kept.append, steps=50)
    for step in range(20, 200, 20):
        # The first interval holds the compilation, and three steps that are not timed.
        timed = {"train/samples_per_second": 2.0, "train/timed_steps": 17 if step == 20 else 20}
        speed.track(timed, step=step, samples=8 * step)
        speed.track({"val/loss": 1.0}, step=step, samples=8 * step)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "measured over 57 steps under its own plan: 11.1 h in all, 11.0 h left, 3.2 GB of memory at the peak, "
        "80,000 samples, 2.50 epochs; the baseline (trial 0) would take about 12.5 h"
    )
    assert kept == [pytest.approx(80_000 / 2 / 3600)]


@pytest.mark.parametrize("kill_at", range(4))
def test_longer_run_killed_while_its_curve_is_copied_keeps_the_whole_curve(
    study: optuna.Study, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    steps = promote(study, runtime=runtime).step
    (before,) = StudyRecord.read(study).full_runs
    reports = itertools.count()

    def kill(curve: optuna.Trial, value: float, step: int) -> bool:
        if next(reports) == kill_at:
            raise Killed
        return report_once(curve, value, step)

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr("tuner.promotion.full_curve.report_once", kill)
        promote(study, runtime=runtime, steps=2 * steps)
    (killed,) = StudyRecord.read(study).full_runs
    assert (killed.state, killed.steps) == ("finished", steps)
    promote(study, runtime=runtime, steps=2 * steps)
    (run,) = StudyRecord.read(study).full_runs
    constant = {samples: value for samples, value in before.curve.items() if samples < 480}
    assert constant.items() <= run.curve.items() and run.steps == 2 * steps
    assert run.continued_from == before.continued_from


def test_other_run_root_does_not_take_over_a_full_run(study: optuna.Study, runtime: Runtime) -> None:
    steps = itertools.count()
    stopped = promote(study, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(steps) > 5))
    with pytest.raises(UserError, match=rf"is in {stopped.run_dir}, at step \d+: give the --run-root"):
        promote(study, runtime=Runtime(runtime.run_root / "other", track=False))
    (run,) = StudyRecord.read(study).full_runs
    assert (run.run_dir, run.state) == (stopped.run_dir, "interrupted")
    assert promote(study, runtime=runtime).finished


def test_decay_is_not_compared_with_the_trial(study: optuna.Study, runtime: Runtime) -> None:
    """The trial's confirmation is three times as long, and claims values that no run has."""
    best = StudyRecord.read(study).ranked[0]
    claimed = {"run_dir": "elsewhere", "curve": {"320": 99.0, "480": 99.0}, "failed": ""}
    study.set_user_attr(f"confirm-{best.number:05d}-seed-0", claimed)
    promote(study, runtime=runtime, fresh=True)
    (run,) = StudyRecord.read(study).full_runs
    assert [deviation["samples"] for deviation in run.deviations] == [320]


def test_step_is_stored_between_validations(study: optuna.Study, runtime: Runtime) -> None:
    best = StudyRecord.read(study).ranked[0]
    run = FullRun.find_or_begin(study, best, runtime.run_dir("toy", "full-trial-x"))
    last = 480 // best.params["train.batch_size"] - 1
    run.trackers()[-1].track({}, step=last, samples=0)
    (record,) = StudyRecord.read(study).full_runs
    assert (record.step, record.phase) == (last, "decay")


def test_slow_storage_gets_no_further_step_soon(
    study: optuna.Study, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = StudyRecord.read(study).ranked[0]
    progress = FullRun.find_or_begin(study, best, runtime.run_dir("toy", "full-trial-x")).trackers()[-1]
    now, written = 0.0, []

    def write(*_: Any, step: int) -> None:
        nonlocal now
        written.append(step)
        now += 60

    monkeypatch.setattr("tuner.promotion.full_run.time.monotonic", lambda: now)
    monkeypatch.setattr("tuner.promotion.full_run.write_full_run", write)
    for step in range(200):
        progress.track({}, step=step, samples=0)
        now += 60
    assert written == [0, 100]
