"""The commands as a user gives them, with good and with wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Command
from tests.tuner.studies_for_tests import TOML, write
from trainer import UserError
from trainer.checkpoint import read_checkpoint
from tuner.cli.terminal import parse_duration

NO_TRACK = {command: ["--no-track"] for command in ("launch", "promote", "train")}


def test_path_from_launch_to_promotion(tmp_path: Path, run_command: Command) -> None:
    write(tmp_path)
    launched = run_command("launch", "study.toml", "--no-track")
    assert launched.returncode == 0, launched.stderr
    assert "trial 0 (baseline) starts" in launched.stdout
    assert "[3/3 trials]" in launched.stdout
    assert "tuner promote toy" in launched.stdout

    promoted = run_command("promote", "toy", "--no-track")
    assert promoted.returncode == 0, promoted.stderr
    assert "480 samples: val/loss" in promoted.stdout

    study = json.loads(run_command("status", "toy", "--json").stdout)
    assert study["full_runs"][0]["state"] == "finished"
    assert sum(study["trials"].values()) == 3
    table = run_command("status", "toy").stdout
    assert "baseline" in table and "best" in table and "full run of trial" in table
    assert "toy: " in run_command("status").stdout


def test_launch_stores_the_spec_with_its_overrides(tmp_path: Path, run_command: Command) -> None:
    write(tmp_path)
    changes = ("--set", "trial.num_trials=1", "--set", "full.steps=60", "--set", "train.weight_decay=0.02")
    launched = run_command("launch", "study.toml", "--no-track", *changes)
    assert launched.returncode == 0 and "[1/1 trials]" in launched.stdout, launched.stderr
    promoted = run_command("promote", "toy", "--no-track")
    assert promoted.returncode == 0 and "step 60" in promoted.stdout, promoted.stderr
    again = run_command("launch", "study.toml", "--no-track")
    assert again.returncode == 2 and "train.weight_decay was 0.02 and is now 0.01" in again.stderr


def test_train_takes_overrides_and_resumes(tmp_path: Path, run_command: Command) -> None:
    write(tmp_path)
    command = ("train", "study.toml", "--no-track", "--set", "train.optimizer=adamw", "--run-dir", "out")
    first = run_command(*command, "--set", "full.steps=5")
    assert first.returncode == 0 and "[Step 5] Loss: " in first.stdout, first.stderr
    again = run_command(*command, "--set", "full.steps=10")
    assert again.returncode == 0 and "at step 5" in again.stdout, again.stderr
    assert read_checkpoint(tmp_path / "out/latest.pth")["step"] == 10

    other = run_command("train", "study.toml", "--no-track", "--run-dir", "out")
    assert other.returncode == 2 and "--set train.optimizer=adamw" in other.stderr
    fresh = run_command("train", "study.toml", "--no-track", "--set", "full.steps=2", "--init", "out/latest.pth")
    assert fresh.returncode == 0 and "step 2" in fresh.stdout, fresh.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch", "none.toml"], "none.toml: no such study spec"),
        (["launch", "typo.toml"], "did you mean train.d_coef?"),
        (["launch", "study.toml", "--set", "batch_size=3"], "--set batch_size=3: write it as section.key=value"),
        (["launch", "study.toml", "--set", "trial.trials=3"], "did you mean trial.num_trials?"),
        (["launch", "study.toml", "--timeout", "soon"], "--timeout soon: write it as 8h"),
        (["launch", "study.toml", "--storage", "nonsense"], "storage nonsense: not a database URL"),
        (["launch", "study.toml", "--storage", "sqlite:////proc/no/t.db"], "storage sqlite:////proc/no/t.db"),
        (["launch", "study.toml", "--storage", "postgresql://u:p@127.0.0.1:1/x"], "can't be opened"),
        (["launch", "study.toml", "--storage", "sqlite:///text.db"], "can't be opened"),
        (["status", "none"], "no such database"),
        (["dashboard"], "no such database"),
        (["promote", "none"], "no such database"),
        (["train", "study.toml", "--set", "batch_size=3"], "--set batch_size=3: write it as section.key=value"),
        (["train", "study.toml", "--set", "train.batch_size=many"], "train.batch_size"),
        (["train", "study.toml", "--resume", "none.pth"], "none.pth does not exist"),
        (["train", "study.toml", "--init", "text.db"], "text.db is damaged"),
        (["train", "study.toml", "--set", "train.device=cuda"], "no CUDA device"),
        (["train", "study.toml", "--set", "train.batch_size=16", "--set", "workload.num_train=4"], "do not fill"),
        (["train", "study.toml", "--set", "workload.damaged=[1,2,3]"], "missing or damaged"),
        (["train", "study.toml", "--set", "workload.explode_at_batch_size=8"], "out of memory (CUDA out of memory"),
        (["train", "study.toml", "--run-root", "text.db"], "text.db"),
        (["launch", "study.toml/x"], "no such study spec"),
        (["launch", "cp949.toml"], "can't be read as UTF-8 text"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, run_command: Command, arguments: list[str], message: str
) -> None:
    write(tmp_path)
    (tmp_path / "typo.toml").write_text(TOML.replace("[train]", "[train]\nd_ceof = 2.0"))
    (tmp_path / "cp949.toml").write_bytes("# 한국어".encode("cp949"))
    (tmp_path / "text.db").write_text("this is text and neither a database nor a checkpoint\n" * 100)
    result = run_command(*arguments, *NO_TRACK.get(arguments[0], []))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_defect_keeps_its_traceback(tmp_path: Path, run_command: Command) -> None:
    (tmp_path / "broken_workload.py").write_text(
        "from tests.toy import Toy\nclass Broken(Toy):\n    def build_model(self):\n        return 1 / 0\n"
    )
    write(tmp_path, TOML.replace("tests.toy:Toy", "broken_workload:Broken"))
    # Python prints it and exits with code 1.
    with pytest.raises(ZeroDivisionError):
        run_command("train", "study.toml", "--no-track")


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['tuner', 'launch', '--help']\nfrom tuner.cli import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'optuna', 'aim'} & sys.modules.keys(), 'heavy import'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "Example: tuner launch" in result.stdout, result.stderr


def test_help_shows_the_tables_of_a_spec_in_their_brackets(run_command: Command) -> None:
    # The help is marked up, and text in brackets would be taken for a style.
    assert "from the spec's [train] and [full]." in run_command("train", "--help").stdout


@pytest.mark.parametrize(("text", "seconds"), [("8h", 28800), ("30m", 1800), ("90s", 90), ("1h30m", 5400)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5m", "8 hours", "8"])
def test_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="8h, 30m, 90s"):
        parse_duration(text)
