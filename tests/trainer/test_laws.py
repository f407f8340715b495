"""Workloads that break a law, and the errors that name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from tests.toy import Sequences, Toy
from trainer import Batch
from trainer.laws import check_workload


def make_sequences(num_samples: int = 64) -> Sequences:
    """Other samples at every call, as an unseeded split has them."""
    return Sequences(num_samples, int(np.random.default_rng().integers(2**31)))


class DrawnAnew(Toy):
    def train_data(self) -> Sequences:
        return make_sequences()


class DrawnOnce(Toy):
    """Its split is kept within the process, and the next process has another one."""

    @cached_property
    def _train(self) -> Sequences:
        return make_sequences()


class ValidationDrawnAnew(Toy):
    def val_data(self) -> Sequences:
        return make_sequences()


class ValidationDrawnOnce(Toy):
    @cached_property
    def _val(self) -> Sequences:
        return make_sequences()

    def val_data(self) -> Sequences:
        return self._val


class Relabelled(Sequences):
    """Of the same lengths each time, with other contents."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples, 1)
        shift = int(np.random.default_rng().integers(1, 2**31))
        self.samples = [(sample + shift + index) % 17 for index, sample in enumerate(self.samples)]


class ContentsDrawnAnew(Toy):
    def train_data(self) -> Sequences:
        return Relabelled(64)


class Sized(Sequences):
    def __len__(self) -> int:
        return len(self.samples)


class TooFewLengths(Toy):
    def train_data(self) -> Sequences:
        data = Sized(64, 1)
        data.lengths = data.lengths[:10]
        return data


class TooFewValidationLengths(Toy):
    def val_data(self) -> Sequences:
        data = Sized(64, 1)
        data.lengths = data.lengths[:10]
        return data


class LengthsInAnotherOrder(Toy):
    def train_data(self) -> Sequences:
        data = Sequences(64, 1)
        data.lengths = data.lengths[::-1].copy()
        return data


class Uncounted(Toy):
    def collate(self, samples: Sequence[Any], pad_multiple: int = 1) -> Batch:
        return replace(super().collate(samples, pad_multiple), num_samples=1)


class UnknownLoss(Toy):
    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"token_loss": 1.0, "mel_loss": 0.5}


class NoLoss(Toy):
    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {}


class UncountedLoss(Toy):
    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        return {**sums, "accuracy": sums["token_loss"]}


class NoValidation(Toy):
    def val_data(self) -> Sequences:
        return Sequences(0, 2)


class Neighbourly(Toy):
    """Each loss depends on how many samples are in the batch."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * len(inputs["tokens"]) for name, value in super().loss_sums(model, inputs).items()}


class Reseeded(Sequences):
    """Its samples depend on what was read before."""

    num_reads = 0

    def __getitem__(self, index: int, /) -> np.ndarray:
        self.num_reads += 1
        return (super().__getitem__(index) + self.num_reads) % 17


class ReadInOrder(Toy):
    def train_data(self) -> Sequences:
        return Reseeded(64, 1)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (DrawnAnew(), r"law 3: train_data\(\) has other samples when it is called again: .*fixed seed"),
        (DrawnOnce(), r"law 3: train_data\(\) has other samples in a workload built anew"),
        (ContentsDrawnAnew(), r"law 3: train_data\(\) has other samples when it is called again"),
        (ValidationDrawnAnew(), r"law 2: val_data\(\) has other samples when it is called again"),
        (ValidationDrawnOnce(), r"law 2: val_data\(\) has other samples in a workload built anew"),
        (TooFewLengths(), r"train_data\(\) has 64 samples, and its lengths are 10"),
        (TooFewValidationLengths(), r"val_data\(\) has 64 samples, and its lengths are 10"),
        (LengthsInAnotherOrder(), r"by its lengths sample \d+ has \d+ tokens .* they take \d+ and \d+ slots"),
        (Uncounted(), r"law 1: 8 samples make a batch whose num_samples is 1"),
        (UnknownLoss(), r"loss_weights names \['mel_loss'\], and loss_sums returns \['token_loss'\]"),
        (NoLoss(), "loss_weights is empty"),
        (UncountedLoss(), r"different losses: \['accuracy'\]"),
        (Toy(num_train=0), r"train_data\(\) has no samples"),
        (NoValidation(), r"val_data\(\) has no samples"),
        (Neighbourly(), r"law 1: token_loss of 8 samples is"),
        (ReadInOrder(), r"law 3: batch \d differs between 0 and 2 loader workers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Toy) else "",
)
def test_broken_law_is_named(workload: Toy, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_workload(workload)


@pytest.mark.parametrize("num_train", [1, 2, 3, 9])
def test_small_set_keeps_the_laws(num_train: int) -> None:
    check_workload(Toy(num_train=num_train))


def test_samples_of_one_length_keep_the_laws() -> None:
    class OneLength(Toy):
        def train_data(self) -> Sequences:
            data = Sequences(64, 1)
            data.lengths = np.ones_like(data.lengths)
            return data

    check_workload(OneLength())
