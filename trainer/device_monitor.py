"""Memory and utilisation of a GPU from NVML, or the process's own memory on a CPU.

A thread makes all calls to the driver, so training never waits for a slow or lost driver; `read` returns the values
collected so far. torch is imported on use only: processes that only display figures need their names.
"""

from __future__ import annotations

import importlib
import logging
import threading
from types import ModuleType
from typing import Any, Protocol

import psutil

log = logging.getLogger(__name__)

GPU_MEMORY, GPU_UTILIZATION = "system/gpu_memory_bytes", "system/gpu_utilization"
CPU_MEMORY = "system/memory_bytes"


class Nvml(Protocol):
    """The used part of `pynvml`."""

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> Any: ...

    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any:
        """Has `used`, in bytes."""

    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any:
        """Has `gpu`: percent of the last second or less in which a kernel ran."""


class DeviceMonitor:
    """Figures of the training device. A context manager: while open, it reads a GPU every second.

    Args:
        kind: "cuda" or "cpu".
        nvml: In place of `pynvml`, for tests.
        uuid: NVML's name of the GPU. Default: torch's current device.
        every: Seconds between two readings.
    """

    def __init__(self, kind: str, *, nvml: Nvml | None = None, uuid: str = "", every: float = 1.0) -> None:
        self.kind = kind
        self._nvml, self._uuid, self._every = nvml, uuid, every
        self._process = psutil.Process()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._memory: int | None = None
        self._busy: list[float] = []
        # A daemon: a driver that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)

    def __enter__(self) -> DeviceMonitor:
        if self.kind == "cuda":
            import torch

            # By its UUID: torch numbers the visible devices only, NVML all of them.
            self._uuid = self._uuid or f"GPU-{torch.cuda.get_device_properties().uuid}"
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def read(self) -> dict[str, float]:
        """Current memory, and mean utilisation (0 to 1) since the last call. Unknown values are left out."""
        if self.kind != "cuda":
            return {CPU_MEMORY: float(self._process.memory_info().rss)}
        with self._lock:
            memory, busy = self._memory, self._busy
            self._busy = []
        if memory is None:
            import torch

            memory = torch.cuda.memory_reserved()
        values = {GPU_MEMORY: float(memory)}
        if busy:
            values[GPU_UTILIZATION] = sum(busy) / len(busy)
        return values

    def _watch(self) -> None:
        try:
            nvml: Nvml | ModuleType = self._nvml or importlib.import_module("pynvml")
        except ImportError:
            log.info("GPU utilisation is not shown: nvidia-ml-py is not installed")
            return
        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
            while not self._closed.wait(self._every):
                memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                with self._lock:
                    self._memory = memory
                    self._busy.append(busy)
            nvml.nvmlShutdown()
        # No failure of a driver (it was updated, the GPU was lost from the bus) may end a run of days, and no defect
        # of this code either.
        except Exception as error:
            with self._lock:
                self._memory = None
            log.warning("NVML is lost (%s: %s); GPU utilisation is not shown", type(error).__name__, error)
