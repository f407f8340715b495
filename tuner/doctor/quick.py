"""The checks at the start of `launch`, `promote` and `train`: a fraction of a second, with little data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from trainer.errors import UserError
from trainer.workload import Workload
from tuner.doctor.check import Check, has_failed
from tuner.doctor.data import check_paths
from tuner.doctor.device import explain_unused_gpu, list_known_gpus
from tuner.doctor.disk import check_free
from tuner.doctor.gpus import check_gpus
from tuner.doctor.installation import check_clock, check_packages, check_python
from tuner.doctor.storage import check_lost, check_storage, read_open_trials
from tuner.spec.study_toml import StudySpec
from tuner.study.notify import find_target


def run_quick_checks(
    run_root: Path,
    *,
    study: str | None = None,
    workload: Workload | None = None,
    storage: str | None = None,
    device: str = "auto",
) -> Iterator[Check]:
    """The checks that need no model, and of the data no more than a sample.

    Args:
        study: Check its checkpoints and open trials.
        workload: Check that the files exist which its options name, and a sample of the data. What the sample shows is
            never more than a warning: it may be wanted.
        storage: Database URL; None where the run needs none.
        device: As `train.device`.
    """
    yield check_python()
    yield from check_packages()
    yield check_free(run_root, study)
    yield check_clock(run_root)
    if storage is not None:
        yield check_storage(storage, quick=True)
        yield from check_lost(read_open_trials(storage, quick=True), study)
    if device != "cpu":
        yield from _check_gpus()
    if workload is not None:
        paths = list(check_paths(workload))
        yield from paths
        if not has_failed(paths):
            for check in workload.check_data():
                yield replace(check, state="warn") if check.state == "fail" else check


def _check_gpus() -> Iterator[Check]:
    gpus = list_known_gpus()
    # CUDA_VISIBLE_DEVICES may hide them on purpose.
    if gpus and not torch.cuda.is_available() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        yield explain_unused_gpu(gpus)
    elif gpus:
        yield from check_gpus()


def run_spec_checks(spec: StudySpec, run_root: Path, *, storage: str | None = None) -> Iterator[Check]:
    """The quick checks for a run of this spec.

    Raises:
        UserError: The address in [notify] is missing or wrong.
    """
    find_target(spec.notify)
    name, workload, device = spec.study.name, spec.build_workload(), spec.baseline.device
    return run_quick_checks(run_root, study=name, workload=workload, storage=storage, device=device)


def report_checks(checks: Iterable[Check], stream: TextIO | None = None) -> None:
    """Prints the warnings, by default to stderr. Passed checks are not printed.

    Raises:
        UserError: The last failed check, with its remedy. Failed checks before it are printed.
    """
    failed = []
    for check in checks:
        line = f"{check.name} {check.message}; {check.remedy}."
        if check.state == "warn":
            print(f"tuner: warning: {line}", file=stream or sys.stderr)
        elif check.state == "fail":
            failed.append(line)
    for line in failed[:-1]:
        print(f"tuner: {line}", file=stream or sys.stderr)
    if failed:
        raise UserError(failed[-1])
