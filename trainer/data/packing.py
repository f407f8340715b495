"""Writes a packed store: estimates its size, then writes its samples one after the other.

The header is written every 10 s and at the end, after the files were flushed. A packing that was killed continues from
the header, and drops later bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainer.data.block_digests import write_digests
from trainer.data.packed_store import PLACES, CannotPack, Field, Header, field_path, map_field, map_places
from trainer.errors import DamagedSample
from trainer.units import format_bytes
from trainer.workload import Dataset

log = logging.getLogger(__name__)

DEDUPLICATED = 1024
"""Equal arrays of at least this many bytes are stored once. Each distinct one costs 0.1 KB of memory."""
RECORD_EVERY = 10.0
NUM_PROBED = 512
PROBE_SECONDS = 1.0
# Share of the samples probed. The loader stops a run at 1%, so packing more would be useless.
MAX_DAMAGED = 0.05


def read_fields(sample: Any) -> tuple[Field, ...]:
    """Returns the fields of a sample. Raises `CannotPack` if it is no tuple of arrays."""
    arrays = isinstance(sample, tuple) and all(isinstance(a, np.ndarray) and a.ndim for a in sample)
    if not arrays or not sample or any(a.dtype.kind in "OV" for a in sample):
        raise CannotPack("its samples are no tuples of numpy arrays")
    names = getattr(sample, "_fields", range(len(sample)))
    return tuple(Field(str(name), a.dtype.str, a.shape[1:]) for name, a in zip(names, sample, strict=True))


@dataclass(frozen=True)
class Estimate:
    """Space and time of a packing, estimated from random samples."""

    fields: tuple[Field, ...]
    num_bytes: int
    seconds: float
    details: str
    """The bytes of each field, and its approximate number of distinct arrays."""


def estimate(data: Dataset) -> Estimate:
    """Read `NUM_PROBED` samples, or as many as `PROBE_SECONDS` allow, and project their sizes to all.

    Raises:
        CannotPack: The samples differ in their fields, or too many of them are damaged.
    """
    started, total = time.perf_counter(), len(data)
    if not total:
        raise CannotPack("there are no samples")
    fields: tuple[Field, ...] = ()
    small: list[int] = []
    large: list[Counter[bytes]] = []
    sizes: dict[bytes, int] = {}
    num_read = num_damaged = 0
    for index in np.random.default_rng(0).choice(total, min(NUM_PROBED, total), replace=False):
        num_read += 1
        try:
            sample = data[int(index)]
        except DamagedSample:
            num_damaged += 1
            continue
        if not fields:
            fields = read_fields(sample)
            small, large = [0] * len(fields), [Counter() for _ in fields]
        if read_fields(sample) != fields:
            raise CannotPack("its samples differ in dtype or shape")
        for number, values in enumerate(sample):
            if values.nbytes < DEDUPLICATED:
                small[number] += values.nbytes
            else:
                key = compute_digest(values)
                large[number][key] += 1
                sizes[key] = values.nbytes
        if time.perf_counter() - started > PROBE_SECONDS and num_read >= 32:
            break
    if num_damaged > MAX_DAMAGED * num_read:
        raise CannotPack(f"{num_damaged} of {num_read} samples probed are missing or damaged")
    share, parts, num_bytes = total / num_read, [], 16 * len(fields) * total
    for field, in_small, counts in zip(fields, small, large, strict=True):
        distinct = estimate_distinct(counts, round(share * counts.total()))
        mean = sum(sizes[key] for key in counts) / max(1, len(counts))
        needed = round(share * in_small + distinct * mean)
        parts.append(f"{field.name} {format_bytes(needed)}" + (f" (about {distinct:,} distinct)" if distinct else ""))
        num_bytes += needed
    seconds = (time.perf_counter() - started) * share
    return Estimate(fields, num_bytes, seconds, ", ".join(parts))


def estimate_distinct(counts: Mapping[bytes, int], total: int) -> int:
    """Estimate the number of kinds among `total` from how often each kind was drawn (Chao 1984). The estimate is a
    lower bound; if no kind was drawn twice, all are taken as distinct."""
    drawn, once = sum(counts.values()), sum(count == 1 for count in counts.values())
    if once == drawn:
        return total
    twice = sum(count == 2 for count in counts.values())
    unseen = once * (once - 1) // (2 * (twice + 1))
    return len(counts) + min(unseen, max(0, total - drawn))


def view_bytes(values: np.ndarray) -> memoryview:
    """The array's bytes, without a copy if they are contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def compute_digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(view_bytes(values)).digest()[:16]


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def pack(data: Dataset, folder: Path, digest: str, fields: tuple[Field, ...], *, ceiling: float) -> Header:
    """Write the samples into `folder`; continues an interrupted packing of the same digest.

    A stop signal ends it after the current sample: all finished samples are recorded, and KeyboardInterrupt is raised.

    Args:
        fields: The fields of all samples, from `estimate`.
        ceiling: Limit on the store's bytes.

    Raises:
        CannotPack: The disk can't hold it, it grows past `ceiling`, or a sample has other fields.
    """
    header = Header(digest, len(data), 0, 0, fields)
    interrupted = Header.read(folder, digest, len(data))
    if interrupted and _drop_rows(interrupted) == _drop_rows(header):
        header = interrupted
        log.info("continuing an earlier packing after %s samples", f"{header.num_done:,}")
    num_before = header.num_done
    started = recorded = time.monotonic()
    with defer_signals() as signals, _Writer(folder, header) as writer:
        while writer.num_done < len(data) and not signals:
            try:
                sample = data[writer.num_done]
            except DamagedSample:
                writer.add_damaged()
            else:
                writer.add(sample)
            if (now := time.monotonic()) - recorded >= RECORD_EVERY:
                header, recorded = writer.record(), now
                _log_progress(header, num_before, now - started)
                if header.num_bytes > ceiling:
                    raise CannotPack(f"it grew to {format_bytes(header.num_bytes)}, far more than was estimated")
    if writer.header.num_done == len(data):
        with _explain_errors(folder):
            write_digests(folder, writer.header)
    return writer.header


