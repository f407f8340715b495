"""Decides how many samples of a batch go through the model at once: as set, or as the device's memory allows.

Micro-batches do not change the update, so the batch size can be chosen for the loss, and the micro-batch size for the
memory. The memory estimate decides beforehand: no batch is split in response to an error in the middle of a run.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from trainer.acceleration import Capabilities
from trainer.config import TrainConfig
from trainer.errors import UserError, first_line
from trainer.memory import MemoryEstimate, NoEstimate, Probe, available_memory
from trainer.ranks import ALONE, Ranks
from trainer.units import format_bytes
from trainer.workload import Workload

log = logging.getLogger(__name__)

# Settings that the memory estimate depends on. Configurations that agree in all of them are estimated once.
SIZED_BY = {"batch_size", "micro_batch_size", "grad_accumulation", "optimizer", "slice_p", "max_grad_norm"}
SIZED_BY |= {"use_bias_correction", "fused_optimizer", "precision", "sdpa", "val_samples", "val_seed"}


@dataclass(frozen=True)
class MemoryFit:
    """Whether a run fits into a device's memory, and in which micro-batches."""

    micro_batch_size: int
    """Samples of the largest micro-batch."""
    needs: int | None
    """Bytes that the device must have; None without an estimate."""
    reason: str

    def fits(self, available: float) -> bool:
        """Whether a device with `available` bytes can train it; True without an estimate."""
        return self.needs is None or self.needs <= available


def decide_micro_batch_size(
    workload: Workload, config: TrainConfig, capabilities: Capabilities, ranks: Ranks = ALONE
) -> TrainConfig:
    """Returns the configuration with `micro_batch_size` "auto" decided for a device, and logged; any other unchanged.

    Args:
        ranks: They share a batch, each on a device of its own.

    Raises:
        UserError: The device can't hold one sample at a time.
    """
    if config.micro_batch_size != "auto":
        return config
    available = available_memory(capabilities.kind)
    one = config
    if ranks.count > 1:
        # Reduced gradients stay in memory from step to step, as they do from one accumulated batch to the next.
        accumulation = max(2, config.grad_accumulation)
        part = math.ceil(config.batch_size / ranks.count)
        one = config.model_copy(update={"batch_size": part, "grad_accumulation": accumulation})
    memory_fit = estimate_fit(workload, one, capabilities, available)
    if not memory_fit.fits(available):
        raise UserError(
            f'train.micro_batch_size "auto": one sample at a time {describe_shortage(memory_fit, available)}: use a '
            "smaller model or a larger device, or save memory (train.slice_p = 11, gradient checkpointing)."
        )
    log.info("micro-batches: %d: %s", memory_fit.micro_batch_size, memory_fit.reason)
    return config.model_copy(update={"micro_batch_size": memory_fit.micro_batch_size})


def estimate_fit(
    workload: Workload,
    config: TrainConfig,
    capabilities: Capabilities,
    available: float,
    probes: dict[tuple[str, ...], Probe] | None = None,
) -> MemoryFit:
    """Estimate a run; with `micro_batch_size` "auto", in the largest micro-batches that fit into `available` bytes.

    If not even one sample fits, the micro-batch size is 1. Without an estimate, batches are not split.

    Args:
        probes: Kept by the caller between calls: one probe serves all batch sizes of a model.
    """
    size = math.ceil(config.batch_size / config.num_micro_batches)
    try:
        probe = _probe(workload, config, capabilities, {} if probes is None else probes)
        if config.micro_batch_size != "auto":
            return MemoryFit(size, probe.estimate(config.batch_size).total, "as set")

        def estimate(size: int) -> MemoryEstimate:
            return probe.estimate(config.batch_size, micro_batch_size=size)

        return _find_largest(estimate, config.batch_size, available)
    except Exception as error:
        if probes:
            probes.clear()  # a failed one may hold half an estimate
        # Code that trains well may fail under FakeTensorMode in many ways. A defect of the code or the data appears in
        # the run itself, which comes next.
        reason = first_line(error)
        if not isinstance(error, NoEstimate | UserError):
            log.warning(
                "the memory estimate failed (%s: %s); the run continues without it", type(error).__name__, reason
            )
        return MemoryFit(size, None, f"no estimate, so batches are not split ({reason})")


def _probe(
    workload: Workload, config: TrainConfig, capabilities: Capabilities, probes: dict[tuple[str, ...], Probe]
) -> Probe:
    """The kept probe of this model, or a new one."""
    key = (
        f"{type(workload).__module__}:{type(workload).__qualname__}",
        workload.model_dump_json(),
        config.model_dump_json(include=SIZED_BY - {"batch_size"}),
        capabilities.kind,
    )
    if key not in probes:
        probes[key] = Probe.on_device(workload, config, capabilities)
    return probes[key]


def _find_largest(estimate: Callable[[int], MemoryEstimate], batch_size: int, available: float) -> MemoryFit:
    needs, limit = cache(lambda size: estimate(size).total), format_bytes(available)
    whole = format_bytes(needs(batch_size))
    if needs(batch_size) <= available:
        return MemoryFit(batch_size, needs(batch_size), f"the whole batch needs {whole} of {limit}")
    # The parts are as equal as possible; the largest decides.
    sizes = sorted({math.ceil(batch_size / parts) for parts in range(1, batch_size + 1)})
    size = sizes[max(0, bisect_right(sizes, available, key=needs) - 1)]
    part = format_bytes(needs(size))
    return MemoryFit(size, needs(size), f"a batch of {batch_size} needs {whole} of {limit}, a micro-batch {part}")


def describe_shortage(memory_fit: MemoryFit, available: float) -> str:
    """The needed and the available memory of a run that does not fit."""
    return f"needs {format_bytes(memory_fit.needs or 0)} and the device has {format_bytes(available)}"
