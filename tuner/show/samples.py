"""What hooks left for a study's full runs, copied to the dashboard's files, where audio can be played."""

from __future__ import annotations

import mimetypes
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from tuner.study.optuna_internals import id_of, storage_of
from tuner.study.record import StudyRecord
from tuner.study.samples import read_all_samples


@dataclass(frozen=True)
class SampleRow:
    """The samples of one checkpoint, as the note shows them."""

    trial: int
    step: int
    links: Mapping[str, str]
    """Address by name of the file."""
    metrics: Mapping[str, float]


def save_samples(record: StudyRecord, folder: Path) -> list[SampleRow]:
    """Copy new samples of the study's full runs on this machine to its artifacts; returns all, the newest run last."""
    study, rows = record.study, []
    store = FileSystemArtifactStore(folder)
    runs = [(run, read_all_samples(run.run_dir)) for run in record.full_runs]
    if not any(samples for _, samples in runs):
        return []
    known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(study, storage=storage_of(study))}
    for run, all_samples in runs:
        for samples in all_samples:
            links = {}
            for path in samples.files:
                name = _name(f"{run.run_dir.name}-{samples.folder.name}-{path.stem}", path.suffix)
                if name not in known:
                    known[name] = _upload(record, store, path, name)
                elif not (stored := folder / known[name]).exists() or stored.stat().st_mtime < path.stat().st_mtime:
                    # Of a run directory that was removed since.
                    with open(path, "rb") as file:
                        store.write(known[name], file)
                links[path.name] = f"/artifacts/{id_of(study)}/{known[name]}"
            rows.append(SampleRow(run.trial, samples.step, links, samples.metrics))
    return rows


def _name(stem: str, suffix: str) -> str:
    """A file's name, cut to the 255 bytes that it may have: a hook may name its files by Hangul sentences."""
    return stem.encode()[: 255 - len(suffix)].decode(errors="ignore") + suffix


def _upload(record: StudyRecord, store: FileSystemArtifactStore, path: Path, name: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        # The dashboard shows an artifact by the name of its file.
        link = Path(scratch, name)
        link.symlink_to(path.resolve())
        mimetype, _ = mimetypes.guess_type(name)
        return upload_artifact(
            artifact_store=store, file_path=str(link), study_or_trial=record.study, mimetype=mimetype
        )
