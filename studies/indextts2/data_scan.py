"""Reads the lines and files of manifests into a few numbers a line, for `data_checks`.

A line costs 25 bytes of memory and some 60 us of one core. Millions of lines are read by several processes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from studies.indextts2.dataset import SampleReader
from studies.indextts2.manifest import Manifest, open_manifest, sample_paths
from studies.indextts2.model import GPTConfig
from studies.indextts2.weights import load_tokenizer
from trainer.errors import DamagedSample

SELF_PAIR, DAMAGED, UNKNOWN, STILL = 1, 2, 4, 8
"""Flags of a line: prompt and target are one utterance; a file can't be used; unknown tokens; a constant code."""
STILL_SHARE = 0.9
"""Codes of which this share equals the one before are silence or a hanging recording."""
LINE = np.dtype([("pair", np.uint64), ("speech", np.uint64), ("text", np.uint64), ("flags", np.uint8)])
"""Hashes of all that the model sees of a line, of its codes, and of its text ids. 64 bits: in ten million lines two
different ones are equal by chance with a probability of 3e-6."""
BLOCK = 4096
MANY = 50_000
"""With fewer lines the start of processes costs more than it saves."""
MAX_PROCESSES = 16


@dataclass
class Scan:
    """What was read of a split, or of a part of it."""

    lines: np.ndarray = field(default_factory=lambda: np.empty(0, LINE))
    num_tokens: int = 0
    num_unknown: int = 0
    num_chars: int = 0
    """Without spaces, as the tokens spell them."""
    num_paired: int = 0
    """Lines that name prompt and target."""
    num_with_text: int = 0
    """Lines that have the text itself, as `target_text` or `text`."""
    speakers: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    unknown_chars: Counter[str] = field(default_factory=Counter)
    """Characters of the texts that the tokenizer has no piece for."""
    byte_chars: Counter[str] = field(default_factory=Counter)
    """Characters of the texts that the tokenizer spells in bytes."""

    @staticmethod
    def join(parts: Sequence[Scan]) -> Scan:
        whole = Scan(np.concatenate([part.lines for part in parts]) if parts else np.empty(0, LINE))
        for part in parts:
            for name in ("num_tokens", "num_unknown", "num_chars", "num_paired", "num_with_text"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            for name in ("speakers", "languages", "unknown_chars", "byte_chars"):
                getattr(whole, name).update(getattr(part, name))
        return whole


@dataclass(frozen=True)
class Block:
    """Lines of one manifest, for one call of `scan_block`. Small, as it goes to another process."""

    manifest: str
    """PATH or PATH::language."""
    rows: range | Sequence[int]
    config: GPTConfig
    tokenizer: Path | None


class Spelling:
    """What a tokenizer makes of characters and of ids."""

    def __init__(self, tokenizer: Path) -> None:
        self.processor = load_tokenizer(tokenizer)
        self.unknown = self.processor.unk_id()
        ids = range(self.processor.vocab_size())
        self.num_chars = np.array([self._count_chars(id) for id in ids])
        """[pieces]: characters that each piece spells, without spaces. Of a character in bytes the first counts."""
        self.spell = lru_cache(maxsize=None)(self._spell)

    def _count_chars(self, id: int) -> int:
        if self.processor.is_byte(id):
            byte = int(self.processor.id_to_piece(id)[1:-1], 16)
            return int(byte < 0x80 or byte >= 0xC0)
        if self.processor.is_control(id):
            return 0
        return 1 if id == self.unknown else len(self.processor.id_to_piece(id).replace("\u2581", ""))

    def _spell(self, char: str) -> str:
        """ "pieces", "bytes", or "unknown" of a single character."""
        ids = self.processor.encode(char)
        if self.unknown in ids:
            return "unknown"
        return "bytes" if any(map(self.processor.is_byte, ids)) else "pieces"


@lru_cache(maxsize=4)
def read_spelling(tokenizer: Path) -> Spelling:
    return Spelling(tokenizer)


@lru_cache(maxsize=64)
def _manifest(spec: str) -> Manifest:
    return open_manifest(spec)


def scan(blocks: Sequence[Block], progress: Callable[[int], None] = lambda num_lines: None) -> Iterator[Scan]:
    """Scan the blocks in order; `progress` is called with the lines of each."""
    num_lines = sum(len(block.rows) for block in blocks)
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    if num_lines < MANY or processes == 1:
        for block in blocks:
            yield scan_block(block)
            progress(len(block.rows))
        return
    # Spawned: a fork copies the locks of this process's threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for block, found in zip(blocks, pool.map(scan_block, blocks), strict=True):
            yield found
            progress(len(block.rows))


def scan_block(block: Block) -> Scan:
    """Read the lines of a block, with their text ids and codes."""
    manifest, found = _manifest(block.manifest), Scan(np.zeros(len(block.rows), LINE))
    spelling = read_spelling(block.tokenizer) if block.tokenizer else None
    texts: list[np.ndarray] = []
    for line, row in zip(found.lines, block.rows, strict=True):
        record = manifest.record(row)
        _count_names(found, record, spelling)
        prompt, target = record.get("prompt_id"), record.get("target_id")
        found.num_paired += None not in (prompt, target)
        flags = SELF_PAIR if prompt == target is not None else 0
        try:
            text, codes = _read(record, manifest, block.config)
        except DamagedSample:
            line["flags"] = flags | DAMAGED
            continue
        texts.append(text)
        if spelling and np.any(text == spelling.unknown):
            flags |= UNKNOWN
        if len(codes) > 1 and np.mean(codes[1:] == codes[:-1]) >= STILL_SHARE:
            flags |= STILL
        _, _, condition, emo_vec = sample_paths(record)
        line["text"], line["speech"] = _hash(text.tobytes()), _hash(codes.tobytes())
        line["pair"] = _hash(line["text"].tobytes() + line["speech"].tobytes() + f"{condition}\n{emo_vec}".encode())
        line["flags"] = flags
    if spelling and texts:
        # A vocabulary larger than the tokenizer's: its other ids spell nothing.
        ids = np.concatenate(texts)
        known = ids[ids < len(spelling.num_chars)]
        found.num_tokens, found.num_unknown = len(ids), int(np.count_nonzero(ids == spelling.unknown))
        found.num_chars = int(spelling.num_chars[known].sum())
    return found


def _read(record: dict[str, Any], manifest: Manifest, config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
    read, (text, codes, _, _) = SampleReader(str(record["id"]), str(manifest.path.parent)), sample_paths(record)
    return (
        read.ids(text, record["target_text_len"], config.number_text_tokens, "the vocabulary"),
        read.ids(codes, record["target_code_len"], config.num_codes, "the codebook"),
    )


def _count_names(found: Scan, record: dict[str, Any], spelling: Spelling | None) -> None:
    for counter, key in ((found.speakers, "speaker"), (found.languages, "language")):
        if (name := record.get(key)) is not None:
            counter[str(name)] += 1
    text = record.get("target_text") or record.get("text")
    if not isinstance(text, str):
        return
    found.num_with_text += 1
    for char in text if spelling else ():
        how = "pieces" if char.isspace() else spelling.spell(char)  # type: ignore[union-attr]
        if how != "pieces":
            (found.unknown_chars if how == "unknown" else found.byte_chars)[char] += 1


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
