"""The cost of Aim in a training run: the same run with and without it, interleaved, and the file handles of many runs.

    python -m scripts.bench.tracking [--rounds 6] [--steps 3000] [--json scripts/records/tracking_cpu.json]

Each round trains twice with Aim and twice without, each pair in a new process: the first run there pays for Aim's
import, the second one is like a study's later trials. `training` is the time of the steps alone, `end to end` all of
`train()`, with the wait for Aim's last writes. Every hundredth step is logged, as by default; a step of this model
takes milliseconds, so Aim has more to do than in a real run.

Times of whole runs vary by more than Aim costs. The CPU time of Aim's thread does not depend on other load: its share
of a run's time is the upper bound of Aim's cost.
"""

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

from scripts.bench.common import Record, build_parser, run_benchmark, run_child, summarize, summarize_ratio
from studies.korean_chars import KoreanChars
from trainer import TrainConfig, train
from trainer.tracking import AimTracker

RUNS = ("first run of a process", "later run")
PHASES = ("training", "end to end")
GOAL = 1.01


class TimedTracker(AimTracker):
    """Measures the CPU seconds of its thread."""

    cpu_seconds = 0.0

    def _work(self) -> None:
        super()._work()
        self.cpu_seconds = time.thread_time()


def measure_run(folder: Path, name: str, steps: int, *, aim: bool) -> dict[str, float]:
    """Seconds of a run, in this process."""
    config = TrainConfig(steps=steps, batch_size=16, d_coef=0.5, eval_every=16 * steps / 4, seed=1)
    workload, run_dir = KoreanChars(width=96), folder / name
    params = {"train": config.model_dump(mode="json"), "workload": workload.model_dump(mode="json")}
    tracker = TimedTracker(folder, run_dir=run_dir, experiment="bench", params=params) if aim else None
    run_dir.mkdir()
    started = time.perf_counter()
    result = train(workload, config, run_dir=run_dir, tracker=tracker)
    taken = {"end to end": time.perf_counter() - started, "training": result.seconds}
    return taken | ({"aim": tracker.cpu_seconds} if tracker else {})


def measure_pair(aim: bool, steps: int) -> list[dict[str, float]]:
    """Two runs, one after the other, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return [measure_run(Path(folder), name, steps, aim=aim) for name in ("first", "later")]


def count_handles(num_runs: int) -> list[int]:
    """Open files of this process after each of many runs."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_runs):
            run_dir = Path(folder) / f"run-{number}"
            run_dir.mkdir()
            tracker = AimTracker(Path(folder), run_dir=run_dir, experiment="bench", params={"number": number})
            tracker.PATIENCE_S = 600.0
            for step in range(10):
                tracker.track({"train/loss": 1.0 / (step + 1), "val/loss": 1.0}, step=step, samples=step)
            tracker.checkpoint("latest.pth", step=9)
            tracker.close()
            gc.collect()
            counts.append(len(os.listdir("/proc/self/fd")))
    return counts


def measure(arguments: argparse.Namespace) -> Record:
    pairs: dict[bool, list[list[dict[str, float]]]] = {True: [], False: []}
    for number in range(arguments.rounds):
        # The order alternates: a machine warms up, and other load changes.
        for aim in (True, False) if number % 2 else (False, True):
            pairs[aim].append(run_child(measure_pair, aim, arguments.steps))
    rows: Record = {}
    for place, run in enumerate(RUNS):
        for phase in PHASES:
            seconds = {aim: [pair[place][phase] for pair in pairs[aim]] for aim in pairs}
            rows[f"{run}, {phase}"] = {
                "with_aim": summarize(seconds[True]),
                "without": summarize(seconds[False]),
                "ratio": summarize_ratio(seconds[True], seconds[False]),
            }
        shares = [pair[place]["aim"] / pair[place]["training"] for pair in pairs[True]]
        rows[f"{run}, Aim's thread"] = {"share": summarize(shares)}
    counts = count_handles(arguments.handles) if arguments.handles and Path("/proc/self/fd").is_dir() else []
    return {
        "steps": arguments.steps,
        "rows": rows,
        "file_handles": {"runs": len(counts), "after_first": counts[0], "most": max(counts), "after_last": counts[-1]}
        if counts
        else None,
    }


def format_table(record: Record) -> str:
    lines = [f"{'':40}{'with Aim':>10}{'without':>10}{'ratio':>8}  (goal: at most {GOAL})"]
    for name, row in record["rows"].items():
        if "share" in row:
            lines.append(f"{name:40}{row['share']['median']:28.2%} of the training in CPU time")
            continue
        with_aim, without, ratio = (row[key]["median"] for key in ("with_aim", "without", "ratio"))
        spread = f"{row['ratio']['q1']:.3f}-{row['ratio']['q3']:.3f}"
        lines.append(f"{name:40}{with_aim:9.2f}s{without:9.2f}s{ratio:8.3f}  ({spread})")
    if handles := record["file_handles"]:
        lines.append(f"file handles over {handles['runs']} runs: {handles['after_first']} -> {handles['after_last']}")
    return "\n".join(lines)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--handles", type=int, default=200, help="runs whose open files are counted; 0: none")
    run_benchmark(parser, measure, packages=("aim", "torch"), format_table=format_table)


if __name__ == "__main__":
    main()
