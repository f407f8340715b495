"""A batch cut into micro-batches: the same samples, the same update, less memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.toy import Toy
from trainer import TrainConfig, UserError, train
from trainer.acceleration import Capabilities
from trainer.checkpoint import read_checkpoint
from trainer.data.batching import BatchOrder
from trainer.data.loader import split_batch, train_batches
from trainer.memory import Probe
from trainer.micro_batches import estimate_fit
from trainer.units import format_bytes

CPU = Capabilities("cpu", "CPU", cores=1, memory=8_000_000_000)
STEPS = 12


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"steps": STEPS, "batch_size": 8, "precision": "fp32", "device": "cpu", **values})


def trained(folder: Path, workload: Toy | None = None, **values: Any) -> dict[str, Any]:
    """The last checkpoint of a run without dropout."""
    train(workload or Toy(dropout=0.0), config(**values), run_dir=folder)
    return read_checkpoint(folder / "latest.pth")


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 8, 100])
def test_weights_and_loss_are_those_of_the_whole_batch(tmp_path: Path, micro_batch_size: int) -> None:
    whole = trained(tmp_path / "whole", grad_accumulation=2)
    cut = trained(tmp_path / "cut", grad_accumulation=2, micro_batch_size=micro_batch_size)
    assert cut["progress"]["metrics"] == pytest.approx(whole["progress"]["metrics"], rel=1e-5)
    for name, weights in whole["model"].items():
        torch.testing.assert_close(cut["model"][name], weights, rtol=1e-4, atol=1e-6)
    assert cut["samples"] == whole["samples"] == STEPS * 16


def test_size_that_cuts_nothing_changes_no_bit(tmp_path: Path) -> None:
    """With dropout, which draws other numbers for rows in another order."""
    whole, same = (trained(tmp_path / str(size), Toy(), micro_batch_size=size)["model"] for size in (None, 8))
    assert all(torch.equal(same[name], whole[name]) for name in whole)


class Seen(Toy):
    """Its batches bear the number of each of their samples."""

    def train_data(self) -> Any:
        data = super().train_data()
        data.samples = [np.append(sample, index) for index, sample in enumerate(data.samples)]
        return data

    def collate(self, samples: Any, pad_multiple: int = 1) -> Any:
        batch = super().collate([sample[:-1] for sample in samples], pad_multiple)
        batch.inputs["numbers"] = torch.tensor([int(sample[-1]) for sample in samples])
        return batch


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_batch_comes_as_micro_batches_of_its_own_samples(number: int, num_workers: int) -> None:
    workload = Seen(num_train=64)
    data = workload.train_data()
    order = BatchOrder(data.lengths, 8)
    loader = train_batches(
        Seen(num_train=64),
        data,
        order,
        start=(0, 3),
        num_workers=num_workers,
        device=torch.device("cpu"),
        num_micro_batches=number,
    )
    for batch in islice(order.from_position(0, 3), 9):  # into the second epoch
        parts = list(islice(loader, number))
        numbers = [index for part in parts for index in part.inputs["numbers"].tolist()]
        assert sorted(numbers) == sorted(batch.tolist())
        assert max(part.num_samples for part in parts) - min(part.num_samples for part in parts) <= 1


def test_samples_of_like_length_are_together_the_longest_first() -> None:
    lengths = np.array([5, 90, 7, 60, 6, 80])
    parts = split_batch(np.arange(100, 106), lengths, 2)
    assert [part.tolist() for part in parts] == [[101, 105, 103], [102, 104, 100]]


def test_damaged_samples_are_skipped_and_may_empty_a_micro_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = BatchOrder(Toy().train_data().lengths, 8).epoch(0)
    damaged = int(batches[1, 0]), int(batches[3, 5])
    workload = Toy(dropout=0.0, damaged=damaged)
    with caplog.at_level(logging.WARNING):
        cut = trained(tmp_path / "cut", workload, micro_batch_size=1)
    messages = [f"skipped: sample-{index}: tokens.npy is missing" for index in damaged]
    assert [record.message for record in caplog.records] == messages
    whole = trained(tmp_path / "whole", workload)
    for name, weights in whole["model"].items():
        torch.testing.assert_close(cut["model"][name], weights, rtol=1e-4, atol=1e-6)


def test_stopped_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Toy(), micro_batch_size=3, grad_accumulation=2)
    asked = iter(range(100))
    result = train(
        Toy(),
        config(micro_batch_size=3, grad_accumulation=2),
        run_dir=tmp_path / "stopped",
        stop=lambda: next(asked) == 5,
    )
    assert (result.step, result.finished) == (5, False)
    resumed = trained(tmp_path / "stopped", Toy(), micro_batch_size=3, grad_accumulation=2)
    assert all(torch.equal(resumed["model"][name], whole["model"][name]) for name in whole["model"])


def test_run_may_resume_with_another_micro_batch_size(tmp_path: Path) -> None:
    trained(tmp_path / "run", steps=6, micro_batch_size=3)
    resumed = trained(tmp_path / "run", micro_batch_size=1)
    whole = trained(tmp_path / "whole")
    for name, weights in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], weights, rtol=1e-4, atol=1e-6)


def needed(batch_size: int, **values: Any) -> int:
    probe = Probe(Toy(width=64), config(batch_size=batch_size), device="cpu", precision="fp32")
    return probe.estimate(**values).total


@pytest.mark.parametrize(("size", "next_larger"), [(64, None), (32, 64), (22, 32), (10, 11)])
def test_auto_takes_the_most_that_fits(size: int, next_larger: int | None) -> None:
    available = needed(64, micro_batch_size=size)
    memory_fit = estimate_fit(Toy(width=64), config(batch_size=64, micro_batch_size="auto"), CPU, available)
    assert (memory_fit.micro_batch_size, memory_fit.needs) == (size, available)
    assert memory_fit.fits(available) and not memory_fit.fits(available - 1)
    if next_larger:
        assert needed(64, micro_batch_size=next_larger) > available
        assert f"a batch of 64 needs {format_bytes(needed(64))} of {format_bytes(available)}" in memory_fit.reason


def test_auto_cuts_nothing_where_the_memory_is_ample() -> None:
    memory_fit = estimate_fit(Toy(), config(micro_batch_size="auto"), CPU, 1e12)
    assert memory_fit.micro_batch_size == 8 and "the whole batch needs" in memory_fit.reason


def test_one_sample_that_does_not_fit_is_reported() -> None:
    memory_fit = estimate_fit(Toy(width=64), config(micro_batch_size="auto"), CPU, 1000)
    assert memory_fit.micro_batch_size == 1 and not memory_fit.fits(1000)


def test_auto_is_decided_before_a_run_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainer"):
        whole = trained(tmp_path / "auto", Toy(), micro_batch_size="auto")
    assert [r.message for r in caplog.records if r.message.startswith("micro-batches: 8: the whole batch needs")]
    assert whole["config"]["micro_batch_size"] == 8


def test_run_that_can_not_fit_is_a_user_error_before_the_model_is_built(tmp_path: Path) -> None:
    """4 TB of parameters."""
    with pytest.raises(UserError, match=r"one sample at a time needs .* GB and the device has .* GB: use") as error:
        train(Toy(width=1_000_000), config(micro_batch_size="auto"), run_dir=tmp_path)
    assert "\n" not in str(error.value)


class Reading(Toy):
    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        assert all(value.item() > 0 for value in sums.values())
        return sums


def test_model_without_an_estimate_is_not_cut() -> None:
    memory_fit = estimate_fit(Reading(), config(micro_batch_size="auto"), CPU, 1000)
    assert (memory_fit.micro_batch_size, memory_fit.needs) == (8, None) and memory_fit.fits(1000)
    assert memory_fit.reason.startswith("no estimate, so batches are not split (the model reads the values")


def test_micro_batches_need_less_memory() -> None:
    assert needed(64) > 1.5 * needed(64, micro_batch_size=16)
    probe = Probe(Toy(width=64), config(batch_size=64), device="cpu", precision="fp32")
    cut = probe.estimate(micro_batch_size=16)
    assert (cut.batch_size, cut.num_slots) == (64, 16 * 39)


def test_estimate_of_micro_batches_is_within_rounding_of_the_counted_bytes() -> None:
    estimated, counted = (
        Probe(Toy(width=64), config(batch_size=32, micro_batch_size=10), device="cpu", precision="fp32", contents=real)
        .estimate()
        .total
        for real in (False, True)
    )
    assert estimated == pytest.approx(counted, rel=0.002)


@pytest.mark.parametrize("size", [0, -1, "all"])
def test_unknown_micro_batch_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        config(micro_batch_size=size)


class Normalized(Toy):
    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.norm = nn.BatchNorm1d(4)
        return model


@pytest.mark.parametrize("micro_batch_size", [8, 4])
def test_batch_norm_is_warned_of_in_micro_batches_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, micro_batch_size: int
) -> None:
    train(Normalized(), config(micro_batch_size=micro_batch_size, steps=1), run_dir=tmp_path)
    assert ("norm is a BatchNorm1d" in caplog.text) == (micro_batch_size == 4)
