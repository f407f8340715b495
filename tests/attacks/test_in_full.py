"""Each stage of the attacks in full, in a tiny form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.full.__main__ import STAGES


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stage_finds_nothing(stage: str, tmp_path: Path) -> None:
    # In a process of its own: the stages fork, and change settings of the whole process.
    options = ["--only", stage, "--size", str(STAGES[stage][2]), "--json", str(tmp_path / "new" / "attacks.json")]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.attacks.full", *options], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ": 0 failures in " in ended.stdout
