"""The users' table: each optimization by `tuner bench`, one round."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.gpu_check.workload import TINY

ROOT = Path(__file__).resolve().parent.parent.parent


def table(tiny: bool, save: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
    """The result of `tuner bench --json`; `save` receives it after each row, so that a time limit loses one row."""
    from tuner.bench.table import Bench
    from tuner.spec.study_toml import StudySpec

    spec = StudySpec.build(study(tiny), base_dir=ROOT)
    # Its rows are processes of their own.
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    only = ["baseline"] if tiny else ["cumulative", "trainer"]

    def report(line: str) -> None:
        print(line, flush=True)
        save(bench.result())

    bench = Bench(spec, rounds=1, steps=2 if tiny else 10, only=only, report=report)
    bench.run()
    return bench.result()


def study(tiny: bool) -> dict[str, Any]:
    """A study of the made-up utterances; its full run decides how the trainer trains."""
    return {
        "study": {"name": "gpu-check", "workload": "scripts.gpu_check.workload:Synthetic"},
        "workload": {"gpt": TINY.model_dump(), "num_samples": 64} if tiny else {},
        "search": {"train.d_coef": {"low": 0.5, "high": 2.0}},
        "trial": {"steps": 100, "num_trials": 1, "evaluations": 1},
        "full": {"steps": 240_000},
    }
