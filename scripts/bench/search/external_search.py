"""A tool that searches in an environment of its own; the protocol is that of scripts.bench.search.external."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from scripts.bench.common import ROOT
from scripts.bench.search.curves import Configuration
from scripts.bench.search.runs import Choice, Runs, Task
from scripts.bench.search.strategies import BASELINE, MAX_TRIALS
from trainer.errors import UserError

ENVIRONMENTS = ROOT / "data/environments"
SCRIPTS = "scripts.bench.search.external"


@dataclass(frozen=True)
class ExternalSearch:
    """A process that asks for losses."""

    command: Sequence[str]
    share: int = 60
    """A trial has at most a full run's length over this."""

    def choices(self, task: Task) -> Iterator[Choice]:
        """Raises UserError if the process fails."""
        yield Choice(0, BASELINE)
        pipe = subprocess.PIPE
        with subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
            assert process.stdin and process.stdout
            write_line(process.stdin, self._describe(task))
            yield from self._serve(task, process.stdin, process.stdout)
            process.stdin.close()
            process.stdout.read()
        if process.returncode:
            raise UserError(f"{' '.join(self.command)} exited with {process.returncode}; its error is above.")

    def _describe(self, task: Task) -> dict[str, Any]:
        curves = task.curves
        return {
            "batch_sizes": curves.batch_sizes,
            "d_coefs": [curves.d_coefs[0], curves.d_coefs[-1]],
            "points": curves.points.tolist(),
            "longest": curves.length // self.share,
            "seed": task.seed,
        }

    def _serve(self, task: Task, stdin: IO[str], stdout: IO[str]) -> Iterator[Choice]:
        """Answer until the budget is spent, or the process ends."""
        runs, curves = Runs(task.curves), task.curves
        for message in read_messages(stdout):
            if "promote" in message:
                yield runs.choose(read_configuration(message["promote"]), task.train_seed)
                continue
            if runs.spent >= task.budget or len(runs.trained) > MAX_TRIALS:
                return
            losses = runs.train(read_configuration(message["config"]), task.train_seed, message["until"])
            write_line(stdin, {"curve": list(zip(curves.points.tolist(), losses.tolist(), strict=False))})


def read_messages(stream: IO[str]) -> Iterator[dict[str, Any]]:
    """Lines of JSON, without what the tool prints besides."""
    for line in stream:
        if line.startswith(('{"config"', '{"promote"')):
            yield json.loads(line)


def read_configuration(values: Mapping[str, Any]) -> Configuration:
    return Configuration(values["batch_size"], values["d_coef"])


def write_line(stream: IO[str], message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def find_command(tool: str, method: str) -> tuple[str, ...]:
    """How the tool's script is run; empty if its environment does not exist."""
    python = ENVIRONMENTS / tool / "bin/python"
    return (str(python), "-m", f"{SCRIPTS}.{tool}", method) if python.exists() else ()
