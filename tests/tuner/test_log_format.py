"""The commands on a terminal, in a pipe, and read by a program."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import Command
from tests.tuner.studies_for_tests import TOML, build, write
from tuner.cli.terminal import Format, follow_run, temporary_log
from tuner.study.launch import open_study
from tuner.study.storage import load_study, open_storage


def events(output: str) -> list[str]:
    """The kinds of the events, one a line; anything else on stdout is an error."""
    return [json.loads(line)["event"] for line in output.splitlines()]


def test_json_format_prints_events_alone(tmp_path: Path, run_command: Command) -> None:
    write(tmp_path)
    launched = run_command("launch", "study.toml", "--no-track", "--trials", "1", "--log-format", "json")
    assert launched.returncode == 0, launched.stderr
    kinds = events(launched.stdout)
    assert (kinds[0], kinds[-1]) == ("trial_started", "study_ended") and "evaluation" in kinds
    assert "Next: tuner status toy" in launched.stderr

    promoted = run_command("promote", "toy", "--no-track", "--log-format", "json")
    assert promoted.returncode == 0, promoted.stderr
    kinds = events(promoted.stdout)
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended") and {"metrics", "checkpoint"} <= set(kinds)
    assert "[Step 60] Loss: " in promoted.stderr


def test_confirmation_has_events_for_each_run_and_the_whole(tmp_path: Path, run_command: Command) -> None:
    write(tmp_path)
    assert run_command("launch", "study.toml", "--no-track", "--trials", "2").returncode == 0
    promoted = run_command("promote", "toy", "--confirm", "1", "--no-track", "--log-format", "json")
    assert promoted.returncode == 0, promoted.stderr
    lines = [json.loads(line) for line in promoted.stdout.splitlines()]
    confirmation = next(line for line in lines if line["event"] == "confirmation")
    trials = confirmation["trials"]
    assert confirmation["winner"] == trials[0]["number"] and set(trials[0]["values"]) == {"0", "1"}
    runs = [line["run"] for line in lines if line["event"] == "run_started"]
    assert runs[-1] == "full run of toy" and len(runs) == 1 + 2 * len(trials)
    assert f"confirmation of trial {confirmation['winner']}, seed 1, of toy" in runs


def test_warnings_follow_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("trainer.test")
    with temporary_log(Format.plain, logging.WARNING):
        log.info("not this")
        log.warning("the GPU is idle")
    assert capsys.readouterr() == ("the GPU is idle\n", "")
    with temporary_log(Format.json, logging.WARNING):
        log.warning("the GPU is idle")
    out, err = capsys.readouterr()
    assert events(out) == ["warning"] and err == "the GPU is idle\n"


def test_run_events_follow_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    with follow_run("a run", Format.json) as run:
        run.track({"train/loss": 1.0}, step=1, samples=8)
    assert events(capsys.readouterr().out) == ["run_started", "metrics"]
    with follow_run("a run", Format.plain) as run:
        run.track({"val/loss": 1.0}, step=1, samples=8)
    # Its log says all of it.
    assert capsys.readouterr().out == ""


LONG = TOML.replace("samples = 160\nevaluations = 4", "samples = 200_000\nevaluations = 2_000").replace(
    "samples = 480", "samples = 400_000"
)
"""One that does not end by itself within a test."""


def started(tmp_path: Path, text: str, *, stdout: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tuner", "launch", str(write(tmp_path, text)), "--no-track", "--trials", "1"]
    root = str(Path(__file__).parents[2])
    storage = f"sqlite:///{tmp_path}/tuner.db"
    environment = {**os.environ, "TUNER_STORAGE": storage, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def test_launch_into_a_closed_pipe_stops_with_a_checkpoint(tmp_path: Path) -> None:
    with started(tmp_path, LONG, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "trial 0" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 130
        assert process.stderr.read() == ""
    (trial,) = load_study("toy", open_storage(f"sqlite:///{tmp_path}/tuner.db")).trials
    assert trial.state.name == "RUNNING", "the same command continues with it"
    assert (tmp_path / "runs/toy/trial-00000/latest.pth").exists()


def test_closed_standard_output_does_not_stop_training(tmp_path: Path) -> None:
    command = f"{sys.executable} -m tuner train {write(tmp_path)} --no-track --run-dir {tmp_path}/run >&-"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run/latest.pth").exists()


def test_hang_up_stops_with_a_checkpoint(tmp_path: Path) -> None:
    with started(tmp_path, LONG, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert "trial 0" in process.stdout.readline()
        assert "after" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.wait(300) == 130
    assert (tmp_path / "runs/toy/trial-00000/latest.pth").exists()


def test_launch_outlives_its_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with started(tmp_path, TOML, stdout=theirs) as process:
        os.close(theirs)
        assert os.read(ours, 4096)
        # A session without this terminal gets no hang-up: all it meets is that nothing can be written.
        os.close(ours)
        assert process.wait(300) == 0
    (trial,) = load_study("toy", open_storage(f"sqlite:///{tmp_path}/tuner.db")).trials
    assert trial.state.name == "COMPLETE"


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_terminal_without_utf_8_gets_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Command, log_format: str
) -> None:
    write(tmp_path)
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    arguments = ("--no-track", "--run-dir", "한국어", "--log-format", log_format)
    trained = run_command("train", "study.toml", *arguments)
    assert trained.returncode == 0, trained.stderr
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "\\ud55c\\uad6d\\uc5b4" in shown
    if log_format == "json":
        assert json.loads(shown.splitlines()[-1])["run_dir"].endswith("한국어")


def test_watching_ends_with_ctrl_c_and_code_0(tmp_path: Path) -> None:
    open_study(build(), f"sqlite:///{tmp_path}/tuner.db")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tuner", "status", "toy", "--watch", "--interval", "0.2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        [*command, "--storage", f"sqlite:///{tmp_path}/tuner.db"], stdout=theirs, stderr=theirs, env=environment
    ) as process:
        seen, deadline = b"", time.monotonic() + 300
        while seen.count(b"Ctrl-C ends") < 2 and time.monotonic() < deadline:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    os.close(theirs)
    os.close(ours)
    assert b"study toy" in seen and b"Traceback" not in seen


def test_watching_and_json_exclude_each_other(run_command: Command) -> None:
    result = run_command("status", "--watch", "--json")
    assert result.returncode == 2
    assert result.stderr == "tuner: --watch and --json exclude each other: leave one out.\n"
