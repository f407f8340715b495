"""The most memory that a stretch of a process took, on the device that trains."""

from __future__ import annotations

from pathlib import Path

import torch

SELF = Path("/proc/self")


class PeakMemory:
    """Measures from its making on.

    On CUDA it is the bytes of the tensors; without it, what the whole process held in the machine's memory.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self._reset = _reset_high_water()
        self._before = _high_water()

    def read(self) -> int | None:
        """Bytes at the peak so far, or None where the system does not say."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = _high_water()
        # A mark that could not be reset and did not rise is that of an earlier time.
        return peak if self._reset or peak != self._before else None


def _reset_high_water() -> bool:
    try:
        (SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    """Bytes that the process held at most, since the last reset where there was one."""
    try:
        status = (SELF / "status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)
