"""What the stages share: forked processes, and counts of attempts and failures."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import UserError


@dataclass
class Result:
    """The figures of a stage."""

    attempts: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, holds: bool, text: str) -> None:
        """Count a failure, described by `text`, where something does not hold."""
        if not holds:
            self.failures.append(text)

    def count(self, name: str, amount: int = 1) -> None:
        self.figures[name] = self.figures.get(name, 0) + amount


@dataclass(frozen=True)
class Job:
    """What a stage has to do: attempts in a folder, until a time of `time.monotonic`."""

    folder: Path
    size: int
    end: float

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.end


def fork(function: Callable[[], object], output: Path) -> int:
    """Run a function in a fork, which costs no import of torch; returns its process id. It ends with 0, with 2 after a
    UserError, and with 1 after any other one; its output goes to a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        function()
        code = 0
    except UserError as error:
        print(f"tuner: {error}", file=sys.stderr)
        code = 2
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(code)


def join(pid: int) -> int:
    """Wait for a fork; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def last_line(path: Path) -> str:
    return (path.read_text(errors="replace").strip().splitlines() or [""])[-1][:200]
