"""Whether the disk holds what a study writes: checkpoints, and the packed store of its data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainer.units import format_bytes
from tuner.doctor.check import Check

LEAST = 50_000_000
"""Bytes without which not even logs and the storage go on."""


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that is there."""
    folder = folder.resolve()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_run_root(run_root: Path) -> Check | None:
    """What is wrong with the folder of the run directories; None where they can be written."""
    folder = nearest(run_root)
    if not folder.is_dir():
        return Check("disk", "fail", f"{folder} is no folder", "choose another --run-root")
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} can't be written to", "choose another --run-root")
    return None


def check_free(run_root: Path, study: str | None = None, *, free: float | None = None) -> Check:
    """Whether one more checkpoint like the study's last one fits. What a new study needs, only its model says.

    Args:
        free: Bytes, in place of those that are free on the disk.
    """
    if problem := check_run_root(run_root):
        return problem
    folder = nearest(run_root)
    free = shutil.disk_usage(folder).free if free is None else free
    largest = max(map(_size, (run_root / study).glob("*/*.pth")), default=0) if study else 0
    message = f"{format_bytes(free)} free in {folder}"
    remedy = "free some space, or choose another --run-root"
    if free < max(largest, LEAST):
        last = f"the last checkpoint of {study} has {format_bytes(largest)}"
        wanted = last if largest > LEAST else "too little for logs and the storage"
        return Check("disk", "fail", f"{message}; {wanted}", remedy)
    if free < 2 * largest:
        # The one before is removed once the new one is whole.
        return Check("disk", "warn", f"{message}: room for one more checkpoint of {format_bytes(largest)}", remedy)
    return Check("disk", "ok", message)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # replaced meanwhile
        return 0


def check_checkpoints(
    run_root: Path, study: str, *, checkpoint: int, best: int, num_trials: int, num_full: int
) -> Check:
    """Whether the checkpoints of the study and of its full run fit beside what is there.

    Args:
        checkpoint: Bytes of one.
        best: Bytes of a run's files of best weights.
        num_trials: How many trials keep a checkpoint at a time.
        num_full: How many checkpoints the full run keeps.
    """
    if problem := check_run_root(run_root):
        return problem
    # One more while it is written.
    needed = num_trials * (checkpoint + best) + num_full * checkpoint + best + checkpoint
    folder, there = nearest(run_root), checkpoint_bytes(run_root / study)
    free = shutil.disk_usage(folder).free
    message = (
        f"checkpoints of {format_bytes(checkpoint)}: {format_bytes(needed)} for {num_trials} trials and the full run, "
        f"{format_bytes(free)} free in {folder}" + (f" beside {format_bytes(there)} of them" if there else "")
    )
    if free + there < needed:
        return Check("disk", "fail", message, "free some space, or choose another --run-root")
    return Check("disk", "ok", message)


def checkpoint_bytes(folder: Path) -> int:
    """Of all checkpoints under `folder`, each file counted once however many names it has."""
    stats = [path.stat() for path in folder.rglob("*.pth")]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
