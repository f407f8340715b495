from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import UserError
from tuner.storage import DEFAULT_URL, load_study, open_storage, storage_url


def test_the_url_given_then_the_environment_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    assert storage_url() == DEFAULT_URL
    monkeypatch.setenv("TUNER_STORAGE", "sqlite:///other.db")
    assert storage_url() == "sqlite:///other.db"
    assert storage_url("sqlite:///given.db") == "sqlite:///given.db"


def test_sqlite_has_a_write_ahead_log_and_waits_when_busy(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/deep/er/tuner.db")
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    storage.engine.dispose()


WORKER = """
import sys, optuna
from tuner.storage import open_storage
study = optuna.create_study(study_name="s", storage=open_storage(sys.argv[1]), load_if_exists=True)
for _ in range(5):
    trial = study.ask()
    for step in range(10):
        trial.report(step, step)
    study.tell(trial, trial.suggest_float("x", 0, 1))
"""


def test_many_processes_start_at_once_and_lose_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, url], stderr=subprocess.PIPE) for _ in range(4)]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), errors
    study = load_study("s", open_storage(url))
    assert len(study.trials) == 20
    assert all(len(trial.intermediate_values) == 10 for trial in study.trials)


def test_an_unknown_study_names_those_there_are(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    with pytest.raises(UserError, match="not in the storage"):
        load_study("none", storage)
    storage.engine.dispose()


def test_a_broken_database_is_a_user_error(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE version_info (library_version TEXT)")
    connection.close()
    with pytest.raises(UserError, match="can't be opened"):
        open_storage(f"sqlite:///{tmp_path}/other.db")
