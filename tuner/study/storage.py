"""The storage of studies: an SQLite file by default, a database on a server, or Optuna's gRPC proxy before one."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage

from trainer.errors import UserError, first_line
from tuner.study import servers
from tuner.study.optuna_internals import backend_of, engine_of
from tuner.study.servers import ServerStorage, hide_password, open_proxy, open_server
from tuner.study.sqlite import in_memory, open_sqlite, remedy

log = logging.getLogger(__name__)

DEFAULT_URL = "sqlite:///runs/tuner.db"


def storage_url(url: str | None = None) -> str:
    """The URL of the storage in use: the given one, else $TUNER_STORAGE, else SQLite under runs/."""
    return url or os.environ.get("TUNER_STORAGE") or DEFAULT_URL


def open_storage(url: str | None = None, *, must_exist: bool = False) -> BaseStorage:
    """Open the storage at an SQLAlchemy URL, and create its schema if it has none.

    SQLite gets a write-ahead log (a report costs a quarter of the time, readers and the writer do not block
    each other). A locked file and a server that is away are waited for.

    Args:
        url: An SQLAlchemy URL, or grpc://HOST:PORT of `tuner storage serve`.

    Raises:
        UserError: The URL is none, is in memory, can't be reached, or `must_exist` and there is no database. Later,
            by whatever uses the storage, `StorageFailure`.
    """
    url = storage_url(url)
    shown = hide_password(url)
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        raise UserError(f"storage {shown}: not a database URL; use for example {DEFAULT_URL}.") from None
    if in_memory(parsed):
        raise UserError(f"storage {shown}: in memory it ends with this command: use a file, such as {DEFAULT_URL}.")
    # Optuna logs studies and trials itself, between our own lines.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            return open_sqlite(url, Path(parsed.database), must_exist)
        return open_proxy(parsed) if parsed.drivername == "grpc" else open_server(parsed)
    except (
        OSError,
        ImportError,
        RuntimeError,
        sqlalchemy.exc.SQLAlchemyError,
        StorageInternalError,
    ) as error:
        reason = first_line(error.__cause__ or error)
        found = remedy(reason, Path(parsed.database or "")) or "check the URL and the server"
        if isinstance(error, ImportError):
            extra = {"grpc": "proxy", "postgresql": "postgres", "postgresql+psycopg": "postgres"}.get(parsed.drivername)
            found = f"pip install 'prodigy-tuner[{extra}]'" if extra else "install the driver of that database"
        raise UserError(f"storage {shown}: can't be opened ({reason}): {found}.") from error


def opened(storage: BaseStorage | str | None) -> BaseStorage:
    """A storage as it is, or the one at a URL. Raises UserError as `open_storage` does."""
    return storage if isinstance(storage, BaseStorage) else open_storage(storage)


def open_patiently(storage: BaseStorage | str) -> BaseStorage:
    """As `opened`, in the middle of a launch: a server that is away is waited for."""
    since = time.monotonic()
    while True:
        try:
            return opened(storage)
        except UserError:
            is_server = isinstance(storage, str) and not storage.startswith("sqlite")
            if not is_server or time.monotonic() - since > servers.OUTAGE_S:
                raise
        log.warning("waiting for the storage %s", hide_password(str(storage)))
        time.sleep(servers.WARN_EVERY_S)


def for_other_processes(storage: BaseStorage) -> BaseStorage | str:
    """The storage in a form that another process can open: a URL, or an object that can be pickled.

    Raises:
        UserError: It is in this process's memory.
    """
    storage = backend_of(storage)
    if isinstance(storage, InMemoryStorage) or (isinstance(storage, RDBStorage) and ":memory:" in storage.url):
        raise UserError(f"several workers can't share a storage in memory: use a database, such as {DEFAULT_URL}.")
    return storage.url if isinstance(storage, RDBStorage) else storage


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


def artifact_dir(storage: BaseStorage, run_root: Path = Path("runs")) -> Path:
    """The folder of a storage's artifacts: beside an SQLite file, else under the run root."""
    url = database_url(storage)
    beside_file = url is not None and url.get_backend_name() == "sqlite" and url.database
    # No study can have a name that begins with a dot.
    return (Path(beside_file).parent if beside_file else run_root).resolve() / ".artifacts"


def database_url(storage: BaseStorage) -> sqlalchemy.URL | None:
    """The URL of a storage's database; None for a storage in memory."""
    engine = engine_of(storage)
    return None if engine is None else engine.url


CLOCKS = {
    "sqlite": "SELECT strftime('%s', 'now')",
    "postgresql": "SELECT extract(epoch FROM now())",
    "mysql": "SELECT unix_timestamp()",
}


def database_time(storage: BaseStorage) -> float:
    """Seconds since 1970 on the database's clock, which is one for all machines; behind a proxy on this machine's."""
    engine = engine_of(storage)
    if engine is None or engine.dialect.name not in CLOCKS:
        return time.time()
    statement, backend = CLOCKS[engine.dialect.name], backend_of(storage)
    if isinstance(backend, ServerStorage):
        return float(backend.read_value(statement))
    with engine.connect() as connection:
        return float(connection.exec_driver_sql(statement).scalar_one())
