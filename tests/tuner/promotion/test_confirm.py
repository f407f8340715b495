"""tuner promote --confirm: longer runs of the best trials and the baseline, on several seeds, paid for once."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import create_trial

from tests.toy import Toy
from tests.tuner.promotion.conftest import Launched
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from trainer.checkpoint import read_checkpoint
from tuner import confirm, launch, open_study, promote
from tuner.cli import main
from tuner.promotion.length import NO_REQUEST
from tuner.promotion.promote import check_before_confirmation
from tuner.show.status import status_parts
from tuner.show.table import confirmation_table
from tuner.study.confirmation import Confirmation, ConfirmationRequest, ConfirmedTrial
from tuner.study.keys import confirmation_run_name, write_confirmation, write_study
from tuner.study.objective import Interrupted
from tuner.study.record import StudyRecord
from tuner.study.tracked_run import Runtime


class Diverging(Toy):
    """Toy whose loss is no number under training seed 1."""

    def loss_sums(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        factor = float("nan") if torch.initial_seed() == 1 else 1.0
        return {name: factor * value for name, value in super().loss_sums(model, inputs).items()}


class Steps:
    """Counts the figures that a run gives out."""

    def __init__(self) -> None:
        self.count = 0

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.count += 1

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def study(launched: Launched, tmp_path: Path) -> optuna.Study:
    return launched(build(**{"trial.num_trials": 3}), tmp_path)


def with_trials(tmp_path: Path, *values: float, **changes: object) -> optuna.Study:
    """A study with complete trials without training; the first is the baseline."""
    study = open_study(build(**changes), f"sqlite:///{tmp_path}/made.db")
    distributions = {
        "train.batch_size": optuna.distributions.CategoricalDistribution([4, 8, 16]),
        "train.d_coef": optuna.distributions.FloatDistribution(0.1, 10.0, log=True),
    }
    for number, value in enumerate(values):
        params = {"train.batch_size": 8, "train.d_coef": 1.0 + number}
        attrs = {"baseline": number == 0, "run_dir": str(tmp_path / f"{number}")}
        study.add_trial(create_trial(value=value, params=params, distributions=distributions, user_attrs=attrs))
    return study


def test_best_and_the_baseline_run_longer_on_every_seed(study: optuna.Study, runtime: Runtime) -> None:
    best = StudyRecord.read(study).ranked[0]
    found = confirm(study, 1, runtime=runtime)
    assert (found.rung, found.unit) == (320, "samples")
    assert {trial.number for trial in found.trials} == {0, best.number}
    assert all(list(trial.values) == [0, 1] and trial.spread > 0 for trial in found.trials)
    assert found.trials == sorted(found.trials, key=lambda trial: trial.mean)

    own, other = (runtime.run_dir("toy", confirmation_run_name(best.number, seed)) for seed in (0, 1))
    step = 160 // best.params["train.batch_size"]
    assert f"at step {step}" in (own / "train.log").read_text(), "only what the trial has not seen is paid for"
    assert "continuing from" not in (other / "train.log").read_text()
    assert (own / "latest.pth").exists() and not list(other.glob("*.pth"))
    curve = study.user_attrs[confirmation_run_name(best.number, 1)]["curve"]
    assert list(curve) == ["40", "80", "120", "160", "200", "240", "280", "320"]


def test_finished_confirmation_runs_are_not_repeated(study: optuna.Study, runtime: Runtime) -> None:
    first = confirm(study, 1, runtime=runtime)
    shutil.rmtree(runtime.run_root)
    steps = Steps()
    assert confirm(study, 1, runtime=runtime, follow=lambda name: nullcontext(steps)) == first
    assert steps.count == 0
    assert len(confirm(study, 1, num_seeds=1, runtime=runtime).winner.values) == 1


def test_stopped_confirmation_resumes_with_the_same_result(study: optuna.Study, runtime: Runtime) -> None:
    whole = confirm(study, 1, runtime=runtime)
    for trial, seed in itertools.product(whole.trials, (0, 1)):
        study.set_user_attr(confirmation_run_name(trial.number, seed), {})
        shutil.rmtree(runtime.run_dir("toy", confirmation_run_name(trial.number, seed)))
    asked = itertools.count()
    stopped = Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 12)
    with pytest.raises(Interrupted):
        confirm(study, 1, runtime=stopped)
    assert confirm(study, 1, runtime=runtime) == whole


def test_full_run_continues_from_the_confirmed_one(study: optuna.Study, runtime: Runtime) -> None:
    confirmed = confirm(study, 1, runtime=runtime)
    winner = confirmed.winner
    result = promote(study, confirmed=confirmed, runtime=runtime)
    assert result.samples == 480
    step = 320 // winner.params["train.batch_size"]
    origin = runtime.run_dir("toy", confirmation_run_name(winner.number, 0))
    lineage = read_checkpoint(result.run_dir / "latest.pth")["lineage"]
    assert lineage["continued_from"] == {"run_dir": str(origin), "step": step} and lineage["trial"] == winner.number
    assert f"at step {step}" in (result.run_dir / "train.log").read_text()
    (record,) = study.user_attrs["promotions"]
    assert record["continued_from"] == str(origin) and record["confirmation"]["verdict"] == confirmed.verdict
    (curve,) = optuna.load_study(study_name="toy.full", storage=study._storage).trials
    assert sorted(curve.intermediate_values) == [40, 80, 120, 160, 200, 240, 280, 320, 480]
    assert curve.intermediate_values[320] == winner.values[0]


def test_confirmed_run_is_a_prefix_of_one_from_step_zero(study: optuna.Study, runtime: Runtime) -> None:
    confirmed = confirm(study, 1, runtime=runtime)
    promote(study, confirmed=confirmed, fresh=True, runtime=runtime)
    (curve,) = optuna.load_study(study_name="toy.full", storage=study._storage).trials
    assert curve.intermediate_values[320] == confirmed.winner.values[0]
    assert "deviation" not in curve.user_attrs


def test_unfinished_confirmation_is_logged_and_a_finished_one_is_promoted(
    study: optuna.Study, runtime: Runtime
) -> None:
    asked = itertools.count()
    with pytest.raises(Interrupted):
        confirm(study, 1, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 12))
    best = StudyRecord.read(study).ranked[0].number
    unfinished = rf"is unfinished: continue it \(--confirm 1 --seeds 2 --rung 320\).*--trial {best}"
    with pytest.raises(UserError, match=unfinished):
        promote(study, runtime=runtime)
    assert "promotions" not in study.user_attrs and StudyRecord.read(study).confirmation is None

    found = confirm(study, 1, runtime=runtime)
    assert StudyRecord.read(study).confirmation == found, "the storage's JSON gives back the same"
    assert f"confirmed: {found.verdict}" in [str(part) for part in status_parts(StudyRecord.read(study))]
    result = promote(study, runtime=runtime)
    assert result.run_dir.name == f"full-trial-{found.winner.number:05d}"
    assert study.user_attrs["promotions"][0]["confirmation"]["verdict"] == found.verdict


def test_winner_beside_a_full_run_is_named(
    study: optuna.Study, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    winner = confirm(study, 1, num_seeds=1, runtime=runtime).winner.number
    other = next(trial.number for trial in StudyRecord.read(study).ranked if trial.number != winner)
    promote(study, trial=other, runtime=runtime)
    promote(study, runtime=runtime)
    assert f"trial {winner} won the confirmation: --trial {winner} starts its full run" in caplog.text
    check_before_confirmation(study, NO_REQUEST, fresh=False)
    assert f"the full run of trial {other} was started" in caplog.text


def test_better_trial_after_the_confirmation_needs_a_choice(runtime: Runtime, tmp_path: Path) -> None:
    study = with_trials(tmp_path, 2.0, 1.0)
    write_confirmation(study, ConfirmationRequest(1, 2, 320, best=1), found(one(0, 2.0, 2.1), one(1, 1.0, 1.1)))
    study.add_trial(create_trial(value=0.5, params=study.trials[0].params, distributions=study.trials[0].distributions))
    with pytest.raises(UserError, match=r"trial 2 is recommended since .*--trial 2 or --trial 1 \(which won\)"):
        promote(study, runtime=runtime)


def test_unfinished_full_run_needs_a_choice(study: optuna.Study, runtime: Runtime) -> None:
    confirmed = confirm(study, 1, runtime=runtime)
    other = next(trial.number for trial in StudyRecord.read(study).ranked if trial.number != confirmed.winner.number)
    study.set_user_attr("promotions", [{"trial": other, "best": other, "run_dir": "elsewhere"}])
    with pytest.raises(UserError, match=rf"--trial {other} \(continue\) or --trial {confirmed.winner.number}"):
        promote(study, confirmed=confirmed, runtime=runtime)


def test_diverged_run_is_kept_and_can_not_win(runtime: Runtime, tmp_path: Path) -> None:
    study = with_trials(tmp_path, 1.0, 2.0, **{"study.workload": "tests.tuner.promotion.test_confirm:Diverging"})
    with pytest.raises(UserError, match=r"no trial completed its confirmation .*trial 0, seed 1: none of the last"):
        confirm(study, 1, runtime=runtime)
    assert (
        study.user_attrs[confirmation_run_name(0, 1)]["failed"]
        and not study.user_attrs[confirmation_run_name(0, 0)]["failed"]
    )


@pytest.mark.parametrize(
    ("full", "rung", "most"),
    [(100_000, 320, 80_008), (1000, 250, 808), (240, 200, 200)],
    ids=["twice the trial", "a quarter of the full run", "never into the decay"],
)
def test_rung_is_between_trial_and_full_run(runtime: Runtime, tmp_path: Path, full: int, rung: int, most: int) -> None:
    study = with_trials(tmp_path, 1.0, **{"full.samples": full})
    with pytest.raises(Interrupted):
        confirm(study, 1, runtime=Runtime(runtime.run_root, track=False, stop=lambda: True))
    log = runtime.run_dir("toy", confirmation_run_name(0, 0)) / "train.log"
    assert log.exists()
    with pytest.raises(UserError, match=rf"no longer than the full run up to its decay \({most:,}\)"):
        confirm(study, 1, rung=most + 1, runtime=runtime)
    assert confirm(study, 1, num_seeds=1, runtime=runtime).rung == rung


@pytest.mark.parametrize(
    ("changes", "rung", "message"),
    [
        ({}, 160, r"--rung 160: it must be longer than a trial \(160 samples\)"),
        ({"full.samples": 160, "full.schedule": "none"}, None, "there is nothing to confirm"),
    ],
)
def test_rung_that_does_not_fit_is_refused(
    runtime: Runtime, tmp_path: Path, changes: dict[str, object], rung: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        confirm(with_trials(tmp_path, 1.0, **changes), 1, rung=rung, runtime=runtime)


def test_shorter_rung_than_was_run_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    study = with_trials(tmp_path, 1.0)
    confirm(study, 1, num_seeds=1, runtime=runtime)
    with pytest.raises(UserError, match=r"--rung 170: confirm-00000-seed-0 is at 320 already"):
        confirm(study, 1, num_seeds=1, rung=170, runtime=runtime)


def test_study_without_a_complete_trial_can_not_be_confirmed(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete trial yet"):
        confirm(with_trials(tmp_path), 1, runtime=runtime)


def found(*trials: ConfirmedTrial, minimized: bool = True, baseline: int | None = 0) -> Confirmation:
    sign = 1 if minimized else -1
    whole = sorted((t for t in trials if not t.failed), key=lambda t: sign * t.mean)
    ranked = [*whole, *(t for t in trials if t.failed)]
    return Confirmation("val/loss", minimized, "samples", 320, ranked, baseline)


def one(number: int, *values: float, failed: str = "") -> ConfirmedTrial:
    return ConfirmedTrial(number, {"train.d_coef": 0.5}, dict(enumerate(values)), failed)


@pytest.mark.parametrize(
    ("confirmation", "verdict"),
    [
        (found(one(0, 3.0, 3.2), one(4, 2.0, 2.2)), "trial 4 is 1.0000 better than the baseline, and seeds alone diff"),
        (found(one(0, 3.0, 3.2), one(4, 2.9, 3.1)), "trial 4 is within noise of the baseline: 0.1000 better, and seed"),
        (found(one(0, 0.1, 0.1), one(4, 0.5, 0.6), minimized=False), "trial 4 is 0.4500 better than the baseline"),
        (found(one(0, 2.0, 2.2), one(4, 3.0, 3.1)), "the baseline (trial 0) is the best of them"),
        (found(one(0, 3.0), one(4, 2.0)), "one seed does not show how much of it is noise"),
        (found(one(0, 3.0, failed="seed 1: nan"), one(4, 2.0, 2.1)), "the baseline has no value to compare it with"),
        (found(one(4, 2.0, 2.1), baseline=None), "the baseline has no value to compare it with"),
    ],
)
def test_verdict_rates_the_winner(confirmation: Confirmation, verdict: str) -> None:
    assert verdict in confirmation.verdict


def test_noise_is_pooled_over_all_trials() -> None:
    assert found(one(0, 3.0, 3.3), one(4, 2.0, 2.4)).noise == pytest.approx((0.5 * (0.3**2 + 0.4**2)) ** 0.5)


def test_promote_command_confirms_and_promotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, TOML.replace("num_trials = 3", "num_trials = 2"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    launch(tmp_path / "study.toml", runtime=Runtime(track=False))

    def give(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["tuner", "promote", "toy", "--no-track", *arguments])
        try:
            main()
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    code, out, err = give("--confirm", "1")
    assert code in (0, None), err
    assert "confirmation by val/loss over 320 samples" in out and "min to max" in out and "480 samples: val/loss" in out
    assert "baseline" in out.partition("min to max")[2].partition("480 samples")[0]
    assert max(map(len, out.partition("confirmation by")[2].partition("trial ")[0].splitlines())) <= 80
    assert give("--seeds", "2")[::2] == (
        2,
        "tuner: --seeds and --rung belong to a confirmation: give --confirm 3 too.\n",
    )
    code, _, err = give("--confirm", "2", "--trial", "1")
    assert code == 2 and "leave --trial 1 or --confirm out" in err


def test_table_names_what_failed() -> None:
    table = confirmation_table(found(one(0, 3.0, 3.2), one(4, 2.0, failed="seed 1: no gradient was finite")))
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["0", "4"] and any("seed 1: no gradient was finite" in column for column in columns)


def with_hook(study: optuna.Study, command: str, **section: object) -> None:
    """Store [hooks] in the study, as a launch with a changed study.toml does."""
    hooks = {"command": f"{command} # {{checkpoint}}", "metric": "cer", **section}
    write_study(study, spec={**study.user_attrs["spec"], "hooks": hooks})


CER = """echo '{"cer": -'{trial}'}' > {out}/metrics.json"""
"""The trial with the highest number has the lowest."""


def test_metric_of_a_hook_judges(study: optuna.Study, runtime: Runtime) -> None:
    with_hook(study, CER)
    found = confirm(study, 2, num_seeds=1, runtime=runtime)
    numbers = [trial.number for trial in found.trials]
    assert found.metric == "cer" and numbers == sorted(numbers, reverse=True) and len(numbers) > 1
    assert [trial.values for trial in found.trials] == [{0: -number} for number in numbers]
    with_hook(study, CER, direction="maximize")
    steps = Steps()
    again = confirm(study, 2, num_seeds=1, runtime=runtime, follow=lambda name: nullcontext(steps))
    assert [trial.number for trial in again.trials] == sorted(numbers) and steps.count == 0
    assert again.margin(again.trials[-1]) == pytest.approx(min(numbers) - max(numbers))
    assert promote(study, confirmed=again, runtime=runtime).finished


@pytest.mark.parametrize(("command", "cause"), [("false", "its command failed"), ("true", ".* has no metrics.json")])
def test_hook_without_its_metric_ends_a_confirmation_that_the_next_call_continues(
    study: optuna.Study, runtime: Runtime, command: str, cause: str
) -> None:
    with_hook(study, command)
    message = f"hooks.metric 'cer' has no value for confirm-.*: {cause}"
    with pytest.raises(UserError, match=message):
        confirm(study, 1, runtime=runtime)
    steps = Steps()
    with pytest.raises(UserError, match=message):
        confirm(study, 1, runtime=runtime, follow=lambda name: nullcontext(steps))
    assert steps.count == 0
    with_hook(study, CER)
    found = confirm(study, 1, num_seeds=1, runtime=runtime)
    assert all(trial.values == {0: -trial.number} for trial in found.trials)
