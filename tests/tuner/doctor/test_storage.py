"""The storage, looked at without changing it, and the trials left open in it."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from sqlalchemy import make_url

from trainer.locks import lock_folder
from tuner.doctor import storage as module
from tuner.doctor.storage import (
    OpenTrial,
    check_interrupted,
    check_lost,
    check_storage,
    find_interrupted,
    read_open_trials,
    read_schema_versions,
)
from tuner.study.record import CLAIM
from tuner.study.storage import open_storage


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A storage with the study "toy", of two trials: one finished, one running."""
    url = f"sqlite:///{tmp_path}/tuner.db"
    storage = open_storage(url)
    study = optuna.create_study(study_name="toy", storage=storage)
    study.tell(study.ask(), 1.0)
    trial = study.ask()
    trial.set_user_attr("host", platform.node())
    trial.set_user_attr("run_dir", str(tmp_path / "runs/toy/trial-00001"))
    trial.set_user_attr("alive", 1.8e9)
    storage.engine.dispose()
    yield url


def change(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "tuner.db")) as connection:
        connection.execute(statement)
        connection.commit()


def test_sound_storage_is_ok(url: str) -> None:
    found = check_storage(url)
    assert found.state == "ok", found
    assert (
        "1 study" in found.message
        and read_schema_versions(make_url(url))[0] in found.message
        and "write-ahead" in found.message
    )


