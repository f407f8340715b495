"""The guard of a full run: what happens when it declines."""

from __future__ import annotations

import json
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.studies_for_tests import build
from trainer import Diverged, UserError
from trainer.checkpoint import read_checkpoint
from trainer.evaluation import evaluate as real_evaluate
from trainer.state import prepare as real_prepare
from tuner import launch, promote
from tuner.cli import main
from tuner.show.status import status
from tuner.study.record import FullRunRecord, StudyRecord
from tuner.study.tracked_run import Runtime


def begin(runtime: Runtime, tmp_path: Path, **full: Any) -> optuna.Study:
    """A trial has 20 steps, its full run 240 and a validation every 10."""
    changes = {f"full.{key}": value for key, value in {"samples": 1920, "eval_every": 80, **full}.items()}
    spec = build(without="search.train.batch_size", **{"trial.num_trials": 1, **changes})
    return launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The validation losses to come; then the real ones."""
    to_come: list[float] = []

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = real_evaluate(*args, **kwargs)
        return {**metrics, "val/loss": to_come.pop(0)} if to_come else metrics

    monkeypatch.setattr("trainer.loop.evaluate", evaluate)
    return to_come


def decline() -> Iterator[float]:
    """Declines at its twelfth validation, and has its best value at the tenth."""
    yield from (9 - 0.1 * i for i in range(10))
    yield from (20.0, 20.0)


def read_run(study: optuna.Study) -> FullRunRecord:
    (run,) = StudyRecord.read(study).full_runs
    return run


def test_finish_goes_back_to_the_best_state_and_lets_the_rate_fall(
    runtime: Runtime, tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(runtime, tmp_path, on_decline="finish")
    losses += decline()
    models: list[weakref.ref[Any]] = []

    def prepare(*args: Any, **kwargs: Any) -> Any:
        assert not any(model() for model in models), "two runs in the memory of one device"
        run = real_prepare(*args, **kwargs)
        vars(run.model)["cycle"] = run.model  # as compilation makes one
        models.append(weakref.ref(run.model))
        return run

    monkeypatch.setattr("trainer.loop.prepare", prepare)
    result = promote(study, runtime=runtime)
    # From step 20 on every 10 steps: the best at 120, the decline at 140; a fifth of 120 steps is the decay.
    run = read_run(study)
    assert result.finished and result.step == 144
    assert (run.steps, run.decay_start, run.state) == (144, 121, "finished")
    assert run.decline is not None and run.decline["step"] == 140 and run.decline["outcome"] == "went back to step 120"
    assert max(samples for samples, value in run.curve.items() if value > 7) == 120 * 8
    assert read_checkpoint(result.run_dir / "latest.pth")["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1 / 24)


def test_finish_goes_back_after_a_loss_that_is_no_number_but_only_once(
    runtime: Runtime, tmp_path: Path, losses: list[float]
) -> None:
    study = begin(runtime, tmp_path, on_decline="finish")
    losses += [9.0, 8.0, math.nan]
    result = promote(study, runtime=runtime)
    run = read_run(study)
    assert result.finished and result.step == 48 and all(map(math.isfinite, run.curve.values()))
    assert run.decline is not None and run.decline["outcome"] == "went back to step 40"
    assert run.decline["reason"] == "val/loss was nan after 400 samples"

    again = begin(runtime, tmp_path / "again", on_decline="finish")
    losses += [9.0, 8.0, math.nan, math.nan]
    with pytest.raises(Diverged):
        promote(again, runtime=Runtime(tmp_path / "other", track=False))


def test_finish_that_was_killed_before_it_went_back_does_so_later(
    runtime: Runtime, tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(runtime, tmp_path, on_decline="finish")
    losses += decline()
    with monkeypatch.context() as patch:
        patch.setattr("tuner.promotion.full_run.go_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote(study, runtime=runtime)
    assert read_run(study).is_declining
    assert promote(study, runtime=runtime).step == 144


def test_stop_has_an_exit_code_and_finish_goes_back(
    runtime: Runtime,
    tmp_path: Path,
    losses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = begin(runtime, tmp_path, on_decline="stop")
    losses += decline()
    command = ["tuner", "promote", "toy", "--storage", f"sqlite:///{tmp_path}/tuner.db", "--run-root"]
    monkeypatch.setattr(sys, "argv", [*command, str(runtime.run_root), "--no-track", "--log-format", "json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert stopped.value.code == 3 and "--finish goes back to best.pth" in err
    kinds = [event["event"] for event in events if event["event"] in ("declined", "stopped_by_guard", "run_ended")]
    assert kinds == ["declined", "stopped_by_guard", "run_ended"] and events[-1]["stopped_by_guard"]
    assert status(StudyRecord.read(study))["full_runs"][0]["decline"]["outcome"] == ""
    assert promote(study, finish=True, runtime=runtime).step == 144


def test_warned_run_recovers(runtime: Runtime, tmp_path: Path, losses: list[float]) -> None:
    study = begin(runtime, tmp_path)
    losses += [*decline(), 20.0, 1.0]
    assert promote(study, runtime=runtime).finished
    found = read_run(study).decline
    assert found is not None and found["outcome"] == "recovered at step 160"


def test_finish_is_refused_for_a_cosine() -> None:
    with pytest.raises(UserError, match=r'full: on_decline "finish" needs a rate that is still constant'):
        build(**{"full.schedule": "cosine", "full.on_decline": "finish"})


@pytest.mark.parametrize("on_decline", ["stop", "finish"])
def test_decline_in_the_decay_does_not_go_back_again(
    runtime: Runtime, tmp_path: Path, losses: list[float], on_decline: str
) -> None:
    study = begin(runtime, tmp_path, on_decline=on_decline, patience=2)
    losses += [*decline(), *[20.0] * 4]
    result = promote(study, runtime=runtime)
    for _ in range(2 * (on_decline == "stop")):
        assert result.step in (120, 140) and result.stopped_by_guard
        result = promote(study, finish=True, runtime=runtime)
    assert result.finished and result.step == 144


def test_ended_run_that_declined_is_left_as_it_is(runtime: Runtime, tmp_path: Path, losses: list[float]) -> None:
    study = begin(runtime, tmp_path, on_decline="warn")
    losses += [*decline(), *[20.0] * 20]
    ended = promote(study, runtime=runtime)
    assert ended.finished and read_run(study).is_declining
    assert promote(study, finish=True, runtime=runtime).step == ended.step == 240
