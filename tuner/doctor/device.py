"""The device of a run, and its free memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from trainer.acceleration import Capabilities, detect
from trainer.cgroup import memory_limit
from trainer.memory import available_memory
from trainer.units import format_bytes
from tuner.doctor.check import Check

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Folder with an entry for each GPU that the driver knows."""


@dataclass(frozen=True)
class Machine:
    """The device that the checks assume. It may be one of another machine."""

    capabilities: Capabilities
    memory: int
    """Bytes available to a run."""

    @property
    def limit(self) -> int:
        """Bytes beyond which a trial is infeasible. On a CPU all of the memory: other programs may free theirs."""
        return self.capabilities.memory if self.capabilities.kind == "cpu" else self.memory


def detect_machine(device: str = "auto") -> Machine:
    capabilities = detect(device)
    return Machine(capabilities, available_memory(capabilities.kind))


def build_cuda_machine(memory: float) -> Machine:
    """A card of another machine, with bf16."""
    name = "a CUDA device of another machine"
    cores = len(os.sched_getaffinity(0))
    return Machine(Capabilities("cuda", name, cores, int(memory), compute_capability=(8, 0)), int(memory))


def check_device(machine: Machine, gpus: list[str] | None = None, limit: int | None = None) -> Check:
    """The device of runs.

    Args:
        gpus: Names of the GPUs that the driver knows. Default: this machine's.
        limit: Bytes that the control group allows. Default: this process's.
    """
    device = machine.capabilities
    bf16 = "bf16" if device.bf16 else "no fast bf16"
    if device.kind == "cuda":
        major, minor = device.compute_capability
        message = f"{device.name}, compute capability {major}.{minor}, {format_bytes(machine.memory)} available, {bf16}"
        if not device.bf16:
            return Check("device", "warn", message, "runs use float32, at half the speed and with twice the memory")
        return Check("device", "ok", message)
    limit = memory_limit() if limit is None else limit
    is_limited = limit and limit < psutil.virtual_memory().total
    limited = f" (its control group allows {format_bytes(limit or 0)})" if is_limited else ""
    message = f"{device.name}, {device.cores} cores, {format_bytes(machine.memory)} available{limited}, {bf16}"
    gpus = list_known_gpus() if gpus is None else gpus
    if gpus:
        return explain_unused_gpu(gpus)
    remedy = "for more than a demo, use a machine with a CUDA device and torch's CUDA build"
    return Check("device", "warn", f"no CUDA device, so {message}", remedy)


def list_known_gpus(driver: Path = DRIVER) -> list[str]:
    """Names of the GPUs that NVIDIA's driver knows, from its files. torch may not be able to use them."""
    names = []
    for information in sorted(driver.glob("*/information")):
        fields = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        names.append(fields.get("Model", "a GPU").strip())
    return names


def explain_unused_gpu(gpus: list[str], environment: dict[str, str] | None = None) -> Check:
    """Why torch does not see the GPU."""
    import torch

    environment = dict(os.environ) if environment is None else environment
    problem = f"torch {torch.__version__} does not see {gpus[0]}, so runs use the CPU"
    if torch.version.cuda is None:
        return Check("device", "warn", f"{problem}: this torch was built without CUDA", "install torch's CUDA build")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Check("device", "warn", f'{problem}: CUDA_VISIBLE_DEVICES is "{visible}"', "correct or unset it")
    remedy = f"update NVIDIA's driver: it must support CUDA {torch.version.cuda}"
    return Check("device", "warn", f"{problem}: its driver may be older than this torch's CUDA", remedy)
