"""Our training against transformers' Trainer, Lightning and a bare loop, interleaved in one run.

    pip install -e '.[bench]'
    python -m scripts.bench.training [--sizes demo large] [--rounds 12] [--end-to-end 2000]
                                     [--json scripts/records/training_cpu.json]

The IndexTTS-2 GPT on the Korean demo corpus (made if it is missing), batch size 8: "demo" is the model of
studies/korean_demo/study.toml, "large" twice as wide, 6 layers deep and with the published model's 8,194 codes.
Steady state: each contender has a process of its own, and they take turns of `--steps` steps while the others wait;
the first turns are warm-up and dropped. Ratios are of turns in the same round, so that other load slows all of them.
Speed is in real tokens a second: padding does not count. End to end: each contender alone, from the start of its
process until N steps are done, with an empty compilation cache. contenders.py describes the setup of each one.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scripts.bench.common import (
    DEMO_CORPUS,
    DEMO_STUDY,
    Record,
    build_parser,
    describe_device,
    read_demo_study,
    run_benchmark,
    summarize,
    summarize_ratio,
)
from scripts.bench.training.contenders import CONTENDERS, Report, Task, contend
from studies.indextts2 import IndexTTS2
from studies.korean_demo.corpus import make_corpus
from trainer.acceleration import RunSize, detect, plan
from trainer.config import TrainConfig

LARGE = {"model_dim": 256, "layers": 6, "heads": 4}
PUBLISHED_CODES = {"number_mel_codes": 8194, "start_mel_token": 8192, "stop_mel_token": 8193}
FRAMEWORKS = [name for name in CONTENDERS if name.startswith(("transformers", "lightning"))]
# The compiled ones are optional: batches of free lengths are recompiled again and again, and ten steps of
# Lightning's at the demo size, with compilation, took six times as long as without (a busy machine). The bare loop
# is not compiled: its counterpart is "ours, compile=off".
USUAL = ["transformers", "lightning", "bare loop", "ours", "ours, compile=off"]
LONG = 240_000  # steps of the imagined whole run, from which the acceleration plan is decided
SPEEDUP = 1.5
OVERHEAD = 0.02
SAME_LOSS = 0.05  # the contenders' batches differ


def build_workload(size: str) -> IndexTTS2:
    """The workload of one size, with its corpus made and its manifests indexed."""
    folder = DEMO_CORPUS if size == "demo" else DEMO_CORPUS.with_name("korean_demo_256")
    options = read_demo_study(folder)["workload"]
    if size == "large":
        options["gpt"] |= LARGE | PUBLISHED_CODES
    make_corpus(folder, width=options["gpt"]["model_dim"])
    workload = IndexTTS2.model_validate(options, context={"base_dir": DEMO_STUDY.parent})
    workload.data_digest()
    return workload


def build_task(workload: IndexTTS2, settings: dict[str, Any]) -> Task:
    """The training under `settings`, and the device's acceleration plan for it."""
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
        """Run it for one turn. Raises SystemExit with its last output if it died."""
        try:
            self.connection.send(True)
            report: Report = self.connection.recv()
        except (EOFError, OSError):
            output = self.output.read_text(errors="replace").splitlines()[-12:] if self.output.exists() else []
            raise SystemExit("\n".join([*output, f"{self.name} exited early; its last output is above"])) from None
        return report

    def end(self) -> None:
        self.connection.send(False)
        self.process.join(20)


@contextmanager
def start_contenders(
    names: list[str], workload: IndexTTS2, settings: dict[str, Any], steps: int
) -> Iterator[list[Contender]]:
    """Their processes, each waiting for its first turn. "ours, KEY=VALUE" changes one setting."""
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
    """Raises SystemExit if a contender trains something else."""
    middle = statistics.median(losses.values())
    for name, loss in losses.items():
        if not abs(loss / middle - 1) <= SAME_LOSS:
            raise SystemExit(f"{name} trains something else: loss {loss:.3f} in the first turn; all: {losses}")


def measure_steady(
    names: list[str], workload: IndexTTS2, settings: dict[str, Any], args: argparse.Namespace
) -> dict[str, list[Report]]:
    """Each contender's reports, the warm-up's first. The order rotates from round to round."""
    reports: dict[str, list[Report]] = {name: [] for name in names}
    settings = settings | {"steps": LONG, "log_every": args.steps, "save_every": None, "val_samples": 16}
    with start_contenders(names, workload, settings, args.steps) as started:
        for number in range(args.warmup + args.rounds):
            shift = number % len(started)
            for contender in started[shift:] + started[:shift]:
                reports[contender.name].append(contender.turn())
            if number == 0:
                check_losses({name: turns[0].loss for name, turns in reports.items()})
            print(f"\rround {number + 1} of {args.warmup + args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return reports


def measure_end_to_end(name: str, workload: IndexTTS2, settings: dict[str, Any], steps: int) -> dict[str, float]:
    """One contender alone: wall seconds from the start of its process to the end of `steps` steps."""
    settings = settings | {"steps": steps, "save_every": None, "val_samples": 16}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=cache)
        with start_contenders([name], workload, settings, steps) as [contender]:
            report = contender.turn()
            seconds = time.perf_counter() - contender.began
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        del os.environ[variable]
    assert report.steps == steps
    return {"seconds": seconds, "tokens": report.tokens, "tokens_a_second": report.tokens / seconds}


