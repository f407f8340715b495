"""tuner status: hours beside losses, what no trial beats, d that still rises, why a launch ended; without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from tests.tuner.studies_for_tests import build
from trainer import UserError
from tuner.launcher import launch, open_study
from tuner.run import Runtime
from tuner.show.live import StudyDisplay
from tuner.show.status import status
from tuner.show.table import trial_table
from tuner.trials import (
    BASELINE,
    D_RISING,
    ENDED,
    FULL_HOURS,
    FULL_LENGTH,
    INFEASIBLE,
    full_hours,
    not_beaten,
    trials_since_improvement,
)


def add(study: optuna.Study, value: float | None, state: TrialState = TrialState.COMPLETE, **attrs: Any) -> None:
    params = {"train.batch_size": 16, "train.d_coef": 0.123456}
    distributions = {
        "train.batch_size": optuna.distributions.CategoricalDistribution([4, 8, 16]),
        "train.d_coef": optuna.distributions.FloatDistribution(0.1, 10.0, log=True),
    }
    trial = create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params=params,
        distributions=distributions,
        user_attrs=attrs,
        intermediate_values={16_000: value} if value is not None else {},
    )
    assert trial.datetime_complete is not None
    trial.datetime_start = trial.datetime_complete - timedelta(hours=1, minutes=22, seconds=29)
    study.add_trial(trial)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """Trials 1, 2 and 4 are on the front: cheapest, between, best; trial 5 was never timed."""
    study = open_study(build(), f"sqlite:///{tmp_path}/tuner.db")
    add(study, 5.0, **{BASELINE: True, FULL_HOURS: 86.04, D_RISING: False})
    add(study, 4.8, **{FULL_HOURS: 20.0})
    add(study, 4.5, **{FULL_HOURS: 30.0, D_RISING: True, "peak_memory": 10**9})
    add(study, 4.5, **{FULL_HOURS: 31.0, D_RISING: True})
    add(study, 4.1, **{FULL_HOURS: 1035.94})
    add(study, 4.3)
    add(study, 4.0, TrialState.PRUNED, **{FULL_HOURS: 1.0, D_RISING: True, INFEASIBLE: "out of memory"})
    return study


def test_the_trials_that_none_beats_in_both_are_marked(study: optuna.Study) -> None:
    assert not_beaten(study) == {1, 2, 4}
    details = status(study)["trials_detail"]
    assert [entry["number"] for entry in details if entry["pareto"]] == [1, 2, 4]
    assert details[2] == {
        "number": 2,
        "state": "complete",
        "value": 4.5,
        "params": {"train.batch_size": 16, "train.d_coef": 0.123456},
        "baseline": False,
        "full_hours": 30.0,
        "pareto": True,
        "d_rising": True,
        "peak_memory": 10**9,
    }
    assert details[5]["full_hours"] is None
    json.dumps(details)


def test_maximized_metrics_have_their_front_too(tmp_path: Path) -> None:
    study = open_study(build(**{"study.direction": "maximize"}), f"sqlite:///{tmp_path}/tuner.db")
    for value, hours in ((1.0, 10.0), (2.0, 20.0), (1.5, 30.0)):
        add(study, value, **{FULL_HOURS: hours})
    assert not_beaten(study) == {0, 1}


def test_hours_are_those_of_the_full_runs_present_length(study: optuna.Study) -> None:
    """The spec's 480 samples; the trials of this test ran when it was shorter, or in steps."""
    assert [entry["full_hours"] for entry in status(study)["trials_detail"][:2]] == [86.04, 20.0]
    add(study, 4.05, **{FULL_HOURS: 400.0, FULL_LENGTH: {"samples": 160}})
    add(study, 3.9, **{FULL_HOURS: 1.0, FULL_LENGTH: {"steps": 10}})
    trials = status(study)["trials_detail"]
    assert [entry["full_hours"] for entry in trials[-2:]] == [1200.0, None]
    assert not_beaten(study) == {1, 2, 4, 7}
    assert full_hours(study.trials[-1], {"steps": 20}) == 2.0


def shown(study: optuna.Study, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trial_table(study))
    console.file.close()
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_and_hides_nothing(study: optuna.Study, width: int) -> None:
    lines = shown(study, width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for cell in ("86.0 h", "20.0 h *", "1,036 h *", "1:22:29", "0.123", "16,000", "4.5000", "baseline", "infeasible"):
        assert cell in text, cell
    assert "31.0 h *" not in text
    assert "* no other trial is better in both" in text


def test_d_that_still_rises_is_said_of_complete_trials(study: optuna.Study) -> None:
    text = " ".join(" ".join(shown(study, 120)).split())
    assert (
        "d still rising at the end of trial 2 (d_coef 0.123), 3 (d_coef 0.123): the short run is too short for this "
        "d_coef" in text
    )
    assert [entry["d_rising"] for entry in status(study)["trials_detail"]] == [False] * 2 + [True] * 2 + [False] * 3


def test_a_study_that_was_not_timed_has_no_column_for_it(tmp_path: Path) -> None:
    study = open_study(build(), f"sqlite:///{tmp_path}/tuner.db")
    add(study, 4.0)
    text = "\n".join(shown(study, 80))
    assert "full run" not in text and "*" not in text


def test_status_imports_no_torch(study: optuna.Study, tmp_path: Path) -> None:
    """Importing torch takes seconds, and looking needs none of it."""
    code = (
        "import sys; from tuner.cli import main; sys.argv = ['tuner', 'status', 'toy', '--storage', "
        f"'sqlite:///{tmp_path}/tuner.db']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "86.0 h" in result.stdout


def test_improvements_below_min_delta_do_not_count(tmp_path: Path) -> None:
    study = open_study(build(), f"sqlite:///{tmp_path}/tuner.db")
    add(study, None, TrialState.PRUNED)
    assert trials_since_improvement(study, study.trials, 0.0) == 0
    for value in (5.0, 4.95, 4.5, 4.45):
        add(study, value)
    add(study, 4.0, TrialState.PRUNED)
    add(study, None, TrialState.FAIL)
    assert trials_since_improvement(study, study.trials, 0.1) == 2
    assert trials_since_improvement(study, study.trials, 0.0) == 1
    add(study, 4.39)
    assert trials_since_improvement(study, study.trials, 0.1) == 0


def test_a_launch_says_which_of_three_ends_it_came_to(runtime: Runtime, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"

    def ended(timeout: float | None = None, **changes: object) -> tuple[int, str, str]:
        spec, console = build(**changes), Console(width=120, record=True, file=(tmp_path / "out").open("w"))
        with StudyDisplay(open_study(spec, url), spec, total=spec.trial.num_trials, console=console) as display:
            study = launch(spec, storage=url, runtime=runtime, timeout=timeout, display=display)
        console.file.close()
        return len(study.trials), study.user_attrs[ENDED], console.export_text().splitlines()[-1]

    impossible = {"trial.patience": 1, "trial.min_delta": 100.0}
    said = "no trial improved val/loss by more than 100 in the last 1"
    assert ended(**impossible) == (2, said, f"ended: {said}")
    assert status(optuna.load_study(study_name="toy", storage=url))["ended"] == said
    assert ended(**{"trial.num_trials": 3})[:2] == (3, "the study has its 3 trials")
    assert ended(0.0)[:2] == (3, "the time given, 0.0s, is over")


def test_min_delta_without_patience_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"min_delta 0\.1 does nothing without patience"):
        build(**{"trial.min_delta": 0.1})
