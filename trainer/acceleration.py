"""What the device can do, and what the run therefore does. Every choice has a reason, and the log gives it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config import TrainConfig
from trainer.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capabilities:
    """A device, described: what `plan` decides from, so that it can be tested without the device."""

    kind: str
    """"cuda" or "cpu"."""
    name: str
    bf16: bool
    """Whether bf16 matrix products run at full speed, not emulated."""
    tf32: bool
    cores: int


@dataclass(frozen=True)
class AccelerationPlan:
    device: str
    precision: str
    """"bf16": autocast with float32 weights. "fp32": no autocast."""
    tf32: bool
    cudnn_benchmark: bool
    fused_optimizer: bool
    num_workers: int
    reasons: tuple[str, ...]


def detect(device: str = "auto") -> Capabilities:
    """Describe the device of that kind.

    Raises:
        UserError: "cuda" is asked for, and there is none.
    """
    cores = len(os.sched_getaffinity(0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError('train.device "cuda": this machine shows no CUDA device; use "auto" or mend the driver.')
    if device == "cpu" or not torch.cuda.is_available():
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        bf16 = "amx_bf16" in flags or "avx512_bf16" in flags
        return Capabilities("cpu", "CPU", bf16=bf16, tf32=False, cores=cores)
    major, _ = torch.cuda.get_device_capability()
    # From Ampere (8.0) on; torch emulates bf16 on older devices, slower than float32.
    return Capabilities("cuda", torch.cuda.get_device_name(), bf16=major >= 8, tf32=major >= 8, cores=cores)


def plan(capabilities: Capabilities, config: TrainConfig) -> AccelerationPlan:
    """Decide how a run is carried out on a device. A pure function."""
    cuda = capabilities.kind == "cuda"
    reasons = [f"device: {capabilities.name}, {capabilities.cores} cores"]

    bf16 = capabilities.bf16 if config.precision == "auto" else config.precision == "bf16"
    if config.precision != "auto":
        reasons.append(f"precision: {config.precision}: as set")
    elif bf16:
        reasons.append("precision: bf16 autocast, float32 weights: the device multiplies bf16 at full speed")
    else:
        reasons.append("precision: fp32: the device has no fast bf16")

    if cuda:
        reasons.append(f"tf32: {'on' if capabilities.tf32 else 'off: needs compute capability 8.0'}")
        reasons.append("cudnn autotune: on")
    if config.num_workers is None:
        num_workers = min(8, capabilities.cores - 1) if cuda else 0
        why = "the device computes while they read" if cuda else "the cores are busy computing"
    else:
        num_workers = min(config.num_workers, capabilities.cores)
        why = "as set" if num_workers == config.num_workers else f"{config.num_workers} set, but no more cores"
    reasons.append(f"loader workers: {num_workers}: {why}")
    return AccelerationPlan(
        device=capabilities.kind,
        precision="bf16" if bf16 else "fp32",
        tf32=cuda and capabilities.tf32,
        cudnn_benchmark=cuda,
        fused_optimizer=True,
        num_workers=num_workers,
        reasons=tuple(reasons),
    )


def apply(plan: AccelerationPlan) -> None:
    """Set torch's switches for this process, and log each choice with its reason."""
    if plan.device == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if plan.tf32 else "ieee"
        torch.backends.cudnn.benchmark = plan.cudnn_benchmark
    for reason in plan.reasons:
        log.info("%s", reason)
