"""Reads the lines and files of manifests into a few numbers a line, for `data_checks`.

A line costs 25 bytes of memory, and some 0.25 ms of a busy core. Many lines are read by several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from studies.indextts2.dataset import SampleReader
from studies.indextts2.manifest import Manifest, open_manifest, sample_paths
from studies.indextts2.model import NUM_CONDITION, GPTConfig
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
        self._spelled: set[str] = set()

    def find_unspelled(self, text: str) -> list[str]:
        """The characters of a text that have no piece."""
        left = sorted(set(text) - self._spelled)
        self._spelled.update(char for char in left if char.isspace() or self.spell(char) == "pieces")
        return [char for char in left if char not in self._spelled]

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
    read, texts, codes = [], [], []
    for number, record in enumerate(_records(manifest, block.rows)):
        _count_names(found, record, spelling)
        line, prompt, target = found.lines[number], record.get("prompt_id"), record.get("target_id")
        found.num_paired += None not in (prompt, target)
        line["flags"] = SELF_PAIR if prompt == target is not None else 0
        try:
            text, speech = _read(record, manifest, block.config)
        except DamagedSample:
            line["flags"] |= DAMAGED
            continue
        read.append(number)
        texts.append(text)
        codes.append(speech)
        _, _, condition, emo_vec = sample_paths(record)
        line["text"], line["speech"] = _hash(text.tobytes()), _hash(speech.tobytes())
        line["pair"] = _hash(line["text"].tobytes() + line["speech"].tobytes() + f"{condition}\n{emo_vec}".encode())
    if read:
        _judge_codes(found.lines["flags"], np.array(read), codes)
        if spelling:
            _judge_text(found, np.array(read), texts, spelling)
    return found


def _records(manifest: Manifest, rows: range | Sequence[int]) -> Iterator[dict[str, Any]]:
    """The lines, in one read where they follow each other."""
    if not isinstance(rows, range):
        yield from map(manifest.record, rows)
        return
    offsets = manifest.offsets[rows.start : rows.stop + 1].tolist()
    with open(manifest.path, "rb") as file:
        file.seek(offsets[0])
        content = file.read(offsets[-1] - offsets[0])
    for start, end in pairwise(offsets):
        yield json.loads(content[start - offsets[0] : end - offsets[0]])


def _starts(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, arrays)])[:-1]


def _judge_codes(flags: np.ndarray, numbers: np.ndarray, codes: Sequence[np.ndarray]) -> None:
    """Flag lines whose codes nearly all equal the one before. All lines at once: a call of numpy costs microseconds."""
    lengths, starts, joined = np.array(list(map(len, codes))), _starts(codes), np.concatenate(codes)
    repeats = np.append(False, joined[1:] == joined[:-1])
    repeats[starts] = False
    still = np.add.reduceat(repeats, starts, dtype=np.int64) >= STILL_SHARE * (lengths - 1)
    flags[numbers[still & (lengths > 1)]] |= STILL


def _judge_text(found: Scan, numbers: np.ndarray, texts: Sequence[np.ndarray], spelling: Spelling) -> None:
    """Count tokens, characters and unknown tokens, and flag the lines that have one."""
    ids = np.concatenate(texts)
    unknown = ids == spelling.unknown
    found.lines["flags"][numbers[np.add.reduceat(unknown, _starts(texts), dtype=np.int64) > 0]] |= UNKNOWN
    found.num_tokens, found.num_unknown = len(ids), int(np.count_nonzero(unknown))
    # A vocabulary larger than the tokenizer's: its other ids spell nothing.
    found.num_chars = int(spelling.num_chars[ids[ids < len(spelling.num_chars)]].sum())


def _read(record: dict[str, Any], manifest: Manifest, config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Text ids and codes. Of the two files of the prompt, which are 30 times as large, only the size is looked at."""
    read = SampleReader(str(record["id"]), str(manifest.path.parent))
    text, codes, condition, emo_vec = sample_paths(record)
    read.check_size(condition, NUM_CONDITION * config.model_dim)
    read.check_size(emo_vec, config.model_dim)
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
    if spelling is None:
        return
    for char in spelling.find_unspelled(text):
        (found.unknown_chars if spelling.spell(char) == "unknown" else found.byte_chars)[char] += text.count(char)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
