"""Milliseconds of work on the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure_ms(action: Callable[[], object], runs: int = 10, warm_up: int = 3) -> float:
    """Milliseconds of one call, as a mean over calls in a row."""
    for _ in range(warm_up):
        action()
    synchronize()
    started = time.perf_counter()
    for _ in range(runs):
        action()
    synchronize()
    return round(1e3 * (time.perf_counter() - started) / runs, 4)
