"""Something on the screen that renews itself while a program works."""

from __future__ import annotations

import threading
from collections.abc import Callable

import optuna
from rich.console import Console, RenderableType
from rich.live import Live

EVERY = 0.5
"""Seconds between two drawings: each may read the study, some milliseconds."""


class Renewed:
    """Draws what `render` returns, from a thread: times go on while a trial compiles, and what a run tells its
    tracker costs it no drawing. What is printed meanwhile stands above it."""

    def __init__(self, render: Callable[[], RenderableType], console: Console, *, every: float = EVERY) -> None:
        self._render, self._every = render, every
        # Not rich's own thread: it would call `render`, which reads the storage, while it holds the console.
        self._live = Live(console=console, auto_refresh=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="display", daemon=True)

    def start(self) -> None:
        self._live.start()
        self._thread.start()

    def stop(self) -> None:
        """Draw it a last time, and leave it there."""
        self._closed.set()
        self._thread.join()
        self._draw()
        self._live.stop()

    def _renew(self) -> None:
        while not self._closed.is_set():
            self._draw()
            self._closed.wait(self._every)

    def _draw(self) -> None:
        try:
            self._live.update(self._render(), refresh=True)
        except optuna.exceptions.StorageInternalError:
            # The database is busy with somebody else's writing: the picture stays as it is until the next time.
            return
