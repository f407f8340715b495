"""The note: the user's text stays, long lists are cut, and the command can be pasted."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna_dashboard import get_note, save_note
from sqlalchemy import make_url

from tests.tuner.show.made_studies import add_trial, new_study, read
from tuner.show.note import FENCE, MAX_RANKED, escape, promote_command, study_note, with_own_text
from tuner.show.page import StudyPage
from tuner.study.storage import open_storage


def note_of(study: optuna.Study) -> str:
    return study_note(read(study), "tuner promote toy", {})


def rows(note: str, heading: str) -> list[list[str]]:
    table = note.partition(f"### {heading}\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def test_markdown_in_text_is_escaped() -> None:
    assert escape("a`b\n[c](d)") == "a\\`b \\[c\\](d)"


def test_long_leaderboard_ends_with_the_baseline() -> None:
    study = new_study()
    add_trial(study, [99.0] * 4, baseline=True)
    for i in range(30):
        add_trial(study, [3.0 + i] * 4)
        add_trial(study, [], infeasible="x" * 1000)
    note = note_of(study)
    leaderboard = rows(note, "Leaderboard")
    assert len(leaderboard) == MAX_RANKED and leaderboard[0][:2] == ["1", "1"]
    assert leaderboard[-1][:2] == ["31", "0"] and leaderboard[-1][-1] == "baseline"
    assert "16 more complete trials" in note and "22 earlier ones" in note
    assert len(note) < 6000


def test_empty_study_has_a_note() -> None:
    note = note_of(new_study())
    assert "**No trial is complete yet.**" in note and "so far none" in note and "### Confirmation" not in note


def test_text_of_the_user_stays_before_and_below_the_note(study: optuna.Study, tmp_path: Path) -> None:
    save_note(study, "mine, from before")
    page = StudyPage(study, tmp_path)
    page.update(now=True)
    save_note(study, get_note(study) + "\nand from after")
    page.update(now=True)
    note = get_note(study)
    assert note.count("### Leaderboard") == note.count("mine, from before") == note.count("and from after") == 1
    assert note.index("### Leaderboard") < note.index("mine, from before")


def test_text_below_a_note_of_version_0_1_0_stays() -> None:
    old = (
        "- **Goal**: the lowest val/loss\n\nWritten 2026-01-02 03:04 UTC.\n\n---\n\n"
        "*Above: written by tuner after each trial. Below: yours, and it stays.*\n\nmine"
    )
    assert with_own_text("new", old) == f"new\n\n---\n\n{FENCE}\n\nmine"


def test_password_is_not_in_the_command(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.show.note.database_url", lambda _: make_url("postgresql://me:secret@host/db"))
    command = promote_command(read(study), Path("/my runs"))
    assert command == "tuner promote toy --storage \"$TUNER_STORAGE\" --run-root '/my runs'"


def test_command_names_storage_and_folder(tmp_path: Path) -> None:
    storage: BaseStorage = open_storage(f"sqlite:///{tmp_path}/tuner.db")
    record = read(new_study(storage))
    command = f"tuner promote toy --storage sqlite:///{tmp_path}/tuner.db"
    assert promote_command(record, Path("/runs")) == f"{command} --run-root /runs"
    assert promote_command(record, Path("runs"), tmp_path) == f"cd {tmp_path}\n{command}"
