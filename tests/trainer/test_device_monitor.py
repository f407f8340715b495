"""The device's figures: gathered by a thread, averaged over an interval, and lost without harm."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.toy import Toy
from trainer import TrainConfig, train
from trainer.device_monitor import CPU_MEMORY, GPU_MEMORY, GPU_UTILIZATION, DeviceMonitor


class Lost(Exception):
    """As pynvml.NVMLError."""


class FakeNvml:
    """A GPU that is busy for these shares, one after the other; an exception among them is raised."""

    def __init__(self, busy: Iterator[int | Exception]) -> None:
        self.busy, self.calls, self.running, self.uuids = busy, 0, False, list[str]()
        self.exhausted = threading.Event()

    def nvmlInit(self) -> None:
        self.running = True

    def nvmlShutdown(self) -> None:
        self.running = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.uuids.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        assert handle == "handle"
        return SimpleNamespace(used=11_000_000_000 + self.calls, total=24_000_000_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self.calls += 1
        share = next(self.busy, None)
        if share is None:
            self.exhausted.set()
            threading.Event().wait()
        if isinstance(share, Exception):
            raise share
        return SimpleNamespace(gpu=share, memory=0)


def watched(nvml: FakeNvml, every: float = 0.001) -> DeviceMonitor:
    return DeviceMonitor("cuda", nvml=nvml, uuid="GPU-1", every=every)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_utilization_is_the_mean_since_the_last_reading() -> None:
    nvml = FakeNvml(iter([100, 50, 90]))
    with watched(nvml) as monitor:
        assert nvml.exhausted.wait(30)
        assert monitor.read() == {GPU_MEMORY: 11_000_000_002.0, GPU_UTILIZATION: pytest.approx(0.8)}
        # Nothing new: memory as it was, and no utilisation rather than an old one.
        assert monitor.read() == {GPU_MEMORY: 11_000_000_002.0}
    assert nvml.uuids == ["GPU-1"]


def test_hanging_driver_does_not_delay_training() -> None:
    nvml = FakeNvml(iter(()))
    with watched(nvml) as monitor:
        assert nvml.exhausted.wait(30)
        started = time.monotonic()
        monitor.read()
    assert time.monotonic() - started < 10


def test_lost_driver_is_logged_once_and_memory_comes_from_the_allocator(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(chain([70], repeat(Lost("GPU is lost"))))
    with caplog.at_level(logging.WARNING, "trainer"), watched(nvml) as monitor:
        wait_for(lambda: bool(caplog.messages))
        time.sleep(0.05)
        assert monitor.read() == {GPU_MEMORY: 0.0, GPU_UTILIZATION: 0.7}
        assert monitor.read() == {GPU_MEMORY: 0.0}
    assert caplog.messages == ["NVML is lost (Lost: GPU is lost); GPU utilisation is not shown"]
    assert nvml.calls == 2


def test_memory_comes_from_the_allocator_without_pynvml(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("trainer.device_monitor.importlib.import_module", missing)
    with caplog.at_level(logging.INFO, "trainer"), DeviceMonitor("cuda", uuid="GPU-1") as monitor:
        wait_for(lambda: bool(caplog.messages))
        assert monitor.read() == {GPU_MEMORY: 0.0}
    assert caplog.messages == ["GPU utilisation is not shown: nvidia-ml-py is not installed"]


def test_monitor_ends_with_the_run() -> None:
    nvml = FakeNvml(repeat(50))
    before = threading.active_count()
    with watched(nvml):
        wait_for(lambda: nvml.calls > 2)
        assert nvml.running
    wait_for(lambda: not nvml.running and threading.active_count() <= before)


def test_on_a_cpu_it_is_the_process_and_no_thread() -> None:
    before = threading.active_count()
    with DeviceMonitor("cpu") as monitor:
        assert monitor.read()[CPU_MEMORY] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
        assert threading.active_count() == before


class Recorder:
    def __init__(self) -> None:
        self.values: list[Any] = []
        self.checkpoints: list[tuple[str, int]] = []

    def track(self, values: Any, *, step: int, samples: int) -> None:
        self.values.append((step, dict(values)))

    def checkpoint(self, name: str, *, step: int) -> None:
        self.checkpoints.append((name, step))

    def close(self) -> None:
        pass


def test_tracker_has_the_figures_at_each_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = FakeNvml(repeat(40))

    def on_a_gpu(kind: str) -> DeviceMonitor:
        return watched(busy)

    monkeypatch.setattr("trainer.loop.DeviceMonitor", on_a_gpu)
    recorder = Recorder()
    train(Toy(), TrainConfig(steps=20, batch_size=4, log_every=5, device="cpu"), run_dir=tmp_path, tracker=recorder)
    intervals = [values for _, values in recorder.values if "train/loss" in values]
    assert len(intervals) == 4 and all(GPU_MEMORY in values for values in intervals)
    seen = [values[GPU_UTILIZATION] for values in intervals if GPU_UTILIZATION in values]
    assert seen == pytest.approx([0.4] * len(seen)) and seen
    assert "system/memory_bytes" not in intervals[0]


def test_tracker_gets_checkpoints_and_best_values(tmp_path: Path) -> None:
    recorder = Recorder()
    config = TrainConfig(steps=20, batch_size=4, log_every=5, save_every=10, eval_every=40, device="cpu")
    result = train(Toy(), config, run_dir=tmp_path, tracker=recorder)
    assert [entry for entry in recorder.checkpoints if entry[0] == "latest.pth"] == [
        ("latest.pth", 10),
        ("latest.pth", 20),
    ]
    assert ("best_token_model.pth", 10) in recorder.checkpoints
    best = [values["best/token_loss"] for _, values in recorder.values if "best/token_loss" in values]
    assert best == sorted(best, reverse=True) and best[-1] == result.best["val/token_loss"]
    assert all(values["system/memory_bytes"] > 0 for _, values in recorder.values if "train/loss" in values)


def test_training_continues_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = FakeNvml(Lost(str(number)) for number in count())
    monkeypatch.setattr("trainer.loop.DeviceMonitor", lambda kind: watched(broken))
    assert train(Toy(), TrainConfig(steps=20, batch_size=4, device="cpu"), run_dir=tmp_path).finished
