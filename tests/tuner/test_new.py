"""tuner new: the written study runs unchanged, and a mistake is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer import UserError
from trainer.laws import check_workload
from tuner import Runtime, StudySpec, launch, promote
from tuner.cli import main
from tuner.new import FILES, TEMPLATE, new
from tuner.spec.study_toml import StudySection
from tuner.template.workload import MyModel

ROOT = Path(__file__).parents[2]


COMMANDS = """
import sys
from tuner.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["tuner", *line.split()]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
"""


def test_written_study_is_launched_and_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cd studies/my.model-2 && tuner launch study.toml && tuner promote my.model-2" in new(
        Path("studies/my.model-2")
    )
    commands = [
        "launch study.toml --no-track --trials 1",
        "promote my.model-2 --no-track --steps 200",
        "status my.model-2 --json",
    ]
    # A process of its own: the module's name, workload, stays free in this one.
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(commands),
        cwd=tmp_path / "studies/my.model-2",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TUNER_STORAGE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[1/1 trials]" in done.stdout and "step 200, " in done.stdout
    assert json.loads(done.stdout[done.stdout.index("\n{") :])["full_runs"][0]["state"] == "finished"


def test_template_keeps_the_three_laws_and_learns(runtime: Runtime, tmp_path: Path) -> None:
    check_workload(MyModel())
    spec = StudySpec.load(TEMPLATE / "study.toml", {"study.workload": "tuner.template.workload:MyModel"})
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=1)
    result = promote(study, steps=300, runtime=runtime)
    # Chance would be a sixteenth; nine steps of ten follow from the ones before.
    assert result.metrics["val/accuracy"] > 0.8


def test_files_are_the_templates_but_for_the_name(tmp_path: Path) -> None:
    new(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(FILES)
    for name in FILES:
        written, template = (tmp_path / "mine" / name).read_text(), (TEMPLATE / name).read_text()
        assert written == template.replace("my-study", "mine")
    assert 'name = "mine"' in (tmp_path / "mine/study.toml").read_text()


@pytest.mark.parametrize("name", ["two words", ".hidden", "-x", "a/..", "한국어", "x;y", "line\n"])
def test_invalid_study_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder's name becomes the study's"):
        new(tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValidationError):
        StudySection(name=(tmp_path / name).name, workload="workload:MyModel")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "file exists already: choose another name."),
        ("folder", "folder exists already: choose another name."),
        ("dangling", "dangling exists already: choose another name."),
        ("file/mine", "file/mine can't be created (Not a directory): choose another place."),
        ("/proc/mine", "/proc/mine can't be created (No such file or directory): choose another place."),
        ("n" * 300, "can't be created (File name too long): choose another place."),
        (".", ".: the folder's name becomes the study's"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tuner", "new", name])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("tuner: ") and error.count("\n") == 1
    assert message in error
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "folder").iterdir())
