"""One checkpoint file: a kill leaves the old one or the whole new one, and its digest is checked when it is read.

A checkpoint is what `torch.save` writes, and its SHA-256 in the comment of the zip archive, the last 64 bytes. Earlier
versions wrote the digest to a file beside it, `NAME.sha256`.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.host_buffer import HostBuffer
from trainer.units import format_bytes

TEMPORARY = ".tmp"
"""Suffix of a file that is being written."""

_SEAL = b"sha256:"
_DIGEST_BYTES = 64
_END = b"PK\x05\x06"
"""The last record of a zip archive begins so; its last two bytes are the length of the comment that follows."""
_END_BYTES = 22

# Errors of torch.load for files that are truncated or no checkpoints.
_DAMAGE = (
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    ImportError,
    struct.error,
)


class UnreadableFile(UserError):
    """The disk refused to read a file: it may be whole."""


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dictionaries, lists and tuples."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tree))


def snapshot(tree: Any, buffer: HostBuffer | None = None) -> Any:
    """A copy of `tree` in host memory that later steps can't change.

    Args:
        buffer: Takes the tensors of a GPU; they are valid after its `wait`.
    """
    if isinstance(tree, Tensor):
        kept = None if buffer is None else buffer.copy(tree)
        return tree.detach().to("cpu", copy=True) if kept is None else kept
    if isinstance(tree, dict):
        return {key: snapshot(value, buffer) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(snapshot(value, buffer) for value in tree)
    return copy.deepcopy(tree)


def digest_path(path: Path) -> Path:
    """The file in which earlier versions kept the digest of a checkpoint."""
    return path.with_name(path.name + ".sha256")


def write_checkpoint(state: Any, path: Path) -> None:
    """Write `state` to `path` so that at every moment `path` is absent, the old file, or the whole new one.

    Raises:
        UserError: The disk is full or can't be written to.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with _explain_errors(path, num_bytes(state)):
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
        remove(digest_path(path))


@contextmanager
def _explain_errors(path: Path, size: int) -> Iterator[None]:
    """Turns the disk's errors in writing `path` into a UserError, and removes what was written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # the next start removes it
            remove(path.with_name(path.name + TEMPORARY))
        if (reason := explain_write_error(error)) is None:
            raise
        remedy = f"it needs {format_bytes(size)}; free some space"
        if isinstance(error, IsADirectoryError):
            remedy = "remove the folder of that name"
        raise UserError(
            f"{path} could not be written ({reason}): {remedy} and start again, the run continues from its last "
            "checkpoint."
        ) from error


def explain_write_error(error: OSError | RuntimeError) -> str | None:
    """Returns why the disk refused a write; None for an error of another kind."""
    # torch.save reports a failed write as a RuntimeError of its zip writer, of two kinds.
    if isinstance(error, RuntimeError) and not re.search(r"PytorchStreamWriter|inline_container", str(error)):
        return None
    return first_line(error.__context__ if isinstance(error.__context__, OSError) else error)


def link_checkpoint(source: Path, target: Path) -> None:
    """Make `target` another name of the checkpoint `source`, or a copy if the file system has no hard links.

    As `write_checkpoint`, it leaves the old file or the whole new one. No checkpoint is ever written in place.

    Raises:
        UserError: The disk is full or can't be written to.
    """
    if target.exists() and target.samefile(source):
        return
    with _explain_errors(target, source.stat().st_size):
        # Without a digest beside it a file is checked by its own; with that of another file it would count as damaged.
        remove(digest_path(target))
        _link(source, target)
        if digest_path(source).is_file():
            _link(digest_path(source), digest_path(target))


def is_checkpoint(path: Path) -> bool:
    """Whether this trainer has written the file."""
    if digest_path(path).is_file():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return _read_seal(file) is not None


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, after checking its digest, if any. Never runs code from the file.

    Args:
        mmap: Map the tensors from the file, so that they cost no memory until they are read.

    Raises:
        UserError: The file is missing, damaged, or no checkpoint.
        UnreadableFile: The disk refused to read it.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path.")
    try:
        if problem := _find_damage(path):
            raise UserError(f"checkpoint {path} is damaged ({problem}).")
        # Only torch's zip format can be mapped; the older format has to be read as a whole.
        mmap = mmap and zipfile.is_zipfile(path)
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is damaged, or holds code or objects besides tensors; nothing in it was "
            "executed: save the state dict alone."
        ) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to a place that a damaged file names
            raise UnreadableFile(f"checkpoint {path} can't be read ({error.strerror}): check its disk.") from error
        raise UserError(f"checkpoint {path} is damaged or no checkpoint ({first_line(error)}).") from error
    except _DAMAGE as error:
        raise UserError(f"checkpoint {path} is damaged or no checkpoint ({first_line(error)}).") from error
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {path} holds no weights by name but a {type(state).__name__}.")
    return dict(state)


def remove(path: Path) -> None:
    """Remove a file if there is one; a folder of that name stays."""
    if path.is_file() or path.is_symlink():
        path.unlink(missing_ok=True)


def _seal(file: BinaryIO) -> None:
    """Append the digest of all bytes before it, as the archive's comment."""
    file.seek(-2, os.SEEK_END)
    file.write((len(_SEAL) + _DIGEST_BYTES).to_bytes(2, "little") + _SEAL)
    file.flush()
    digest = _digest(file, os.fstat(file.fileno()).st_size)
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def _read_seal(file: BinaryIO) -> str | None:
    """The digest at the end of a file; None if there is none."""
    length = _END_BYTES + len(_SEAL) + _DIGEST_BYTES
    if os.fstat(file.fileno()).st_size < length:
        return None
    file.seek(-length, os.SEEK_END)
    end = file.read(length)
    if end[: len(_END)] != _END or end[_END_BYTES : _END_BYTES + len(_SEAL)] != _SEAL:
        return None
    return end[-_DIGEST_BYTES:].decode(errors="replace")


def _find_damage(path: Path) -> str:
    """Why the bytes of a file are not those that were written; empty if they are, or if nothing tells."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if digest := _read_seal(file):
            return "" if _digest(file, size - _DIGEST_BYTES) == digest else "its digest does not match"
        # A power cut may leave an empty digest file, which counts as none.
        beside = digest_path(path)
        if beside.is_file() and (written := beside.read_text(errors="replace").split()):
            return "" if _digest(file, size) == written[0] else "its digest does not match"
        file.seek(0)
        return _test_archive(file, size) if file.read(2) == b"PK" else ""


def _digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of the first `size` bytes."""
    file.seek(0)
    hasher = hashlib.sha256()
    while size and (part := file.read(min(size, 1 << 20))):
        hasher.update(part)
        size -= len(part)
    return hasher.hexdigest()


def _test_archive(file: BinaryIO, size: int) -> str:
    """Check a zip archive without a digest by the checksums of its members."""
    file.seek(max(0, size - _END_BYTES))
    end = file.read()
    if end[: len(_END)] != _END or end[-2:] != b"\0\0":
        return "its end is missing"
    try:
        with zipfile.ZipFile(file) as archive:
            # torch.serialization.set_crc32_options(False) stores zeros.
            has_checksums = any(member.CRC for member in archive.infolist())
            damaged = archive.testzip() if has_checksums else None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, *_DAMAGE) as error:
        return first_line(error)
    return f"{damaged} in it has another checksum" if damaged else ""


def _link(source: Path, target: Path) -> None:
    temporary = target.with_name(target.name + TEMPORARY)
    remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    _rename(temporary, target)


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    # Until the folder is on the disk too, a power cut may take the new name back.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that flush no folders
            raise
    finally:
        os.close(folder)
