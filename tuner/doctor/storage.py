"""The database, read without changing it, and its open trials."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import psutil
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy import column, table
from sqlalchemy.pool import NullPool

from trainer.errors import first_line
from trainer.locks import is_locked
from tuner.doctor.check import Check
from tuner.doctor.disk import find_nearest_folder
from tuner.study.keys import ALIVE_KEY, HOST_KEY, RUN_DIR_KEY, trial_name
from tuner.study.record import CLAIM
from tuner.study.servers import hide_password, open_proxy
from tuner.study.sqlite import REMEDIES, in_memory, remedy
from tuner.study.storage import DEFAULT_URL, storage_url

TIMEOUT_S = 5
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse"}
LOST_AFTER = timedelta(days=1)
"""An older open trial of another machine has probably lost its process: a trial takes an hour or so."""


@dataclass(frozen=True)
class OpenTrial:
    """A trial that the storage lists as running."""

    study: str
    number: int
    started: datetime | None
    host: str | None = None
    """None: not stored yet."""
    run_dir: Path | None = None
    has_owner: bool = False
    """Its process gives signs of life: once they end, a launch takes the trial over."""

    def __str__(self) -> str:
        return f"trial {self.number} of {self.study}"


def check_storage(url: str | None = None, *, quick: bool = False) -> Check:
    """Whether the storage can be opened, has the installed Optuna's schema, and in SQLite a write-ahead log.

    Args:
        url: As given with `--storage`.
        quick: Ask no server, read not every page, and ignore the journal mode: the next writer sets it.
    """
    try:
        parsed = sqlalchemy.make_url(storage_url(url))
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        shown = hide_password(storage_url(url))
        return Check("storage", "fail", f"{shown}: not a database URL", f"use for example {DEFAULT_URL}")
    name, file = _shown(parsed), find_database_file(parsed)
    if in_memory(parsed):
        reason = f"{storage_url(url)}: a database in memory ends with this command"
        return Check("storage", "fail", reason, f"use a file, such as {DEFAULT_URL}")
    if file is None and quick:
        return Check("storage", "ok", f"{name}: not checked")
    if parsed.drivername == "grpc":
        return _check_proxy(parsed)
    if file is not None and (problem := _check_file(name, file)):
        return problem
    try:
        with open_read_only(parsed) as connection:
            return _check_content(parsed, connection, quick)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = first_line(getattr(error, "orig", None) or error)
        way_out = "check the URL and the server" if file is None else "give another --storage, or move the file away"
        way_out = (file and remedy(reason, file)) or way_out
        return Check("storage", "fail", f"{name}: can't be opened ({reason})", way_out)


def _check_proxy(url: sqlalchemy.URL) -> Check:
    try:
        open_proxy(url).close()
    except (OSError, ImportError) as error:
        return Check("storage", "fail", f"{url}: {first_line(error)}", "start it there: tuner storage serve")
    return Check("storage", "ok", f"{url}: answers")


def _shown(url: sqlalchemy.URL) -> str:
    return hide_password(url.render_as_string(hide_password=False))


def find_database_file(url: sqlalchemy.URL) -> Path | None:
    """SQLite's file; None for a server, and for a database in memory."""
    in_file = url.get_backend_name() == "sqlite" and not in_memory(url)
    return Path(url.database or "").resolve() if in_file else None


