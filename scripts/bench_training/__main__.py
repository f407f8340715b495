"""Our training against transformers' Trainer, Lightning and a bare loop, by turns in one run.

    pip install -e '.[bench]'
    python scripts/bench_training [--sizes demo large] [--rounds 12] [--end-to-end 2000]
                                  [--json scripts/records/training_cpu.json]

The IndexTTS-2 GPT on the Korean demo corpus (made where it is missing), batch size 8: "demo" is the model of
studies/korean_demo/study.toml, "large" twice as wide, 6 layers deep and with the published model's 8,194 codes.
Steady state: each contender has a process of its own, and they take turns of `--steps` steps while the others stand
still; the first turns are warm-up and dropped. Ratios are of turns in the same round, so that a busy machine slows
all of them. Speed is in real tokens a second: padding does not count. End to end: each contender alone, from the
start of its process until N steps are done, with an empty compilation cache. See contenders.py for how each one is
set up.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_optimizer import describe, ratio, summary
from contenders import CONTENDERS, Report, Task, contend
from pydantic import ValidationError

from studies.indextts2 import IndexTTS2
from studies.korean_demo.corpus import make_corpus
from trainer.acceleration import RunSize, detect, plan
from trainer.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent
STUDY = ROOT / "studies/korean_demo/study.toml"
LARGE = {"model_dim": 256, "layers": 6, "heads": 4}
PUBLISHED_CODES = {"number_mel_codes": 8194, "start_mel_token": 8192, "stop_mel_token": 8193}
FRAMEWORKS = [name for name in CONTENDERS if name.startswith(("transformers", "lightning"))]
# The compiled ones are for whom they may be faster: batches of free lengths are compiled again and again, and ten
# steps of Lightning's at the demo size, compilation counted, took six times as long as without (a busy machine).
# The bare loop is not compiled: its match is "ours, compile=off".
USUAL = ["transformers", "lightning", "bare loop", "ours", "ours, compile=off"]
LONG = 240_000  # steps of the run that the steady state is part of: what is decided from a run's length
SPEEDUP = 1.5
OVERHEAD = 0.02
SAME_LOSS = 0.05  # the contenders draw other batches


def build_workload(size: str) -> IndexTTS2:
    """The workload at one size, its corpus made and its manifests indexed."""
    options = tomllib.loads(STUDY.read_text())["workload"]
    folder = ROOT / "data/korean_demo"
    if size == "large":
        options["gpt"] |= LARGE | PUBLISHED_CODES
        folder = folder.with_name("korean_demo_256")
    make_corpus(folder, width=options["gpt"]["model_dim"])
    for name in ("train_manifests", "val_manifests"):
        options[name] = [entry.replace("data/korean_demo", f"data/{folder.name}") for entry in options[name]]
    workload = IndexTTS2.model_validate(options, context={"base_dir": STUDY.parent})
    workload.data_digest()
    return workload


def build_task(workload: IndexTTS2, settings: dict[str, Any]) -> Task:
    """What to train under `settings`, and what the device can do for it."""
    config, lengths = TrainConfig(**settings), workload.train_data().lengths
    sizes = [p.numel() for p in workload.build_model().parameters()]
    tokens = float(lengths.mean()) * config.batch_size
    size = RunSize(sum(sizes), len(sizes), tokens_per_step=tokens, remaining_steps=config.num_steps)
    return Task(workload, config, plan(detect(config.device), TrainConfig(**settings | {"compile": "off"}), size))


class Contender:
    """A contender's process and the pipe to it."""

    def __init__(self, name: str, task: Task, steps: int, output: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.name, self.output = name, output
        arguments = ("ours" if name.startswith("ours") else name, task, theirs, steps, output)
        self.process: SpawnProcess = context.Process(target=contend, args=arguments)
        self.began = time.perf_counter()
        self.process.start()
        theirs.close()

    def turn(self) -> Report:
        """Let it go on for one turn. Raises SystemExit, with the end of what it printed, where it died."""
        try:
            self.connection.send(True)
            report: Report = self.connection.recv()
        except (EOFError, OSError):
            printed = self.output.read_text(errors="replace").splitlines()[-12:] if self.output.exists() else []
            raise SystemExit("\n".join([*printed, f"{self.name} ended early; above is what it printed last"])) from None
        return report

    def end(self) -> None:
        self.connection.send(False)
        self.process.join(20)


@contextmanager
def contenders(
    names: list[str], workload: IndexTTS2, settings: dict[str, Any], steps: int
) -> Iterator[list[Contender]]:
    """Their processes, each standing before its first turn. "ours, KEY=VALUE" has one setting of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = {}
        for name in names:
            own = dict([name.removeprefix("ours, ").split("=", 1)]) if name.startswith("ours, ") else {}
            tasks[name] = build_task(workload, settings | own)
        started = []
        try:
            for number, (name, task) in enumerate(tasks.items()):
                started.append(Contender(name, task, steps, Path(folder, f"{number}.log")))
            yield started
            for contender in started:
                contender.end()
        finally:
            for contender in started:
                contender.process.kill()
                contender.process.join()


def check_losses(losses: dict[str, float]) -> None:
    """Raises SystemExit where a contender trains something else."""
    middle = statistics.median(losses.values())
    for name, loss in losses.items():
        if not abs(loss / middle - 1) <= SAME_LOSS:
            raise SystemExit(f"{name} trains something else: loss {loss:.3f} in the first turn; all: {losses}")


def steady(names: list[str], workload: IndexTTS2, settings: dict[str, Any], args: Any) -> dict[str, list[Report]]:
    """Each contender's reports, the warm-up's first. Who begins changes from round to round."""
    reports: dict[str, list[Report]] = {name: [] for name in names}
    settings = settings | {"steps": LONG, "log_every": args.steps, "save_every": None, "val_samples": 16}
    with contenders(names, workload, settings, args.steps) as started:
        for number in range(args.warmup + args.rounds):
            shift = number % len(started)
            for contender in started[shift:] + started[:shift]:
                reports[contender.name].append(contender.turn())
            if number == 0:
                check_losses({name: turns[0].loss for name, turns in reports.items()})
            print(f"\rround {number + 1} of {args.warmup + args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return reports


def end_to_end(name: str, workload: IndexTTS2, settings: dict[str, Any], steps: int) -> dict[str, float]:
    """One contender alone: wall seconds from the start of its process to the end of `steps` steps."""
    settings = settings | {"steps": steps, "save_every": None, "val_samples": 16}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=cache)
        with contenders([name], workload, settings, steps) as [contender]:
            report = contender.turn()
            seconds = time.perf_counter() - contender.began
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        del os.environ[variable]
    assert report.steps == steps
    return {"seconds": seconds, "tokens": report.tokens, "tokens_a_second": report.tokens / seconds}


def goals(size: str, speed: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What is aimed at, by its text: the ratio of speeds, and whether it is reached."""
    judged = {}
    frameworks = [name for name in speed if name in FRAMEWORKS]
    if size == "large" and frameworks and "ours" in speed:
        best = [max(values) for values in zip(*(speed[name] for name in frameworks), strict=True)]
        reached = ratio(speed["ours"], best)
        judged[f"at least {SPEEDUP} times the better framework"] = reached | {"passed": reached["median"] >= SPEEDUP}
    if "bare loop" in speed:
        ratios = [ratio(values, speed["bare loop"]) for name, values in speed.items() if name.startswith("ours")]
        if ratios:
            slowest = min(ratios, key=lambda found: found["median"])
            passed = slowest["median"] >= 1 - OVERHEAD
            judged[f"at most {OVERHEAD:.0%} slower than the bare loop"] = slowest | {"passed": passed}
    return judged


def measure(size: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    workload = build_workload(size)
    settings = tomllib.loads(STUDY.read_text())["train"] | {"device": args.device}
    parameters = sum(p.numel() for p in workload.build_model().parameters())
    precision = build_task(workload, settings | {"steps": LONG}).plan.precision
    reports = steady(names, workload, settings, args)
    turns = {name: all_turns[args.warmup :] for name, all_turns in reports.items()}
    speed = {name: [turn.tokens / turn.seconds for turn in turns[name]] for name in names}
    rows = {
        name: {
            "tokens_a_second": summary(speed[name]),
            "step_s": summary([turn.seconds / turn.steps for turn in turns[name]]),
            "real_token_share": sum(turn.tokens for turn in turns[name]) / sum(turn.slots for turn in turns[name]),
            "loss": [turn.loss for turn in reports[name]],
            **({"over_bare_loop": ratio(speed[name], speed["bare loop"])} if "bare loop" in speed else {}),
        }
        for name in names
    }
    if args.end_to_end:
        for name in names:
            rows[name]["end_to_end"] = end_to_end(name, workload, settings, args.end_to_end)
            print(f"{name}: {args.end_to_end} steps in {rows[name]['end_to_end']['seconds']:.1f} s", file=sys.stderr)
    return {"parameters": parameters, "precision": precision, "contenders": rows, "goals": goals(size, speed)}


def table(size: str, measured: dict[str, Any]) -> str:
    lines = [
        f"\n{size}: {measured['parameters'] / 1e6:.1f} M parameters, {measured['precision']}",
        f"{'':26}{'tokens/s':>9}{'quartiles':>15}{'ms a step':>11}{'real tokens':>13}{'/ bare loop':>13}"
        f"{'end to end':>13}{'tokens/s':>10}",
    ]
    for name, row in measured["contenders"].items():
        speed, whole = row["tokens_a_second"], row.get("end_to_end")
        over = f"{row['over_bare_loop']['median']:.3f}" if "over_bare_loop" in row else ""
        lines.append(
            f"{name:26}{speed['median']:9,.0f}{speed['q1']:8,.0f}-{speed['q3']:<6,.0f}"
            f"{row['step_s']['median'] * 1e3:11.1f}{row['real_token_share']:13.1%}{over:>13}"
            + (f"{whole['seconds']:11.1f} s{whole['tokens_a_second']:10,.0f}" if whole else "")
        )
    for when, place in (("first", 0), ("last", -1)):
        losses = [f"{name} {row['loss'][place]:.3f}" for name, row in measured["contenders"].items()]
        lines.append(f"mean loss in the {when} turn: " + ", ".join(losses))
    for goal, found in measured["goals"].items():
        verdict = "passed" if found["passed"] else "missed"
        lines.append(f"goal: {goal}: {found['median']:.3f} ({found['q1']:.3f}-{found['q3']:.3f}): {verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=["demo", "large"], default=["demo", "large"])
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, USUAL[-1]], default=USUAL)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="ours once more, so")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are dropped")
    # transformers' sampler goes from long to short batches 50 times 8 samples long: a turn is one such slope.
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps a turn")
    parser.add_argument("--end-to-end", type=int, metavar="N", help="also N steps from the start of a process")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    for setting in args.set:
        key, _, value = setting.partition("=")
        try:
            TrainConfig(**{"steps": LONG, key: value})
        except ValidationError as error:
            parser.error(
                f"--set {setting}: {error.errors()[0]['msg']}; give KEY=VALUE as [train] of a study.toml has it"
            )
    names = args.contenders + [f"ours, {setting}" for setting in args.set]
    packages = ("torch", "transformers", "accelerate", "lightning", "prodigyopt")
    record: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/bench_training", *sys.argv[1:]]),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "device": describe(detect(args.device).kind),
        "load_average": os.getloadavg(),
        "steps_a_turn": args.steps,
        "end_to_end_steps": args.end_to_end,
        "sizes": {},
    }
    print(f"{record['device']}, {args.rounds} rounds of {args.steps} steps")
    for size in args.sizes:
        record["sizes"][size] = measure(size, names, args)
        print(table(size, record["sizes"][size]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
