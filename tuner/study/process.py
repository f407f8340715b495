"""Runs a command of the user in a shell, with a time limit for it and all processes that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

POLL_S = 0.05
OF_TORCHRUN = re.compile(r"TORCHELASTIC_.+|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)")
"""Variables of a process that torchrun has started. A command that had them would join its run, or wait for it."""


def run_in_shell(
    command: str,
    *,
    timeout: float,
    grace: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> int | None:
    """Run a command in a process group of its own, at a low CPU priority; returns its exit code.

    Args:
        timeout: Seconds.
        grace: Seconds that the group has to end, after the shell has ended or after SIGTERM; then it gets SIGKILL.
        env: Variables besides this process's. Python is the one that runs this.
        output: Takes stdout and stderr; None discards them.
        stop: Polled; True ends it.

    Returns None if it was ended, by `timeout` or by `stop`.
    """
    own = dict(os.environ)
    if "TORCHELASTIC_RUN_ID" in own:
        own = {name: value for name, value in own.items() if not OF_TORCHRUN.fullmatch(name)}
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=cwd,
        env={**own, "PATH": path, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=output or subprocess.DEVNULL,
        stderr=subprocess.STDOUT if output else subprocess.DEVNULL,
        # A terminal's Ctrl-C reaches the run alone, which ends the command.
        start_new_session=True,
    )
    with suppress(OSError):
        os.setpriority(os.PRIO_PGRP, process.pid, 10)
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None:
            if stop() or time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)
        return process.returncode
    finally:
        _end_group(process, grace)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End the shell, if it runs, and all children that it has left."""
    deadline = time.monotonic() + grace
    # None is left, or those of another user alone, as of sudo.
    with suppress(ProcessLookupError, PermissionError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            # The shell may be gone before its children; the group exists as long as one of them.
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
