"""Seconds of training: compilation and warm-up are outside, so that a slow first step costs no training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.toy import Toy
from trainer import Evaluation, TrainConfig, train
from trainer.checkpoint import read_checkpoint
from trainer.state import WARM_UP_STEPS

STEP_SECONDS = 0.25


class Clock:
    """Advances only by the time that a step takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("trainer.loop.time", clock)
    clocks.append(clock)
    return clock


clocks: list[Clock] = []


class Timed(Toy):
    """Every training step takes a quarter of a second; the first of each process so much more."""

    compilation: float = 0.0

    def build_model(self) -> nn.Module:
        self._first = True
        return super().build_model()

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if model.training:
            clocks[-1].now += STEP_SECONDS + (self.compilation if self._first else 0.0)
            self._first = False
        return super().loss_sums(model, inputs)


def config(**changes: Any) -> TrainConfig:
    budget = {} if "steps" in changes else {"seconds": 5.0}
    return TrainConfig(**{"batch_size": 4, "log_every": 5, "device": "cpu", **budget, **changes})


def stop_after(steps: int) -> Callable[[], bool]:
    asked = itertools.count()
    return lambda: next(asked) >= steps


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("compilation", [0.0, 60.0])
def test_run_in_seconds_excludes_compilation_time(tmp_path: Path, compilation: float) -> None:
    result = train(Timed(compilation=compilation), config(), run_dir=tmp_path)
    assert result.step == WARM_UP_STEPS + 20 and result.timed_steps == 20
    assert result.seconds == 5.0
    assert result.samples_per_second == 4 / STEP_SECONDS


def test_run_in_seconds_excludes_warm_up_by_the_real_clock(tmp_path: Path) -> None:
    class Sleeping(Timed):
        def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if model.training and self._first:
                time.sleep(1.0)
                self._first = False
            return Toy.loss_sums(self, model, inputs)

    result = train(Sleeping(), config(seconds=0.2), run_dir=tmp_path)
    assert result.step > WARM_UP_STEPS + 1 and result.finished


@pytest.mark.usefixtures("clock")
def test_hours_are_projected_from_steps_that_were_timed(tmp_path: Path) -> None:
    seen: list[Evaluation] = []
    run = config(steps=20, eval_every=20)
    train(Timed(compilation=60.0), run, run_dir=tmp_path, on_eval=seen.append)
    assert {evaluation.seconds_per_step for evaluation in seen} == {STEP_SECONDS}


class Rates:
    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/loss" in values:
            self.found.append((values["train/samples_per_second"], values["train/seconds_left"]))

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("log_every", [1, 5])
def test_rate_of_the_first_interval_is_that_of_its_timed_steps(tmp_path: Path, log_every: int) -> None:
    rates = Rates()
    train(Timed(compilation=60.0), config(steps=10, log_every=log_every), run_dir=tmp_path, tracker=rates)
    known = rates.found[0 if log_every == 5 else WARM_UP_STEPS :]
    steps_left = range(10 - log_every, -1, -log_every) if log_every == 5 else range(10 - WARM_UP_STEPS - 1, -1, -1)
    assert known == [(4 / STEP_SECONDS, left * STEP_SECONDS) for left in steps_left]


class Steps(Rates):
    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/timed_steps" in values:
            self.found.append((step, values["train/timed_steps"]))


@pytest.mark.parametrize(
    ("log_every", "lines"),
    [(100, [(53, 50), (100, 47), (120, 20)]), (40, [(40, 37), (80, 40), (120, 40)])],
)
def test_first_figures_appear_after_fifty_timed_steps(
    tmp_path: Path, log_every: int, lines: list[tuple[int, int]]
) -> None:
    steps, again = Steps(), Steps()
    train(Toy(), config(steps=120, log_every=log_every), run_dir=tmp_path, tracker=steps)
    assert steps.found == lines
    # A continuation may run under another plan: its first figures come early too.
    train(Toy(), config(steps=300, log_every=200), run_dir=tmp_path, tracker=again)
    assert again.found == [(173, 50), (200, 27), (300, 100)]


@pytest.mark.usefixtures("clock")
def test_resumed_run_warms_up_again(tmp_path: Path) -> None:
    workload = Timed(compilation=60.0)
    stopped = train(workload, config(), run_dir=tmp_path, stop=stop_after(10))
    assert (stopped.step, stopped.timed_steps) == (10, 10 - WARM_UP_STEPS)
    result = train(workload, config(), run_dir=tmp_path)
    assert result.seconds == 5.0 and result.step == 20 + 2 * WARM_UP_STEPS


@pytest.mark.usefixtures("clock")
def test_run_that_never_passes_its_warm_up_ends(tmp_path: Path) -> None:
    for starts in itertools.count(1):
        result = train(Timed(), config(seconds=1.0), run_dir=tmp_path, stop=stop_after(2))
        if result.finished:
            break
        assert starts < 20
    assert result.seconds >= 1.0


@pytest.mark.usefixtures("clock")
def test_run_of_warm_up_alone_has_no_seconds(tmp_path: Path) -> None:
    seen: list[Evaluation] = []
    result = train(Timed(), config(steps=WARM_UP_STEPS), run_dir=tmp_path, on_eval=seen.append)
    assert result.seconds == 0.0 and result.samples_per_second is None
    assert seen[-1].seconds_per_step is None


@pytest.mark.usefixtures("clock")
def test_older_checkpoint_counts_all_of_its_steps(tmp_path: Path) -> None:
    import torch

    train(Timed(), config(steps=10), run_dir=tmp_path / "one")
    state = read_checkpoint(tmp_path / "one" / "latest.pth")
    del state["progress"]["timed_steps"]
    state["progress"]["seconds"] = 10 * STEP_SECONDS
    torch.save(state, tmp_path / "old.pth")
    result = train(Timed(), config(steps=20), run_dir=tmp_path / "two", resume=tmp_path / "old.pth")
    assert (result.timed_steps, result.seconds) == (20 - WARM_UP_STEPS, (20 - WARM_UP_STEPS) * STEP_SECONDS)
