"""`tuner bench`: measures the speed-up of each optimization on this machine.

Rows are the baseline, each optimization alone, all of them one after the other, and the trainer. Each row of each round
runs in its own process, so its peak memory is its own. Each round begins with another row, and speed-ups are ratios
inside a round: a busy machine slows all rows equally.
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
    "cuda": "the most that torch allocated on the device",
    "cpu": "the whole process at its peak, with Python and the compiler, without loader workers",
}
GRACE_SECONDS = 5.0


@dataclass
class Row:
    """One line of the table, with its measurements."""

    name: str
    group: Group
    optimizations: tuple[str, ...] | None
    """Optimizations of the baseline; None for the trainer."""
    note: str = ""
    """Why there is no number, or a remark on it."""
    measurements: dict[int, dict[str, Any]] = field(default_factory=dict)
    """`tuner.bench.measurement.Measurement` as plain values, by round."""
    left_out: bool = False
    """Not measured, or no longer; the note has the reason."""
    failed: bool = False

    def rate(self, number: int) -> float:
        """Real tokens per second in a round."""
        return float(self.measurements[number]["tokens"] / self.measurements[number]["seconds"])

    def median(self, value: Callable[[dict[str, Any]], float]) -> float | None:
        return statistics.median(map(value, self.measurements.values())) if self.measurements else None

    def ratios(self, baseline: Row) -> list[float]:
        """Speed-up against the baseline in each round that has both."""
        return [
            self.rate(n) / baseline.rate(n) for n in sorted(self.measurements.keys() & baseline.measurements.keys())
        ]

    def figures(self, baseline: Row) -> dict[str, Any]:
        """The row for `--json`: medians over the rounds, and `spread`, their minimum and maximum."""
        ratios, rates = self.ratios(baseline), [self.rate(number) for number in sorted(self.measurements)]
        return {
            "name": self.name,
            "group": self.group,
            "speedup": statistics.median(ratios) if ratios else None,
            "tokens_per_second": statistics.median(rates) if rates else None,
            "step_seconds": self.median(lambda m: m["seconds"] / m["steps"]),
            "peak_memory_bytes": max((m["peak_memory_bytes"] for m in self.measurements.values()), default=None),
            "real_token_share": self.median(lambda m: m["real_token_share"]),
            "first_loss": self.median(lambda m: m["loss"]),
            "spread": {
                "speedup": [min(ratios), max(ratios)] if ratios else None,
                "tokens_per_second": [min(rates), max(rates)] if rates else None,
            },
            "note": self.note,
        }


def build_rows(capabilities: Capabilities, workload: Workload) -> list[Row]:
    """All rows in order. Optimizations without an effect here are left out, also from the cumulative sets."""
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
    """The baseline, and the rows or groups of `--only`."""
    names = {row.name for row in rows} | {row.group for row in rows}
    wanted = {name if name in names else name.replace("-", " ") for name in only}
    for name in sorted(wanted - names):
        raise UserError(f"--only: {describe_unknown_key(name, sorted(names)).replace('key', 'row', 1)}")
    return [row for row in rows if not wanted or row.group == "baseline" or {row.name, row.group} & wanted]


class Bench:
    """The measurement of one spec.

    Args:
        report: Called with each line of progress.
    """

    def __init__(
        self,
        spec: StudySpec,
        *,
        rounds: int,
        steps: int,
        only: Sequence[str] = (),
        report: Callable[[str], Any] = lambda line: None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.spec, self.rounds, self.steps = spec, rounds, steps
        self.report, self.command = report, tuple(command or CHILD)
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
            UserError: The first process, that of the baseline, raised it.
        """
        # The first cumulative row is equal to the one of that optimization alone: measured once.
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
            self.report(f"[{done + 1}/{len(jobs)}] round {number + 1}, {name}: {outcome}{left}")
            if rows[0].group == "baseline" and rows[0].failed:
                return

    def _measure(self, optimizations: tuple[str, ...] | None, number: int, rows: Sequence[Row]) -> str:
        """Measure one set in one round, for all rows with this set; returns the result as text."""
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
                row.measurements[number] = answer["measurement"]
                row.note = row.note or answer["measurement"]["note"]
            else:
                # The kernel sends SIGKILL to a process that takes too much memory.
                row.failed = "out_of_memory" not in answer and code != -signal.SIGKILL
                reason = answer.get("user_error") or error_line(errors, code)
                row.note = f"failed: {reason}" if row.failed else OUT_OF_MEMORY
                row.left_out = True
        return f"{rows[0].rate(number):,.0f} tokens/s" if "measurement" in answer else rows[0].note

    def _left(self, sets: Sequence[tuple[str, ...] | None]) -> str:
        """The estimated time left: each row takes as long as in the round before, a new row as long as the average."""
        if not sets:
            return ""
        average = statistics.mean(self._spent.values())
        return f", about {clock(sum(self._spent.get(each, average) for each in sets))} left"

    def result(self) -> dict[str, Any]:
        """The output of `tuner bench --json`."""
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
    """The items from another start in each round."""
    start = number * len(items) // rounds
    return [*items[start:], *items[:start]]


def run_child(command: Sequence[str], request: str) -> tuple[int, str, str]:
    """Run a process with `request` on stdin; returns exit code, stdout and stderr.

    Always ends the process and its children, also after Ctrl-C or SIGTERM.
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
    """End a process group: the process, its loader workers and compilers."""
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
    """SIGTERM raises KeyboardInterrupt, so it leaves no process behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def error_line(errors: str, code: int) -> str:
    """The line that names the exception: long explanations may follow it."""
    lines = [line for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\b", line)]
    return (named or lines or [f"exit code {code}, without a message"])[-1].strip()


def cpu_name() -> str:
    """The kernel's name of the CPU, else its architecture."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match.group(1) if match else platform.machine()
