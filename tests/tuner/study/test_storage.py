from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError

from tests.tuner.studies_for_tests import write
from trainer import UserError
from tuner.cli import main
from tuner.spec.study_toml import StudySpec
from tuner.study import sqlite as sqlite_module
from tuner.study.launch import open_study
from tuner.study.storage import DEFAULT_URL, load_study, open_storage, storage_url


def test_url_given_then_the_environment_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    assert storage_url() == DEFAULT_URL
    monkeypatch.setenv("TUNER_STORAGE", "sqlite:///other.db")
    assert storage_url() == "sqlite:///other.db"
    assert storage_url("sqlite:///given.db") == "sqlite:///given.db"


def test_sqlite_has_a_write_ahead_log_and_waits_when_busy(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/deep/er/tuner.db")
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 20_000
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    storage.engine.dispose()


WORKER = """
import sys, optuna
from tuner.study.storage import open_storage
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


def test_unknown_study_is_refused(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    with pytest.raises(UserError, match="not in the storage"):
        load_study("none", storage)
    storage.engine.dispose()


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one line of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a storage with the study "toy", which another connection writes to all the time."""
    monkeypatch.setattr(sqlite_module, "BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(sqlite_module, "PATIENCE_S", 0.1)
    # Optuna pauses up to two seconds between its attempts.
    monkeypatch.setattr(random, "random", lambda: 0.0)
    write(tmp_path)
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    open_study(StudySpec.load(tmp_path / "study.toml"), storage)
    with closing(sqlite3.connect(tmp_path / "tuner.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield f"sqlite:///{tmp_path}/tuner.db"
    storage.engine.dispose()


def test_locked_database_ends_a_launch_with_one_line(
    busy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(
        capsys,
        monkeypatch,
        "launch",
        f"{tmp_path}/study.toml",
        "--no-track",
        "--storage",
        busy,
        "--run-root",
        f"{tmp_path}/runs",
    )
    assert f"storage {busy}: database is locked" in line and f"fuser {tmp_path}/tuner.db" in line


def test_locked_database_is_a_one_line_error_from_python(busy: str) -> None:
    study = load_study("toy", open_storage(busy))
    with pytest.raises(UserError, match=r"database is locked: another process holds it"):
        study.ask()
    # A full run and a live view continue without the storage: they catch Optuna's type.
    with pytest.raises(StorageInternalError, match=r"database is locked"):
        study.set_user_attr("a", 1)


def test_database_that_is_free_again_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_module, "PATIENCE_S", 0.05)
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    study = optuna.create_study(study_name="toy", storage=storage)
    other = sqlite3.connect(tmp_path / "tuner.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def release() -> None:
        while not caplog.messages:
            time.sleep(0.01)
        other.execute("COMMIT")

    thread = threading.Thread(target=release)
    thread.start()
    study.set_user_attr("a", 1)
    thread.join()
    assert study.user_attrs == {"a": 1}
    assert "waiting for the database, which another process has locked for" in caplog.messages[0]
    other.close()
    storage.engine.dispose()


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_file_that_is_gone_is_not_written_to(tmp_path: Path, what: str) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    study = optuna.create_study(study_name="toy", storage=storage)
    (tmp_path / "tuner.db").rename(tmp_path / "old.db")
    if what == "replaced":
        (tmp_path / "tuner.db").touch()
    with pytest.raises(UserError, match=f"the file was {what} while it was in use: put it back"):
        study.set_user_attr("a", 1)
    # A full run continues without the storage: it catches Optuna's type.
    with pytest.raises(StorageInternalError):
        study.ask()
    (tmp_path / "old.db").rename(tmp_path / "tuner.db")
    study.set_user_attr("a", 2)
    assert study.user_attrs == {"a": 2}
    storage.engine.dispose()


def test_file_that_has_become_read_only_names_the_remedy(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    study = optuna.create_study(study_name="toy", storage=storage)
    with storage.engine.connect() as connection:  # root may write to any file
        connection.exec_driver_sql("PRAGMA query_only=ON")
        connection.rollback()
    with pytest.raises(UserError, match="readonly database: make it and its folder writable"):
        study.set_user_attr("a", 1)
    storage.engine.dispose()


def test_defect_of_a_statement_keeps_its_own_error(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    with pytest.raises(sqlalchemy.exc.OperationalError, match="no such table"), storage.engine.connect() as connection:
        connection.exec_driver_sql("SELECT * FROM no_such")
    storage.engine.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_storage_in_memory_is_refused_before_a_trial_runs(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, monkeypatch, "launch", "study.toml", "--no-track", "--storage", url)
    assert f"{url}: a database in memory ends with" in line and DEFAULT_URL in line
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="in memory it ends with"):
        open_storage(url)


@pytest.mark.parametrize("command", [["status"], ["launch", "study.toml", "--no-track"]])
def test_folder_is_no_storage(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, monkeypatch, *command, "--storage", f"sqlite:///{tmp_path}")
    assert f"{tmp_path} is a folder" in line and f"sqlite:///{tmp_path}/tuner.db" in line


def test_too_long_name_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, monkeypatch, "train", "study.toml", "--no-track", "--run-root", "x" * 300)
    assert "File name too long: '" in line and line.endswith("use shorter names.")


def test_infinite_gpu_memory_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--gpu-memory inf: give the card's" in refused(capsys, monkeypatch, "doctor", "--gpu-memory", "inf")


def test_version_is_printed_without_a_heavy_import() -> None:
    code = "import sys; sys.argv = ['tuner', '--version']\nfrom tuner.cli import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'optuna', 'aim'} & sys.modules.keys(), 'heavy import'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"prodigy-tuner {version('prodigy-tuner')}\n"), result.stderr


def test_broken_database_is_a_user_error(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE version_info (library_version TEXT)")
    connection.close()
    with pytest.raises(UserError, match="can't be opened"):
        open_storage(f"sqlite:///{tmp_path}/other.db")


def test_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study(storage=open_storage("sqlite:///tuner.db"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert study.ask().number == 0
