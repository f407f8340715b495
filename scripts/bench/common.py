"""Shared by the benchmarks: statistics, the machine, the record and its file, the command line, child processes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "scripts/records"
DEMO_STUDY = ROOT / "studies/korean_demo/study.toml"
DEMO_CORPUS = ROOT / "data/korean_demo"

Record = dict[str, Any]
T = TypeVar("T")


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and the number of values."""
    low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else (values[0], values[0])
    return {
        "median": statistics.median(values),
        "min": min(values),
        "q1": low,
        "q3": high,
        "max": max(values),
        "runs": len(values),
    }


def summarize_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The ratios of values measured in the same round, so that other load slows both sides."""
    return summarize([a / b for a, b in zip(above, below, strict=True)])


def read_memory(name: str) -> int:
    """Bytes of this process: "VmRSS", its resident memory now, or "VmHWM", its peak.

    Unlike `getrusage`, whose peak starts with the parent's.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def describe_device(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's with its cores and torch's threads. "auto" is the GPU if there is one."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads"


def describe_command() -> str:
    return shlex.join(["python", *sys.orig_argv[1:]])


def describe_run(packages: Sequence[str], device: str = "cpu") -> Record:
    """A record's first keys: the command, the versions, the device."""
    return {
        "command": describe_command(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "device": describe_device(device),
    }


def write_record(path: Path, record: Record, *, rows: str | None = None) -> None:
    """Write JSON, atomically.

    Args:
        rows: The key of a long list, which is written last and one row a line.
    """
    if rows is None:
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    else:
        head = json.dumps({key: value for key, value in record.items() if key != rows}, indent=1, ensure_ascii=False)
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in record[rows])
        text = f'{head[:-2]},\n "{rows}": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def read_demo_study(corpus: Path = DEMO_CORPUS) -> dict[str, Any]:
    """The contents of the Korean demo's study.toml, with the corpus of that folder."""
    values = tomllib.loads(DEMO_STUDY.read_text(encoding="utf-8"))
    for split in ("train", "val"):
        values["workload"][f"{split}_manifests"] = [f"{corpus.resolve()}/{split}_pairs.jsonl::ko"]
    values["workload"]["tokenizer"] = str(corpus.resolve() / "tokenizer.model")
    return values


def find_module(name: str) -> str:
    """The importable name of a module, also of the one that Python runs as "__main__"."""
    spec = sys.modules[name].__spec__
    if spec is None:
        raise UserError("run the benchmarks from the repository root as modules: python -m scripts.bench.NAME.")
    return spec.name


def run_child(function: Callable[..., T], *arguments: Any, environment: Mapping[str, str] | None = None) -> T:
    """Call a module's function in a new process. Its arguments and its result pass as JSON."""
    command = [sys.executable, "-m", "scripts.bench.child", find_module(function.__module__), function.__name__]
    child = subprocess.run(
        [*command, json.dumps(arguments)],
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode:
        sys.exit(f"{function.__name__} exited with {child.returncode} in its child process; its error is above.")
    result: T = json.loads(child.stdout.splitlines()[-1])
    return result


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser named after the command; the module's docstring is the help text."""
    return argparse.ArgumentParser(
        prog=f"python -m {find_module('__main__').removesuffix('.__main__')}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_benchmark(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Record],
    *,
    packages: Sequence[str],
    format_table: Callable[[Record], str] | None = None,
    rows: str | None = None,
) -> None:
    """Parse the arguments, measure, print the table and write the record.

    Args:
        packages: Whose versions the record names.
        format_table: The text of a whole record. Default: `measure` prints as it goes.
        rows: See `write_record`.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written")
    arguments = parser.parse_args()
    head, before = describe_run(packages, getattr(arguments, "device", "cpu")), os.getloadavg()
    try:
        results = measure(arguments)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    record = head | {"load_average": {"before": before, "after": os.getloadavg()}} | results
    if format_table:
        print(format_table(record))
    if arguments.json:
        write_record(arguments.json, record, rows=rows)
