"""Attacks on .npy files: cut, mutated and lying headers are damaged samples, and cost no memory."""

from __future__ import annotations

import io
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies.indextts2.dataset import SampleReader
from studies.indextts2.npy import parse_npy
from trainer import DamagedSample

CODES = np.arange(20, dtype=np.int64)
HEADERS = [
    "{'descr': '<i8', 'fortran_order': False, 'shape': (4000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (70000, 70000, 70000), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (-20,), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (True,), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (10**9,), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': 20, }",
    "{'descr': '<i3', 'fortran_order': False, 'shape': (20,), }",
    "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (20,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (20,), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (20,), ",
    "{'descr': '<i8', 'shape': (20,), }",
    "{1: 2, 'descr': '<i8'}",
    "(" * 9000,
    "-" * 9000 + "1",
    "'\\d",
    "__import__('os')",
    "",
]


def npy(values: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=version)
    return file.getvalue()


def variants(times: int) -> Iterator[bytes]:
    generator, content = random.Random(0), npy(CODES)
    for header in HEADERS:
        for version, width in ((1, 2), (2, 4)):
            text = header.encode().ljust(118) + b"\n"
            yield b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text + CODES.tobytes()
    for length in range(0, len(content), max(1, len(content) // times)):
        yield content[:length]
    for _ in range(times):
        mutated = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 5])):
            mutated[generator.randrange(128)] = generator.choice([generator.randrange(256), *b"()[]{}'\"\\,:0-9L\n"])
        yield bytes(mutated)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The address space may grow by 512 MB."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("times", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_damaged_file_is_a_damaged_sample_in_one_line(tmp_path: Path, little_memory: None, times: int) -> None:
    reader = SampleReader("sample-7", str(tmp_path))
    num_damaged = 0
    for content in variants(times):
        (tmp_path / "codes.npy").write_bytes(content)
        try:
            values = reader.ids("codes.npy", len(CODES), 1 << 60, "the codebook")
        except DamagedSample as error:
            assert str(error).startswith("sample-7: ") and "\n" not in str(error) and "MemoryError" not in str(error)
            num_damaged += 1
        else:
            assert values.shape == CODES.shape
    assert num_damaged > times / 2


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<i4", ">i8", "|u1", "<f2", "<f4", "|b1"])
@pytest.mark.parametrize("values", [np.zeros(0), np.array(3), np.arange(6), np.arange(6).reshape(2, 3), "columns"])
def test_whole_file_is_read_as_numpy_reads_it(version: tuple[int, int], dtype: str, values: Any) -> None:
    array = np.asfortranarray(np.arange(6).reshape(2, 3)) if isinstance(values, str) else values
    array = array.astype(dtype, order="K")
    found, expected = parse_npy(npy(array, version)), np.load(io.BytesIO(npy(array, version)))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected, strict=True)
