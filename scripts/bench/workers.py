"""The time between two trials: a warm worker against a new process for each trial, and the cost of the storage.

    python -m scripts.bench.workers [--rounds 2] [--trials 5] [--samples 1200] [--json scripts/records/workers_cpu.json]

Runs the Korean demo study (`python -m studies.korean_demo.corpus` makes its corpus) into a temporary folder, with Aim
and the dashboard's page as `tuner launch` has them. The gap is measured from one trial's last validation, after which
only its checkpoint, trackers and storage remain, to the start of the next trial's first optimizer step; the step itself
is timed separately. In "warm" one process runs all trials, in "fresh" each trial has a new process. The two are
interleaved in every round. The storage's share is the time of its calls in the training thread, the claim of the trial
included, over the time from one trial's end to the next one's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from scripts.bench.common import DEMO_STUDY, Record, build_parser, run_benchmark, run_child, summarize
from trainer import loop
from tuner import Runtime, StudySpec, launch

GOALS = {"warm_gap_s": 0.5, "storage_share": 0.01}


class Stamps:
    """A display that records the time of each event, by the system's monotonic clock, which all processes share."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.storage_s = 0.0

    def add(self, kind: str, **values: Any) -> None:
        cpu = time.process_time()
        self.events.append({"kind": kind, "at": time.monotonic(), "cpu": cpu, **values})

    def trial_started(self, trial: Any, resumed: bool) -> Stamps:
        self.add("started", trial=trial.number)
        return self

    def trial_ended(self, trial: Any) -> None:
        self.add("ended", trial=trial.number, storage_s=self.storage_s)
        self.storage_s = 0.0

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "val/loss" in values:
            self.add("validated", samples=samples)

    def close(self) -> None:
        """Not recorded: the checkpoint is still being written."""

    def watch_steps(self) -> None:
        """Record the first optimizer step of each trial."""
        step = loop.step

        def record_step(*arguments: Any) -> None:
            if self.events[-1]["kind"] != "started":
                step(*arguments)
                return
            self.add("first step begins")
            step(*arguments)
            self.add("first step ended")

        loop.step = cast(Any, record_step)

    def watch_storage(self) -> None:
        """Sum the time of the storage's calls in this thread."""
        from optuna.storages import BaseStorage
        from optuna.storages._cached_storage import _CachedStorage

        thread, depth = threading.get_ident(), [0]

        def time_calls(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if threading.get_ident() != thread or depth[0]:
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
                setattr(_CachedStorage, name, time_calls(getattr(_CachedStorage, name)))


def record_events(folder: str, total: int, samples: int | None) -> list[dict[str, Any]]:
    """Launch the study up to `total` trials in this process."""
    stamps = Stamps()
    stamps.watch_storage()
    stamps.watch_steps()
    spec = StudySpec.load(DEMO_STUDY, {} if samples is None else {"trial.samples": samples})
    launch(spec, storage=f"sqlite:///{folder}/t.db", runtime=Runtime(Path(folder)), num_trials=total, display=stamps)
    return stamps.events


def find_gaps(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each trial's last validation to the next one's first step, in seconds."""
    gaps: list[dict[str, float]] = []
    last = None
    for event in events:
        if event["kind"] == "validated":
            last = event
        elif event["kind"] == "first step begins" and last is not None:
            begins = event
        elif event["kind"] == "first step ended" and last is not None:
            gap = {"gap_s": begins["at"] - last["at"], "first_step_s": event["at"] - begins["at"]}
            gaps.append({**gap, "gap_cpu_s": begins["cpu"] - last["cpu"]})
    return gaps


def compute_storage_shares(events: list[dict[str, Any]]) -> list[float]:
    ends = [event for event in events if event["kind"] == "ended"]
    return [end["storage_s"] / (end["at"] - before["at"]) for before, end in itertools.pairwise(ends)]


def measure(arguments: argparse.Namespace) -> Record:
    rounds, trials, samples = arguments.rounds, arguments.trials, arguments.samples
    warm, fresh, shares = [], [], []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            events = run_child(record_events, folder, trials, samples)
        warm += find_gaps(events)
        shares += compute_storage_shares(events)
        events = []
        with tempfile.TemporaryDirectory() as folder:
            for total in range(1, trials + 1):
                events += run_child(record_events, folder, total, samples)
        fresh += find_gaps(events)
        print(
            f"round {number} of {rounds}: warm {warm[-1]['gap_s']:.2f} s, fresh {fresh[-1]['gap_s']:.2f} s", flush=True
        )
    return {
        "study": {"name": "korean-demo", "samples": samples or "as the spec says", "trials_a_round": trials},
        "goals": GOALS,
        "warm": {name: summarize([gap[name] for gap in warm]) for name in warm[0]},
        # Its CPU time is that of two processes.
        "fresh": {name: summarize([gap[name] for gap in fresh]) for name in ("gap_s", "first_step_s")},
        "fresh_over_warm": statistics.median(g["gap_s"] for g in fresh) / statistics.median(g["gap_s"] for g in warm),
        "storage_share": summarize(shares),
    }


def format_table(record: Record) -> str:
    lines = [
        f"{record['device']}, load {record['load_average']['after'][0]:.1f}",
        f"{'':34}{'median':>9}{'quartiles':>17}{'runs':>6}",
    ]
    for name, values, unit in (
        ("warm: gap, s", record["warm"]["gap_s"], 1),
        ("warm: gap, s of this process' CPU", record["warm"]["gap_cpu_s"], 1),
        ("fresh: gap, s", record["fresh"]["gap_s"], 1),
        ("warm: first step, s", record["warm"]["first_step_s"], 1),
        ("fresh: first step, s", record["fresh"]["first_step_s"], 1),
        ("storage, % of a trial", record["storage_share"], 100),
    ):
        spread = f"{unit * values['q1']:.2f} to {unit * values['q3']:.2f}"
        lines.append(f"{name:34}{unit * values['median']:9.2f}{spread:>17}{values['runs']:6}")
    lines.append(f"a fresh process takes {record['fresh_over_warm']:.1f} times as long")
    return "\n".join(lines)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5, help="of each way in each round")
    parser.add_argument("--samples", type=int, help="of each trial, in place of the spec's")
    packages = ("torch", "optuna", "aim", "sqlalchemy")
    run_benchmark(parser, measure, packages=packages, format_table=format_table)


if __name__ == "__main__":
    main()
