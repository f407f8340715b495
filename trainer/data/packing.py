"""Writing a packed store: what it will need, and then its samples one after the other.

The header is written every 10 s and at the end, after the files were flushed: a packing that was killed goes on from
there, whatever else its files hold.
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

from trainer.errors import DamagedSample
from trainer.data.packed_store import PLACES, Field, Header, field_path, map_field, map_places
from trainer.units import format_bytes
from trainer.workload import Dataset

log = logging.getLogger(__name__)

DEDUPLICATED = 1024
"""Bytes from which on an array is looked for among those stored. Each distinct one costs 0.1 KB of memory."""
RECORD_EVERY = 10.0
NUM_PROBED = 512
PROBE_SECONDS = 1.0
# Of the samples probed. The loader stops a run at 1%, so packing them would be for nothing.
MAX_DAMAGED = 0.05


class CannotPack(Exception):
    """Why this data, on this disk, is not packed."""


def form(sample: Any) -> tuple[Field, ...]:
    """The fields of a sample. Raises `CannotPack` where it is no tuple of arrays."""
    arrays = isinstance(sample, tuple) and all(isinstance(a, np.ndarray) and a.ndim for a in sample)
    if not arrays or not sample or any(a.dtype.kind in "OV" for a in sample):
        raise CannotPack("its samples are no tuples of numpy arrays")
    names = getattr(sample, "_fields", range(len(sample)))
    return tuple(Field(str(name), a.dtype.str, a.shape[1:]) for name, a in zip(names, sample, strict=True))


@dataclass(frozen=True)
class Estimate:
    """What packing needs, from some samples drawn at random."""

    fields: tuple[Field, ...]
    num_bytes: int
    seconds: float
    details: str
    """The bytes of each field, and how many distinct arrays of it there are about."""


def estimate(data: Dataset) -> Estimate:
    """Read `NUM_PROBED` samples, or as many as `PROBE_SECONDS` allow, and project their sizes to all.

    Raises:
        CannotPack: The samples are of different forms, or too many of them are damaged.
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
            fields = form(sample)
            small, large = [0] * len(fields), [Counter() for _ in fields]
        if form(sample) != fields:
            raise CannotPack("its samples differ in dtype or shape")
        for number, values in enumerate(sample):
            if values.nbytes < DEDUPLICATED:
                small[number] += values.nbytes
            else:
                key = digest_of(values)
                large[number][key] += 1
                sizes[key] = values.nbytes
        if time.perf_counter() - started > PROBE_SECONDS and num_read >= 32:
            break
    if num_damaged > MAX_DAMAGED * num_read:
        raise CannotPack(f"{num_damaged} of {num_read} samples probed are missing or damaged")
    share, parts, num_bytes = total / num_read, [], 16 * len(fields) * total
    for field, in_small, counts in zip(fields, small, large, strict=True):
        distinct = num_distinct(counts, round(share * counts.total()))
        mean = sum(sizes[key] for key in counts) / max(1, len(counts))
        needed = round(share * in_small + distinct * mean)
        parts.append(f"{field.name} {format_bytes(needed)}" + (f" (about {distinct:,} distinct)" if distinct else ""))
        num_bytes += needed
    seconds = (time.perf_counter() - started) * share
    return Estimate(fields, num_bytes, seconds, ", ".join(parts))


def num_distinct(counts: Mapping[bytes, int], total: int) -> int:
    """How many kinds there are among `total`, from how often each kind was drawn: Chao's estimate of 1984. It is
    a lower bound; where no kind was drawn twice, every one is taken to be distinct."""
    drawn, once = sum(counts.values()), sum(count == 1 for count in counts.values())
    if once == drawn:
        return total
    twice = sum(count == 2 for count in counts.values())
    unseen = once * (once - 1) // (2 * (twice + 1))
    return len(counts) + min(unseen, max(0, total - drawn))


