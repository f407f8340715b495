"""Files that a study offers for download in optuna-dashboard: the best configuration, and the leaderboard.

They lie beside the database, so that `tuner dashboard` finds them with nothing but the storage's URL.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from sqlalchemy import URL

from tuner.search_space import full_setup
from tuner.show.findings import Findings
from tuner.trials import BASE_DIR, INFEASIBLE, last_value, state_of, stored_spec

BEST_SPEC = "study.toml"
LEADERBOARD = "leaderboard.csv"
MIME_TYPES = {BEST_SPEC: "text/plain", LEADERBOARD: "text/csv"}


def artifact_dir(storage: BaseStorage, run_root: Path = Path("runs")) -> Path:
    """Where a storage's artifacts lie: beside an SQLite file, else under the run root."""
    url = database_url(storage)
    beside_file = url is not None and url.get_backend_name() == "sqlite" and url.database
    # No study can have a name that begins with a dot.
    return (Path(beside_file).parent if beside_file else run_root).resolve() / ".artifacts"


def database_url(storage: BaseStorage) -> URL | None:
    """The URL of a storage's database; None where it has none, such as in memory."""
    # A study wraps its storage in a cache.
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    url: URL | None = getattr(engine, "url", None)
    return url


def save_artifact(study: optuna.Study, folder: Path, name: str, text: str) -> str:
    """Store a file with the study in place of its earlier version, and return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(folder)
    known = get_all_artifact_meta(study, storage=study._storage)
    artifact_id = next((meta.artifact_id for meta in known if meta.filename == name), None)
    if artifact_id is not None:
        store.write(artifact_id, io.BytesIO(text.encode()))
        return artifact_id
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, name)
        path.write_text(text, encoding="utf-8")
        return upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=study, mimetype=MIME_TYPES[name]
        )


def best_spec(study: optuna.Study, found: Findings, trial: FrozenTrial) -> str:
    """A study.toml whose `[train]` and `[workload]` hold the trial's parameters: `tuner train` takes it.

    Raises:
        UserError: The stored spec no longer fits its workload.
    """
    values = {section: value for section, value in found.spec.items() if section != "base_dir"}
    sections = {name: dict(values.get(name, {})) for name in ("train", "workload")}
    for key, value in trial.params.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    # A study derives it from its search space, which `tuner train` leaves out.
    sections["train"]["val_samples"] = full_setup(stored_spec(study), trial.params).config.val_samples
    value = last_value(trial)
    head = [
        f"# Study {found.name}, trial {trial.number}: {found.metric} {value:.4f}.",
        f"# Its place is {study.user_attrs[BASE_DIR]}: a workload's module is looked for beside its study.toml.",
    ]
    return "\n".join(head) + "\n" + to_toml({**values, **sections})


def leaderboard(found: Findings) -> str:
    """The finished trials as CSV, the best first; without a rank those that were pruned, infeasible or failed."""
    names = list(found.spec["search"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    told = ("full_hours", "d", "d_rising", "peak_memory", "reason")
    writer.writerow(["rank", "trial", "state", "baseline", *names, found.metric, "reported_at", *told])
    for i, trial in enumerate(found.finished):
        attrs, reported = trial.user_attrs, trial.intermediate_values
        writer.writerow(
            [
                i + 1 if i < len(found.ranked) else "",
                trial.number,
                state_of(trial),
                "yes" if found.is_baseline(trial) else "",
                *(trial.params.get(name, "") for name in names),
                last_value(trial),
                max(reported, default=""),
                "" if (hours := found.full_hours(trial)) is None else hours,
                (attrs.get("d") or [""])[-1],
                attrs.get("d_rising", ""),
                attrs.get("peak_memory", ""),
                attrs.get(INFEASIBLE, ""),
            ]
        )
    return out.getvalue()


def to_toml(values: Mapping[str, Any]) -> str:
    """A document of tables of plain values; tables inside a table stand inline, and None is left out."""
    lines: list[str] = []
    for table, content in values.items():
        lines += ["", f"[{_key(table)}]"]
        lines += [f"{_key(key)} = {_value(value)}" for key, value in content.items() if value is not None]
    return "\n".join(lines[1:]) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's strings are TOML's, but for one control character that JSON lets through.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
