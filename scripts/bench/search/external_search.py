"""A tool that searches in an environment of its own; the protocol is that of scripts.bench.search.external."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from scripts.bench.common import ROOT
from scripts.bench.search.curves import Configuration
from scripts.bench.search.runs import Choice, Runs, Task
from scripts.bench.search.strategies import BASELINE
from trainer.errors import UserError

ENVIRONMENTS = ROOT / "data/environments"
SCRIPTS = "scripts.bench.search.external"


@dataclass(frozen=True)
class ExternalSearch:
    """A process that asks for losses."""

    command: Sequence[str]
    share: int = 60
    """A trial has at most a full run's length over this."""
    max_trials: int | None = None

    def choices(self, task: Task) -> Iterator[Choice]:
        """Raises UserError if the process ends before the budget is spent."""
        yield Choice(0, BASELINE)
        pipe = subprocess.PIPE
        with subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
            assert process.stdin and process.stdout
            write_line(process.stdin, self._describe(task))
            yield from self._serve(task, process.stdin, process.stdout)
            process.stdin.close()
            process.stdout.read()

    def _describe(self, task: Task) -> dict[str, Any]:
        curves = task.curves
        return {
            "batch_sizes": curves.batch_sizes,
            "d_coefs": [curves.d_coefs[0], curves.d_coefs[-1]],
            "points": curves.points.tolist(),
            "longest": curves.length // self.share,
            "baseline": asdict(BASELINE),
            "seed": task.seed,
        }

    def _serve(self, task: Task, stdin: IO[str], stdout: IO[str]) -> Iterator[Choice]:
        """Answer until the budget is spent, or one trial more than allowed is asked for."""
        runs, curves, promoted = Runs(task.curves), task.curves, None
        for line in stdout:
            if not line.startswith("{"):
                continue  # what a tool prints when it is imported
            message = json.loads(line)
            if "promote" in message:
                promoted = read_configuration(message["promote"])
                continue
            if promoted:
                yield runs.choose(promoted, task.train_seed)
            asked = read_configuration(message["config"])
            is_new = (asked, task.train_seed) not in runs.trained
            if runs.spent >= task.budget or (is_new and len(runs.trained) == self.max_trials):
                return
            losses = runs.train(asked, task.train_seed, message["until"])
            write_line(stdin, {"curve": list(zip(curves.points.tolist(), losses.tolist(), strict=False))})
        raise UserError(f"{' '.join(self.command)} ended before its budget was spent; its error, if any, is above.")


def read_configuration(values: Mapping[str, Any]) -> Configuration:
    return Configuration(values["batch_size"], values["d_coef"])


def write_line(stream: IO[str], message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def find_command(tool: str, method: str) -> tuple[str, ...]:
    """How the tool's script is run; empty if its environment does not exist."""
    python = ENVIRONMENTS / tool / "bin/python"
    return (str(python), "-m", f"{SCRIPTS}.{tool}", method) if python.exists() else ()
