"""From sample indices to batches on the device: workers, pinning, and what to do with damaged samples."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from trainer.data.batching import BatchOrder
from trainer.errors import DamagedSample, UserError
from trainer.workload import Batch, Dataset, Workload

log = logging.getLogger(__name__)

MAX_DAMAGED = 0.01
# Standard deviations above MAX_DAMAGED of the samples read so far: more than that is no chance, and there is no need
# to read millions before saying so.
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
    """Hold a dataset's lengths against it: with fewer, some samples would never be drawn; with more, none is there.

    Raises:
        UserError: They are not as many as its samples.
    """
    if len(data.lengths) != len(data):
        raise UserError(
            f"{type(data).__name__} has {len(data)} samples, and its lengths are {len(data.lengths)}: "
            "give the length of each sample."
        )


def check_losses(workload: Workload, batch: Batch) -> None:
    """Hold a workload's loss weights against what a batch counts.

    Raises:
        UserError: There is no weight, or one of a loss that the batch does not count.
    """
    name, weights = type(workload).__name__, workload.loss_weights
    if not weights:
        raise UserError(f"{name}.loss_weights is empty: name the losses that are to be minimized, and their weights.")
    if unknown := sorted(weights.keys() - batch.counts.keys()):
        raise UserError(
            f"{name}.loss_weights names {', '.join(unknown)}, and its batches count {', '.join(sorted(batch.counts))}: "
            "correct loss_weights, or Batch.counts in collate."
        )


class DamageCount:
    """Names each damaged sample once, and stops the run when they are more than 1% of the data."""

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
    def __init__(self, order: BatchOrder, start: tuple[int, int], num_micro_batches: int) -> None:
        self.order, self.start, self.num_micro_batches = order, start, num_micro_batches

    def __iter__(self) -> Iterator[np.ndarray]:
        for indices in self.order.from_position(*self.start):
            yield from micro_batches(indices, self.order.lengths[indices], self.num_micro_batches)


def micro_batches(indices: np.ndarray, lengths: np.ndarray, number: int) -> list[np.ndarray]:
    """Cut a batch into `number` parts that differ by one sample at most, each of like length.

    The longest come first: gradients, which the first forward pass need not share the memory with, are there later.
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
) -> Iterator[Batch]:
    """Batches without end from `start` = (epoch, position) on; the same ones whatever `num_workers`.

    Args:
        num_micro_batches: Each batch comes as so many in a row, which hold its samples.

    Raises:
        UserError: At once where the data's lengths are not as many as its samples. With the first batch, where
            `loss_weights` does not fit it; with any, where more than 1% of the samples are damaged.
    """
    loader = DataLoader(
        BatchReader(workload, data, pad_multiple),
        sampler=_EndlessOrder(order, start, num_micro_batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator: the loader must not draw from the random state that a checkpoint restores.
        generator=torch.Generator(),
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals,
    )
    return _checked(workload, loader, DamageCount(len(data)), device)


def _checked(workload: Workload, loader: Iterable[Batch], damage: DamageCount, device: torch.device) -> Iterator[Batch]:
    unchecked = True
    for batch in loader:
        damage.add(batch.num_samples + len(batch.damaged), batch.damaged)
        # The first batch stands for all. Here and not where it is read: a worker's exception comes with its traceback.
        if unchecked and batch.num_samples:
            check_losses(workload, batch)
            unchecked = False
        yield batch.to(device)


def _leave_signals(_: int) -> None:
    """A worker inherits the handlers of its parent, which alone answers Ctrl-C and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fixed_batches(workload: Workload, data: Dataset, batches: Sequence[np.ndarray]) -> list[Batch]:
    """The batches of the validation set in host memory: read once, used at every evaluation."""
    reader = BatchReader(workload, data)
    damage = DamageCount(sum(map(len, batches)))
    kept: list[Batch] = []
    for indices in batches:
        batch = reader[indices]
        damage.add(len(indices), batch.damaged)
        if batch.num_samples:
            if not kept:
                check_losses(workload, batch)
            kept.append(batch)
    return kept
