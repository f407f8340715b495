"""Aim: its API reads back the metrics of a run, and its failures never reach training."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.toy import Toy
from trainer import TrainConfig, train
from trainer.tracking import AimTracker, aim_run

# Aim's own code leaves files to the garbage collector and calls deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG: dict[str, Any] = {"batch_size": 4, "log_every": 5, "eval_every": 40}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests check the contents of Aim, not the speed, which depends on the machine's load."""
    monkeypatch.setattr(AimTracker, "PATIENCE_S", 300.0)


@pytest.fixture(scope="module")
def _made_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty repository, which takes Aim some seconds of migrations."""
    from aim.sdk.repo import Repo

    folder = tmp_path_factory.mktemp("aim")
    Repo.from_path(str(folder), init=True).close()
    return folder


@pytest.fixture(autouse=True)
def _repository(tmp_path: Path, _made_repository: Path) -> None:
    shutil.copytree(_made_repository, tmp_path / "repo")


def runs(repo: Path) -> dict[str, Any]:
    """The repository's runs by hash."""
    from aim.sdk.repo import Repo

    return {run.hash: run for run in Repo.from_path(str(repo)).iter_runs()}


def series(run: Any, name: str, **context: str) -> list[tuple[int, float]]:
    """A metric's values by step."""
    for metric in run.metrics():
        if metric.name == name and metric.context.to_dict() == context:
            steps, (found, *_) = metric.data.items_list()
            return list(zip(steps, found, strict=True))
    return []


def texts(run: Any, name: str, **context: str) -> list[tuple[int, str]]:
    from aim.storage.context import Context

    sequence = run.get_text_sequence(name, Context(context))
    steps, (found, *_) = sequence.data.items_list()
    return [(step, text.data) for step, text in zip(steps, found, strict=True)]


def tracker(tmp_path: Path, name: str = "run", **params: Any) -> AimTracker:
    (tmp_path / name).mkdir(exist_ok=True)
    params = params or {"train": {"x": 1}}
    return AimTracker(tmp_path / "repo", run_dir=tmp_path / name, experiment="toy", params=params)


def test_resumed_run_is_the_same_run_in_aim(tmp_path: Path) -> None:
    for steps in (10, 20):
        train(Toy(), TrainConfig(steps=steps, **CONFIG), run_dir=tmp_path / "run", tracker=tracker(tmp_path))
    ((run_hash, run),) = runs(tmp_path / "repo").items()
    assert aim_run(tmp_path / "run") == run_hash
    assert [step for step, _ in series(run, "loss", subset="train")] == [5, 10, 15, 20]
    assert [step for step, _ in series(run, "token_loss", subset="val")] == [10, 20]


def test_curves_checkpoints_best_values_and_the_device_are_read_back_from_aim(tmp_path: Path) -> None:
    config = TrainConfig(steps=20, save_every=10, **CONFIG)
    result = train(Toy(), config, run_dir=tmp_path / "run", tracker=tracker(tmp_path, train={"d_coef": 0.5}, trial=7))
    (run,) = runs(tmp_path / "repo").values()
    assert (run.experiment, run.name, run["trial"], run["train", "d_coef"]) == ("toy", "run", 7, 0.5)
    for name in ("loss", "token_loss", "lr", "d", "grad_norm", "samples_per_second"):
        assert len(series(run, name, subset="train")) == 4, name
    (_, d), (_, lr) = series(run, "d", subset="train")[-1], series(run, "lr", subset="train")[-1]
    assert lr == pytest.approx(d), "the effective rate is d x lr, and lr is 1"
    assert series(run, "token_loss", subset="val")[-1] == (20, pytest.approx(result.metrics["val/token_loss"]))
    assert series(run, "token_loss", subset="best")[-1] == (20, pytest.approx(result.best["val/token_loss"]))
    assert all(value > 0 for _, value in series(run, "memory_bytes", subset="system"))
    assert texts(run, "checkpoint", file="latest.pth") == [(10, "latest.pth"), (20, "latest.pth")]
    assert run["checkpoints"] == {"latest.pth": 20, "best_token_model.pth": 20}


