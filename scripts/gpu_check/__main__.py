"""Check the GPU path in one call: the most telling stage first, each in a process of its own with a time limit.

    python -m scripts.gpu_check --out FOLDER --limit 570              # all stages, from the repository's root
    python -m scripts.gpu_check --out FOLDER --only ceilings table    # some of them
    python -m scripts.gpu_check --out FOLDER --tiny                   # all of them on a CPU, in two minutes

After each stage FOLDER has its figures in STAGE.json, its output in STAGE.log, all figures in gpu_check.json, and
a page in report.md: what held, what missed which goal, and where the time went. What is cut off loses one stage only.
`scripts/records/gpu_check.json` is the record that docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.bench.common import describe_command, describe_device, write_record
from scripts.gpu_check.report import format_page, judge

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = {
    "ceilings": ("ceilings", 45),
    "kernels": ("optimizer", 60),
    "eager": ("training", 80),
    "compiled": ("training", 240),
    "optimizer": ("optimizer", 60),
    "checkpoint": ("recovery", 120),
    "warm": ("training", 90),
    "out_of_memory": ("recovery", 90),
    "no_dropout": ("training", 150),
    "batch32": ("training", 150),
    "table": ("table", 560),
}
"""Name -> its module, and the seconds that it may take. The most telling first."""
LEAST_SECONDS, GRACE_SECONDS = 10.0, 8.0


def run_stage(name: str, out: Path, tiny: bool) -> None:
    """Run one stage in this process."""

    def save(record: Mapping[str, Any]) -> None:
        write_record(out / f"{name}.json", {"seconds": round(time.monotonic() - started, 1), **record})

    started = time.monotonic()
    module, _ = STAGES[name]
    function = getattr(importlib.import_module(f"scripts.gpu_check.{module}"), name)
    # The table is long: it is saved row by row.
    save(function(tiny, save) if name == "table" else function(tiny))


def start(name: str, out: Path, limit: float, tiny: bool, cache: Path) -> dict[str, Any]:
    """Run one stage in a process of its own, for at most `limit` seconds; returns its record."""
    command = [sys.executable, "-m", "scripts.gpu_check", "--stage", name, "--out", str(out)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    if tiny:
        environment["OMP_NUM_THREADS"] = "1"  # more threads would wait for each other
    return run_process([*command, *(["--tiny"] if tiny else [])], out / name, limit, environment)


def run_process(command: Sequence[str], base: Path, limit: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a command that writes `base`.json; returns that record, with `failed` if the command did not end well."""
    result, output = base.with_suffix(".json"), base.with_suffix(".log")
    result.unlink(missing_ok=True)
    with open(output, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        reason = ""
        try:
            code = process.wait(limit)
            reason = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    record: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if reason or not record:
        record |= {"failed": reason or "no result", "tail": output.read_text(encoding="utf-8")[-3000:]}
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage with its compilers, loader workers and rows."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def describe() -> dict[str, Any]:
    """The record's first keys."""
    versions = {}
    for name in ("torch", "triton", "prodigyopt", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"command": describe_command(), "versions": versions, "device": describe_device("auto")}


def run_all(names: Sequence[str], out: Path, limit: float, tiny: bool) -> dict[str, Any]:
    """Run stages, and write record and page after each of them."""
    end, head = time.monotonic() + limit, describe()
    stages: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as cache:
        for name in names:
            left = min(STAGES[name][1], end - time.monotonic() - GRACE_SECONDS)
            if left < LEAST_SECONDS:
                stages[name] = {"failed": f"not run: {limit:.0f} s were over"}
            else:
                started = time.monotonic()
                stages[name] = start(name, out, left, tiny, Path(cache))
                took, failed = time.monotonic() - started, stages[name].get("failed", "")
                print(f"{name}: {took:.0f} s{f', {failed}' if failed else ''}", flush=True)
            record = {**head, "tiny": tiny, "goals": judge(stages), "stages": stages}
            write_record(out / "gpu_check.json", record)
            (out / "report.md").write_text("\n".join(format_page(stages, head)) + "\n", encoding="utf-8")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=570.0, metavar="SECONDS", help="for all stages (default: 570)")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test this script")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out}: {error.strerror}; name another folder")
    out = arguments.out.resolve()
    if arguments.stage:
        run_stage(arguments.stage, out, arguments.tiny)
    else:
        run_all(arguments.only, out, arguments.limit, arguments.tiny)
        print((out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
