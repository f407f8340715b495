"""The decay at the end of a full run: it can come later, or now."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.promotion.conftest import Launched
from tests.tuner.studies_for_tests import build, values
from trainer import TrainResult, UserError
from trainer.checkpoint import read_checkpoint, write_checkpoint
from tuner import launch, promote
from tuner.promotion.length import NO_REQUEST, Length, LengthRequest, decide_length
from tuner.show.status import status
from tuner.spec.study_toml import StudySpec
from tuner.study.record import FullRunRecord, StudyRecord
from tuner.study.tracked_run import Runtime


# One batch size: a trial has 20 steps, the full run 60, and its rate falls from step 49 on.
def spec_of(**changes: Any) -> StudySpec:
    return build(without="search.train.batch_size", **{"trial.num_trials": 2, **changes})


@pytest.fixture
def study(launched: Launched, tmp_path: Path) -> optuna.Study:
    return launched(spec_of(), tmp_path)


def stopping(runtime: Runtime, after: int) -> Runtime:
    """Stops a run after this number of steps."""
    asked = itertools.count()
    return Runtime(runtime.run_root, track=False, stop=lambda: next(asked) >= after)


def read_run(study: optuna.Study) -> FullRunRecord:
    (run,) = StudyRecord.read(study).full_runs
    return run


def end_of(result: TrainResult) -> dict[str, object]:
    state = read_checkpoint(result.run_dir / "latest.pth")
    return {"step": state["step"], "rate": state["optimizer"]["param_groups"][0]["lr"]}


def test_rate_falls_at_the_end_and_the_state_before_it_is_kept(study: optuna.Study, runtime: Runtime) -> None:
    result = promote(study, runtime=stopping(runtime, 28))
    assert end_of(result) == {"step": 48, "rate": 1.0} and read_run(study).phase == "constant"
    result = promote(study, runtime=stopping(runtime, 6))
    assert end_of(result) == {"step": 54, "rate": pytest.approx(7 / 12)}
    assert read_checkpoint(result.run_dir / "stable.pth")["step"] == 49
    found = status(StudyRecord.read(study))["full_runs"][0]
    assert (found["phase"], found["decay_start"], found["state"]) == ("decay", 49, "interrupted")
    assert end_of(promote(study, runtime=runtime)) == {"step": 60, "rate": pytest.approx(1 / 12)}


def test_longer_run_is_that_of_its_length_from_the_start(study: optuna.Study, runtime: Runtime, tmp_path: Path) -> None:
    elsewhere = Runtime(tmp_path / "elsewhere", track=False)
    other = launch(spec_of(), storage=f"sqlite:///{tmp_path}/other.db", runtime=elsewhere)
    straight = promote(other, steps=120, runtime=elsewhere)
    short = promote(study, runtime=runtime)
    longer = promote(study, steps=120, runtime=runtime)
    assert "at step 49" in (longer.run_dir / "train.log").read_text()
    assert longer.metrics == straight.metrics != short.metrics
    run = read_run(study)
    assert run.curve == read_run(other).curve
    assert (run.step, run.steps, run.decay_start, run.state) == (120, 120, 97, "finished")
    assert read_checkpoint(longer.run_dir / "stable.pth")["step"] == 97
    assert read_checkpoint(longer.run_dir / "latest.pth")["lineage"]["trial"] == run.trial


def test_run_in_its_decay_can_be_made_longer(study: optuna.Study, runtime: Runtime) -> None:
    promote(study, runtime=stopping(runtime, 35))
    assert read_run(study).step == 55
    promote(study, steps=100, runtime=stopping(runtime, 3))
    assert read_run(study).step == 52 and read_run(study).phase == "constant"
    run_dir = read_run(study).run_dir
    assert not (run_dir / "step_000000055.pth").exists(), "a state of the decay that the run has left"
    assert promote(study, runtime=runtime).step == 100


def test_best_weights_of_the_shorter_run_are_not_replaced_by_worse_ones(study: optuna.Study, runtime: Runtime) -> None:
    """The state before the decay has a worse best value than the end of the decay."""
    run_dir = promote(study, runtime=runtime).run_dir
    path, state = run_dir / "best_token_model.pth", read_checkpoint(run_dir / "best_token_model.pth")
    write_checkpoint({**state, "metrics": dict.fromkeys(state["metrics"], 0.0)}, path)
    longer = promote(study, steps=120, runtime=runtime)
    assert read_checkpoint(path)["metrics"]["val/loss"] == 0.0 and longer.best["val/token_loss"] == 0.0


def test_finish_decays_from_where_the_run_is(study: optuna.Study, runtime: Runtime) -> None:
    promote(study, runtime=stopping(runtime, 20))
    stopped = promote(study, finish=True, runtime=stopping(runtime, 3))
    assert end_of(stopped) == {"step": 43, "rate": pytest.approx(6 / 8)}
    run = read_run(study)
    assert (run.steps, run.decay_start, run.phase) == (48, 41, "decay")
    assert read_checkpoint(stopped.run_dir / "stable.pth")["step"] == 41
    assert promote(study, finish=True, runtime=runtime).step == 48, "the same command continues it"
    assert read_run(study).state == "finished" and promote(study, runtime=runtime).step == 48
    assert promote(study, steps=60, runtime=runtime).step == 60, "it can be made longer again"


def test_finish_over_a_number_of_steps(study: optuna.Study, runtime: Runtime) -> None:
    promote(study, runtime=stopping(runtime, 20))
    assert promote(study, finish=True, decay_steps=5, runtime=runtime).step == 45
    with pytest.raises(UserError, match="--decay-steps 7: the run decays since step 41, over 5 steps"):
        promote(study, finish=True, decay_steps=7, runtime=runtime)


def test_impossible_length_is_refused_and_nothing_is_lost(study: optuna.Study, runtime: Runtime) -> None:
    with pytest.raises(UserError, match="has no full run to finish"):
        promote(study, finish=True, runtime=runtime)
    assert StudyRecord.read(study).full_runs == []
    promote(study, runtime=stopping(runtime, 20))
    with pytest.raises(UserError, match=r"from step 37 on, .* until step 40; give at least 50, or --finish"):
        promote(study, steps=45, runtime=runtime)
    assert promote(study, steps=50, runtime=runtime).step == 50
    run_dir = read_run(study).run_dir
    stable = run_dir / "stable.pth"
    stable.rename(run_dir / "away.pth")
    with pytest.raises(UserError, match=r"can't continue from .*stable\.pth \(checkpoint .* does not exist"):
        promote(study, steps=100, runtime=runtime)
    assert read_run(study).steps == 50 and (run_dir / "latest.pth").exists()


def test_run_that_began_with_a_constant_rate_keeps_it(runtime: Runtime, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/tuner.db"
    study = launch(spec_of(**{"full.schedule": "none"}), storage=storage, runtime=runtime)
    promote(study, runtime=stopping(runtime, 20))
    launch(spec_of(), storage=storage, runtime=runtime)
    assert end_of(promote(study, runtime=stopping(runtime, 18))) == {"step": 58, "rate": 1.0}
    assert read_run(study).phase is None
    assert promote(study, finish=True, runtime=runtime).step == 58 + 12


def test_cosine_has_one_length(runtime: Runtime, tmp_path: Path) -> None:
    spec = spec_of(**{"full.schedule": "cosine"})
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    promote(study, runtime=stopping(runtime, 20))
    with pytest.raises(UserError, match="--finish: the rate of this run falls from its start"):
        promote(study, finish=True, runtime=runtime)
    assert promote(study, runtime=runtime).step == 60


def test_budget_in_seconds_that_reaches_the_decay_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    given = values(**{"full.samples": 80})
    given["trial"] = {"seconds": 1, "evaluations": 1}
    del given["search"]["train.batch_size"]
    spec = StudySpec.build(given, base_dir=Path.cwd())
    with pytest.raises(UserError, match=r"seconds 1: trial 0 is at step [\d,]+, and its full run decays from step 9"):
        launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)


def test_finish_of_a_run_that_was_killed_before_its_first_checkpoint(study: optuna.Study, runtime: Runtime) -> None:
    """Its folder has the trial's checkpoint alone, after 20 steps."""
    promote(study, runtime=stopping(runtime, 0))
    assert promote(study, finish=True, runtime=runtime).step == 20 + 4


