"""launch(): the baseline first, the grid, resuming after an interruption, refusing incomparable settings."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from torch import nn

from scripts.quickstart import rerun
from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from trainer.checkpoint import lock_folder, read_checkpoint
from trainer.tracking import Trackers
from tuner import launch
from tuner.show.status import status
from tuner.spec.study_toml import Choice, StudySpec
from tuner.study import launch as launch_module
from tuner.study.record import StudyRecord
from tuner.study.samplers import build_pruner
from tuner.study.storage import load_study, open_storage
from tuner.study.tracked_run import Runtime


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tuner.db"


def stop_after(questions: int) -> Callable[[], bool]:
    asked = itertools.count()
    return lambda: next(asked) >= questions


def test_trial_zero_is_the_baseline(runtime: Runtime, url: str) -> None:
    study = launch(build(**{"trial.num_trials": 6}), storage=url, runtime=runtime)
    first = study.trials[0]
    assert first.params == {"train.batch_size": 8, "train.d_coef": 1.0}
    assert first.state == TrialState.COMPLETE and first.number == StudyRecord.read(study).baseline.number
    assert len(study.trials) == 6


def always(_: object) -> bool:
    return True


def test_baseline_runs_to_its_end_and_other_trials_are_pruned_once_their_d_rests(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", always)
    study = launch(build(), storage=url, runtime=runtime, num_trials=6)
    pruned = [trial.number for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned and 0 not in pruned
    for trial in study.trials[1:]:
        d = trial.user_attrs["d"]
        resting = [at for at in range(1, 3) if at < len(d) and 1.01e-6 < d[at] <= 1.01 * d[at - 1]]
        assert len(d) == (resting[0] + 1 if trial.number in pruned else 4)
        assert bool(resting) == (trial.number in pruned)


def test_trial_is_not_pruned_at_its_end(runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", always)
    adamw = {"train.optimizer": "adamw", "search.train.d_coef": {"low": 0.1, "high": 10.0}}
    study = launch(build(**adamw, **{"trial.evaluations": 1}), storage=url, runtime=runtime, num_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    study = launch(build(**adamw, **{"study.name": "two"}), storage=url, runtime=runtime, num_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert sorted(study.trials[1].intermediate_values) == [40]


def test_default_pruner_ends_the_worst_trials(runtime: Runtime, url: str) -> None:
    study = launch(build(**{"trial.num_trials": 14, "trial.samples": 320}), storage=url, runtime=runtime)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned and all(max(trial.intermediate_values) < 320 for trial in pruned)


def test_each_trial_has_a_seed_of_its_own(runtime: Runtime, url: str) -> None:
    """One seed would propose the same for every trial of a random search that is launched anew."""
    spec = build().model_copy(update={"sampler": build().sampler.model_copy(update={"name": "random"})})
    for total in (2, 3, 4):
        study = launch(spec, storage=url, runtime=runtime, num_trials=total)
    proposals = [trial.params["train.d_coef"] for trial in study.trials[1:]]
    assert len(set(proposals)) == 3


def test_unfillable_batch_size_is_refused_before_a_trial_runs(runtime: Runtime, url: str) -> None:
    spec = build(**{"search.train.batch_size": {"choices": [8, 500]}, "trial.samples": 4000, "full.schedule": "none"})
    with pytest.raises(UserError, match=r"may take 500 samples a step .* has 128"):
        launch(spec, storage=url, runtime=runtime)


def test_unknown_metric_is_refused_before_a_trial_runs(runtime: Runtime, url: str) -> None:
    with pytest.raises(UserError, match="metrics are val/loss, val/token_loss"):
        launch(build(**{"study.metric": "val/los"}), storage=url, runtime=runtime)


def test_moved_runs_resume(runtime: Runtime, url: str, tmp_path: Path) -> None:
    launch(build(), storage=url, runtime=Runtime(runtime.run_root, track=False, stop=stop_after(12)))
    runtime.run_root.rename(tmp_path / "moved")
    study = launch(build(), storage=url, runtime=Runtime(tmp_path / "moved", track=False), num_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]
    assert "continuing from" in (tmp_path / "moved/toy/trial-00000/train.log").read_text()


def test_all_trials_report_on_the_same_grid(runtime: Runtime, url: str) -> None:
    study = launch(
        build(**{"trial.samples": 400, "trial.num_trials": 5, "full.schedule": "none"}), storage=url, runtime=runtime
    )
    grids = [sorted(trial.intermediate_values) for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len({trial.params["train.batch_size"] for trial in study.trials}) > 1
    assert all(grid == [100, 200, 300, 400] for grid in grids)


def test_complete_study_runs_nothing_and_a_larger_total_continues(runtime: Runtime, url: str) -> None:
    launch(build(), storage=url, runtime=runtime, num_trials=2)
    assert len(launch(build(), storage=url, runtime=runtime, num_trials=2).trials) == 2
    assert len(launch(build(), storage=url, runtime=runtime, num_trials=3).trials) == 3


def test_stopped_trial_resumes_under_its_number(runtime: Runtime, url: str, tmp_path: Path) -> None:
    # The baseline has 20 steps: stopped within them.
    stopped = Runtime(runtime.run_root, track=False, stop=stop_after(12))
    study = launch(build(), storage=url, runtime=stopped)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    step = read_checkpoint(runtime.run_dir("toy", "trial-00000") / "latest.pth")["step"]
    assert 0 < step < 20

    study = launch(build(), storage=url, runtime=runtime, num_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    uninterrupted = launch(
        build(),
        storage=f"sqlite:///{tmp_path}/other.db",
        runtime=Runtime(tmp_path / "other", track=False),
        num_trials=2,
    )
    assert study.trials[0].intermediate_values == uninterrupted.trials[0].intermediate_values
    # Seeded by trial number: the interruption does not change the proposals.
    assert study.trials[1].params == uninterrupted.trials[1].params


def test_timeout_leaves_its_trial_running(runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A second passes from one look at the clock to the next.
    monkeypatch.setattr(launch_module, "time", SimpleNamespace(monotonic=partial(next, map(float, itertools.count()))))
    study = launch(
        build(**{"trial.samples": 100_000, "full.schedule": "none"}), storage=url, runtime=runtime, timeout=12.0
    )
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert study.user_attrs["ended"] == "the time given, 12.0s, is over"


def test_trial_claimed_by_another_process_is_skipped(runtime: Runtime, url: str) -> None:
    launch(build(), storage=url, runtime=Runtime(runtime.run_root, track=False, stop=stop_after(6)))
    with lock_folder(runtime.run_dir("toy", "trial-00000"), ".claim"):
        study = launch(build(), storage=url, runtime=runtime, num_trials=3)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE", "COMPLETE"]


def test_failed_baseline_is_retried_as_the_baseline(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "loss_sums", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch(build(), storage=url, runtime=runtime)
    monkeypatch.undo()
    study = launch(build(), storage=url, runtime=runtime, num_trials=1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    baseline = StudyRecord.read(study).baseline
    assert baseline is not None and baseline.number == 1
    assert study.trials[0].params == study.trials[1].params


def test_out_of_memory_is_infeasible_and_the_study_continues(runtime: Runtime, url: str) -> None:
    study = launch(build(**{"workload.explode_at_batch_size": 16, "trial.num_trials": 8}), storage=url, runtime=runtime)
    infeasible = [trial for trial in study.trials if "infeasible" in trial.user_attrs]
    assert infeasible and all(trial.params["train.batch_size"] == 16 for trial in infeasible)
    assert all(trial.constraints == {"memory": 1.0} for trial in infeasible)
    assert "CUDA out of memory" in infeasible[0].user_attrs["infeasible"]
    counts = status(StudyRecord.read(study))["trials"]
    assert counts["infeasible"] == len(infeasible) and sum(counts.values()) == 8
    assert StudyRecord.read(study).ranked[0].params["train.batch_size"] != 16


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"train.weight_decay": 0.1}, r"train\.weight_decay was 0\.01 and is now 0\.1"),
        ({"trial.samples": 320}, r"trial\.samples was 160 and is now 320"),
        ({"study.direction": "maximize"}, r"study\.direction"),
        ({"search.train.batch_size": {"choices": [4, 8]}}, r"search\.train\.batch_size"),
        ({"workload.width": 8}, r"workload\.width was 16 and is now 8"),
        ({"workload.digest": "new"}, "the data has changed"),
        ({"full.schedule": "cosine"}, r"full\.schedule was None and is now 'cosine'"),
    ],
)
def test_another_spec_under_the_same_name_is_refused(
    runtime: Runtime, url: str, changes: dict[str, object], phrase: str
) -> None:
    launch(build(), storage=url, runtime=runtime, num_trials=1)
    with pytest.raises(UserError, match=phrase):
        launch(build(**changes), storage=url, runtime=runtime)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('[sampler]\nname = "tpee"', "known are gp, tpe, random, qmc"),
        ('[sampler]\nname = "tpe"\nn_startup = 3', r"\[sampler\] tpe"),
        ('[sampler]\nname = "gp"\nn_startup_trials = 0', "n_startup_trials 0 must be a whole number of at least 1"),
        ('[sampler]\nname = "gp"\nhorizon = "far"', "horizon 'far' must be a number above 0"),
        ('[sampler]\nname = "tpe"\nseed = 3', r"\[sampler\] seed 3: set study\.seed instead"),
        ('[pruner]\nname = "percentile"\npercentile = 300', r"\[pruner\] percentile"),
    ],
)
def test_unknown_sampler_or_pruner_is_refused(tmp_path: Path, url: str, section: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(write(tmp_path, TOML + section), storage=url, runtime=Runtime(tmp_path, track=False))


@pytest.mark.parametrize("name", ["hyperband", "successive_halving"])
def test_first_rung_of_a_pruner_is_the_first_point_of_the_grid(name: str) -> None:
    assert build_pruner(Choice(name=name), 200)._min_resource == 200
    assert build_pruner(Choice(name=name, min_resource=400), 200)._min_resource == 400


class Broken(Toy):
    def build_model(self) -> nn.Module:
        if self.width < 0:
            raise ValueError("a negative width")
        return super().build_model()


def test_study_without_a_value_takes_a_corrected_spec(runtime: Runtime, url: str) -> None:
    def build_broken(width: int, **changes: Any) -> StudySpec:
        workload = {"study.workload": f"{__name__}:Broken", "workload.width": width}
        return build(**workload, **changes)

    with pytest.raises(ValueError, match="a negative width"):
        launch(build_broken(-1), storage=url, runtime=runtime, num_trials=1)
    study = launch(build_broken(8, **{"workload.digest": "other"}), storage=url, runtime=runtime, num_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    with pytest.raises(UserError, match=r"workload\.width was 8 and is now 16"):
        launch(build_broken(16, **{"workload.digest": "other"}), storage=url, runtime=runtime, num_trials=1)


class Lists(Toy):
    def val_data(self) -> Any:
        data = super().val_data()
        data.lengths = data.lengths.tolist()  # type: ignore[assignment]
        return data


class NoBatch(Toy):
    def collate(self, samples: Any, pad_multiple: int = 1) -> Any:
        return super().collate(samples, pad_multiple).inputs


class Untrainable(Toy):
    def build_model(self) -> nn.Module:
        return super().build_model().requires_grad_(False)


class Nothing(Toy):
    def build_model(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (Lists, r"Sequences\.lengths is a list: give a numpy array"),
        (NoBatch, r"NoBatch\.collate returns a dict: return a trainer\.Batch"),
        (Untrainable, "ToyModel has no parameter to train"),
        (Nothing, r"Nothing\.build_model returns a NoneType: return the model"),
    ],
)
def test_mistake_in_a_workload_is_one_line(runtime: Runtime, url: str, workload: type[Toy], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(build(**{"study.workload": f"{__name__}:{workload.__name__}"}), storage=url, runtime=runtime)


def test_only_the_best_trials_and_the_baseline_keep_their_checkpoints(runtime: Runtime, url: str) -> None:
    study = launch(build(**{"trial.num_trials": 8}), storage=url, runtime=runtime)
    kept = {int(path.parent.name[6:]) for path in runtime.run_root.glob("toy/trial-*/latest.pth")}
    assert kept == {0, *(trial.number for trial in StudyRecord.read(study).ranked[:3])}
    assert {int(path.parent.name[6:]) for path in runtime.run_root.glob("toy/trial-*/*.pth")} == kept


def test_study_of_another_program_is_refused(runtime: Runtime, url: str) -> None:
    optuna.create_study(study_name="toy", storage=url).ask()
    with pytest.raises(UserError, match="holds no spec"):
        launch(build(), storage=url, runtime=runtime)


def test_missing_data_leaves_no_half_made_study(runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> str:
        raise UserError("manifest train.jsonl can't be read")

    monkeypatch.setattr(Toy, "data_digest", missing)
    with pytest.raises(UserError, match="manifest"):
        launch(build(), storage=url, runtime=runtime)
    monkeypatch.undo()
    assert len(launch(build(), storage=url, runtime=runtime, num_trials=1).trials) == 1


def test_rerun_differs_in_its_seed_alone(runtime: Runtime, url: str) -> None:
    study = launch(build(), storage=url, runtime=runtime, num_trials=1)
    result = rerun(study, 0, seed=7, runtime=runtime, tracker=Trackers([]))
    assert result.samples == 160
    assert result.metrics["val/loss"] != study.trials[0].value
    one, other = (
        read_checkpoint(runtime.run_dir("toy", name) / "latest.pth")["identity"]["train"]
        for name in ("trial-00000", "trial-00000-seed-7")
    )
    assert {key for key in one if one[key] != other[key]} == {"seed"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_launch_resumes(tmp_path: Path, runtime: Runtime, url: str, how: signal.Signals) -> None:
    """A user interrupts or kills the command, and gives it again."""
    # Too long to end before the signal, on whatever machine.
    endless = TOML.replace("samples = 160", "samples = 4_000_000").replace("samples = 480", "samples = 8_000_000")
    endless = endless.replace("log_every = 5", "save_every = 5")
    spec = write(tmp_path, endless)
    command = [sys.executable, "-m", "tuner", "launch", str(spec), "--storage", url, "--no-track", "--trials", "2"]
    command += ["--run-root", str(runtime.run_root)]
    run_dir = runtime.run_dir("toy", "trial-00000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not (run_dir / "latest.pth").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(how)
        output, _ = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "The same command continues" in output
    study = load_study("toy", open_storage(url))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]

    step = read_checkpoint(run_dir / "latest.pth")["step"]
    launch(spec, storage=url, runtime=Runtime(runtime.run_root, track=False, stop=stop_after(6)))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert read_checkpoint(run_dir / "latest.pth")["step"] > step
    assert "continuing from" in (run_dir / "train.log").read_text()


def test_study_of_few_settings_ends_once_all_were_tried(runtime: Runtime, url: str) -> None:
    study = launch(build(without="search.train.d_coef", **{"trial.num_trials": 9}), storage=url, runtime=runtime)
    assert sorted(trial.params["train.batch_size"] for trial in study.trials) == [4, 8, 16]
    assert study.user_attrs["ended"] == "all 3 settings of [search] were tried"