def raw(values: np.ndarray) -> memoryview:
    """The array's bytes, without a copy where they lie one after the other."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def digest_of(values: np.ndarray) -> bytes:
    return hashlib.sha256(raw(values)).digest()[:16]


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def pack(data: Dataset, folder: Path, digest: str, fields: tuple[Field, ...], *, ceiling: float) -> Header:
    """Write the samples into `folder`; goes on where an earlier packing of the same digest was interrupted.

    A stop signal ends it after a sample, with all that was done recorded, as KeyboardInterrupt.

    Args:
        fields: The form of all samples, from `estimate`.
        ceiling: Bytes which the store must not exceed.

    Raises:
        CannotPack: The disk can't hold it, it grows past `ceiling`, or a sample is of another form.
    """
    begun = Header(digest, len(data), 0, 0, fields)
    found = Header.read(folder, digest, len(data))
    if found and form_of(found) == form_of(begun):
        begun = found
        log.info("going on after %s samples that an earlier packing left", f"{begun.num_done:,}")
    started = said = time.monotonic()
    with between_samples() as asked, _Writer(folder, begun) as writer:
        while writer.num_done < len(data) and not asked:
            try:
                sample = data[writer.num_done]
            except DamagedSample:
                writer.add_damaged()
            else:
                writer.add(sample)
            if (now := time.monotonic()) - said >= RECORD_EVERY:
                header, said = writer.record(), now
                _say_progress(header, begun.num_done, now - started)
                if header.num_bytes > ceiling:
                    raise CannotPack(f"it grew to {format_bytes(header.num_bytes)}, far more than was estimated")
    return writer.header


def form_of(header: Header) -> list[Field]:
    return [replace(field, rows=0) for field in header.fields]


def _say_progress(header: Header, before: int, seconds: float) -> None:
    speed = (header.num_done - before) / seconds
    log.info(
        "packing: %s of %s samples, %s, %.0f samples/s, about %s left",
        f"{header.num_done:,}",
        f"{header.num_samples:,}",
        format_bytes(header.num_bytes),
        speed,
        duration((header.num_samples - header.num_done) / speed),
    )


@contextmanager
def between_samples() -> Iterator[list[int]]:
    """Hold stop signals back: they are listed, and on leaving the first is handed to its handler and KeyboardInterrupt
    raised. What is being written is then never torn, and a handler that only takes note is no reason to go on."""
    asked: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            before[asked[0]](asked[0], None)
            raise KeyboardInterrupt


class _Writer:
    """Appends samples to a store's files. Left by an exception, it records what it has, so that it can go on."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self.num_done, self.num_damaged = header.num_done, header.num_damaged
        self._rows = [field.rows for field in header.fields]
        self._places = array("q")
        with self._writing(), ExitStack() as opened:
            folder.mkdir(exist_ok=True)
            ends = [header.places_bytes, *(field.num_bytes for field in header.fields)]
            paths = [folder / PLACES, *(field_path(folder, n) for n in range(len(header.fields)))]
            self._files = [opened.enter_context(_append(path, end)) for path, end in zip(paths, ends, strict=True)]
            self._stored = [self._known(number) for number in range(len(header.fields))]
            self._open = opened.pop_all()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, CannotPack):
                self.record()
        finally:
            # After a failed write the buffers hold what could not be written, and closing fails again.
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
        """Make what was added so far last."""
        with self._writing():
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
        """The row at which the array stands in its field's file; written there if it is new."""
        start = self._rows[number]
        if values.nbytes >= DEDUPLICATED:
            # setdefault: one look-up whether it is new or not.
            stored = self._stored[number].setdefault(digest_of(values), start)
            if stored != start:
                return stored
        with self._writing():
            self._files[1 + number].write(raw(values))
        self._rows[number] += len(values)
        return start

    def _known(self, number: int) -> dict[bytes, int]:
        """Where the large arrays of a field stand that an earlier packing stored."""
        if not self.header.num_done:
            return {}
        field, count = self.header.fields[number], len(self.header.fields)
        starts, ends = map_places(self.folder, self.header)[:, [number, count + number]].T
        large = (ends - starts) * field.row_bytes >= DEDUPLICATED
        first, index = np.unique(starts[large], return_index=True)
        rows = map_field(self.folder, number, field)
        both = zip(first.tolist(), ends[large][index].tolist(), strict=True)
        return {digest_of(rows[start:end]): start for start, end in both}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotPack(f"{self.folder} can't be written to: {error.strerror}") from error


def _append(path: Path, end: int) -> IO[bytes]:
    """Open a file to write on at `end`; what lies behind was never recorded."""
    file = open(path, "r+b" if end else "wb", buffering=1 << 20)  # noqa: SIM115
    file.truncate(end)
    file.seek(end)
    return file
