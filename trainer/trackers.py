"""The trackers by name: Aim, TensorBoard and Weights & Biases (W&B)."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from trainer.tracking import AimTracker, BackgroundTracker

log = logging.getLogger(__name__)

TrackerName = Literal["aim", "tensorboard", "wandb"]

WANDB_RUN = "wandb_run"
"""File in a run directory: the id of its W&B run."""


class TensorBoardTracker(BackgroundTracker):
    """Writes event files into the run directory. Parameters and checkpoints are texts."""

    NAME = "TensorBoard"

    @staticmethod
    def viewer(root: Path) -> str:
        return f"tensorboard --logdir {shlex.quote(str(root))}"

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # A run that was killed passes some steps again: what it wrote about them before is no longer shown.
        writer: Any = SummaryWriter
        writer = writer(str(self._run_dir), purge_step=self._first_step, flush_secs=10)
        text = json.dumps(self._params, indent=1, default=str, ensure_ascii=False)
        writer.add_text("params", "    " + text.replace("\n", "\n    "), self._first_step)
        return writer

    def _write(self, run: Any, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            run.add_scalar(name, value, step)

    def _write_checkpoint(self, run: Any, name: str, step: int) -> None:
        run.add_text("checkpoint", name, step)

    def _write_text(self, run: Any, name: str, text: str, step: int) -> None:
        run.add_text(name, text, step)

    def _close(self, run: Any) -> None:
        run.close()


class WandbTracker(BackgroundTracker):
    """Writes to the W&B project of the study's name; offline, to files in `root`, without a login or with
    WANDB_MODE=offline.

    A run directory stores the id of its W&B run, so that a resumed run continues the same curves.
    """

    NAME = "W&B"

    @staticmethod
    def viewer(root: Path) -> str:
        return f"wandb sync {shlex.quote(str(root))}/wandb/offline-run-*"

    def _open(self) -> Any:
        import wandb

        # W&B would ask on the terminal for a key.
        is_offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
        self._root.mkdir(parents=True, exist_ok=True)
        id_file = self._run_dir / WANDB_RUN
        run = wandb.init(
            project=self._experiment,
            name=self._run_dir.name,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            dir=str(self._root),
            config=json.loads(json.dumps(self._params, default=str)),
            mode="offline" if is_offline else None,
            # Trials follow each other in one process, and one may still be closing.
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Not W&B's own step, which drops what a run that was killed writes about a step again.
        run.define_metric("*", step_metric="step")
        id_file.write_text(run.id)
        if not run.offline:
            log.info("curves: %s", run.url)
        return run

    def _write(self, run: Any, values: Mapping[str, float], step: int) -> None:
        run.log({**values, "step": step})

    def _write_checkpoint(self, run: Any, name: str, step: int) -> None:
        run.summary[f"checkpoints/{name}"] = step

    def _write_text(self, run: Any, name: str, text: str, step: int) -> None:
        run.summary[name] = f"step {step}: {text}"

    def _close(self, run: Any) -> None:
        run.finish()


TRACKERS: Mapping[TrackerName, type[BackgroundTracker]] = {
    "aim": AimTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def installed_trackers(names: Sequence[TrackerName]) -> Iterator[type[BackgroundTracker]]:
    """The trackers of these names; one whose package is missing is named in the log and left out."""
    for name in dict.fromkeys(names):
        # W&B makes folders `wandb`: one in the working directory looks like a package, but without a file.
        if (spec := find_spec(name)) is None or spec.origin is None:
            _warn_of_missing(name)
        else:
            yield TRACKERS[name]


@cache
def _warn_of_missing(name: TrackerName) -> None:
    """Once in a process: a study's trials would repeat it."""
    remedy = "pip install 'prodigy-tuner[{name}]'"
    if name == "aim":
        remedy = "Aim has no package for Python 3.13" if sys.version_info >= (3, 13) else "pip install aim"
    log.warning("not tracked by %s: it is not installed (%s)", TRACKERS[name].NAME, remedy.format(name=name))
