import logging
from itertools import islice

import pytest
import torch

from tests.toy import Toy
from trainer import UserError
from trainer.batching import BatchOrder
from trainer.laws import check_workload
from trainer.loader import DamageCount, fixed_batches, train_batches

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
    with pytest.raises(UserError, match="of 504 samples"):
        for start in range(0, 5000, 8):
            count.add(8, [f"sample-{start}"])


def test_less_than_one_percent_goes_on() -> None:
    count = DamageCount(1000)
    for start in range(0, 1000, 100):
        count.add(100, [f"sample-{start}"])
    assert len(count.seen) == 10


def test_a_damaged_validation_sample_is_skipped_too() -> None:
    workload = Toy(num_train=256, damaged=(0,))
    batches = fixed_batches(workload, workload.train_data(), [torch.arange(128).numpy()])
    assert [batch.num_samples for batch in batches] == [127]
