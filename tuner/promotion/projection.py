"""Projected length, hours and memory of a full run: by its trial before it starts, by its own speed once measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer import UserError
from trainer.acceleration import detect
from trainer.clock import format_hours
from trainer.memory import NoEstimate, Probe
from trainer.units import format_bytes
from tuner.spec.setups import Setup, full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.record import StudyRecord, TrialRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Projection:
    """The full run of a trial, as far as it is known before it runs."""

    name: str
    steps: int
    samples: int
    epochs: float
    hours: float | None
    """At the trial's own speed."""
    memory: str | None

    def __str__(self) -> str:
        known = [f"{self.steps:,} steps", f"{self.samples:,} samples", f"{self.epochs:.2f} epochs"]
        known += [f"about {format_hours(self.hours)}"] if self.hours else []
        return ", ".join(known + ([self.memory] if self.memory else []))


def project(record: StudyRecord, spec: StudySpec, trial: TrialRecord, steps: int | None) -> list[Projection]:
    """The full run of a trial, and that of the baseline to compare it with.

    Args:
        steps: Length of the trial's full run in optimizer updates.
    """
    asked = full_setup(spec, trial.params).config.num_steps
    other_length = {} if steps == asked else {"steps": steps, "samples": None}
    projections = [_project(f"trial {trial.number}", record, spec, trial, other_length)]
    base = record.baseline
    if base is not None and base.number != trial.number and base.params:
        projections.append(_project(f"the baseline (trial {base.number})", record, spec, base, other_length))
    return projections


def log_projections(projections: Sequence[Projection]) -> None:
    """Log a line each."""
    for i, projection in enumerate(projections):
        log.info("full run of %s%s: %s", projection.name, " would be" if i else "", projection)


def _project(
    name: str, record: StudyRecord, spec: StudySpec, trial: TrialRecord, other_length: Mapping[str, int | None]
) -> Projection:
    setup = full_setup(spec, trial.params, **other_length)
    steps = setup.config.num_steps or 0
    samples = steps * setup.config.effective_batch_size
    hours = record.full_hours(trial)
    # `full_hours` is for the spec's length.
    asked = full_setup(spec, trial.params).config.num_steps or steps
    return Projection(
        name,
        steps,
        samples,
        epochs=samples / len(setup.workload.train_data()),
        hours=hours * steps / asked if hours else None,
        memory=_memory(trial, setup),
    )


def _memory(trial: TrialRecord, setup: Setup) -> str | None:
    if trial.peak_memory:
        return f"{format_bytes(trial.peak_memory)} of memory (its trial's peak)"
    capabilities = detect(setup.config.device)
    try:
        probe = Probe.on_device(setup.workload, setup.config, capabilities)
        return f"{format_bytes(probe.estimate().total)} of memory (estimated)"
    except (NoEstimate, UserError):
        return None


class MeasuredSpeed:
    """A Tracker that logs once how long the full run takes at its own speed: its trial may have run under another plan.

    Args:
        projections: From `project`, the run's own first.
        peak: Returns the peak memory of the run in bytes, or None if it is not known.
        store_hours: Called with the hours of the whole run.
        steps: Over how many steps, at least, the speed is measured; a shorter run logs nothing.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        *,
        peak: Callable[[], int | None] = lambda: None,
        store_hours: Callable[[float], None] = lambda hours: None,
        steps: int = 50,
    ) -> None:
        self.own, self.base = projections[0], projections[1] if len(projections) > 1 else None
        self.peak, self.store_hours, self.steps = peak, store_hours, steps
        self._steps = 0.0
        self._seconds = 0.0
        self._is_logged = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        # Warm-up steps, with the compilation and the choice of kernels, are not timed.
        timed = values.get("train/timed_steps", 0)
        if self._is_logged or not timed:
            return
        batch_size = self.own.samples / self.own.steps
        self._steps += timed
        self._seconds += timed * batch_size / values["train/samples_per_second"]
        if self._steps < self.steps:
            return
        hours = self._seconds / (self._steps * batch_size) / 3600
        self._log(round(self._steps), hours * self.own.samples, hours * (self.own.samples - samples))
        self.store_hours(hours * self.own.samples)
        self._is_logged = True

    def _log(self, steps: int, whole: float, left: float) -> None:
        own, base, peak = self.own, self.base, self.peak()
        known = [f"{format_hours(whole)} in all, {format_hours(left)} left"]
        known += [f"{format_bytes(peak)} of memory at the peak"] if peak else []
        known += [f"{own.samples:,} samples", f"{own.epochs:.2f} epochs"]
        comparison = f"; {base.name} would take about {format_hours(base.hours)}" if base and base.hours else ""
        log.info("measured over %d steps under its own plan: %s%s", steps, ", ".join(known), comparison)

    def close(self) -> None:
        """Nothing is left to write."""
