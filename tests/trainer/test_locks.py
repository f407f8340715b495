"""Who looks whether a run directory is in use disturbs neither its users nor others who look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainer import UserError, locks
from trainer.locks import is_locked, lock_folder, one_at_a_time


class Readers:
    """Two threads that look all the time."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._ended = run_dir, threading.Event()
        self._threads = ThreadPoolExecutor(2)
        self._looks = [self._threads.submit(self._look) for _ in range(2)]

    def _look(self) -> int:
        return sum(is_locked(self._run_dir) for _ in iter(self._ended.is_set, True))

    def end(self) -> int:
        """How often they saw it held."""
        self._ended.set()
        with self._threads:
            return sum(look.result() for look in self._looks)


def test_reader_does_not_block_the_lock(tmp_path: Path) -> None:
    readers, held = Readers(tmp_path), 0
    for _ in range(100):
        # Raises where it is kept out.
        with lock_folder(tmp_path):
            held += 1
    readers.end()
    assert held == 100


def test_two_readers_do_not_take_each_other_for_the_holder(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        pass
    readers = Readers(tmp_path)
    time.sleep(0.5)
    assert readers.end() == 0


def test_who_waits_for_a_turn_is_warned_and_refused_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.05)
    monkeypatch.setattr(locks, "TURN_TIMEOUT_S", 0.1)
    path = tmp_path / "turns"
    with (
        one_at_a_time(path),
        pytest.raises(UserError, match=f"{path} has been held by other processes for .*: end the one that hangs"),
        one_at_a_time(path),
    ):
        raise AssertionError("two at a time")
    assert f"waiting for {path}, which other processes have held for" in caplog.messages[0]
    with one_at_a_time(path):
        """It is free again."""


@pytest.mark.parametrize("lock", [one_at_a_time, lambda path: lock_folder(path.parent, path.name)])
def test_folder_in_place_of_a_lock_is_refused(tmp_path: Path, lock: Callable[[Path], Any]) -> None:
    with (
        pytest.raises(UserError, match=f"{tmp_path} can't be locked .*: remove it, or name another folder"),
        lock(tmp_path),
    ):
        """It is not reached."""
