import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toy import Sequences, Toy
from trainer import TrainConfig, UserError, train
from trainer.data.batching import BatchOrder
from trainer.data.loader import DamageCount, fixed_batches, train_batches
from trainer.laws import check_workload
from trainer.metrics import compute_means

CPU = torch.device("cpu")


def test_toy_keeps_the_three_laws() -> None:
    check_workload(Toy())


def test_damaged_sample_is_skipped_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    workload = Toy(damaged=(5,))
    data = workload.train_data()
    order = BatchOrder(data.lengths, 8)
    with caplog.at_level(logging.WARNING):
        batches = list(islice(train_batches(workload, data, order, start=(0, 0), num_workers=0, device=CPU), 2 * 32))
    assert [batch.num_samples for batch in batches].count(7) == 2
    assert [record.message for record in caplog.records] == ["skipped: sample-5: tokens.npy is missing"]


def test_more_than_one_percent_damaged_stops_with_their_count() -> None:
    workload = Toy(damaged=(1, 2, 3))
    data = workload.train_data()
    order = BatchOrder(data.lengths, 8)
    batches = train_batches(workload, data, order, start=(0, 0), num_workers=0, device=CPU)
    with pytest.raises(UserError, match=r"3 of \d+ samples read are missing or damaged .*tokens.npy is missing"):
        list(islice(batches, 32))


def test_certain_share_of_damage_stops_a_large_set_early() -> None:
    count = DamageCount(5_000_000)
    with pytest.raises(UserError, match=r"\d+ of \d{2,3} samples read"):
        for start in range(0, 5000, 8):
            count.add(8, [f"sample-{start}"])


@pytest.mark.parametrize(("share", "stops"), [(0.008, False), (0.02, True)])
def test_trial_over_a_part_of_a_large_set_keeps_the_one_percent(share: float, stops: bool) -> None:
    count, random = DamageCount(5_000_000), np.random.default_rng(0)
    try:
        for step in range(2000):
            count.add(8, [f"sample-{step}-{row}" for row in np.flatnonzero(random.random(8) < share)])
    except UserError:
        assert stops and count.num_reads < 16_000
    else:
        assert not stops


def test_less_than_one_percent_damaged_continues() -> None:
    count = DamageCount(1000)
    for start in range(0, 1000, 100):
        count.add(100, [f"sample-{start}"])
    assert len(count.seen) == 10


def test_damaged_validation_sample_is_skipped_too() -> None:
    workload = Toy(num_train=256, damaged=(0,))
    batches = fixed_batches(workload, workload.train_data(), [torch.arange(128).numpy()])
    assert [batch.num_samples for batch in batches] == [127]


class FewLengths(Toy):
    """Of 256 samples only ten would ever be chosen."""

    def train_data(self) -> Sequences:
        data = super().train_data()
        return TenLengths(len(data.samples), 1)


class TenLengths(Sequences):
    def __init__(self, num_samples: int, seed: int) -> None:
        super().__init__(num_samples, seed)
        self.lengths = self.lengths[:10]

    def __len__(self) -> int:
        return len(self.samples)


def test_wrong_number_of_lengths_ends_a_run_before_it_reads(tmp_path: Path) -> None:
    data = FewLengths().train_data()
    order = BatchOrder(data.lengths, 4)
    both = "TenLengths has 256 samples, and its lengths are 10"
    with pytest.raises(UserError, match=both):
        train_batches(FewLengths(), data, order, start=(0, 0), num_workers=0, device=CPU)
    with pytest.raises(UserError, match=both):
        fixed_batches(FewLengths(), data, [])
    with pytest.raises(UserError, match=both):
        train(FewLengths(), TrainConfig(steps=2, batch_size=4), run_dir=tmp_path)


class Weighted(Toy):
    weights: dict[str, float]

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return self.weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "Weighted.loss_weights is empty: name the losses"),
        ({"mel_loss": 1.0}, "Weighted.loss_weights names mel_loss, and its batches count token_loss: correct"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loss_weights_that_fit_no_batch_end_a_run_with_one_line(
    tmp_path: Path, weights: dict[str, float], message: str, num_workers: int
) -> None:
    workload = Weighted(weights=weights)
    with pytest.raises(UserError, match=message):
        train(workload, TrainConfig(steps=2, batch_size=4), run_dir=tmp_path)
    data = workload.train_data()
    order = BatchOrder(data.lengths, 4)
    batches = train_batches(workload, data, order, start=(0, 0), num_workers=num_workers, device=CPU)
    with pytest.raises(UserError, match=message) as found:
        next(batches)
    assert "\n" not in str(found.value)


def test_weighted_sum_is_the_loss_even_if_a_part_has_its_name() -> None:
    assert compute_means({"loss": 2.0, "aux": 20.0}, {"loss": 2, "aux": 2}, {"loss": 1.0, "aux": 0.5})["loss"] == 6.0
