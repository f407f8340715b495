from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from tuner import launch
from tuner.spec.study_toml import StudySpec
from tuner.study.storage import open_storage
from tuner.study.tracked_run import Runtime

Launched = Callable[[StudySpec, Path], optuna.Study]


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The study of a spec with its runs, in a folder. It is trained once: each test has a copy."""
    made: dict[str, Path] = {}

    def copy(spec: StudySpec, folder: Path) -> optuna.Study:
        key = repr(spec)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("launched")
            launch(spec, storage=f"sqlite:///{made[key]}/tuner.db", runtime=Runtime(made[key] / "runs", track=False))
        shutil.copytree(made[key] / "runs", folder / "runs")
        with (
            closing(sqlite3.connect(made[key] / "tuner.db")) as source,
            closing(sqlite3.connect(folder / "tuner.db")) as target,
            target,
        ):
            source.backup(target)
            # Trials store the absolute path of their run directory.
            places = str(made[key]), str(folder)
            target.execute("UPDATE trial_user_attributes SET value_json = replace(value_json, ?, ?)", places)
        return optuna.load_study(study_name=spec.study.name, storage=open_storage(f"sqlite:///{folder}/tuner.db"))

    return copy
