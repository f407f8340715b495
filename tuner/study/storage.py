"""The storage of studies: SQLite by default, set up so that several processes can share it."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from sqlalchemy import event

from trainer.clock import clock
from trainer.errors import UserError, first_line
from tuner.study.optuna_internals import backend_of

T = TypeVar("T")

log = logging.getLogger(__name__)

DEFAULT_URL = "sqlite:///runs/tuner.db"
OPEN_TIMEOUT_S = 60
BUSY_TIMEOUT_S = 600
"""Seconds that a statement waits for a locked SQLite file."""
PATIENCE_S = 20.0
"""Seconds between two warnings that it waits."""

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


def storage_url(url: str | None = None) -> str:
    """The URL of the storage in use: the given one, else $TUNER_STORAGE, else SQLite under runs/."""
    return url or os.environ.get("TUNER_STORAGE") or DEFAULT_URL


def open_storage(url: str | None = None, *, must_exist: bool = False) -> RDBStorage:
    """Open the storage at an SQLAlchemy URL, and create its schema if it has none.

    SQLite gets a write-ahead log (a report costs a quarter of the time, readers and the writer do not block
    each other) and waits for a locked database instead of failing.

    Raises:
        UserError: The URL is none, is in memory, can't be reached, or `must_exist` and there is no database. Later,
            by whatever uses the storage, `StorageFailure`.
    """
    url = storage_url(url)
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise UserError(f"storage {url}: not a database URL; use for example {DEFAULT_URL}.") from None
    if in_memory(parsed):
        raise UserError(f"storage {url}: in memory it ends with this command: use a file, such as {DEFAULT_URL}.")
    # Optuna logs studies and trials itself, between our own lines.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            return _open_sqlite(url, Path(parsed.database), must_exist)
        return RDBStorage(url)
    except (
        OSError,
        ImportError,
        RuntimeError,
        sqlalchemy.exc.SQLAlchemyError,
        StorageInternalError,
    ) as error:
        reason = first_line(error.__cause__ or error)
        if found := remedy(reason, Path(parsed.database or "")):
            raise UserError(f"storage {url}: can't be opened ({reason}): {found}.") from error
        raise UserError(f"storage {url}: can't be opened ({reason}); check the URL and the server.") from error


def in_memory(url: sqlalchemy.URL) -> bool:
    """Whether this is an SQLite database in memory."""
    if url.get_backend_name() != "sqlite":
        return False
    return url.database in (None, "", ":memory:") or "memory" in url.query.get("mode", "")


def remedy(reason: str, file: Path) -> str | None:
    """The remedy for an error of SQLite; None for an error that is a defect of this program."""
    return next((text.format(file=file) for words, text in REMEDIES.items() if words in reason), None)


def opened(storage: BaseStorage | str | None) -> BaseStorage:
    """A storage as it is, or the one at a URL. Raises UserError as `open_storage` does."""
    return storage if isinstance(storage, BaseStorage) else open_storage(storage)


def for_other_processes(storage: BaseStorage) -> BaseStorage | str:
    """The storage in a form that another process can open: a URL, or an object that can be pickled.

    Raises:
        UserError: It is in this process's memory.
    """
    storage = backend_of(storage)
    if isinstance(storage, InMemoryStorage) or (isinstance(storage, RDBStorage) and ":memory:" in storage.url):
        raise UserError(f"several workers can't share a storage in memory: use a database, such as {DEFAULT_URL}.")
    return storage.url if isinstance(storage, RDBStorage) else storage


def _open_sqlite(url: str, path: Path, must_exist: bool) -> RDBStorage:
    if must_exist and not path.exists():
        raise UserError(f"storage {url}: no such database; launch a study first, or give --storage.")
    if path.is_dir():
        raise UserError(f"storage {url}: {path} is a folder: name a file in it, such as {url.rstrip('/')}/tuner.db.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Optuna creates its schema table by table, so two processes must not do it at once.
    with FileLock(path.with_name(path.name + ".lock"), timeout=OPEN_TIMEOUT_S):
        connect_args = {"timeout": PATIENCE_S, "factory": _PatientConnection}
        storage = RDBStorage(url, engine_kwargs={"connect_args": connect_args})
        _use_wal(storage)
    _explain_failures(storage, url, path)
    _refuse_other_files(storage, url, path)
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


def load_study(name: str, storage: BaseStorage) -> optuna.Study:
    """The study of that name.

    Raises:
        UserError: There is none; the message names those there are.
    """
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = ", ".join(optuna.get_all_study_names(storage)) or "none yet"
        raise UserError(f"study {name}: not in the storage (there: {names}).") from None


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
