"""What holds the GPUs' memory at this moment. Asks NVIDIA's driver, not torch: that would take a CUDA context.

`pynvml` answers in milliseconds where it is installed (the package nvidia-ml-py); else `nvidia-smi` is run.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from trainer.memory import CUDA_CONTEXT
from tuner.doctor.check import Check, size
from tuner.doctor.device import known_gpus

MIB = 1 << 20
TIMEOUT_S = 10.0
"""nvidia-smi takes a second or more where the driver is not kept loaded."""
GPU_FIELDS = "index,uuid,name,memory.total,memory.free"
PROCESS_FIELDS = "gpu_uuid,pid,process_name,used_memory"
HELD = 0.1
"""Share of a GPU's memory that a desktop may hold before anybody need be told."""


@dataclass(frozen=True)
class GpuProcess:
    pid: int
    name: str
    memory: int | None
    """Bytes; None where the driver does not say, as in containers."""


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    total: int
    free: int
    """Bytes."""
    processes: tuple[GpuProcess, ...] = ()
    """Those that compute on it, as far as they are seen from here."""


def check_gpus(gpus: Sequence[Gpu] | None = None, environment: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Free memory and other processes, one check for each GPU that this process may use."""
    if gpus is None:
        gpus = read_gpus()
    for gpu in visible(gpus, os.environ if environment is None else environment):
        yield _check(gpu)


def _check(gpu: Gpu) -> Check:
    name, others = f"gpu {gpu.index}", [p for p in gpu.processes if p.pid not in _own_processes()]
    message = f"{gpu.name}: {size(gpu.free)} of {size(gpu.total)} free"
    if others:
        message += f"; on it: {', '.join(map(_describe, others))}"
    remedy = "stop what holds it, or choose another GPU with CUDA_VISIBLE_DEVICES"
    if gpu.free < CUDA_CONTEXT:
        return Check(name, "fail", f"{message}: less than a CUDA process takes", remedy)
    if others:
        return Check(name, "warn", f"{message}: trials will take turns with it and have less memory", remedy)
    if gpu.free < (1 - HELD) * gpu.total:
        return Check(name, "warn", f"{message}: the rest is held by what is not seen from here", remedy)
    return Check(name, "ok", message)


def _describe(process: GpuProcess) -> str:
    memory = "" if process.memory is None else f", {size(process.memory)}"
    return f"{process.name} (pid {process.pid}{memory})"


def _own_processes() -> set[int]:
    """This process and those that started it: none of them is in its own way."""
    return {os.getpid(), *(process.pid for process in psutil.Process().parents())}


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; parts of GPUs (MIG) are left out.

    Indices are taken in the driver's order, which CUDA's own is too unless a machine mixes GPUs of several speeds.
    """
    value = environment.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return list(gpus)
    found: list[Gpu] = []
    for name in value.split(","):
        name = name.strip()
        named = [g for g in gpus if str(g.index) == name or (name.startswith("GPU-") and g.uuid.startswith(name))]
        if not named:
            break  # CUDA stops at the first one that is not there
        found += named[:1]
    return found


def read_gpus() -> list[Gpu]:
    """This machine's GPUs; none where no NVIDIA driver is loaded, or it does not answer."""
    if not known_gpus():
        return []
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return _from_nvidia_smi()
    try:
        return from_nvml(nvml)
    except nvml.NVMLError:
        return []


def from_nvml(nvml: Any) -> list[Gpu]:
    """Ask the driver through `pynvml`, or what has its functions."""
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
    except psutil.Error:  # of another container, or gone
        return "a process"


def _from_nvidia_smi() -> list[Gpu]:
    try:
        answers = [_ask(f"--query-gpu={GPU_FIELDS}"), _ask(f"--query-compute-apps={PROCESS_FIELDS}")]
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia_smi(*answers)


def _ask(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout


def parse_nvidia_smi(gpus: str, processes: str) -> list[Gpu]:
    """From nvidia-smi's answers to GPU_FIELDS and PROCESS_FIELDS, CSV without header and units.

    A GPU whose memory it does not give ("[N/A]") is left out.
    """
    on: dict[str, list[GpuProcess]] = {}
    for row in _rows(processes, 4):
        uuid, pid, name, memory = row
        if pid.isdigit():
            on.setdefault(uuid, []).append(GpuProcess(int(pid), os.path.basename(name), _mebibytes(memory)))
    found = []
    for index, uuid, name, total, free in _rows(gpus, 5):
        of, left = _mebibytes(total), _mebibytes(free)
        if index.isdigit() and of is not None and left is not None:
            found.append(Gpu(int(index), uuid, name, of, left, tuple(on.get(uuid, ()))))
    return found


def _rows(text: str, count: int) -> Iterator[list[str]]:
    """Rows of `count` entries; another line is a word to the user ("No running processes found")."""
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) == count:
            yield [entry.strip() for entry in row]


def _mebibytes(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None
