"""SQLite, set up so that several processes can share a file, and its errors as one line each."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import event

from trainer.clock import clock
from trainer.errors import UserError
from trainer.locks import PATIENCE_S, one_at_a_time

T = TypeVar("T")

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 600
"""Seconds that a statement waits for a locked SQLite file."""

REMEDIES = {
    "database is locked": "another process holds it for too long: end that one (fuser {file} names it), then run this "
    "again",
    "disk I/O error": "look at that disk (dmesg, df), then run this again",
    "database or disk is full": "free some space on that disk, then run this again",
    "readonly database": "make it and its folder writable (chmod u+w), then run this again",
    "malformed": "restore a backup of it, or rescue what can be read: sqlite3 {file} .recover | sqlite3 NEW.db",
}
"""Remedies for errors of SQLite, by a part of their text."""


class StorageFailure(UserError, StorageInternalError):
    """An SQLite file is locked for long, damaged, gone, or its disk is full.

    One line for whoever ran a command; and Optuna's own type for what outlives a storage that can't be written.
    """


class _PatientCursor(sqlite3.Cursor):
    """Waits longer for a locked file than SQLite's own time limit, and logs that it waits."""

    def execute(self, *arguments: Any) -> _PatientCursor:
        return _wait_while_locked(super().execute, *arguments)

    def executemany(self, *arguments: Any) -> _PatientCursor:
        return _wait_while_locked(super().executemany, *arguments)


class _PatientConnection(sqlite3.Connection):
    def cursor(self, factory: Any = _PatientCursor) -> Any:
        return super().cursor(factory)

    def commit(self) -> None:
        _wait_while_locked(super().commit)


def _wait_while_locked(call: Callable[..., T], *arguments: Any) -> T:
    since = time.monotonic()
    while True:
        try:
            return call(*arguments)
        except sqlite3.OperationalError as error:
            waited = time.monotonic() - since
            # Its extended codes, such as that of a stale snapshot, are not solved by waiting.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or waited > BUSY_TIMEOUT_S:
                raise
            log.warning("waiting for the database, which another process has locked for %s", clock(waited))


def in_memory(url: sqlalchemy.URL) -> bool:
    """Whether this is an SQLite database in memory."""
    if url.get_backend_name() != "sqlite":
        return False
    return url.database in (None, "", ":memory:") or "memory" in url.query.get("mode", "")


def remedy(reason: str, file: Path) -> str | None:
    """The remedy for an error of SQLite; None for an error that is a defect of this program."""
    return next((text.format(file=file) for words, text in REMEDIES.items() if words in reason), None)


def open_sqlite(url: str, path: Path, must_exist: bool) -> RDBStorage:
    if must_exist and not path.exists():
        raise UserError(f"storage {url}: no such database; launch a study first, or give --storage.")
    if path.is_dir():
        raise UserError(f"storage {url}: {path} is a folder: name a file in it, such as {url.rstrip('/')}/tuner.db.")
    if must_exist and not os.access(path.parent, os.W_OK):
        return _open_to_read(url, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As SQLAlchemy does: the working directory may change.
    path = path.absolute()
    # Optuna creates its schema table by table, so two processes must not do it at once.
    with one_at_a_time(path.with_name(path.name + ".lock")):
        connect_args = {"timeout": PATIENCE_S, "factory": _PatientConnection}
        storage = RDBStorage(url, engine_kwargs={"connect_args": connect_args})
        _use_wal(storage)
    _explain_failures(storage, url, path)
    _refuse_other_files(storage, url, path)
    return storage


def _open_to_read(url: str, path: Path) -> RDBStorage:
    """A file in a folder that can't be written to: SQLite can make no lock and no log there. What writes later is
    refused in one line."""
    # Without a log beside it nobody writes: then it can be read without locks.
    path = path.absolute()
    wal = path.with_name(path.name + "-wal")
    is_alone = not wal.exists()
    source = f"file:{quote(str(path))}?mode=ro{'&immutable=1' if is_alone else ''}"
    storage = RDBStorage(url, engine_kwargs={"creator": lambda: sqlite3.connect(source, uri=True, timeout=PATIENCE_S)})
    _explain_failures(storage, url, path)

    def check(*_: Any) -> None:
        if is_alone and wal.exists():
            raise StorageFailure(f"storage {url}: another process writes to it since: run this again.")

    event.listen(storage.engine, "before_cursor_execute", check)
    return storage


def _explain_failures(storage: RDBStorage, url: str, path: Path) -> None:
    """Raise `StorageFailure`, one line, for a locked or damaged file, in place of Optuna's error for defects."""

    def explain(context: sqlalchemy.engine.ExceptionContext) -> StorageFailure | None:
        reason = str(context.original_exception)
        found = remedy(reason, path)
        return StorageFailure(f"storage {url}: {reason}: {found}.") if found else None

    event.listen(storage.engine, "handle_error", explain)


def _refuse_other_files(storage: RDBStorage, url: str, path: Path) -> None:
    """Refuse to go on with a file that was deleted or replaced: SQLite would write to one that has no name any more."""
    before = path.stat()

    def check(*_: Any) -> None:
        try:
            now = path.stat()
        except FileNotFoundError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            raise StorageFailure(
                f"storage {url}: the file was {'replaced' if now else 'deleted'} while it was in use: put it back, or "
                "launch again, which begins with what is there now."
            )

    event.listen(storage.engine, "before_cursor_execute", check)


def _use_wal(storage: RDBStorage) -> None:
    def set_pragmas(connection: Any, _: Any) -> None:
        # With a write-ahead log, NORMAL loses at most the last commits of a power cut, never the database.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", set_pragmas)
    # Close the connections that were made before this listener.
    storage.engine.dispose()
    with storage.engine.connect():
        """The first connection switches the file to the write-ahead log."""
