"""The device that a run would take: what it is, and what it has free."""

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
"""A folder for each GPU that the driver of this machine knows."""


@dataclass(frozen=True)
class Machine:
    """The device that runs are judged for. It need not be this machine's."""

    capabilities: Capabilities
    memory: int
    """Bytes that a run may take."""

    @property
    def limit(self) -> int:
        """Bytes beyond which a trial ends as infeasible. On a CPU all of them: what other programs hold they may
        give back."""
        return self.capabilities.memory if self.capabilities.kind == "cpu" else self.memory


def this_machine(device: str = "auto") -> Machine:
    capabilities = detect(device)
    return Machine(capabilities, available_memory(capabilities.kind))


def cuda_machine(memory: float) -> Machine:
    """A card that is not here, of a generation that has bf16."""
    name = "a CUDA device that is not here"
    cores = len(os.sched_getaffinity(0))
    return Machine(Capabilities("cuda", name, cores, int(memory), compute_capability=(8, 0)), int(memory))


def check_device(machine: Machine, gpus: list[str] | None = None, limit: int | None = None) -> Check:
    """What runs compute on.

    Args:
        gpus: Names of the GPUs that the driver knows. Default: those of this machine.
        limit: Bytes that this process's control group may take. Default: this process's.
    """
    device = machine.capabilities
    bf16 = "bf16" if device.bf16 else "no fast bf16"
    if device.kind == "cuda":
        major, minor = device.compute_capability
        message = f"{device.name}, compute capability {major}.{minor}, {format_bytes(machine.memory)} to be had, {bf16}"
        if not device.bf16:
            return Check("device", "warn", message, "runs take float32, at half the speed and twice the memory")
        return Check("device", "ok", message)
    limit = memory_limit() if limit is None else limit
    is_limited = limit and limit < psutil.virtual_memory().total
    limited = f" (its control group has {format_bytes(limit or 0)})" if is_limited else ""
    message = f"{device.name}, {device.cores} cores, {format_bytes(machine.memory)} to be had{limited}, {bf16}"
    gpus = known_gpus() if gpus is None else gpus
    if gpus:
        return unused_gpu(gpus)
    remedy = "for more than a demo use a machine with a CUDA device and torch's CUDA build"
    return Check("device", "warn", f"no CUDA device, so {message}", remedy)


def known_gpus(driver: Path = DRIVER) -> list[str]:
    """Names of the GPUs that NVIDIA's driver knows, whether torch can use them or not; without asking the driver."""
    names = []
    for information in sorted(driver.glob("*/information")):
        fields = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        names.append(fields.get("Model", "a GPU").strip())
    return names


def unused_gpu(gpus: list[str], environment: dict[str, str] | None = None) -> Check:
    """There is a GPU, and torch does not see it."""
    import torch

    environment = dict(os.environ) if environment is None else environment
    here = f"{gpus[0]} is here, and torch {torch.__version__} does not see it, so runs take the CPU"
    if torch.version.cuda is None:
        return Check("device", "warn", f"{here}: this torch was built without CUDA", "install torch's CUDA build")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Check("device", "warn", f'{here}: CUDA_VISIBLE_DEVICES is "{visible}"', "correct or unset it")
    remedy = f"update NVIDIA's driver: it must know CUDA {torch.version.cuda}"
    return Check("device", "warn", f"{here}: its driver may be older than this torch's CUDA", remedy)