def check_goals(size: str, speed: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The ratio of speeds for each goal, by the goal's text, and whether it is reached."""
    goals = {}
    frameworks = [name for name in speed if name in FRAMEWORKS]
    if size == "large" and frameworks and "ours" in speed:
        best = [max(values) for values in zip(*(speed[name] for name in frameworks), strict=True)]
        speedup = summarize_ratio(speed["ours"], best)
        goals[f"at least {SPEEDUP} times the better framework"] = speedup | {"passed": speedup["median"] >= SPEEDUP}
    if "bare loop" in speed:
        ratios = [
            summarize_ratio(values, speed["bare loop"]) for name, values in speed.items() if name.startswith("ours")
        ]
        if ratios:
            slowest = min(ratios, key=lambda each: each["median"])
            passed = slowest["median"] >= 1 - OVERHEAD
            goals[f"at most {OVERHEAD:.0%} slower than the bare loop"] = slowest | {"passed": passed}
    return goals


def measure_size(size: str, names: list[str], args: argparse.Namespace) -> Record:
    workload = build_workload(size)
    settings = read_demo_study()["train"] | {"device": args.device}
    parameters = sum(p.numel() for p in workload.build_model().parameters())
    precision = build_task(workload, settings | {"steps": LONG}).plan.precision
    reports = measure_steady(names, workload, settings, args)
    turns = {name: all_turns[args.warmup :] for name, all_turns in reports.items()}
    speed = {name: [turn.tokens / turn.seconds for turn in turns[name]] for name in names}
    rows: Record = {
        name: {
            "tokens_a_second": summarize(speed[name]),
            "step_s": summarize([turn.seconds / turn.steps for turn in turns[name]]),
            "real_token_share": sum(turn.tokens for turn in turns[name]) / sum(turn.slots for turn in turns[name]),
            "loss": [turn.loss for turn in reports[name]],
            **({"over_bare_loop": summarize_ratio(speed[name], speed["bare loop"])} if "bare loop" in speed else {}),
        }
        for name in names
    }
    if args.end_to_end:
        for name in names:
            rows[name]["end_to_end"] = measure_end_to_end(name, workload, settings, args.end_to_end)
            print(f"{name}: {args.end_to_end} steps in {rows[name]['end_to_end']['seconds']:.1f} s", file=sys.stderr)
    return {"parameters": parameters, "precision": precision, "contenders": rows, "goals": check_goals(size, speed)}


def format_table(size: str, measured: Record) -> str:
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
    for goal, ratio in measured["goals"].items():
        verdict = "passed" if ratio["passed"] else "missed"
        lines.append(f"goal: {goal}: {ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f}): {verdict}")
    return "\n".join(lines)


def parse_setting(text: str) -> str:
    """Checks the KEY=VALUE of `--set`."""
    key, _, value = text.partition("=")
    try:
        TrainConfig(**{"steps": LONG, key: value})
    except ValidationError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: {error.errors()[0]['msg']}; give KEY=VALUE as [train] of a study.toml has it"
        ) from None
    return text


def measure(args: argparse.Namespace) -> Record:
    names = args.contenders + [f"ours, {setting}" for setting in args.set]
    sizes = {}
    print(f"{describe_device(args.device)}, {args.rounds} rounds of {args.steps} steps")
    for size in args.sizes:
        sizes[size] = measure_size(size, names, args)
        print(format_table(size, sizes[size]))
    return {"steps_a_turn": args.steps, "end_to_end_steps": args.end_to_end, "sizes": sizes}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=["demo", "large"], default=["demo", "large"])
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, USUAL[-1]], default=USUAL)
    parser.add_argument(
        "--set", action="append", default=[], type=parse_setting, metavar="KEY=VALUE", help="ours again, with this"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are dropped")
    # transformers' sampler goes from long to short batches 50 times 8 samples long: a turn is one such slope.
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps a turn")
    parser.add_argument("--end-to-end", type=int, metavar="N", help="also N steps from the start of a process")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    run_benchmark(parser, measure, packages=("torch", "transformers", "accelerate", "lightning", "prodigyopt"))


if __name__ == "__main__":
    main()
