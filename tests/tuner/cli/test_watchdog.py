"""A process whose main thread hangs in a call that no signal interrupts is ended all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HANGING = """
import ctypes, sys, time
from tuner.cli import watchdog
from tuner.cli.terminal import stop_on_signals

watchdog.GRACE_S, watchdog.AT_ONCE_S, timeout = float(sys.argv[1]), 0.2, float(sys.argv[2]) or None
mutex = ctypes.create_string_buffer(64)
with stop_on_signals(print, timeout) as stop:
    print("hangs", flush=True)
    if len(sys.argv) > 3:
        time.sleep(float(sys.argv[3]))
    else:
        # No signal interrupts the second one, and it gives Python's lock back, as calls of CUDA do.
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
print("left")
"""


def start(*arguments: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HANGING, *map(str, arguments)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "hangs\n"
    return process


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
def test_signal_ends_what_hangs(signals: list[int]) -> None:
    process = start(0.2 if len(signals) == 1 else 600, 0)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)  # two at once may arrive as one
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "tuner: it hangs and was ended. The same command continues.\n"


def test_end_of_the_time_given_ends_what_hangs() -> None:
    process = start(0.2, 0.2)
    assert process.communicate(timeout=120)[1].startswith("tuner: it hangs") and process.returncode == 130


def test_process_that_leaves_in_time_is_not_ended() -> None:
    process = start(0.5, 0, 0.1)
    assert process.communicate(timeout=120) == ("left\n", "") and process.returncode == 0


FORKING = """
import os, time
from tuner.cli import watchdog
from tuner.cli.terminal import stop_on_signals

watchdog.GRACE_S, watchdog.AT_ONCE_S = 600, 0.2
with stop_on_signals(lambda text: None) as stop:
    child = os.fork()
    if not child:
        time.sleep(30)
    print("forked", flush=True)
    while not stop():
        time.sleep(0.05)
    time.sleep(1)
    print("left", flush=True)
os.kill(child, 9)
"""


def test_signals_of_a_forked_process_are_not_counted() -> None:
    """A terminal's Ctrl-C reaches forked processes too, which have inherited the handlers."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == "forked\n"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120)[0] == "left\n" and process.returncode == 0
