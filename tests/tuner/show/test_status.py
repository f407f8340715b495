"""tuner status: the Pareto front, rising d, why a launch ended; without torch, and on narrow terminals."""

from __future__ import annotations

import io
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from tests.tuner.show.made_studies import add_trial, new_study, read
from tests.tuner.studies_for_tests import build
from trainer import UserError
from trainer.clock import format_hours
from tuner import launch, open_study
from tuner.show.live import StudyDisplay
from tuner.show.note import escape, study_note
from tuner.show.status import print_status, status, status_parts
from tuner.show.table import list_shown, trial_table
from tuner.study.storage import open_storage
from tuner.study.tracked_run import Runtime


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """Trials 1, 2 and 4 are on the front: cheapest, between, best; trial 5 was never timed."""
    study = new_study(open_storage(f"sqlite:///{tmp_path}/tuner.db"))
    add_trial(study, [5.0] * 4, d_coef=0.123456, baseline=True, full_hours=86.04, d_rising=False)
    add_trial(study, [4.8] * 4, full_hours=20.0)
    add_trial(study, [4.5] * 4, d_coef=0.123456, full_hours=30.0, d_rising=True)
    add_trial(study, [4.5] * 4, d_coef=0.123456, full_hours=31.0, d_rising=True)
    add_trial(study, [4.1] * 4, full_hours=1035.94)
    add_trial(study, [4.3] * 4)
    add_trial(study, [4.0], full_hours=1.0, d_rising=True, infeasible="out of memory")
    return study


def test_thousands_of_trials_are_not_drawn(study: optuna.Study, capsys: pytest.CaptureFixture[str]) -> None:
    record = read(study)
    shown = [[trial.number for trial in list_shown(record, record.trials, last)] for last in (7, 4, 2)]
    assert shown == [[*range(7)], [0, 4, 5, 6], [5, 6]], "the baseline, the best and the latest, if they have room"
    print_status(replace(record, trials=record.trials + 94 * record.trials[-1:]))
    assert "101 trials: --json has all of them" in capsys.readouterr().out


def test_front_has_the_trials_that_none_beats(study: optuna.Study) -> None:
    record, costs = read(study), [(3, 5), (1, 4), (2, 4), (2, 2), (3, 1), (2, 2), (4, 1), (2, 3)]
    trials = [replace(record.trials[0], number=n, value=v, full_hours=h) for n, (v, h) in enumerate(costs)]
    assert replace(record, trials=trials).pareto_front == {1, 3, 4, 5}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45, "45.0 s"),
        (88, "1:28 min"),
        (3599, "59:59 min"),
        (3599.9, "1.0 h"),
        (129_240, "35.9 h"),
        (3.73e6, "1,036 h"),
    ],
)
def test_durations_have_their_unit(seconds: float, text: str) -> None:
    assert format_hours(seconds / 3600) == text


def test_trials_on_the_pareto_front_are_marked(study: optuna.Study) -> None:
    details = status(read(study))["trials_detail"]
    assert [entry["number"] for entry in details if entry["pareto"]] == [1, 2, 4]
    assert [entry["d_rising"] for entry in details] == [False] * 2 + [True] * 2 + [False] * 3
    assert details[5]["full_hours"] is None


def test_maximized_metric_has_its_front_too() -> None:
    study = new_study(**{"study.direction": "maximize"})
    for value, hours in ((1.0, 10.0), (2.0, 20.0), (1.5, 30.0)):
        add_trial(study, [value] * 4, full_hours=hours)
    assert read(study).pareto_front == {0, 1}


def test_values_have_the_name_of_their_metric(capsys: pytest.CaptureFixture[str]) -> None:
    study = new_study(**{"study.metric": "val/accuracy"})
    add_trial(study, [0.5] * 4, full_hours=10.0)
    print_status(read(study))
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "better in both accuracy and" in shown and "loss" not in shown


def test_hours_are_those_of_the_current_full_run(study: optuna.Study) -> None:
    """The full run has 480 samples; it was shorter, or in steps, when these trials ran."""
    add_trial(study, [4.05] * 4, full_hours=400.0, full_length={"samples": 160})
    in_steps = add_trial(study, [3.9] * 4, full_hours=1.0, full_length={"steps": 10})
    trials = status(read(study))["trials_detail"]
    assert [entry["full_hours"] for entry in trials[-2:]] == [1200.0, None]
    assert read(study).pareto_front == {1, 2, 4, 7}
    assert (
        read(new_study(without="full.samples", **{"full.steps": 20, "full.schedule": "none"})).full_hours(in_steps)
        == 2.0
    )


