"""The checks that `launch`, `promote` and `train` begin with: a small part of a second, without model or data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from trainer.errors import UserError
from trainer.workload import Workload
from tuner.doctor.check import Check
from tuner.doctor.data import check_paths
from tuner.doctor.device import known_gpus, unused_gpu
from tuner.doctor.disk import check_free
from tuner.doctor.gpus import check_gpus
from tuner.doctor.installation import check_clock, check_packages, check_python
from tuner.doctor.storage import check_lost, check_storage, open_trials
from tuner.spec.study_toml import StudySpec


def quick(
    run_root: Path,
    *,
    study: str | None = None,
    workload: Workload | None = None,
    storage: str | None = None,
    device: str = "auto",
) -> Iterator[Check]:
    """What a run can be told before anything is spent.

    Args:
        study: Look at its checkpoints and open trials.
        workload: Look whether the files that its options name are there.
        storage: Database URL; None: the run needs none.
        device: As `train.device`.
    """
    yield check_python()
    yield from check_packages()
    yield check_free(run_root, study)
    yield check_clock(run_root)
    if storage is not None:
        yield check_storage(storage, quick=True)
        yield from check_lost(open_trials(storage, quick=True), study)
    if device != "cpu":
        yield from _check_gpus()
    if workload is not None:
        yield from check_paths(workload)


def _check_gpus() -> Iterator[Check]:
    gpus = known_gpus()
    # Where CUDA_VISIBLE_DEVICES is set, hiding them is what was wanted.
    if gpus and not torch.cuda.is_available() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        yield unused_gpu(gpus)
    elif gpus:
        yield from check_gpus()


def before_spec(spec: StudySpec, run_root: Path, *, storage: str | None = None) -> Iterator[Check]:
    """`quick` for a run of this spec."""
    device = spec.baseline.device
    return quick(run_root, study=spec.study.name, workload=spec.build_workload(), storage=storage, device=device)


def check_first(checks: Iterable[Check], stream: TextIO | None = None) -> None:
    """Print a line for each warning, to stderr by default; what is well is not spoken of.

    Raises:
        UserError: The check that failed, with its remedy; where several did, the last, and those before are printed.
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
