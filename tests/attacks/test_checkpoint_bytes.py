"""Attacks on checkpoint files: damaged bytes, and a kill at every call that changes the folder."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Toy
from trainer import UserError
from trainer.checkpoint import Checkpoints, find_state, read_checkpoint, write_checkpoint
from tuner.promotion.link_checkpoint import link_checkpoints


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((3000,), float(step)), "bias": torch.arange(50.0) + step}}


def is_whole(found: dict[str, Any], step: int) -> bool:
    expected = state(step)["model"]
    return found["step"] == step and all(torch.equal(found["model"][name], expected[name]) for name in expected)


def flip(content: bytearray, random: random.Random) -> bytes:
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def zero(content: bytearray, random: random.Random) -> bytes:
    start, length = random.randrange(len(content)), random.choice([1, 16, 512])
    content[start : start + length] = bytes(len(content[start : start + length]))
    return bytes(content)


def cut(content: bytearray, random: random.Random) -> bytes:
    return bytes(content[: random.choice([random.randrange(len(content)), len(content) - random.randrange(1, 100)])])


def swap(content: bytearray, random: random.Random) -> bytes:
    one, other = (random.randrange(len(content) - 64) for _ in range(2))
    content[one : one + 64], content[other : other + 64] = content[other : other + 64], content[one : one + 64]
    return bytes(content)


def grow(content: bytearray, random: random.Random) -> bytes:
    return bytes(content) + random.randbytes(random.choice([1, 22, 64, 200]))


DAMAGES = [flip, zero, cut, swap, grow]


def attack(whole: Path, times: int) -> list[str]:
    """The damages that were read as a whole checkpoint."""
    content, generator, missed = whole.read_bytes(), random.Random(0), []
    for number in range(times):
        damage: Callable[[bytearray, random.Random], bytes] = DAMAGES[number % len(DAMAGES)]
        damaged = damage(bytearray(content), generator)
        if damaged == content:
            continue
        path = whole.with_name("damaged.pth")
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            missed.append(f"{damage.__name__} {number}: {'whole' if is_whole(found, 7) else 'other values'}")
    return missed


@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_is_read_as_whole(tmp_path: Path, times: int) -> None:
    write_checkpoint(state(7), tmp_path / "whole.pth")
    assert attack(tmp_path / "whole.pth", times) == []
    # Nor in files of torch alone, such as weights of other programs, by the checksums of their zip archive.
    torch.save(state(7), tmp_path / "torch.pth")
    assert is_whole(read_checkpoint(tmp_path / "torch.pth"), 7)
    content = bytearray((tmp_path / "torch.pth").read_bytes())
    content[content.index(torch.full((4,), 7.0).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "torch.pth").write_bytes(content)
    with pytest.raises(UserError, match="another checksum"):
        read_checkpoint(tmp_path / "torch.pth")


def test_torch_alone_reads_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(state(7), tmp_path / "a.pth")
    for mmap in (False, True):
        with warnings.catch_warnings(action="ignore"):
            assert is_whole(torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap), 7)
    assert not list(tmp_path.glob("*.sha256"))


def test_digest_beside_a_checkpoint_of_an_earlier_version_is_checked_and_follows_its_links(tmp_path: Path) -> None:
    torch.save(state(7), tmp_path / "latest.pth")
    digest = hashlib.sha256((tmp_path / "latest.pth").read_bytes()).hexdigest()
    (tmp_path / "latest.pth.sha256").write_text(f"{digest}  latest.pth\n")
    link_checkpoints(tmp_path, tmp_path / "next", Toy())
    assert is_whole(read_checkpoint(tmp_path / "next" / "latest.pth"), 7)
    (tmp_path / "next" / "latest.pth.sha256").write_text("0" * 64)
    with pytest.raises(UserError, match="digest does not match"):
        read_checkpoint(tmp_path / "next" / "latest.pth")
    write_checkpoint(state(8), tmp_path / "latest.pth")
    assert is_whole(read_checkpoint(tmp_path / "latest.pth"), 8) and not (tmp_path / "latest.pth.sha256").exists()


class Killed(BaseException):
    """The process ends here: nothing after it is run."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Ends the block before the given call to the operating system that changes a folder or flushes a file."""
    calls = itertools.count()

    def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= call:
                raise Killed
            return real(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module, name in [(os, "replace"), (os, "link"), (os, "fsync"), (os, "unlink"), (shutil, "copyfile")]:
            patch.setattr(module, name, interrupted(getattr(module, name)))
        yield


def copy_half(source: Path, target: Path) -> None:
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: len(content) // 2])
    raise Killed


@pytest.mark.parametrize("has_links", [True, False])
def test_a_kill_at_any_call_leaves_a_state_with_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)
    for call in range(40):
        folder = tmp_path / str(call)
        folder.mkdir()
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(state(1))
        ended = False
        with killed_at(call):
            try:
                with Checkpoints(folder, keep=1) as checkpoints:
                    checkpoints._write_step(state(2), ("best.pth", "latest.pth"))
                ended = True
            except Killed:
                pass
        for path in folder.glob("*.pth"):
            content = path.read_bytes()
            path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
            with pytest.raises(UserError, match="its digest does not match"):
                read_checkpoint(path)
            path.write_bytes(content)
        found = find_state(folder)
        assert found is not None and is_whole(found[1], found[1]["step"])
        if ended:
            return
    raise AssertionError("the write never ended")


def refuse_links(source: Path, target: Path) -> None:
    raise OSError(95, "Operation not supported")


def test_a_kill_while_a_promotion_copies_begins_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trial").mkdir()
    with Checkpoints(tmp_path / "trial", keep=1) as checkpoints:
        checkpoints.save(state(4))
    monkeypatch.setattr(os, "link", refuse_links)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "copyfile", copy_half)
        link_checkpoints(tmp_path / "trial", tmp_path / "full", Toy())
    assert find_state(tmp_path / "full") is None
    link_checkpoints(tmp_path / "trial", tmp_path / "full", Toy())
    found = find_state(tmp_path / "full")
    assert found is not None and is_whole(found[1], 4)


@pytest.mark.slow
def test_real_kills_leave_whole_checkpoints(tmp_path: Path) -> None:
    for number in range(80):  # each start deletes what the one before has left half written
        process = multiprocessing.get_context("fork").Process(target=write_forever, args=(tmp_path,))
        process.start()
        time.sleep(0.1 + 0.003 * number)
        process.kill()
        process.join()
        assert list(tmp_path.glob("step_*.pth"))
        for path in tmp_path.glob("*.pth"):
            found = read_checkpoint(path)
            assert bool((found["model"]["weight"] == found["step"]).all())


def write_forever(folder: Path) -> None:
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in itertools.count(1):
            weights = torch.full((50_000,), float(step))
            checkpoints._write_step({"step": step, "model": {"weight": weights}}, ("latest.pth",))
