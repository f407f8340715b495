"""Aim: what a run writes is read back through Aim's own API; what fails there never reaches training."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.toy import Toy
from trainer import TrainConfig, train
from trainer.tracking import AimTracker

# Aim's own code leaves files to the garbage collector and calls deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore")


def values(repo: Path, name: str, subset: str) -> list[tuple[int, float]]:
    from aim.sdk.repo import Repo

    opened = Repo.from_path(str(repo))
    (run,) = opened.iter_runs()
    for metric in run.metrics():
        if metric.name == name and metric.context.to_dict() == {"subset": subset}:
            steps, (found, *_) = metric.data.items_list()
            return list(zip(steps, found, strict=True))
    return []


def tracker(tmp_path: Path) -> AimTracker:
    return AimTracker(tmp_path / "repo", run_dir=tmp_path / "run", experiment="toy", params={"train": {"x": 1}})


CONFIG: dict[str, Any] = {"batch_size": 4, "log_every": 5, "eval_every": 40}


def test_a_run_and_its_continuation_are_one_run_in_aim(tmp_path: Path) -> None:
    for steps in (10, 20):
        (tmp_path / "run").mkdir(exist_ok=True)
        train(Toy(), TrainConfig(steps=steps, **CONFIG), run_dir=tmp_path / "run", tracker=tracker(tmp_path))
    losses = values(tmp_path / "repo", "loss", "train")
    assert [step for step, _ in losses] == [5, 10, 15, 20]
    assert [step for step, _ in values(tmp_path / "repo", "token_loss", "val")] == [10, 20]
    for name in ("lr", "d", "grad_norm", "samples_per_second"):
        assert len(values(tmp_path / "repo", name, "train")) == 4


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr("aim.sdk.run.Run.__init__", refuse)
    yield


@pytest.mark.usefixtures("broken")
def test_a_tracker_that_fails_says_so_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    with caplog.at_level(logging.WARNING, "trainer"):
        result = train(Toy(), TrainConfig(steps=20, **CONFIG), run_dir=tmp_path / "run", tracker=tracker(tmp_path))
    assert result.finished
    said = [record.message for record in caplog.records if "Aim" in record.message]
    assert said == ["Aim stopped tracking (OSError: too many open files); training goes on without it"]


def test_a_tracker_that_hangs_delays_the_end_by_its_patience_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(AimTracker, "PATIENCE_S", 0.2)
    monkeypatch.setattr(AimTracker, "CAPACITY", 2)
    monkeypatch.setattr(AimTracker, "_open", lambda self: time.sleep(5))
    hanging = tracker(tmp_path)
    started = time.monotonic()
    for step in range(100):
        hanging.track({"train/loss": 1.0}, step=step, samples=step)
    hanging.close()
    assert time.monotonic() - started < 3
