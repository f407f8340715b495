"""What Aim costs a training run: the same run with and without it, by turns, and the file handles of many runs.

    python scripts/bench_tracking.py [--rounds 6] [--steps 3000] [--json scripts/records/tracking_cpu.json]

Each round trains twice with Aim and twice without, each pair in a fresh process: the first run there pays for Aim's
import, the second one is what a study's later trials pay. `training` is the time of the steps alone, `end to end` all
of `train()`, with the wait for Aim's last writes. Every hundredth step is logged, as by default; a step of this model
takes milliseconds, so Aim has more to do than in a real run.

Times of whole runs differ by more than Aim costs. The CPU time of the thread that Aim works in does not depend on what
else the machine does: its share of a run's time is the most that Aim can take from it.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_optimizer import describe, ratio, summary
from studies.korean_chars import KoreanChars
from trainer import TrainConfig, train
from trainer.tracking import AimTracker

RUNS = ("first run of a process", "later run")
PHASES = ("training", "end to end")
GOAL = 1.01


class TimedTracker(AimTracker):
    """Knows the CPU seconds of its thread."""

    cpu_seconds = 0.0

    def _work(self) -> None:
        super()._work()
        self.cpu_seconds = time.thread_time()


def one_run(folder: Path, name: str, steps: int, *, aim: bool) -> dict[str, float]:
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


def fresh(aim: bool, steps: int) -> list[dict[str, float]]:
    """Two runs, one after the other, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return [one_run(Path(folder), name, steps, aim=aim) for name in ("first", "later")]


def in_child(aim: bool, steps: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--fresh", str(int(aim)), "--steps", str(steps)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: list[dict[str, float]] = json.loads(child.stdout.splitlines()[-1])
    return found


def handles(num_runs: int) -> list[int]:
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


def measure(rounds: int, steps: int, num_runs: int) -> dict[str, Any]:
    found: dict[bool, list[list[dict[str, float]]]] = {True: [], False: []}
    for number in range(rounds):
        # Neither side is always the first: a machine warms up, and other work comes and goes.
        for aim in (True, False) if number % 2 else (False, True):
            found[aim].append(in_child(aim, steps))
    rows = {}
    for place, run in enumerate(RUNS):
        for phase in PHASES:
            seconds = {aim: [pair[place][phase] for pair in found[aim]] for aim in found}
            rows[f"{run}, {phase}"] = {
                "with_aim": summary(seconds[True]),
                "without": summary(seconds[False]),
                "ratio": ratio(seconds[True], seconds[False]),
            }
        shares = [pair[place]["aim"] / pair[place]["training"] for pair in found[True]]
        rows[f"{run}, Aim's thread"] = {"share": summary(shares)}
    counts = handles(num_runs) if num_runs and Path("/proc/self/fd").is_dir() else []
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"aim": version("aim"), "torch": version("torch"), "python": platform.python_version()},
        "device": describe("cpu"),
        "load_average": os.getloadavg(),
        "steps": steps,
        "rows": rows,
        "file_handles": {"runs": len(counts), "after_first": counts[0], "most": max(counts), "after_last": counts[-1]}
        if counts
        else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--handles", type=int, default=200, help="runs whose open files are counted; 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--fresh", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fresh is not None:
        print(json.dumps(fresh(bool(arguments.fresh), arguments.steps)))
        return
    record = measure(arguments.rounds, arguments.steps, arguments.handles)
    print(f"{'':40}{'with Aim':>10}{'without':>10}{'ratio':>8}  (goal: at most {GOAL})")
    for name, row in record["rows"].items():
        if "share" in row:
            print(f"{name:40}{row['share']['median']:28.2%} of the training in CPU time")
            continue
        with_aim, without, share = (row[key]["median"] for key in ("with_aim", "without", "ratio"))
        spread = f"{row['ratio']['q1']:.3f}-{row['ratio']['q3']:.3f}"
        print(f"{name:40}{with_aim:9.2f}s{without:9.2f}s{share:8.3f}  ({spread})")
    if found := record["file_handles"]:
        print(f"file handles over {found['runs']} runs: {found['after_first']} -> {found['after_last']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
