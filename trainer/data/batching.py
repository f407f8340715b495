"""Decides which samples form which batch: a pure function of (seed, epoch, position).

Padding costs as much as real tokens, so a batch has samples of similar length. Each epoch is shuffled and split into
pools of `bucket_samples`. A pool is sorted by length, with a random jitter of 2%, and split into batches, and the
epoch's batches are shuffled. The cost: the samples of a batch are not independent draws, but similar in length. Which
samples share a batch still changes from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from trainer.errors import UserError

# Relative to a length. In a set smaller than one pool, sorting alone would give the same batches in every epoch.
JITTER = 0.02


class BatchOrder:
    """The order of all batches of a run.

    Each epoch has `batches_per_epoch` full batches of `batch_size` indices, a multiple of `group` (gradient
    accumulation); the few samples left over differ from epoch to epoch.

    Args:
        draw: `Workload.draw_epoch`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        group: int = 1,
        bucket_samples: int = 2048,
        seed: int = 0,
        draw: Callable[[int, int], np.ndarray | None] = lambda epoch, seed: None,
    ) -> None:
        if len(lengths) < batch_size * group:
            raise UserError(
                f"{len(lengths)} training samples do not fill one step of {batch_size * group} "
                "(train.batch_size x train.grad_accumulation): use smaller ones or more data."
            )
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed, self.draw = seed, draw
        self.pool = max(batch_size, bucket_samples // batch_size * batch_size)
        self.batches_per_epoch = len(lengths) // (batch_size * group) * group

    def epoch(self, epoch: int) -> np.ndarray:
        """[batches_per_epoch, batch_size] sample indices of one epoch."""
        random = np.random.default_rng((self.seed, epoch))
        drawn = self.draw(epoch, self.seed)
        samples = random.permutation(len(self.lengths) if drawn is None else drawn)[
            : self.batches_per_epoch * self.batch_size
        ]
        # Pool by pool and in place: for millions of samples each further array would take tens of megabytes.
        for start in range(0, len(samples), self.pool):
            pool = samples[start : start + self.pool]
            jitter = random.uniform(1 - JITTER, 1 + JITTER, len(pool)).astype(np.float32)
            pool[:] = pool[np.argsort(self.lengths[pool] * jitter)]
        batches = samples.reshape(self.batches_per_epoch, self.batch_size)
        return batches[random.permutation(len(batches))]

    def from_position(self, epoch: int, position: int) -> Iterator[np.ndarray]:
        """All batches from `position` in `epoch` on, without end."""
        while True:
            yield from self.epoch(epoch)[position:]
            epoch, position = epoch + 1, 0


def deal(indices: np.ndarray, lengths: np.ndarray, rank: int, count: int) -> np.ndarray:
    """The part of a batch for one of `count` ranks: dealt by length, there and back, so that tokens are near equal."""
    if count == 1:
        return indices
    turn = np.arange(len(indices)) % (2 * count)
    mine = np.minimum(turn, 2 * count - 1 - turn) == rank
    part: np.ndarray = indices[np.argsort(-lengths, kind="stable")[mine]]
    return part


def validation_batches(
    lengths: np.ndarray,
    num_samples: int | None,
    *,
    seed: int,
    batch_size: int = 16,
    part_of: Callable[[int], str] = lambda index: "",
) -> list[np.ndarray]:
    """The fixed validation set: `num_samples` drawn once with `seed`, in batches of similar length.

    It does not depend on the training configuration, so every trial is measured on the same batches.

    Args:
        part_of: `Workload.val_part`. All samples of a batch are of one part.
    """
    if len(lengths) == 0:
        raise UserError("the validation split has no samples: name data for it in [workload].")
    chosen = np.random.default_rng(seed).permutation(len(lengths))[:num_samples]
    chosen = chosen[np.argsort(np.asarray(lengths)[chosen], kind="stable")]
    names = np.array([part_of(int(index)) for index in chosen])
    parts = [chosen[names == name] for name in np.unique(names)]
    return [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