def test_full_run_in_steps_sees_more_samples_with_larger_batches() -> None:
    steps = new_study(without="full.samples", **{"full.steps": 100})
    trials = [add_trial(steps, [4.0] * 4, batch_size=size) for size in (4, 16)]
    assert [read(steps).full_samples(trial) for trial in trials] == [400, 1600]
    assert [read(steps).full_epochs(trial) for trial in trials] == [3.125, 12.5]
    # 500 samples are 31.25 batches of 16.
    samples = new_study(**{"full.samples": 500, "train.grad_accumulation": 2, "trial.evaluations": 1})
    trials = [add_trial(samples, [4.0] * 4, batch_size=size) for size in (4, 8)]
    assert [read(samples).full_samples(trial) for trial in trials] == [504, 512]
    detail = status(read(samples))["trials_detail"][0]
    assert (detail["full_samples"], detail["full_epochs"]) == (504, 504 / 128)


def test_length_is_not_known_without_the_data_or_the_parameters() -> None:
    study = new_study()
    add_trial(study, [4.0] * 4)
    study.set_user_attr("num_samples", None)
    study.ask()
    assert [(d["full_samples"], d["full_epochs"]) for d in status(read(study))["trials_detail"]] == [
        (480, None),
        (None, None),
    ]


def test_best_trial_at_an_edge_is_shown(study: optuna.Study) -> None:
    sentence = "best train.d_coef = 0.1 is at the lower edge of 0.1 to 10: widen it in [search]"
    add_trial(study, [3.0] * 4, d_coef=0.1)
    assert status(read(study))["edges"] == [sentence]
    assert sentence in map(str, status_parts(read(study)))
    assert f"**At the edge**: {escape(sentence)}." in study_note(read(study), "tuner promote toy", {})


@pytest.mark.parametrize("width", [80, 100, 120])
def test_table_fits_and_hides_nothing(study: optuna.Study, width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    assert isinstance(console.file, io.StringIO)
    console.print(*status_parts(read(study), width=width))
    text = console.file.getvalue()
    assert ("full samples" in text, "epochs" in text) == (width == 120,) * 2
    assert max(map(len, text.splitlines())) <= width
    for cell in ("86.0 h", "20.0 h *", "1,036 h *", "1:22:29", "0.123", "4.5000", "baseline", "infeasible", "rising"):
        assert cell in text, cell
    assert "…" not in text and "31.0 h *" not in text


def test_study_without_hours_has_no_column_for_them() -> None:
    study = new_study()
    add_trial(study, [4.0] * 4)
    assert "full run" not in [column.header for column in trial_table(read(study)).columns]


def test_interrupted_trial_has_no_duration(tmp_path: Path) -> None:
    study = new_study()
    add_trial(study, [4.0], state=TrialState.RUNNING, host=platform.node(), run_dir=str(tmp_path))
    table = trial_table(read(study))
    state, duration = (next(iter(column.cells)) for column in table.columns[-2:])
    assert (str(state), duration) == ("interrupted", "")


def test_status_and_dashboard_import_no_torch(study: optuna.Study, tmp_path: Path) -> None:
    """Importing torch takes seconds."""
    code = (
        "import sys; from tuner.cli import main; sys.argv = ['tuner', 'status', 'toy', '--storage', "
        f"'sqlite:///{tmp_path}/tuner.db']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import tuner.show.page, tuner.show.server\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "86.0 h" in result.stdout


def test_improvements_below_min_delta_do_not_count() -> None:
    study = new_study()
    add_trial(study, [])
    assert read(study).trials_since_improvement(0.0) == 0
    for value in (5.0, 4.95, 4.5, 4.45):
        add_trial(study, [value] * 4)
    add_trial(study, [4.0])
    add_trial(study, [], state=TrialState.FAIL)
    assert read(study).trials_since_improvement(0.1) == 2
    assert read(study).trials_since_improvement(0.0) == 1
    add_trial(study, [4.39] * 4)
    assert read(study).trials_since_improvement(0.1) == 0


def test_launch_reports_why_it_ended(runtime: Runtime, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"

    def ended(timeout: float | None = None, **changes: object) -> tuple[int, str, str]:
        spec, console = build(**changes), Console(width=120, record=True, file=(tmp_path / "out").open("w"))
        with StudyDisplay(open_study(spec, url), spec, total=spec.trial.num_trials, console=console) as display:
            study = launch(spec, storage=url, runtime=runtime, timeout=timeout, display=display)
        console.file.close()
        return len(study.trials), read(study).ended, console.export_text().splitlines()[-1]

    impossible = {"trial.patience": 1, "trial.min_delta": 100.0}
    reason = "no trial improved val/loss by more than 100 in the last 1"
    assert ended(**impossible) == (2, reason, f"ended: {reason}")
    assert status(read(optuna.load_study(study_name="toy", storage=url)))["ended"] == reason
    assert ended(**{"trial.num_trials": 3})[:2] == (3, "the study has its 3 trials")
    assert ended(0.0)[:2] == (3, "the time given, 0.0s, is over")


def test_min_delta_needs_patience() -> None:
    with pytest.raises(UserError, match=r"min_delta 0\.1 does nothing without patience"):
        build(**{"trial.min_delta": 0.1})
