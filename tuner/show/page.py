"""A study's page in optuna-dashboard, kept up to date while the study runs: note, plots, files.

It can neither stop nor slow training: it takes at most one second in a hundred, and logs a failing storage once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna_dashboard import get_note, save_note, save_plotly_graph_object
from sqlalchemy.exc import SQLAlchemyError

from trainer.errors import UserError
from tuner.show import files
from tuner.show.note import full_note, promote_command, study_note, with_own_text
from tuner.show.plots import figures
from tuner.show.samples import save_samples
from tuner.study.optuna_internals import id_of, storage_of
from tuner.study.record import StudyRecord, full_study
from tuner.study.storage import artifact_dir

log = logging.getLogger(__name__)

MIN_INTERVAL_S = 5.0
MAX_SHARE = 0.01
"""Maximum part of the time that is spent here."""


class StudyPage:
    """Writes a study's page.

    Args:
        run_root: Folder of the study's runs, and of its artifacts unless the storage is a file.
    """

    def __init__(self, study: optuna.Study, run_root: Path) -> None:
        self.study, self.run_root = study, run_root
        self._next = time.monotonic() + MIN_INTERVAL_S
        self._saved: dict[str, str] = {}
        self._failed = False

    @contextmanager
    def keep_updated(self) -> Iterator[Callable[[], None]]:
        """Yield `on_change`, which updates the page in a thread while the next trial starts.

        On exit without an exception the page is written once more.
        """
        pending = Future[None]()
        pending.set_result(None)

        def on_change() -> None:
            nonlocal pending
            if pending.done():
                pending.result()
                pending = thread.submit(self.update)

        with ThreadPoolExecutor(1, thread_name_prefix="page") as thread:
            yield on_change
        pending.result()
        self.update(now=True)

    def update(self, *, now: bool = False) -> None:
        """Write the page unless it was written a moment ago; `now` writes it in any case."""
        started = time.monotonic()
        if started < self._next and not now:
            return
        try:
            self._write()
        except (StorageInternalError, SQLAlchemyError, OSError, UserError) as error:
            if not self._failed:
                log.warning(
                    "the study's page is not up to date (%s: %s); training continues", type(error).__name__, error
                )
            self._failed = True
        except Exception:
            # A defect here must not end a run of days; its traceback is logged.
            if not self._failed:
                log.exception("the study's page could not be written; training continues")
            self._failed = True
        cost = time.monotonic() - started
        self._next = started + cost + max(MIN_INTERVAL_S, cost / MAX_SHARE)

    def _write(self) -> None:
        folder = artifact_dir(storage_of(self.study), self.run_root)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Two writers would mix their pieces of one text: the second one leaves the page to the first.
            with FileLock(folder / f".{self.study.study_name}.lock", timeout=0):
                self._write_locked(folder)
        except Timeout:
            return

    def _write_locked(self, folder: Path) -> None:
        study = self.study
        if study.study_name not in optuna.get_all_study_names(storage_of(study)):
            raise UserError(f"study {study.study_name} is no longer in the storage: somebody deleted it.")
        record = StudyRecord.read(study)
        texts = {files.LEADERBOARD: files.leaderboard(record)}
        if record.best is not None:
            texts = {files.BEST_SPEC: files.best_spec(record, record.best), **texts}
        addresses = {}
        for name, text in texts.items():
            artifact_id = files.save_artifact(study, folder, name, text)
            addresses[name] = f"/artifacts/{id_of(study)}/{artifact_id}"
        promote = promote_command(record, self.run_root)
        _save_note(study, study_note(record, promote, addresses, save_samples(record, folder)))
        if (full := full_study(study)) is not None:
            _save_note(full, full_note(record, promote))
        for name, figure in figures(record).items():
            # Each 2 kB are a commit: skip figures that have not changed.
            if self._saved.get(name) != (text := figure.to_json()):
                save_plotly_graph_object(study, figure, graph_object_id=name)
                self._saved[name] = text


def _save_note(study: optuna.Study, note: str) -> None:
    save_note(study, with_own_text(note, get_note(study)))
