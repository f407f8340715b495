"""Who looks whether a run directory is in use disturbs neither its users nor others who look."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.locks import is_locked, lock_folder


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
