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
        self._before = peak_memory(device)

    def read(self) -> int | None:
        """Bytes at the peak so far, or None if the system does not report it."""
        peak = peak_memory(self.device)
        if self.device == "cuda":
            return peak
        # A mark that could not be reset and did not rise is that of an earlier time.
        return peak if self._reset or peak != self._before else None


def _reset_high_water() -> bool:
    try:
        (SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: str) -> int | None:
    """The same since the process began or was last reset; its whole memory where the device is the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = (SELF / "status").read_text()
    except OSError:
        return None
    # Not ru_maxrss: a new process takes over its parent's.
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)