def _check_file(name: str, file: Path) -> Check | None:
    """The checks that do not open the file."""
    if file.is_dir():
        return Check(
            "storage", "fail", f"{name}: {file} is a folder", f"name a file in it: {name.rstrip('/')}/tuner.db"
        )
    folder = find_nearest_folder(file.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("storage", "fail", f"{name}: {folder} can't be written to", "give another --storage")
    if file.is_file() and not os.access(file, os.R_OK | os.W_OK):
        return Check("storage", "fail", f"{name}: the file can't be written to", "correct its permissions")
    if (kind := find_filesystem_type(folder)) in NETWORK:
        remedy = "put it on a local disk, or use PostgreSQL: --storage postgresql://..."
        return Check("storage", "warn", f"{name}: on {kind}, where SQLite's locks and log are not reliable", remedy)
    if not file.exists():
        return Check("storage", "ok", f"{name}: does not exist yet; a launch creates it")
    return None


def find_filesystem_type(folder: Path) -> str:
    """The type of a folder's filesystem, such as "ext4" or "nfs4"."""
    mounted = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    return next((mounted[place] for place in (folder, *folder.parents) if place in mounted), "")


@contextmanager
def open_read_only(url: sqlalchemy.URL) -> Iterator[sqlalchemy.Connection]:
    """A connection that creates no table and no file."""
    target, arguments = _read_only(url)
    engine = sqlalchemy.create_engine(target, **arguments)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _read_only(url: sqlalchemy.URL) -> tuple[str, dict[str, Any]]:
    """URL and arguments of an engine: read-only for SQLite, with a short timeout for a server."""
    arguments: dict[str, Any] = {"poolclass": NullPool}
    if (file := find_database_file(url)) is not None:
        source = f"file:{quote(str(file))}?mode=ro"
        return "sqlite://", arguments | {"creator": lambda: sqlite3.connect(source, uri=True, timeout=TIMEOUT_S)}
    if url.get_backend_name() in ("postgresql", "mysql", "mariadb"):
        arguments["connect_args"] = {"connect_timeout": TIMEOUT_S}
    return url.render_as_string(hide_password=False), arguments


def _check_content(url: sqlalchemy.URL, connection: sqlalchemy.Connection, quick: bool) -> Check:
    name, file = _shown(url), find_database_file(url)
    tables = sqlalchemy.inspect(connection).get_table_names()
    schema = None
    if {"alembic_version", "studies"} <= set(tables):
        schema = connection.execute(sqlalchemy.select(table("alembic_version", column("version_num")))).scalar()
    if schema is None:
        return Check("storage", "ok", f"{name}: no studies yet")
    head, known = read_schema_versions(url)
    if schema != head:
        problem = f"{name}: schema {schema}, and the installed Optuna {optuna.__version__} has {head}"
        upgrade = f"copy it, then: optuna storage upgrade --storage {name}"
        return Check("storage", "fail", problem, upgrade if schema in known else "pip install -U optuna")
    count = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table("studies"))).scalar()
    message = f"{name}: {count} {'study' if count == 1 else 'studies'}, schema {schema}"
    if quick or file is None:
        return Check("storage", "ok", message)
    # Reads every page, up to the first damaged one.
    damage = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    if damage != "ok":
        way_out = REMEDIES["malformed"].format(file=file)
        return Check("storage", "fail", f"{message}, and damaged pages ({' '.join(damage.split())})", way_out)
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode != "wal":
        problem = f"{message}, journal mode {mode}: readers and the writer block each other"
        return Check("storage", "warn", problem, "tuner status changes it to a write-ahead log")
    return Check("storage", "ok", f"{message}, write-ahead log")


def read_schema_versions(url: sqlalchemy.URL) -> tuple[str, list[str]]:
    """The installed Optuna's newest schema, and all that it supports.

    Args:
        url: Of a database with a schema: Optuna would write one into an empty database.
    """
    target, arguments = _read_only(url)
    storage = RDBStorage(target, arguments, skip_compatibility_check=True, skip_table_creation=True)
    try:
        return storage.get_head_version(), storage.get_all_versions()
    finally:
        storage.engine.dispose()


def read_open_trials(url: str | None = None, *, quick: bool = False) -> list[OpenTrial]:
    """The trials that the storage lists as running; none where it can't be read, which `check_storage` reports.

    Args:
        quick: See `check_storage`.
    """
    try:
        parsed = sqlalchemy.make_url(storage_url(url))
        file = find_database_file(parsed)
        if (quick and file is None) or (file is not None and not file.is_file()):
            return []
        with open_read_only(parsed) as connection:
            return _query_open_trials(connection)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError):  # ValueError: damaged times or JSON
        return []


