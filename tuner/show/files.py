"""Files that a study offers for download in optuna-dashboard: the best configuration, and the leaderboard.

They are stored beside the database, so that `tuner dashboard` finds them with nothing but the storage's URL.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from tuner.study.optuna_internals import storage_of
from tuner.study.record import StudyRecord, TrialRecord, read_spec

BEST_SPEC = "study.toml"
LEADERBOARD = "leaderboard.csv"
MIME_TYPES = {BEST_SPEC: "text/plain", LEADERBOARD: "text/csv"}


def save_artifact(study: optuna.Study, folder: Path, name: str, text: str) -> str:
    """Store a file with the study in place of its earlier version, and return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(folder)
    artifacts = get_all_artifact_meta(study, storage=storage_of(study))
    artifact_id = next((meta.artifact_id for meta in artifacts if meta.filename == name), None)
    if artifact_id is not None:
        store.write(artifact_id, io.BytesIO(text.encode()))
        return artifact_id
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, name)
        path.write_text(text, encoding="utf-8")
        return upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=study, mimetype=MIME_TYPES[name]
        )


def best_spec(record: StudyRecord, trial: TrialRecord) -> str:
    """A study.toml for `tuner train` whose `[train]` and `[workload]` hold the trial's parameters.

    Raises:
        UserError: The stored spec no longer fits its workload.
    """
    from tuner.spec.setups import full_setup  # imports torch

    values = {section: value for section, value in record.spec.items() if section not in ("base_dir", "tries")}
    sections = {name: dict(values.get(name, {})) for name in ("train", "workload")}
    for key, value in trial.params.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    # A study derives it from its search space, which `tuner train` leaves out.
    sections["train"]["val_samples"] = full_setup(read_spec(record.study), trial.params).config.val_samples
    head = [
        f"# Study {record.name}, trial {trial.number}: {record.metric} {trial.value:.4f}.",
        f"# Keep this file in {record.base_dir}: a workload's module is looked for beside its study.toml.",
    ]
    return "\n".join(head) + "\n" + tomli_w.dumps(_without_none({**values, **sections}))


def leaderboard(record: StudyRecord) -> str:
    """The finished trials as CSV, the best first; pruned, infeasible and failed trials have no rank."""
    names = list(record.spec["search"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    last = ("full_hours", "d", "d_rising", "peak_memory", "reason")
    writer.writerow(["rank", "trial", "state", "baseline", *names, record.metric, "reported_at", *last])
    for i, trial in enumerate(record.finished):
        writer.writerow(
            [
                i + 1 if i < len(record.ranked) else "",
                trial.number,
                trial.state,
                "yes" if record.is_baseline(trial) else "",
                *(trial.params.get(name, "") for name in names),
                # The writer leaves a cell empty for None.
                trial.value,
                max(trial.curve, default=""),
                record.full_hours(trial),
                trial.d[-1] if trial.d else "",
                trial.d_is_rising if trial.d else "",
                trial.peak_memory,
                trial.infeasible,
            ]
        )
    return out.getvalue()


def _without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_without_none(entry) for entry in value if entry is not None]
    return value
