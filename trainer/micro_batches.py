"""How many samples of a batch go through the model at once: as set, or what the device's memory holds.

A batch that is cut into micro-batches gives the same update, so its size may be chosen for what it does to the loss
and the micro-batches' for what the device holds. The memory estimate decides beforehand: nothing is cut in answer to
an error in the middle of a run.
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
from trainer.units import format_bytes
from trainer.workload import Workload

log = logging.getLogger(__name__)

# What the memory estimate reads of a configuration. Those that differ in nothing of it are judged once.
SIZED_BY = {"batch_size", "micro_batch_size", "grad_accumulation", "optimizer", "slice_p", "max_grad_norm"}
SIZED_BY |= {"use_bias_correction", "fused_optimizer", "precision", "sdpa", "val_samples", "val_seed"}


@dataclass(frozen=True)
class Fit:
    """How a run would go into a device's memory."""

    micro_batch_size: int
    """Samples of the largest micro-batch."""
    needs: int | None
    """Bytes that the device must have; None where there is no estimate."""
    reason: str

    def fits(self, available: float) -> bool:
        """Whether a device with so many bytes can train it, as far as is known."""
        return self.needs is None or self.needs <= available


def split(workload: Workload, config: TrainConfig, capabilities: Capabilities) -> TrainConfig:
    """The configuration with `micro_batch_size` "auto" decided for a device, and logged; any other as it is.

    Raises:
        UserError: The device can't hold one sample at a time.
    """
    if config.micro_batch_size != "auto":
        return config
    available = available_memory(capabilities.kind)
    found = fit(workload, config, capabilities, available)
    if not found.fits(available):
        raise UserError(
            f'train.micro_batch_size "auto": one sample at a time {shortage(found, available)}: use a smaller model, '
            "a larger device, or what else saves memory (train.slice_p = 11, gradient checkpointing)."
        )
    log.info("micro-batches: %d: %s", found.micro_batch_size, found.reason)
    return config.model_copy(update={"micro_batch_size": found.micro_batch_size})


def fit(
    workload: Workload,
    config: TrainConfig,
    capabilities: Capabilities,
    available: float,
    probes: dict[tuple[str, ...], Probe] | None = None,
) -> Fit:
    """What a run needs; with `micro_batch_size` "auto", cut into the fewest parts that fit into `available` bytes.

    Where not even one sample at a time fits, the result is that of one. A run that can't be estimated is not cut.

    Args:
        probes: Kept by the caller from call to call: one probe serves all batch sizes of a model.
    """
    size = math.ceil(config.batch_size / config.num_micro_batches)
    try:
        probe = _probe(workload, config, capabilities, {} if probes is None else probes)
        if config.micro_batch_size != "auto":
            return Fit(size, probe.estimate(config.batch_size).total, "as set")

        def estimate(size: int) -> MemoryEstimate:
            return probe.estimate(config.batch_size, micro_batch_size=size)

        return _largest(estimate, config.batch_size, available)
    except Exception as error:
        if probes:
            probes.clear()  # one that stumbled may hold half an estimate
        # Code that trains may stumble in many ways over tensors without contents. A defect, of it or of the data,
        # shows in the run itself, which comes next.
        reason = first_line(error)
        if not isinstance(error, NoEstimate | UserError):
            log.warning("the memory estimate failed (%s: %s); the run goes on without it", type(error).__name__, reason)
        return Fit(size, None, f"no estimate, so batches are not cut ({reason})")


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


def _largest(estimate: Callable[[int], MemoryEstimate], batch_size: int, available: float) -> Fit:
    needs, there = cache(lambda size: estimate(size).total), format_bytes(available)
    whole = format_bytes(needs(batch_size))
    if needs(batch_size) <= available:
        return Fit(batch_size, needs(batch_size), f"the whole batch needs {whole} of {there}")
    # In parts as equal as can be: it is the largest that decides.
    sizes = sorted({math.ceil(batch_size / parts) for parts in range(1, batch_size + 1)})
    size = sizes[max(0, bisect_right(sizes, available, key=needs) - 1)]
    part = format_bytes(needs(size))
    return Fit(size, needs(size), f"a batch of {batch_size} needs {whole} of {there}, cut like this {part}")


def shortage(found: Fit, available: float) -> str:
    """What a run that does not fit needs, and what there is."""
    return f"needs {format_bytes(found.needs or 0)} and the device has {format_bytes(available)}"
