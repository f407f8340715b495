"""Packed stores: the same samples, each array once, and nothing lost to kills, full disks or a second process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from trainer import DamagedSample, UserError
from trainer.data import packed as packed_module
from trainer.data import packed_store, packing
from trainer.data.packed import Mode, PackedDataset, open_packed
from trainer.data.packing import estimate_distinct

NUM_SAMPLES = 40


class Sample(NamedTuple):
    ids: np.ndarray
    vectors: np.ndarray


class Samples:
    """Ids of many lengths, and the 4 KB of one of three speakers."""

    def __init__(self, num_speakers: int = 3, damaged: set[int] | None = None, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.lengths = np.arange(NUM_SAMPLES) % 7
        self.ids = [random.integers(0, 99, length).astype(np.int16) for length in self.lengths]
        self.speakers = random.standard_normal((num_speakers, 8, 128), np.float32)
        self.damaged = damaged or set()
        self.at: dict[int, Callable[[], object]] = {}
        self.reads: list[int] = []

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int, /) -> Sample:
        self.reads.append(index)
        self.at.get(index, lambda: None)()
        if index in self.damaged:
            raise DamagedSample(f"sample-{index}: vectors.npy is missing")
        return Sample(self.ids[index], self.speakers[index % len(self.speakers)])


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Few samples are read beforehand, so that those read for packing can be counted."""
    monkeypatch.setattr(packing, "NUM_PROBED", 4)
    caplog.set_level(logging.INFO)


def pack(data: Any, folder: Path, digest: str = "d1", mode: Mode = "auto") -> Any:
    return open_packed(data, folder / "data.packed", digest=digest, build=Sample._make, mode=mode)


