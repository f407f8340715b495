"""TensorBoard and W&B: what they write is read back, and a missing package ends no run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.toy import Toy
from trainer import TrainConfig, trackers, train
from trainer.trackers import TRACKERS, WANDB_RUN, TensorBoardTracker, WandbTracker, installed_trackers
from trainer.tracking import BackgroundTracker

# Their own code leaves files to the garbage collector and calls deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore")

PARAMS = {"train": {"d_coef": 0.5}, "trial": 7}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackgroundTracker, "PATIENCE_S", 300.0)


def tracker(kind: type[BackgroundTracker], tmp_path: Path) -> BackgroundTracker:
    (tmp_path / "run").mkdir(exist_ok=True)
    return kind(tmp_path, run_dir=tmp_path / "run", experiment="toy", params=PARAMS)


def track_twice(kind: type[BackgroundTracker], tmp_path: Path) -> None:
    """Steps 1 to 4, and after a crash 3 to 6 once more."""
    for first, value in ((1, 1.0), (3, 2.0)):
        written = tracker(kind, tmp_path)
        for step in range(first, first + 4):
            written.track({"train/loss": value}, step=step, samples=8 * step)
        written.checkpoint("latest.pth", step=first + 3)
        written.close()


def test_tensorboard_shows_a_repeated_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track_twice(TensorBoardTracker, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        *((1, 1.0), (2, 1.0)),
        *((3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)),
    ]
    assert [event.value for event in events.Scalars("samples")][-1] == 48
    (text,) = events.Tensors("checkpoint/text_summary")[-1].tensor_proto.string_val
    assert text == b"latest.pth"
    assert '"d_coef": 0.5' in events.Tensors("params/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B without a network and without the login of the user who runs the tests."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    wandb.teardown()  # it read the environment when it was first used
    yield
    wandb.teardown()


def read_wandb(folder: Path) -> dict[str, Any]:
    """The id, configuration, last step and history of an offline run."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"history": [], "summary": {}}
    (file,) = folder.glob("run-*.wandb")
    # LevelDB's log: a header of 7 bytes, then records, each with a checksum (4 bytes), its length (2) and a type (1).
    data = file.read_bytes()[7:]
    while len(data) > 7:
        size = int.from_bytes(data[4:6], "little")
        assert data[6] == 1, "a record of several fragments, which this reader can't join"
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[7 : 7 + size])
        data = data[7 + size :]
        if record.HasField("run"):
            found["id"], found["project"] = record.run.run_id, record.run.project
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            items = record.history.item
            found["history"].append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
        elif record.HasField("summary"):
            found["summary"] |= {"/".join(i.nested_key) or i.key: i.value_json for i in record.summary.update}
    return found


@pytest.mark.usefixtures("offline")
def test_wandb_without_a_login_writes_one_run_offline(tmp_path: Path) -> None:
    track_twice(WandbTracker, tmp_path)
    first, second = (read_wandb(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*")))
    assert first["id"] == second["id"] == (tmp_path / "run" / WANDB_RUN).read_text()
    assert (first["project"], first["config"]["trial"], first["config"]["train"]) == ("toy", 7, {"d_coef": 0.5})
    rows = [(row["step"], row["samples"], row["train/loss"]) for row in second["history"]]
    assert rows == [(3, 24, 2.0), (4, 32, 2.0), (5, 40, 2.0), (6, 48, 2.0)]
    assert second["summary"]["checkpoints/latest.pth"] == "6"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_tracker_that_fails_is_logged_once_and_training_continues(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: BackgroundTracker) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(TRACKERS[name], "_open", refuse)
    config = TrainConfig(steps=10, batch_size=4, log_every=5, eval_every=40)
    result = train(Toy(), config, run_dir=tmp_path / "run", tracker=tracker(TRACKERS[name], tmp_path))
    assert result.finished
    messages = [record.message for record in caplog.records if "stopped tracking" in record.message]
    assert messages == [
        f"{TRACKERS[name].NAME} stopped tracking (OSError: no space left); training continues without it"
    ]


def test_missing_package_is_logged_once_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    # An empty folder `wandb` in the working directory is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    real = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "aim" else real(name))
    trackers._warn_of_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "trainer"):
        for _ in range(2):
            assert list(installed_trackers(["aim"])) == []
    assert [record.message for record in caplog.records] == [
        "not tracked by Aim: it is not installed (pip install aim)"
    ]