def test_repeated_step_after_a_crash_replaces_its_metrics(tmp_path: Path) -> None:
    for first, value in ((1, 1.0), (3, 2.0)):
        aim_tracker = tracker(tmp_path)
        for step in range(first, first + 4):
            aim_tracker.track({"train/loss": value}, step=step, samples=step)
        aim_tracker.close()
    (run,) = runs(tmp_path / "repo").values()
    assert series(run, "loss", subset="train") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def write_one(aim_tracker: AimTracker) -> None:
    aim_tracker.track({"train/loss": 1.0}, step=1, samples=1)
    aim_tracker.close()


def test_missing_aim_run_is_named_by_the_new_one(tmp_path: Path) -> None:
    write_one(tracker(tmp_path, "other"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "aim_run").write_text("0123456789abcdef01234567")
    write_one(tracker(tmp_path))
    run = runs(tmp_path / "repo")[aim_run(tmp_path / "run")]
    assert run["continues"] == "0123456789abcdef01234567"
    assert series(run, "loss", subset="train") == [(1, 1.0)]


def test_repository_that_a_killed_process_has_half_made_is_finished(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "repo")
    (tmp_path / "repo" / ".aim" / "locks").mkdir(parents=True)
    write_one(tracker(tmp_path))
    assert aim_run(tmp_path / "run") in runs(tmp_path / "repo")


def test_aim_run_open_elsewhere_is_named_by_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from filelock import Timeout

    write_one(tracker(tmp_path))
    first = aim_run(tmp_path / "run")

    def held(self: Any, *_: Any, **__: Any) -> None:
        if self.run_hash == first:
            raise Timeout("held by another process")

    monkeypatch.setattr("aim.sdk.lock_manager.SFRunLock.lock", held)
    with caplog.at_level(logging.WARNING, "trainer"):
        write_one(tracker(tmp_path))
    second = aim_run(tmp_path / "run")
    assert second != first and runs(tmp_path / "repo")[second]["continues"] == first
    assert [f"Aim run {first} is still open elsewhere" in record.message for record in caplog.records] == [True]


def test_file_handles_do_not_grow_with_the_number_of_runs(tmp_path: Path) -> None:
    def num_handles() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc: open files can't be counted")
    write_one(tracker(tmp_path, "first"))
    before = num_handles()
    for number in range(5):
        write_one(tracker(tmp_path, f"run-{number}"))
    assert num_handles() <= before
    assert len(runs(tmp_path / "repo")) == 6


def test_printed_aim_command_can_be_pasted() -> None:
    assert AimTracker.viewer(Path("my runs")) == "aim up --repo 'my runs'"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("too many open files\n[SQL: INSERT]")

    monkeypatch.setattr("aim.sdk.run.Run.__init__", refuse)
    yield


@pytest.mark.usefixtures("broken")
def test_failed_tracker_is_logged_once_and_training_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer"):
        result = train(Toy(), TrainConfig(steps=20, **CONFIG), run_dir=tmp_path / "run", tracker=tracker(tmp_path))
    assert result.finished
    messages = [record.message for record in caplog.records if "Aim" in record.message]
    assert messages == ["Aim stopped tracking (OSError: too many open files); training continues without it"]
    assert aim_run(tmp_path / "run") is None


def test_hanging_tracker_delays_the_end_by_its_patience_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AimTracker, "PATIENCE_S", 0.2)
    monkeypatch.setattr(AimTracker, "CAPACITY", 2)
    monkeypatch.setattr(AimTracker, "_open", lambda self: time.sleep(5))
    hanging = tracker(tmp_path)
    started = time.monotonic()
    for step in range(100):
        hanging.track({"train/loss": 1.0}, step=step, samples=step)
    hanging.close()
    assert time.monotonic() - started < 3
