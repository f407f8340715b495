"""One browser and one small study for the tests of a file, and dashboards on the loopback interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from optuna.storages import RDBStorage

from tests.browser.chromium import find_chromium, open_browser
from tests.tuner.studies_for_tests import build
from tuner import launch
from tuner.show.server import make_dashboard
from tuner.study.storage import open_storage
from tuner.study.tracked_run import Runtime

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE_MS = 60_000
"""Milliseconds for a page to draw: on a busy machine it takes seconds."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine: install the system's chromium")
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_browser(executable))
        except ModuleNotFoundError:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip("playwright is not installed: pip install -e '.[dev]'")
        yield opened


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own, without a token."""
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        context.set_default_timeout(PATIENCE_MS)
        yield context.new_page()


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser") / "runs"


@pytest.fixture(scope="module")
def url(browser: Browser, run_root: Path) -> str:
    """The storage of a launched study, `toy`. After the browser: without one nothing is trained."""
    run_root.mkdir()
    url = f"sqlite:///{run_root}/tuner.db"
    launch(build(**{"trial.num_trials": 3}), storage=url, runtime=Runtime(run_root, track=False))
    return url


@pytest.fixture
def serve(url: str) -> Iterator[Callable[..., str]]:
    """Starts a dashboard and returns the address to open, its token included."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(_dashboard(url, **options))


@contextmanager
def _dashboard(url: str, *, read_only: bool = False) -> Iterator[str]:
    storage = open_storage(url, must_exist=True)
    server, address = make_dashboard(storage, port=0, read_only=read_only)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        storage.remove_session()
        (storage if isinstance(storage, RDBStorage) else storage._backend).engine.dispose()


def at(address: str, path: str) -> str:
    """Another page of the dashboard that is served there."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}{path}"
