"""Attacks with wrong input: each mistake is one line and exit code 2, and nothing is written before it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.commands import Command
from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML, build, finished_study
from trainer import UserError
from tuner.promotion.length import LengthRequest
from tuner.promotion.promote import check_before_confirmation
from tuner.study import sqlite
from tuner.study.keys import write_study
from tuner.study.launch import open_study

BRACKETS, DIGITS = "[" * 5000, "9" * 5000
KINDS: dict[str, Any] = {"study.workload": "tests.attacks.test_one_line:Kinds"}


class Kinds(Toy):
    kind: int | str = 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("launch study.toml --timeout 99999999999999999999h", "--timeout 9999"),
        ("launch study.toml --timeout 99999999h", "--timeout 9999"),
        (f"launch study.toml --set train.batch_size={BRACKETS}", "--set train.batch_size: the value has too many"),
        (f"launch study.toml --set train.batch_size={DIGITS}", "--set train.batch_size: the value has too many"),
        ("train study.toml --run-dir loop", "Symlink loop"),
        ("launch study.toml --run-root loop", "loop"),
        ("train study.toml --set train.slice_p=9223372036854775807", "train.slice_p 9223372036854775807"),
        ("train study.toml --set full.eval_every=7", "full.eval_every 7: a step may take 8 samples"),
        ("launch study.toml --set full.eval_every=15", "full.eval_every 15: a step may take 16 samples"),
        ("train study.toml --init none.pth", "checkpoint none.pth does not exist"),
        ("train study.toml --init study.toml", "checkpoint study.toml is damaged, or holds code"),
        ("new x.full", "x.full: the ending .full"),
        ("doctor none.toml", "none.toml: no such study spec"),
        ("train nested.toml", "nested.toml: not valid TOML"),
        ("train digits.toml", "digits.toml: not valid TOML"),
        ("launch", "Missing argument"),
        ("launch study.toml --workers none", "Invalid value for '--workers'"),
        ("lunch study.toml", "tuner --help lists"),
        ("launch study.toml --wrokers 2", "tuner launch --help lists"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, run_command: Command, command: str, words: str) -> None:
    (tmp_path / "study.toml").write_text(TOML)
    (tmp_path / "nested.toml").write_text(f"a = {BRACKETS}")
    (tmp_path / "digits.toml").write_text(f"a = {DIGITS}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "runs").mkdir()
    ended = run_command(*command.split(), *(["--no-track"] if command.startswith(("launch study", "train")) else []))
    assert ended.returncode == 2, ended
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tuner: ") and words in lines[0], ended.stderr
    assert not list((tmp_path / "runs").rglob("train.log"))
    assert len(lines[0]) < 400


def test_choices_of_numbers_that_get_text_are_one_line(tmp_path: Path) -> None:
    before = build(**KINDS, **{"search.workload.kind": {"choices": [1, 2]}})
    study = open_study(before, f"sqlite:///{tmp_path}/s.db")
    trial = study.ask()
    trial.suggest_int("workload.kind", 1, 2)
    with pytest.raises(UserError, match=r"search.workload.kind: its trials are stored with numbers alone"):
        open_study(build(**KINDS, **{"search.workload.kind": {"choices": [1, 2, "x"]}}), f"sqlite:///{tmp_path}/s.db")


def test_confirmation_trains_nothing_before_a_refusal(tmp_path: Path) -> None:
    study = finished_study(tmp_path)
    folder = tmp_path / "full-trial-00003"
    (folder / "latest.pth").touch()
    write_study(
        study,
        base_dir=str(tmp_path),
        promotions=[{"trial": 3, "run_dir": str(folder), "best": 3, "continued_from": None}],
    )
    with pytest.raises(UserError, match="--fresh: the full run of trial 3 was started"):
        check_before_confirmation(study, LengthRequest(), fresh=True)
    write_study(study, promotions=[], spec=build(**KINDS, **{"full.schedule": "cosine"}).to_dict())
    with pytest.raises(UserError, match="--steps 100: the trials followed a cosine"):
        check_before_confirmation(study, LengthRequest(100), fresh=False)


@pytest.mark.parametrize("is_open", [True, False])
def test_status_reads_a_database_in_a_folder_that_is_read_only(
    tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    folder = tmp_path / "read"
    folder.mkdir()
    study = finished_study(folder)
    if not is_open:
        study._storage.remove_session()
        study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.endswith("-shm")}
    # root may write everywhere
    monkeypatch.setattr(sqlite.os, "access", lambda path, mode: Path(path) != folder)
    ended = run_command("status", "toy", "--storage", f"sqlite:///{folder}/tuner.db")
    assert ended.returncode == 0 and "toy" in ended.stdout, ended.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.endswith("-shm")}


def test_database_that_is_read_without_locks_is_left_once_another_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = finished_study(tmp_path)
    study._storage.remove_session()
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    url = f"sqlite:///{tmp_path}/tuner.db"
    with monkeypatch.context() as patch:
        patch.setattr(sqlite.os, "access", lambda path, mode: Path(path) != tmp_path)
        reader = sqlite.open_sqlite(url, tmp_path / "tuner.db", must_exist=True)
    assert len(reader.get_all_studies()) == 2
    writer = optuna.create_study(study_name="other", storage=sqlite.open_sqlite(url, tmp_path / "tuner.db", True))
    with pytest.raises(UserError, match="another process writes to it since"):
        reader.get_all_studies()
    assert len(writer._storage.get_all_studies()) == 3
