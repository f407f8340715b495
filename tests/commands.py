"""The command line in the test's own process: a process of its own takes seconds to import torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tuner.cli import main


@dataclass(frozen=True)
class Finished:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Finished]


@pytest.fixture
def run_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `tuner` with these arguments in `tmp_path`; its run directories are then under runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Finished:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["tuner", *arguments])
            # With pytest's handlers there, the command would add none of its own.
            patch.setattr(logging.getLogger(), "handlers", [])
            main()
            sys.exit(0)
        return Finished(int(stopped.value.code or 0), *capfd.readouterr())

    return run
