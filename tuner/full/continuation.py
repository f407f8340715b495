"""A run that goes on from another run's checkpoint: a trial is a prefix of its confirmation and of its full run."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from trainer import UserError, Workload
from trainer.checkpoint import LATEST, digest_path, read_checkpoint

log = logging.getLogger(__name__)


def step_to_go_on_from(origin: Path, run_dir: Path) -> int | None:
    """The step of `origin`'s newest checkpoint; None where there is none that is whole. The log says why."""
    try:
        step: int = read_checkpoint(origin / LATEST, mmap=True)["step"]
    except UserError as error:
        log.warning("%s can't go on from %s: %s", run_dir.name, origin.name, error)
        return None
    return step


def go_on_from(origin: Path, run_dir: Path, workload: Workload) -> None:
    """Put the checkpoints of `origin` into `run_dir`, so that `train()` goes on from there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # The best ones too: else a run that never beats its first samples would have none. The state last: until it is
    # there, nothing has begun.
    for name in (*workload.best_checkpoints().values(), LATEST):
        for one in (origin / name, digest_path(origin / name)):
            if one.is_file():
                _link(one, run_dir / one.name)


def _link(source: Path, target: Path) -> None:
    """Link where the file system can: a full checkpoint may have 10 GB. Checkpoints are never written in place."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
