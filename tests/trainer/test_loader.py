import logging
from itertools import islice

import numpy as np
import pytest
import torch

from tests.toy import Toy
from trainer import UserError
from trainer.batching import BatchOrder
from trainer.laws import check_workload
from trainer.loader import DamageCount, fixed_batches, train_batches
from trainer.metrics import means

CPU = torch.device("cpu")


def test_the_toy_keeps_the_three_laws() -> None:
    check_workload(Toy())


def test_a_damaged_sample_is_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_share_that_is_certain_stops_a_large_set_early() -> None:
    count = DamageCount(5_000_000)
    with pytest.raises(UserError, match=r"\d+ of \d{2,3} samples read"):
        for start in range(0, 5000, 8):
            count.add(8, [f"sample-{start}"])


@pytest.mark.parametrize(("share", "stops"), [(0.008, False), (0.02, True)])
def test_a_trial_over_a_part_of_a_large_set_keeps_the_one_percent(share: float, stops: bool) -> None:
    count, random = DamageCount(5_000_000), np.random.default_rng(0)
    try:
        for step in range(2000):
            count.add(8, [f"sample-{step}-{row}" for row in np.flatnonzero(random.random(8) < share)])
    except UserError:
        assert stops and count.num_reads < 16_000
    else:
        assert not stops


def test_less_than_one_percent_goes_on() -> None:
    count = DamageCount(1000)
    for start in range(0, 1000, 100):
        count.add(100, [f"sample-{start}"])
    assert len(count.seen) == 10


def test_a_damaged_validation_sample_is_skipped_too() -> None:
    workload = Toy(num_train=256, damaged=(0,))
    batches = fixed_batches(workload, workload.train_data(), [torch.arange(128).numpy()])
    assert [batch.num_samples for batch in batches] == [127]


def test_the_weighted_sum_is_the_loss_even_where_a_part_bears_its_name() -> None:
    assert means({"loss": 2.0, "aux": 20.0}, {"loss": 2, "aux": 2}, {"loss": 1.0, "aux": 0.5})["loss"] == 6.0
