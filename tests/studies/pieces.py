"""SentencePiece models with chosen pieces, without training one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

UNKNOWN, CONTROL, BYTE = 2, 3, 6
"""Types of pieces in SentencePiece's file."""


def write_pieces(path: Path, pieces: Sequence[str], *, byte_fallback: bool = False) -> None:
    """Write a unigram model: <s>, </s> and <unk>, the 256 bytes if wanted, then `pieces`."""
    typed = [("<s>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)]
    typed += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] if byte_fallback else []
    # Longer pieces score higher, as a trained model's would.
    scored = [(piece, kind, 0.0) for piece, kind in typed] + [(piece, 1, -10.0 / len(piece)) for piece in pieces]
    content = b"".join(_field(1, _piece(*entry)) for entry in scored)
    # trainer_spec: unigram, byte_fallback, and the numbers of unk, bos, eos and pad.
    numbers = {3: 1, 35: int(byte_fallback), 40: 2, 41: 0, 42: 1, 43: 2**64 - 1}
    trainer = b"".join(_varint(key << 3) + _varint(value) for key, value in numbers.items())
    path.write_bytes(content + _field(2, trainer))


def _piece(text: str, kind: int, score: float) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])
