"""Whether the disk has room for a study's checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainer.units import format_bytes
from tuner.doctor.check import Check

MIN_FREE = 50_000_000
"""Bytes that logs and the storage need."""


def find_nearest_folder(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.resolve()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_run_root(run_root: Path) -> Check | None:
    """A failed check where the run root is no writable folder."""
    folder = find_nearest_folder(run_root)
    if not folder.is_dir():
        return Check("disk", "fail", f"{folder} is no folder", "choose another one")
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} is not writable", "choose another folder")
    return None


def check_free(run_root: Path, study: str | None = None, *, free: float | None = None) -> Check:
    """Whether one more checkpoint of the study fits. A new study has none to measure.

    Args:
        free: Free bytes. Default: those of the disk.
    """
    if problem := check_run_root(run_root):
        return problem
    folder = find_nearest_folder(run_root)
    free = shutil.disk_usage(folder).free if free is None else free
    largest = max(map(_size, (run_root / study).glob("*/*.pth")), default=0) if study else 0
    message = f"{format_bytes(free)} free in {folder}"
    remedy = "free some space, or choose another --run-root"
    if free < max(largest, MIN_FREE):
        last = f"the last checkpoint of {study} has {format_bytes(largest)}"
        wanted = last if largest > MIN_FREE else "too little for logs and the storage"
        return Check("disk", "fail", f"{message}; {wanted}", remedy)
    if free < 2 * largest:
        # The older checkpoint is deleted after the new one is complete.
        return Check("disk", "warn", f"{message}: room for one more checkpoint of {format_bytes(largest)}", remedy)
    return Check("disk", "ok", message)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # deleted in the meantime
        return 0


def check_checkpoints(
    run_root: Path, study: str, *, checkpoint: int, best: int, num_trials: int, num_full: int, milestones: int = 0
) -> Check:
    """Whether the checkpoints of the study and of its full run fit on the disk.

    Args:
        checkpoint: Bytes of a checkpoint.
        best: Bytes of a run's best weights.
        num_trials: Trials that keep a checkpoint at a time.
        num_full: Checkpoints that the full run keeps.
        milestones: Bytes of the weights that it never deletes.
    """
    if problem := check_run_root(run_root):
        return problem
    # One more, while it is written.
    needed = num_trials * (checkpoint + best) + num_full * checkpoint + best + milestones + checkpoint
    folder, there = find_nearest_folder(run_root), count_checkpoint_bytes(run_root / study)
    free = shutil.disk_usage(folder).free
    message = (
        f"checkpoints of {format_bytes(checkpoint)}: {format_bytes(needed)} for {num_trials} trials and the full run, "
        f"{format_bytes(free)} free in {folder}" + (f" and {format_bytes(there)} in its existing ones" if there else "")
    )
    if free + there < needed:
        return Check("disk", "fail", message, "free some space, or choose another --run-root")
    return Check("disk", "ok", message)


def count_checkpoint_bytes(folder: Path) -> int:
    """Bytes of all checkpoints under `folder`; hard links count once."""
    stats = [path.stat() for path in folder.rglob("*.pth")]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
