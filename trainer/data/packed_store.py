"""The file format of a packed store: a folder that `trainer.data.packing` writes and `trainer.data.packed` reads.

    header.json    version, digest, number of all and of packed samples, dtype and shape of each field
    places.bin     [samples, 2 x fields] int64: the rows in the fields' files at which the sample's arrays
                   begin, and then those at which they end; -1 for a sample that could not be read
    field-0.bin    the arrays of the first field, raw, one after the other; and so on

    digests.bin    checksums, see `trainer.data.block_digests`

Equal arrays of 1 KB and more (a speaker's vectors, named by thousands of samples) are stored once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

VERSION = 1
HEADER, PLACES = "header.json", "places.bin"


class CannotPack(Exception):
    """This data can't be packed on this disk; the message gives the reason."""


@dataclass(frozen=True)
class Field:
    """One field of all samples: arrays [rows, *shape] of one dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: int = 0
    """Number of rows stored."""

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Header:
    """The content of a store, complete or not."""

    digest: str
    num_samples: int
    num_done: int
    num_damaged: int
    fields: tuple[Field, ...]

    @property
    def num_bytes(self) -> int:
        return sum(field.num_bytes for field in self.fields) + self.places_bytes

    @property
    def places_bytes(self) -> int:
        return 16 * len(self.fields) * self.num_done

    def write(self, folder: Path) -> None:
        temporary = folder / f"{HEADER}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **asdict(self)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / HEADER)

    @classmethod
    def read(cls, folder: Path, digest: str, num_samples: int) -> Header | None:
        """Read the header of the store of `digest`; None if `folder` does not hold it, or files are too short.

        Raises:
            CannotPack: The disk refused to read it: it may be whole, and is not replaced.
        """
        try:
            values = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            if (values.pop("version"), values["digest"], values["num_samples"]) != (VERSION, digest, num_samples):
                return None
            fields = tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in values.pop("fields"))
            header = cls(**values, fields=fields)
            whole = (folder / PLACES).stat().st_size >= header.places_bytes
            for number, field in enumerate(fields):
                whole &= field_path(folder, number).stat().st_size >= field.num_bytes
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None
        except OSError as error:
            raise CannotPack(f"{folder} can't be read: {error.strerror}") from error
        return header if whole else None


def field_path(folder: Path, number: int) -> Path:
    return folder / f"field-{number}.bin"


def map_file(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Map the beginning of a file as a read-only array. A plain array, because views of np.memmap are slow."""
    num_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    if not num_bytes:
        return np.empty(shape, dtype)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype).reshape(shape)


def map_field(folder: Path, number: int, field: Field) -> np.ndarray:
    """Map all rows of a field: [rows, *shape]."""
    return map_file(field_path(folder, number), field.dtype, (field.rows, *field.shape))


def map_places(folder: Path, header: Header) -> np.ndarray:
    """Map the places: [packed samples, 2 x fields] int64."""
    return map_file(folder / PLACES, "i8", (header.num_done, 2 * len(header.fields)))