def _drop_rows(header: Header) -> list[Field]:
    return [replace(field, rows=0) for field in header.fields]


def _log_progress(header: Header, num_before: int, seconds: float) -> None:
    speed = (header.num_done - num_before) / seconds
    log.info(
        "packing: %s of %s samples, %s, %.0f samples/s, about %s left",
        f"{header.num_done:,}",
        f"{header.num_samples:,}",
        format_bytes(header.num_bytes),
        speed,
        duration((header.num_samples - header.num_done) / speed),
    )


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Defer stop signals: they are listed, and at the exit the first one is passed to its handler, and
    KeyboardInterrupt is raised. So no write is torn, and packing stops even if the handler only sets a flag."""
    received: list[int] = []
    deferred: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        deferred = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in deferred:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in deferred.items():
            signal.signal(number, handler)
        if received:
            deferred[received[0]](received[0], None)
            raise KeyboardInterrupt


class _Writer:
    """Appends samples to a store's files. At the exit it records them, unless by `CannotPack`, so that a packing can
    continue."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self.num_done, self.num_damaged = header.num_done, header.num_damaged
        self._rows = [field.rows for field in header.fields]
        self._places = array("q")
        with _explain_errors(folder), ExitStack() as opened:
            folder.mkdir(exist_ok=True)
            ends = [header.places_bytes, *(field.num_bytes for field in header.fields)]
            paths = [folder / PLACES, *(field_path(folder, n) for n in range(len(header.fields)))]
            self._files = [opened.enter_context(_append(path, end)) for path, end in zip(paths, ends, strict=True)]
            self._stored = [self._find_stored(number) for number in range(len(header.fields))]
            self._open = opened.pop_all()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, CannotPack):
                self.record()
        finally:
            # After a failed write the buffers still hold unwritten bytes, so closing fails again.
            with suppress(OSError):
                self._open.close()

    def add(self, sample: Any) -> None:
        if len(sample) != len(self.header.fields):
            raise CannotPack(f"sample {self.num_done} has {len(sample)} fields and others {len(self.header.fields)}")
        starts, ends = [], []
        for number, (field, values) in enumerate(zip(self.header.fields, sample, strict=True)):
            if (values.dtype.str, values.shape[1:]) != (field.dtype, field.shape):
                raise CannotPack(f"sample {self.num_done} is not like the others: its {field.name} is {values.dtype}")
            start = self._place(number, values)
            starts.append(start)
            ends.append(start + len(values))
        self._places.extend(starts)
        self._places.extend(ends)
        self.num_done += 1

    def add_damaged(self) -> None:
        self._places.extend([-1] * (2 * len(self.header.fields)))
        self.num_done += 1
        self.num_damaged += 1

    def record(self) -> Header:
        """Write all samples so far to disk, then the header that counts them."""
        with _explain_errors(self.folder):
            self._files[0].write(self._places)
            self._places = array("q")
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            fields = [replace(field, rows=rows) for field, rows in zip(self.header.fields, self._rows, strict=True)]
            self.header = replace(
                self.header, num_done=self.num_done, num_damaged=self.num_damaged, fields=tuple(fields)
            )
            self.header.write(self.folder)
        return self.header

    def _place(self, number: int, values: np.ndarray) -> int:
        """Returns the array's row in its field's file; writes it there if it is new."""
        start = self._rows[number]
        if values.nbytes >= DEDUPLICATED:
            # setdefault: one look-up for new and stored arrays.
            stored = self._stored[number].setdefault(compute_digest(values), start)
            if stored != start:
                return stored
        with _explain_errors(self.folder):
            self._files[1 + number].write(view_bytes(values))
        self._rows[number] += len(values)
        return start

    def _find_stored(self, number: int) -> dict[bytes, int]:
        """Digest -> row of a field's large arrays that an earlier packing stored."""
        if not self.header.num_done:
            return {}
        field, count = self.header.fields[number], len(self.header.fields)
        starts, ends = map_places(self.folder, self.header)[:, [number, count + number]].T
        large = (ends - starts) * field.row_bytes >= DEDUPLICATED
        first, index = np.unique(starts[large], return_index=True)
        rows = map_field(self.folder, number, field)
        both = zip(first.tolist(), ends[large][index].tolist(), strict=True)
        return {compute_digest(rows[start:end]): start for start, end in both}


@contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotPack(f"{folder} can't be written to: {error.strerror}") from error


def _append(path: Path, end: int) -> IO[bytes]:
    """Open a file to write at `end`, and drop later bytes, which were never recorded."""
    file = open(path, "r+b" if end else "wb", buffering=1 << 20)  # noqa: SIM115
    file.truncate(end)
    file.seek(end)
    return file
