"""Fixtures for all tests: a quiet, single place for runs, and short configurations."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# These models are tiny: a second thread would cost more in waiting than it computes, in child processes and BLAS too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from optuna.storages import RDBStorage
from sqlalchemy import make_url

from tests.commands import run_command  # noqa: F401
from tuner.study.tracked_run import Runtime

# Tests that run in the background or under nohup ignore Ctrl-C and hang-ups, and their child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_permanent: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as at the start, whatever a test set
    yield


@pytest.fixture(autouse=True, scope="session")
def _compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code goes to a folder of its own, and starts cold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _made_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new SQLite file is a copy of an empty study database: Optuna takes tenths of a second to create its tables."""
    made = tmp_path_factory.mktemp("database") / "empty.db"
    RDBStorage(f"sqlite:///{made}").engine.dispose()

    def open_copy(url: str, **arguments: Any) -> RDBStorage:
        path = Path(make_url(url).database or "")
        if not path.exists():
            shutil.copyfile(made, path)
        return RDBStorage(url, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.study.sqlite.RDBStorage", open_copy)
        yield


@pytest.fixture(autouse=True)
def _permanent_modules() -> Iterator[None]:
    """Collections need not walk the modules of earlier tests: with torch's compiler that takes a fifth of a second."""
    if len(sys.modules) > _permanent.get("modules", 0) + 50:
        gc.collect()
        gc.freeze()
        _permanent["modules"] = len(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    """Runs under a temporary folder, without Aim."""
    return Runtime(tmp_path / "runs", track=False)
