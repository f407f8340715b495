"""The same behaviour on SQLite, on PostgreSQL and through Optuna's proxy; outages; copies; and no password anywhere."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.artifacts import get_all_artifact_meta
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from optuna_dashboard import get_note

from tests.commands import Command
from tests.tuner.studies_for_tests import TOML, build, write
from tests.tuner.study.databases import Postgres, close, free_port, proxy
from trainer import UserError
from tuner import launch, promote
from tuner.cli import main
from tuner.show.note import promote_command
from tuner.study import servers
from tuner.study.launch import open_study
from tuner.study.optuna_internals import backend_of, storage_of
from tuner.study.record import StudyRecord, TrialRecord
from tuner.study.servers import ServerStorage, hide_password
from tuner.study.sqlite import StorageFailure
from tuner.study.storage import artifact_dir, database_time, load_study, open_patiently, open_storage
from tuner.study.storage_copy import copy_studies
from tuner.study.tracked_run import Runtime

# Commands leave their connections to the end of their process, which is not the test's.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

KINDS = ("sqlite", "postgresql", "proxy")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("postgres") / "data")
    server.start()
    yield server
    with warnings.catch_warnings(action="ignore"):
        gc.collect()
    server.stop()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/tuner.db"
        return
    database = request.getfixturevalue("postgres").create_database()
    if request.param == "postgresql":
        yield database
        return
    with proxy(database) as address:
        yield address


def close_study(study: optuna.Study) -> None:
    close(backend_of(storage_of(study)))


def test_study_runs_resumes_and_is_promoted(url: str, runtime: Runtime) -> None:
    first = launch(build(), storage=url, runtime=runtime, num_trials=2)
    close_study(first)
    study = launch(build(), storage=url, runtime=runtime, num_trials=3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert study.trials[0].params == {"train.batch_size": 8, "train.d_coef": 1.0}
    result = promote(study, runtime=runtime)
    record = StudyRecord.read(study)
    assert result.finished and record.full_runs[0].state == "finished"
    assert record.full_runs[0].metrics["val/loss"] == result.metrics["val/loss"]
    assert {meta.filename for meta in get_all_artifact_meta(study, storage=storage_of(study))} >= {"leaderboard.csv"}
    close_study(study)


def test_note_behind_a_proxy_names_it(tmp_path: Path) -> None:
    with proxy(f"sqlite:///{tmp_path}/tuner.db") as url:
        study = open_study(build(), url)
        command = promote_command(StudyRecord.read(study), Path("/runs"))
        assert command == f"tuner promote toy --storage {url} --run-root /runs"
        close_study(study)


@pytest.mark.parametrize("url", ["proxy"], indirect=True)  # with PostgreSQL behind it
def test_two_workers_share_a_study(url: str, runtime: Runtime) -> None:
    study = launch(build(), storage=url, runtime=runtime, num_workers=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert len({trial.params["train.d_coef"] for trial in study.trials}) == 4
    close_study(study)


def test_copy_has_everything(tmp_path: Path, postgres: Postgres, runtime: Runtime) -> None:
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=2)
    promote(study, runtime=runtime)
    source = storage_of(study)
    target = open_storage(postgres.create_database())
    assert copy_studies(source, target, run_root=tmp_path / "other") == {"toy": 2, "toy.full": 1}
    for name in ("toy", "toy.full"):
        before, after = load_study(name, source), load_study(name, target)
        assert after.user_attrs == before.user_attrs and get_note(after) == get_note(before) != ""
        for old, new in zip(before.trials, after.trials, strict=True):
            assert (old.number, old.state, old.value, old.params) == (new.number, new.state, new.value, new.params)
            assert old.user_attrs == new.user_attrs and old.intermediate_values == new.intermediate_values
        files = get_all_artifact_meta(after, storage=target)
        assert files == get_all_artifact_meta(before, storage=source)
        for meta in files:
            kept = artifact_dir(target, tmp_path / "other") / meta.artifact_id
            assert kept.read_bytes() == (artifact_dir(source) / meta.artifact_id).read_bytes()
    with pytest.raises(UserError, match="study toy is in the target already"):
        copy_studies(source, target, ["toy"])
    with pytest.raises(UserError, match="study none: not in the storage"):
        copy_studies(source, target, ["none"])
    # The copy continues.
    again = launch(build(), storage=target, runtime=runtime, num_trials=3)
    assert len(again.trials) == 3
    close_study(study)
    close(target)


def test_copy_that_fails_leaves_nothing_behind(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=1)
    target = open_storage(f"sqlite:///{tmp_path}/other/tuner.db")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("tuner.study.storage_copy._copy_files", fail)
    with pytest.raises(OSError, match="no space"):
        copy_studies(storage_of(study), target)
    assert optuna.get_all_study_names(target) == []
    close_study(study)
    close(target)


def test_copy_of_one_study_that_fails_takes_the_others_back(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=1)
    promote(study, runtime=runtime)
    target = open_storage(f"sqlite:///{tmp_path}/other/tuner.db")
    with pytest.raises(UserError, match=r"study toy.full: name toy, which has its full runs with it"):
        copy_studies(storage_of(study), target, ["toy.full"])

    def fail(study: optuna.Study, *_: object) -> None:
        if study.study_name == "toy.full":
            raise OSError("no space left")

    monkeypatch.setattr("tuner.study.storage_copy._copy_files", fail)
    with pytest.raises(OSError, match="no space"):
        copy_studies(storage_of(study), target)
    assert optuna.get_all_study_names(target) == []

    def create_too(study: optuna.Study, *_: object) -> None:
        optuna.create_study(study_name="toy.full", storage=target)

    monkeypatch.setattr("tuner.study.storage_copy._copy_files", create_too)
    with pytest.raises(UserError, match=r"study toy\.full was created in the target meanwhile"):
        copy_studies(storage_of(study), target)
    assert optuna.get_all_study_names(target) == ["toy.full"], "another process has created it"
    close_study(study)
    close(target)


@servers.patient
class Flaky(ServerStorage):
    """Loses its connection after the next change of a state, and before the next value that it reads."""

    fails = True

    def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
        changed = super().set_trial_state_values(*args, **kwargs)
        self.fail_once()
        return changed

    @servers.wait_for_server
    def read_value(self, statement: str) -> Any:
        self.fail_once()
        return super().read_value(statement)

    def fail_once(self) -> None:
        if self.fails:
            self.fails = False
            raise sqlalchemy.exc.OperationalError("", {}, Exception("server closed the connection unexpectedly"))


def test_answer_that_is_lost_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PAUSE_S", 0.0)
    storage = Flaky(f"sqlite:///{tmp_path}/tuner.db")
    study = optuna.create_study(storage=storage)
    study.tell(study.ask(), 1.0)
    assert study.trials[0].state == TrialState.COMPLETE and not storage.fails
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(1, TrialState.FAIL)
    close(storage)


def test_clock_of_a_server_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PAUSE_S", 0.0)
    storage = Flaky(f"sqlite:///{tmp_path}/tuner.db")
    assert database_time(storage) > 1e9 and not storage.fails
    close(storage)


def test_failure_of_the_proxy_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(f"sqlite:///{tmp_path}/tuner.db") as url:
        storage = open_storage(url)
        (tmp_path / "tuner.db").unlink()
        with pytest.raises(StorageFailure, match="the file was deleted while it was in use"):
            optuna.create_study(storage=storage)
        close(storage)


def test_port_of_another_proxy_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with (
        proxy(f"sqlite:///{tmp_path}/a.db", port),
        pytest.raises(UserError, match=f"--port {port}"),
        proxy(f"sqlite:///{tmp_path}/b.db", port),
    ):
        pass


class Outage:
    """A display that takes the server away at the second validation of a launch, for some seconds."""

    def __init__(self, stop: Callable[[], object], start: Callable[[], object]) -> None:
        self.stop, self.start, self.count = stop, start, 0
        self.thread: threading.Thread | None = None

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Outage:
        return self

    def trial_ended(self, trial: TrialRecord) -> None:
        """Nothing is shown."""

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.count += "val/loss" in values
        if self.count == 2 and self.thread is None:
            self.stop()
            self.thread = threading.Timer(2.0, self.start)
            self.thread.start()

    def close(self) -> None:
        """Nothing is open."""


def test_database_server_that_is_away_for_a_while_ends_nothing(
    tmp_path: Path, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    server = Postgres(tmp_path / "data")
    server.start()
    url = server.create_database()
    outage = Outage(server.stop, server.start)
    study = launch(build(), storage=url, runtime=runtime, num_trials=2, display=outage)
    assert outage.thread is not None
    outage.thread.join()
    assert [(trial.state, len(trial.intermediate_values)) for trial in study.trials] == [(TrialState.COMPLETE, 4)] * 2
    (warning,) = (message for message in caplog.messages if "waiting for the storage" in message)
    assert warning.startswith("waiting for the storage postgresql+psycopg://postgres:***@/")
    close_study(study)
    server.stop()


def test_proxy_that_is_away_for_a_while_ends_nothing(
    tmp_path: Path, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    port, open_proxies = free_port(), ExitStack()

    def start() -> None:
        open_proxies.enter_context(proxy(f"sqlite:///{tmp_path}/tuner.db", port))

    start()
    study = launch(
        build(),
        storage=f"grpc://127.0.0.1:{port}",
        runtime=runtime,
        num_trials=2,
        display=(outage := Outage(open_proxies.close, start)),
    )
    assert outage.thread is not None
    outage.thread.join()
    assert [(trial.state, len(trial.intermediate_values)) for trial in study.trials] == [(TrialState.COMPLETE, 4)] * 2
    assert f"waiting for the storage grpc://127.0.0.1:{port} (no answer)" in caplog.messages
    close_study(study)
    open_proxies.close()


def test_server_that_stays_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "OUTAGE_S", 0.2)
    monkeypatch.setattr(servers, "PAUSE_S", 0.05)
    server = Postgres(tmp_path / "data")
    server.start()
    storage = open_storage(server.create_database())
    server.stop()
    with pytest.raises(UserError, match=r"^storage postgresql\+psycopg://postgres:\*\*\*@/.*: away for .*: start it"):
        optuna.get_all_study_names(storage)
    close(storage)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p%40ss@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("mysql+pymysql://me:a:b@host", "mysql+pymysql://me:***@host"),
        ("postgresql://me:a@b:c/d@host/studies", "postgresql://me:***@host/studies"),
        ("postgresql://host/s?user=me&password=a&x=y", "postgresql://host/s?user=me&password=***&x=y"),
        ("sqlite:////tmp/a:b@c/tuner.db", "sqlite:////tmp/a:b@c/tuner.db"),
        ("grpc://127.0.0.1:13000", "grpc://127.0.0.1:13000"),
    ],
)
def test_password_is_not_shown(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_password_is_in_no_output_and_no_file(
    postgres: Postgres, tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TOML)
    url = postgres.create_database()
    monkeypatch.setenv("TUNER_STORAGE", url)
    outputs = []
    for arguments in (
        ["launch", "study.toml", "--workers", "2", "--trials", "2"],
        ["promote", "toy"],
        ["status", "toy", "--json"],
        ["launch", "study.toml", "--storage", url, "--trials", "2"],
        ["status", "none"],
        ["doctor", "study.toml"],
        ["launch", "study.toml", "--storage", f"postgresql://me:{postgres.password}@127.0.0.1:1/none"],
        ["launch", "study.toml", "--storage", f"nothing://me:{postgres.password}@127.0.0.1/none"],
        ["launch", "study.toml", "--storage", f"://me:{postgres.password}@127.0.0.1:x/none"],
    ):
        result = run_command(*arguments)
        outputs.append(result.stdout + result.stderr)
    assert "***@" in outputs[3] and all("***@" in output for output in outputs[5:])
    assert "Traceback" not in "".join(outputs) and postgres.password not in "".join(outputs)
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and postgres.password.encode() in path.read_bytes()
    ]
    assert written == []
    storage = open_storage(url)
    for name in ("toy", "toy.full"):
        study = load_study(name, storage)
        attrs = [study.user_attrs, *(trial.user_attrs for trial in study.trials), get_note(study)]
        assert postgres.password not in json.dumps(attrs)
    close(storage)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--storage", "grpc://127.0.0.1:1x"], "grpc://127.0.0.1:1x: not a database URL"),
        (["status", "--storage", "oracle://me:a@host/x"], "(No module named 'oracledb'): install the driver"),
        (["status", "--storage", "grpc://127.0.0.1:1"], "grpc://127.0.0.1:1: can't be opened (no answer in 0.2 s)"),
        (["storage", "copy", "sqlite:///none.db", "sqlite:///b.db"], "sqlite:///none.db: no such database"),
        (["storage", "serve", "--storage", "sqlite:///none.db"], "sqlite:///none.db: no such database"),
    ],
)
def test_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(servers, "CONNECT_S", 0.2)
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_worker_that_starts_while_the_server_is_away_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(servers, "CONNECT_S", 0.2)
    monkeypatch.setattr(servers, "WARN_EVERY_S", 0.05)
    port = free_port()
    address, opened_proxy = f"grpc://127.0.0.1:{port}", ExitStack()

    def start() -> None:
        while not caplog.messages:
            time.sleep(0.01)
        opened_proxy.enter_context(proxy(f"sqlite:///{tmp_path}/tuner.db", port))

    thread = threading.Thread(target=start)
    thread.start()
    storage = open_patiently(address)
    thread.join()
    assert optuna.get_all_study_names(storage) == [] and f"waiting for the storage {address}" in caplog.messages
    close(storage)
    opened_proxy.close()
    monkeypatch.setattr(servers, "OUTAGE_S", 0.1)
    with pytest.raises(UserError, match="can't be opened"):
        open_patiently(address)
