"""Export a checkpoint of a run for inference: its weights as a file, or a folder that can be loaded alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from trainer.checkpoint import LATEST, is_checkpoint, milestone_file, step_file
from trainer.errors import UserError, first_line
from trainer.export import WeightsFormat, WriteFile
from trainer.state_form import read_state, weights_in
from trainer.units import format_bytes
from trainer.workload import Workload
from tuner.spec.mistakes import explain
from tuner.spec.study_toml import StudySpec
from tuner.spec.workloads import load_workload_class
from tuner.study.tracked_run import WORKLOAD

README = "README.txt"


@dataclass(frozen=True)
class Export:
    """A written file or folder, and its source."""

    path: Path
    num_bytes: int
    checkpoint: Path
    step: int


def export(
    run_dir: Path,
    path: Path,
    *,
    checkpoint: str | None = None,
    format: str | None = None,
    spec: Path | None = None,
    force: bool = False,
) -> Export:
    """Write a checkpoint's weights to `path`: a file with the workload's `export_weights`, or a folder with its
    `export_files` and a README.txt.

    The checkpoint names its workload, which is imported: export runs that you trust.

    Args:
        path: A folder if it is one, or if its name has no ending; else a file.
        checkpoint: See `find_checkpoint`.
        format: "pth" or "safetensors". Default: as the name of `path` ends.
        spec: Take the workload and its options from this study.toml, for a checkpoint that names none and where
            its files have moved.
        force: Replace the file, or those files of the folder that are written.

    Raises:
        UserError: There is no such checkpoint, it is none of a run, or `path` can't be written.
    """
    chosen = _format(format, path)
    _check_target(path, force=force)
    workload = StudySpec.load(spec, search=False).build_workload() if spec else None
    source = find_checkpoint(run_dir, checkpoint, workload)
    state = read_run(source)
    if workload is None:
        workload = build_workload(state["lineage"], source)
        if (preferred := find_checkpoint(run_dir, checkpoint, workload)) != source:
            source, state = preferred, read_run(preferred)
    into_folder = is_folder(path)
    if into_folder:
        files = {**workload.export_files(state["model"], format=chosen), README: _write_readme(state, source)}
    else:
        files = {path.name: lambda target: workload.export_weights(state["model"], target, format=chosen)}
    folder = path if into_folder else path.parent
    for name in files:
        _check_file(folder / name, workload, force=force)
    if into_folder:
        _write_folder(files, path)
    else:
        files[path.name](path)
    return Export(path.resolve(), sum((folder / name).stat().st_size for name in files), source, state["step"])


def is_folder(path: Path) -> bool:
    """Whether an export to this path is a folder: "ko-v1.2" too, whose ending is a number."""
    return path.is_dir() or not path.suffix[1:2].isalpha()


def _write_folder(files: Mapping[str, WriteFile], folder: Path) -> None:
    """Write all files, then move them into the folder. A failure leaves the folder as it was."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        for name, write in files.items():
            write(temporary / name)
        folder.mkdir(exist_ok=True)
        for name in files:
            os.replace(temporary / name, folder / name)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({first_line(error)}): choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_readme(state: Mapping[str, Any], source: Path) -> WriteFile:
    def write(path: Path) -> None:
        sizes = {file.name: format_bytes(file.stat().st_size) for file in sorted(path.parent.iterdir())}
        path.write_text(describe(state, source, sizes), encoding="utf-8")

    return write


def describe(state: Mapping[str, Any], source: Path, files: Mapping[str, str]) -> str:
    """The README.txt: lineage, settings and metrics of a checkpoint, and the files of the folder with their sizes."""
    lineage, identity = state["lineage"], state.get("identity", {})
    progress = state.get("progress", {"evaluated_step": state["step"], "metrics": state.get("metrics", {})})
    metrics = f"metrics of step {progress['evaluated_step']:,}"
    sections = {
        "weights for inference": {
            "checkpoint": source.resolve(),
            "steps": f"{state['step']:,}",
            "samples": f"{state['samples']:,}" if "samples" in state else None,
            "data digest": identity.get("data", {}).get("contents"),
            **{key.replace("_", " "): value for key, value in lineage.items() if key not in (WORKLOAD, "params")},
            WORKLOAD: (lineage.get(WORKLOAD) or {}).get("class"),
        },
        "parameters of the trial": lineage.get("params", {}),
        "training": identity.get("train", {}),
        metrics: {name: f"{value:.4f}" for name, value in progress["metrics"].items()},
        "files": files,
    }
    return "\n".join(
        f"{title}\n" + "".join(f"  {key}: {value}\n" for key, value in values.items() if value is not None)
        for title, values in sections.items()
        if values
    )