def assert_equal(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for i in range(len(one)):
        assert type(one[i]) is type(other[i])
        for left, right in zip(one[i], other[i], strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def stop(*_: Any) -> None:
    raise RuntimeError("stopped in the middle")


def test_store_holds_the_samples_bit_for_bit(tmp_path: Path) -> None:
    data = Samples()
    store = pack(data, tmp_path)
    assert store.mapped and not getattr(data, "mapped", False)
    assert_equal(store, Samples())
    assert store.lengths is data.lengths
    data.reads.clear()
    store[3]
    assert not data.reads
    assert folders(tmp_path) == {"data.packed"}


def test_samples_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    store = pack(Samples(), tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        store[0].vectors[0, 0] = 1.0
    assert np.shares_memory(store[0].vectors, store[3].vectors)


def test_equal_arrays_are_stored_once(tmp_path: Path) -> None:
    pack(Samples(), tmp_path)
    assert (tmp_path / "data.packed/field-1.bin").stat().st_size == 3 * 8 * 128 * 4
    # Short ones are not worth looking for.
    assert (tmp_path / "data.packed/field-0.bin").stat().st_size == 2 * Samples().lengths.sum()


def test_store_is_built_once_and_opened_without_reading_it_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(Samples(), tmp_path)
    again = Samples()
    assert_equal(pack(again, tmp_path), Samples())
    assert len(again.reads) == packed_module.NUM_COMPARED
    assert caplog.text.count("packing into") == 1


def test_another_digest_replaces_the_store(tmp_path: Path) -> None:
    pack(Samples(), tmp_path)
    changed = Samples(seed=1)
    assert_equal(pack(changed, tmp_path, "d2"), Samples(seed=1))
    assert folders(tmp_path) == {"data.packed"}


def test_rewritten_files_are_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(Samples(), tmp_path)
    assert_equal(pack(Samples(seed=1), tmp_path), Samples(seed=1))
    assert "holds other arrays than the files do" in caplog.text


def test_missing_source_files_are_no_change(tmp_path: Path) -> None:
    pack(Samples(), tmp_path)
    assert_equal(pack(Samples(damaged=set(range(NUM_SAMPLES))), tmp_path), Samples())


@pytest.mark.parametrize("name", ["header.json", "places.bin", "field-0.bin", "field-1.bin"])
def test_truncated_store_is_rebuilt(tmp_path: Path, name: str) -> None:
    pack(Samples(), tmp_path)
    torn = tmp_path / "data.packed" / name
    os.truncate(torn, torn.stat().st_size - 1)
    assert_equal(pack(Samples(), tmp_path), Samples())


def test_store_of_another_version_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(Samples(), tmp_path)
    monkeypatch.setattr(packed_store, "VERSION", 2)
    data = Samples()
    pack(data, tmp_path)
    assert set(data.reads) == set(range(NUM_SAMPLES))


def test_interrupted_packing_resumes(tmp_path: Path) -> None:
    data = Samples()
    data.at[25] = stop
    with pytest.raises(RuntimeError, match="stopped in the middle"):
        pack(data, tmp_path)
    assert folders(tmp_path) == {"data.packed.partial"}
    rest = Samples()
    store = pack(rest, tmp_path)
    assert rest.reads[packing.NUM_PROBED :] == list(range(25, NUM_SAMPLES))
    assert_equal(store, Samples())
    assert (tmp_path / "data.packed/field-1.bin").stat().st_size == 3 * 8 * 128 * 4
    assert folders(tmp_path) == {"data.packed"}


def test_bytes_after_the_last_record_are_dropped(tmp_path: Path) -> None:
    data = Samples()
    data.at[25] = stop
    with pytest.raises(RuntimeError):
        pack(data, tmp_path)
    for path in (tmp_path / "data.packed.partial").glob("*.bin"):
        with open(path, "ab") as file:
            file.write(b"not recorded")
    assert_equal(pack(Samples(), tmp_path), Samples())


def test_interrupted_packing_of_other_data_is_discarded(tmp_path: Path) -> None:
    data = Samples(seed=1)
    data.at[25] = stop
    with pytest.raises(RuntimeError):
        pack(data, tmp_path)
    assert_equal(pack(Samples(), tmp_path, "d2"), Samples())


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_slow() -> None:
    time.sleep(0.05)


def pack_in_child(folder: Path, at: dict[int, Callable[[], object]]) -> None:
    packing.NUM_PROBED, packing.RECORD_EVERY = 4, 0.0
    data = Samples()
    data.at = at
    pack(data, folder)


@contextmanager
def child(target: Callable[..., object], *arguments: Any, start: str = "fork") -> Iterator[Any]:
    process = multiprocessing.get_context(start).Process(target=target, args=arguments)
    process.start()
    try:
        yield process
        process.join(60)
    finally:
        process.kill()
        process.join()


def test_killed_packing_resumes_at_its_last_record(tmp_path: Path) -> None:
    with child(pack_in_child, tmp_path, {25: kill}) as process:
        pass
    assert process.exitcode == -signal.SIGKILL
    rest = Samples()
    store = pack(rest, tmp_path)
    assert rest.reads[packing.NUM_PROBED :] == list(range(25, NUM_SAMPLES))
    assert_equal(store, Samples())


def test_second_process_waits_for_the_first_and_uses_its_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Samples()
    with child(pack_in_child, tmp_path, dict.fromkeys(range(NUM_SAMPLES), be_slow)):
        while not (tmp_path / "data.packed.partial").exists():
            time.sleep(0.01)
        store = pack(data, tmp_path)
    assert "another process is packing" in caplog.text
    assert len(data.reads) == packed_module.NUM_COMPARED
    assert_equal(store, Samples())


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_ends_packing_after_a_sample_even_with_a_passive_handler(
    tmp_path: Path, first: signal.Signals
) -> None:
    noted = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    data = Samples()
    data.at[25] = lambda: signal.raise_signal(first)
    before = signal.signal(first, note)
    try:
        with pytest.raises(KeyboardInterrupt):
            pack(data, tmp_path)
        assert signal.getsignal(first) is note
    finally:
        signal.signal(first, before)
    assert noted == [first]
    rest = Samples()
    assert_equal(pack(rest, tmp_path), Samples())
    assert rest.reads[packing.NUM_PROBED] == 26


def test_damaged_sample_stays_damaged_until_repaired(tmp_path: Path) -> None:
    data = Samples(damaged={7})
    store = pack(data, tmp_path)
    for _ in range(2):
        with pytest.raises(DamagedSample, match=r"^sample-7: vectors.npy is missing$"):
            store[7]
    data.damaged.clear()
    assert_equal(store, Samples())
    assert_equal(pack(Samples(), tmp_path), Samples())


def test_damage_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(Samples(damaged={7}), tmp_path)
    assert "40 samples, 1 of them damaged and read from their files" in caplog.text


def test_data_that_would_stop_the_run_is_not_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Samples(damaged=set(range(NUM_SAMPLES)))
    assert pack(data, tmp_path) is data
    assert "4 of 4 samples probed are missing or damaged" in caplog.text
    assert folders(tmp_path) == set()


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1e12, 0, num_bytes))


TOO_LITTLE = 2 * 8 * 128 * 4
"""Bytes: the two voices among the samples read beforehand, and nothing for the rest."""


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("free", "more than a quarter of the 20 kB free (pack = true packs it anyway)"),
        ("AUTO_BYTES", "more than 8 kB (pack = true packs it anyway)"),
    ],
)
def test_auto_packs_no_too_large_data_and_logs_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: str, reason: str
) -> None:
    if limit == "free":
        free(monkeypatch, 20_000)
    else:
        monkeypatch.setattr(packed_module, "AUTO_BYTES", TOO_LITTLE)
    data = Samples()
    assert pack(data, tmp_path) is data
    assert "not packed: it needs about 10 kB of disk (ids 0 kB, vectors 8 kB (about 2 distinct))" in caplog.text
    assert reason in caplog.text
    assert folders(tmp_path) == set()


