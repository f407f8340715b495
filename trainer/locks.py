"""A run directory in use is locked. Without torch, so that looking at a study does not wait for its import."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import UserError


@contextmanager
def locked(run_dir: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a run directory, so that no second process trains in it. Freed with the process, however it ends.

    Raises:
        UserError: Another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / name)
    try:
        # Who looks whether it is locked holds it for a moment.
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(f"{run_dir} is in use by another process: wait for it or stop it.") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(run_dir: Path, name: str = ".lock") -> bool:
    """Whether a process holds `run_dir` at this moment."""
    with suppress(FileNotFoundError), open(run_dir / name, "rb") as file:
        try:
            # Shared, so that two who look do not take each other for the holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
