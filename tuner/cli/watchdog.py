"""Ends this process if it hangs when it should stop."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

GRACE_S = 600.0
"""Seconds to stop after a signal or the end of the time given: a step, a validation and a checkpoint of gigabytes."""
AT_ONCE_S = 30.0
"""Seconds to end after a second signal; a launch with workers ends them in these."""

_sockets: list[socket.socket] = []


def _leave() -> None:
    """In a forked process: its signals are its own, and it must not keep the socket open."""
    if _sockets:
        signal.set_wakeup_fd(-1)
    while _sockets:
        _sockets.pop().close()


os.register_at_fork(after_in_child=_leave)


@contextmanager
def end_if_hung(signals: Sequence[int], *, exit_code: int, timeout: float | None = None) -> Iterator[None]:
    """End the process if it is still in the block some time after one of the signals, or after `timeout` seconds.

    Python's signal handlers wait for the main thread, which a call of CUDA or of a dead file system may never give
    back. The signal reaches a socket at once, and a thread that reads it ends the process. Checkpoints and the study
    are as after a kill: the same command continues.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    _sockets.extend((ours, theirs))
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    deadline = math.inf if timeout is None else time.monotonic() + timeout + GRACE_S
    threading.Thread(target=_watch, args=(ours, signals, exit_code, deadline), name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for each in (ours, theirs):
            # A process that was forked has emptied its list.
            with suppress(ValueError):
                _sockets.remove(each)
        theirs.close()


def _watch(ours: socket.socket, signals: Sequence[int], exit_code: int, deadline: float) -> None:
    """Return when the other end is closed."""
    num_signals = 0
    while True:
        ours.settimeout(None if math.isinf(deadline) else max(0.001, deadline - time.monotonic()))
        try:
            numbers = ours.recv(64)
        except TimeoutError:
            break
        if not numbers:
            ours.close()
            return
        for _ in filter(signals.__contains__, numbers):
            num_signals += 1
            deadline = min(deadline, time.monotonic() + (GRACE_S if num_signals == 1 else AT_ONCE_S))
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2,
        b"tuner: it hangs and was ended. The same command continues.\n",
    )
    os._exit(exit_code)