def read_run(source: Path) -> dict[str, Any]:
    """A checkpoint of a run: `read_state`, and it has weights and a lineage.

    Raises:
        UserError: It can't be read, or another program wrote it.
    """
    state = read_state(source)
    if not state.keys() >= {"model", "lineage"}:
        raise UserError(f"{source} is no checkpoint of a run: name one that the trainer wrote.")
    return {**state, "model": weights_in(state, source, extra=True)}


def find_checkpoint(run_dir: Path, name: str | None = None, workload: Workload | None = None) -> Path:
    """A checkpoint of a run directory.

    Args:
        name: A best checkpoint ("best_model"), latest, a step ("1000", "step_000001000"), a file in the directory, or
            a path. Default: the first that `workload.best_checkpoints` names, else the only best one, else the latest.
        workload: The run's. Without it the default is any best checkpoint, else the latest: they all name the
            workload.

    Raises:
        UserError: There is no such directory or checkpoint; the message names those that there are.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory.")
    found = sorted(path.name for path in run_dir.glob("*.pth"))
    if name is None:
        best = [one for one in found if one.startswith("best_")]
        named = [*workload.best_checkpoints().values()][:1] if workload else best
        wanted = [*named, *(best if len(best) == 1 else []), LATEST]
    else:
        step = [step_file(int(name)), milestone_file(int(name))] if name.isdecimal() else []
        wanted = [name, f"{name}.pth", f"{name}_model.pth", *step]
    for one in wanted:
        if one in found:
            return run_dir / one
    if name is not None and Path(name).is_file():
        return Path(name)
    known = ", ".join(one.removesuffix(".pth") for one in found)
    missing = f"no checkpoint {name}" if name else "neither its best checkpoint nor latest"
    raise UserError(f"{run_dir} has {missing}: {f'choose from {known}' if known else 'it holds no checkpoint'}.")


def _format(name: str | None, path: Path) -> WeightsFormat:
    for format in get_args(WeightsFormat):
        if format == (name or path.suffix.removeprefix(".") or "pth"):
            return format  # type: ignore[no-any-return]
    if name is None:
        return "pth"
    raise UserError(f"--format {name}: use {' or '.join(get_args(WeightsFormat))}.")


def _check_target(path: Path, *, force: bool) -> None:
    """Refuse a target that can't be one whatever the workload."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first.")
    if path.is_dir() and any(map(is_checkpoint, path.glob("*.pth"))):
        raise UserError(f"{path} is a run directory: name another folder, or the file to write.")
    if is_folder(path) and path.is_file():
        raise UserError(f"{path} is a file: name a folder, or a file that ends in .pth or .safetensors.")
    if not is_folder(path):
        _check_file(path, None, force=force)


def _check_file(path: Path, workload: Workload | None, *, force: bool) -> None:
    if is_checkpoint(path):
        raise UserError(f"{path} is a checkpoint of a run: export to another file.")
    if workload and path.resolve() in [getattr(workload, name) for name in type(workload).model_fields]:
        raise UserError(f"{path} is a file that the run was made from: export to another one.")
    if path.is_dir() or (path.exists() and not force):
        remedy = "choose another name" + ("" if path.is_dir() else ", or replace it with --force")
        raise UserError(f"{path} exists: {remedy}.")


def build_workload(lineage: Mapping[str, Any], source: Path) -> Workload:
    """Build the workload that made a checkpoint.

    Raises:
        UserError: The checkpoint does not name it, or it can't be imported.
    """
    remedy = "name the study.toml with --spec"
    record = lineage.get(WORKLOAD)
    if not (
        isinstance(record, Mapping)
        and "options" in record
        and all(isinstance(record.get(key), str) for key in ("class", "folder"))
    ):
        raise UserError(f"{source} does not name the workload that made it (an earlier version wrote it): {remedy}.")
    try:
        cls = load_workload_class(record["class"], Path(record["folder"]))
    except UserError as error:
        raise UserError(f"{source}: {str(error).rstrip('.')}; or {remedy}.") from error
    try:
        return cls.model_validate(record["options"])
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, cls, prefix='workload').rstrip('.')}; {remedy}.") from error