def test_pack_true_packs_all_that_fits_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "AUTO_BYTES", TOO_LITTLE)
    free(monkeypatch, 1e6)
    assert_equal(pack(Samples(), tmp_path, mode=True), Samples())
    free(monkeypatch, TOO_LITTLE)
    with pytest.raises(UserError, match=r"it needs about .* and 8 kB are free in .*; free some space"):
        pack(Samples(), tmp_path, "d2", mode=True)


def test_pack_false_makes_no_store(tmp_path: Path) -> None:
    data = Samples()
    assert pack(data, tmp_path, mode=False) is data
    assert not data.reads and not list(tmp_path.iterdir())


@contextmanager
def files_end_at(num_bytes: int) -> Iterator[None]:
    """Writing further fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_while_packing_automatically_leaves_no_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Samples(num_speakers=NUM_SAMPLES)
    with files_end_at(100_000):
        assert pack(data, tmp_path) is data
    assert "not packed: " in caplog.text and "can't be written to: File too large" in caplog.text
    assert folders(tmp_path) == set()


def test_disk_full_while_packing_on_request_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "RECORD_EVERY", 0.0)
    with files_end_at(100_000), pytest.raises(UserError, match="can't be written to: File too large; free some space"):
        pack(Samples(num_speakers=NUM_SAMPLES), tmp_path, mode=True)
    rest = Samples(num_speakers=NUM_SAMPLES)
    assert_equal(pack(rest, tmp_path, mode=True), Samples(num_speakers=NUM_SAMPLES))
    assert rest.reads[packing.NUM_PROBED] > 10


def test_store_larger_than_its_estimate_is_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packing, "RECORD_EVERY", 0.0)
    monkeypatch.setattr(packed_module, "AUTO_BYTES", 20_000)
    data = Samples(num_speakers=NUM_SAMPLES)
    # Those probed beforehand have one voice, all others one each.
    for index in np.random.default_rng(0).choice(NUM_SAMPLES, packing.NUM_PROBED, replace=False):
        data.speakers[index] = data.speakers[10]
    assert pack(data, tmp_path) is data
    assert "far more than was estimated" in caplog.text
    assert max(data.reads) < NUM_SAMPLES - 1
    assert folders(tmp_path) == set()


def test_no_store_is_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = Samples()
    assert pack(data, tmp_path / "file") is data


class Single(Samples):
    def __getitem__(self, index: int, /) -> Any:
        return self.ids[index]


class Changing(Samples):
    def __getitem__(self, index: int, /) -> Sample:
        sample = super().__getitem__(index)
        return sample._replace(ids=sample.ids.astype(np.int64)) if index == 30 else sample


@pytest.mark.parametrize(
    ("data", "reason"), [(Single(), "no tuples of numpy arrays"), (Changing(), "sample 30 is not like the others")]
)
def test_samples_other_than_tuples_of_like_arrays_are_not_packed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: Samples, reason: str
) -> None:
    assert pack(data, tmp_path) is data
    assert reason in caplog.text
    with pytest.raises(UserError, match=reason):
        pack(data, tmp_path, mode=True)


def read_in_child(store: PackedDataset, answers: Any) -> None:
    answers.put([(sample.ids.tolist(), float(sample.vectors.sum())) for sample in map(store.__getitem__, range(9))])


def test_spawned_worker_maps_the_store_itself(tmp_path: Path) -> None:
    store = pack(Samples(), tmp_path)
    # The samples of this test lie in memory; those of a real one are named by their files.
    assert len(pickle.dumps(store)) < len(pickle.dumps(Samples())) + 500
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    with child(read_in_child, store, answers, start="spawn"):
        got = answers.get()
    assert got == [(sample.ids.tolist(), float(sample.vectors.sum())) for sample in map(store.__getitem__, range(9))]


def test_loader_worker_detects_a_replaced_store(tmp_path: Path) -> None:
    store = pack(Samples(), tmp_path)
    pickled = pickle.dumps(store)
    pack(Samples(seed=1), tmp_path, "d2")
    with pytest.raises(UserError, match="was replaced or removed under the run"):
        pickle.loads(pickled)
    assert_equal(store, Samples())


def test_arrays_go_into_tensors_by_a_copy_only(tmp_path: Path) -> None:
    store = pack(Samples(), tmp_path)
    stacked = torch.from_numpy(np.stack([store[i].vectors for i in range(3)]))
    stacked.zero_()
    assert_equal(store, Samples())


@pytest.mark.parametrize(
    ("probed", "total", "expected"),
    [
        ([1, 1, 1, 1], 1000, 1000),
        ([5, 4, 3], 1000, 3),
        ([1, 1, 2, 2, 2], 8, 5),
        ([3, 2, 1, 1, 1, 1], 1000, 6 + 4 * 3 // 4),
    ],
)
def test_number_of_distinct_arrays_is_estimated_from_those_drawn(probed: list[int], total: int, expected: int) -> None:
    assert estimate_distinct(Counter({bytes([kind]): count for kind, count in enumerate(probed)}), total) == expected
