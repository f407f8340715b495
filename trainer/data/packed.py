"""Thousands of small files as one memory-mapped store, created on first use.

    data = open_packed(data, path, digest=..., build=MySample._make)

Reading a sample from a store opens no file and copies nothing: its arrays are read-only views of the mapped files, and
the operating system's page cache is shared by all processes. Its bytes are checked when they are first read.
`trainer.data.packing` writes the stores.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from trainer.data.block_digests import BlockDigests, DamagedStore
from trainer.data.packed_store import CannotPack, Header, map_field, map_places
from trainer.data.packing import Estimate, defer_signals, duration, estimate, pack
from trainer.errors import DamagedSample, UserError
from trainer.units import format_bytes
from trainer.workload import Dataset

log = logging.getLogger(__name__)

Mode = Literal["auto"] | bool

AUTO_BYTES = 20e9
AUTO_SHARE = 1 / 4
"""Of the free disk: checkpoints need some, too."""
NUM_COMPARED = 16


class PackedDataset:
    """The samples of `data`, read from the store at `path`. A sample that was damaged when it was packed, or since, is
    read from `data`, which returns it, or raises `DamagedSample`.

    Raises:
        UserError: The store is not that of `digest`.
        DamagedStore: Its header or its checksums are damaged.
    """

    mapped = True
    """Samples are views of mapped pages: loader workers would not read them faster."""

    def __init__(self, data: Dataset, path: Path, digest: str, build: Callable[[Iterable[Any]], Any]) -> None:
        self._data, self._path, self._digest, self._build = data, path, digest, build
        header = Header.read(path, digest, len(data))
        if header is None or header.num_done < header.num_samples:
            raise UserError(f"the packed store {path} was replaced or removed under the run; start again.")
        self.header = header
        self._fields = [map_field(path, number, field) for number, field in enumerate(header.fields)]
        self._places = map_places(path, header)
        self._digests: BlockDigests | None = BlockDigests.of(path, [self._places, *self._fields])
        self._row_bytes = [self._places.itemsize * 2 * len(self._fields), *(field.row_bytes for field in header.fields)]

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned loader worker maps the store again; pickling the arrays would copy them.
        return type(self), (self._data, self._path, self._digest, self._build)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def lengths(self) -> np.ndarray:
        return self._data.lengths

    def __getitem__(self, index: int, /) -> Any:
        if self._digests is not None and not self._is_whole(self._digests, range(len(self))[index]):
            return self._data[index]
        places = self._places[index].tolist()
        if places[0] < 0:
            return self._data[index]
        ends = places[len(self._fields) :]
        # `places` holds all starts and then all ends; `zip` stops after the last field.
        return self._build([field[start:end] for field, start, end in zip(self._fields, places, ends, strict=False)])

    def _is_whole(self, digests: BlockDigests, index: int) -> bool:
        """Whether the bytes of a sample are those that were packed."""
        if not digests.num_left:
            self._digests = None  # a random order has met all blocks long before all samples
            return True
        if not digests.is_whole(0, index * self._row_bytes[0], (index + 1) * self._row_bytes[0]):
            return False
        places = self._places[index].tolist()
        if places[0] < 0:
            return True
        ends = places[len(self._fields) :]
        return all(
            digests.is_whole(number, start * size, end * size)
            for number, (start, end, size) in enumerate(zip(places, ends, self._row_bytes[1:], strict=False), 1)
        )


def open_packed(
    data: Dataset,
    path: Path,
    *,
    digest: str,
    build: Callable[[Iterable[Any]], Any] = tuple,
    mode: Mode = "auto",
) -> Dataset:
    """Open the packed store of `data` at `path`; create it first if there is none with this digest.

    Args:
        data: Samples that are tuples of arrays, each field of one dtype and one shape but for the first dimension.
        path: The store's folder. Beside it are a lock and, while the store is written, `.partial`.
        digest: Identifies the contents of `data`, and how they are checked; a store of another one is replaced.
        build: Builds a sample from its arrays: `MySample._make` for a NamedTuple.
        mode: "auto" packs data that needs at most 20 GB and a quarter of the free disk; otherwise it logs the reason
            and returns `data`. True packs all that fits on the disk. False returns `data`.

    Raises:
        UserError: `mode` is True, and the data can't be packed.
        KeyboardInterrupt: A stop signal came; the next call continues the packing.
    """
    if mode is False:
        return data
    try:
        return _open(data, path, digest, build) or _create(data, path, digest, build, mode)
    except CannotPack as reason:
        if mode is True:
            remedy = "free some space and start again, or read the files as they are with pack = false"
            raise UserError(f"the data can't be packed: {reason}; {remedy}.") from reason
        log.info("not packed: %s; its files are read one by one", reason)
        return data


def _open(data: Dataset, path: Path, digest: str, build: Callable[[Iterable[Any]], Any]) -> PackedDataset | None:
    """Open the store; None if it is missing or incomplete, or differs from the files."""
    header = Header.read(path, digest, len(data))
    if header is None or header.num_done < header.num_samples:
        return None
    try:
        store = PackedDataset(data, path, digest, build)
    except DamagedStore:
        log.warning("%s is damaged and is packed again", path)
        return None
    except OSError as error:
        raise CannotPack(f"{path} can't be read: {error.strerror}") from error
    if not _equals(store, data):
        log.warning("%s holds other arrays than the files do: they have changed and are packed again", path)
        return None
    log.info("%s, mapped into memory: %s", path, describe_store(header))
    return store


def describe_store(header: Header) -> str:
    damaged = f", {header.num_damaged:,} of them damaged and read from their files" if header.num_damaged else ""
    return f"{header.num_samples:,} samples{damaged}, {format_bytes(header.num_bytes)}"


def _equals(store: PackedDataset, data: Dataset) -> bool:
    """Compare a few samples: the digest covers a list of files, which may have new contents under the same names."""
    for index in np.linspace(0, len(data) - 1, min(NUM_COMPARED, len(data))).astype(int).tolist():
        try:
            original = data[index]
        except DamagedSample:
            continue
        # Compared as bytes, where NaN equals itself.
        if [(a.shape, a.tobytes()) for a in original] != [(a.shape, a.tobytes()) for a in store[index]]:
            return False
    return True


def _create(data: Dataset, path: Path, digest: str, build: Callable[[Iterable[Any]], Any], mode: Mode) -> PackedDataset:
    partial = path.with_name(path.name + ".partial")
    with _lock_store(path):
        if store := _open(data, path, digest, build):
            return store
        needed = estimate(data)
        # The files of an interrupted packing are part of the needed space.
        written = sum(file.stat().st_size for file in partial.glob("*"))
        free = shutil.disk_usage(path.parent).free + written
        try:
            ceiling = _choose_ceiling(needed, free, path.parent, mode)
            interrupted = Header.read(partial, digest, len(data))
            left = len(data) - (interrupted.num_done if interrupted else 0)
            time_left = duration(needed.seconds * left / len(data))
            space = describe_needs(needed)
            log.info("packing into %s: %s, of %s free, and about %s", path, space, format_bytes(free), time_left)
            started = time.perf_counter()
            header = pack(data, partial, digest, needed.fields, ceiling=ceiling)
        except CannotPack:
            # With "auto", an unfinished store must not fill the disk; with True, the next start continues it.
            if mode == "auto":
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _replace(partial, path)
    seconds = time.perf_counter() - started
    log.info("packed in %.1fs (%.0f samples/s): %s", seconds, left / seconds, describe_store(header))
    return PackedDataset(data, path, digest, build)


def describe_needs(needed: Estimate) -> str:
    return f"it needs about {format_bytes(needed.num_bytes)} of disk ({needed.details})"


def _choose_ceiling(needed: Estimate, free: float, folder: Path, mode: Mode) -> float:
    """Returns the limit on the store's bytes. Raises `CannotPack` if it needs too much."""
    if mode is True:
        if needed.num_bytes > free:
            raise CannotPack(f"{describe_needs(needed)}, and {format_bytes(free)} are free in {folder}")
        return math.inf
    limit = min(AUTO_BYTES, AUTO_SHARE * free)
    if needed.num_bytes > limit:
        bound = format_bytes(AUTO_BYTES) if limit == AUTO_BYTES else f"a quarter of the {format_bytes(free)} free"
        raise CannotPack(f"{describe_needs(needed)}, more than {bound} (pack = true packs it anyway)")
    return 2 * limit


def _replace(partial: Path, path: Path) -> None:
    """Move the partial store to `path`. Processes that read the previous store keep its files while they are open."""
    previous = path.with_name(path.name + ".old")
    try:
        shutil.rmtree(previous, ignore_errors=True)
        if path.exists():
            path.rename(previous)
        partial.rename(path)
    except OSError as error:
        raise CannotPack(f"{path} can't be replaced: {error.strerror}") from error
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _lock_store(path: Path) -> Iterator[None]:
    """Lock the store for writing; waits while another process writes it."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is packing %s: waiting for it", path)
            with defer_signals() as signals:
                while not lock.is_locked and not signals:
                    try:
                        lock.acquire(timeout=0.5)
                    except Timeout:
                        continue
    except OSError as error:
        raise CannotPack(f"{path.parent} can't be written to: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