def test_longer_run_that_was_killed_at_once_can_be_finished_or_taken_back(
    study: optuna.Study, runtime: Runtime
) -> None:
    promote(study, runtime=runtime)
    promote(study, steps=120, runtime=stopping(runtime, 0))
    assert (read_run(study).step, read_run(study).steps, read_run(study).phase) == (49, 120, "constant")
    assert promote(study, steps=60, runtime=runtime).step == 60
    assert read_run(study).state == "finished"
    promote(study, steps=120, runtime=stopping(runtime, 0))
    assert promote(study, finish=True, runtime=stopping(runtime, 2)).step == 51
    assert (read_run(study).steps, read_run(study).decay_start) == (59, 50)


def test_damaged_state_before_the_decay_leaves_the_run_as_it_is(study: optuna.Study, runtime: Runtime) -> None:
    run_dir = promote(study, runtime=stopping(runtime, 35)).run_dir
    (run_dir / "stable.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"can't continue from .*stable\.pth \(checkpoint .* is damaged"):
        promote(study, steps=100, runtime=runtime)
    assert read_run(study).steps == 60 and promote(study, runtime=runtime).step == 60


def test_run_of_an_early_version_keeps_its_decay(study: optuna.Study, runtime: Runtime) -> None:
    """That version stored no `decay_steps`."""
    promote(study, runtime=stopping(runtime, 20))
    curves = optuna.load_study(study_name="toy.full", storage=study._storage)
    (curve,) = curves.trials
    attrs = {key: value for key, value in curve.user_attrs.items() if key != "decay_steps"}
    curves._storage.set_trial_state_values(curve._trial_id, optuna.trial.TrialState.FAIL)
    older = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        params=curve.params,
        distributions=curve.distributions,
        user_attrs=attrs,
        intermediate_values=curve.intermediate_values,
    )
    curves._storage.create_new_trial(curves._study_id, template_trial=older)
    assert end_of(promote(study, runtime=runtime)) == {"step": 60, "rate": pytest.approx(1 / 12)}


