"""Processes that use the GPUs' memory. Asks NVIDIA's driver: torch would create a CUDA context."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from trainer.memory import CUDA_CONTEXT
from trainer.units import format_bytes
from tuner.doctor.check import Check
from tuner.doctor.device import list_known_gpus

MAX_HELD_SHARE = 0.1
"""Share of a GPU's memory that a desktop may use without a warning."""


@dataclass(frozen=True)
class GpuProcess:
    pid: int
    name: str
    memory: int | None
    """Bytes; None where the driver does not report them, as in containers."""


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    total: int
    free: int
    """Bytes."""
    processes: tuple[GpuProcess, ...] = ()
    """Processes that compute on it and are visible from here."""


def check_gpus(gpus: Sequence[Gpu] | None = None, environment: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Free memory and other processes: one check for each GPU that this process may use."""
    if gpus is None:
        gpus = read_gpus()
    for gpu in select_visible(gpus, os.environ if environment is None else environment):
        yield _check(gpu)


def _check(gpu: Gpu) -> Check:
    name, others = f"gpu {gpu.index}", [p for p in gpu.processes if p.pid not in _own_processes()]
    message = f"{gpu.name}: {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
    if others:
        message += f"; used by {', '.join(map(_describe, others))}"
    remedy = "stop the process, or choose another GPU with CUDA_VISIBLE_DEVICES"
    if gpu.free < CUDA_CONTEXT:
        return Check(name, "fail", f"{message}: less than a CUDA process needs", remedy)
    if others:
        return Check(name, "warn", f"{message}: trials share the GPU with it and have less memory", remedy)
    if gpu.free < (1 - MAX_HELD_SHARE) * gpu.total:
        return Check(name, "warn", f"{message}: the rest is used by processes that are not visible from here", remedy)
    return Check(name, "ok", message)


def _describe(process: GpuProcess) -> str:
    memory = "" if process.memory is None else f", {format_bytes(process.memory)}"
    return f"{process.name} (pid {process.pid}{memory})"


def _own_processes() -> set[int]:
    """This process and its parents."""
    return {os.getpid(), *(process.pid for process in psutil.Process().parents())}


def select_visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs of CUDA_VISIBLE_DEVICES, in its order, without parts of GPUs (MIG).

    Indices follow the driver's order. CUDA's differs only where a machine mixes GPUs of several speeds.
    """
    value = environment.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return list(gpus)
    selected: list[Gpu] = []
    for name in value.split(","):
        name = name.strip()
        matches = [g for g in gpus if str(g.index) == name or (name.startswith("GPU-") and g.uuid.startswith(name))]
        if not matches:
            break  # as CUDA: the first unknown name ends the list
        selected += matches[:1]
    return selected


def read_gpus() -> list[Gpu]:
    """This machine's GPUs; none without an NVIDIA driver that answers."""
    if not list_known_gpus():
        return []
    nvml = importlib.import_module("pynvml")
    try:
        return read_nvml(nvml)
    except nvml.NVMLError:
        return []


def read_nvml(nvml: Any) -> list[Gpu]:
    """Ask the driver through `pynvml`."""
    nvml.nvmlInit()
    try:
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            processes = tuple(GpuProcess(p.pid, _name(p.pid), p.usedGpuMemory) for p in running)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
            gpus.append(Gpu(index, uuid, name, memory.total, memory.free, processes))
        return gpus
    finally:
        nvml.nvmlShutdown()


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # of another container, or exited
        return "a process"