def _query_open_trials(connection: sqlalchemy.Connection) -> list[OpenTrial]:
    studies = table("studies", column("study_id"), column("study_name"))
    started: sqlalchemy.ColumnClause[Any] = column("datetime_start", sqlalchemy.DateTime)
    trials = table("trials", *map(column, ("trial_id", "number", "study_id", "state")), started)
    attributes = table("trial_user_attributes", *map(column, ("trial_id", "key", "value_json")))
    owned = (attributes.c.trial_id == trials.c.trial_id) & attributes.c.key.in_([HOST_KEY, RUN_DIR_KEY, ALIVE_KEY])
    query = (
        sqlalchemy.select(studies.c.study_name, trials.c.number, started, attributes.c.key, attributes.c.value_json)
        .select_from(trials)
        .join(studies, studies.c.study_id == trials.c.study_id)
        .outerjoin(attributes, owned)
        .where(trials.c.state == "RUNNING")
        .order_by(studies.c.study_name, trials.c.number)
    )
    trials_by_key: dict[tuple[str, int], OpenTrial] = {}
    for study, number, begun, key, value in connection.execute(query):
        trial = trials_by_key.setdefault((study, number), OpenTrial(study, number, begun))
        if key == HOST_KEY:
            trial = replace(trial, host=json.loads(value))
        elif key == RUN_DIR_KEY:
            trial = replace(trial, run_dir=Path(json.loads(value)))
        elif key == ALIVE_KEY:
            trial = replace(trial, has_owner=True)
        trials_by_key[study, number] = trial
    return list(trials_by_key.values())


def find_interrupted(
    trials: list[OpenTrial], run_root: Path, *, held: Callable[[Path, str], bool] = is_locked
) -> list[OpenTrial]:
    """Open trials of this machine without a process: a launch would claim and continue them."""
    return [t for t in trials if t.host in (None, platform.node()) and not _is_held(t, run_root, held)]


def _is_held(trial: OpenTrial, run_root: Path, held: Callable[[Path, str], bool]) -> bool:
    # A full run's curve is a trial too, and its run directory has the trainer's own lock.
    lock = ".lock" if trial.study.endswith(".full") else CLAIM
    places = {trial.run_dir, (run_root / trial.study / trial_name(trial.number)).resolve()} - {None}
    return any(held(place, lock) for place in places if place is not None)


def find_lost(trials: list[OpenTrial], now: datetime | None = None) -> list[OpenTrial]:
    """Old open trials of other machines, by early versions. Whether a process runs them can't be checked from here."""
    before = (now or datetime.now()) - LOST_AFTER
    others = [t for t in trials if t.host not in (None, platform.node())]
    return [t for t in others if t.started is not None and t.started < before and not t.has_owner]


def check_interrupted(trials: list[OpenTrial], run_root: Path) -> Iterator[Check]:
    """Interrupted trials of this machine, and old open trials of other machines."""
    if left := find_interrupted(trials, run_root):
        names = ", ".join(map(str, left))
        studies = sorted({trial.study for trial in left})
        remedy = f"{' and '.join(map(_build_resume_command, studies))} to continue from the checkpoint"
        yield Check("open trials", "warn", f"{names}: listed as running, but no process runs it", remedy)
    yield from check_lost(trials)
    if trials and not left:
        yield Check("running", "ok", ", ".join(map(str, trials)))


def _build_resume_command(study: str) -> str:
    if study.endswith(".full"):
        return f"tuner promote {study.removesuffix('.full')}"
    return f"tuner launch with the spec of {study}"


def check_lost(trials: list[OpenTrial], study: str | None = None) -> Iterator[Check]:
    """Old open trials of other machines. If the machine no longer exists, the study never gets its last trial.

    Args:
        study: Check only this study.
    """
    for trial in find_lost(trials):
        if study in (None, trial.study):
            yield Check(
                f"trial {trial.number}",
                "warn",
                f"the storage lists {trial} as running on {trial.host} since {trial.started:%Y-%m-%d %H:%M}",
                f"if it no longer exists: optuna tell --study-name {trial.study} --trial-number {trial.number} "
                "--state fail --storage URL",
            )
