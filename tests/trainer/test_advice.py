"""Warnings while it trains: from described figures, with the likely cause, and each once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.toy import Toy
from trainer import TrainConfig, train
from trainer.advice import Advice, check_loss_falls, check_utilization


def figures(loss: float = 1.0, busy: float | None = None, data_wait: float = 0.0) -> dict[str, float]:
    values = {"train/loss": loss, "train/data_wait": data_wait}
    return values if busy is None else {**values, "system/gpu_utilization": busy}


@pytest.mark.parametrize(
    ("busy", "data_wait", "logged"),
    [
        (0.95, 0.0, None),
        (0.80, 0.2, None),
        (0.79, 0.0, "a larger train.batch_size"),
        (0.30, 0.6, "60% of the time went into waiting for data"),
        (0.30, 0.1, "a larger train.batch_size"),
        (0.0, 0.5, "waiting for data"),
    ],
)
def test_idle_gpu_has_a_likely_cause(busy: float, data_wait: float, logged: str | None) -> None:
    text = check_utilization(busy, data_wait)
    assert text is None if logged is None else text is not None and logged in text


def idle(advice: Advice, intervals: int, busy: float, step: int = 0) -> list[str]:
    logged = []
    for number in range(intervals):
        values = figures(loss=-number, busy=busy, data_wait=0.5)
        logged += advice.check_interval(values, step=step + number, seconds=60).values()
    return logged


def test_idle_gpu_is_logged_once() -> None:
    advice = Advice()
    # One minute of compilation and two of idling are not enough.
    assert idle(advice, 3, 0.4) == []
    (text,) = idle(advice, 1, 0.4, step=3)
    assert "busy for 40% of the time only" in text and "waiting for data" in text
    assert idle(advice, 20, 0.4, step=4) == []


def test_busy_gpu_and_cpu_log_nothing_and_a_pause_is_forgotten() -> None:
    advice = Advice()
    assert idle(advice, 10, 0.99) == []
    assert len(idle(advice, 6, 0.5, step=10)) == 1
    cpu = Advice()
    assert [cpu.check_interval(figures(loss=-step), step=step, seconds=600) for step in range(9)] == [{}] * 9


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ([7.0, 6.9, 6.8, 6.7, 6.6], True),
        ([7.0, 7.2, 7.1, 7.0, 6.99], True),
        ([7.0, 7.0, 7.0, 7.0, 7.0], False),
        ([7.0, 6.0, 6.5, 7.5, 8.0], False),
        ([7.0, 6.0, 6.0, 6.0, float("nan")], False),
        ([7.0, 7.2] * 50, False),
        ([7.0, 7.2] * 50 + [6.0] * 100, True),
    ],
)
def test_flat_loss_is_detected(losses: list[float], falls: bool) -> None:
    assert (check_loss_falls(losses, 100) is None) == falls


def test_loss_is_judged_once_after_five_intervals_and_a_hundred_steps() -> None:
    for every, judged_at in ((5, 100), (100, 500)):
        advice = Advice()
        logged = [
            step for step in range(every, 2000, every) if advice.check_interval(figures(7.0), step=step, seconds=1)
        ]
        assert logged == [judged_at]
    resumed = Advice(step=1000)
    assert not any(resumed.check_interval(figures(7.0), step=step, seconds=1) for step in range(1100, 3000, 100))


class Flat(Toy):
    """The loss is the same at every step."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * 0.0 for name, value in super().loss_sums(model, inputs).items()}


def test_run_with_a_flat_loss_logs_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer"):
        train(Flat(), TrainConfig(steps=90, batch_size=4, log_every=10), run_dir=tmp_path / "too short to say")
        train(Flat(), TrainConfig(steps=150, batch_size=4, log_every=10), run_dir=tmp_path / "flat")
        train(Toy(), TrainConfig(steps=150, batch_size=4, log_every=10, d0=1e-3), run_dir=tmp_path / "falls")
    (line,) = caplog.messages
    assert line.startswith("[Step 100] the loss has not fallen over the first 100 steps (0.0000 at first, 0.0000 now)")


def test_compilation_is_announced_with_its_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(function: Any, **_: Any) -> Any:
        return function

    # Another test of this process may have compiled the toy, which then takes 3 s.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # The message before compilation matters here, not the compilation.
    monkeypatch.setattr("trainer.compilation.torch.compile", same)
    with caplog.at_level(logging.WARNING, "trainer"):
        train(Toy(dropout=0.0), TrainConfig(steps=2, batch_size=4, compile="on"), run_dir=tmp_path)
    # Ten seconds, and seven tenths for each of the toy's five tensors.
    assert caplog.messages == ["compiling forward and loss: about 14 s of silence"]
