"""From sample indices to batches on the device: workers, pinning, and what to do with damaged samples."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from trainer.batching import BatchOrder
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
    damage = DamageCount(len(data))
    for batch in loader:
        damage.add(batch.num_samples + len(batch.damaged), batch.damaged)
        yield batch.to(device)


def _leave_signals(_: int) -> None:
    """A worker inherits the handlers of its parent, which alone answers Ctrl-C and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fixed_batches(workload: Workload, data: Dataset, batches: Sequence[np.ndarray]) -> list[Batch]:
    """The batches of the validation set in host memory: read once, used at every evaluation."""
    reader = BatchReader(workload, data)
    damage = DamageCount(sum(map(len, batches)))
    kept = []
    for indices in batches:
        batch = reader[indices]
        damage.add(len(indices), batch.damaged)
        if batch.num_samples:
            kept.append(batch)
    return kept
