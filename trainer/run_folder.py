"""What a run directory holds: its files by name, and the mark that makes the folder ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trainer.checkpoint_file import TEMPORARY, digest_path, is_checkpoint, remove
from trainer.errors import UserError

LATEST, STABLE, BEST = "latest.pth", "stable.pth", "best.pth"
MARK = ".tuner-run"
LOG = "train.log"

_CHECKPOINT = re.compile(r"(latest|stable|best|best_.+|step_\d{9,}|milestone_\d{9,})\.pth")
_UNMARKED = {".lock", ".claim", ".DS_Store"}
"""Files in a folder in which no run has begun."""


def open_run_folder(run_dir: Path) -> None:
    """Make a run directory and mark it. Only in a marked folder is anything deleted.

    Raises:
        UserError: The folder holds other files, and no run; or it can't be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / MARK).exists():
            return
        others = sorted({path.name for path in run_dir.iterdir()} - _UNMARKED)
        if others and not holds_state(run_dir):
            # Earlier versions left no mark. Weights without a digest beside such a log are another trainer's.
            foreign = sorted(path.name for path in _checkpoints(run_dir) if not is_checkpoint(path))
            if LOG not in others or foreign:
                raise UserError(
                    f"{run_dir} is no run directory and holds other files ({(foreign or others)[0]}): name a new "
                    "folder, or an empty one."
                )
        (run_dir / MARK).write_text("A run directory of prodigy-tuner.\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir} can't be a run directory ({error.strerror}): name another folder.") from error


def holds_state(run_dir: Path) -> bool:
    """Whether the directory has a state to continue, damaged or not. Other files are weights, or names of a state."""
    return (run_dir / LATEST).exists() or bool(list_steps(run_dir))


def step_file(step: int) -> str:
    """Name of the file with the state after `step` steps."""
    return f"step_{step:09d}.pth"


def milestone_file(step: int) -> str:
    """Name of the file with the weights after `step` steps that stays."""
    return f"milestone_{step:09d}.pth"


def list_steps(run_dir: Path) -> list[Path]:
    """The states by step, the newest last."""
    return sorted((path for path in run_dir.glob("step_*.pth") if path.stem[5:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """Step of a state by its file name."""
    return int(path.stem.removeprefix("step_"))


def newest_step(run_dir: Path) -> int | None:
    """Returns the step of the newest state by its file name, damaged or not; None if there is none."""
    return max(map(step_of, list_steps(run_dir)), default=None)


def delete_checkpoints(run_dir: Path) -> None:
    """Delete all checkpoints of a run directory; another process may do so too. Other files stay."""
    for path in _checkpoints(run_dir):
        delete(path)


def delete_unfinished(run_dir: Path) -> None:
    """Delete what a killed write has left."""
    for path in _checkpoints(run_dir, TEMPORARY):
        remove(path)


def delete(path: Path) -> None:
    """Delete a checkpoint."""
    remove(path)
    remove(digest_path(path))


def _checkpoints(run_dir: Path, suffix: str = "") -> Iterator[Path]:
    """Files with the names of checkpoints, followed by `suffix`."""
    for path in run_dir.glob(f"*.pth{suffix}"):
        if _CHECKPOINT.fullmatch(path.name.removesuffix(suffix)):
            yield path
