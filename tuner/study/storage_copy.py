"""Copies studies from one storage to another: trials, attributes, notes, promotions, full runs, and their files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.artifacts import get_all_artifact_meta
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from trainer.errors import UserError
from tuner.study.optuna_internals import storage_of
from tuner.study.storage import artifact_dir, load_study


def copy_studies(
    source: BaseStorage, target: BaseStorage, names: Sequence[str] | None = None, *, run_root: Path = Path("runs")
) -> dict[str, int]:
    """Copy studies, each with its full runs; returns the number of trials of each.

    Args:
        names: Default: all of them.
        run_root: See `artifact_dir`.

    Raises:
        UserError: A study is missing in the source, or is in the target already. Then nothing is copied.
    """
    there = optuna.get_all_study_names(source)
    for name in names or ():
        load_study(name, source)
        if name.endswith(".full"):
            raise UserError(f"study {name}: name {name.removesuffix('.full')}, which has its full runs with it.")
    wanted = [each for each in there if names is None or each.removesuffix(".full") in names]
    if present := sorted({*wanted} & {*optuna.get_all_study_names(target)}):
        raise UserError(f"study {present[0]} is in the target already: copy others with --study, or delete it there.")
    begun: dict[str, int] = {}
    try:
        for name in wanted:
            begun[name] = 0
            try:
                begun[name] = _copy_study(name, source, target, run_root)
            except DuplicatedStudyError:
                del begun[name]
                raise UserError(f"study {name} was created in the target meanwhile: nothing is copied.") from None
    except BaseException:
        # Half a study, or one without its full runs, would be continued as if it were whole.
        for name in begun.keys() & {*optuna.get_all_study_names(target)}:
            optuna.delete_study(study_name=name, storage=target)
        raise
    return begun


def _copy_study(name: str, source: BaseStorage, target: BaseStorage, run_root: Path) -> int:
    optuna.copy_study(from_study_name=name, from_storage=source, to_storage=target)
    study = load_study(name, source)
    _copy_files(study, artifact_dir(source, run_root), artifact_dir(target, run_root))
    return len(study.get_trials(deepcopy=False))


def _copy_files(study: optuna.Study, source: Path, target: Path) -> None:
    if source == target:
        return
    owners: list[optuna.Study | FrozenTrial] = [study, *study.get_trials(deepcopy=False)]
    for owner in owners:
        for meta in get_all_artifact_meta(owner, storage=storage_of(study)):
            if (source / meta.artifact_id).is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / meta.artifact_id, target / meta.artifact_id)