def test_trial_beyond_the_decay_of_a_shorter_full_run(runtime: Runtime, tmp_path: Path) -> None:
    given = values(**{"full.samples": 80_000})
    given["trial"] = {"seconds": 1, "evaluations": 1, "num_trials": 1}
    del given["search"]["train.batch_size"]
    storage = f"sqlite:///{tmp_path}/tuner.db"
    study = launch(StudySpec.build(given, base_dir=Path.cwd()), storage=storage, runtime=runtime)
    given["full"]["samples"] = 160
    launch(StudySpec.build(given, base_dir=Path.cwd()), storage=storage, runtime=runtime)
    with pytest.raises(UserError, match=r"the full run of 20 steps decays from step 17: .* --steps \d+"):
        promote(study, runtime=runtime)
    assert StudyRecord.read(study).full_runs == [] and "promotions" not in study.user_attrs


def test_fresh_run_keeps_the_length_that_it_was_started_with(study: optuna.Study, runtime: Runtime) -> None:
    promote(study, fresh=True, steps=100, runtime=stopping(runtime, 30))
    assert promote(study, fresh=True, runtime=runtime).step == 100


def test_run_without_a_state_is_not_in_its_decay(tmp_path: Path) -> None:
    """The full run became shorter after a confirmation of 30 steps: it has 25 now, and decays from 21 on."""
    spec = spec_of(**{"full.samples": 200})

    def decide(request: LengthRequest) -> Length:
        return decide_length(spec, {}, request, last=None, origin=30, run_dir=tmp_path)

    with pytest.raises(UserError, match=r"its checkpoint is of step 30, .* 25 steps decays from step 21: .*--steps 38"):
        decide(NO_REQUEST)
    assert decide(LengthRequest(steps=38)).setup.config.decay_start == 31
    with pytest.raises(UserError, match=r"--steps 30: the learning rate would fall from step 25 .* give at least 38\."):
        decide(LengthRequest(steps=30))


def test_milestones_and_samples_of_a_shorter_run_are_set_aside(runtime: Runtime, tmp_path: Path) -> None:
    study = launch(spec_of(**{"train.keep_every": 10}), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    run_dir = promote(study, runtime=runtime).run_dir
    decayed = (run_dir / "milestone_000000060.pth").read_bytes()
    for step in (30, 60):
        (run_dir / f"samples/step_{step:09d}").mkdir(parents=True)
    promote(study, steps=120, runtime=runtime)
    assert (run_dir / "replaced-1/milestone_000000060.pth").read_bytes() == decayed
    assert (run_dir / "milestone_000000060.pth").read_bytes() != decayed
    assert {str(path.relative_to(run_dir)) for path in run_dir.glob("**/step_*/")} == {
        "samples/step_000000030",
        "replaced-1/samples/step_000000060",
    }
