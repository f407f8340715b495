"""What a person sees of a study in optuna-dashboard, kept up to date while it runs: note, plots, files.

It can neither stop nor slow training: at most one second in a hundred goes into it, and where the storage fails
it says so once.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna_dashboard import get_note, save_note, save_plotly_graph_object
from sqlalchemy.exc import SQLAlchemyError

from trainer.errors import UserError
from tuner.full.runs import full_study
from tuner.show import files as artifacts
from tuner.show import plots
from tuner.show.findings import Findings
from tuner.show.note import full_note, promote_command, study_note, with_own_text

log = logging.getLogger(__name__)

MIN_INTERVAL_S = 5.0
MAX_SHARE = 0.01
"""Of the time, at most, is spent here."""


class StudyPage:
    """Keeps a study's page in optuna-dashboard.

    Args:
        run_root: Where the study's runs lie; its artifacts too, unless the storage is a file.
    """

    def __init__(self, study: optuna.Study, run_root: Path) -> None:
        self.study, self.run_root = study, run_root
        self._next = time.monotonic() + MIN_INTERVAL_S
        self._saved: dict[str, str] = {}
        self._failed = False

    def update(self, *, now: bool = False) -> None:
        """Write what is new, unless it was written a moment ago; `now` writes in any case."""
        started = time.monotonic()
        if started < self._next and not now:
            return
        try:
            self._write()
        except (StorageInternalError, SQLAlchemyError, OSError, UserError) as error:
            if not self._failed:
                log.warning(
                    "the study's page is not up to date (%s: %s); all else goes on", type(error).__name__, error
                )
            self._failed = True
        cost = time.monotonic() - started
        self._next = started + cost + max(MIN_INTERVAL_S, cost / MAX_SHARE)

    def _write(self) -> None:
        folder = artifacts.artifact_dir(self.study._storage, self.run_root)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Two writers would mix their pieces of one text; the one that comes second leaves it to the other.
            with FileLock(folder / f".{self.study.study_name}.lock", timeout=0):
                self._write_alone(folder)
        except Timeout:
            return

    def _write_alone(self, folder: Path) -> None:
        study = self.study
        if study.study_name not in optuna.get_all_study_names(study._storage):
            raise UserError(f"study {study.study_name} is no longer in the storage: somebody deleted it.")
        found = Findings.of(study)
        files = {artifacts.LEADERBOARD: artifacts.leaderboard(found)}
        if found.best is not None:
            files = {artifacts.BEST_SPEC: artifacts.best_spec(study, found, found.best), **files}
        addresses = {}
        for name, text in files.items():
            artifact_id = artifacts.save_artifact(study, folder, name, text)
            addresses[name] = f"/artifacts/{study._study_id}/{artifact_id}"
        promote = promote_command(study, self.run_root)
        _save_note(study, study_note(found, promote, addresses))
        if (full := full_study(study)) is not None:
            _save_note(full, full_note(found, promote))
        for name, figure in plots.figures(found).items():
            # Each 2 kB are a commit: what has not changed is not written again.
            if self._saved.get(name) != (text := figure.to_json()):
                save_plotly_graph_object(study, figure, graph_object_id=name)
                self._saved[name] = text


def _save_note(study: optuna.Study, note: str) -> None:
    save_note(study, with_own_text(note, get_note(study)))
