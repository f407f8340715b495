"""Snapshots of a GPU's tensors in page-locked host memory, which is kept from one to the next.

A copy into it runs at the bus's full rate, about 25 GB/s. Into new pageable memory it takes five times as long, for the
driver copies twice and each page is touched for the first time. Not run on a GPU yet.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64


def lock_pages(address: int, size: int) -> bool:
    """Page-lock host memory; returns whether CUDA did so. Without it copies are slower, and equal."""
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:  # type: ignore[no-untyped-call]
        return True
    # CUDA keeps the error, and PyTorch would raise it at its next kernel, in the middle of a step. Raising clears it.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


def unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class HostBuffer:
    """Memory for one snapshot at a time.

    Args:
        kind: Type of the device whose tensors are copied into it. Others are the caller's.
        lock, unlock: In place of CUDA's, for tests.
    """

    def __init__(
        self,
        kind: str = "cuda",
        *,
        lock: Callable[[int, int], bool] = lock_pages,
        unlock: Callable[[int], None] = unlock_pages,
    ) -> None:
        self._kind, self._lock, self._unlock = kind, lock, unlock
        self._memory: mmap.mmap | None = None
        self._locked: int | None = None
        """Address of page-locked memory."""
        self._used = 0

    @property
    def size(self) -> int:
        """Bytes of host memory that it keeps."""
        return 0 if self._memory is None else len(self._memory)

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that a snapshot of these tensors takes in it."""
        sizes = (tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == self._kind)
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)

    def begin(self, size: int) -> None:
        """Make room for a snapshot of `size` bytes; the one before must no longer be in use."""
        self._used = 0
        if size > self.size:
            self.close()
            self._memory = mmap.mmap(-1, size)
            address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            self._locked = address if self._lock(address, size) else None

    def copy(self, tensor: Tensor) -> Tensor | None:
        """A copy of a tensor, valid from `wait` until the next `begin`. None if it is of
        another device, or there is no room."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        if tensor.device.type != self._kind or not tensor.numel() or self._memory is None or end > self.size:
            return None
        self._used = end
        # A storage of its own for each tensor, as `torch.save` writes storages whole.
        flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return flat.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Wait until the device has finished the copies."""
        if self._kind == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Give the memory back; what was copied into it must no longer be in use."""
        if self._locked is not None:
            self._unlock(self._locked)
        self._memory = self._locked = None
