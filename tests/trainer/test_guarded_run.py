"""A guarded run: the guard's events, `best.pth`, milestones."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.toy import Toy
from trainer import TrainConfig, TrainResult, train
from trainer.checkpoint import Checkpoints, go_back, read_checkpoint, write_checkpoint
from trainer.evaluation import evaluate as real_evaluate
from trainer.guard import Guard


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def track(self, values: dict[str, float], *, step: int, samples: int) -> None: ...

    def event(self, kind: str, text: str, *, step: int) -> None:
        self.events.append((kind, step))

    def close(self) -> None: ...


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 20, "eval_every": 8, "precision": "fp32", "on_decline": "stop"}
    return TrainConfig(**{**values, **changes})


@pytest.fixture
def ruined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation loss doubles from the eleventh validation on."""
    losses = iter([*(3 - 0.1 * i for i in range(10)), *([4.2] * 30)])
    monkeypatch.setattr("trainer.loop.evaluate", lambda *a, **k: {**real_evaluate(*a, **k), "val/loss": next(losses)})


def run(run_dir: Path, **changes: Any) -> tuple[TrainResult, Recorder]:
    recorder = Recorder()
    return train(Toy(), config(**changes), run_dir=run_dir, tracker=recorder), recorder


def test_decline_stops_the_run_with_a_checkpoint_and_its_best_state(ruined: None, tmp_path: Path) -> None:
    result, recorder = run(tmp_path)
    assert not result.finished and result.step == 12
    assert result.stopped_by_guard.startswith("val/loss is at least 4.2000 in 2 of the last 3 values")
    assert recorder.events == [("declined", 12), ("stopped_by_guard", 12)]
    best, latest = (read_checkpoint(tmp_path / name) for name in ("best.pth", "latest.pth"))
    assert (best["step"], best["metrics"]["val/loss"], best["progress"]["guard"]["declined"]) == (10, 2.1, "")
    assert latest["step"] == 12 and latest["progress"]["guard"]["declined"] == result.stopped_by_guard


def test_continued_run_declines_once(ruined: None, tmp_path: Path) -> None:
    run(tmp_path)
    result, recorder = run(tmp_path)
    assert result.finished and recorder.events == []


def test_warned_run_goes_on(ruined: None, tmp_path: Path) -> None:
    result, recorder = run(tmp_path, on_decline="warn")
    assert result.finished and recorder.events == [("declined", 12)] and result.stopped_by_guard == ""
    assert read_checkpoint(tmp_path / "best.pth")["step"] == 10


def test_run_goes_back_to_its_best_state_and_repeats_its_steps(tmp_path: Path) -> None:
    straight, _ = run(tmp_path / "straight")
    run(tmp_path / "run", steps=16, keep_checkpoints=5)
    best = read_checkpoint(tmp_path / "run" / "best.pth")["step"]
    run(tmp_path / "run", steps=18, eval_every=1000, save_every=1)
    go_back(tmp_path / "run", "best.pth")
    states = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert states[-1:] == [f"step_{best:09d}.pth"]
    assert read_checkpoint(tmp_path / "run" / "latest.pth")["step"] == best
    again, _ = run(tmp_path / "run")
    assert again.metrics == straight.metrics


def test_run_that_recovers_at_the_step_of_its_alarm_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log interval ends just before the validation of the same step, which may be the best one."""
    monkeypatch.setattr(Guard, "add_train", lambda guard, loss: guard._decline("train/loss is ", "high"))
    losses = iter([3 - 0.1 * i for i in range(99)])
    monkeypatch.setattr("trainer.loop.evaluate", lambda *a, **k: {**real_evaluate(*a, **k), "val/loss": next(losses)})
    result, recorder = run(tmp_path, steps=4, log_every=2)
    assert recorder.events[:3] == [("declined", 2), ("stopped_by_guard", 2), ("recovered", 2)]
    assert result.finished and result.stopped_by_guard == ""


def test_trial_has_no_guard(ruined: None, tmp_path: Path) -> None:
    result, recorder = run(tmp_path, on_decline=None)
    assert result.finished and recorder.events == [] and not (tmp_path / "best.pth").exists()


def test_best_state_needs_room_and_its_lack_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, size))

    write_checkpoint({"step": 0}, tmp_path / "probe.pth")
    size = (tmp_path / "probe.pth").stat().st_size
    with Checkpoints(tmp_path, keep=2) as checkpoints, caplog.at_level(logging.WARNING):
        free(2 * size)
        checkpoints.save({"step": 1}, also=["best.pth"])
        checkpoints._wait()
        # With two states kept: a second one, one more while it is written, and best.pth itself.
        assert not (tmp_path / "best.pth").exists()
        checkpoints.save({"step": 2}, also=["best.pth"])
    assert read_checkpoint(tmp_path / "best.pth")["step"] == 2
    assert len(caplog.messages) == 1 and "best.pth is not kept: it needs room for 3 more checkpoints" in caplog.text
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        free(0)
        checkpoints.save({"step": 3}, also=["best.pth"])
    assert read_checkpoint(tmp_path / "best.pth")["step"] == 3, "it takes the place of the file before it"


def test_milestones_are_weights_that_stay(tmp_path: Path) -> None:
    run(tmp_path, keep_every=6, save_every=2, on_decline=None)
    kept = sorted(tmp_path.glob("milestone_*.pth"))
    assert [read_checkpoint(path)["step"] for path in kept] == [6, 12, 18]
    assert "optimizer" not in read_checkpoint(kept[0]) and len(list(tmp_path.glob("step_*.pth"))) == 2
