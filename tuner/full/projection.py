"""What a full run will take, said before it goes on, and once more when its own speed is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import UserError
from trainer.acceleration import detect
from trainer.clock import format_hours
from trainer.memory import NoEstimate, Probe
from tuner.search_space import Setup, full_setup
from tuner.spec import StudySpec
from tuner.trials import baseline_trial, full_hours

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outlook:
    """What the full run of a trial will take, as far as it is known before it runs."""

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


def outlooks(study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, length: Mapping[str, Any]) -> list[Outlook]:
    """A trial's full run, and the baseline's beside it where it is another.

    Args:
        length: Of the full run, where it is not the spec's: fields of the configuration.
    """
    found = [_outlook(f"trial {chosen.number}", spec, chosen, length)]
    base = baseline_trial(study)
    if base is not None and base.number != chosen.number and base.params:
        found.append(_outlook(f"the baseline (trial {base.number})", spec, base, length))
    return found


def say(found: Sequence[Outlook]) -> None:
    """Log what `outlooks` found, a line each."""
    for i, one in enumerate(found):
        log.info("full run of %s%s: %s", one.name, " would be" if i else "", one)


def _outlook(name: str, spec: StudySpec, trial: FrozenTrial, length: Mapping[str, Any]) -> Outlook:
    setup = full_setup(spec, trial.params, **length)
    steps = setup.config.num_steps or 0
    samples = steps * setup.config.effective_batch_size
    hours = full_hours(trial, spec.full.length)
    # It was projected for the spec's length.
    asked = full_setup(spec, trial.params).config.num_steps or steps
    return Outlook(
        name,
        steps,
        samples,
        epochs=samples / len(setup.workload.train_data()),
        hours=hours * steps / asked if hours else None,
        memory=_memory(trial, setup),
    )


def _memory(trial: FrozenTrial, setup: Setup) -> str | None:
    if peak := trial.user_attrs.get("peak_memory"):
        return f"{_format_bytes(peak)} of memory (its trial's peak)"
    capabilities = detect(setup.config.device)
    try:
        probe = Probe.on_device(setup.workload, setup.config, capabilities)
        return f"{_format_bytes(probe.estimate().total)} of memory (estimated)"
    except (NoEstimate, UserError):
        return None


def _format_bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


class MeasuredSpeed:
    """A Tracker that says once what the full run takes at the speed and with the memory that it has, and the baseline's
    beside it: its trial may have run under another plan.

    A run of fewer steps than it takes to measure says nothing: it is over soon.

    Args:
        found: What `outlooks` found, the run's own first.
        peak: The most memory that the run took, in bytes; None where it is not known.
        keep: Called with the hours of the whole run.
        steps: Over how many at least the speed is measured.
    """

    def __init__(
        self,
        found: Sequence[Outlook],
        *,
        peak: Callable[[], int | None] = lambda: None,
        keep: Callable[[float], None] = lambda hours: None,
        steps: int = 50,
    ) -> None:
        self.own, self.base = found[0], found[1] if len(found) > 1 else None
        self.peak, self.keep, self.steps = peak, keep, steps
        self._steps = 0.0
        self._seconds = 0.0
        self._said = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        # Those of the warm-up, which holds the compilation and the choice of kernels, are not among the timed ones.
        timed = values.get("train/timed_steps", 0)
        if self._said or not timed:
            return
        batch_size = self.own.samples / self.own.steps
        self._steps += timed
        self._seconds += timed * batch_size / values["train/samples_per_second"]
        if self._steps < self.steps:
            return
        hours = self._seconds / (self._steps * batch_size) / 3600
        self._say(round(self._steps), hours * self.own.samples, hours * (self.own.samples - samples))
        self.keep(hours * self.own.samples)
        self._said = True

    def _say(self, steps: int, whole: float, left: float) -> None:
        own, base, peak = self.own, self.base, self.peak()
        known = [f"{format_hours(whole)} in all, {format_hours(left)} left"]
        known += [f"{_format_bytes(peak)} of memory at the peak"] if peak else []
        known += [f"{own.samples:,} samples", f"{own.epochs:.2f} epochs"]
        beside = f"; {base.name} would take about {format_hours(base.hours)}" if base and base.hours else ""
        log.info("measured over %d steps under its own plan: %s%s", steps, ", ".join(known), beside)

    def close(self) -> None:
        """Nothing to write at the end."""
