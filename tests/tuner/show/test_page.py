"""The study's page in optuna-dashboard: its files are served, and none of it can hurt training."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from optuna_dashboard import get_note

from tests.tuner.show.made_studies import add_five_trials, add_trial, new_study, read
from tests.tuner.show.test_server import Client
from tests.tuner.studies_for_tests import build
from trainer.locks import lock_folder
from tuner import launch, promote
from tuner.show import page as study_page
from tuner.show.files import BEST_SPEC, LEADERBOARD, _without_none, best_spec
from tuner.show.page import StudyPage
from tuner.show.server import make_dashboard
from tuner.spec.setups import full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.optuna_internals import id_of, storage_of
from tuner.study.record import read_spec
from tuner.study.storage import artifact_dir, load_study, open_storage
from tuner.study.tracked_run import Runtime


@pytest.fixture
def stored(tmp_path: Path) -> optuna.Study:
    """The study of five trials in a file."""
    return add_five_trials(new_study(open_storage(f"sqlite:///{tmp_path}/tuner.db")))


@pytest.mark.parametrize("unit", ["samples", "steps"])
def test_best_configuration_is_a_spec_for_the_same_full_run(tmp_path: Path, unit: str) -> None:
    study = new_study(
        without="trial.samples" if unit == "steps" else "", **{f"trial.{unit}": 160, "full.samples": 8_000}
    )
    trial = add_trial(study, [4.0, 3.5, 3.2, 3.0], batch_size=16, d_coef=0.123456789)
    path = tmp_path / "best.toml"
    path.write_text(best_spec(read(study), trial))
    wanted = full_setup(read_spec(study), trial.params)
    assert full_setup(StudySpec.load(path, search=False), {}) == wanted
    assert wanted.config.batch_size == 16 and wanted.config.d_coef == 0.123456789
    assert StudySpec.load(path).search == read_spec(study).search


def test_files_are_replaced_and_served_by_the_dashboard(stored: optuna.Study, tmp_path: Path) -> None:
    page = StudyPage(stored, tmp_path)
    page.update(now=True)
    add_trial(stored, [2.0, 1.9, 1.8, 1.75], d_coef=0.2)
    page.update(now=True)
    known = {meta.filename: meta for meta in get_all_artifact_meta(stored, storage=storage_of(stored))}
    assert set(known) == {BEST_SPEC, LEADERBOARD} and len(list(artifact_dir(storage_of(stored)).glob("[0-9a-f]*"))) == 2
    client = next(clients := served(tmp_path))
    client.log_in()
    status, body = client.request("GET", f"/artifacts/{id_of(stored)}/{known[BEST_SPEC].artifact_id}")
    assert status == 200 and "trial 5: val/loss 1.7500" in body
    assert f"(/artifacts/{id_of(stored)}/{known[LEADERBOARD].artifact_id})" in get_note(stored)
    _, detail = client.request("GET", f"/api/studies/{id_of(stored)}")
    graphs = {graph["id"]: json.loads(graph["graph_object"]) for graph in json.loads(detail)["plotly_graph_objects"]}
    assert set(graphs) == {"learning-curves", "landscape", "d-over-samples", "loss-and-hours"}
    clients.close()


def served(tmp_path: Path) -> Iterator[Client]:
    storage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    server, address = make_dashboard(storage, port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Client(address)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        storage.engine.dispose()


def test_launch_and_full_run_write_their_pages(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_page, "MIN_INTERVAL_S", 1e9)
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=2)
    assert "**Best: trial" in get_note(study) and "### Full runs" not in get_note(study)
    asked = itertools.count()
    promote(study, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 3))
    assert "interrupted" in get_note(study) and "To continue the full run" in get_note(study)
    promote(study, runtime=runtime)
    assert "finished" in get_note(study) and "interrupted" not in get_note(study)
    assert "promoted from [toy](/dashboard/studies/1)" in get_note(load_study("toy.full", storage_of(study)))


def test_page_that_can_not_be_written_stops_no_launch_and_is_logged_once(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StorageInternalError("database is locked")

    monkeypatch.setattr(study_page, "save_note", fail)
    monkeypatch.setattr(study_page, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(study_page, "MAX_SHARE", 1e9)
    with caplog.at_level(logging.WARNING, "tuner.show.page"):
        study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert [r.getMessage() for r in caplog.records if r.name == "tuner.show.page"] == [
        "the study's page is not up to date (StorageInternalError: database is locked); training continues"
    ]


def test_deleted_study_stops_nothing(study: optuna.Study, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = StudyPage(study, tmp_path)
    optuna.delete_study(study_name="toy", storage=storage_of(study))
    page.update(now=True)
    assert "no longer in the storage" in caplog.text


def test_updates_take_one_hundredth_of_the_time(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    writes: list[float] = []

    def write(page: StudyPage) -> None:
        writes.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(study_page.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(StudyPage, "_write", write)
    page = StudyPage(study, tmp_path)
    while clock[0] < 1000:
        page.update()
        clock[0] += 1.0
    assert writes[0] == 5.0 and len(writes) == 5
    assert all(later - earlier >= 200 for earlier, later in itertools.pairwise(writes))


def test_second_of_two_writers_leaves_the_page_to_the_first(study: optuna.Study, tmp_path: Path) -> None:
    with lock_folder(artifact_dir(storage_of(study), tmp_path), ".toy.lock"):
        StudyPage(study, tmp_path).update(now=True)
    assert get_note(study) == ""
    StudyPage(study, tmp_path).update(now=True)
    assert "### Leaderboard" in get_note(study)


def test_page_is_kept_updated_in_a_thread_and_written_at_the_end(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    monkeypatch.setattr(StudyPage, "_write", lambda page: threads.append(threading.current_thread().name))
    monkeypatch.setattr(study_page, "MIN_INTERVAL_S", 0.0)
    with StudyPage(study, tmp_path).keep_updated() as on_change:
        assert not threads
        on_change()
    assert [name.startswith("page") for name in threads] == [True, False]
    with pytest.raises(KeyboardInterrupt), StudyPage(study, tmp_path).keep_updated():
        raise KeyboardInterrupt
    assert len(threads) == 2, "a launch that was interrupted at once must not wait for the storage"


def test_options_in_lists_without_a_value_are_left_out_of_the_best_spec() -> None:
    assert _without_none({"a": [{"path": "x", "weight": None}, None], "b": None}) == {"a": [{"path": "x"}]}


def test_defect_of_the_page_ends_no_launch(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(study_page, "study_note", fail)
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=2)
    assert len(study.trials) == 2
    assert "the study's page could not be written" in caplog.text
