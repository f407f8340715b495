"""Attack this project with everything that its users meet once in 86 hours, and count what holds.

    python -m tests.attacks.full --json scripts/records/attacks.json       # all stages in full: hours
    python -m tests.attacks.full --only kill_training --size 10            # one of them, with 10 attempts

Each stage counts attempts and failures; `--limit` ends each after so many seconds. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from scripts.bench.common import describe_device, write_record
from tests.attacks.full.common import Job, Result

STAGES: dict[str, tuple[str, int, int]] = {
    "kill_training": ("kills", 300, 4),
    "kill_launch": ("kills", 150, 1),
    "refuse_disk": ("disk", 1000, 2),
    "damage_checkpoints": ("files", 2000, 50),
    "damage_stores": ("files", 2000, 40),
    "damage_arrays": ("files", 2000, 100),
    "hostile_files": ("files", 30, 3),
    "lost_gradients": ("numbers", 6, 6),
    "crowd_database": ("service", 16, 2),
    "lock_database": ("service", 300, 2),
    "strangers": ("service", 2000, 60),
    "wrong_input": ("inputs", 3000, 60),
}
"""Name -> its module, and its attempts in full and in a test; seconds of the lock for `lock_database`."""


def run(name: str, size: int, limit: float) -> Result:
    """Run one stage in a folder of its own."""
    module, _, _ = STAGES[name]
    with tempfile.TemporaryDirectory(prefix="attacks-") as folder:
        job = Job(Path(folder).resolve(), size, time.monotonic() + limit)
        stage: Any = getattr(importlib.import_module(f"tests.attacks.full.{module}"), name)
        result: Result = stage(job)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file, and keep those of other stages")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--size", type=int, help="attempts of each stage, in place of all")
    parser.add_argument("--limit", type=float, default=7200, help="seconds of each stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    failed = False
    for name in options.only:
        started = time.monotonic()
        result = run(name, options.size or STAGES[name][1], options.limit)
        seconds = round(time.monotonic() - started, 1)
        failed |= bool(result.failures)
        print(f"{name}: {len(result.failures)} failures in {result.attempts:,} attempts, {seconds} s", flush=True)
        for failure in result.failures[:10]:
            print(f"  {failure}")
        for key, value in result.figures.items():
            print(f"  {key}: {value}")
        if options.json:
            write_stage(options.json, name, {**vars(result), "num_failures": len(result.failures), "seconds": seconds})
    sys.exit(failed)


def write_stage(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Write the figures of a stage, and keep those of the others."""
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    stages[name] = figures
    ordered = {stage: stages[stage] for stage in STAGES if stage in stages}
    command = f"python -m tests.attacks.full --json {path}"
    record = {"command": command, "device": describe_device(), "stages": ordered}
    write_record(path, record)


if __name__ == "__main__":
    main()
