"""Fixtures for all tests: a quiet, single place for runs, and short configurations."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import run_command  # noqa: F401
from tuner.study.tracked_run import Runtime

# Tests that run in the background or under nohup ignore Ctrl-C and hang-ups, and their child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    # These models are tiny: a second thread would cost more in waiting than it computes.
    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True, scope="session")
def _compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code goes to a folder of its own, and starts cold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    """Runs under a temporary folder, without Aim."""
    return Runtime(tmp_path / "runs", track=False)
