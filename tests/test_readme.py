"""The README's own code does what the README says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.laws import check_workload
from tuner import Runtime, StudySpec, launch, promote

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
STUDY = """
[study]
name = "doubling"
workload = "my_workload:Doubling"
[search]
"train.d_coef" = { low = 0.1, high = 10.0, log = true }
[trial]
samples = 400
num_trials = 2
[full]
samples = 800
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "my_workload.py" in block)
    (tmp_path / "my_workload.py").write_text(code)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def test_the_workload_keeps_the_laws(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("readme_workload", folder / "my_workload.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["readme_workload"] = module
    spec.loader.exec_module(module)
    check_workload(module.Doubling())


def test_the_study_is_launched_and_promoted(folder: Path) -> None:
    runtime = Runtime(folder / "runs", track=False)
    study = launch(StudySpec.load(folder / "study.toml"), storage=f"sqlite:///{folder}/tuner.db", runtime=runtime)
    assert study.best_trial.params
    result = promote(study, runtime=runtime)
    assert result.finished and (result.run_dir / "latest.pth").exists()


def test_every_file_of_the_tree_is_there() -> None:
    tree = README.partition("## What is where\n")[2].partition("```\n")[2].partition("```")[0]
    root, folder = Path(__file__).parent.parent, ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.partition(" ")[0]
            assert (root / folder).is_dir(), folder
        for name in re.findall(r"\b[\w/]+\.py\b", line):
            assert (root / folder / name).exists() or list((root / folder).rglob(name)), f"{folder}{name}"


def test_its_tables_are_those_of_the_records() -> None:
    script = Path(__file__).parent.parent / "scripts" / "readme_tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
