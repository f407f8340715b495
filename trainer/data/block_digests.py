"""Checksums of a packed store, block by block: each block is checked when it is first read.

    digests.bin    uint32: the CRC-32 of header.json, then of each block of places.bin, field-0.bin, and so on, and
                   last that of all of these

Stores of earlier versions have none, and are read unchecked.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.data.packed_store import HEADER, PLACES, Header, field_path, map_field, map_places
from trainer.errors import UserError

log = logging.getLogger(__name__)

DIGESTS = "digests.bin"
BLOCK = 1 << 17
"""Bytes. As many as the kernel reads ahead in a mapped file, so that checking a block costs hardly more reading."""
_WHOLE, _DAMAGED = 1, 2


class DamagedStore(UserError):
    """The checksums of a store are damaged, or its header is."""


def write_digests(folder: Path, header: Header) -> None:
    """Write the checksums of a complete store.

    Raises:
        OSError: It can't be read or written to.
    """
    arrays = [map_places(folder, header), *(map_field(folder, n, field) for n, field in enumerate(header.fields))]
    sums = [zlib.crc32((folder / HEADER).read_bytes()), *(zlib.crc32(b) for a in arrays for b in _blocks(a))]
    content = np.array(sums, "<u4").tobytes()
    temporary = folder / f"{DIGESTS}.tmp"
    with open(temporary, "wb") as file:
        file.write(content + zlib.crc32(content).to_bytes(4, "little"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / DIGESTS)


class BlockDigests:
    """The checksums of a store, and which of its blocks are whole. Each process checks each block once.

    Args:
        arrays: The mapped files: places.bin, field-0.bin, and so on.

    Raises:
        DamagedStore: The checksums or the header are damaged.
    """

    def __init__(self, folder: Path, arrays: Sequence[np.ndarray]) -> None:
        self._folder = folder
        self._views = [_view(array) for array in arrays]
        counts = [-(-len(view) // BLOCK) for view in self._views]
        self._starts = np.cumsum([0, *counts]).tolist()
        content = (folder / DIGESTS).read_bytes()
        sums = np.frombuffer(content[: len(content) // 4 * 4], "<u4")
        if len(sums) != self._starts[-1] + 2 or zlib.crc32(content[:-4]) != sums[-1]:
            raise DamagedStore(f"the checksums of {folder} are damaged: start again to pack it again.")
        if zlib.crc32((folder / HEADER).read_bytes()) != sums[0]:
            raise DamagedStore(f"the header of {folder} is damaged: start again to pack it again.")
        self._sums = sums[1:-1]
        self._marks = bytearray(len(self._sums))
        self.num_left = len(self._sums)
        """Blocks that are not known to be whole."""

    @classmethod
    def of(cls, folder: Path, arrays: Sequence[np.ndarray]) -> BlockDigests | None:
        """Those of a store; None for one of an earlier version, which has none."""
        return cls(folder, arrays) if (folder / DIGESTS).exists() else None

    def is_whole(self, number: int, start: int, end: int) -> bool:
        """Whether the bytes from `start` to `end` are those that were packed; `number` is that of the file's array."""
        whole = True
        for block in range(start // BLOCK, -(-end // BLOCK)):
            mark = self._marks[self._starts[number] + block] or self._check(number, block)
            whole &= mark == _WHOLE
        return whole

    def _check(self, number: int, block: int) -> int:
        index, start = self._starts[number] + block, block * BLOCK
        mark = _WHOLE
        self.num_left -= 1
        if zlib.crc32(self._views[number][start : start + BLOCK]) != self._sums[index]:
            mark = _DAMAGED
            self.num_left += 1
            path = field_path(self._folder, number - 1) if number else self._folder / PLACES
            log.warning(
                "%s is damaged at byte %s or after it: these samples are read from their files", path, f"{start:,}"
            )
        self._marks[index] = mark
        return mark


def _view(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    view = _view(array)
    for start in range(0, len(view), BLOCK):
        yield view[start : start + BLOCK]
