"""Locks of run directories and other files. Imports no torch, so that viewing a study does not wait for it."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.clock import clock
from trainer.errors import UserError

TURN_TIMEOUT_S = 600
PATIENCE_S = 20.0
"""Seconds between two warnings that this process waits for another one."""

log = logging.getLogger(__name__)


@contextmanager
def lock_folder(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Lock a folder, such as a run directory against a second training. The kernel releases it when the process ends.

    Raises:
        UserError: Another process holds it, or it can't be locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name)
    try:
        # `is_locked` in another process holds it for a moment.
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait for it or stop it.") from None
    except OSError as error:
        raise _not_lockable(folder / name, error) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path, name: str = ".lock") -> bool:
    """Whether a process holds the lock of `folder` at this moment."""
    with suppress(FileNotFoundError, IsADirectoryError), open(folder / name, "rb") as file:
        try:
            # A shared lock, so that two callers of `is_locked` do not see each other as holders.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for the lock of a file that each process holds for a moment, with a warning now and then.

    Raises:
        UserError: Other processes have held it for ten minutes, or it can't be locked.
    """
    lock, since = FileLock(path), time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=PATIENCE_S)
        except Timeout:
            if not path.exists():
                raise UserError(f"{path} can't be created: name another folder.") from None
            waited = time.monotonic() - since
            if waited > TURN_TIMEOUT_S:
                # The holder may itself wait, such as for a locked database.
                raise UserError(
                    f"{path} has been held by other processes for {clock(waited)}: end the one that hangs "
                    f"(fuser {path} names it; its output says what it waits for), then run this again."
                ) from None
            log.warning("waiting for %s, which other processes have held for %s", path, clock(waited))
        except OSError as error:
            raise _not_lockable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _not_lockable(path: Path, error: OSError) -> UserError:
    remedy = "remove it, or name another folder" if path.exists() else "name another folder"
    return UserError(f"{path} can't be locked ({error.strerror}): {remedy}.")
