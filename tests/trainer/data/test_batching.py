from itertools import islice

import numpy as np
import pytest

from trainer import UserError
from trainer.data.batching import BatchOrder, validation_batches

LOG_NORMAL = np.random.default_rng(0).lognormal(4.6, 0.55, 4000).astype(int) + 40


def padding(lengths: np.ndarray, batches: np.ndarray) -> float:
    longest = lengths[batches].max(axis=1).sum() * batches.shape[1]
    return 1 - lengths[batches].sum() / longest


def test_epoch_holds_each_sample_at_most_once_and_nearly_all() -> None:
    order = BatchOrder(LOG_NORMAL, 7, group=3, seed=1)
    epoch = order.epoch(0)
    assert epoch.shape == (4000 // 21 * 3, 7)
    assert len(np.unique(epoch)) == epoch.size


def test_padding_is_below_five_percent_and_above_a_quarter_without_buckets() -> None:
    assert padding(LOG_NORMAL, BatchOrder(LOG_NORMAL, 8).epoch(0)) < 0.05
    assert padding(LOG_NORMAL, BatchOrder(LOG_NORMAL, 8, bucket_samples=1).epoch(0)) > 0.25


@pytest.mark.parametrize("num_samples", [64, 700, 4000])
def test_epochs_differ(num_samples: int) -> None:
    order = BatchOrder(LOG_NORMAL[:num_samples], 8)
    sets = [{frozenset(batch.tolist()) for batch in order.epoch(epoch)} for epoch in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert len(sets[one] & sets[other]) <= 0.5 * len(sets[0])


def test_order_is_a_function_of_seed_epoch_and_position() -> None:
    order = BatchOrder(LOG_NORMAL[:100], 8, seed=3)
    whole = list(islice(order.from_position(0, 0), 30))
    later = list(islice(BatchOrder(LOG_NORMAL[:100], 8, seed=3).from_position(1, 5), 30 - 17))
    assert order.batches_per_epoch == 12
    assert all(np.array_equal(a, b) for a, b in zip(whole[17:], later, strict=True))
    assert not np.array_equal(order.epoch(0), BatchOrder(LOG_NORMAL[:100], 8, seed=4).epoch(0))


def test_too_few_samples_for_one_step_name_the_remedy() -> None:
    with pytest.raises(UserError, match=r"10 training samples do not fill one step of 16 .*smaller"):
        BatchOrder(LOG_NORMAL[:10], 8, group=2)


def test_validation_set_is_drawn_once_by_its_seed() -> None:
    chosen = np.concatenate(validation_batches(LOG_NORMAL, 100, seed=5))
    again = np.concatenate(validation_batches(LOG_NORMAL, 100, seed=5, batch_size=3))
    assert len(chosen) == 100 and np.array_equal(chosen, again)
    assert set(chosen) != set(np.concatenate(validation_batches(LOG_NORMAL, 100, seed=6)))


def test_parts_of_the_validation_set_are_in_batches_of_their_own() -> None:
    batches = validation_batches(LOG_NORMAL, 100, seed=5, part_of=lambda index: "ko" if index % 3 else "en")
    assert all(len(set(batch % 3 > 0)) == 1 for batch in batches)
    assert set(np.concatenate(batches)) == set(np.concatenate(validation_batches(LOG_NORMAL, 100, seed=5)))


def test_empty_validation_split_is_an_error() -> None:
    with pytest.raises(UserError, match="no samples"):
        validation_batches(np.array([]), 10, seed=0)
