"""The folders that hooks leave in a run directory: `samples/step_000001600/` with sound, images, texts, metrics.json.

A folder has another name while its hook runs or after it has failed, so that nothing half-written is read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIXES = (".wav", ".png", ".txt")
METRICS = "metrics.json"
MAX_METRICS_BYTES = 1_000_000
MAX_BYTES = 50_000_000
"""Larger files stay on the disk alone: the dashboard and Aim store copies."""


@dataclass(frozen=True)
class Samples:
    """What a hook left for one checkpoint."""

    step: int
    folder: Path
    files: Sequence[Path]
    metrics: dict[str, float]


def samples_dir(run_dir: Path, step: int) -> Path:
    """The folder of a step."""
    return run_dir / "samples" / f"step_{step:09d}"


def read_all_samples(run_dir: Path) -> list[Samples]:
    """The samples of a run by step."""
    return [read_samples(folder) for folder in sorted(run_dir.glob(f"samples/step_{'[0-9]' * 9}"))]


def read_samples(folder: Path) -> Samples:
    """The samples in a folder; files of other kinds, and too large ones, are left out."""
    # A name that is not UTF-8 can't be stored.
    named = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.name.isprintable()]
    files = [path for path in named if path.is_file() and path.stat().st_size <= MAX_BYTES]
    return Samples(int(folder.name.removeprefix("step_")), folder, files, _read_metrics(folder / METRICS))


def _read_metrics(path: Path) -> dict[str, float]:
    """The finite numbers in metrics.json by name; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        # Every number as a float: a whole number may be too large for one. A deep nesting is a RecursionError.
        values = json.loads(path.read_bytes(), parse_int=float) if path.stat().st_size <= MAX_METRICS_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        _warn(path)
        return {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, float) and math.isfinite(value) and name.isprintable()
    }


@cache
def _warn(path: Path) -> None:
    """Once: the study's page reads all samples again after each validation."""
    log.warning(
        "%s is left out: it must be one JSON object of numbers, of %s bytes at most", path, f"{MAX_METRICS_BYTES:,}"
    )
