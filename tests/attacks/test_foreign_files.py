"""Attacks on files that are not ours: none is deleted, and a folder in place of a file is one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import optuna
import pytest
import torch

from tests.commands import Command
from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML
from trainer import TrainConfig, UserError, train
from trainer.checkpoint import delete_checkpoints, read_checkpoint
from trainer.run_folder import MARK
from tuner.study.optuna_internals import storage_of


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(run_dir: Path, steps: int = 4) -> None:
    train(Toy(), TrainConfig(steps=steps, save_every=2, precision="fp32", device="cpu"), run_dir=run_dir)


def test_folder_of_the_user_is_refused_and_stays_as_it_is(tmp_path: Path, run_command: Command) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("notes.txt", "draft.tmp", "step_000000001.pth.tmp"):
        (theirs / name).write_text("mine")
    (tmp_path / "study.toml").write_text(TOML)
    before = files(theirs)
    ended = run_command("train", "study.toml", "--run-dir", str(theirs), "--no-track")
    assert ended.returncode == 2 and files(theirs) == before
    assert "is no run directory and holds other files (draft.tmp): name a new folder" in ended.stderr.replace("\n", " ")
    with pytest.raises(UserError, match="is no run directory"):
        run(theirs)
    assert files(theirs) == before


def test_weights_of_another_trainer_are_not_overwritten(tmp_path: Path) -> None:
    """Its log may have the same name."""
    (tmp_path / "train.log").write_text("mine")
    torch.save({"model": {}}, tmp_path / "best_token_model.pth")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"holds other files \(best_token_model.pth\): name a new folder"):
        run(tmp_path)
    assert files(tmp_path) == before


def test_run_directory_that_can_not_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"can't be a run directory \(.+\): name another folder"):
            run(path)


def test_only_files_with_the_names_of_a_run_are_deleted(tmp_path: Path) -> None:
    run(tmp_path)
    ours = ["step_000000009.pth.tmp", "best_model.pth.tmp", "latest.pth.tmp"]
    theirs = ["draft.tmp", "weights.pth.tmp", "weights.pth", "step_x.pth", "notes.txt"]
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("mine")
    run(tmp_path, steps=6)
    assert not [name for name in ours if (tmp_path / name).exists()]
    delete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, MARK, ".lock"])


def test_run_directory_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / MARK).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, steps=6)
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 6


def test_copy_of_a_study_and_a_foreign_run_dir_cost_no_checkpoint(tmp_path: Path, run_command: Command) -> None:
    original, copy, foreign = tmp_path / "original", tmp_path / "copy", tmp_path / "foreign"
    original.mkdir()
    (original / "study.toml").write_text(TOML)

    def launch(folder: Path, num_trials: int) -> optuna.Study:
        options = ["--storage", f"sqlite:///{folder}/s.db", "--run-root", str(folder / "runs"), "--no-track"]
        command = ["launch", str(folder / "study.toml"), "--trials", str(num_trials), *options]
        assert run_command(*command).returncode == 0
        return optuna.load_study(study_name="toy", storage=f"sqlite:///{folder}/s.db")

    launch(original, 5)
    shutil.copytree(original, copy)
    foreign.mkdir()
    torch.save({"model": {}}, foreign / "best.pth")
    before = files(original / "runs"), files(foreign)
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{copy}/s.db")
    storage = storage_of(study)
    ids = [trial._trial_id for trial in study.get_trials(deepcopy=False)]
    engine = storage._backend.engine if hasattr(storage, "_backend") else storage.engine  # type: ignore[attr-defined]
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'run_dir' AND trial_id = ?",
            (f'"{foreign}"', ids[1]),
        )
    launch(copy, 9)
    assert (files(original / "runs"), files(foreign)) == before
    assert len(list((copy / "runs").glob("toy/trial-*/latest.pth"))) <= 5, "its own are deleted still"


@pytest.mark.parametrize(
    "name",
    [
        ".lock",
        "train.log",
        "step_000000020.pth.tmp",
        "latest.pth.tmp",
        "latest.pth.sha256",
        "latest.pth",
        "best.pth",
        MARK,
    ],
)
def test_folder_in_place_of_a_file_is_one_line_and_stays(tmp_path: Path, run_command: Command, name: str) -> None:
    (tmp_path / "study.toml").write_text(TOML)
    command = ["train", "study.toml", "--run-dir", "run", "--no-track", "--set"]
    assert run_command(*command, "full.samples=80").returncode == 0
    target = tmp_path / "run" / name
    target.unlink(missing_ok=True)
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    ended = run_command(*command, "full.samples=160")
    assert (target / "notes.txt").read_text() == "mine"
    assert ended.returncode in (0, 2) and "Traceback" not in ended.stdout + ended.stderr
    if ended.returncode == 2:
        assert str(target).removesuffix(".tmp") in ended.stderr.replace("\n", "")
