"""Displays of a launch and of a run: live, as plain lines, and as JSON lines for programs."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from tests.tuner.show.made_studies import read
from tests.tuner.studies_for_tests import build
from trainer import TrainConfig, train
from trainer.loop import TrainResult
from tuner import launch, open_study
from tuner.show.json_events import JsonWarnings, RunEvents, StudyEvents, emit
from tuner.show.live import StudyDisplay, share_done
from tuner.show.palette import STATE_STYLES
from tuner.show.run import RunDisplay, device_figures
from tuner.study.optuna_internals import storage_of
from tuner.study.record import TrialRecord
from tuner.study.tracked_run import Runtime

METRICS = {"train/loss": 4.2, "train/samples_per_second": 10.0, "train/tokens_per_second": 900.0, "train/lr": 1e-4}


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study(build(), f"sqlite:///{tmp_path}/tuner.db")


@pytest.fixture
def ask(study: optuna.Study) -> Any:
    def ask() -> optuna.Trial:
        trial = study.ask()
        trial.suggest_categorical("train.batch_size", [4, 8, 16])
        trial.suggest_float("train.d_coef", 0.1, 10.0, log=True)
        return trial

    return ask


def terminal(width: int = 100, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def shown(display: Any, console: Console) -> str:
    with console.capture() as capture:
        console.print(display)
    return capture.get()


def test_all_running_trials_are_shown(study: optuna.Study, ask: Any) -> None:
    console = terminal()
    display = StudyDisplay(study, build(), total=4, console=console)
    trials = [ask(), ask()]
    trackers = [display.trial_started(TrialRecord.read(trial), resumed=False) for trial in trials]
    trackers[1].track({**METRICS, "train/seconds_left": 8.0}, step=10, samples=80)
    trackers[0].track({**METRICS, "train/loss": 3.1, "train/seconds_left": 24.0}, step=20, samples=80)
    text = shown(display._render(), console)
    assert "trial 0: step 20, loss 3.1000, 10.0 samples/s" in text
    assert "trial 1: step 10, loss 4.2000" in text
    assert text.count("running") == 2
    # Half of one and a quarter of the other.
    assert share_done({**METRICS, "train/seconds_left": 8.0}, 80) == 0.5
    assert "0 of 4 trials, 160 of 640 samples, about " in text

    trials[1].report(3.5, 160)
    display.trial_ended(TrialRecord.read(study.tell(trials[1], 3.5)))
    text = shown(display._render(), console)
    assert "trial 0: " in text and "trial 1: " not in text
    assert "1 of 4 trials, 240 of 640 samples" in text


def test_time_left_is_projected_from_this_launch(study: optuna.Study, ask: Any) -> None:
    display = StudyDisplay(study, build(), total=2, console=terminal())
    resumed = display.trial_started(TrialRecord.read(ask()), resumed=True)
    resumed.track({**METRICS, "train/seconds_left": 8.0}, step=10, samples=80)
    assert display._time_left(read(study)) == "", "an earlier launch did all that is done"
    resumed.track({**METRICS, "train/seconds_left": 4.0}, step=15, samples=120)
    # A quarter of a trial in 30 s; one and a quarter are left.
    assert display._time_left(read(study), now=display._started + 30) == ", about 2:30 left"


@pytest.mark.parametrize("width", [80, 100])
def test_live_table_fits_on_the_screen(study: optuna.Study, ask: Any, width: int) -> None:
    for _ in range(40):
        study.tell(ask(), 1.0)
    console = terminal(width, 24)
    display = StudyDisplay(study, build(), total=50, console=console)
    for _ in range(2):
        display.trial_started(TrialRecord.read(ask()), resumed=False).track(
            {**METRICS, "train/seconds_left": 8.0}, step=1, samples=8
        )
    lines = shown(display._render(), console).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= width
    assert any("40 of 50 trials" in line for line in lines)


def test_live_table_is_redrawn_and_stays_at_the_end(study: optuna.Study, ask: Any) -> None:
    console = terminal()
    assert isinstance(console.file, io.StringIO)
    with StudyDisplay(study, build(), total=1, console=console) as display:
        tracker = display.trial_started(TrialRecord.read(ask()), resumed=False)
        tracker.track({**METRICS, "train/seconds_left": 8.0}, step=10, samples=80)
        deadline = time.monotonic() + 30
        while "step 10, loss 4.2000" not in console.file.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert console.file.getvalue().count("step 10") > 1
    assert "trial 0 starts" not in console.file.getvalue()


def test_plain_lines_on_a_terminal(study: optuna.Study, ask: Any) -> None:
    console = terminal()
    assert isinstance(console.file, io.StringIO)
    with StudyDisplay(study, build(), total=1, console=console, plain=True) as display:
        display.trial_started(TrialRecord.read(ask()), resumed=False)
    assert console.file.getvalue() == "trial 0 starts\n"


def test_every_state_has_its_own_colour(study: optuna.Study) -> None:
    assert STATE_STYLES.keys() == {
        "complete", "running", "interrupted", "pruned", "infeasible", "failed", "waiting"
    }  # fmt: skip
    assert len(set(STATE_STYLES.values())) == len(STATE_STYLES)


def test_run_shows_losses_speed_device_and_checkpoints() -> None:
    console = terminal()
    display = RunDisplay("full run of toy", console)
    assert "starting" in shown(display.render(), console)
    gpu = {"system/gpu_memory_bytes": 11.2e9, "system/gpu_utilization": 0.97, "train/data_wait": 0.3}
    display.track({**METRICS, **gpu, "train/seconds_left": 3600.0}, step=1200, samples=12_000)
    display.checkpoint("latest.pth", step=1000)
    display.track({"val/loss": 3.5, "val/mel_loss": 3.1, "best/mel_loss": 3.0}, step=1200, samples=12_000)
    display.checkpoint("best_mel_model.pth", step=900)
    text = shown(display.render(now=display.saved["latest.pth"].at + 133), console)
    rows = {line.split("  ")[0].strip(): " ".join(line.split()) for line in text.splitlines()}
    assert rows["step"] == "step 1,200, 12,000 samples, 25.0% done, about 1:00:00 left"
    assert rows["train"] == "train loss 4.2000"
    assert rows["validation"] == "validation loss 3.5000, mel_loss 3.1000"
    assert rows["best"] == "best mel_loss 3.0000"
    assert rows["rate"] == "rate 10.0 samples/s, 900 tokens/s, learning rate 0.0001, 30% waiting for data"
    assert rows["device"] == "device GPU 11.2 GB, 97% busy"
    assert rows["latest"] == "latest step 1,000, 2:13 ago"
    assert rows["best_mel_model"].startswith("best_mel_model step 900, 2:1")
    assert device_figures({"system/memory_bytes": 1.5e9}) == "1.5 GB in the process"


def events(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for line in capsys.readouterr().out.splitlines():
        yield json.loads(line, parse_constant=refuse)


def test_launch_as_json_lines(study: optuna.Study, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    spec = build(**{"train.save_every": 10})
    with StudyEvents(study, spec, total=2) as display:
        launch(spec, storage=storage_of(study), runtime=runtime, num_trials=2, display=display)
    found = list(events(capsys))
    kinds = [event["event"] for event in found]
    assert kinds[0] == "trial_started" and kinds[-1] == "study_ended"
    assert set(kinds) == {"trial_started", "metrics", "evaluation", "checkpoint", "trial_ended", "study_ended"}
    assert kinds.count("trial_started") == kinds.count("trial_ended") == 2
    assert found[0] | {"time": None} == {
        "event": "trial_started",
        "time": None,
        "study": "toy",
        "trial": 0,
        "resumed": False,
        "baseline": True,
    }
    ended = next(event for event in found if event["event"] == "trial_ended")
    assert ended["state"] == "complete" and ended["params"] == {"train.batch_size": 8, "train.d_coef": 1.0}
    assert ended["value"] == study.trials[0].value and ended["metric"] == "val/loss" and ended["seconds"] > 0
    first = next(event for event in found if event["event"] == "evaluation")
    assert first["trial"] == 0 and first["samples"] == 40 and first["values"]["val/loss"] > 0
    saved = [event for event in found if event["event"] == "checkpoint" and event["trial"] == 0]
    assert {"latest.pth", "best_token_model.pth"} <= {event["name"] for event in saved}
    assert found[-1]["complete"] and found[-1]["trials"] == 2
    assert found[-1]["best"]["value"] == min(trial.value or 9.0 for trial in study.trials)


def test_run_as_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.toy import Toy

    with RunEvents("a run") as run:
        run.ended(train(Toy(), TrainConfig(steps=10, batch_size=4, log_every=5), run_dir=tmp_path, tracker=run))
    found = list(events(capsys))
    assert [event["event"] for event in found if event["event"] != "checkpoint"] == [
        "run_started", "metrics", "metrics", "evaluation", "run_ended"
    ]  # fmt: skip
    assert {event["run"] for event in found} == {"a run"}
    assert found[-1]["finished"] and found[-1]["step"] == 10 and found[-1]["run_dir"] == str(tmp_path)


def test_non_finite_values_are_null_in_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    emit("metrics", values={"train/loss": float("nan"), "x": [float("inf"), 1.0]}, text="한국어")
    JsonWarnings().handle(logging.LogRecord("trainer", logging.WARNING, "", 0, "the GPU is %s", ("idle",), None))
    metrics, warning = events(capsys)
    assert metrics["values"] == {"train/loss": None, "x": [None, 1.0]} and metrics["text"] == "한국어"
    assert warning["event"] == "warning" and warning["message"] == "the GPU is idle"


def test_stopped_launch_is_not_complete(study: optuna.Study, capsys: pytest.CaptureFixture[str]) -> None:
    study.ask()
    with StudyEvents(study, build(), total=2):
        pass
    (ended,) = events(capsys)
    assert ended["event"] == "study_ended" and not ended["complete"] and ended["best"] is None
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]


def test_run_prints_its_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = TrainResult(True, 10, 40, 1.0, 7, {"val/loss": 3.0}, {}, tmp_path)
    RunDisplay("a run", Console(width=100), quiet=True).ended(result)
    assert capsys.readouterr().out == f"step 10, 40 samples: val/loss 3.0000\ncheckpoints: {tmp_path}\n"
