"""Continue a run from another run's checkpoint: a trial is a prefix of its confirmation and of its full run."""

from __future__ import annotations

import logging
from pathlib import Path

from trainer import UserError, Workload
from trainer.checkpoint import LATEST, link_checkpoint
from trainer.state_form import read_state

log = logging.getLogger(__name__)


def read_step(origin: Path, run_dir: Path) -> int | None:
    """Step of the newest checkpoint in `origin`; None if none is whole, and then the log gives the reason."""
    try:
        step: int = read_state(origin / LATEST)["step"]
    except UserError as error:
        log.warning("%s can't continue from %s: %s", run_dir.name, origin.name, error)
        return None
    return step


def link_checkpoints(origin: Path, run_dir: Path, workload: Workload) -> None:
    """Link the checkpoints of `origin` into `run_dir`, so that `train()` continues from there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # The best ones too: a run that never beats its first samples would have none. The state is last: until it is
    # linked, the run has not begun.
    for name in (*workload.best_checkpoints().values(), LATEST):
        if (origin / name).is_file():
            link_checkpoint(origin / name, run_dir / name)
