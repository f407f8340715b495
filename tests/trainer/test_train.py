"""train(): resuming, refusing, stopping, and the files of a run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from tests.toy import Toy, ToyModel
from trainer import Diverged, Evaluation, TrainConfig, UserError, train
from trainer.checkpoint import lock_folder, read_checkpoint
from trainer.tracking import Trackers

CONFIG = {"batch_size": 4, "eval_every": 40, "log_every": 5, "save_every": 10, "precision": "fp32"}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 40, **CONFIG, **changes})


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(steps))
    return lambda: next(asked, None) is None


def states_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(states_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(states_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
@pytest.mark.parametrize("stopped_at", [7, 23])
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, optimizer: str, stopped_at: int) -> None:
    # 31 samples: 40 steps of 2 x 4 cross several epochs, so the sample order is continued too.
    workload, run = Toy(num_train=70), config(optimizer=optimizer, grad_accumulation=2, schedule="cosine")
    train(workload, run, run_dir=tmp_path / "whole")
    first = train(workload, run, run_dir=tmp_path / "parts", stop=stop_after(stopped_at))
    assert not first.finished and first.step == stopped_at
    torch.manual_seed(99)
    assert train(workload, run, run_dir=tmp_path / "parts").finished

    whole, parts = (read_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "parts"))
    for key in ("model", "optimizer", "random", "step", "metrics"):
        assert states_equal(whole[key], parts[key]), key
    assert whole["progress"]["best"] == parts["progress"]["best"]


def test_finished_run_continues_when_extended(tmp_path: Path) -> None:
    train(Toy(), config(steps=20), run_dir=tmp_path / "parts")
    train(Toy(), config(steps=40), run_dir=tmp_path / "parts")
    train(Toy(), config(steps=40), run_dir=tmp_path / "whole")
    whole, parts = (read_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "parts"))
    assert states_equal(whole["model"], parts["model"])


def test_best_value_survives_a_resume(tmp_path: Path) -> None:
    train(Toy(), config(steps=20), run_dir=tmp_path)
    best = read_checkpoint(tmp_path / "best_token_model.pth")
    # From here on the weights are ruined, so no later validation is better.
    latest = max(tmp_path.glob("step_*.pth"))
    state = read_checkpoint(latest)
    for value in state["model"].values():
        value.mul_(50)
    for path in tmp_path.glob("*.sha256"):
        path.unlink()
    torch.save(state, latest)
    train(Toy(), config(steps=30), run_dir=tmp_path)
    assert read_checkpoint(tmp_path / "best_token_model.pth")["step"] == best["step"]


def test_gradient_accumulation_is_one_larger_batch(tmp_path: Path) -> None:
    """Sums over all tokens of the step, not a mean of means, although the batches differ in length."""
    workload = Toy(dropout=0.0, num_train=8)
    losses = {}
    for name, changes in {"one": {"batch_size": 8}, "four": {"batch_size": 2, "grad_accumulation": 4}}.items():
        # 8 samples: every step sees all of them, in whatever order.
        train(workload, config(steps=5, **changes), run_dir=tmp_path / name)
        losses[name] = read_checkpoint(tmp_path / name / "latest.pth")["model"]
    for key, value in losses["one"].items():
        torch.testing.assert_close(losses["four"][key], value, rtol=1e-4, atol=1e-6)


def test_validation_loss_does_not_depend_on_the_training_batch_size(tmp_path: Path) -> None:
    seen: dict[int, list[Evaluation]] = {4: [], 16: []}
    for batch_size, evaluations in seen.items():
        # Steps so small that the weights do not change.
        frozen = config(steps=1, batch_size=batch_size, optimizer="adamw", lr=1e-12, val_samples=30)
        train(Toy(), frozen, run_dir=tmp_path / str(batch_size), on_eval=evaluations.append)
    assert seen[4][-1].metrics["val/loss"] == pytest.approx(seen[16][-1].metrics["val/loss"], rel=1e-6)


class TwoLanguages(Toy):
    def val_part(self, index: int) -> str:
        return "ko" if index < 30 else "en"


def test_each_part_of_the_validation_set_has_its_loss_besides_the_whole_one(tmp_path: Path) -> None:
    frozen = config(steps=1, optimizer="adamw", lr=1e-12)
    plain, parted = (
        train(workload, frozen, run_dir=tmp_path / type(workload).__name__).metrics
        for workload in (Toy(), TwoLanguages())
    )
    assert list(parted) == ["val/loss", "val/token_loss"] + [
        f"val/{name}/{part}" for part in ("en", "ko") for name in ("loss", "token_loss")
    ]
    assert parted["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-6)
    lengths = Toy().val_data().lengths
    tokens = {"ko": lengths[:30].sum(), "en": lengths[30:].sum()}
    mean = sum(parted[f"val/loss/{part}"] * count for part, count in tokens.items()) / lengths.sum()
    assert mean == pytest.approx(parted["val/loss"], rel=1e-6)
    assert abs(parted["val/loss/ko"] - parted["val/loss/en"]) > 1e-4


def test_evaluations_are_on_the_grid_of_samples(tmp_path: Path) -> None:
    seen: list[Evaluation] = []
    train(Toy(), config(steps=None, samples=100, batch_size=12, eval_every=25), run_dir=tmp_path, on_eval=seen.append)
    assert [(e.point, e.samples) for e in seen] == [(25, 36), (50, 60), (75, 84), (100, 108)]


def test_run_in_seconds_ends_and_is_evaluated_on_its_grid(tmp_path: Path) -> None:
    seen: list[Evaluation] = []
    run = config(steps=None, seconds=0.6, eval_every=0.2, eval_unit="seconds")
    result = train(Toy(), run, run_dir=tmp_path, on_eval=seen.append)
    assert result.finished and result.seconds >= 0.6
    assert [e.point for e in seen] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"batch_size": 8}, "train.batch_size was 4 and is now 8"),
        ({"d_coef": 2.0}, "train.d_coef was 1.0 and is now 2.0"),
        ({"seed": 1}, "train.seed was 0 and is now 1"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], phrase: str) -> None:
    train(Toy(), config(steps=5), run_dir=tmp_path)
    with pytest.raises(UserError, match=phrase):
        train(Toy(), config(**changes), run_dir=tmp_path)


def test_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    train(Toy(), config(steps=5), run_dir=tmp_path)
    with pytest.raises(UserError, match=r"workload\.width was 16 and is now 8"):
        train(Toy(width=8), config(), run_dir=tmp_path)
    with pytest.raises(UserError, match=r"data\.contents"):
        train(Toy(digest="other"), config(), run_dir=tmp_path)


def test_free_fields_may_change(tmp_path: Path) -> None:
    train(Toy(), config(steps=5), run_dir=tmp_path)
    result = train(Toy(), config(steps=8, log_every=2, num_workers=1, eval_every=8), run_dir=tmp_path)
    assert result.step == 8


def test_checkpoint_of_the_other_optimizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    train(Toy(), config(steps=5, optimizer="adamw"), run_dir=tmp_path / "adamw")
    with pytest.raises(UserError, match=r"checkpoint of adamw .*--set train.optimizer=adamw.*--init "):
        train(Toy(), config(), run_dir=tmp_path / "adamw")


def test_repeated_resume_from_a_path_continues(tmp_path: Path) -> None:
    train(Toy(), config(steps=10), run_dir=tmp_path / "one")
    source = tmp_path / "one" / "latest.pth"
    stopped = train(Toy(), config(), run_dir=tmp_path / "two", resume=source, stop=stop_after(5))
    assert not stopped.finished
    assert train(Toy(), config(), run_dir=tmp_path / "two", resume=source).finished
    with pytest.raises(UserError, match="holds a run of its own"):
        train(Toy(), config(), run_dir=tmp_path / "one", resume=tmp_path / "two" / "latest.pth")


def test_checkpoint_of_another_trainer_counts_as_adamw_and_is_not_resumed(tmp_path: Path) -> None:
    torch.save({"model": {}, "optimizer": {}, "step": 5}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="checkpoint of adamw and this run uses prodigy"):
        train(Toy(), config(), run_dir=tmp_path / "new", resume=tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="of another trainer"):
        train(Toy(), config(optimizer="adamw"), run_dir=tmp_path / "new", resume=tmp_path / "theirs.pth")


def test_checkpoint_without_a_type_counts_as_adamw(tmp_path: Path) -> None:
    train(Toy(), config(steps=5), run_dir=tmp_path / "run")
    state = read_checkpoint(tmp_path / "run" / "latest.pth")
    del state["optimizer_type"]
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(UserError, match="checkpoint of adamw and this run uses prodigy"):
        train(Toy(), config(), run_dir=tmp_path / "new", resume=tmp_path / "old.pth")


def test_run_resumed_elsewhere_has_its_best_checkpoint_there(tmp_path: Path) -> None:
    """Even where no later validation is better than the best of before, whose weights stayed in the other folder."""
    train(Toy(), config(steps=20), run_dir=tmp_path / "one")
    state = read_checkpoint(tmp_path / "one" / "latest.pth")
    state["progress"]["best"]["val/token_loss"] = 0.0
    torch.save(state, tmp_path / "unbeatable.pth")
    train(Toy(), config(steps=30), run_dir=tmp_path / "other", resume=tmp_path / "unbeatable.pth")
    assert read_checkpoint(tmp_path / "other" / "best_token_model.pth")["step"] in (20, 30)


def test_init_takes_the_weights_and_nothing_else(tmp_path: Path) -> None:
    train(Toy(), config(steps=20, optimizer="adamw", lr=0.01), run_dir=tmp_path / "adamw")
    source = tmp_path / "adamw" / "best_token_model.pth"
    seen: list[Evaluation] = []
    tiny = config(steps=1, optimizer="prodigy", d0=1e-12)
    train(Toy(), tiny, run_dir=tmp_path / "new", init=source, on_eval=seen.append)
    assert seen[0].step == 1
    assert seen[0].metrics["val/loss"] == pytest.approx(read_checkpoint(source)["metrics"]["val/loss"], rel=1e-4)
    # Run again it continues; from elsewhere it is refused.
    assert train(Toy(), tiny, run_dir=tmp_path / "new", init=source).step == 1
    with pytest.raises(UserError, match="did not start from"):
        train(Toy(), tiny, run_dir=tmp_path / "new", init=tmp_path / "adamw" / "latest.pth")


def test_weights_alone_can_not_be_resumed(tmp_path: Path) -> None:
    train(Toy(), config(steps=10), run_dir=tmp_path / "run")
    best = tmp_path / "run" / "best_token_model.pth"
    with pytest.raises(UserError, match=r"weights and no training state.*--init"):
        train(Toy(), config(), run_dir=tmp_path / "new", resume=best)


def test_resume_never_refuses_a_used_directory(tmp_path: Path) -> None:
    train(Toy(), config(steps=5), run_dir=tmp_path)
    with pytest.raises(UserError, match="holds a run at step 5"):
        train(Toy(), config(), run_dir=tmp_path, resume="never")


def test_used_directory_is_locked(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use"):
        train(Toy(), config(), run_dir=tmp_path)


class Stop(Exception):
    pass


class Recorder:
    def __init__(self) -> None:
        self.values: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.values.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_error_in_on_eval_closes_everything_and_propagates(tmp_path: Path) -> None:
    recorder = Recorder()

    def on_eval(evaluation: Evaluation) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(Toy(), config(), run_dir=tmp_path, tracker=recorder, on_eval=on_eval)
    assert recorder.closed
    with lock_folder(tmp_path):
        pass


def test_tracker_gets_losses_rate_d_and_norm(tmp_path: Path) -> None:
    recorder = Recorder()
    train(Toy(), config(), run_dir=tmp_path, tracker=recorder)
    names = {name for _, values in recorder.values for name in values}
    assert {"train/loss", "train/token_loss", "train/lr", "train/d", "train/grad_norm", "val/loss"} <= names
    last = dict(recorder.values)[40]
    final = read_checkpoint(tmp_path / "latest.pth")
    assert recorder.values[-2][1]["train/d"] == pytest.approx(final["optimizer"]["param_groups"][0]["d"])
    assert last


def test_log_line_has_the_promised_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainer"):
        train(Toy(), config(), run_dir=tmp_path)
    lines = [record.message for record in caplog.records if record.message.startswith("[Step 5]")]
    pattern = r"\[Step 5\] Loss: \d+\.\d+, Token Loss: \d+\.\d+, LR: [\d.e-]+, Time: \d+\.\ds, .*samples/s, .* left"
    assert any(re.fullmatch(pattern, line) for line in lines), lines


class Exploding(Toy):
    """The loss is infinite for one batch, or for all of them."""

    always: bool = False

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        if model.training and (self.always or bool((inputs["tokens"][0, 0] == 3).item())):
            return {name: value * float("inf") for name, value in sums.items()}
        return sums


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
def test_non_finite_gradient_skips_its_update_alone(tmp_path: Path, optimizer: str) -> None:
    recorder = Recorder()
    train(Exploding(), config(optimizer=optimizer, log_every=40), run_dir=tmp_path, tracker=recorder)
    values = dict(recorder.values[:1])[40] if recorder.values[0][0] == 40 else recorder.values[-2][1]
    assert 0 < values["train/skipped_updates"] < 20
    state = read_checkpoint(tmp_path / "latest.pth")
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    if optimizer == "prodigy":
        assert state["optimizer"]["param_groups"][0]["d"] > 10 * 1e-6


@pytest.mark.parametrize("log_every", [1, 5])
def test_run_without_any_update_ends_as_diverged(tmp_path: Path, log_every: int) -> None:
    with pytest.raises(Diverged, match="none of the last 5 gradients was finite, at step 5"):
        train(Exploding(always=True), config(log_every=log_every), run_dir=tmp_path)


class Broken(Recorder):
    """A display that fails at its third call."""

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        super().track(values, step=step, samples=samples)
        if len(self.values) == 3:
            raise ZeroDivisionError


def test_failed_tracker_is_dropped_and_the_run_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = Broken(), Recorder()
    assert train(Toy(), config(), run_dir=tmp_path, tracker=Trackers([broken, whole])).finished
    assert len(broken.values) == 3 < len(whole.values)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage() == "Broken failed; training continues without it" and warning.exc_info


def test_failed_tracker_is_closed(tmp_path: Path) -> None:
    broken = Broken()
    train(Toy(), config(), run_dir=tmp_path, tracker=Trackers([broken]))
    assert broken.closed


class Overflowing(Toy):
    """Its validation loss is no number after 20 batches."""

    _batches: int = PrivateAttr(0)

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._batches += model.training
        ruined = not model.training and self._batches >= 20
        return {name: value * (math.nan if ruined else 1) for name, value in super().loss_sums(model, inputs).items()}


def test_non_finite_validation_loss_ends_the_run_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"val/loss was nan after 80 samples"):
        train(Overflowing(), config(eval_every=40, save_every=5), run_dir=tmp_path)
    assert 0 < read_checkpoint(tmp_path / "best_token_model.pth")["metrics"]["val/loss"] < 10
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 15


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    for workers in (0, 2):
        train(Toy(), config(steps=12, num_workers=workers), run_dir=tmp_path / str(workers))
    one, other = (read_checkpoint(tmp_path / name / "latest.pth") for name in ("0", "2"))
    assert states_equal(one["model"], other["model"])


class Versioned(ToyModel):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


class VersionedToy(Toy):
    def build_model(self) -> Versioned:
        return Versioned(self.width, self.dropout)


def test_run_of_a_module_with_a_state_of_its_own_is_continued(tmp_path: Path) -> None:
    assert not train(VersionedToy(), config(steps=5), run_dir=tmp_path, stop=stop_after(3)).finished
    assert train(VersionedToy(), config(steps=5), run_dir=tmp_path).finished
