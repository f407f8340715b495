"""From sample indices to batches on the device: workers, pinning, and damaged samples."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from trainer.data.batching import BatchOrder, deal
from trainer.errors import DamagedSample, UserError
from trainer.ranks import ALONE, Ranks, num_local_ranks
from trainer.workload import Batch, Dataset, Workload

log = logging.getLogger(__name__)

MAX_DAMAGED = 0.01
# In standard deviations. A count of damaged samples so far above MAX_DAMAGED of the samples read is no chance: the run
# stops without reading millions first.
CERTAIN = 5.0


class BatchReader(torch.utils.data.Dataset[Batch]):
    """Reads and collates the samples of one batch; a damaged one is left out and named in the batch."""

    def __init__(self, workload: Workload, data: Dataset, pad_multiple: int = 1) -> None:
        check_lengths(data)
        self.workload, self.data, self.pad_multiple = workload, data, pad_multiple

    def __getitem__(self, indices: np.ndarray) -> Batch:
        samples, damaged = [], []
        for index in indices:
            try:
                samples.append(self.data[int(index)])
            except DamagedSample as error:
                damaged.append(str(error))
        if not samples:
            return Batch({}, {}, 0, 0, 0, tuple(damaged))
        batch = self.workload.collate(samples, self.pad_multiple)
        return Batch(**{**vars(batch), "damaged": tuple(damaged)})


def check_lengths(data: Dataset) -> None:
    """Check that a dataset has one length per sample. With fewer, some samples would never be drawn; with more, some
    indices would have no sample.

    Raises:
        UserError: The numbers differ, or the lengths are no array.
    """
    lengths = getattr(data, "lengths", None)
    if not isinstance(lengths, np.ndarray):
        raise UserError(
            f"{type(data).__name__}.lengths is {'missing' if lengths is None else f'a {type(lengths).__name__}'}: give "
            "a numpy array with the number of tokens of each sample."
        )
    if len(data.lengths) != len(data):
        raise UserError(
            f"{type(data).__name__} has {len(data)} samples, and its lengths are {len(data.lengths)}: "
            "give the length of each sample."
        )


def check_losses(workload: Workload, batch: Batch) -> None:
    """Check a workload's loss weights against the counts of a batch.

    Raises:
        UserError: It is no Batch, there is no weight, or a weight of a loss that the batch does not count.
    """
    if not isinstance(batch, Batch):
        raise UserError(f"{type(workload).__name__}.collate returns a {type(batch).__name__}: return a trainer.Batch.")
    name, weights = type(workload).__name__, workload.loss_weights
    if not weights:
        raise UserError(f"{name}.loss_weights is empty: name the losses to minimize, and their weights.")
    if unknown := sorted(weights.keys() - batch.counts.keys()):
        raise UserError(
            f"{name}.loss_weights names {', '.join(unknown)}, and its batches count {', '.join(sorted(batch.counts))}: "
            "correct loss_weights, or Batch.counts in collate."
        )


class DamageCount:
    """Logs each damaged sample once, and stops the run if they are more than 1% of the data."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.num_reads = num_samples, 0
        self.seen: set[str] = set()

    def add(self, num_reads: int, damaged: Sequence[str]) -> None:
        self.num_reads += num_reads
        for message in damaged:
            if message not in self.seen:
                self.seen.add(message)
                log.warning("skipped: %s", message)
        expected = MAX_DAMAGED * min(self.num_samples, self.num_reads)
        chance = CERTAIN * (1 + math.sqrt(expected))
        if len(self.seen) > min(MAX_DAMAGED * self.num_samples, expected + chance):
            raise UserError(
                f"{len(self.seen)} of {min(self.num_reads, self.num_samples)} samples read are missing or damaged "
                f"(the data has {self.num_samples}; at most 1% may be): repair the data, or leave them out of "
                f"the manifest. The last one: {damaged[-1]}"
            )


class _EndlessOrder(Sampler[np.ndarray]):
    def __init__(self, order: BatchOrder, start: tuple[int, int], num_micro_batches: int, ranks: Ranks) -> None:
        self.order, self.start, self.num_micro_batches = order, start, num_micro_batches
        self.rank, self.num_ranks = ranks.number, ranks.count

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self.order.from_position(*self.start):
            indices = deal(batch, self.order.lengths[batch], self.rank, self.num_ranks)
            yield from split_batch(indices, self.order.lengths[indices], self.num_micro_batches)


def split_batch(indices: np.ndarray, lengths: np.ndarray, number: int) -> list[np.ndarray]:
    """Split a batch into `number` parts that differ by at most one sample, each of similar length.

    The longest come first: in the first forward pass there are no gradients yet, which leaves it more memory.
    """
    if number == 1:
        return [indices]
    return np.array_split(indices[np.argsort(-lengths, kind="stable")], number)


def train_batches(
    workload: Workload,
    data: Dataset,
    order: BatchOrder,
    *,
    start: tuple[int, int],
    num_workers: int,
    device: torch.device,
    pin_memory: bool = False,
    pad_multiple: int = 1,
    num_micro_batches: int = 1,
    ranks: Ranks = ALONE,
) -> Iterator[Batch]:
    """Batches without end from `start` = (epoch, position) on; the same ones whatever `num_workers`.

    Args:
        num_micro_batches: Each batch is yielded as this number of micro-batches, one after the other.
        ranks: Each of them gets its own part of each batch.

    Raises:
        UserError: At once, if the data has not one length per sample. With the first batch, if `loss_weights` does
            not fit it. With any batch, if more than 1% of the samples are damaged.
    """
    loader = DataLoader(
        BatchReader(workload, data, pad_multiple),
        sampler=_EndlessOrder(order, start, num_micro_batches, ranks),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator: the loader must not draw from the random state that a checkpoint restores.
        generator=torch.Generator(),
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_reset_signals,
    )
    return _check_batches(workload, loader, DamageCount(len(data)), device)


def _check_batches(
    workload: Workload, loader: Iterable[Batch], damage: DamageCount, device: torch.device
) -> Iterator[Batch]:
    unchecked = True
    for batch in loader:
        damage.add(batch.num_samples + len(batch.damaged), batch.damaged)
        # The first batch represents all. Checked here, because an exception in a worker would carry its traceback.
        if unchecked and batch.num_samples:
            check_losses(workload, batch)
            unchecked = False
        yield batch.to(device)


def _reset_signals(_: int) -> None:
    """A worker inherits its parent's handlers. Only the parent handles Ctrl-C, and then ends its workers.

    torchrun sends its signals to the whole process group, and the parent's last step needs its workers.
    """
    if num_local_ranks() > 1:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fixed_batches(
    workload: Workload, data: Dataset, batches: Sequence[np.ndarray], *, ranks: Ranks = ALONE
) -> list[Batch]:
    """Read the batches of the validation set into host memory, once for all evaluations. Each rank has its share."""
    reader = BatchReader(workload, data)
    damage = DamageCount(sum(map(len, batches)))
    fixed: list[Batch] = []
    for indices in batches[ranks.number :: ranks.count]:
        batch = reader[indices]
        damage.add(len(indices), batch.damaged)
        if batch.num_samples:
            if not fixed:
                check_losses(workload, batch)
            fixed.append(replace(batch, part=workload.val_part(int(indices[0]))))
    return fixed