def test_schema_is_the_one_that_optuna_makes(url: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "tuner.db")) as connection:
        (made,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    head, known = read_schema_versions(make_url(url))
    assert made == head and head in known and "v3.0.0.a" in known


def test_database_without_a_version_is_left_unchanged(url: str, tmp_path: Path) -> None:
    change(tmp_path, "DELETE FROM alembic_version")
    change(tmp_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    before = (tmp_path / "tuner.db").read_bytes()
    found = check_storage(url)
    assert found.state == "ok" and "no studies yet" in found.message
    assert (tmp_path / "tuner.db").read_bytes() == before


def test_missing_storage_is_not_created(tmp_path: Path) -> None:
    found = check_storage(f"sqlite:///{tmp_path}/deep/tuner.db")
    assert found.state == "ok" and "a launch creates it" in found.message
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_the_file_unchanged(url: str, tmp_path: Path) -> None:
    change(tmp_path, "PRAGMA journal_mode=DELETE")
    before = (tmp_path / "tuner.db").read_bytes()
    found = check_storage(url)
    assert found.state == "warn" and "journal mode delete" in found.message and "tuner status" in found.remedy
    assert (tmp_path / "tuner.db").read_bytes() == before
    assert check_storage(url, quick=True).state == "ok", "whoever opens it next switches it over"


@pytest.mark.parametrize(
    ("schema", "remedy"), [("v3.0.0.d", "optuna storage upgrade --storage sqlite:///"), ("v9.0.0", "pip install -U")]
)
def test_another_schema_fails_with_the_remedy(url: str, tmp_path: Path, schema: str, remedy: str) -> None:
    change(tmp_path, f"UPDATE alembic_version SET version_num = '{schema}'")
    for quick in (False, True):
        found = check_storage(url, quick=quick)
        assert found.state == "fail" and schema in found.message and remedy in found.remedy


def test_other_file_than_a_database_fails(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database\n" * 100)
    found = check_storage(f"sqlite:///{tmp_path}/text.db")
    assert found.state == "fail" and "can't be opened (file is not a database)" in found.message
    assert check_storage("nonsense").message == "nonsense: not a database URL"
    (tmp_path / "file").touch()
    assert check_storage(f"sqlite:///{tmp_path}/file/tuner.db").state == "fail"


def test_damaged_pages_fail_with_the_remedy(url: str, tmp_path: Path) -> None:
    file = tmp_path / "tuner.db"
    change(tmp_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    with closing(sqlite3.connect(file)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'trial_values'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with file.open("r+b") as database:
        database.seek((page - 1) * size)
        database.write(b"\xff" * size)
    found = check_storage(url)
    assert found.state == "fail" and "damaged pages" in found.message and "\n" not in found.message
    assert f"sqlite3 {file} .recover" in found.remedy and "backup" in found.remedy
    assert check_storage(url, quick=True).state == "ok", "every page is read only when asked"


def test_unreadable_storage_fails_with_the_remedy(url: str, tmp_path: Path) -> None:
    file = tmp_path / "tuner.db"
    change(tmp_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("r+b") as database:
        database.seek(100)
        database.write(b"\xff" * 3996)
    found = check_storage(url)
    assert found.state == "fail" and "malformed" in found.message and f"sqlite3 {file} .recover" in found.remedy
    assert read_open_trials(url) == []


def test_locked_storage_names_its_holder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.1)
    change(tmp_path, "PRAGMA journal_mode=DELETE")
    with closing(sqlite3.connect(tmp_path / "tuner.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        found = check_storage(url)
    assert found.state == "fail" and "database is locked" in found.message
    assert f"fuser {tmp_path}/tuner.db" in found.remedy


def test_folder_is_no_storage(tmp_path: Path) -> None:
    found = check_storage(f"sqlite:///{tmp_path}", quick=True)
    assert found.state == "fail" and f"{tmp_path} is a folder" in found.message
    assert f"sqlite:///{tmp_path}/tuner.db" in found.remedy


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_storage_in_memory_fails(url: str) -> None:
    found = check_storage(url, quick=True)
    assert found.state == "fail" and "in memory" in found.message and "runs/tuner.db" in found.remedy


def test_quick_check_skips_a_server_and_hides_its_password() -> None:
    url = "postgresql://user:secret@127.0.0.1:1/x"
    assert check_storage(url, quick=True).state == "ok"
    found = check_storage(url)
    assert found.state == "fail" and "can't be opened" in found.message
    assert "secret" not in found.message + found.remedy
    assert read_open_trials(url) == []


def test_network_filesystem_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_filesystem_type", lambda folder: "nfs4")
    found = check_storage(f"sqlite:///{tmp_path}/tuner.db")
    assert found.state == "warn" and "on nfs4" in found.message and "PostgreSQL" in found.remedy


def test_filesystem_is_that_of_the_mount_above() -> None:
    assert module.find_filesystem_type(Path("/proc/1")) == "proc"


def test_running_trial_without_its_claim_was_interrupted(url: str, tmp_path: Path) -> None:
    (trial,) = read_open_trials(url)
    assert (trial.study, trial.number, trial.host, trial.has_owner) == ("toy", 1, platform.node(), True)
    assert trial.started is not None and abs(datetime.now() - trial.started) < timedelta(minutes=5)
    (found,) = check_interrupted([trial], tmp_path / "runs")
    assert found.state == "warn" and "trial 1 of toy" in found.message and "tuner launch" in found.remedy
    assert trial.run_dir is not None
    with lock_folder(trial.run_dir, CLAIM):
        (found,) = check_interrupted([trial], tmp_path / "elsewhere")
    assert (found.state, found.message) == ("ok", "trial 1 of toy")


def test_trial_without_a_run_directory_is_found_by_its_number(tmp_path: Path) -> None:
    trial = OpenTrial("toy", 3, datetime.now())
    assert find_interrupted([trial], tmp_path) == [trial]
    with lock_folder(tmp_path / "toy" / "trial-00003", CLAIM):
        assert find_interrupted([trial], tmp_path) == []


def test_curve_of_a_full_run_is_guarded_by_the_run_lock(tmp_path: Path) -> None:
    trial = OpenTrial("toy.full", 0, datetime.now(), platform.node(), tmp_path / "full-trial-00001")
    (found,) = check_interrupted([trial], tmp_path)
    assert "tuner promote toy to continue" in found.remedy
    with lock_folder(tmp_path / "full-trial-00001"):
        assert find_interrupted([trial], tmp_path) == []


def test_old_trial_of_another_machine_is_a_warning(tmp_path: Path) -> None:
    started = datetime.now() - timedelta(hours=2)
    fresh = OpenTrial("toy", 5, started, "another-machine", tmp_path)
    assert find_interrupted([fresh], tmp_path) == [] and list(check_lost([fresh])) == []
    old = OpenTrial("toy", 5, started - timedelta(days=2), "another-machine", tmp_path)
    (found,) = check_lost([old], "toy")
    assert found.state == "warn" and "another-machine" in found.message and "--trial-number 5" in found.remedy
    assert list(check_lost([old], "other")) == []
    assert list(check_lost([replace(old, has_owner=True)])) == [], "a launch takes it over by itself"
