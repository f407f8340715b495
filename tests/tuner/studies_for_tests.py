"""A small study of the toy workload, as a dictionary to vary and as a file to launch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tuner.spec.study_toml import StudySpec

VALUES: dict[str, Any] = {
    "study": {"name": "toy", "workload": "tests.toy:Toy"},
    "workload": {"num_train": 128},
    "train": {"batch_size": 8, "d_coef": 1.0, "log_every": 5, "precision": "fp32"},
    "search": {
        "train.batch_size": {"choices": [4, 8, 16]},
        "train.d_coef": {"low": 0.1, "high": 10.0, "log": True},
    },
    "trial": {"samples": 160, "evaluations": 4, "num_trials": 4},
    "full": {"samples": 480},
}

TOML = """
[study]
name = "toy"
workload = "tests.toy:Toy"
[workload]
num_train = 128
[train]
batch_size = 8
log_every = 5
precision = "fp32"
[search]
train.batch_size = { choices = [4, 8, 16] }
"train.d_coef" = { low = 0.1, high = 10.0, log = true }
[trial]
samples = 160
evaluations = 4
num_trials = 3
[full]
samples = 480
"""


def values(**changes: Any) -> dict[str, Any]:
    """VALUES with some of their dotted keys replaced: values(**{"trial.num_trials": 2})."""
    result = copy.deepcopy(VALUES)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        result[section][name] = value
    return result


def build(*, without: str = "", **changes: Any) -> StudySpec:
    """A spec of `values`; without one of their dotted keys, if one is named."""
    given = values(**changes)
    if without:
        section, _, name = without.partition(".")
        del given[section][name]
    return StudySpec.build(given, base_dir=Path.cwd())


def write(folder: Path, text: str = TOML) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path
