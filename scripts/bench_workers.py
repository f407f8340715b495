"""What lies between two trials: a warm worker against a fresh process for each trial, and what the storage costs.

    python scripts/bench_workers.py [--rounds 2] [--trials 5] [--samples 1200] [--json scripts/records/workers_cpu.json]

Runs the Korean demo study (`python -m studies.korean_demo.corpus` makes its corpus) into a temporary folder, with Aim
and the dashboard's page as `tuner launch` has them. The gap goes from one trial's last validation, after which only its
checkpoint, trackers and storage are left, to the beginning of the next trial's first optimizer step; the step itself
is timed apart. In "warm" one process runs all trials, in "fresh" a process runs one and the next process the next.
The two take turns in every round. The storage's share is the time of its calls in the thread that trains, the claim of
the trial included, over the time from one trial's end to the next one's.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SPEC = ROOT / "studies/korean_demo/study.toml"
GOALS = {"warm_gap_s": 0.5, "storage_share": 0.01}


class Stamps:
    """A display that writes down when what happens; of the system's clock, which all processes share."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.storage_s = 0.0

    def add(self, kind: str, **values: Any) -> None:
        cpu = time.process_time()
        self.events.append({"kind": kind, "at": time.monotonic(), "cpu": cpu, **values})

    def trial_started(self, trial: Any, resumed: bool) -> "Stamps":
        self.add("started", trial=trial.number)
        return self

    def trial_ended(self, trial: Any) -> None:
        self.add("ended", trial=trial.number, storage_s=self.storage_s)
        self.storage_s = 0.0

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "val/loss" in values:
            self.add("validated", samples=samples)

    def close(self) -> None:
        """Of no interest: the checkpoint is still being written."""

    def watch_steps(self) -> None:
        """Write down the first optimizer step of each trial."""
        from trainer import loop

        step = loop.step

        def watched(*arguments: Any) -> None:
            if self.events[-1]["kind"] != "started":
                step(*arguments)
                return
            self.add("first step begins")
            step(*arguments)
            self.add("first step ended")

        loop.step = watched

    def watch_storage(self) -> None:
        """Add up the time of the storage's calls in this thread."""
        from optuna.storages import BaseStorage
        from optuna.storages._cached_storage import _CachedStorage

        home, depth = threading.get_ident(), [0]

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if threading.get_ident() != home or depth[0]:
                    return method(*arguments, **keywords)
                depth[0] += 1
                started = time.perf_counter()
                try:
                    return method(*arguments, **keywords)
                finally:
                    depth[0] -= 1
                    self.storage_s += time.perf_counter() - started

            return call

        for name in dir(BaseStorage):
            if not name.startswith("_") and callable(getattr(_CachedStorage, name)):
                setattr(_CachedStorage, name, timed(getattr(_CachedStorage, name)))


def record(folder: Path, total: int, samples: int | None) -> list[dict[str, Any]]:
    """Launch the study up to `total` trials in this process."""
    from tuner import Runtime, StudySpec, launch

    stamps = Stamps()
    stamps.watch_storage()
    stamps.watch_steps()
    spec = StudySpec.load(SPEC, {} if samples is None else {"trial.samples": samples})
    launch(spec, storage=f"sqlite:///{folder}/t.db", runtime=Runtime(folder), num_trials=total, display=stamps)
    return stamps.events


def in_process(folder: Path, total: int, samples: int | None) -> list[dict[str, Any]]:
    """The same in a process of its own."""
    events = folder / "events.json"
    command = [sys.executable, __file__, "--record", str(events), "--trials", str(total)]
    command += [] if samples is None else ["--samples", str(samples)]
    subprocess.run(command, check=True)
    return json.loads(events.read_text())  # type: ignore[no-any-return]


def gaps(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each trial's last validation to the next one's first step, in seconds."""
    found, last = [], None
    for event in events:
        if event["kind"] == "validated":
            last = event
        elif event["kind"] == "first step begins" and last is not None:
            begins = event
        elif event["kind"] == "first step ended" and last is not None:
            gap = {"gap_s": begins["at"] - last["at"], "first_step_s": event["at"] - begins["at"]}
            found.append({**gap, "gap_cpu_s": begins["cpu"] - last["cpu"]})
    return found


def storage_shares(events: list[dict[str, Any]]) -> list[float]:
    ends = [event for event in events if event["kind"] == "ended"]
    return [end["storage_s"] / (end["at"] - before["at"]) for before, end in itertools.pairwise(ends)]


def summary(values: list[float]) -> dict[str, float]:
    low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2
    return {
        "median": statistics.median(values),
        "min": min(values),
        "q1": low,
        "q3": high,
        "max": max(values),
        "runs": len(values),
    }


def measure(rounds: int, trials: int, samples: int | None) -> dict[str, Any]:
    before = os.getloadavg()
    warm, fresh, shares = [], [], []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            events = in_process(Path(folder), trials, samples)
        warm += gaps(events)
        shares += storage_shares(events)
        events = []
        with tempfile.TemporaryDirectory() as folder:
            for total in range(1, trials + 1):
                events += in_process(Path(folder), total, samples)
        fresh += gaps(events)
        print(
            f"round {number} of {rounds}: warm {warm[-1]['gap_s']:.2f} s, fresh {fresh[-1]['gap_s']:.2f} s", flush=True
        )
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "optuna", "aim", "sqlalchemy")}
        | {"python": platform.python_version()},
        "device": describe(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "study": {"name": "korean-demo", "samples": samples or "as the spec says", "trials_a_round": trials},
        "goals": GOALS,
        "warm": {name: summary([gap[name] for gap in warm]) for name in warm[0]},
        # Its CPU time is that of two processes.
        "fresh": {name: summary([gap[name] for gap in fresh]) for name in ("gap_s", "first_step_s")},
        "fresh_over_warm": statistics.median(g["gap_s"] for g in fresh) / statistics.median(g["gap_s"] for g in warm),
        "storage_share": summary(shares),
    }


def describe() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['device']}, load {found['load_average']['after'][0]:.1f}",
        f"{'':34}{'median':>9}{'quartiles':>17}{'runs':>6}",
    ]
    for name, values, unit in (
        ("warm: gap, s", found["warm"]["gap_s"], 1),
        ("warm: gap, s of this process' CPU", found["warm"]["gap_cpu_s"], 1),
        ("fresh: gap, s", found["fresh"]["gap_s"], 1),
        ("warm: first step, s", found["warm"]["first_step_s"], 1),
        ("fresh: first step, s", found["fresh"]["first_step_s"], 1),
        ("storage, % of a trial", found["storage_share"], 100),
    ):
        spread = f"{unit * values['q1']:.2f} to {unit * values['q3']:.2f}"
        lines.append(f"{name:34}{unit * values['median']:9.2f}{spread:>17}{values['runs']:6}")
    lines.append(f"a fresh process takes {found['fresh_over_warm']:.1f} times as long")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5, help="of each way in each round")
    parser.add_argument("--samples", type=int, help="of each trial, in place of the spec's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        events = record(arguments.record.parent, arguments.trials, arguments.samples)
        arguments.record.write_text(json.dumps(events))
        return
    found = measure(arguments.rounds, arguments.trials, arguments.samples)
    print(table(found))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
