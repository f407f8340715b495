"""The utterances of paired manifests, read and checked one by one when a batch needs them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from studies.indextts2.manifest import Manifest, open_manifest, sample_paths
from studies.indextts2.model import NUM_CONDITION, PREFIX, GPTConfig
from studies.indextts2.npy import parse_npy
from trainer.data.packed import Mode, open_packed
from trainer.errors import DamagedSample, UserError, first_line
from trainer.workload import Dataset

logger = logging.getLogger(__name__)


class Utterance(NamedTuple):
    """One checked sample."""

    text: np.ndarray
    """[text length] int32: pieces of the tokenizer."""
    codes: np.ndarray
    """[code length] int32: the speech to predict."""
    condition: np.ndarray
    """[32, width] float32: the prompt's speaker."""
    emo_vec: np.ndarray
    """[width] float32: the emotion."""


def utterance_length(text_len: Any, code_len: Any) -> Any:
    """Positions of an utterance in its row: prefix, text with start and stop, start_mel and codes."""
    return PREFIX + text_len + 2 + code_len + 1


class PairedUtterances:
    """The utterances of one manifest or of several, one after the other.

    Utterances longer than the model's position tables are left out, and counted in the log. Reading one
    raises `DamagedSample` where a file of it is missing or not what the manifest and the model expect.
    """

    def __init__(self, specs: Sequence[str], config: GPTConfig) -> None:
        self._specs, self._config = tuple(specs), config
        self._manifests = [open_manifest(spec) for spec in specs]
        self._rows = [self._usable_rows(manifest) for manifest in self._manifests]
        counts = [
            len(m.text_lengths) if rows is None else len(rows)
            for m, rows in zip(self._manifests, self._rows, strict=True)
        ]
        self._starts = np.cumsum([0, *counts])
        if not len(self):
            raise UserError(
                f"no utterance of {', '.join(self._specs)} fits into the model's position tables "
                f"(max_text_tokens {config.max_text_tokens}, max_mel_tokens {config.max_mel_tokens})"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned loader worker maps the index again; pickling the columns would copy them.
        return type(self), (self._specs, self._config)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sizes(self) -> list[int]:
        """Each manifest's number of utterances."""
        return [int(size) for size in np.diff(self._starts)]

    @property
    def digests(self) -> tuple[str, ...]:
        """Each manifest's SHA-256."""
        return tuple(manifest.digest for manifest in self._manifests)

    def manifest_of(self, index: int) -> int:
        """The number of the manifest that an utterance is from."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """[len(self)] int32: positions that each utterance takes in its row."""
        return np.concatenate(
            [
                utterance_length(m.text_lengths, m.code_lengths)[slice(None) if rows is None else rows]
                for m, rows in zip(self._manifests, self._rows, strict=True)
            ]
        )

    def __getitem__(self, index: int) -> Utterance:
        which = self.manifest_of(index)
        manifest, rows = self._manifests[which], self._rows[which]
        row = int(index - self._starts[which])
        if rows is not None:
            row = int(rows[row])
        record = manifest.record(row)
        read = SampleReader(str(record["id"]), str(manifest.path.parent))
        text, codes, condition, emo_vec = sample_paths(record)
        config = self._config
        width = config.model_dim
        return Utterance(
            read.ids(text, record["target_text_len"], config.number_text_tokens, "the vocabulary"),
            read.ids(codes, record["target_code_len"], config.num_codes, "the codebook"),
            read.vectors(condition, (NUM_CONDITION, width)),
            read.vectors(emo_vec, (width,)),
        )

    def open_packed(self, mode: Mode) -> Dataset:
        """These utterances from a packed store in the folder of the first manifest's index; see `trainer.data.packed`.
        Each list of manifests and each model size has its own store."""
        if mode is False:
            return self
        config = self._config
        checks = (config.model_dim, config.number_text_tokens, config.num_codes)
        limits = (config.max_text_tokens, config.max_mel_tokens)
        paths = [str(manifest.path) for manifest in self._manifests]
        unique, digest = (
            hashlib.sha256(json.dumps([contents, checks, limits]).encode()).hexdigest()
            for contents in (paths, self.digests)
        )
        path = _place(self._manifests[0].path, f"{self._manifests[0].path.name}-{unique[:12]}.packed")
        return open_packed(self, path, digest=digest, build=Utterance._make, mode=mode)

    def _usable_rows(self, manifest: Manifest) -> np.ndarray | None:
        """Numbers of the lines that fit into the position tables; None where all do."""
        fits = manifest.fits(self._config)
        num_left_out = len(fits) - int(np.count_nonzero(fits))
        label = f" ({manifest.language})" if manifest.language else ""
        logger.info(
            "%s%s: %s utterances%s",
            manifest.path,
            label,
            f"{len(fits):,}",
            f", {num_left_out:,} of them left out: longer than the position tables" if num_left_out else "",
        )
        return np.flatnonzero(fits) if num_left_out else None


def _place(manifest: Path, name: str) -> Path:
    """Path of a packed store: beside the manifest, or under data/index if that folder is not writable."""
    places = [folder / name for folder in (manifest.parent / ".tuner-index", Path("data/index").resolve())]
    for place in places:
        if place.exists():
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                return place
        except OSError:
            continue
    return places[-1]


@dataclass(frozen=True)
class SampleReader:
    """Reads one sample's arrays. Errors name the sample's id and the file."""

    id: str
    folder: str

    def ids(self, path: str, length: int, limit: int, table: str) -> np.ndarray:
        values = self._load(path)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            self._refuse(path, f"is {values.dtype}{list(values.shape)}, not a row of integers")
        if not len(values):
            self._refuse(path, "is empty")
        if len(values) != length:
            self._refuse(path, f"has {len(values)} entries, the manifest expects {length}")
        low, high = values.min(), values.max()
        if low < 0 or high >= limit:
            self._refuse(path, f"has the id {low if low < 0 else high}, beyond {table} of {limit}")
        return values.astype(np.int32, copy=False)

    def vectors(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = self._load(path)
        if values.shape != shape or values.dtype.kind != "f":
            self._refuse(path, f"is {values.dtype}{list(values.shape)}, not float32{list(shape)}")
        if not np.isfinite(values).all():
            self._refuse(path, "has entries that are not finite")
        return values.astype(np.float32, copy=False)

    def check_size(self, path: str, entries: int) -> None:
        """Refuse a file that is missing or too short for this number of entries, of two bytes at least."""
        try:
            size = os.stat(os.path.join(self.folder, path)).st_size
        except OSError as error:
            self._refuse(path, f"can't be read: {first_line(error)}")
        if size < 2 * entries:
            self._refuse(path, f"has {size} bytes, too few for {entries} entries")

    def _load(self, path: str) -> np.ndarray:
        try:
            with open(os.path.join(self.folder, path), "rb", buffering=0) as file:
                content = file.read()
            return parse_npy(content)
        except FileNotFoundError:
            self._refuse(path, "is missing")
        except (OSError, ValueError, MemoryError) as error:
            self._refuse(path, f"can't be read: {first_line(error)}")

    def _refuse(self, path: str, problem: str) -> NoReturn:
        raise DamagedSample(f"{self.id}: {os.path.join(self.folder, path)} {problem}")
