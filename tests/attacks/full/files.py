"""Damaged and hostile files: none is read as whole with other contents, none runs code or takes the memory."""

from __future__ import annotations

import io
import pickle
import random
import resource
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from studies.indextts2.dataset import SampleReader
from studies.indextts2.manifest import open_manifest
from tests.attacks import test_packed_bytes
from tests.attacks.full.common import Job, Result, fork, join, last_line
from tests.attacks.test_checkpoint_bytes import DAMAGES, attack, state
from tests.attacks.test_npy_headers import CODES, npy
from trainer import DamagedSample, UserError
from trainer.checkpoint import read_checkpoint, write_checkpoint
from trainer.data import block_digests, packing

LITTLE = 1 << 29
"""Bytes by which a reader's address space may grow."""


def damage_checkpoints(job: Job) -> Result:
    write_checkpoint(state(7), job.folder / "whole.pth")
    return Result(job.size, attack(job.folder / "whole.pth", job.size))


def damage_stores(job: Job) -> Result:
    packing.NUM_PROBED, block_digests.BLOCK = 4, 1024
    result = Result(job.size)
    try:
        test_packed_bytes.test_no_damaged_store_is_read_as_whole(job.folder, job.size)
    except AssertionError as error:
        result.failures.append(str(error)[:200])
    return result


def damage_arrays(job: Job) -> Result:
    """Damage headers and values of .npy files: they have no checksum, so that values may differ, and shapes may not."""
    content, generator, result = npy(CODES), random.Random(0), Result(job.size)
    reader = SampleReader("sample-7", str(job.folder))
    for number in range(job.size):
        (job.folder / "codes.npy").write_bytes(DAMAGES[number % len(DAMAGES)](bytearray(content), generator))
        try:
            result.check(reader.ids("codes.npy", len(CODES), 1 << 60, "the codebook").shape == CODES.shape, "shape")
        except DamagedSample as error:
            result.count("refused")
            result.check("\n" not in str(error), str(error))
        except Exception as error:
            result.failures.append(f"{type(error).__name__}: {error}"[:200])
    return result


class Executed:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path, call: int) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
            (open, (str(self.path), "w")),
            (eval, (f"open({str(self.path)!r}, 'w')",)),
            (exec, (f"open({str(self.path)!r}, 'w')",)),
        ]
        return calls[self.call % len(calls)]


def bombs(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Contents that run code, or are much larger than their file."""
    for protocol in range(6):
        for call in range(3):
            content = pickle.dumps({"model": Executed(marker, call)}, protocol)
            yield f"pickle {protocol}.{call}", content
            for member in ("archive/data.pkl", "a.npy"):
                file = io.BytesIO()
                with zipfile.ZipFile(file, "w") as archive:
                    archive.writestr(member, content)
                    archive.writestr("archive/version", "3\n")
                yield f"zip with pickle {protocol}.{call} in {member}", file.getvalue()
    array = io.BytesIO()
    np.save(array, np.array([Executed(marker, 0)], object), allow_pickle=True)
    yield "npy of objects", array.getvalue()
    for member in ("archive/data.pkl", "archive/data/0", "a.npy"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("archive/version", "3\n")
            archive.writestr(member, bytes(1 << 30))
        yield f"zip bomb in {member}", file.getvalue()
    yield "deep pickle", b"\x80\x04" + b"(" * 1_000_000 + b"."
    yield "huge header", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{'descr': '<i8', 'shape': (2**60,)}"


def readers(folder: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """What reads a file of a user: its name in the folder, and the reader."""
    (folder / "whole.pth").write_bytes((folder.parent / "whole.pth").read_bytes())
    import sentencepiece

    def tokenizer() -> None:
        try:
            sentencepiece.SentencePieceProcessor(model_file=str(folder / "t.model"))
        except (RuntimeError, OSError) as error:
            raise UserError("no tokenizer") from error

    def store() -> None:
        (folder / "data.packed").mkdir()
        (folder / "header.json").rename(folder / "data.packed" / "header.json")
        test_packed_bytes.opened(test_packed_bytes.Samples(), folder)

    return {
        "checkpoint": ("a.pth", lambda: read_checkpoint(folder / "a.pth")),
        "mapped checkpoint": ("a.pth", lambda: read_checkpoint(folder / "a.pth", mmap=True)),
        "digest": ("whole.pth.sha256", lambda: read_checkpoint(folder / "whole.pth")),
        "array": ("a.npy", lambda: SampleReader("s", str(folder)).ids("a.npy", 20, 1 << 60, "codes")),
        "store": ("header.json", store),
        "tokenizer": ("t.model", tokenizer),
        "manifest": ("m.jsonl", lambda: open_manifest(str(folder / "m.jsonl"))),
    }


def hostile_files(job: Job) -> Result:
    """Give each content to each reader, with little memory."""
    result, marker = Result(), job.folder / "executed"
    for call in range(3):
        join(fork(partial(pickle.loads, pickle.dumps(Executed(marker, call))), job.folder / "output"))
        result.check(marker.exists(), f"call {call} does nothing, even to a careless reader")
        marker.unlink(missing_ok=True)
    torch.save(state(7), job.folder / "whole.pth")
    every = 1 if job.size >= 30 else 20
    for name, content in list(bombs(marker))[::every]:
        for number, reader in enumerate(
            ("checkpoint", "mapped checkpoint", "digest", "array", "store", "tokenizer", "manifest")
        ):
            folder = job.folder / f"{result.attempts}-{number}"
            folder.mkdir()

            def read(folder: Path = folder, reader: str = reader, content: bytes = content) -> None:
                file, call = readers(folder)[reader]
                (folder / file).write_bytes(content)
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + LITTLE, used + LITTLE))
                try:
                    call()
                except DamagedSample as error:
                    raise UserError(str(error)) from None

            code = join(fork(read, job.folder / "output"))
            result.attempts += 1
            result.check(code in (0, 2), f"{name} as {reader}: {code}, {last_line(job.folder / 'output')}")
            result.check(not marker.exists(), f"{name} as {reader} was executed")
            marker.unlink(missing_ok=True)
        if not job.in_time:
            break
    return result
