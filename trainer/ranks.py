"""The processes of one run, one for each GPU, as torchrun starts them. A process alone is a run of one rank, for which
all of this does nothing.

Gradients are reduced on the device, in the backward pass. The few values that the host needs to go on (counts, whether
to stop, the clock) go over gloo, between the hosts: no rank reads its device for them. All ranks have the same values
and decide the same.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import UserError

T = TypeVar("T")
Sums = dict[str, Tensor]

PATIENCE = timedelta(days=7)
"""A rank waits for the others without end: the first may write a checkpoint, or wait for a database."""


class RankLost(UserError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. The first alone locks, writes and reports."""

    number: int = 0
    """Of this process, from 0."""
    count: int = 1
    hosts: dist.ProcessGroup | None = None
    """The group of the messages between hosts; None for a process alone."""

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def gather(self, value: T) -> list[T]:
        """The values that all ranks give here, by rank. Waits for all of them.

        Raises:
            RankLost: One of them has ended.
        """
        if self.hosts is None:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self.hosts)
        except RuntimeError as error:  # of gloo: a connection was closed
            raise RankLost(
                "another process of this run has ended, for a reason of its own; the same command continues from the "
                "last checkpoint."
            ) from error
        return values

    def sum(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """The counts of all ranks together, which have the same names."""
        if self.hosts is None:
            return counts
        gathered = self.gather(counts)
        return {name: sum(each[name] for each in gathered) for name in counts}

    def check_equal(self, what: str, value: float) -> None:
        """Check that a number is the same on all ranks.

        Raises:
            UserError: It is not. Raised on the first rank; the others end with it.
        """
        values = list(map(str, self.gather(value)))
        if self.is_first and len(set(values)) > 1:
            raise UserError(
                f"{what} differs between the processes of this run ({', '.join(values)}), so their weights do too: "
                "check the GPUs; the same command continues from the last checkpoint."
            )


ALONE = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks that torchrun has started, this process among them, until the end of the block.

    Waits until all have joined. After the block the others' next message raises `RankLost`.
    """
    store, number, count = next(rendezvous("env://"))
    # torchrun keeps its store when it restarts the processes, and in it the addresses of those that are gone.
    store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if count == num_local_ranks() and any(name == "lo" for _, name in socket.if_nameindex()):
        # Messages are pickles, and the machine's name may be that of an address which others reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield Ranks(number, count, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def num_local_ranks() -> int:
    """Number of processes that torchrun has started on this machine; 1 without it."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def take_gpu() -> None:
    """Take the GPU of this process's number among those of the machine. Without torchrun, nothing.

    Raises:
        UserError: There are more processes than GPUs.
    """
    count = num_local_ranks()
    if count > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"torchrun started {count} processes for {found} GPUs: use --nproc-per-node {found}.")
    if count > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


class ReducedLoss:
    """Forward and loss under DistributedDataParallel: after the backward pass each gradient is the mean over ranks.

    The weights of the first rank are copied to the others at once.
    """

    def __init__(self, model: nn.Module, loss_sums: Callable[[Mapping[str, Tensor]], Sums]) -> None:
        # Buffers are constants, such as frozen rows: law 1 leaves no room for statistics over a batch.
        self._shared = DistributedDataParallel(
            _Forward(model, loss_sums), forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def __call__(self, inputs: Mapping[str, Tensor], *, is_last: bool) -> Sums:
        """The sums for a batch. Gradients are reduced with the last micro-batch of a step only."""
        with nullcontext() if is_last else self._shared.no_sync():
            sums: Sums = self._shared(inputs)
        return sums


class _Forward(nn.Module):
    """What DistributedDataParallel has to see as one module, whatever parts of the model the loss calls."""

    def __init__(self, model: nn.Module, loss_sums: Callable[[Mapping[str, Tensor]], Sums]) -> None:
        super().__init__()
        self.model, self._loss_sums = model, loss_sums

    def forward(self, inputs: Mapping[str, Tensor]) -> Sums:
        return self._loss_sums(inputs)
