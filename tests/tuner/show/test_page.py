"""What a person sees of a study in optuna-dashboard: the note, the plots, the files; and that none of it can hurt."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
from optuna_dashboard import get_note, save_note

from tests.tuner.show.test_server import Client
from tests.tuner.studies_for_tests import build
from trainer.locks import locked
from tuner.full.confirmed import Asked, Confirmation, ConfirmedTrial, keep_found
from tuner.full.promotion import promote
from tuner.launcher import launch
from tuner.run import Runtime
from tuner.search_space import full_setup
from tuner.show import page as study_page
from tuner.show import plots
from tuner.show.files import BEST_SPEC, LEADERBOARD, artifact_dir, best_spec, leaderboard, to_toml
from tuner.show.findings import Findings
from tuner.show.note import MAX_RANKED, escape, promote_command, study_note
from tuner.show.page import StudyPage
from tuner.show.plot_labels import AROUND, place_labels
from tuner.show.server import make_dashboard
from tuner.spec import StudySpec
from tuner.storage import load_study, open_storage
from tuner.trials import BASE_DIR, BASELINE, ENDED, INFEASIBLE, SPEC, stored_spec

GRID = (40, 80, 120, 160)
OUT_OF_MEMORY = "out of memory: tried | 2.00 GiB of *23.6* <GiB>\nTraceback"


def add(study: optuna.Study, batch_size: int, d_coef: float, values: list[float], **attrs: Any) -> None:
    """A finished trial with `values` on the grid; one that is shorter than the grid was pruned."""
    state = TrialState.COMPLETE if len(values) == len(GRID) else TrialState.PRUNED
    stored = stored_spec(study).search
    distributions = {
        "train.batch_size": optuna.distributions.CategoricalDistribution(stored["train.batch_size"].choices),
        "train.d_coef": optuna.distributions.FloatDistribution(0.1, 10.0, log=True),
    }
    trial = create_trial(
        state=state,
        value=values[-1] if values else None,
        params={"train.batch_size": batch_size, "train.d_coef": d_coef},
        distributions=distributions,
        intermediate_values=dict(zip(GRID, values, strict=False)),
        user_attrs=attrs,
    )
    study.add_trial(trial)


def new_study(tmp_path: Path, storage: BaseStorage | None = None, **trial: Any) -> optuna.Study:
    """A study without trials, in memory; `trial` replaces the budget."""
    study = optuna.create_study(study_name="toy", storage=storage)
    spec = build().to_dict()
    study.set_user_attr(SPEC, {**spec, "trial": {"evaluations": 4, **trial}} if trial else spec)
    study.set_user_attr(BASE_DIR, str(tmp_path))
    return study


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return with_trials(new_study(tmp_path))


@pytest.fixture
def stored(tmp_path: Path) -> optuna.Study:
    """The same in a file."""
    return with_trials(new_study(tmp_path, open_storage(f"sqlite:///{tmp_path}/tuner.db")))


def with_trials(study: optuna.Study) -> optuna.Study:
    """Five trials: the baseline, the best one, a slow one, one pruned and one infeasible."""
    d = [1e-6, 1e-5, 1e-4, 1e-3]
    add(study, 8, 1.0, [4.0, 3.5, 3.2, 3.0], **{BASELINE: True}, d=d, full_hours=30.0)
    add(study, 4, 0.5, [3.9, 3.0, 2.6, 2.5], d=d, d_rising=True, full_hours=36.25)
    add(study, 16, 2.0, [4.1, 3.9, 3.8, 3.7], d=d, full_hours=40.0)
    add(study, 16, 9.0, [5.0], d=d[:1])
    # Its last value is lower than that of every other.
    add(study, 4, 8.0, [1.0], **{INFEASIBLE: OUT_OF_MEMORY})
    return study


def note_of(study: optuna.Study) -> str:
    return study_note(Findings.of(study), promote_command(study, Path("/runs")), {})


def table_rows(note: str, heading: str) -> list[list[str]]:
    body = note.partition(f"### {heading}\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in body.splitlines()[2:]]


def traces(figure: plots.Figure | None) -> dict[str, dict[str, Any]]:
    """The traces that are in the legend, by their names."""
    assert figure is not None
    return {trace["name"]: trace for trace in json.loads(figure.to_json())["data"] if trace["showlegend"]}


def test_the_note_says_goal_best_leaderboard_and_the_command(stored: optuna.Study, tmp_path: Path) -> None:
    note = note_of(stored)
    assert "lowest val/loss after 160 samples" in note
    assert "4 trials by its study.toml; so far 3 complete, 1 infeasible, 1 pruned" in note
    assert "**Best: trial 1** (batch\\_size=4 d\\_coef=0.5), val/loss 2.5000, 0.5000 better" in note
    assert "about 36.2 h." in note and "the short run is too short for this d\\_coef" in note
    rows = table_rows(note, "Leaderboard")
    assert [row[1] for row in rows] == ["1", "0", "2"]
    assert [row[-1] for row in rows] == ["best, d still rising", "baseline", ""]
    assert rows[0][5] == "-0.5000"
    assert f"    tuner promote toy --storage sqlite:///{tmp_path}/tuner.db --run-root /runs" in note


def test_the_note_says_why_the_study_ended_and_what_the_confirmation_found(study: optuna.Study) -> None:
    assert "**Ended**" not in note_of(study) and "### Confirmation" not in note_of(study)
    study.set_user_attr(ENDED, "3 trials in a row improved nothing")
    slow = ConfirmedTrial(2, {"train.d_coef": 2.0}, {0: 2.3}, failed="seed 1: no gradient was finite")
    base = ConfirmedTrial(0, {"train.d_coef": 1.0}, {0: 2.4, 1: 2.8})
    best = ConfirmedTrial(1, {"train.d_coef": 0.5}, {0: 2.2, 1: 2.6})
    found = Confirmation("val/loss", True, "samples", 320, [best, base, slow], baseline=0)
    keep_found(study, Asked(2, 2, 320, best=1), found)
    note = note_of(study)
    assert "- **Ended**: 3 trials in a row improved nothing" in note
    assert "Over 320 samples: trial 1 is within noise of the baseline: 0.2000 better" in note
    lines = [
        line for line in note.partition("### Confirmation")[2].partition("###")[0].splitlines() if "d\\_coef" in line
    ]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert [row[0] for row in rows] == ["1", "0", "2"]
    assert rows[0][2:] == ["2.4000", "2.2000 to 2.6000", "+0.2000", "winner"]
    assert rows[1][4:] == ["", "baseline"] and rows[2][5] == "seed 1: no gradient was finite"


def test_the_leaderboard_names_micro_batches_where_they_are_smaller(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    add(study, 8, 1.0, [4.0, 3.5, 3.2, 3.0], micro_batch_size=8)
    add(study, 16, 1.0, [4.0, 3.5, 3.2, 3.1], micro_batch_size=4)
    rows = table_rows(note_of(study), "Leaderboard")
    assert [row[-1] for row in rows] == ["best", "in micro-batches of 4"]


def test_infeasible_trials_are_named_with_their_reason_and_no_markdown_of_their_own(study: optuna.Study) -> None:
    part = note_of(study).partition("### Infeasible")[2]
    line = next(line for line in part.splitlines() if line.startswith("- trial 4,"))
    assert line.endswith("out of memory: tried \\| 2.00 GiB of \\*23.6\\* \\<GiB\\> Traceback")
    assert escape("a`b\n[c](d)") == "a\\`b \\[c\\](d)"


def test_a_long_leaderboard_ends_with_the_baseline(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    add(study, 8, 1.0, [99.0] * 4, **{BASELINE: True})
    for i in range(30):
        add(study, 8, 1.0 + i / 10, [3.0 + i] * 4)
        add(study, 4, 1.0 + i / 10, [], **{INFEASIBLE: "x" * 1000})
    note = note_of(study)
    rows = table_rows(note, "Leaderboard")
    assert len(rows) == MAX_RANKED and rows[0][:2] == ["1", "1"]
    assert rows[-1][:2] == ["31", "0"] and rows[-1][-1] == "baseline"
    assert "16 more complete trials" in note and "22 earlier ones" in note
    assert len(note) < 6000


def test_what_a_person_wrote_below_the_note_or_before_it_stays(study: optuna.Study, tmp_path: Path) -> None:
    save_note(study, "mine, from before")
    page = StudyPage(study, tmp_path)
    page.update(now=True)
    save_note(study, get_note(study) + "\nand from after")
    page.update(now=True)
    note = get_note(study)
    assert note.count("### Leaderboard") == note.count("mine, from before") == note.count("and from after") == 1
    assert note.index("### Leaderboard") < note.index("mine, from before")


def test_a_password_is_not_in_the_note(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import make_url

    monkeypatch.setattr("tuner.show.note.database_url", lambda _: make_url("postgresql://me:secret@host/db"))
    command = promote_command(study, Path("/my runs"))
    assert command == "tuner promote toy --storage \"$TUNER_STORAGE\" --run-root '/my runs'"


def test_relative_paths_come_with_their_folder(study: optuna.Study, tmp_path: Path) -> None:
    assert promote_command(study, Path("runs"), tmp_path).startswith(f"cd {tmp_path}\ntuner promote toy")


def test_learning_curves_mark_baseline_best_and_full_run_by_dash_and_label(study: optuna.Study, tmp_path: Path) -> None:
    full = optuna.create_study(study_name="toy.full", storage=study._storage)
    run = full.ask(fixed_distributions={})
    for samples, value in {40: 3.9, 160: 2.5, 8000: 1.9}.items():
        run.report(value, samples)
    run.set_user_attr("trial", 1)
    run.set_user_attr("run_dir", str(tmp_path))
    figure = plots.learning_curves(Findings.of(study))
    drawn = traces(figure)
    assert drawn["best trial"]["x"] == list(GRID) and drawn["best trial"]["y"] == [3.9, 3.0, 2.6, 2.5]
    assert drawn["full run"]["x"] == [40, 160, 8000] and "full run of trial 1" in drawn["full run"]["text"][-1]
    assert "0 baseline" in drawn["baseline"]["text"][-1] and "1 best" in drawn["best trial"]["text"][-1]
    assert drawn["infeasible"]["marker"]["symbol"] == "x"
    styles = [(trace["line"]["dash"], trace["marker"]["symbol"]) for trace in drawn.values()]
    assert len(set(styles)) == len(styles) == 6
    assert figure is not None and figure.layout["xaxis"]["type"] == "log"


def test_a_budget_in_steps_is_drawn_in_samples(tmp_path: Path) -> None:
    study = new_study(tmp_path, steps=160)
    add(study, 16, 1.0, [4.0, 3.0, 2.0, 1.0])
    assert traces(plots.learning_curves(Findings.of(study)))["best trial"]["x"] == [16 * step for step in GRID]


def test_the_landscape_shows_infeasible_trials_off_the_scale(study: optuna.Study) -> None:
    figure = plots.landscape(Findings.of(study))
    drawn = traces(figure)
    assert (drawn["best trial"]["x"], drawn["best trial"]["y"]) == ([4], [0.5])
    assert drawn["best trial"]["marker"]["color"] == [2.5]
    assert drawn["infeasible"]["marker"]["color"].startswith("#")
    assert "infeasible" in drawn["infeasible"]["text"][0] and "1.0" not in drawn["infeasible"]["text"][0]
    assert figure is not None and figure.layout["coloraxis"]["cmin"] == 2.5
    assert figure.layout["xaxis"]["tickvals"] == [4, 8, 16]


def test_one_searched_number_is_a_scatter_and_none_is_no_plot(study: optuna.Study) -> None:
    stored = study.user_attrs[SPEC]
    one = {"train.d_coef": stored["search"]["train.d_coef"], "train.optimizer": {"choices": ["prodigy", "adamw"]}}
    study.set_user_attr(SPEC, {**stored, "search": one})
    assert traces(plots.landscape(Findings.of(study)))["best trial"]["y"] == [2.5]
    study.set_user_attr(SPEC, {**stored, "search": {"train.optimizer": one["train.optimizer"]}})
    assert plots.landscape(Findings.of(study)) is None


def test_d_is_ringed_where_it_still_rises(study: optuna.Study) -> None:
    drawn = traces(plots.d_over_samples(Findings.of(study)))
    assert drawn["best trial"]["y"] == [1e-6, 1e-5, 1e-4, 1e-3]
    ring = drawn[plots.STILL_RISES]
    assert (ring["x"][-1], ring["y"][-1]) == (drawn["best trial"]["x"][-1], 1e-3) and ring["showlegend"]
    assert len(ring["x"]) == sum(trial.user_attrs.get("d_rising", False) for trial in study.trials) < len(study.trials)
    assert "still rises" not in str([drawn["best trial"]["text"], drawn["baseline"]["text"]])


def test_a_label_keeps_within_its_edges_and_beside_the_whole_axis() -> None:
    spots, texts = [(0.0, 0.0), (1.0, 1.0)], ["7: 3.485 best", "4: 4.199"]
    placed = place_labels(spots, texts, [False, False], AROUND, extent=[(-0.1, 1.1), None], edges=(0.0, 1.0))
    assert placed == ["middle right", "middle left"]
    # Two ends that lie close together on the axis leave room for one label only.
    ends = [(1.0, 1.0), (1.0, 1.01)]
    assert "" in place_labels(ends, ["a", "b"], [False, False], ["middle right"], extent=[(0, 1), (0, 5)])
    assert "" not in place_labels(ends, ["a", "b"], [False, False], ["middle right"])


def test_the_trials_that_no_other_beats_in_loss_and_time_are_joined(study: optuna.Study) -> None:
    found = Findings.of(study)
    assert found.not_beaten == {0, 1}
    drawn = traces(plots.loss_and_hours(found))
    front = drawn["no other trial is better in both"]
    assert (front["x"], front["y"]) == ([30.0, 36.25], [3.0, 2.5])
    assert drawn["complete"]["x"] == [40.0] and "infeasible" not in drawn


def test_older_trials_without_hours_and_d_have_no_such_plots(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    assert plots.figures(Findings.of(study)) == {}
    add(study, 8, 1.0, [4.0, 3.0, 2.0, float("inf")])
    assert set(plots.figures(Findings.of(study))) == {"learning-curves", "landscape"}
    json.loads(plots.figures(Findings.of(study))["learning-curves"].to_json(), parse_constant=pytest.fail)


def test_no_label_covers_another() -> None:
    crowd = [(1.0, 1.0)] * 10 + [(2.0, 2.0)]
    placed = place_labels(crowd, ["label"] * 11, [False, False], AROUND)
    near = [place for place in placed[:10] if place]
    assert 0 < len(near) == len(set(near)) <= len(AROUND) and placed[10] == AROUND[0]
    assert place_labels([(0, 0), (0, 1)], ["a", "b"], [False, False], AROUND) == [AROUND[0]] * 2


def test_the_leaderboard_as_csv(study: optuna.Study) -> None:
    rows = list(csv.DictReader(io.StringIO(leaderboard(Findings.of(study)))))
    assert [row["trial"] for row in rows] == ["1", "0", "2", "3", "4"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "", ""]
    assert rows[0]["val/loss"] == "2.5" and rows[0]["train.d_coef"] == "0.5" and rows[0]["full_hours"] == "36.25"
    assert rows[1]["baseline"] == "yes" and rows[3]["state"] == "pruned"
    assert rows[4]["state"] == "infeasible" and rows[4]["reason"] == OUT_OF_MEMORY


@pytest.mark.parametrize("budget", [{"samples": 160}, {"steps": 40}])
def test_the_best_configuration_is_a_spec_for_the_same_full_run(tmp_path: Path, budget: dict[str, int]) -> None:
    study = new_study(tmp_path, **budget)
    add(study, 16, 0.123456789, [4.0, 3.5, 3.2, 3.0])
    path = tmp_path / "best.toml"
    path.write_text(best_spec(study, Findings.of(study), study.best_trial))
    wanted = full_setup(stored_spec(study), study.best_params)
    assert full_setup(StudySpec.load(path, search=False), {}) == wanted
    assert wanted.config.batch_size == 16 and wanted.config.d_coef == 0.123456789
    assert StudySpec.load(path).search == stored_spec(study).search


def test_toml_of_any_plain_values_reads_back() -> None:
    import tomllib

    values = {
        "a": {"quoted.key": 'C:\\x "y"\n\x7f한국어', "list": [1, 2.5, True], "table": {"low": 1e-05, "한": []}},
        "empty": {},
    }
    assert tomllib.loads(to_toml(values)) == values


def test_files_are_replaced_and_served_by_the_dashboard(stored: optuna.Study, tmp_path: Path) -> None:
    page = StudyPage(stored, tmp_path)
    page.update(now=True)
    add(stored, 8, 0.2, [2.0, 1.9, 1.8, 1.75])
    page.update(now=True)
    known = {meta.filename: meta for meta in get_all_artifact_meta(stored, storage=stored._storage)}
    assert set(known) == {BEST_SPEC, LEADERBOARD} and len(list(artifact_dir(stored._storage).glob("[0-9a-f]*"))) == 2
    client = next(clients := served(tmp_path))
    client.log_in()
    status, body = client.request("GET", f"/artifacts/{stored._study_id}/{known[BEST_SPEC].artifact_id}")
    assert status == 200 and "trial 5: val/loss 1.7500" in body
    assert f"(/artifacts/{stored._study_id}/{known[LEADERBOARD].artifact_id})" in get_note(stored)
    _, detail = client.request("GET", f"/api/studies/{stored._study_id}")
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


def test_a_launch_and_a_full_run_leave_their_pages(
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
    assert "promoted from [toy](/dashboard/studies/1)" in get_note(load_study("toy.full", study._storage))


def test_a_page_that_can_not_be_written_stops_no_launch_and_is_said_once(
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
        "the study's page is not up to date (StorageInternalError: database is locked); all else goes on"
    ]


def test_a_deleted_study_stops_nothing(study: optuna.Study, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = StudyPage(study, tmp_path)
    optuna.delete_study(study_name="toy", storage=study._storage)
    page.update(now=True)
    assert "no longer in the storage" in caplog.text


def test_updates_take_one_part_in_a_hundred_of_the_time(
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


def test_of_two_writers_one_leaves_it_to_the_other(study: optuna.Study, tmp_path: Path) -> None:
    with locked(artifact_dir(study._storage, tmp_path), ".toy.lock"):
        StudyPage(study, tmp_path).update(now=True)
    assert get_note(study) == ""
    StudyPage(study, tmp_path).update(now=True)
    assert "### Leaderboard" in get_note(study)
