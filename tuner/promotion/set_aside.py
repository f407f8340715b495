"""What a run that goes back keeps under other names: it passes these steps again, with other weights."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)

_OF_A_STEP = re.compile(r"(milestone|step)_(\d{9,})(\.pth|\.pth\.sha256)?")


def set_aside(run_dir: Path, *, after: int) -> None:
    """Move the milestones and the hooks' samples of later steps into a folder `replaced-N` of the run directory."""
    later = [
        path
        for path in (*run_dir.glob("milestone_*"), *run_dir.glob("samples/step_*"))
        if (match := _OF_A_STEP.fullmatch(path.name)) and int(match[2]) > after
    ]
    if not later:
        return
    folder = next(path for n in itertools.count(1) if not (path := run_dir / f"replaced-{n}").exists())
    for path in later:
        target = folder / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    log.info("milestones and samples after step %s are kept in %s", f"{after:,}", folder)
