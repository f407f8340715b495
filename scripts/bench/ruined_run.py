"""Ruins a full run of the Korean demo on purpose, and records what the guard, the webhook and the hook do.

    python -m scripts.bench.ruined_run --keep data/ruined_run [--json scripts/records/ruined_run.json]

One trial of 100 steps, the baseline, becomes a full run of 600 steps that is validated every 20. From step 300 on 40
updates have 100 times the learning rate. `[full] on_decline = "finish"`, a webhook on this machine that stores what it
gets, and the demo's hook on each new best and at the end. (A larger d_coef at that step changes nothing: at rest
Prodigy's numerator is negative.)

`validations` has all of them in their order, so some steps come twice: of the ruined run, and of the one that
went back. The samples stay in --keep to be played.
"""

import argparse
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from scripts.bench.common import DEMO_CORPUS, DEMO_STUDY, Record, build_parser, read_demo_study, run_benchmark
from trainer import UserError
from tuner import Runtime, StudySpec, launch, promote
from tuner.study.record import StudyRecord
from tuner.study.samples import read_all_samples

STEPS, BATCH_SIZE, EVERY, TRIAL_STEPS = 600, 8, 20, 100
RUINED = range(300, 340)
"""Updates; those after the way back have other numbers."""
FACTOR = 100
WORDS = ("declin", "continuing from", "hook:", "end")


class Receiver(BaseHTTPRequestHandler):
    """A webhook that keeps the bodies."""

    def __init__(self, messages: list[Any], *arguments: Any) -> None:
        self.messages = messages
        super().__init__(*arguments)

    def do_POST(self) -> None:
        self.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve() -> Iterator[list[Any]]:
    """Receive messages at the address in $RUINED_RUN_WEBHOOK; yields the list that they come to."""
    messages: list[Any] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Receiver, messages)) as server:
        os.environ["RUINED_RUN_WEBHOOK"] = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield messages
        server.shutdown()


class Curve:
    """A tracker that keeps each validation loss, in the order in which they come."""

    def __init__(self) -> None:
        self.validations: list[tuple[int, float]] = []

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "val/loss" in values:
            self.validations.append((step, values["val/loss"]))

    def close(self) -> None:
        """Nothing is open."""


def build_spec(corpus: Path) -> StudySpec:
    values = read_demo_study(corpus)
    values["study"]["name"] = "ruined"
    values["trial"] = {"samples": TRIAL_STEPS * BATCH_SIZE, "evaluations": 5, "num_trials": 1}
    values["full"] = {"steps": STEPS, "eval_every": EVERY * BATCH_SIZE, "on_decline": "finish"}
    values["notify"] = {"url": "$RUINED_RUN_WEBHOOK", "form": "slack"}
    values["hooks"]["on"] = ["best", "end"]
    return StudySpec.build(values, base_dir=DEMO_STUDY.parent)


def measure(arguments: argparse.Namespace) -> Record:
    folder = arguments.keep.resolve()
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder.")
    runtime, curve, num_updates = Runtime(folder / "runs", track=False), Curve(), TRIAL_STEPS

    def ruin(optimizer: Optimizer, *_: object) -> None:
        nonlocal num_updates
        if num_updates in RUINED:
            for group in optimizer.param_groups:
                group["lr"] *= FACTOR
        num_updates += 1

    with serve() as messages:
        study = launch(build_spec(arguments.corpus), storage=f"sqlite:///{folder}/tuner.db", runtime=runtime)
        handle = register_optimizer_step_pre_hook(ruin)
        result = promote(study, runtime=runtime, trackers=[curve])
        handle.remove()
    (run,) = StudyRecord.read(study).full_runs
    lines = (result.run_dir / "train.log").read_text(encoding="utf-8").splitlines()
    found = {
        "ruined_at": RUINED.start,
        "decline": run.decline,
        "metrics": result.metrics,
        "step": result.step,
        "messages": messages,
        "samples": [
            {"step": each.step, "files": [path.name for path in each.files], **each.metrics}
            for each in read_all_samples(result.run_dir)
        ],
        "log": [line.replace(str(folder), "") for line in lines if any(word in line for word in WORDS)],
    }
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return found | {"validations": curve.validations}


if __name__ == "__main__":
    parser = build_parser(__doc__)
    parser.add_argument(
        "--corpus", type=Path, default=DEMO_CORPUS, help="the Korean demo's (default: data/korean_demo)"
    )
    parser.add_argument("--keep", type=Path, required=True, metavar="FOLDER", help="where the run and its samples stay")
    run_benchmark(parser, measure, packages=("torch", "prodigy-tuner"), rows="validations")
