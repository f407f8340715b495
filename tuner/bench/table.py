"""`tuner bench`: what each optimization of a training run gives on this machine, measured side by side.

Rows are the baseline, each optimization alone, all of them one after the other, and the trainer itself. Every row of
every round is a process of its own, so that its peak memory is its own; the rounds are interleaved, each begins with
another row, and speed-ups are ratios inside a round, so that a machine that is busy for a while slows all rows alike.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from trainer.acceleration import Capabilities, detect
from trainer.errors import UserError
from trainer.metrics import clock
from trainer.workload import Workload
from tuner.bench.baseline import ADDED, REQUESTED, find_obstacle
from tuner.spec.mistakes import describe_unknown_key
from tuner.spec.setups import full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.tracked_run import code_version

Group = Literal["baseline", "alone", "cumulative", "trainer"]
CHILD = (sys.executable, "-m", "tuner.bench.measurement")
OUT_OF_MEMORY = "out of memory"
PEAK_MEMORY = {
    "cuda": "what torch had allocated on the device at its peak",
    "cpu": "the whole process at its peak, with Python and the compiler, without loader workers",
}
GRACE_SECONDS = 5.0


@dataclass
class Row:
    """One line of the table, and what its processes measured, by round."""

    name: str
    group: Group
    optimizations: tuple[str, ...] | None
    """Of the baseline; None for the trainer."""
    note: str = ""
    """Why there is no number, or what is to be known of it."""
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)
    """`tuner.bench.measurement.Measurement` as plain values, by round."""
    left_out: bool = False
    """Not measured, or not any more; the note says why."""
    failed: bool = False

    def rate(self, number: int) -> float:
        """Real tokens a second in that round."""
        return float(self.measured[number]["tokens"] / self.measured[number]["seconds"])

    def median(self, value: Callable[[dict[str, Any]], float]) -> float | None:
        return statistics.median(map(value, self.measured.values())) if self.measured else None

    def ratios(self, baseline: Row) -> list[float]:
        """Speed-up against the baseline in each round that has both."""
        return [self.rate(n) / baseline.rate(n) for n in sorted(self.measured.keys() & baseline.measured.keys())]

    def figures(self, baseline: Row) -> dict[str, Any]:
        """The row as `--json` gives it: medians over the rounds; `spread` is the least and the greatest."""
        ratios, rates = self.ratios(baseline), [self.rate(number) for number in sorted(self.measured)]
        return {
            "name": self.name,
            "group": self.group,
            "speedup": statistics.median(ratios) if ratios else None,
            "tokens_per_second": statistics.median(rates) if rates else None,
            "step_seconds": self.median(lambda m: m["seconds"] / m["steps"]),
            "peak_memory_bytes": max((m["peak_memory_bytes"] for m in self.measured.values()), default=None),
            "real_token_share": self.median(lambda m: m["real_token_share"]),
            "first_loss": self.median(lambda m: m["loss"]),
            "spread": {
                "speedup": [min(ratios), max(ratios)] if ratios else None,
                "tokens_per_second": [min(rates), max(rates)] if rates else None,
            },
            "note": self.note,
        }


def build_rows(capabilities: Capabilities, workload: Workload) -> list[Row]:
    """All rows in their order. What has no effect here is left out, of the cumulative sets too."""
    reasons = {name: find_obstacle(name, capabilities, workload) for name in (*REQUESTED, *ADDED)}
    rows = [Row("baseline", "baseline", ())]
    rows += [Row(name, "alone", (name,)) for name in REQUESTED]
    together: tuple[str, ...] = ()
    for name, reason in reasons.items():
        together = together if reason else (*together, name)
        rows.append(Row(name, "cumulative", together))
    rows.append(Row("trainer", "trainer", None))
    for row in rows:
        if reason := reasons.get(row.name, ""):
            row.note, row.left_out = f"{reason}: not measured", True
    return rows


def select(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """The rows that `--only` names, by name or by group, and the baseline, which they are compared with."""
    names = {row.name for row in rows} | {row.group for row in rows}
    wanted = {name if name in names else name.replace("-", " ") for name in only}
    for name in sorted(wanted - names):
        raise UserError(f"--only: {describe_unknown_key(name, sorted(names)).replace('key', 'row', 1)}")
    return [row for row in rows if not wanted or row.group == "baseline" or {row.name, row.group} & wanted]


class Bench:
    """The measurement of one spec.

    Args:
        say: Takes a line of progress.
    """

    def __init__(
        self,
        spec: StudySpec,
        *,
        rounds: int,
        steps: int,
        only: Sequence[str] = (),
        say: Callable[[str], Any] = lambda line: None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.spec, self.rounds, self.steps, self.say, self.command = spec, rounds, steps, say, tuple(command or CHILD)
        setup = full_setup(spec, {})
        self.config = setup.config
        self.capabilities = detect(self.config.device)
        self.rows = select(build_rows(self.capabilities, setup.workload), only)
        self.load_average = os.getloadavg()
        self._spent: dict[tuple[str, ...] | None, float] = {}

    @property
    def failed(self) -> bool:
        """Whether a row ended with an error."""
        return any(row.failed for row in self.rows)

    def run(self) -> None:
        """Measure all rows in all rounds.

        Raises:
            UserError: The data, the workload or the device does not fit; the first process says so.
        """
        # Alone and at first in the row of all: the same thing, measured once.
        sets = list(dict.fromkeys(row.optimizations for row in self.rows if not row.left_out))
        jobs = [(number, each) for number in range(self.rounds) for each in rotate(sets, number, self.rounds)]
        for done, (number, each) in enumerate(jobs):
            rows = [row for row in self.rows if row.optimizations == each and not row.left_out]
            if not rows:
                continue
            started = time.monotonic()
            outcome = self._measure(each, number, rows)
            self._spent[each] = time.monotonic() - started
            name = rows[0].name if rows[0].group != "cumulative" else f"... + {rows[0].name}"
            left = self._left([later for _, later in jobs[done + 1 :]])
            self.say(f"[{done + 1}/{len(jobs)}] round {number + 1}, {name}: {outcome}{left}")
            if rows[0].group == "baseline" and rows[0].failed:
                return

    def _measure(self, optimizations: tuple[str, ...] | None, number: int, rows: Sequence[Row]) -> str:
        """Measure one set in one round, for all rows that show it; a line on what came of it."""
        request = {
            "spec": self.spec.to_dict(),
            "optimizations": optimizations,
            "steps": self.steps,
            "round": number,
        }
        code, out, errors = run_child(self.command, json.dumps(request))
        answer = json.loads(out.strip().splitlines()[-1]) if code == 0 else {}
        if "user_error" in answer and rows[0].group == "baseline":
            raise UserError(answer["user_error"])
        for row in rows:
            if "measurement" in answer:
                row.measured[number] = answer["measurement"]
                row.note = row.note or answer["measurement"]["note"]
            else:
                # The kernel ends a process that takes more memory than there is with SIGKILL.
                row.failed = "out_of_memory" not in answer and code != -signal.SIGKILL
                reason = answer.get("user_error") or error_line(errors, code)
                row.note = f"failed: {reason}" if row.failed else OUT_OF_MEMORY
                row.left_out = True
        return f"{rows[0].rate(number):,.0f} tokens/s" if "measurement" in answer else rows[0].note

    def _left(self, sets: Sequence[tuple[str, ...] | None]) -> str:
        """A row takes as long as in the round before; one not yet measured as long as the others on average."""
        if not sets:
            return ""
        average = statistics.mean(self._spent.values())
        return f", about {clock(sum(self._spent.get(each, average) for each in sets))} left"

    def result(self) -> dict[str, Any]:
        """The contract of `tuner bench --json`."""
        capabilities = self.capabilities
        packages = ("torch", "prodigyopt", "numpy")
        return {
            "command": shlex.join(["tuner", *sys.argv[1:]]),
            "versions": {
                "prodigy-tuner": code_version(),
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
            "device": f"{capabilities.name if capabilities.kind == 'cuda' else cpu_name()}, {capabilities.cores} cores",
            "peak_memory": PEAK_MEMORY[capabilities.kind],
            "load_average": list(self.load_average),
            "batch_size": self.config.effective_batch_size,
            "rounds": self.rounds,
            "steps": self.steps,
            "rows": [row.figures(self.rows[0]) for row in self.rows],
        }


def rotate(items: Sequence[Any], number: int, rounds: int) -> list[Any]:
    """The items, beginning elsewhere in each round, over the rounds evenly."""
    start = number * len(items) // rounds
    return [*items[start:], *items[:start]]


def run_child(command: Sequence[str], request: str) -> tuple[int, str, str]:
    """Run a process with `request` as its input; its exit code, stdout and stderr.

    However this ends, by Ctrl-C or SIGTERM too, the process and those that it started end with it.
    """
    pipe = subprocess.PIPE
    with (
        sigterm_as_interrupt(),
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as child,
    ):
        try:
            out, errors = child.communicate(request)
        finally:
            end(child)
    return child.returncode, out, errors


def end(child: subprocess.Popen[str]) -> None:
    """End a session's leader and all that it started: loader workers, compilers."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a measurement like Ctrl-C, which leaves no process behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def error_line(errors: str, code: int) -> str:
    """The line that names the exception: some explain themselves at length after it."""
    lines = [line for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\b", line)]
    return (named or lines or [f"exit code {code}, and no word"])[-1].strip()


def cpu_name() -> str:
    """As the kernel calls it; else its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.machine()
