"""Attacks on the states of a run: ruined weights, a disk that refuses, gradients that are lost."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.toy import Toy
from trainer import Diverged, TrainConfig, TrainResult, UserError, checkpoint, train
from trainer.checkpoint import Checkpoints, list_steps, read_checkpoint, write_checkpoint
from trainer.optimizers import build_optimizer, is_finite
from trainer.run_folder import step_of
from tuner.study.tracked_run import _LogFile, log_file

OVERFLOW, NAN = 1e38, float("nan")


class Ruined(Toy):
    """Something other than the training, such as a fault of the device, ruins the weights at one step, once."""

    ruined_at: ClassVar[int] = 12
    value: ClassVar[float] = OVERFLOW
    calls: ClassVar[list[int]] = []

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if model.training:
            self.calls.append(1)
            if len(self.calls) == self.ruined_at:
                with torch.no_grad():
                    for param in model.parameters():
                        param.fill_(self.value)
        return super().loss_sums(model, inputs)


@pytest.fixture
def ruined() -> type[Ruined]:
    return type("RuinedHere", (Ruined,), {"calls": []})


def run(workload: Toy, run_dir: Path, **changes: Any) -> TrainResult:
    values: dict[str, Any] = {"steps": 50, "save_every": 2, "log_every": 10, "precision": "fp32", "device": "cpu"}
    return train(workload, TrainConfig(**{**values, **changes}), run_dir=run_dir)


@pytest.mark.parametrize("value", [OVERFLOW, NAN])
@pytest.mark.parametrize("every", [(2, 10), (5, 5), (1, 20)])
def test_ruined_run_goes_back_to_its_newest_good_state(
    ruined: type[Ruined], tmp_path: Path, value: float, every: tuple[int, int]
) -> None:
    ruined.value = value
    save_every, log_every = every
    changes = {"save_every": save_every, "log_every": log_every, "keep_checkpoints": 1}
    with pytest.raises(Diverged):
        run(ruined(), tmp_path, **changes)
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == step_of(list_steps(tmp_path)[-1]) < 12
    assert run(ruined(), tmp_path, **changes).finished


def test_run_that_was_killed_after_its_ruin_goes_back_too(ruined: type[Ruined], tmp_path: Path) -> None:
    stop = iter([False] * 18 + [True])
    config = TrainConfig(steps=50, save_every=2, log_every=10, precision="fp32", device="cpu")
    train(ruined(), config, run_dir=tmp_path, stop=lambda: next(stop))
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 18
    # The process that goes on knows from the state which one is good, and keeps it among ruined ones.
    with pytest.raises(Diverged):
        run(ruined(), tmp_path)
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 8
    assert run(ruined(), tmp_path).finished


def test_damaged_good_state_does_not_hide_the_divergence(
    ruined: type[Ruined], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run_dir: Path, name: str) -> None:
        raise UserError(f"checkpoint {run_dir / name} is damaged (its digest does not match).")

    monkeypatch.setattr(checkpoint, "go_back", refuse)
    with pytest.raises(Diverged):
        run(ruined(), tmp_path, save_every=1, log_every=20)
    assert "is damaged (its digest does not match)" in caplog.text


def test_finished_run_has_no_more_states_than_it_keeps(tmp_path: Path) -> None:
    """A study keeps the checkpoints of five trials, of 10 GB each."""
    for keep in (1, 2):
        run(Toy(), tmp_path / str(keep), keep_checkpoints=keep)
        assert [step_of(path) for path in list_steps(tmp_path / str(keep))] == [48, 50][-keep:]


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
def test_state_of_the_optimizer_is_looked_at_too(optimizer: Any) -> None:
    model = nn.Linear(4, 4)
    built = build_optimizer(model, TrainConfig(steps=1, optimizer=optimizer))
    built.grad_scale, built.found_inf = None, torch.zeros(())
    model(torch.ones(2, 4)).sum().backward()
    built.step()
    assert is_finite(built)
    tensors = [t for state in built.state.values() for t in state.values() if t.numel() > 1]
    for tensor in (*tensors, model.weight.detach()):
        kept = tensor.flatten()[0].item()
        for value in (float("inf"), -float("inf"), NAN):
            tensor.view(-1)[0] = value
            assert not is_finite(built)
        tensor.view(-1)[0] = kept
    assert is_finite(built)


class Noisy(Toy):
    """The loss of some batches is not finite."""

    lost: ClassVar[Callable[[int], bool]]
    calls: ClassVar[list[int]] = []

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        if model.training:
            self.calls.append(1)
            if type(self).lost(len(self.calls)):
                return {name: value * NAN for name, value in sums.items()}
        return sums


def noisy(lost: Callable[[int], bool]) -> Toy:
    return type("NoisyHere", (Noisy,), {"calls": [], "lost": staticmethod(lost)})()


def test_run_that_loses_nineteen_gradients_of_twenty_ends(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"95 of the last 100 gradients were not finite, at step 100"):
        run(noisy(lambda call: call % 20 != 0), tmp_path, log_every=20, save_every=None, steps=200)


@pytest.mark.parametrize(("every", "warns"), [(5, True), (20, False)])
def test_lost_gradients_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, every: int, warns: bool
) -> None:
    caplog.set_level(logging.WARNING)
    assert run(noisy(lambda call: call % every == 0), tmp_path, save_every=None, steps=200).finished
    assert len([text for text in caplog.messages if "gradients were not finite" in text]) == warns
    if warns:
        assert "20 of the last 100 gradients were not finite, and their updates were skipped" in caplog.text


def test_shortage_of_the_disk_that_is_over_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.01)
    tries: list[int] = []

    def write(state: Any, path: Path) -> None:
        tries.append(1)
        if len(tries) in (2, 3, 4):
            raise UserError(f"{path} could not be written (No space left on device).")
        write_checkpoint(state, path)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save({"step": step})
            checkpoints._wait()
    assert [read_checkpoint(path)["step"] for path in list_steps(tmp_path)] == [1, 2, 3]
    assert sum("No space left" in text for text in caplog.messages) == 1
    assert "the checkpoint of step 2 is written now" in caplog.text


@pytest.mark.parametrize("call", ["delete", "unlink"])
def test_disk_that_refuses_to_delete_for_a_moment_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """As a network file system does, also where the rest of a refused write is removed."""
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.01)
    left = [1, 1, 1]

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left:
                left.pop()
                raise OSError(116, "Stale file handle")
            return original(*args, **kwargs)

        return call

    if call == "delete":
        monkeypatch.setattr(checkpoint, "delete", refuse(checkpoint.delete))
    else:
        monkeypatch.setattr(os, "replace", refuse(os.replace))
        monkeypatch.setattr(Path, "unlink", refuse(Path.unlink))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.confirm(step)
            checkpoints.save({"step": step})
            checkpoints._wait()
    assert [step_of(path) for path in list_steps(tmp_path)] == [2, 3] and not left
    assert "Stale file handle" in caplog.text


def test_shortage_that_stays_ends_the_run_without_waiting_for_its_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.001)
    monkeypatch.setattr(checkpoint, "GIVE_UP_S", 0.02)

    def refuse(state: Any, path: Path) -> None:
        raise UserError(f"{path} could not be written (No space left on device).")

    monkeypatch.setattr(checkpoint, "write_checkpoint", refuse)
    seen: list[int] = []

    def stop() -> bool:
        seen.append(1)
        if len(seen) > 401:
            time.sleep(0.01)
        return False

    config = TrainConfig(steps=5000, save_every=400, log_every=1000, precision="fp32", device="cpu")
    with pytest.raises(UserError, match="No space left"):
        train(Toy(), config, run_dir=tmp_path, stop=stop)
    assert len(seen) < 800


def test_state_that_the_disk_refuses_to_read_for_a_moment_is_never_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(Toy(), tmp_path, steps=30, save_every=10)
    newest = tmp_path / "step_000000030.pth"
    content = newest.read_bytes()
    real = open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path) == newest:
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint_file.open", refuse, raising=False)
        run(Toy(), tmp_path, steps=25, save_every=5)
    assert "step_000000030.pth can't be read (Input/output error)" in caplog.text
    assert newest.read_bytes() == content
    assert run(Toy(), tmp_path, steps=30).step == 30


def test_log_that_can_not_be_written_at_its_end_does_not_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with log_file(tmp_path):
        handler = next(each for each in logging.getLogger().handlers if isinstance(each, _LogFile))
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: SIM115
        handler.stream.write("a line")
    assert capfd.readouterr().err.count("train.log can't be written (No space left on device)") == 1


def refuse_to_read(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name in names:
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("trainer.checkpoint_file.open", refuse, raising=False)


def test_run_that_goes_back_keeps_a_state_that_the_disk_refused_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(Toy(), tmp_path, steps=30, save_every=10, keep_checkpoints=3)
    content = (tmp_path / "step_000000030.pth").read_bytes()
    with monkeypatch.context() as patch:
        refuse_to_read(patch, "step_000000030.pth")
        checkpoint.go_back(tmp_path, "step_000000010.pth")
    assert [step_of(path) for path in list_steps(tmp_path)] == [10]
    assert (tmp_path / "step_000000030.pth.unreadable").read_bytes() == content
    assert "step_000000030.pth could not be read, and is kept as step_000000030.pth.unreadable" in caplog.text


def test_best_weights_that_the_disk_refused_to_read_are_replaced_by_better_ones_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(Toy(), tmp_path, steps=30, save_every=10, eval_every=80)
    best = tmp_path / "best_token_model.pth"
    state = read_checkpoint(tmp_path / "latest.pth")
    state["progress"]["best"]["val/token_loss"] = 0.0
    write_checkpoint(state, tmp_path / "step_000000030.pth")
    content = best.read_bytes()
    with monkeypatch.context() as patch:
        refuse_to_read(patch, best.name)
        run(Toy(), tmp_path, steps=60, save_every=10, eval_every=80)
    assert best.read_bytes() == content
    assert "best_token_model.pth can't be read (Input/output error)" in caplog.text


def test_stop_ends_the_tries_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for the write where memory has no room for another snapshot."""

    def refuse(state: Any, path: Path) -> None:
        stopped.append(True)
        raise UserError(f"{path} could not be written (No space left on device).")

    stopped: list[bool] = []
    monkeypatch.setattr(checkpoint, "write_checkpoint", refuse)
    monkeypatch.setattr(checkpoint, "POLL_S", 0.01)
    monkeypatch.setattr(checkpoint, "GIVE_UP_S", 5.0)
    monkeypatch.setattr(checkpoint.psutil, "virtual_memory", lambda: SimpleNamespace(available=0, total=1))
    config = TrainConfig(steps=5000, save_every=1, log_every=1000, precision="fp32", device="cpu")
    with pytest.raises(UserError, match="No space left"):
        train(Toy(), config, run_dir=tmp_path, stop=lambda: bool(stopped))
    assert len(stopped) == 1, "no second try"
