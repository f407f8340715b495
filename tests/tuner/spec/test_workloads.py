"""The module of a workload: found, or refused with one line that says where to look."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from tests.tuner.studies_for_tests import TOML, write
from trainer import UserError
from tuner.cli import main
from tuner.spec.study_toml import StudySpec
from tuner.spec.workloads import load_workload_class
from tuner.study.launch import open_study
from tuner.study.record import read_spec

SOUND = "from tests.toy import Toy\n\nclass Mine(Toy):\n    pass\n"


@pytest.fixture(autouse=True)
def _modules_and_path_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def study(folder: Path, code: str, module: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    return write(folder, TOML.replace("tests.toy:Toy", f"{module}:Mine"))


BROKEN = {
    "syntax": ("import os\n\ndef f(:\n", "line 3: def f(:", "SyntaxError: invalid syntax"),
    "import": ("from trainer import Nothing\n", "line 1: from trainer import Nothing", "ImportError: cannot import"),
    "package": ("\nimport no_such_package\n", "line 2: import no_such_package", "it needs the package no_such_package"),
    "any": ("def f():\n    return {}['x']\n\nf()\n", "line 2: return {}['x']", "KeyError: 'x'"),
    "deep": ("import json\n\njson.loads('[')\n", "line 3: json.loads('[')", "JSONDecodeError: Expecting value"),
    "bare": ("raise RuntimeError\n", "line 1: raise RuntimeError", "RuntimeError ("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unimportable_module_is_named_with_file_line_and_error(tmp_path: Path, name: str) -> None:
    code, place, what = BROKEN[name]
    study(tmp_path, code, f"broken_{name}")
    with pytest.raises(UserError) as found:
        load_workload_class(f"broken_{name}:Mine", tmp_path)
    text = str(found.value)
    assert f"({tmp_path}/broken_{name}.py, {place})" in text and what in text and "\n" not in text
    assert found.value.__cause__ is not None


@pytest.mark.parametrize("command", ["launch", "train", "doctor"])
def test_commands_report_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    study(tmp_path, "import os\nx = 1 / 0\n", "broken_command")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setattr(sys, "argv", ["tuner", command, "study.toml"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    line = f"ZeroDivisionError: division by zero ({tmp_path}/broken_command.py, line 2: x = 1 / 0): correct it there."
    if command == "doctor":
        assert ended.value.code == 1 and "fail spec" in printed.out and line in printed.out
    else:
        assert ended.value.code == 2 and len(printed.err.splitlines()) == 1 and line in printed.err


def test_user_error_of_the_module_itself_stays_unchanged(tmp_path: Path) -> None:
    study(tmp_path, "from trainer import UserError\nraise UserError('set MY_DATA.')\n", "telling")
    with pytest.raises(UserError, match=r"^set MY_DATA\.$"):
        load_workload_class("telling:Mine", tmp_path)


def test_moved_study_continues_from_its_new_folder(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    spec = StudySpec.load(study(tmp_path / "old", SOUND, "moved_study"))
    opened = open_study(spec, storage)
    del sys.modules["moved_study"]
    sys.path.remove(str(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(UserError, match=rf"no module moved_study in {tmp_path}/old .* does not exist: .* tuner launch"):
        read_spec(opened)
    again = open_study(StudySpec.load(tmp_path / "new/study.toml"), storage)
    assert again.user_attrs["base_dir"] == str(tmp_path / "new")
    assert read_spec(again).workload_class.__module__ == "moved_study"


def test_copied_study_continues_from_its_new_folder(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    open_study(StudySpec.load(study(tmp_path / "old", SOUND, "copied_study")), storage)
    del sys.modules["copied_study"]
    sys.path.remove(str(tmp_path / "old"))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    again = open_study(StudySpec.load(tmp_path / "new/study.toml"), storage)
    assert again.user_attrs["base_dir"] == str(tmp_path / "new")


def test_file_with_a_used_name_and_another_text_is_refused(tmp_path: Path) -> None:
    study(tmp_path, "raise RuntimeError\n", "json")
    with pytest.raises(UserError, match=rf"json/__init__\.py has the same name as {tmp_path}/json\.py, .* rename"):
        load_workload_class("json:Mine", tmp_path)


def test_missing_module_and_class_without_workload_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no module no_such_module in {tmp_path} .* correct the name; or, .* moved"):
        load_workload_class("no_such_module:Mine", tmp_path)
    study(tmp_path, "Mine = int\n", "no_workload")
    with pytest.raises(UserError, match=r"has no class Mine that is a trainer\.Workload"):
        load_workload_class("no_workload:Mine", tmp_path)
