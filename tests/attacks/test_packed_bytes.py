"""Attacks on packed stores: no damaged byte is read as whole, and a disk that refuses for a moment costs nothing."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.attacks.test_checkpoint_bytes import cut, flip, swap, zero
from trainer import DamagedSample
from trainer.data import block_digests, packing
from trainer.data.block_digests import BlockDigests
from trainer.data.packed import PackedDataset, open_packed

NUM_SAMPLES = 60


class Sample(NamedTuple):
    ids: np.ndarray
    vectors: np.ndarray


class Samples:
    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.lengths = np.arange(NUM_SAMPLES) % 7 + 20
        self.ids = [random.integers(0, 99, length).astype(np.int32) for length in self.lengths]
        self.speakers = random.standard_normal((12, 8, 128), np.float32)
        self.are_gone = False
        self.reads: list[int] = []

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int, /) -> Sample:
        self.reads.append(index)
        if self.are_gone:
            raise DamagedSample(f"sample-{index}: its files are missing")
        return Sample(self.ids[index], self.speakers[index % len(self.speakers)])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "NUM_PROBED", 4)
    monkeypatch.setattr(block_digests, "BLOCK", 1024)


def opened(data: Samples, folder: Path) -> Any:
    return open_packed(data, folder / "data.packed", digest="d", build=Sample._make, mode=True)


def is_equal(one: Sample, other: Sample) -> bool:
    return all(
        (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()) for a, b in zip(one, other, strict=True)
    )


def shift(content: bytearray, random: random.Random) -> bytes:
    """A block takes the place of another one."""
    one, other = (1024 * random.randrange(max(1, len(content) // 1024)) for _ in range(2))
    content[one : one + 1024] = content[other : other + len(content[one : one + 1024])]
    return bytes(content)


@pytest.mark.parametrize("times", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_damaged_store_is_read_as_whole(tmp_path: Path, times: int) -> None:
    data, whole = Samples(), Samples()
    opened(data, tmp_path)
    store = tmp_path / "data.packed"
    contents = {path: path.read_bytes() for path in store.iterdir()}
    generator = random.Random(1)
    damages: list[Callable[[bytearray, random.Random], bytes]] = [flip, zero, swap, shift, cut]
    for number in range(times):
        path = sorted(contents)[number % len(contents)]
        if path.name != block_digests.DIGESTS or number % 2:
            path.write_bytes(damages[number % len(damages)](bytearray(contents[path]), generator))
        # The files that it was packed from are gone after it is opened, or are there.
        data.are_gone = False
        samples = opened(data, tmp_path)
        data.are_gone = bool(number % 3)
        for index in range(NUM_SAMPLES):
            try:
                found = samples[index]
            except DamagedSample as error:
                assert data.are_gone and str(error).startswith(f"sample-{index}: ")
            else:
                assert is_equal(found, whole[index]), f"{damages[number % len(damages)].__name__} of {path.name}"
        shutil.rmtree(store)
        store.mkdir()
        for each, content in contents.items():
            each.write_bytes(content)


def test_damaged_block_is_one_line_and_its_samples_come_from_their_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Samples()
    opened(data, tmp_path)
    field = tmp_path / "data.packed" / "field-0.bin"
    content = bytearray(field.read_bytes())
    content[1500] ^= 4
    field.write_bytes(content)
    samples = opened(data, tmp_path)
    data.reads.clear()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        for index in range(NUM_SAMPLES):
            assert is_equal(samples[index], Samples()[index])
    assert 0 < len(set(data.reads)) < 20, "only samples of this block"
    # An earlier test in this process may have set the level of a logger.
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "1,024" in warnings[0]


def test_each_block_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = opened(Samples(), tmp_path)
    checked: list[tuple[int, int]] = []
    real = BlockDigests._check

    def check(self: BlockDigests, number: int, block: int) -> int:
        checked.append((number, block))
        return real(self, number, block)

    monkeypatch.setattr(BlockDigests, "_check", check)
    for _ in range(2):
        for index in range(NUM_SAMPLES):
            samples[index]
    assert len(checked) == len(set(checked)) > 50
    assert samples._digests is None, "nothing is left to check"


def test_store_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    data = Samples()
    opened(data, tmp_path)
    (tmp_path / "data.packed" / block_digests.DIGESTS).unlink()
    samples = opened(data, tmp_path)
    assert isinstance(samples, PackedDataset) and not list(tmp_path.glob("data.packed/digests*"))
    assert all(is_equal(samples[index], Samples()[index]) for index in range(NUM_SAMPLES))


def test_store_that_the_disk_refuses_to_read_for_a_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(Samples(), tmp_path)
    header = tmp_path / "data.packed" / "header.json"
    before = header.stat().st_ino
    real = Path.read_text

    def refuse(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == header:
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    data = Samples()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        assert open_packed(data, tmp_path / "data.packed", digest="d", build=Sample._make) is data
    assert header.stat().st_ino == before and json.loads(header.read_text())["num_done"] == NUM_SAMPLES
