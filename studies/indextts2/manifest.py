"""Paired manifests: JSON lines that name four .npy files an utterance, millions of lines.

A manifest is read once, line by line, into an index: a file of columns (where each line starts, how long its
text and its codes are) that later starts map into memory. It is stored in `.tuner-index/` beside the manifest, or
under `data/index/` if that folder is not writable. The files that the lines name are not opened here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trainer.errors import DamagedSample, UserError
from trainer.units import format_bytes

if TYPE_CHECKING:
    from studies.indextts2.model import GPTConfig

logger = logging.getLogger(__name__)

_VERSION = 1
_HEADER_BYTES = 4096
_BLOCK_BYTES = 8 << 20
_SPEC = re.compile(r"(.+)::([A-Za-z]{2,3}(?:[-_]\w+)?)(?:@(.*))?")


class ManifestSpec(NamedTuple):
    """A manifest as [workload] names it: "PATH", "PATH::ko" or "PATH::ko@0.15"."""

    path: str
    language: str | None = None
    """Only a label in the log: the model has no input for it, and the `language` of the lines is ignored."""
    share: float | None = None
    """Of the samples that are drawn, between 0 and 1."""

    @classmethod
    def parse(cls, spec: str) -> ManifestSpec:
        """Raises ValueError where the share is not between 0 and 1."""
        match = _SPEC.fullmatch(spec)
        if not match or match[3] is None:
            return cls(match[1], match[2]) if match else cls(spec)
        share = float(match[3]) if re.fullmatch(r"[0-9]*\.?[0-9]+", match[3]) else 0.0
        if not 0 < share < 1:
            raise ValueError(f"{spec}: the share {match[3]!r} is not between 0 and 1; write it as ::{match[2]}@0.15")
        return cls(match[1], match[2], share)


@dataclass(frozen=True)
class Manifest:
    """An indexed manifest: N lines by number, in columns that are mapped into memory."""

    path: Path
    language: str | None
    digest: str
    """SHA-256 of the file."""
    offsets: np.ndarray
    """[N + 1] int64: the byte at which each line starts."""
    text_lengths: np.ndarray
    """[N] int32."""
    code_lengths: np.ndarray
    """[N] int32."""

    def fits(self, config: GPTConfig) -> np.ndarray:
        """[N] bool: the lines that are no longer than the model's position tables; training leaves out the others."""
        return (self.text_lengths <= config.max_text_tokens) & (self.code_lengths <= config.max_mel_tokens)

    def record(self, row: int) -> dict[str, Any]:
        """Read one line again. Raises `DamagedSample` where the file has changed since it was indexed."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                record = json.loads(file.read(end - start))
            lengths = check_record(record, str(self.path.parent))
        except (OSError, ValueError) as error:
            raise DamagedSample(f"{self.path}: sample {row} changed while the run read it: {error}") from None
        if lengths != (self.text_lengths[row], self.code_lengths[row]):
            raise DamagedSample(f"{self.path}: sample {row} changed while the run read it")
        return record  # type: ignore[no-any-return]


def check_record(record: Any, folder: str) -> tuple[int, int]:
    """The (text, code) lengths of a manifest line. Raises ValueError if a key is missing or has the
    wrong type, or if a path leaves `folder`."""
    try:
        text_len, code_len = record["target_text_len"], record["target_code_len"]
        paths = sample_paths(record)
        joined = "\n".join(("", *paths))
    except KeyError as error:
        raise ValueError(f"has no {error.args[0]!r}") from None
    except (TypeError, AttributeError):
        raise ValueError("is not an object whose paths are strings") from None
    if type(text_len) is not int or type(code_len) is not int or text_len < 0 or code_len < 0:
        raise ValueError("needs whole numbers as 'target_text_len' and 'target_code_len'")
    # Normalizing every path would halve the speed of indexing; nearly none needs it.
    if ".." in joined or "\n/" in joined:
        for path in paths:
            if not os.path.normpath(os.path.join(folder, path)).startswith(folder.rstrip("/") + "/"):
                raise ValueError(f"names {path!r}, which leaves the manifest's folder; move the file inside it")
    if "id" not in record:
        raise ValueError("has no 'id'")
    return text_len, code_len


def sample_paths(record: dict[str, str]) -> tuple[str, str, str, str]:
    """Paths of text, codes, condition and emotion, relative to the manifest."""
    return (
        record["target_text_ids_path"],
        record["target_codes_path"],
        record["prompt_condition_path"],
        # Preprocessing omits the one that it has not made, or leaves it empty.
        record.get("prompt_emo_vec_path") or record.get("target_emo_vec_path") or record["prompt_emo_vec_path"],
    )


def open_manifest(spec: str) -> Manifest:
    """Map a manifest (see `ManifestSpec`), indexing it first if it is new or has changed.

    Raises UserError, naming the line, for a manifest that is missing, empty or broken.
    """
    name, language, _ = ManifestSpec.parse(spec)
    path = Path(name).resolve()
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"manifest {path} can't be read: {error.strerror}") from None
    if not path.is_file():
        raise UserError(f"manifest {path} is not a file")
    unique = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    places = (
        path.parent / ".tuner-index" / f"{path.name}.index",
        Path("data/index").resolve() / f"{path.name}-{unique}.index",
    )
    stamp = {"version": _VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    for place in places:
        if (header := _read_header(place)) and stamp.items() <= header.items():
            return _map_index(place, header, path, language)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.NamedTemporaryFile(dir=place.parent, delete=False)  # noqa: SIM115
        except OSError as error:
            refusal = error
            continue
        return _map_index(place, _build_index(path, stamp, temporary, place), path, language)
    raise UserError(f"no folder for the index of {path}: {places[-1].parent}: {refusal.strerror}")


def _build_index(path: Path, stamp: dict[str, int], index: IO[bytes], place: Path) -> dict[str, Any]:
    """Read the whole manifest into `index` and move it to `place`; returns its header. Memory stays flat:
    the columns grow in files of their own until their sizes are known."""
    started = time.perf_counter()
    logger.info("indexing %s (%s)", path, format_bytes(stamp["size"]))
    try:
        with ExitStack() as stack:
            stack.enter_context(index)
            columns = [stack.enter_context(tempfile.TemporaryFile(dir=place.parent)) for _ in range(3)]
            digest, num_samples = _read_lines(path, columns)
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (stamp["size"], stamp["mtime_ns"]):
                raise UserError(f"manifest {path} changed while it was indexed; start again when it is whole")
            header = {**stamp, "digest": digest, "num_samples": num_samples}
            index.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
            for column in columns:
                column.seek(0)
                shutil.copyfileobj(column, index, 1 << 20)
            index.flush()
            os.fsync(index.fileno())
        os.replace(index.name, place)
    finally:
        Path(index.name).unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    logger.info("indexed %s lines in %.1fs (%.0f lines/s)", f"{num_samples:,}", seconds, num_samples / seconds)
    return header


def _read_lines(path: Path, columns: Sequence[IO[bytes]]) -> tuple[str, int]:
    """Parse every line; write offsets, text lengths and code lengths. Returns (SHA-256, number of lines)."""
    hasher, decode, folder = hashlib.sha256(), json.JSONDecoder().raw_decode, str(path.parent)
    offset = line_number = num_samples = 0
    with open(path, "rb") as file:
        while block := file.readlines(_BLOCK_BYTES):
            hasher.update(b"".join(block))
            offsets, text_lengths, code_lengths = array("q"), array("i"), array("i")
            for line in block:
                line_number += 1
                try:
                    if text := line.decode("utf-8-sig" if line_number == 1 else "utf-8").strip():
                        record, end = decode(text)
                        if end != len(text):
                            raise ValueError("holds more than one JSON object")
                        text_len, code_len = check_record(record, folder)
                        text_lengths.append(text_len)
                        code_lengths.append(code_len)
                        offsets.append(offset)
                except (ValueError, OverflowError, RecursionError) as error:
                    raise UserError(f"{path}:{line_number}: the line {_complaint(error)}") from None
                offset += len(line)
            for column, values in zip(columns, (offsets, text_lengths, code_lengths), strict=True):
                column.write(values)
            num_samples += len(offsets)
    if not num_samples:
        raise UserError(f"manifest {path} is empty")
    columns[0].write(array("q", [offset]))
    return hasher.hexdigest(), num_samples


def _complaint(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return "is not JSON"
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8"
    if isinstance(error, OverflowError):
        return "has a length of more than 31 bits"
    return str(error)


def _read_header(place: Path) -> dict[str, Any] | None:
    """The header of an index file, or None where there is none that is whole."""
    try:
        with open(place, "rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
        whole = size == _HEADER_BYTES + 8 + 16 * header["num_samples"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if whole else None


def _map_index(place: Path, header: dict[str, Any], path: Path, language: str | None) -> Manifest:
    num_samples, columns, offset = header["num_samples"], [], _HEADER_BYTES
    for dtype, length in ((np.int64, num_samples + 1), (np.int32, num_samples), (np.int32, num_samples)):
        columns.append(np.memmap(place, dtype, "r", offset, (length,)))
        offset += columns[-1].nbytes
    return Manifest(path, language, header["digest"], *columns)
