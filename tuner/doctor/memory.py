"""Whether the batch sizes of a spec fit into the device's memory, and checkpoint snapshots into the host's."""

from __future__ import annotations

import json
from collections.abc import Iterator

from trainer.errors import UserError
from trainer.memory import MemoryEstimate, Probe, available_memory
from trainer.micro_batches import describe_shortage, estimate_fit
from trainer.units import format_bytes
from tuner.doctor.check import Check, State
from tuner.doctor.device import Machine
from tuner.spec.study_toml import StudySpec


def check_memory(spec: StudySpec, probe: Probe, baseline: MemoryEstimate, machine: Machine) -> Iterator[Check]:
    """The batch size of [train], then the others of the search space, judged as in a launch."""
    if probe.config.micro_batch_size == "auto":
        probes: dict[tuple[str, ...], Probe] = {}
        for batch_size in [baseline.batch_size, *_searched_batch_sizes(spec, baseline)]:
            yield check_micro_batches(probe, batch_size, machine, probes)
        return
    fits = baseline.fits(machine.limit)
    largest = None if fits else probe.largest_batch_size(machine.limit)
    yield _check(probe, baseline, machine, "fail", "" if largest is None else _remedy(probe, largest))
    for batch_size in _searched_batch_sizes(spec, baseline):
        try:
            estimate = probe.estimate(batch_size)
        except UserError as error:
            yield Check(f"memory, batch {batch_size}", "fail", str(error), "search smaller ones")
            continue
        if largest is None and not estimate.fits(machine.limit):
            largest = probe.largest_batch_size(machine.limit)
        remedy = (
            f"its trials would be infeasible: leave it out of [search], the largest that fits is {largest}; or "
            f"split it: {_split(probe)}"
        )
        yield _check(probe, estimate, machine, "warn", remedy)


def check_micro_batches(
    probe: Probe, batch_size: int, machine: Machine, probes: dict[tuple[str, ...], Probe] | None = None
) -> Check:
    """The micro-batch size that a launch would decide, for `train.micro_batch_size = "auto"`.

    Args:
        probes: See `trainer.micro_batches`.
    """
    config = probe.config.model_copy(update={"batch_size": batch_size})
    memory_fit = estimate_fit(probe.workload, config, machine.capabilities, machine.memory, probes)
    name = f"memory, batch {batch_size}"
    if memory_fit.needs is None:
        return Check(name, "warn", memory_fit.reason, "watch the first steps of a run with this batch size")
    message = f"micro-batches of {memory_fit.micro_batch_size}: {memory_fit.reason}"
    if memory_fit.fits(machine.memory):
        return Check(name, "ok", message)
    message = f"one sample at a time {describe_shortage(memory_fit, machine.memory)}"
    if memory_fit.fits(machine.limit):
        return _warn_crowded(name, message)
    return Check(name, "fail", message, _remedy(probe, 0))


def _check(probe: Probe, estimate: MemoryEstimate, machine: Machine, unfit: State, remedy: str) -> Check:
    parts = {
        "parameters": estimate.parameters,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer_state,
        "activations": estimate.activations,
    }
    shown = ", ".join(f"{name} {format_bytes(value)}" for name, value in parts.items())
    peaks = {
        "training": estimate.training_peak,
        "the optimizer's step": estimate.step_peak,
        "validation": estimate.evaluation_peak,
    }
    message = (
        f"{format_bytes(estimate.total)} of {format_bytes(machine.memory)} in {probe.precision} on the longest samples "
        f"({shown}; the peak is in {max(peaks, key=lambda name: peaks[name])})"
    )
    name = f"memory, batch {estimate.batch_size}"
    if estimate.fits(machine.memory):
        return Check(name, "ok", message)
    if estimate.fits(machine.limit):
        return _warn_crowded(name, message)
    return Check(name, unfit, message, remedy)


def _warn_crowded(name: str, message: str) -> Check:
    """It fits into a CPU's memory, but not into the free part; a launch starts it anyway."""
    return Check(name, "warn", f"{message}: other programs hold the rest", "close some of them before a launch")


def _remedy(probe: Probe, largest: int) -> str:
    """The remedy where [train] does not fit."""
    savers = [f"workload.{assignment}" for assignment in probe.workload.memory_savers()]
    if probe.config.optimizer == "prodigy" and probe.config.slice_p == 1:
        savers.append("train.slice_p = 11")
    if largest == 0:
        return f"no batch size fits: use {', '.join(savers)}{' or ' if savers else ''}a smaller model"
    kept = f"train.batch_size = {largest} is the largest that fits at once; or split it: {_split(probe)}"
    return f"{kept}; or {savers[0]}" if savers else kept


def _split(probe: Probe) -> str:
    micro = probe.config.micro_batch_size
    return 'train.micro_batch_size = "auto"' + (f" in place of {json.dumps(micro)}" if micro else "")


def _searched_batch_sizes(spec: StudySpec, baseline: MemoryEstimate) -> list[int]:
    """All but the baseline's."""
    space = spec.search.get("train.batch_size")
    return sorted({int(corner) for corner in space.corners} - {baseline.batch_size}) if space else []


def check_snapshot(checkpoint: int, taken: int, free: int | None = None) -> Check:
    """Whether checkpoints can be written in the background.

    Args:
        checkpoint: Bytes of a checkpoint.
        taken: Bytes of host memory that the run takes.
        free: Free bytes of host memory before the run. Default: this machine's.
    """
    host = max(0, (available_memory("cpu") if free is None else free) - taken)
    message = f"a checkpoint's snapshot needs {format_bytes(checkpoint)} of host memory, {format_bytes(host)} are free"
    if checkpoint > host / 2:
        return Check(
            "snapshot",
            "warn",
            f"{message}: less than twice as much, so training waits while checkpoints are written",
            "free host memory, or raise train.save_every",
        )
    return Check("snapshot", "ok", message)
